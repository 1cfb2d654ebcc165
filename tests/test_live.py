"""Queries tracked while training: against the replayed estimators, on un-projected rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import logix_like as logix
from logix_like.errors import ConfigError
from logix_like.estimators.tracin import InRunShapley, TracIn
from logix_like.run.live import LiveScores
from tests.path_runs import BATCH, OBJECTIVE, SAMPLES, batch_of, network, queries, query_losses

IDENTITY: dict[str, Any] = {"projection": {"init": "identity"}, "store": {"dtype": "float64"}}


def _loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _tracked(
    root: Path,
    optimizer: str = "SGD",
    *,
    steps: int = 12,
    every: int = 1,
    order: int = 2,
    track: bool = True,
    **hyper: Any,
) -> tuple[logix.Run, LiveScores | None, nn.Module]:
    model = network()
    taker = getattr(torch.optim, optimizer)(model.parameters(), **{"lr": 0.1, **hyper})
    run = logix.init("run", model, IDENTITY, root=str(root), record="path", optimizer=taker, verbose=False)
    live = run.track(queries(), _loss, every=every, order=order) if track else None
    for step in range(steps):
        ids = [(BATCH * step + j) % SAMPLES for j in range(BATCH)]
        taker.zero_grad()
        with run(data_id=ids):
            _loss(model, batch_of(ids)).backward()
        taker.step()
    run.finalize()
    return run, live, model


@pytest.mark.parametrize("hyper", [{}, {"momentum": 0.5}, {"momentum": 0.5, "nesterov": True}])
def test_at_every_step_it_is_the_replayed_estimator(tmp_path: Path, hyper: dict[str, Any]) -> None:
    run, live, _ = _tracked(tmp_path, order=1, **hyper)
    exact = TracIn(run.training_path, network(), OBJECTIVE, batch_of)
    assert live.data_id == tuple(exact.data_id)
    # A gradient of which momentum has left a thousandth is dropped.
    expected = exact.scores(queries()).float()
    torch.testing.assert_close(live.scores, expected, rtol=5e-3, atol=2e-3 * expected.abs().max().item())


def test_the_second_order_is_that_of_in_run_shapley(tmp_path: Path) -> None:
    """Up to the third order in the step size, by which the trapezoid rule and the Hessian differ."""
    run, live, _ = _tracked(tmp_path, order=2, lr=0.02)
    exact = InRunShapley(run.training_path, network(), OBJECTIVE, batch_of).scores(queries()).float()
    torch.testing.assert_close(live.scores, exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize(
    ("optimizer", "hyper"), [("SGD", {}), ("SGD", {"momentum": 0.9, "lr": 0.02}), ("Adam", {"lr": 2e-3})]
)
def test_scores_add_up_to_the_fall_of_the_loss(
    tmp_path: Path, optimizer: str, hyper: dict[str, Any], every: int
) -> None:
    """Also where the queries' gradients are taken at every seventh step only."""
    _, live, model = _tracked(tmp_path, optimizer, steps=40, every=every, **hyper)
    fall = query_losses(network()) - query_losses(model)
    # Adam's second moment, and with it its step sizes, changes much in its first steps.
    bound = 0.15 if optimizer == "Adam" and every > 1 else 0.05
    torch.testing.assert_close(live.scores.sum(1).double(), fall, rtol=0.1, atol=bound * fall.abs().max().item())


def test_training_does_not_notice(tmp_path: Path) -> None:
    (_, _, plain), (_, _, watched) = (
        _tracked(tmp_path / str(track), "Adam", track=track, every=3, lr=0.01) for track in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert watched.training and all(p.requires_grad for p in watched.parameters())


def test_scores_grow_and_become_a_result(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = logix.init("run", model, IDENTITY, root=str(tmp_path), optimizer=optimizer, verbose=False)
    live = run.track(queries(), _loss, data_id=["a", "b", "c", "d"], every=2)
    for step in range(3):
        with run(data_id=[f"s{step}", "all"]):
            _loss(model, batch_of([step, 9])).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert live.data_id == ("s0", "all", "s1", "s2")
    assert (live.scores != 0).any(0).tolist() == [True, True, True]  # the last step has not been scored yet
    run.finalize()
    result = live.result()
    assert result.query_id == ("a", "b", "c", "d") and list(result.data_id) == list(live.data_id)
    assert torch.equal(result.scores, live.scores) and result.proponents(2).k == 2
    assert "in-run Shapley while training; query gradients taken every 2 steps" in result.note


def test_what_cannot_be_tracked_is_said(tmp_path: Path) -> None:
    model = network()
    run = logix.init("a", model, root=str(tmp_path), verbose=False)
    with pytest.raises(ConfigError, match="give init"):
        run.track(queries(), _loss)
    other = torch.optim.Adagrad(model.parameters())
    run = logix.init("b", model, root=str(tmp_path), optimizer=other, verbose=False)
    with pytest.raises(ConfigError, match="'Adagrad' has no known update rule; known are SGD"):
        run.track(queries(), _loss)
    groups = torch.optim.SGD([{"params": model[0].parameters(), "lr": 1.0}, {"params": model[2].parameters()}], lr=0.1)
    run = logix.init("c", model, root=str(tmp_path), optimizer=groups, verbose=False)
    with pytest.raises(ConfigError, match="groups differ in lr"):
        run.track(queries(), _loss)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    run = logix.init("d", model, root=str(tmp_path), optimizer=plain, verbose=False)
    with pytest.raises(ConfigError, match="every is 0 and order 2"):
        run.track(queries(), _loss, every=0)
    with pytest.raises(ConfigError, match=r"every, .*, is '2'; give a whole number"):
        run.track(queries(), _loss, every="2")


def test_momentum_of_a_step_at_rate_0_goes_on(tmp_path: Path) -> None:
    """A warm-up of the learning rate begins at 0; what the first batch left in the momentum moves the weights later."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    run = logix.init("run", model, IDENTITY, root=str(tmp_path), record="path", optimizer=optimizer, verbose=False)
    live = run.track(queries(), _loss, every=1, order=1)
    for step in range(6):
        optimizer.zero_grad()
        with run(data_id=[2 * step, 2 * step + 1]):
            _loss(model, batch_of([2 * step, 2 * step + 1])).backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1
    run.finalize()
    expected = TracIn(run.training_path, network(), OBJECTIVE, batch_of).scores(queries()).float()
    assert expected[:, 0].abs().min() > 0
    torch.testing.assert_close(live.scores, expected, rtol=5e-3, atol=2e-3 * expected.abs().max().item())


def test_an_optimizer_may_have_taken_steps_before_the_run(tmp_path: Path) -> None:
    """Adam makes its own first steps larger, not the run's (several times too large was seen)."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    parts = [[(BATCH * step + j) % SAMPLES for j in range(BATCH)] for step in range(43)]
    for ids in parts[:40]:
        optimizer.zero_grad()
        _loss(model, batch_of(ids)).backward()
        optimizer.step()
    run = logix.init("run", model, IDENTITY, root=str(tmp_path), record="path", optimizer=optimizer, verbose=False)
    live = run.track(queries(), _loss, every=1, order=1)
    for ids in parts[40:]:
        optimizer.zero_grad()
        with run(data_id=ids):
            _loss(model, batch_of(ids)).backward()
        optimizer.step()
    run.finalize()
    exact = TracIn(run.training_path, network(), OBJECTIVE, batch_of).scores(queries()).float()
    assert float((live.scores * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=0.05)
