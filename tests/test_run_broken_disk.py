"""A disk that fails at any instant of a run, from its start to its end: training goes on, and is told once."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import logix_like as logix
from logix_like.errors import StoreNotFoundError, StoreWriteError
from logix_like.store import open_store, verify
from logix_like.store.places import local
from tests.store.broken_disk import BrokenDisk
from tests.training import batches, data, full, network

EVERYTHING = {
    "record": "path",
    "checkpoints": "every_epoch",
    "statistics": ["covariance", "kronecker", "corrected_eigval"],
}


def train(root: Path, **store: Any) -> tuple[dict[str, torch.Tensor], logix.Run]:
    """Two epochs with everything logged that can be; the weights afterwards."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    config = full(root, **EVERYTHING, store={"dtype": "float64", "chunk_mib": 0.01, **store})
    run = logix.init("run", model, config, optimizer=optimizer, verbose=False)
    x, y = data()
    for epoch in range(2):
        run.epoch(epoch)
        for index in batches(8):
            with run(data_id=index):
                F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
        run.commit()
    run.finalize()
    return model.state_dict(), run


def broken(monkeypatch: pytest.MonkeyPatch, disk: BrokenDisk, root: Path, **store: Any) -> dict[str, torch.Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(local, "os", disk)
        return train(root, **store)[0]


@pytest.mark.parametrize("share", [40, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES], ids=["full", "forbidden"])
def test_training_goes_on_wherever_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int, share: int
) -> None:
    counting = BrokenDisk()
    expected = broken(monkeypatch, counting, tmp_path / "whole")
    first = [1, 2, 3, 4, 5, 6] if share > 1 else []
    for call in [*first, *range(1 + share // 2, counting.calls + 1, share)]:
        caplog.clear()
        disk, where = BrokenDisk(call, code), f"call {call} of {counting.calls}"
        with caplog.at_level(logging.ERROR):
            found = broken(monkeypatch, disk, tmp_path / str(call), on_error="stop_logging")
        if not disk.failed:
            continue  # timed commits: not every run asks for as much
        told = [record.message for record in caplog.records if "training goes on" in record.message]
        if told:
            assert len(told) == 1 and os.strerror(code) in told[0], f"{where}, {disk.failed}: {told}"
        else:  # only what was left over could not be removed: nothing is lost
            assert disk.failed == "replace" and len(open_store(tmp_path / str(call) / "run").view("mean")) == 23, where
        assert all(torch.equal(found[name], weight) for name, weight in expected.items()), where
        try:
            store = open_store(tmp_path / str(call) / "run")
        except StoreNotFoundError:
            continue
        assert len(store) <= 46 and verify(store.path).ok, f"{where}, {disk.failed}"
        logix.init("run", network(), full(tmp_path / str(call)), resume=True, verbose=False).finalize()


def test_without_the_option_the_first_failure_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in (1, 5, 12, 40):
        with pytest.raises(StoreWriteError, match=os.strerror(errno.EACCES)):
            broken(monkeypatch, BrokenDisk(call, errno.EACCES), tmp_path / str(call))
