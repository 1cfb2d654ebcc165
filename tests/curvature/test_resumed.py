"""What was half-finished with other data, targets or another likelihood is not gone on with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from logix_like.curvature import fit_curvature
from logix_like.errors import StatisticsError
from logix_like.objective import Gaussian, Objective

Batch = dict[str, Any]


class InterruptedFitError(Exception):
    """What stops a fit."""


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 3)).double()


def data(seed: int) -> list[Batch]:
    random = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(20, n, 6 - n, generator=random, dtype=torch.float64) for n in (1, 3))
    return [{"x": a[:, 0], "y": b[:, :, 0]} for a, b in zip(x.split(5), y.split(5), strict=True)]


OBJECTIVE = Objective(Gaussian(), outputs=lambda model, batch: model(batch["x"]), targets=lambda batch: batch["y"])


def interrupted(model: nn.Module, batches: Any, folder: Path, **options: Any) -> None:
    """The first pass ends, and with it there is something to go on with; the second does not."""
    seen = 0

    def stop(batch: Batch) -> None:
        nonlocal seen
        seen += 1
        if seen == 1 + 4 + 2:
            raise InterruptedFitError

    with pytest.raises(InterruptedFitError):
        fit_curvature(model, batches, OBJECTIVE, mask=stop, resume_from=folder, progress=False, **options)
    assert (folder / "kfac.safetensors").is_file()


def test_a_fit_of_the_same_goes_on(tmp_path: Path) -> None:
    model = network()
    interrupted(model, data(0), tmp_path)
    found = fit_curvature(model, data(0), OBJECTIVE, resume_from=tmp_path, progress=False)
    whole = fit_curvature(model, data(0), OBJECTIVE, progress=False)
    assert torch.allclose(found.eigenvalues["0"], whole.eigenvalues["0"], rtol=1e-12)
    assert not tmp_path.exists() or not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", ["data", "targets", "likelihood", "mask"])
def test_a_fit_of_something_else_is_refused(tmp_path: Path, other: str) -> None:
    model, batches, objective, mask = network(), data(0), OBJECTIVE, None
    interrupted(model, batches, tmp_path)
    if other == "data":
        batches = data(1)
    elif other == "targets":
        objective = replace(OBJECTIVE, targets=lambda batch: -batch["y"])
    elif other == "likelihood":
        objective = replace(OBJECTIVE, likelihood=Gaussian(2.0))
    else:

        def mask(batch: Batch) -> Tensor:
            return torch.ones(len(batch["y"]), 1)

    with pytest.raises(StatisticsError, match=r"half-finished fit with data '.*', and this one has '.*': delete the"):
        fit_curvature(model, batches, objective, mask=mask, resume_from=tmp_path, progress=False)


def test_a_look_at_the_first_batch_takes_none_away(tmp_path: Path) -> None:
    batches = data(0)

    def once() -> Iterator[Batch]:
        yield from batches

    found = fit_curvature(network(), once(), OBJECTIVE, kind="kfac", resume_from=tmp_path, progress=False)
    assert found.fisher.samples == 20
    shuffled: DataLoader[Any] = DataLoader(
        [sample for batch in batches for sample in samples(batch)], batch_size=5, shuffle=True
    )
    model = network()
    interrupted(model, shuffled, tmp_path, labels="empirical")
    assert (
        fit_curvature(
            model, shuffled, OBJECTIVE, labels="empirical", resume_from=tmp_path, progress=False
        ).fisher.samples
        == 20
    )


def samples(batch: Batch) -> list[Batch]:
    return [{"x": x, "y": y} for x, y in zip(batch["x"], batch["y"], strict=True)]
