"""Models whose layers do not hold the weights that they use are refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import logix_like as logix
from logix_like.errors import ConfigError
from tests.training import full, network


@pytest.fixture(autouse=True)
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=(tmp_path / "group").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::Warning:torch.*")
@pytest.mark.parametrize("together", [True, False])
def test_the_first_version_of_fsdp(tmp_path: Path, together: bool) -> None:
    model = FullyShardedDataParallel(network(), use_orig_params=together, device_id=torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"\(FSDP1\).* shard it with torch.distributed.fsdp.fully_shard"):
        logix.init("run", model, full(tmp_path), verbose=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sharded", [True, False])
def test_tensor_parallelism(tmp_path: Path, sharded: bool) -> None:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(network(), mesh["tp"], {"0": ColwiseParallel()})
    if sharded:
        fully_shard(model, mesh=mesh["dp"])
    with pytest.raises(ConfigError, match=r"the weight '0.weight' is split by tensor parallelism"):
        logix.init("run", model, full(tmp_path), verbose=False)
    fully_shard(plain := network(), mesh=mesh["dp"])
    logix.init("run", plain, full(tmp_path), verbose=False).finalize()
