"""SOURCE: identities D7 to D10 of METHODS.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import logix_like as logix
from logix_like.errors import ConfigError, StoreError
from logix_like.estimators.segments import DenseSpectrum
from logix_like.estimators.source import Source, gathered, kept
from logix_like.estimators.tracin import TracIn
from logix_like.estimators.unrolling import ExactUnrolling
from logix_like.layout import DataId
from logix_like.objective import Gaussian, Objective
from logix_like.path import TrainingPath
from tests.path_runs import OBJECTIVE, batch_of, network, queries, train

EXACT = 1e-9
N, D = 10, 6


def _relative(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.fixture(scope="module")
def quadratic() -> tuple[DenseSpectrum, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(D, D, generator=generator, dtype=torch.float64)
    matrix = root @ root.T / D + 0.1 * torch.eye(D, dtype=torch.float64)
    return DenseSpectrum(*torch.linalg.eigh(matrix)), matrix, torch.randn(D, generator=generator, dtype=torch.float64)


def _gathered(spectrum: DenseSpectrum, amount: float, vector: Tensor) -> Tensor:
    return spectrum.apply(lambda _, s: gathered(s, amount), {"": vector[None]})[""][0]


def _kept(spectrum: DenseSpectrum, amount: float, vector: Tensor) -> Tensor:
    return spectrum.apply(lambda _, s: kept(s, amount), {"": vector[None]})[""][0]


def test_a_segment_is_what_many_small_steps_do(quadratic: tuple[DenseSpectrum, Tensor, Tensor]) -> None:
    """D7': gradient descent with a constant gradient; the error falls as 1 / steps."""
    spectrum, matrix, gradient = quadratic
    counts, errors = (20, 40, 80, 160), []
    for count in counts:
        moved = torch.zeros_like(gradient)
        for _ in range(count):
            moved = moved - 2.0 / count * (matrix @ moved) + 2.0 / count * gradient
        errors.append(_relative(_gathered(spectrum, 2.0, gradient), moved))
    assert np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(-1, abs=0.1) and errors[-1] < 0.01


def test_segments_chain(quadratic: tuple[DenseSpectrum, Tensor, Tensor]) -> None:
    """D8: two segments of one curvature are one."""
    spectrum, _, gradient = quadratic
    chained = _kept(spectrum, 0.7, _gathered(spectrum, 1.3, gradient)) + _gathered(spectrum, 0.7, gradient)
    torch.testing.assert_close(chained, _gathered(spectrum, 2.0, gradient), rtol=EXACT, atol=EXACT)


def test_the_limits_are_influence_and_tracin(quadratic: tuple[DenseSpectrum, Tensor, Tensor]) -> None:
    """D9, D9': also for steps so small that 1 - exp would lose every digit, and for eigenvalue 0."""
    spectrum, matrix, gradient = quadratic
    torch.testing.assert_close(
        _gathered(spectrum, 1e3, gradient), torch.linalg.solve(matrix, gradient), rtol=1e-9, atol=0
    )
    torch.testing.assert_close(_gathered(spectrum, 1e-15, gradient), 1e-15 * gradient, rtol=1e-12, atol=0)
    assert gathered(torch.zeros(1), 3.0).item() == 3.0 and kept(torch.zeros(1), 3.0).item() == 1.0


def _regression() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(N, D, generator=generator, dtype=torch.float64),
        torch.randn(N, 1, generator=generator, dtype=torch.float64),
    )


def _line() -> nn.Linear:
    model = nn.Linear(D, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    return model


def _trained_line(root: Path, steps: int = 60, lr: float = 0.05, **hyper: float) -> tuple[TrainingPath, nn.Linear]:
    x, y = _regression()
    model, objective = _line(), Objective(Gaussian())
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, **hyper)
    config = {"root": str(root), "record": "path", "checkpoints": {"every_steps": 1}}
    run = logix.init("line", model, config, optimizer=optimizer, verbose=False)
    for _ in range(steps):
        optimizer.zero_grad()
        with run(data_id=range(N)):
            objective.losses(model, (x, y)).mean().backward()
        optimizer.step()
    run.finalize()
    return run.training_path, model


