"""The end of a run: when it fails, when it is asked for again, and when a later run takes the store over."""

from __future__ import annotations

import errno
import gc
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import logix_like as logix
from logix_like.errors import StoreWriteError
from logix_like.run import session
from logix_like.store import open_store, verify
from logix_like.store.format.schema import Flag
from logix_like.store.places import local
from tests.interrupts import broken_off_at
from tests.store.broken_disk import BrokenDisk
from tests.training import data, full, network


def begin(root: Path, model: nn.Module, **options: Any) -> logix.Run:
    return logix.init("run", model, full(root), verbose=False, **options)


def step(run: logix.Run, model: nn.Module, ids: range, scaler: Any = None) -> None:
    x, y = data(next(model.parameters()).dtype)
    with run(data_id=ids, scaler=scaler):
        loss = F.cross_entropy(model(x[: len(ids)]), y[: len(ids)])
        (loss if scaler is None else scaler.scale(loss)).backward()


def test_what_was_lost_is_said_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    run = begin(tmp_path, model)
    step(run, model, range(4))
    run.commit()
    step(run, model, range(4, 8))
    with monkeypatch.context() as patch:
        patch.setattr(local, "os", BrokenDisk(1))
        with pytest.raises(StoreWriteError, match="No space left"):
            run.finalize()
    for _ in range(2):
        with pytest.raises(StoreWriteError, match=r"No space left.*4 of 8 rows are committed and safe"):
            run.finalize()
    assert len(open_store(run.path)) == 4 and verify(run.path).ok


def test_what_was_left_to_do_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows were committed, and there was no room for their sample view."""
    model = network()
    run = begin(tmp_path, model)
    for _ in range(2):
        step(run, model, range(4))

    def full_disk(path: Path) -> None:
        raise StoreWriteError("no room for the view; make room")

    with monkeypatch.context() as patch, pytest.raises(StoreWriteError, match="no room for the view"):
        patch.setattr(session, "build_view", full_disk)
        run.finalize()
    assert len(open_store(run.path)) == 8 and not (tmp_path / "run/views").exists()
    run.finalize()
    assert len(list((tmp_path / "run/views/mean").iterdir())) == 1
    run.finalize()


# As in test_run_errors.py: a file that is broken off as it is opened is closed when it is forgotten.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_end_that_is_broken_off_anywhere_can_be_ended(tmp_path: Path) -> None:
    """Ctrl-C at every 29th place of the interpreter."""
    for at in itertools.count(1, 29):
        model = network()
        run = begin(tmp_path / str(at), model)
        for _ in range(2):
            step(run, model, range(4))
        ended = broken_off_at(at, run.finalize)
        run.finalize()
        opened = open_store(run.path)
        assert len(opened) == 8 and opened.writers[0].state == "closed", at
        if ended:
            break
    assert at > 29, "nothing was broken off"


@pytest.fixture
def accumulating(tmp_path: Path) -> Iterator[tuple[logix.Run, nn.Module]]:
    """A run in the midst of a step that a scaler may skip: its first rows are held back."""
    model = network(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = begin(tmp_path, model, optimizer=optimizer)
    step(run, model, range(4), torch.amp.GradScaler("cpu", init_scale=2.0))
    yield run, model


def test_a_run_that_takes_over_finds_what_was_held_back(
    tmp_path: Path, accumulating: tuple[logix.Run, nn.Module]
) -> None:
    run, model = accumulating
    run.commit()
    assert run.rows == 0
    again = begin(tmp_path, model, resume=True)
    assert again.resumed_at == (-1, 0) and again.store.data_id.tolist() == [0, 1, 2, 3]
    step(again, model, range(4, 8))
    again.finalize()
    assert again.store.data_id.tolist() == list(range(8)) and not (again.store.flags & Flag.OVERFLOW).any()


def test_a_run_that_replaces_another_does_not_wait_for_its_rows(
    tmp_path: Path, accumulating: tuple[logix.Run, nn.Module]
) -> None:
    run, model = accumulating
    again = begin(tmp_path, model, overwrite=True)
    assert run.rows == 0
    step(again, model, range(4))
    again.finalize()
    assert len(again.store) == 4


def test_what_is_held_back_and_cannot_be_written_hinders_nobody(
    tmp_path: Path,
    accumulating: tuple[logix.Run, nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, model = accumulating
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr("logix_like.store.format.creation.write_group", _refuse)
        again = begin(tmp_path, model, resume=True)
    assert "held back are not stored" in caplog.text and "Permission denied" in caplog.text
    step(again, model, range(4))
    again.finalize()
    assert len(again.store) == 4


def _refuse(*_: Any, **__: Any) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def test_a_forgotten_run_is_collected(tmp_path: Path) -> None:
    """The session and what holds rows back know each other."""
    model = network()
    run = begin(tmp_path, model)
    step(run, model, range(4))
    del run
    gc.collect()
    assert open_store(tmp_path / "run").writers[0].state == "closed"
