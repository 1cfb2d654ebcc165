"""A logged block never waits for the device that computes it, and what it made arrives whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import logix_like as logix
from logix_like.run import logbook
from logix_like.run.delivery import Delivery, Streams
from tests.training import data, full, network, own_gradients

COPIES = ("aten._to_copy", "aten.copy_", "aten.embedding")
"""Operators that may see two devices."""


class FakeBackend:
    """Stands in for ``torch.cuda``: a stream that copies when its event is waited for, and a log of what was asked."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def Stream(self, device: torch.device) -> FakeStream:  # noqa: N802
        return FakeStream("copies", self.log)

    def Event(self, *, blocking: bool) -> FakeEvent:  # noqa: N802
        assert blocking
        return FakeEvent(self.log)

    def current_stream(self, device: torch.device) -> str:
        return "training"

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.log.append(f"on {stream.name}")
        yield
        self.log.append("back")


class FakeStream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def wait_stream(self, other: str) -> None:
        self._log.append(f"{self.name} behind {other}")

    def record_event(self, event: FakeEvent) -> FakeEvent:
        self._log.append("recorded")
        return event


class FakeEvent:
    def __init__(self, log: list[str]) -> None:
        self._log = log

    def synchronize(self) -> None:
        self._log.append("waited")


class FromDevice(Tensor):
    """A tensor whose copies are seen."""

    seen: list[str]

    def record_stream(self, stream: Any) -> None:
        self.seen.append(f"kept for {stream.name}")

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        assert (args, kwargs) == (("cpu",), {"non_blocking": True})
        self.seen.append("copied")
        return self.as_subclass(Tensor)


def test_copies_are_made_behind_the_computation_and_waited_for_by_their_reader() -> None:
    backend = FakeBackend()
    streams = Streams(backend, kind="cpu")
    delivery = Delivery(streams)
    for number in range(2):
        tensor = torch.full((2,), float(number)).as_subclass(FromDevice)
        tensor.seen = backend.log
        assert delivery.take(tensor).tolist() == [number, number]
    delivery.sent()
    copy = ["on copies", "kept for copies", "copied", "back"]
    assert backend.log == ["copies behind training", *copy, *copy, "recorded"]
    delivery.wait()
    assert backend.log[-1] == "waited"


def test_on_the_host_nothing_is_copied() -> None:
    delivery, tensor = Delivery(Streams()), torch.ones(3)
    assert delivery.take(tensor) is tensor
    delivery.sent()
    delivery.wait()


class OneDevice(TorchDispatchMode):
    """Refuses operators that mix the host with the device: on a real one they fail or wait for it."""

    def __init__(self) -> None:  # that of the base carries no types
        TorchDispatchMode.__init__(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim]
        if len({t.device.type for t in tensors}) > 1 and not str(func).startswith(COPIES):
            raise AssertionError(f"{func} sees several devices")
        return func(*args, **(kwargs or {}))


class FromMeta(Delivery):
    """Brings zeros of the right shape, where there is nothing to bring."""

    def take(self, tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor


class Scaler(torch.amp.GradScaler):
    """One whose scale lies on the meta device."""

    def get_scale(self) -> float:
        raise AssertionError("get_scale waits for the device")


def meta_network() -> nn.Module:
    layers = [nn.Conv1d(3, 4, 2), nn.Flatten(), nn.Linear(24, 8), nn.LayerNorm(8), nn.Linear(8, 3, bias=False)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("case", ["plain", "loss", "scaler", "tokens"])
def test_a_block_waits_for_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """On the meta device whatever would wait (item, bool, tolist, a copy to the host) raises, as do mixed devices."""
    monkeypatch.setattr(logbook, "Delivery", FromMeta)
    monkeypatch.setattr(logbook, "compare_with_gradients", lambda *_: None)  # once, at the first block
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # which is refused for this device
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)) if case == "tokens" else meta_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = full(tmp_path, statistics=["covariance", "kronecker"], projection={"rank": 2, "init": "orthogonal"})
    run = logix.init("run", model, settings, optimizer=optimizer, verbose=False)
    inputs = torch.ones(5, 7, 4) if case == "tokens" else torch.ones(5, 3, 7)
    options: dict[str, Any] = {}
    if case == "loss":
        options["loss"] = torch.ones(5, device="meta")
    if case == "tokens":
        options |= {"mask": torch.ones(5, 7, dtype=torch.bool), "loss_reduction": "token_mean"}
    scaler = Scaler("cpu") if case == "scaler" else None
    model.to("meta")
    for number in range(3):
        with OneDevice(), run(data_id=range(5), scaler=scaler, **options):
            output = model(inputs.to("meta")).sum()
            (output if scaler is None else scaler.scale(output)).backward()
        if number == 0:
            assert len(run.get_log()) == 5
        run.step(number + 1)
    run.commit()
    assert len(run.store) == 15
    model.to_empty(device="cpu")  # whose weights are looked at in the end
    run.finalize()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scaled", [False, True])
def test_rows_from_a_cuda_device(tmp_path: Path, scaled: bool) -> None:
    model, (x, y) = network(torch.float32).cuda(), data(torch.float32)
    scaler = torch.amp.GradScaler("cuda", enabled=scaled)
    settings = full(tmp_path, statistics=["covariance", "kronecker"], store={"dtype": "float32"})
    run = logix.init("run", model, settings, verbose=False)
    for index in torch.arange(len(x)).split(5):
        losses = F.cross_entropy(model(x[index].cuda()), y[index].cuda(), reduction="none")
        with run(data_id=index, scaler=scaler, loss=losses):
            loss = F.cross_entropy(model(x[index].cuda()), y[index].cuda())
            scaler.scale(loss).backward()
    run.finalize()
    expected = own_gradients(network(), *data())
    assert float((run.store.gradients[:].double() - expected).norm() / expected.norm()) < 1e-4
    assert torch.from_numpy(run.store.loss).isfinite().all()
    assert run.store.statistics.kronecker("0").input.isfinite().all()
