"""Fits whose large tensors lie on disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from logix_like.curvature import fit_curvature
from logix_like.curvature.gradients import SquareSums
from logix_like.curvature.sums import Scratch, Sums
from logix_like.errors import ConfigError, StoreWriteError


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def data() -> list[tuple[Tensor, Tensor]]:
    x, y = torch.randn(20, 5), torch.randint(3, (20,))
    return list(zip(x.split(5), y.split(5), strict=True))


def on_disk(tensor: Tensor) -> bool:
    return tensor.untyped_storage().filename is not None


def test_all_that_is_large_lies_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sinks: list[SquareSums] = []
    begin = SquareSums.begin

    def noted(sink: SquareSums, samples: int, mask: Tensor | None) -> None:
        sinks.append(sink)
        begin(sink, samples, mask)

    monkeypatch.setattr(SquareSums, "begin", noted)
    curvature = fit_curvature(network(), data(), scratch=tmp_path, progress=False)
    for name, values in curvature.eigenvalues.items():
        assert on_disk(values)
        assert all(on_disk(part) for basis in curvature.bases[name] for part in basis.parts)
    cast = [part for basis in sinks[0]._cast.values() for part in basis.parts]
    assert cast and all(on_disk(part) and part.dtype == torch.float32 for part in cast)
    assert not list(tmp_path.iterdir())


def test_sums_are_on_disk_before_they_have_settled_and_when_they_are_restored(tmp_path: Path) -> None:
    sums = Sums(Scratch(tmp_path))
    sums.begin(2)
    sums.add("a", torch.ones(3))
    sums.add_product("b", torch.ones(3, 2), torch.ones(2, 3))
    assert all(on_disk(recent) for recent in sums._recent.values())
    kept = {name: total.clone() for name, total in sums.all().items()}
    again = Sums(Scratch(tmp_path))
    again.restore(kept)
    again.add("a", torch.ones(3))
    assert torch.equal(again.all()["a"], torch.full((3,), 2.0, dtype=torch.float64))
    assert on_disk(again.all()["b"]) and again.samples == 2


def test_a_disk_that_is_full_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("logix_like.curvature.sums.os.posix_fallocate", full)
    with pytest.raises(StoreWriteError, match=r"could not take 144 bytes of scratch: .*No space left.*name another"):
        fit_curvature(network(), data(), scratch=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"scratch is .*, a file; it must be a folder"):
        Scratch(tmp_path / "file")
