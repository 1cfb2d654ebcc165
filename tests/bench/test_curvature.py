"""Bar B14: EK-FAC at full size on W1; ``python -m pytest tests/bench/test_curvature.py -s`` prints the table.

Batches of a plain epoch and of our passes are timed in one process, in turn. The eigenvectors,
which cost the same whatever the number of samples, are printed apart: an epoch of W1 has 64 batches.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from logix_like.capture.selection import select_modules
from logix_like.curvature import damped_inverse_of, fit_curvature
from logix_like.curvature.gradients import InnerProducts, SquareSums
from logix_like.curvature.moments import FactorSums
from logix_like.curvature.sweep import Sweep
from logix_like.estimators import EKFAC
from logix_like.linalg.basis import eigenbasis
from logix_like.objective import Objective
from tests.bench import w1

TIMED = 6
"""Batches of each pass that are timed; all batches are alike."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One, and the processor's time, so that neighbours on the machine disturb less."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seconds(act: Callable[[], object]) -> float:
    start = time.process_time()
    act()
    return time.process_time() - start


@pytest.mark.timeout(900)
def test_b14_fit_and_scores() -> None:
    network, objective = w1.model(), Objective.language_model()
    selection = select_modules(network, include=["model.layers.*"], types=["Linear"])
    batches = [{"input_ids": tokens} for tokens in w1.batches()[: TIMED + 1]]
    sweep = Sweep(network, objective, selection)
    generator = torch.Generator().manual_seed(0)
    curvature = fit_curvature(network, batches[:1], objective, selection=selection, progress=False)
    factors = FactorSums(8192, "highest")
    squares = SquareSums(curvature.bases, "highest")
    scores = EKFAC(network, batches[:1], objective, curvature=curvature, selection=selection, progress=False)
    inner = InnerProducts(curvature.apply(damped_inverse_of(0.1), scores.gradients(batches[0])))

    def plain(batch: dict[str, torch.Tensor]) -> None:
        network.zero_grad()
        w1.loss(network, batch["input_ids"]).backward()

    def sampled(model: Callable[..., object], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return objective.sampled_losses(model, batch, generator)

    passes: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
        "factors": lambda batch: sweep.run(batch, sampled, factors),
        "eigenvalues": lambda batch: sweep.run(batch, sampled, squares),
        "8 queries scored": lambda batch: sweep.run(batch, objective.losses, inner),
    }
    found = {}
    for name, act in passes.items():
        ours, theirs = [], []
        for number, batch in enumerate(batches):
            a, b = seconds(partial(act, batch)), seconds(partial(plain, batch))
            if number:  # the first warms up
                ours.append(a)
                theirs.append(b)
        ratio = w1.ratio_of(f"B14 pass: {name} / plain epoch", ours, theirs)
        found[name] = ratio.quartiles[1]
        sys.stdout.write(f"\n{ratio}")
    step = seconds(partial(plain, batches[0]))
    sides = [("output", name) for name in sweep.layout.names] + [("input", name) for name in set(sweep.groups.values())]
    eigen = seconds(lambda: [eigenbasis(factors.moments(*side)) for side in sides])
    share = eigen / (64 * step)
    fit = found["factors"] + found["eigenvalues"] + share
    sys.stdout.write(
        f"\nB14 eigenvectors {eigen:.1f} s, {share:.2f} of an epoch; fit / plain epoch {fit:.2f} (bar 2.0)"
    )
    sys.stdout.write(f"\nB14 8 queries x 512 / plain epoch {found['8 queries scored']:.2f} (bar .85)\n")
