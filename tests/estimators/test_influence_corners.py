"""Influence functions where numbers are tiny or not finite, losses are reduced, and some parameters are left out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from logix_like.curvature.operators import GaussNewton
from logix_like.errors import CaptureError, StatisticsError
from logix_like.estimators import InfluenceFunction
from logix_like.estimators.influence import SOLVERS
from logix_like.linalg.solvers import Lissa
from logix_like.objective import Model, Objective

Data = list[tuple[Tensor, Tensor]]


def classifier(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Data]:
    """A model of two layers and twelve samples in three batches."""
    x, y = torch.randn(12, 5, dtype=dtype), torch.arange(12) % 3
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    return model, list(zip(x.split(4), y.split(4), strict=True))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_query_of_tiny_gradient_is_solved_as_any_other(solver: str) -> None:
    model, data = classifier(torch.float32)
    influence = InfluenceFunction(model, data, solver=solver, damping=0.1, progress=False)
    scores = influence.scores(data[0])
    tiny = influence.scores(data[0], lambda m, b: 1e-25 * Objective().losses(m, b))
    assert torch.allclose(1e25 * tiny, scores, rtol=1e-3, atol=1e-4 * float(scores.abs().max()))
    assert influence.solution is not None and influence.solution.converged
    assert not influence.scores(data[0], lambda m, b: 0 * Objective().losses(m, b)).any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_training_sample_that_is_not_finite_is_spoken_of_by_its_batch(solver: str) -> None:
    model, data = classifier()
    x = data[1][0].clone()
    x[2, 0] = math.nan
    broken = [data[0], (x, data[1][1]), data[2]]
    with pytest.raises(StatisticsError, match="not finite"):
        InfluenceFunction(model, broken, solver=solver, progress=False).scores(data[0])
    if solver != "ekfac-cg":  # where the fit of the preconditioner finds it first
        with pytest.raises(StatisticsError, match="not finite in batch 2 of the loader"):
            InfluenceFunction(model, broken, solver=solver, progress=False).scores(data[0])


def test_losses_that_are_reduced_are_refused() -> None:
    model, data = classifier()

    def reduced(model: Model, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(CaptureError, match=r"losses have the shape \(\); expected one for each of the batch's 4"):
        InfluenceFunction(model, data, solver="exact", progress=False).scores(data[0], reduced)


@pytest.mark.parametrize("parameters", [("*weight",), ("0.*",), ("2.bias",)])
def test_ekfac_preconditions_those_parameters_that_are_asked_about(parameters: tuple[str, ...]) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    x = torch.randn(1000, 8, dtype=torch.float64) * torch.logspace(-1, 1, 8, dtype=torch.float64)
    data = [(x, torch.randint(3, (1000,)))]
    steps, scores = {}, {}
    for solver in ("cg", "ekfac-cg"):
        influence = InfluenceFunction(model, data, solver=solver, damping=1e-4, parameters=parameters, progress=False)
        scores[solver] = influence.scores((x[:3], torch.tensor([0, 1, 2])))
        assert influence.solution is not None
        steps[solver] = influence.solution.steps
    assert torch.allclose(scores["cg"], scores["ekfac-cg"], rtol=1e-2, atol=1e-3 * float(scores["cg"].abs().max()))
    assert steps["ekfac-cg"] < 0.7 * steps["cg"] or parameters == ("2.bias",)


@pytest.mark.parametrize(("solver", "once"), [("lissa", 30), ("arnoldi", 57)])
def test_what_a_solver_learns_of_the_system_serves_all_batches(
    monkeypatch: pytest.MonkeyPatch, solver: str, once: int
) -> None:
    model, data = classifier()
    widths: list[int] = []
    product = GaussNewton.mean

    def counted(operator: GaussNewton, batches: Data, vectors: Tensor) -> Tensor:
        widths.append(len(vectors))
        return product(operator, batches, vectors)

    monkeypatch.setattr(GaussNewton, "mean", counted)
    InfluenceFunction(model, data, solver=solver, damping=0.1, progress=False).self_influence()
    assert 0 < widths.count(1) <= once  # all other products are of a batch's four queries


def test_damping_may_be_changed_in_any_of_its_forms_between_questions() -> None:
    model, data = classifier()
    influence = InfluenceFunction(model, data, damping=0.3, progress=False)
    scores = influence.scores(data[0])
    influence.damping = {"absolute": 0.3}
    assert torch.equal(influence.scores(data[0]), scores)


def test_an_explicit_scale_is_taken() -> None:
    model, data = classifier()
    with pytest.raises(StatisticsError, match=r"diverges with scale 0\.001"):
        InfluenceFunction(model, data, solver=Lissa(scale=1e-3), progress=False).scores(data[0])
