"""SOURCE: identities D7 to D10 of METHODS.md."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import logix_like as logix
from logix_like.errors import ConfigError, StoreError
from logix_like.estimators.segments import DenseSpectrum
from logix_like.estimators.segments_kronecker import outer_root
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
def quadratic() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(D, D, generator=generator, dtype=torch.float64)
    matrix = root @ root.T / D + 0.1 * torch.eye(D, dtype=torch.float64)
    return matrix, torch.randn(D, generator=generator, dtype=torch.float64)


def _spectrum(matrix: Tensor, amount: float | Tensor, decay: float = 0.0) -> DenseSpectrum:
    ones = torch.ones(len(matrix), dtype=torch.float64)
    return DenseSpectrum(matrix, amount * ones, decay * ones)


def _gathered(matrix: Tensor, amount: float | Tensor, vector: Tensor, steps: float = math.inf) -> Tensor:
    return _spectrum(matrix, amount).moved(partial(gathered, steps=steps), {"": vector[None]})[""][0]


def _kept(matrix: Tensor, amount: float, vector: Tensor) -> Tensor:
    return _spectrum(matrix, amount).kept(kept, {"": vector[None]})[""][0]


def _descended(matrix: Tensor, gradient: Tensor, rate: float | Tensor, steps: int) -> Tensor:
    moved = torch.zeros_like(gradient)
    for _ in range(steps):
        moved = moved - rate * (matrix @ moved) + rate * gradient
    return moved


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_a_segment_of_counted_steps_is_gradient_descent(quadratic: tuple[Tensor, Tensor], steps: int) -> None:
    """D7: exactly, also with a rate for each weight, and where a step overshoots (the largest eigenvalue is 2.6)."""
    matrix, gradient = quadratic
    rates = torch.linspace(0.05, 0.6, D, dtype=torch.float64)
    for rate in (0.05, 0.5, rates):
        expected = _descended(matrix, gradient, rate, steps)
        found = _gathered(matrix, rate * steps, gradient, float(steps))
        torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


def test_a_segment_is_what_many_small_steps_do(quadratic: tuple[Tensor, Tensor]) -> None:
    """D7': gradient descent with a constant gradient; the error falls as 1 / steps."""
    matrix, gradient = quadratic
    counts = (20, 40, 80, 160)
    found = _gathered(matrix, 2.0, gradient)
    errors = [_relative(found, _descended(matrix, gradient, 2.0 / count, count)) for count in counts]
    assert np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(-1, abs=0.1) and errors[-1] < 0.01


def test_segments_chain(quadratic: tuple[Tensor, Tensor]) -> None:
    """D8: two segments of one curvature are one."""
    matrix, gradient = quadratic
    chained = _kept(matrix, 0.7, _gathered(matrix, 1.3, gradient)) + _gathered(matrix, 0.7, gradient)
    torch.testing.assert_close(chained, _gathered(matrix, 2.0, gradient), rtol=EXACT, atol=EXACT)


def test_the_limits_are_influence_and_tracin(quadratic: tuple[Tensor, Tensor]) -> None:
    """D9, D9': also for steps so small that 1 - exp would lose every digit, and for eigenvalue 0."""
    matrix, gradient = quadratic
    torch.testing.assert_close(
        _gathered(matrix, 1e3, gradient), torch.linalg.solve(matrix, gradient), rtol=1e-9, atol=0
    )
    torch.testing.assert_close(_gathered(matrix, 1e-15, gradient), 1e-15 * gradient, rtol=1e-12, atol=0)
    zero = torch.zeros(1, dtype=torch.float64)
    assert gathered(zero).item() == gathered(zero, 3.0).item() == kept(zero).item() == kept(zero, 3.0).item() == 1.0


def test_a_weight_that_never_moved_keeps_what_it_has(quadratic: tuple[Tensor, Tensor]) -> None:
    matrix, gradient = quadratic
    distance = torch.tensor([0.0, 0.0, 1.0, 2.0, 1.0, 3.0], dtype=torch.float64)
    spectrum = DenseSpectrum(matrix, distance, torch.zeros(D, dtype=torch.float64))
    assert (spectrum.moved(gathered, {"": gradient[None]})[""][0, :2] == 0).all()
    torch.testing.assert_close(spectrum.kept(kept, {"": gradient[None]})[""][0, :2], gradient[:2])


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


