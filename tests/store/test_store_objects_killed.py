"""What changes a store in object storage, killed at each of its requests that write: it can be done again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import obstore
import pytest
import torch

from logix_like.statistics import StatisticsAccumulator
from logix_like.store import Place, as_place, merge_parts, open_store, repair, verify
from logix_like.store.places import objects
from logix_like.store.places.files import exists, files_of, read_bytes, write_file
from tests.store.broken_disk import Killed
from tests.store.store_runs import WIDTH, batches, log, new_store, small_layout, writer

SHARES = [7, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
"""Every seventh request in the default run; all of them in the slow one."""


class DyingRequests:
    """Stands in for :mod:`obstore`: from the ``n``-th request that writes (from 1) on none is made."""

    def __init__(self, die_at: int = 0) -> None:
        self._die_at = die_at
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(obstore, name)
        return self._counted(real) if name in ("put", "copy", "delete") else real

    def _counted(self, real: Any) -> Any:
        def request(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self._die_at and self.calls >= self._die_at:
                raise Killed
            return real(*arguments, **options)

        return request


def damaged_store(root: str) -> tuple[Place, torch.Tensor]:
    """80 rows in two parts; two chunks, one line of the record and the statistics of the first part are damaged."""
    store, rows = new_store(as_place(root)), torch.arange(80.0).unsqueeze(1).expand(80, WIDTH).contiguous()
    with writer(store, statistics=StatisticsAccumulator(small_layout(), ["covariance"])) as out:
        for batch in batches(rows[:64], size=8):
            out.put(batch)
    log(store, rows[64:])
    part = store / "writers/0-1"
    for name in ("gradients/c.0.0", "columns/c.2.0", "commits/000000001", "statistics/1/outer_sum/c.0"):
        content = read_bytes(part / name)
        content[len(content) // 2] ^= 4
        write_file(part / name, [content])
    return store, torch.cat([rows[48:80]])


@pytest.mark.parametrize("share", SHARES)
def test_a_repair_that_was_killed_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: int
) -> None:
    """Also between the lines of a record, of which some are those of before and some the new ones."""
    counting = DyingRequests()
    with monkeypatch.context() as patch:
        store, kept = damaged_store(f"memory://killed-repair/{tmp_path.name}/whole")
        patch.setattr(objects, "obstore", counting)
        assert repair(store).ok
    for call in range(1 + share // 2, counting.calls + 1, share):
        store, kept = damaged_store(f"memory://killed-repair/{tmp_path.name}/{call}")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(objects, "obstore", DyingRequests(call))
            repair(store)
        again = repair(store)
        assert again.ok and verify(store).ok, f"killed at request {call}: {again}"
        opened = open_store(store)
        assert opened.gradients[:].equal(kept), f"killed at request {call}"
        _ = opened.statistics
        assert repair(store).quarantine is None, "there is nothing left to be done"
        log(store, kept[:3])
        assert len(open_store(store)) == len(kept) + 3


@pytest.mark.parametrize("share", SHARES)
def test_a_merge_that_was_killed_is_unseen_or_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: int) -> None:
    def filled(name: str) -> tuple[Place, torch.Tensor]:
        store, rows = new_store(as_place(f"memory://killed-merge/{tmp_path.name}/{name}")), torch.randn(30, WIDTH)
        for start in (0, 10, 20):
            log(store, rows[start : start + 10])
        return store, rows

    counting = DyingRequests()
    with monkeypatch.context() as patch:
        store, _ = filled("whole")
        patch.setattr(objects, "obstore", counting)
        merge_parts(store)
    for call in range(1 + share // 2, counting.calls + 1, share):
        store, rows = filled(str(call))
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(objects, "obstore", DyingRequests(call))
            merge_parts(store)
        assert open_store(store).gradients[:].equal(rows) and verify(store).ok, f"killed at request {call}"
        merge_parts(store)
        opened = open_store(store)
        assert opened.gradients[:].equal(rows) and len(opened.writers) == 1, f"killed at request {call}"
        names = files_of(store).names(store / "writers")
        assert [name for name in names if exists(store / "writers" / name / "commits")] == [opened.writers[0].name]
