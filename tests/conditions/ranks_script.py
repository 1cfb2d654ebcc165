"""What each process of test_distributed.py runs: ``ranks_script.py <root> ddp | fsdp | scaled | killed ...``."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import logix_like as logix
from logix_like.errors import ConfigError, StoreWriteError
from tests.training import SAMPLES, data, full, network

SIZE = 2


def shares(rank: int) -> Iterator[Tensor]:
    """Indices of a process's batches: 12 and 11 samples, so that the last batches have 2 and 1."""
    yield from torch.arange(rank, SAMPLES, SIZE).split(5)


def wrapped(name: str, model: nn.Module) -> nn.Module:
    if name != "fsdp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (SIZE,))
    for part in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(name: str, root: str) -> None:
    """Two epochs into ``<root>/run``; under the name ``killed`` the second process dies after two batches."""
    rank, (x, y) = dist.get_rank(), data()
    model = wrapped(name, network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = full(root, checkpoints="every_epoch", record="path")
    run = logix.init("run", model, config, optimizer=optimizer, verbose=False)
    require_tracking_refused(run, (x, y))
    for epoch in range(2):
        run.epoch(epoch)
        for number, index in enumerate(shares(rank)):
            with run(data_id=index):
                F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if name == "killed" and number == 1:
                run.commit()
                dist.barrier()
                if rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
    run.finalize()


def train_beside_a_store_that_cannot_be_begun(on_error: str, root: str) -> None:
    """The first process cannot write the module table; with ``stop_logging`` both train on, else both stop."""
    rank, (x, y), model = dist.get_rank(), data(), network()
    config = full(root, store={"on_error": on_error})
    run = logix.init("run", wrapped("ddp", model), config, verbose=False)
    if rank == 0:
        (run.path / "projections").write_text("in the way of a folder")
    begun = time.monotonic()
    try:
        for index in shares(rank):
            with run(data_id=index):
                F.cross_entropy(model(x[index]), y[index]).backward()
        run.finalize()
    except StoreWriteError as error:
        sys.stderr.write(f"process {rank} raised: {error}\n")
    sys.stderr.write(f"process {rank} ended after {time.monotonic() - begun:.0f} s\n")


def train_with_an_overflow_in_one_shard(root: str) -> None:
    """Four steps of one layer under FSDP; in the second a gradient overflows that lies in the first process alone."""
    rank, model = dist.get_rank(), nn.Sequential(nn.Linear(6, 4))
    optimizer, scaler = torch.optim.SGD(wrapped("fsdp", model).parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    run = logix.init("run", model, full(root), optimizer=optimizer, verbose=False)
    for step in range(4):
        with run(data_id=[f"{rank}-{step}"], scaler=scaler):
            found = model(torch.ones(1, 6))
            if step == 1:
                found.register_hook(lambda gradient: gradient * torch.tensor([torch.inf, 1.0, 1.0, 1.0]))
            scaler.scale(found.square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    run.finalize()


def require_tracking_refused(run: logix.Run, queries: tuple[Tensor, Tensor]) -> None:
    """Queries are tracked in one process only; several are told so before anything is computed."""
    try:
        run.track(queries, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    except ConfigError as error:
        assert "queries are tracked in one process" in str(error), error
    else:
        raise AssertionError("tracking queries in several processes was not refused")


def train_until_one_breaks(root: str) -> None:
    """The second process raises in the midst of its third batch, while the first waits for its gradients."""
    rank, (x, y), model = dist.get_rank(), data(), wrapped("ddp", network())
    with logix.init("run", model, full(root), verbose=False) as run:
        for number, index in enumerate(shares(rank)):
            with run(data_id=index):
                if number == 2 and rank == 1:
                    raise RuntimeError("broken")
                F.cross_entropy(model(x[index]), y[index]).backward()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in sys.argv[2:]:
        if name == "scaled":
            train_with_an_overflow_in_one_shard(f"{sys.argv[1]}/{name}")
        elif name in ("raise", "stop_logging"):
            train_beside_a_store_that_cannot_be_begun(name, f"{sys.argv[1]}/{name}")
        elif name == "broken":
            train_until_one_breaks(f"{sys.argv[1]}/{name}")
        else:
            train(name, f"{sys.argv[1]}/{name}")
    dist.barrier()
    dist.destroy_process_group()
    # On a busy machine torch's own threads were seen to abort the interpreter's exit ("terminate called without an
    # active exception", no Python frame); all that is tested has been written by now.
    sys.stdout.flush()
    os._exit(0)
