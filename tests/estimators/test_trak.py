"""TRAK against its formula on dense features, and against refitting (F7, F8)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from logix_like.damping import DampingSetting
from logix_like.errors import QueryError, StatisticsError
from logix_like.estimators import TRAK
from logix_like.objective import Bernoulli, Objective

FULL = 64
"""A rank that every layer here is capped at: projections are invertible, so that scores do not depend on them."""


@dataclass
class Logistic:
    """Logistic regression without an intercept, at its minimum."""

    x: Tensor
    y: Tensor

    objective = Objective(Bernoulli(), outputs=lambda m, b: m(b[0]), targets=lambda b: b[1])

    def fit(self, weights: Tensor) -> Tensor:
        theta = torch.zeros(self.x.shape[1], dtype=torch.float64)
        for _ in range(40):
            p = torch.sigmoid(self.x @ theta)
            hessian = (self.x.T * (weights * p * (1 - p))) @ self.x + 1e-3 * torch.eye(len(theta), dtype=torch.float64)
            theta = theta - torch.linalg.solve(hessian, self.x.T @ (weights * (p - self.y)) + 1e-3 * theta)
        return theta

    def model(self, theta: Tensor) -> nn.Module:
        layer = nn.Linear(len(theta), 1, bias=False).double()
        with torch.no_grad():
            layer.weight.copy_(theta[None])
        return layer

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x.split(30), self.y[:, None].split(30), strict=True))


def logistic() -> Logistic:
    x = torch.randn(100, 6, dtype=torch.float64)
    return Logistic(x, (torch.rand(100, dtype=torch.float64) < torch.sigmoid(0.7 * x[:, 0] - 0.5 * x[:, 1])).double())


def positive(x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries whose margin is the logit."""
    return x, torch.ones(len(x), 1, dtype=torch.float64)


def formula(case: Logistic, theta: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """``[queries, samples]`` of one model and ``1 - p`` of each sample."""
    sign = 2 * case.y - 1
    features = sign[:, None] * case.x
    wrong = 1 - torch.sigmoid(sign * (case.x @ theta))
    return queries @ torch.linalg.solve(features.T @ features, features.T), wrong


def test_f7_scores_are_the_formulas_and_follow_leave_one_out() -> None:
    case, queries = logistic(), torch.randn(10, 6, dtype=torch.float64)
    theta = case.fit(torch.ones(100, dtype=torch.float64))
    trak = TRAK(case.model(theta), case.batches, case.objective, rank=FULL, damping=0.0, progress=False)
    scores = trak.scores(positive(queries))
    products, wrong = formula(case, theta, queries)
    assert torch.allclose(scores, products * wrong, rtol=1e-6)
    truth = torch.stack([queries @ (theta - case.fit(left)) for left in 1 - torch.eye(100, dtype=torch.float64)], 1)
    assert np.corrcoef(scores.flatten(), truth.flatten())[0, 1] > 0.9


def test_an_ensemble_averages_both_parts_before_they_are_multiplied() -> None:
    case, queries = logistic(), torch.randn(4, 6, dtype=torch.float64)
    thetas = [case.fit((torch.rand(100) < 0.7).double()) for _ in range(3)]
    model = case.model(thetas[0])

    def models() -> Iterator[nn.Module]:
        for theta in thetas:
            model.load_state_dict(case.model(theta).state_dict())
            yield model

    trak = TRAK(model, case.batches, case.objective, rank=FULL, damping=0.0, at=models, progress=False)
    parts = [formula(case, theta, queries) for theta in thetas]
    expected = torch.stack([p for p, _ in parts]).mean(0) * torch.stack([w for _, w in parts]).mean(0)
    assert torch.allclose(trak.scores(positive(queries)), expected, rtol=1e-6)


def test_other_weights_get_an_inverse_of_their_own() -> None:
    case, queries = logistic(), torch.randn(4, 6, dtype=torch.float64)
    model, other = (case.model(case.fit((torch.rand(100) < 0.5).double())) for _ in range(2))
    trak = TRAK(model, case.batches, case.objective, rank=FULL, progress=False)
    trak.scores(positive(queries))
    model.load_state_dict(other.state_dict())
    expected = TRAK(other, case.batches, case.objective, rank=FULL, progress=False).scores(positive(queries))
    assert torch.allclose(trak.scores(positive(queries)), expected)


def test_self_influence_is_the_diagonal() -> None:
    case = logistic()
    model = case.model(case.fit(torch.ones(100, dtype=torch.float64)))
    trak = TRAK(model, case.batches, case.objective, rank=3, progress=False)
    scores = torch.cat([trak.scores(batch) for batch in case.batches])
    assert torch.allclose(trak.self_influence(), scores.diagonal())
    assert bool((scores.diagonal() > 0).all())
    assert len(trak.data_id) == 100


def test_f8_more_features_than_samples_need_damping() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    batch = torch.randn(10, 6, dtype=torch.float64), torch.randint(3, (10,))
    with pytest.raises(StatisticsError, match="singular with damping 0"):
        TRAK(model, [batch], rank=FULL, damping=0.0, progress=False).scores(batch)
    scores = TRAK(model, [batch], rank=FULL, progress=False).scores(batch)
    assert bool((scores.diagonal() > 0).all())
    with pytest.raises(QueryError, match="not finite"):
        TRAK(model, [batch], rank=FULL, progress=False).scores((batch[0] * float("nan"), batch[1]))


def test_damping_is_given_as_everywhere() -> None:
    case = logistic()
    model = case.model(case.fit(torch.ones(100, dtype=torch.float64)))

    def scores(damping: DampingSetting) -> Tensor:
        trak = TRAK(model, case.batches, case.objective, rank=FULL, damping=damping, progress=False)
        assert trak.damping_setting == damping
        return trak.scores(case.batches[0])

    assert torch.equal(scores({"absolute": 0.0}), scores(0.0))
    far = scores({"absolute": 1e12})  # all that is left of the matrix
    assert torch.allclose(far, 2 * scores({"absolute": 2e12}), rtol=1e-6, atol=0)
    assert not torch.allclose(far, scores(1e12), rtol=0.1, atol=0)
    assert bool(scores("auto").isfinite().all())
    with pytest.raises(QueryError, match="damping is 'much'; it must be a number"):
        scores("much")
