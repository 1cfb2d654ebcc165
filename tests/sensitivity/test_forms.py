"""The forms of the Memory-Perturbation Equation: identities A1 to A9, B1 to B3, H1 of METHODS.md."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logix_like.estimators.flat import FlatModel
from logix_like.objective import Gaussian, Objective
from logix_like.sensitivity.forms import (
    Deviations,
    Form,
    deviations,
    directional_shift,
    prediction_shift,
    sampled_shift,
    shift_by_loo,
)
from logix_like.sensitivity.posterior import DensePosterior, dense_laplace
from tests.sensitivity.truths import classes_of_noise, linear, softmax_optimum, without_each

EXACT = 1e-9
BFLOAT16 = 3e-2
"""Outputs and errors have 8 bits."""
SAMPLES, FEATURES, STRENGTH = 30, 5, 0.7


class Ridge:
    """Least squares with a penalty, and every solution without a sample."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64)
        self.y = torch.randn(SAMPLES, 1, generator=generator, dtype=torch.float64)
        self.theta = self.fit(range(SAMPLES))
        self.flat = FlatModel(linear(self.theta), Objective(Gaussian()))
        self.posterior = dense_laplace(self.flat, [(self.x, self.y)], STRENGTH)
        self.error = (self.x @ self.theta - self.y)[:, 0]

    def fit(self, kept: Iterable[int], weights: Tensor | None = None) -> Tensor:
        index = list(kept)
        x, y = self.x[index], self.y[index]
        w = torch.ones(len(index), 1, dtype=torch.float64) if weights is None else weights[:, None]
        return torch.linalg.solve(x.T @ (w * x) + STRENGTH * torch.eye(FEATURES, dtype=torch.float64), x.T @ (w * y))

    def without(self, *left: int) -> Tensor:
        return self.fit(i for i in range(SAMPLES) if i not in left)

    def deviations(self, form: Form) -> Deviations:
        return deviations(self.flat, self.posterior, self.flat.theta, (self.x, self.y), form)


@pytest.fixture(scope="module")
def ridge() -> Ridge:
    return Ridge()


def test_the_loo_form_is_exact_on_least_squares(ridge: Ridge) -> None:
    """A1, A2: f moves by v e / (1 - v), exactly as when training without the sample."""
    found = ridge.deviations("loo")
    moved = torch.stack([ridge.x[i] @ (ridge.without(i) - ridge.theta) for i in range(SAMPLES)])
    torch.testing.assert_close(found.shift, moved, rtol=EXACT, atol=EXACT)
    v = found.variance[:, 0]
    torch.testing.assert_close(moved[:, 0], v * ridge.error / (1 - v), rtol=EXACT, atol=EXACT)
    one = ridge.posterior.times(ridge.x) * (ridge.error / (1 - v))[:, None]
    torch.testing.assert_close(ridge.theta.T + one, torch.stack([ridge.without(i)[:, 0] for i in range(SAMPLES)]))


def test_the_full_form_is_its_first_order(ridge: Ridge) -> None:
    """A3: v e is smaller by 1 - v; with one output the diagonal is the same."""
    exact, full = ridge.deviations("loo"), ridge.deviations("full")
    torch.testing.assert_close(full.shift / exact.shift, 1 - full.variance, rtol=EXACT, atol=EXACT)
    assert torch.equal(ridge.deviations("diagonal").shift, full.shift)


