"""Estimators over a replayed path against brute force: identities D1 to D6 and D0 of METHODS.md."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logix_like.errors import ConfigError, ModelMismatchError, QueryError
from logix_like.estimators.checkpointed import TracInCP, TracInLastLayer
from logix_like.estimators.flat import FlatModel
from logix_like.estimators.hydra import Hydra
from logix_like.estimators.replay import Replay
from logix_like.estimators.source import Source
from logix_like.estimators.tracin import InRunShapley, TracIn
from logix_like.estimators.unrolling import ExactUnrolling
from logix_like.weights import differentiable
from tests.path_runs import (
    BATCH,
    OBJECTIVE,
    QUERIES,
    SAMPLES,
    batch_of,
    network,
    queries,
    query_losses,
    train,
    training_data,
)

EXACT = 1e-9
"""The same derivatives by another way, in float64."""

OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.01}),
    ("SGD", {"momentum": 0.8, "nesterov": True, "dampening": 0.0}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.01}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 0.005, "momentum": 0.5}),
]


def _weighted_training(weights: Tensor, optimizer: str, steps: int, hyper: dict[str, Any]) -> nn.Sequential:
    """The training of :func:`tests.path_runs.train` with each sample's loss multiplied by its weight."""
    model = network()
    taker = getattr(torch.optim, optimizer)(model.parameters(), **{"lr": 0.15, **hyper})
    for step in range(steps):
        ids = [(BATCH * step + j) % SAMPLES for j in range(BATCH)]
        x, y = batch_of(ids)
        taker.zero_grad()
        (weights[ids] * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
        taker.step()
    return model


def test_flat_gradients_are_each_samples_own() -> None:
    model = network()
    flat, batch = FlatModel(model, OBJECTIVE), training_data()
    rows = flat.sample_gradients(flat.theta, batch)
    for number in range(SAMPLES):
        model.zero_grad()
        F.cross_entropy(model(batch[0][number : number + 1]), batch[1][number : number + 1]).backward()
        own = torch.cat([p.grad.flatten() for p in model.parameters()])
        torch.testing.assert_close(rows[number], own, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(rows.sum(0), flat.gradient(flat.theta, batch), rtol=EXACT, atol=EXACT)


def test_a_model_that_cannot_be_batched_gives_the_same_gradients() -> None:
    class Stubborn(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * (1.0 if x.sum().item() > 0 else 2.0)  # .item() has no batching rule

    flat, plain = FlatModel(Stubborn(network()), OBJECTIVE), FlatModel(network(), OBJECTIVE)
    x, y = training_data()
    x = x.abs()
    torch.testing.assert_close(
        flat.sample_gradients(flat.theta, (x, y)), plain.sample_gradients(plain.theta, (x, y)), rtol=EXACT, atol=EXACT
    )


@pytest.mark.parametrize(("optimizer", "hyper"), OPTIMIZERS)
def test_a_replay_passes_through_the_recorded_checkpoints(
    tmp_path: Path, optimizer: str, hyper: dict[str, Any]
) -> None:
    path, model = train(tmp_path, optimizer, steps=7, checkpoints={"every_steps": 3}, **hyper)
    replay = Replay(path, network(), OBJECTIVE, batch_of)
    forward = [(p.step.step, p.theta) for p in replay.forwards()]
    backward = [(p.step.step, p.theta) for p in replay.backwards()]
    assert [step for step, _ in forward] == list(range(7)) == [step for step, _ in reversed(backward)]
    for (_, one), (_, other) in zip(forward, reversed(backward), strict=True):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)
    final = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(replay.end(), final, rtol=EXACT, atol=EXACT)
    points = list(Replay(path.between(0, 5), network(), OBJECTIVE, batch_of).forwards())
    torch.testing.assert_close(points[-1].theta, forward[4][1], rtol=EXACT, atol=EXACT)
    assert replay.longest_segment == 3


@pytest.mark.parametrize(("optimizer", "hyper"), OPTIMIZERS)
def test_unrolling_and_hydra_are_the_derivatives_by_the_samples_weights(
    tmp_path: Path, optimizer: str, hyper: dict[str, Any]
) -> None:
    """D4, D4': against central differences of whole trainings, and against each other."""
    path, _ = train(tmp_path, optimizer, steps=10, checkpoints={"every_steps": 4}, **hyper)
    scores = ExactUnrolling(path, network(), OBJECTIVE, batch_of).scores(queries())
    hydra = Hydra(path, network(), OBJECTIVE, batch_of)
    torch.testing.assert_close(hydra.scores(queries()), scores, rtol=1e-7, atol=1e-10)
    for sample in (0, 7):
        losses = []
        for sign in (1, -1):
            weights = torch.ones(SAMPLES, dtype=torch.float64)
            weights[sample] += sign * 1e-5
            losses.append(query_losses(_weighted_training(weights, optimizer, 10, hyper)))
        torch.testing.assert_close(-(losses[0] - losses[1]) / 2e-5, scores[:, sample], rtol=1e-4, atol=1e-8)


def test_unrolling_tells_what_leaving_a_sample_out_does(tmp_path: Path) -> None:
    """D6: the loss without the sample is higher by its score, to first order."""
    hyper = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01}
    path, model = train(tmp_path, steps=20, **hyper)
    scores = ExactUnrolling(path, network(), OBJECTIVE, batch_of).scores(queries())
    weights = torch.ones(SAMPLES, dtype=torch.float64)
    weights[3] = 0
    risen = query_losses(_weighted_training(weights, "SGD", 20, hyper)) - query_losses(model)
    assert (risen.sum() / scores[:, 3].sum()).item() == pytest.approx(1, abs=0.05)


def test_fast_hydra_is_exact_where_there_is_no_curvature(tmp_path: Path) -> None:
    """One step has no Hessian in it; over many steps with momentum the fast form is far off (D5), as documented."""
    path, _ = train(tmp_path, steps=1)
    exact, fast = (Hydra(path, network(), OBJECTIVE, batch_of, fast=f).scores(queries()) for f in (False, True))
    torch.testing.assert_close(fast, exact, rtol=EXACT, atol=EXACT)
    path, _ = train(tmp_path / "long", steps=60, momentum=0.9, weight_decay=0.01)
    exact, fast = (Hydra(path, network(), OBJECTIVE, batch_of, fast=f).scores(queries()) for f in (False, True))
    assert np.corrcoef(exact.flatten(), fast.flatten())[0, 1] < 0.8


def test_hydra_says_what_memory_it_takes_before_it_starts(tmp_path: Path) -> None:
    path, _ = train(tmp_path, steps=4)
    assert Hydra(path, network(), OBJECTIVE, batch_of).bytes_needed == 2 * SAMPLES * 75 * 8
    with pytest.raises(ConfigError, match=r"2 x 24 samples x 75 parameters, .* more than memory_gib=1e-06"):
        Hydra(path, network(), OBJECTIVE, batch_of, memory_gib=1e-6)


@pytest.mark.parametrize("estimator", [Hydra, ExactUnrolling, TracIn])
def test_self_influence_is_the_score_for_oneself(tmp_path: Path, estimator: Callable[..., Any]) -> None:
    path, _ = train(tmp_path, steps=3)
    found = estimator(path, network(), OBJECTIVE, batch_of)
    assert list(found.data_id) == list(range(3 * BATCH))
    expected = found.scores(batch_of(list(found.data_id))).diagonal()
    torch.testing.assert_close(found.self_influence(), expected, rtol=EXACT, atol=EXACT)


def _left_over(root: Path, estimator: Callable[..., Any], **how: Any) -> float:
    """How far the scores' sum is from the fall of the queries' losses, relative."""
    path, model = train(root, **how)
    fall = query_losses(network()) - query_losses(model)
    total = estimator(path, network(), OBJECTIVE, batch_of).scores(queries()).sum(1)
    return ((total - fall).abs().max() / fall.abs().max()).item()


@pytest.mark.parametrize("batch", [1, BATCH])
def test_tracin_adds_up_to_the_fall_of_the_loss(tmp_path: Path, batch: int) -> None:
    """D1, D2: to first order in the step size; half the steps' size, half the error."""
    rates = (0.2, 0.1, 0.05) if batch > 1 else (0.05, 0.025, 0.0125)
    errors = [
        _left_over(tmp_path / str(lr), TracIn, lr=lr, steps=int((6 if batch > 1 else 1) / lr), batch=batch)
        for lr in rates
    ]
    order = np.polyfit(np.log(rates), np.log(errors), 1)[0]
    assert order == pytest.approx(1, abs=0.25) and errors[-1] < 0.1


def test_second_order_shapley_adds_up_to_the_second_order(tmp_path: Path) -> None:
    rates = (0.2, 0.1, 0.05)
    errors = [_left_over(tmp_path / str(lr), InRunShapley, lr=lr, steps=int(6 / lr)) for lr in rates]
    assert np.polyfit(np.log(rates), np.log(errors), 1)[0] == pytest.approx(2, abs=0.3) and errors[-1] < 1e-3


@pytest.mark.parametrize(
    ("optimizer", "hyper"), [("Adam", {}), ("RMSprop", {"momentum": 0.5}), ("SGD", {"momentum": 0.9})]
)
def test_tracin_knows_the_optimizers_own_update(tmp_path: Path, optimizer: str, hyper: dict[str, Any]) -> None:
    """D3: under Adam the shares of the realised update add up; the formula of SGD would be off by nearly all."""
    error = _left_over(tmp_path, TracIn, optimizer=optimizer, steps=150, lr=2e-3, **hyper)
    assert error < 0.02


def test_second_order_values_are_those_of_the_steps_game(tmp_path: Path) -> None:
    """By enumeration: the Shapley value of the game whose value is the query's loss to second order."""
    path, _ = train(tmp_path, steps=1, batch=3)
    flat = FlatModel(network(), OBJECTIVE)
    theta, rows = flat.theta, FlatModel(network(), OBJECTIVE).sample_gradients(flat.theta, batch_of([0, 1, 2]))
    slopes = flat.sample_gradients(theta, queries())

    def worth(chosen: tuple[int, ...]) -> Tensor:
        moved = -0.15 / 3 * rows[list(chosen)].sum(0)
        bent = flat.sample_curvature_products(theta, queries(), moved)
        return -(slopes @ moved + (bent @ moved) / 2)

    expected = torch.zeros(QUERIES, 3, dtype=torch.float64)
    for one in range(3):
        others = [o for o in range(3) if o != one]
        for size in range(3):
            for chosen in combinations(others, size):
                expected[:, one] += (worth((*chosen, one)) - worth(chosen)) / (3 * comb(2, size))
    found = InRunShapley(path, network(), OBJECTIVE, batch_of).scores(queries())
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


def test_a_replay_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    path, _ = train(tmp_path, steps=3)
    x, y = training_data()
    other = TracIn(path, network(), OBJECTIVE, lambda ids: (x[list(ids)] + 1, y[list(ids)]))
    with pytest.raises(QueryError, match=r"the replay of steps 0 to 2 ends .* off the recorded checkpoint"):
        other.scores(queries())
    with pytest.raises(ModelMismatchError):
        TracIn(path, nn.Linear(5, 3).double(), OBJECTIVE, batch_of)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    path, _ = train(tmp_path, steps=2)
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ExactUnrolling(path, model, OBJECTIVE, batch_of).scores(queries())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with differentiable(model):
        assert not model.training


def test_the_order_of_in_run_shapley_is_chosen(tmp_path: Path) -> None:
    path, _ = train(tmp_path, steps=3)
    first = InRunShapley(path, network(), OBJECTIVE, batch_of, order=1).scores(queries())
    torch.testing.assert_close(first, TracIn(path, network(), OBJECTIVE, batch_of).scores(queries()), rtol=0, atol=0)
    assert not torch.allclose(first, InRunShapley(path, network(), OBJECTIVE, batch_of).scores(queries()))
    with pytest.raises(ConfigError, match="order is 3"):
        InRunShapley(path, network(), OBJECTIVE, batch_of, order=3)


@pytest.mark.parametrize("kind", [TracIn, TracInCP, TracInLastLayer, Source])
def test_data_and_queries_that_do_not_fit_are_refused(tmp_path: Path, kind: Any) -> None:
    path, _ = train(tmp_path, steps=6, checkpoints={"every_steps": 1})
    with pytest.raises(QueryError, match=r"data gave a batch of .* samples for .* ids"):
        kind(path, network(), OBJECTIVE, lambda ids: batch_of(ids[:-1])).scores(queries())
    x, y = queries()
    with pytest.raises(QueryError, match="the batch of queries is empty"):
        kind(path, network(), OBJECTIVE, batch_of).scores((x[:0], y[:0]))
    with pytest.raises(ConfigError, match="chunk is 0"):
        kind(path, network(), OBJECTIVE, batch_of, chunk=0)