def test_on_least_squares_more_segments_come_nearer_to_the_exact_unrolling(tmp_path: Path) -> None:
    """D10: and even one beats the influence function, since the training has not converged."""
    path, model = _trained_line(tmp_path)
    x, y = _regression()
    objective = Objective(Gaussian())

    def data(ids: Sequence[DataId]) -> tuple[Tensor, Tensor]:
        index = list(ids)
        return x[index], y[index]

    asked = (x[:4] + 0.3, y[:4])
    exact = ExactUnrolling(path, _line(), objective, data).scores(asked)
    errors = [
        _relative(Source(path, _line(), objective, data, segments=count, curvature="dense").scores(asked), exact)
        for count in (1, 3, 15)
    ]
    residual = (model(x) - y).detach()
    hessian = x.T @ x / N
    slopes = (model(asked[0]) - asked[1]).detach() * asked[0]
    influence = slopes @ torch.linalg.solve(hessian, (x * residual).T) / N
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05
    assert errors[0] < 0.5 * _relative(influence, exact)


def test_the_kronecker_curvature_is_exact_on_a_linear_layer(tmp_path: Path) -> None:
    """With one output the Gauss-Newton matrix of a linear layer is a Kronecker product, up to the sampled labels."""
    path, _ = _trained_line(tmp_path, steps=12, weight_decay=0.1)
    x, y = _regression()

    def data(ids: Sequence[DataId]) -> tuple[Tensor, Tensor]:
        return x[list(ids)], y[list(ids)]

    found = [
        Source(path, _line(), Objective(Gaussian()), data, segments=2, curvature=c).scores((x, y))
        for c in ("ekfac", "dense")
    ]
    assert _relative(found[0], found[1]) < 0.2
    assert np.corrcoef(found[0].flatten(), found[1].flatten())[0, 1] > 0.99


def test_one_tiny_segment_is_tracin(tmp_path: Path) -> None:
    path, _ = train(tmp_path, steps=1, batch=24, lr=1e-6)
    source = Source(path, network(), OBJECTIVE, batch_of, segments=1, curvature="dense")
    expected = TracIn(path, network(), OBJECTIVE, batch_of).scores(queries())
    torch.testing.assert_close(source.scores(queries()), expected, rtol=1e-5, atol=1e-14)
    own = source.scores(batch_of(source.data_id.tolist())).diagonal()
    torch.testing.assert_close(source.self_influence(), own, rtol=EXACT, atol=1e-16)


def test_momentum_and_decay_enter_the_segments(tmp_path: Path) -> None:
    path, _ = train(tmp_path, steps=6, checkpoints={"every_steps": 1}, momentum=0.9, weight_decay=0.01)
    (first, second) = Source(path, network(), OBJECTIVE, batch_of, segments=2).segments
    assert (first.start, first.end, second.end) == (0, 3, 6) and len(first.checkpoints) == 3
    assert first.amount == pytest.approx(3 * 0.15 / 0.1) and first.decay == 0.01


def test_what_source_cannot_do_is_said(tmp_path: Path) -> None:
    path, _ = train(tmp_path, "Adam", steps=4, lr=0.01)
    with pytest.raises(ConfigError, match=r"used Adam, .* give rate="):
        Source(path, network(), OBJECTIVE, batch_of, segments=1)
    assert Source(path, network(), OBJECTIVE, batch_of, segments=1, rate=0.01).segments[0].amount == pytest.approx(0.04)
    with pytest.raises(StoreError, match="steps 2 to 3 make a segment, and there is no checkpoint among them"):
        Source(path, network(), OBJECTIVE, batch_of, segments=2, rate=0.01)
    with pytest.raises(ConfigError, match="segments is 9; give a whole number from 1 to 4"):
        Source(path, network(), OBJECTIVE, batch_of, segments=9, rate=0.01)
    with pytest.raises(ConfigError, match="unknown curvature 'full'; known: ekfac, dense"):
        Source(path, network(), OBJECTIVE, batch_of, curvature="full", rate=0.01)


def test_groups_of_different_rates_need_one_to_take(tmp_path: Path) -> None:
    path, _ = train(tmp_path, steps=4, checkpoints={"every_steps": 1}, head_lr=0.5)
    with pytest.raises(ConfigError, match=r"groups differ in lr; SOURCE's segments need one for all: give rate="):
        Source(path, network(), OBJECTIVE, batch_of, segments=1)
    assert Source(path, network(), OBJECTIVE, batch_of, segments=1, rate=0.2).segments[0].amount > 0
