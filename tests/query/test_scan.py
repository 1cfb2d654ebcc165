"""Reading ahead, and scans of stores whose chunks are no mapped files."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from logix_like.capture.batch import ProjectedBatch
from logix_like.query.engine import QueryEngine
from logix_like.query.fitting import Recent
from logix_like.query.gradients import QueryGradients
from logix_like.query.scan import CHUNKS_AHEAD, ahead
from logix_like.store import GradientStore, StoreWriter, create_store, describe, open_store
from logix_like.store.reading.gradients import RowChunk
from tests.reference import blocks_layout, dense_ranking

LAYOUT = blocks_layout((4, 8), (8, 4))


def _same(key: tuple[int, int]) -> tuple[int, int]:
    return key


def _numbers(taken: list[int], stop: int, fail_at: int = -1) -> Iterator[RowChunk]:
    for number in range(stop):
        if number == fail_at:
            raise OSError("the disk is gone")
        taken.append(number)
        yield cast(RowChunk, number)


def test_all_chunks_come_in_order_and_few_ahead() -> None:
    taken: list[int] = []
    for place, chunk in enumerate(cast(Iterator[Any], ahead(_numbers(taken, 9)))):
        assert chunk == place
        assert len(taken) <= place + 1 + CHUNKS_AHEAD
    assert taken == list(range(9))


def test_an_error_comes_where_it_happened_and_nothing_runs_on() -> None:
    chunks = ahead(_numbers([], 9, fail_at=3))
    assert [int(cast(Any, next(chunks))) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(chunks)
    taken: list[int] = []
    stopped = ahead(_numbers(taken, 1000))
    next(stopped)
    assert isinstance(stopped, Generator)
    stopped.close()
    assert len(taken) <= 1 + CHUNKS_AHEAD
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def _store(place: str | Path, rows: torch.Tensor, **options: Any) -> GradientStore:
    create_store(place, {})
    describe(place, LAYOUT, "bfloat16", {block.name: (None, None) for block in LAYOUT})
    with StoreWriter(place, LAYOUT, "bfloat16", chunk_mib=40 * LAYOUT.width * 4 / 2**20, **options) as writer:
        writer.put(ProjectedBatch(tuple(range(len(rows))), rows))
    return open_store(place)


@pytest.mark.parametrize("where", ["local", "compressed", "memory"])
def test_every_place_gives_the_same_answer(tmp_path: Path, where: str) -> None:
    if where == "memory":
        pytest.importorskip("obstore")
    rows, asked = torch.randn(300, LAYOUT.width).bfloat16(), torch.randn(2, LAYOUT.width)
    place = "memory://engine/scan" if where == "memory" else tmp_path / "store"
    store = _store(place, rows.float(), **({"codec": "zstd"} if where == "compressed" else {}))
    assert store.gradients.mapped == (where == "local")
    query = QueryGradients((0, 1), asked, LAYOUT)
    engine = QueryEngine(store, keep_bytes=0)
    expected = asked.double() @ rows.double().T
    result = engine.influence(query, k=4, preconditioner="identity")
    assert result.proponents().ids.tolist() == dense_ranking(expected, 4)
    with ThreadPoolExecutor(1) as pool:
        other = engine.influence(query, k=4, preconditioner="identity", engine="dask", client=pool)
    assert other.opponents().ids.tolist() == dense_ranking(-expected, 4)
    if where != "local":
        some = engine.influence(query, k=4, preconditioner="identity", data_id=range(0, 300, 3))
        assert some.proponents().ids.tolist() == [[3 * c for c in r] for r in dense_ranking(expected[:, ::3], 4)]


def test_what_is_kept_is_made_once_for_threads_that_ask_together() -> None:
    made: list[int] = []
    kept: Recent[tuple[int, int]] = Recent(1)

    def ask(thread: int) -> bool:
        keys = [(thread, number % 3) for number in range(5000)]
        return all(kept.get(key, partial(_same, key)) == key for key in keys)

    def slow() -> tuple[int, int]:
        time.sleep(0.01)
        made.append(1)
        return 0, 0

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(ask, range(4)))
            assert set(threads.map(lambda _: kept.get("slow", slow), range(4))) == {(0, 0)}
    finally:
        sys.setswitchinterval(before)
    assert made == [1]
