"""Influence functions against refitting: identities A1 to A4' on ridge, B4 to B8' on softmax regression."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from logix_like.curvature import fit_curvature
from logix_like.curvature.operators import GaussNewton, Hessian
from logix_like.errors import ConfigError, ModelMismatchError, QueryError, StatisticsError
from logix_like.estimators import InfluenceFunction
from logix_like.estimators.influence import SOLVERS, cycled
from logix_like.linalg.solvers import Arnoldi, ConjugateGradient, Exact, Lissa, Solver
from logix_like.objective import Objective
from logix_like.weights import Flattener, trained_parameters
from tests.estimators.convex import FEATURES, Convex, prediction, residuals, ridge, softmax

CLOSE = {"exact": 1e-10, "cg": 1e-4, "ekfac-cg": 1e-4, "lissa": 1e-2, "arnoldi": 1e-8}
"""How far a solver's scores may be from the dense ones: its own tolerance, times the conditioning."""


def influence(convex: Convex, theta: Tensor, solver: object = "exact", **options: object) -> InfluenceFunction:
    return InfluenceFunction(
        convex.model(theta),
        convex.batches,
        convex.objective,
        solver=solver,
        damping=convex.damping,
        progress=False,
        **options,
    )


def classifier() -> tuple[nn.Module, list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """A model of two layers, twelve samples in three batches, four queries."""
    x, y = torch.randn(16, 5, dtype=torch.float64), torch.arange(16) % 3
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, list(zip(x[:12].split(4), y[:12].split(4), strict=True)), (x[12:], y[12:])


def pearson(a: Tensor, b: Tensor) -> float:
    return float(np.corrcoef(a.flatten(), b.flatten())[0, 1])


def ranks(values: Tensor) -> Tensor:
    return values.flatten().argsort().argsort().double()


def test_a1_to_a3_ridge_predictions_without_a_sample() -> None:
    convex = ridge()
    theta = convex.fit()
    estimator = influence(convex, theta)
    # Asked about its own prediction, a sample's score / n is v e with v its leverage.
    own = estimator.scores((convex.x, convex.y), prediction).diagonal() / len(convex.x)
    inverse = torch.linalg.inv(convex.x.T @ convex.x + convex.penalty * torch.eye(FEATURES, dtype=torch.float64))
    leverage = ((convex.x @ inverse) * convex.x).sum(1)
    error = residuals(convex, theta)[:, 0]
    assert torch.allclose(own, leverage * error, rtol=1e-9)
    truth = torch.stack([convex.x[i] @ (convex.without(i) - theta) for i in range(len(convex.x))])
    assert torch.allclose(own / (1 - leverage), truth, rtol=1e-8)  # A2: exact with the leverage
    assert torch.allclose(own / truth, 1 - leverage, rtol=1e-7)  # A3: first order
    newton = torch.cat(
        [
            estimator.group_influence(
                (convex.x[i : i + 1], convex.y[i : i + 1]),
                (convex.x[i : i + 1], convex.y[i : i + 1]),
                losses=prediction,
            )
            for i in range(4)
        ]
    ) / len(convex.x)
    assert torch.allclose(newton, truth[:4], rtol=1e-8)  # A1


def test_a4_groups_are_exact_to_second_order_on_ridge() -> None:
    convex = ridge()
    theta = convex.fit()
    members = [1, 4, 7, 11]
    estimator = influence(convex, theta)
    group = convex.x[members], convex.y[members]
    queries = convex.x[:10], convex.y[:10]
    truth = convex.x[:10] @ (convex.without(*members) - theta)
    second = estimator.group_influence(queries, group, losses=prediction) / len(convex.x)
    first = estimator.group_influence(queries, group, order=1, losses=prediction) / len(convex.x)
    assert torch.allclose(second, truth, rtol=1e-8)
    assert torch.allclose(first, estimator.scores(queries, prediction)[:, members].sum(1) / len(convex.x), rtol=1e-9)
    assert 0.01 < float((first - truth).norm() / truth.norm()) < 0.9  # A4': not exact


def test_b4_scores_follow_true_leave_one_out() -> None:
    convex = softmax()
    theta = convex.fit()
    x = torch.randn(10, FEATURES, dtype=torch.float64)
    y = (x @ theta.view(3, FEATURES).T).argmax(1)
    scores = influence(convex, theta).scores((x, y)) / len(convex.x)
    before = convex.losses(theta, x, y)
    truth = torch.stack([convex.losses(convex.without(i), x, y) - before for i in range(len(convex.x))], 1)
    assert pearson(scores, truth) > 0.97
    assert pearson(ranks(scores), ranks(truth)) > 0.99


def test_b5_scores_are_the_derivative_by_a_samples_weight() -> None:
    convex = softmax()
    theta = convex.fit()
    queries = convex.x[:6], convex.y[:6]
    scores = influence(convex, theta).scores(queries) / len(convex.x)
    step = torch.zeros(len(convex.x), dtype=torch.float64)
    step[5] = 1e-4
    ends = [convex.losses(convex.fit(1 + sign * step), *queries) for sign in (1, -1)]
    assert torch.allclose(scores[:, 5], -(ends[0] - ends[1]) / 2e-4, rtol=1e-5, atol=1e-9)


def test_b6_a_newton_step_is_nearer_for_groups() -> None:
    convex = softmax()
    theta = convex.fit()
    members = list(range(12))
    group = convex.x[members], convex.y[members]
    rows = torch.eye(FEATURES, dtype=torch.float64)
    queries = rows, torch.zeros(FEATURES, dtype=torch.long)
    truth = rows @ (convex.without(*members) - theta).view(3, FEATURES)[0]
    estimator = influence(convex, theta)
    errors = [
        float(
            (estimator.group_influence(queries, group, order=order, losses=prediction) / len(convex.x) - truth).norm()
        )
        for order in (1, 2)
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_b8_every_solver_finds_the_dense_solution(solver: str) -> None:
    convex = softmax()
    theta = convex.fit()
    queries = convex.x[:4], convex.y[:4]
    expected = influence(convex, theta).scores(queries)
    estimator = influence(convex, theta, solver)
    found = estimator.scores(queries)
    assert estimator.solution is not None
    assert estimator.solution.converged
    assert torch.allclose(found, expected, rtol=0, atol=CLOSE[solver] * float(expected.abs().max()))
    if solver == "exact":  # one solution for each of 60 samples is long with the others
        assert torch.allclose(estimator.self_influence()[:4], expected.diagonal())


def test_conjugate_gradients_need_at_most_as_many_steps_as_parameters() -> None:
    convex = softmax()
    estimator = influence(convex, convex.fit(), ConjugateGradient(tolerance=1e-10))
    estimator.scores((convex.x[:2], convex.y[:2]))
    assert estimator.solution is not None
    assert estimator.solution.steps <= 3 * FEATURES + 1
    assert float(estimator.solution.residual.max()) <= 1e-9


def test_single_precision_is_solved_without_alarm(recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(60, 20) * torch.logspace(-1, 1, 20)
    batches = [(x, torch.randint(4, (60,)))]
    found = {}
    for solver in ("exact", "cg"):
        estimator = InfluenceFunction(model, batches, solver=solver, damping=1e-2, progress=False)
        found[solver] = estimator.scores((x[:4], torch.tensor([0, 1, 2, 3])))
        assert estimator.solution is not None
        assert estimator.solution.converged
    assert torch.allclose(found["exact"], found["cg"], rtol=1e-2, atol=1e-3 * float(found["exact"].abs().max()))
    assert not recwarn.list


def test_a_single_glob_names_its_own_parameters_only() -> None:
    assert trained_parameters(classifier()[0], "0.*") == ("0.weight", "0.bias")


@pytest.mark.parametrize(("trained", "damping"), [(0, 1e-4), (200, 1e-2)])
def test_ekfac_makes_conjugate_gradients_shorter_where_curvatures_differ(trained: int, damping: float) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    x = torch.randn(1000, 8, dtype=torch.float64) * torch.logspace(-1, 1, 8, dtype=torch.float64)
    y = torch.randint(3, (1000,)) if not trained else (x[:, 3:6] > 0).sum(1) % 3
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(trained):  # closely fitted: labels drawn from the model hardly ever differ from its answers
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    queries = x[:3], torch.tensor([0, 1, 2])
    steps, scores = {}, {}
    for solver in ("cg", "ekfac-cg"):
        estimator = InfluenceFunction(model, [(x, y)], solver=solver, damping=damping, progress=False)
        scores[solver] = estimator.scores(queries)
        assert estimator.solution is not None
        steps[solver] = estimator.solution.steps
    assert steps["ekfac-cg"] < 0.7 * steps["cg"]
    assert torch.allclose(scores["cg"], scores["ekfac-cg"], rtol=1e-2, atol=1e-3 * float(scores["cg"].abs().max()))


def test_sampled_lissa_is_near() -> None:
    convex = softmax()
    theta = convex.fit()
    queries = convex.x[:4], convex.y[:4]
    estimator = influence(convex, theta, Lissa(sampled=True, scale=5.0, most=600, tolerance=0.3))
    found, expected = estimator.scores(queries), influence(convex, theta).scores(queries)
    assert pearson(found, expected) > 0.95


def test_a_low_rank_drops_a_part_and_says_how_much() -> None:
    convex = softmax()
    theta = convex.fit()
    queries = convex.x[:4], convex.y[:4]
    estimator = influence(convex, theta, Arnoldi(rank=3, tolerance=0.01))
    with pytest.warns(RuntimeWarning, match="has not converged: the relative residual is 0"):
        estimator.scores(queries)


def test_products_are_those_of_the_dense_matrices() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batch = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    flattener, objective = Flattener(model), Objective()

    def total(vector: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, flattener.split(vector), (batch[0],))
        return nn.functional.cross_entropy(outputs, batch[1], reduction="sum")

    def outputs(vector: Tensor) -> Tensor:
        return torch.func.functional_call(model, flattener.split(vector), (batch[0],))

    point = flattener.join(flattener.parameters)
    hessian = torch.func.jacrev(torch.func.grad(total))(point) / 6
    jacobian, p = torch.func.jacrev(outputs)(point), outputs(point).softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    ggn = torch.einsum("nki,nkl,nlj->ij", jacobian, inner, jacobian) / 6
    vectors = torch.randn(3, len(point), dtype=torch.float64)
    for operator, truth in ((Hessian, hessian), (GaussNewton, ggn)):
        found = operator(model, objective, flattener).mean([batch], vectors)
        assert torch.allclose(found, vectors @ truth, rtol=1e-9, atol=1e-12)


def test_attention_can_be_differentiated_twice() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x)[:, None].chunk(3, -1)
            return self.head(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0].mean(1))

    batch = torch.randn(5, 6, 4), torch.randint(3, (5,))
    estimator = InfluenceFunction(Attending(), [batch], damping=0.1, progress=False)
    scores = estimator.scores(batch)
    assert torch.allclose(scores, scores.T, rtol=1e-2, atol=1e-3 * float(scores.abs().max()))


def test_what_is_refused_or_warned_of() -> None:
    convex = softmax()
    theta = convex.fit()
    queries = convex.x[:2], convex.y[:2]
    with pytest.raises(ConfigError, match="unknown solver 'gmres'; known: exact, cg"):
        influence(convex, theta, "gmres")
    with pytest.raises(ConfigError, match="unknown matrix 'fisher'"):
        influence(convex, theta, matrix="fisher")
    with pytest.raises(ConfigError, match="no trained parameter"):
        influence(convex, theta, parameters=("head.*",))
    with pytest.raises(ConfigError, match=r"no trained parameter of the model fits 'head\.\*'; there are .*weight"):
        influence(convex, theta, parameters=("*weight", "head.*"))
    with pytest.raises(ConfigError, match="must be one of exact, cg"):
        influence(convex, theta, ConjugateGradient)
    bad: list[Callable[[], Solver]] = [
        lambda: Arnoldi(rank=0),
        lambda: Arnoldi(steps=0),
        lambda: Lissa(scale=-1.0),
        lambda: Exact(tolerance=0.0),
        lambda: ConjugateGradient(most=0),
    ]
    for build in bad:
        with pytest.raises(ConfigError, match="must be above 0"):
            build()
    with pytest.raises(StatisticsError, match="limit 5"):
        influence(convex, theta, Exact(most=5)).scores(queries)
    with pytest.warns(RuntimeWarning, match="after 2 steps"):
        influence(convex, theta, ConjugateGradient(most=2)).scores(queries)
    with pytest.raises(StatisticsError, match=r"diverges with scale 0\.01"):
        influence(convex, theta, Lissa(scale=0.01)).scores(queries)
    with pytest.raises(QueryError, match="order is 0"):
        influence(convex, theta).group_influence(queries, queries, order=0)
    singular = InfluenceFunction(
        nn.Linear(5, 3).double(), [(convex.x[:2], convex.y[:2])], solver="exact", damping=0.0, progress=False
    )
    with pytest.raises(StatisticsError, match="singular"):
        singular.scores(queries)


def test_a_loader_that_is_spent_gives_no_curvature_of_nothing() -> None:
    model, data, queries = classifier()
    batches = (batch for batch in data)
    with pytest.raises(StatisticsError, match="a generator is spent after one pass"):
        InfluenceFunction(model, batches, solver="cg", progress=False).group_influence(queries, data[0])
    with pytest.raises(StatisticsError, match="yielded no batch"):
        next(cycled([]))


def test_a_curvature_of_another_model_is_refused() -> None:
    model, data, queries = classifier()
    for other in (nn.Sequential(nn.Linear(5, 3)), nn.Sequential(nn.Flatten(), nn.Linear(5, 3))):
        mine = fit_curvature(other.double(), data, progress=False)
        with pytest.raises(ModelMismatchError, match="it is that of another model"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            InfluenceFunction(model, data, curvature=mine, progress=False).scores(queries)


def test_a_singular_preconditioner_and_damping_that_is_none_are_said() -> None:
    model, data, queries = classifier()
    dead = [(torch.cat([x[:, :-1], torch.zeros_like(x[:, :1])], 1), y) for x, y in data]
    with pytest.raises(StatisticsError, match="singular with damping 0"):
        InfluenceFunction(model, dead, damping=0, progress=False).scores(queries)
    for wrong in (-0.5, math.nan, True, "auto", {"relative": 0.1}):
        with pytest.raises(QueryError, match=r"damping is .* \{'absolute': number\}"):
            InfluenceFunction(model, data, damping=wrong, progress=False)
    told, plain = (
        InfluenceFunction(model, data, solver="exact", damping=setting, progress=False).scores(queries)
        for setting in ({"absolute": 0.3}, 0.3)
    )
    assert torch.equal(told, plain)
    with pytest.raises(QueryError, match="holds no sample"):
        InfluenceFunction(model, data, solver="cg", progress=False).scores(tuple(part[:0] for part in queries))


def test_an_exact_inverse_is_found_once_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, _ = classifier()
    widths: list[int] = []
    product = GaussNewton.mean

    def counted(operator: GaussNewton, batches: list[tuple[Tensor, Tensor]], vectors: Tensor) -> Tensor:
        widths.append(len(vectors))
        return product(operator, batches, vectors)

    monkeypatch.setattr(GaussNewton, "mean", counted)
    InfluenceFunction(model, data, solver="exact", progress=False).self_influence()
    assert widths == [57, 4, 4, 4]  # the matrix, then each batch's residual


def test_a_direction_of_negative_curvature_is_said() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batch = torch.randn(9, 5, dtype=torch.float64), torch.randint(3, (9,))
    estimator = InfluenceFunction(model, [batch], solver="cg", matrix="hessian", damping=0.0, progress=False)
    with pytest.raises(StatisticsError, match="not positive along a direction"):
        estimator.scores(batch)


@pytest.mark.parametrize("solver", ["cg", "ekfac-cg", "exact", Lissa(sampled=True, most=4, tolerance=1e9)])
def test_a_solution_shows_that_it_goes_on(solver: str | Solver, capsys: pytest.CaptureFixture[str]) -> None:
    model, data, queries = classifier()
    estimator = InfluenceFunction(model, data, solver=solver, damping=0.1)
    estimator.scores(queries)
    shown = capsys.readouterr().err
    assert re.search(r"solving \(\w+\): [1-9]\d*batch", shown)
    assert "influence scores: 100%" in shown
    estimator = InfluenceFunction(model, data, solver=solver, damping=0.1, progress=False)
    estimator.scores(queries)
    assert not capsys.readouterr().err