@pytest.mark.parametrize("form", ["loo", "full", "diagonal"])
def test_a_model_of_16_bits_moves_alike(ridge: Ridge, form: Form) -> None:
    flat = FlatModel(linear(ridge.theta.bfloat16()), Objective(Gaussian()))
    batch = (ridge.x.bfloat16(), ridge.y.bfloat16())
    posterior = dense_laplace(flat, [batch], STRENGTH)
    found, exact = deviations(flat, posterior, flat.theta, batch, form).shift, ridge.deviations(form).shift
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).norm() / exact.norm()) < BFLOAT16
    assert posterior.draw(torch.randn(2, FEATURES, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_groups_move_together(ridge: Ridge) -> None:
    """A4: V (I - V)^-1 e over the group is exact, as for one sample with many outputs."""
    group = [1, 4, 7, 11]
    x = ridge.x[group]
    covariance = (ridge.posterior.times(x) @ x.T)[None]
    found = shift_by_loo(covariance, ridge.error[group][None], lambda vector: vector)[0]
    torch.testing.assert_close(found, (x @ (ridge.without(*group) - ridge.theta))[:, 0], rtol=EXACT, atol=EXACT)


def test_removal_subtracts_natural_parameters(ridge: Ridge) -> None:
    """A5: a Gaussian posterior minus its site for a sample is the posterior without it."""
    precision = ridge.x.T @ ridge.x + STRENGTH * torch.eye(FEATURES, dtype=torch.float64)
    first, second = precision @ ridge.theta, precision
    x, y = ridge.x[3], ridge.y[3]
    left = torch.linalg.solve(second - torch.outer(x, x), first[:, 0] - x * y)
    torch.testing.assert_close(left, ridge.without(3)[:, 0], rtol=EXACT, atol=EXACT)
    smaller = DensePosterior(second - torch.outer(x, x))
    v = (ridge.posterior.times(x) * x).sum()
    torch.testing.assert_close((smaller.times(x) * x).sum(), v / (1 - v), rtol=EXACT, atol=EXACT)


def test_beta_bernoulli_counts_are_natural_parameters() -> None:
    """A6: leaving an observation out of a Beta posterior takes its counts away."""
    seen = (torch.rand(20, dtype=torch.float64) < 0.4).double()
    a, b = 2 + seen.sum(), 3 + 20 - seen.sum()
    left = (a - seen[0], b - (1 - seen[0]))
    assert left == (2 + seen[1:].sum(), 3 + 19 - seen[1:].sum())


def test_cooks_distance_follows_from_error_and_variance(ridge: Ridge) -> None:
    """A7: D_i = e^2 v / (p s^2 (1 - v)^2) equals the movement of all fitted values without the sample."""
    x, y = ridge.x, ridge.y
    ols = torch.linalg.lstsq(x, y).solution
    flat = FlatModel(linear(ols), Objective(Gaussian()))
    posterior = DensePosterior(x.T @ x)
    found = deviations(flat, posterior, flat.theta, (x, y), "loo")
    error, v = (x @ ols - y)[:, 0], found.variance[:, 0]
    noise = error.square().sum() / (SAMPLES - FEATURES)
    cook = found.shift[:, 0].square() / v / (FEATURES * noise)
    for one in (0, 9, 21):
        kept = [i for i in range(SAMPLES) if i != one]
        moved = (x @ (torch.linalg.lstsq(x[kept], y[kept]).solution - ols)).square().sum() / (FEATURES * noise)
        torch.testing.assert_close(cook[one], moved, rtol=1e-8, atol=0)
    torch.testing.assert_close(cook, error**2 * v / (FEATURES * noise * (1 - v) ** 2), rtol=1e-8, atol=0)


def test_leave_one_out_loss_is_exact_on_least_squares(ridge: Ridge) -> None:
    """A8."""
    found = ridge.deviations("loo")
    estimate = Gaussian().losses(found.outputs + found.shift, ridge.y)
    truth = torch.stack([0.5 * (ridge.x[i] @ ridge.without(i)[:, 0] - ridge.y[i, 0]) ** 2 for i in range(SAMPLES)])
    torch.testing.assert_close(estimate, truth, rtol=EXACT, atol=EXACT)


def test_the_first_order_is_the_derivative_by_the_samples_weight(ridge: Ridge) -> None:
    """A9: S g_i against central differences."""
    size, index = 1e-5, 3
    moved = []
    for sign in (1, -1):
        weights = torch.ones(SAMPLES, dtype=torch.float64)
        weights[index] -= sign * size
        moved.append(ridge.fit(range(SAMPLES), weights))
    slope = ridge.posterior.times(ridge.x[index]) * ridge.error[index]
    torch.testing.assert_close((moved[0] - moved[1])[:, 0] / (2 * size), slope, rtol=1e-7, atol=1e-10)


class Softmax:
    """Softmax regression at its optimum, and every sample's logits without it."""

    def __init__(self, strength: float = 1.0) -> None:
        self.x, self.y = classes_of_noise()
        self.optimum = softmax_optimum(self.x, self.y, 3, strength)
        self.flat = FlatModel(linear(self.optimum), Objective())
        self.posterior = dense_laplace(self.flat, [(self.x, self.y)], strength)
        self.truth = without_each(self.x, self.y, 3, strength, self.optimum)
        self.batch = (self.x, self.y)


@pytest.fixture(scope="module")
def softmax() -> Softmax:
    return Softmax()


@pytest.mark.parametrize(
    ("form", "least", "slope"), [("loo", 0.999, 1.003), ("full", 0.99, 1.119), ("diagonal", 0.93, 0.268)]
)
def test_softmax_deviations_follow_retraining(softmax: Softmax, form: Form, least: float, slope: float) -> None:
    """B1: only ``loo`` has the right size; the diagonal counts the logits' common shift, which moves nothing."""
    found = deviations(softmax.flat, softmax.posterior, softmax.flat.theta, softmax.batch, form)
    truth = (softmax.truth.softmax(1) - found.outputs.softmax(1)).abs().sum(1).numpy()
    likelihood = softmax.flat.objective.likelihood
    moved = prediction_shift(likelihood, found.outputs, softmax.y, found.shift, form)
    estimate = moved.abs().sum(1).numpy()
    assert np.corrcoef(estimate, truth)[0, 1] > least
    assert (estimate @ truth) / (estimate @ estimate) == pytest.approx(slope, abs=0.01)


def test_woodbury_is_the_covariance_without_the_sample(softmax: Softmax) -> None:
    """B2: V (I - Lambda V)^-1 e = J (H - J^T Lambda J)^-1 J^T e."""
    found = deviations(softmax.flat, softmax.posterior, softmax.flat.theta, softmax.batch, "loo")
    jacobian = softmax.flat.jacobians(softmax.flat.theta, softmax.batch)
    p = found.outputs.softmax(1)
    spread = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    precision = torch.linalg.inv(softmax.posterior.times(torch.eye(18, dtype=torch.float64)))
    for one in (0, 17, 99):
        j = jacobian[one]
        left = precision - j.T @ spread[one] @ j
        expected = j @ torch.linalg.solve(left, j.T @ (p[one] - F.one_hot(softmax.y[one], 3)))
        torch.testing.assert_close(found.shift[one], expected, rtol=1e-8, atol=1e-10)


def test_leave_one_out_loss_follows_retraining(softmax: Softmax) -> None:
    """B3: the estimate is far nearer to the truth than the training loss."""
    found = deviations(softmax.flat, softmax.posterior, softmax.flat.theta, softmax.batch, "loo")
    truth = F.cross_entropy(softmax.truth, softmax.y).item()
    train = F.cross_entropy(found.outputs, softmax.y).item()
    assert F.cross_entropy(found.outputs + found.shift, softmax.y).item() == pytest.approx(
        truth, abs=0.02 * (truth - train)
    )


def test_one_directional_derivative_is_the_full_form() -> None:
    """H1: V e without any Jacobian, on a network."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batch = (torch.randn(20, 5, dtype=torch.float64), torch.randint(3, (20,)))
    flat = FlatModel(model, Objective())
    posterior = dense_laplace(flat, [batch], 1.0)
    expected = deviations(flat, posterior, flat.theta, batch, "full").shift
    torch.testing.assert_close(directional_shift(flat, posterior, flat.theta, batch), expected, rtol=EXACT, atol=EXACT)
    rows = flat.jacobians(flat.theta, batch)
    product = flat.gauss_newton(flat.theta, batch)
    torch.testing.assert_close(
        flat.gauss_newton_diagonal(flat.theta, batch), product.diagonal(), rtol=EXACT, atol=EXACT
    )
    assert rows.shape == (20, 3, 57)


def test_draws_of_the_posterior_tell_the_shift_without_a_derivative(ridge: Ridge) -> None:
    """Cov(f_i, l_i) = V e for a quadratic loss (Stein), up to the error of the draws."""
    draws = 1_000
    noise = torch.randn(draws, FEATURES, dtype=torch.float64)
    found = sampled_shift(
        ridge.flat, ridge.posterior, ridge.flat.theta, (ridge.x, ridge.y), ridge.flat.objective.likelihood.losses, noise
    )
    expected = ridge.deviations("full")
    # The product of two normals with variance v and (e^2 v): its own spread, five times over.
    bound = 5 * (2 * expected.variance * (ridge.error[:, None] ** 2 + 1) * expected.variance / draws).sqrt()
    assert ((found - expected.shift).abs() <= bound).all()