def _trained_line(root: Path, steps: int = 30, lr: float = 0.1, **hyper: float) -> tuple[TrainingPath, nn.Linear]:
    model = _line()
    return _recorded(root, model, torch.optim.SGD(model.parameters(), lr=lr, **hyper), steps), model


def _recorded(root: Path, model: nn.Linear, optimizer: torch.optim.Optimizer, steps: int) -> TrainingPath:
    """Train on the whole regression in each step, a checkpoint at every one."""
    objective = Objective(Gaussian())
    x, y = _regression()
    config = {"root": str(root), "record": "path", "checkpoints": {"every_steps": 1}}
    run = logix.init("line", model, config, optimizer=optimizer, verbose=False)
    for _ in range(steps):
        optimizer.zero_grad()
        with run(data_id=range(N)):
            objective.losses(model, (x, y)).mean().backward()
        optimizer.step()
    run.finalize()
    return run.training_path


def test_on_least_squares_more_segments_come_nearer_to_the_exact_unrolling(tmp_path: Path) -> None:
    """D10: and even one beats the influence function, since the training has not converged."""
    path, model = _trained_line(tmp_path)
    x, y = _regression()
    objective = Objective(Gaussian())
    asked = (x[:4] + 0.3, y[:4])
    exact = ExactUnrolling(path, _line(), objective, _data).scores(asked)
    errors = [
        _relative(Source(path, _line(), objective, _data, segments=count, curvature="dense").scores(asked), exact)
        for count in (1, 3, 15)
    ]
    residual = (model(x) - y).detach()
    hessian = x.T @ x / N
    slopes = (model(asked[0]) - asked[1]).detach() * asked[0]
    influence = slopes @ torch.linalg.solve(hessian, (x * residual).T) / N
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05
    assert errors[0] < 0.5 * _relative(influence, exact)


def _data(ids: Sequence[DataId]) -> tuple[Tensor, Tensor]:
    x, y = _regression()
    return x[list(ids)], y[list(ids)]


def test_with_a_segment_for_each_step_it_is_the_exact_unrolling(tmp_path: Path) -> None:
    """On least squares nothing is left out, whatever rates and weight decays the parameter groups have."""
    x, y = _regression()
    model, objective = nn.Linear(D, 1).double(), Objective(Gaussian())
    groups = [{"params": [model.weight], "lr": 0.05, "weight_decay": 0.3}, {"params": [model.bias], "lr": 0.2}]
    path = _recorded(tmp_path, model, torch.optim.SGD(groups), steps=12)
    exact = ExactUnrolling(path, model, objective, _data).scores((x + 0.3, y))
    source = Source(path, model, objective, _data, segments=12, curvature="dense", discrete=True)
    torch.testing.assert_close(source.scores((x + 0.3, y)), exact, rtol=1e-8, atol=1e-12)


ADAPTIVE: list[tuple[str, dict[str, Any]]] = [
    ("Adam", {"betas": (0.0, 0.9)}),
    ("Adam", {"betas": (0.0, 0.9), "weight_decay": 0.2}),
    ("AdamW", {"betas": (0.0, 0.9), "weight_decay": 0.2}),
    ("RMSprop", {"weight_decay": 0.2}),
]


@pytest.mark.parametrize(("kind", "settings"), ADAPTIVE)
def test_an_adaptive_optimizer_counts_with_the_steps_it_gave_each_weight(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    """Exactly the derivative with the second moments held fixed."""
    x, y = _regression()
    model, decay = _line(), settings.get("weight_decay", 0.0)
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.05, eps=1e-3, **settings)
    path = _recorded(tmp_path, model, optimizer, steps=8)
    changed = torch.zeros(N, D, dtype=torch.float64)
    for before, after in itertools.pairwise([stored.read() for stored in path.checkpoints]):
        state = after.moments["weight"]
        second = state["square_avg"] if kind == "RMSprop" else state["exp_avg_sq"] / (1 - 0.9 ** float(state["step"]))
        rate = 0.05 / (second.flatten().sqrt() + 1e-3)
        gradients = x * (x @ before.weights["weight"].T - y) / N
        pulled = changed @ (x.T @ x) / N + (0.0 if kind == "AdamW" else decay) * changed
        changed = changed - rate * (pulled + gradients) - (0.05 * decay if kind == "AdamW" else 0.0) * changed
    asked = (x + 0.3, y)
    slopes = asked[0] * (asked[0] @ path.checkpoints[-1].read().weights["weight"].T - y)
    source = Source(path, model, Objective(Gaussian()), _data, segments=8, curvature="dense", discrete=True)
    torch.testing.assert_close(source.scores(asked), -slopes @ changed.T, rtol=1e-8, atol=1e-12)


def test_after_a_training_with_adam_it_follows_the_exact_unrolling(tmp_path: Path) -> None:
    path, _ = train(tmp_path, "Adam", steps=40, checkpoints={"every_steps": 4}, lr=0.02)
    exact = ExactUnrolling(path, network(), OBJECTIVE, batch_of).scores(queries()).flatten()
    taken_for_sgd = {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
    steps = tuple(replace(step, settings=(taken_for_sgd,)) for step in path.steps)
    variants: tuple[tuple[TrainingPath, Literal["dense", "ekfac"]], ...] = (
        (path, "dense"),
        (path, "ekfac"),
        (replace(path, optimizer="SGD", steps=steps), "dense"),
    )
    found = [
        Source(one, network(), OBJECTIVE, batch_of, segments=5, curvature=kind).scores(queries()).flatten()
        for one, kind in variants
    ]
    dense, factored, sgd = (np.corrcoef(scores, exact)[0, 1] for scores in found)
    assert dense > sgd and dense > factored > 0.8
    assert 0.8 < float(found[0] @ exact / (exact @ exact)) < 1.1  # in size too


def test_distances_that_are_products_are_found() -> None:
    rows, columns = torch.tensor([1.0, 4.0, 0.0]), torch.tensor([9.0, 1.0])
    found = torch.outer(*outer_root(torch.outer(rows, columns)))
    torch.testing.assert_close(found.float(), torch.outer(rows, columns).sqrt())
    assert (torch.outer(*outer_root(torch.zeros(2, 3))) == 0).all()


@pytest.mark.parametrize(("kind", "lr"), [("SGD", 0.05), ("Adam", 0.02)])
def test_the_kronecker_curvature_is_exact_on_a_linear_layer(tmp_path: Path, kind: str, lr: float) -> None:
    """With one output curvature and Adam's scale are outer products; what is left is that labels are drawn."""
    model = _line()
    path = _recorded(tmp_path, model, getattr(torch.optim, kind)(model.parameters(), lr=lr, weight_decay=0.1), 12)
    found = [
        Source(path, _line(), Objective(Gaussian()), _data, segments=2, curvature=c).scores(_regression())
        for c in ("ekfac", "dense")
    ]
    assert _relative(found[0], found[1]) < 0.25
    assert np.corrcoef(found[0].flatten(), found[1].flatten())[0, 1] > 0.98


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
    assert first.movement.distance["0.weight"][0, 0].item() == pytest.approx(3 * 0.15 / 0.1)
    assert first.movement.decay["2.bias"][0].item() == pytest.approx(0.01 * 3 * 0.15 / 0.1)


def test_groups_move_by_their_own_rates(tmp_path: Path) -> None:
    path, _ = train(tmp_path, steps=4, checkpoints={"every_steps": 1}, head_lr=0.5)
    (segment,) = Source(path, network(), OBJECTIVE, batch_of, segments=1).segments
    distances = {name: distance.unique().tolist() for name, distance in segment.movement.distance.items()}
    assert distances == {
        "0.weight": pytest.approx([0.6]), "0.bias": pytest.approx([0.6]),
        "2.weight": pytest.approx([2.0]), "2.bias": pytest.approx([2.0]),
    }  # fmt: skip


def test_what_source_cannot_do_is_said(tmp_path: Path) -> None:
    path, _ = train(tmp_path, "Adam", steps=4, lr=0.01, checkpoints={"at_steps": [1]})
    with pytest.raises(StoreError, match="steps 2 to 3 make a segment, and there is no checkpoint among them"):
        Source(path, network(), OBJECTIVE, batch_of, segments=2)
    with pytest.raises(ConfigError, match="segments is 9; give a whole number from 1 to 4"):
        Source(path, network(), OBJECTIVE, batch_of, segments=9)
    with pytest.raises(ConfigError, match="unknown curvature 'full'; known: ekfac, dense"):
        Source(path, network(), OBJECTIVE, batch_of, curvature="full")
    stateless = replace(path, checkpoints=path.checkpoints[:1])
    with pytest.raises(
        StoreError, match=r"the optimizer's state for '0.weight' is at none of the checkpoints of steps 0"
    ):
        Source(stateless, network(), OBJECTIVE, batch_of, segments=1)
