"""Identities E1 to E7 and F3 to F6 of influence with Kronecker curvature and projected rows, on our own code.

Each compares what is fitted or scored here with an exact curvature built from all Jacobians or rows.
Curvature as in Grosse et al. 2023 and George et al. 2018; projected rows as in Choe et al. 2024.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from logix_like.errors import StatisticsError
from logix_like.layout import Layout
from logix_like.preconditioner import FittedPreconditioner, fit_preconditioner
from logix_like.query.engine import QueryEngine
from logix_like.query.gradients import QueryGradients
from logix_like.statistics import Statistics, StatisticsAccumulator, corrected_sums
from tests.query.memory_store import MemoryStore
from tests.reference import blocks_layout

EXACT = 1e-9
"""Float64; the damped matrices' condition numbers stay below 1e4."""

LAMBDA = 0.1
"""Absolute damping of the identities; the code's is relative to a block's mean eigenvalue."""


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def _factor_statistics(layout: Layout, factors: dict[str, tuple[Tensor, Tensor]]) -> Statistics:
    """Statistics that hold the Kronecker factors ``(S, A)`` by module."""
    one = torch.ones((), dtype=torch.float64)
    sums = {
        name: {"samples": one, "output_outer_sum": output, "positions": one, "input_outer_sum": input_}
        for name, (output, input_) in factors.items()
    }
    return Statistics(layout, sums, 1)


def _curvature(fitted: FittedPreconditioner, module: str) -> Tensor:
    """The damped curvature of ``module`` whose inverse ``fitted`` applies."""
    columns = fitted.layout[module].columns
    inverse = fitted.apply(torch.eye(fitted.layout.width, dtype=torch.float64))[columns, columns]
    return torch.linalg.inv(inverse)


def _undamped(fitted: FittedPreconditioner, module: str, mean_eigenvalue: float) -> Tensor:
    size = fitted.layout[module].size
    return _curvature(fitted, module) - fitted.damping.value * mean_eigenvalue * torch.eye(size, dtype=torch.float64)


class LinearNet:
    """A deep linear network with squared error, whose Gauss-Newton matrix is Kronecker exactly."""

    def __init__(self) -> None:
        widths = [5, 4, 3, 2]
        self.inputs = _normal(40, widths[0])
        self.weights = [_normal(after, before) for before, after in pairwise(widths)]
        self.layout = blocks_layout(*((w.shape[0], w.shape[1]) for w in self.weights))

    def jacobians(self) -> Tensor:
        """``[samples, outputs, width]`` of the outputs with respect to all weights."""
        sizes = [w.numel() for w in self.weights]
        flat = torch.cat([w.flatten() for w in self.weights])

        def outputs(parameters: Tensor, sample: Tensor) -> Tensor:
            for weight, part in zip(self.weights, parameters.split(sizes), strict=True):
                sample = part.view_as(weight) @ sample
            return sample

        return torch.func.vmap(torch.func.jacrev(outputs), (None, 0))(flat, self.inputs)

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """``(S, A)`` of each layer: second moments of output gradients and of inputs."""
        factors, hidden = {}, self.inputs
        for number, weight in enumerate(self.weights):
            onward = torch.eye(self.weights[-1].shape[0], dtype=torch.float64)
            for later in reversed(self.weights[number + 1 :]):
                onward = onward @ later
            factors[f"layer.{number}"] = onward.T @ onward, hidden.T @ hidden / len(hidden)
            hidden = hidden @ weight.T
        return factors


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_e1_on_a_linear_network_the_block_is_the_exact_gauss_newton_matrix(name: str) -> None:
    net = LinearNet()
    jacobians = net.jacobians()
    exact = torch.einsum("nki,nkj->ij", jacobians, jacobians) / len(jacobians)
    statistics = _factor_statistics(net.layout, net.factors())
    # One row for each output: their second moment is the Gauss-Newton matrix times 1 / outputs.
    rows = jacobians.flatten(0, 1) * jacobians.shape[1] ** 0.5
    statistics = statistics.with_corrected(corrected_sums(statistics, [rows]))
    fitted = fit_preconditioner(name, statistics, net.layout, LAMBDA)
    for block in net.layout:
        own = exact[block.columns, block.columns]
        expected = own + LAMBDA * own.diagonal().mean() * torch.eye(block.size, dtype=torch.float64)
        assert _relative(_curvature(fitted, block.name), expected) < EXACT


class Classifier:
    """The first layer of a small tanh network with softmax: its exact Fisher block, by all labels."""

    def __init__(self) -> None:
        self.inputs, self.first, self.second = _normal(40, 5), _normal(4, 5), _normal(3, 4)
        hidden = torch.tanh(self.inputs @ self.first.T)
        self.probabilities = F.softmax(hidden @ self.second.T, dim=1)
        self.slopes = 1 - hidden**2
        self.layout = blocks_layout((4, 5))

    def output_gradients(self, labels: Tensor) -> Tensor:
        """``[samples, 4]`` for these labels."""
        errors = self.probabilities - F.one_hot(labels, 3)
        return (errors @ self.second) * self.slopes

    def rows(self, labels: Tensor) -> Tensor:
        """``[samples, 20]``: gradients of the layer for these labels."""
        return (self.output_gradients(labels)[:, :, None] * self.inputs[:, None]).flatten(1)

    def weighted_rows(self) -> Tensor:
        """``[3 * samples, 20]``: a row for each label, whose second moment is the exact Fisher matrix."""
        return torch.cat([self.rows(label) * (3 * self._share(label))[:, None].sqrt() for label in self._labels()])

    def fisher(self) -> Tensor:
        """The exact Fisher block ``[20, 20]``."""
        rows = self.weighted_rows()
        return rows.T @ rows / len(rows)

    def statistics(self) -> Statistics:
        """K-FAC's factors under the model's own labels, and EK-FAC's eigenvalues."""
        output = torch.zeros(4, 4, dtype=torch.float64)
        for label in self._labels():
            gradients = self.output_gradients(label)
            output += gradients.T @ (gradients * self._share(label)[:, None]) / len(gradients)
        input_ = self.inputs.T @ self.inputs / len(self.inputs)
        statistics = _factor_statistics(self.layout, {"layer.0": (output, input_)})
        return statistics.with_corrected(corrected_sums(statistics, self.weighted_rows().split(50)))

    def _labels(self) -> list[Tensor]:
        return [torch.full((len(self.inputs),), label) for label in range(3)]

    def _share(self, label: Tensor) -> Tensor:
        return self.probabilities.gather(1, label[:, None]).flatten()


@pytest.fixture
def classifier() -> Classifier:
    return Classifier()


def test_e2_ekfac_is_nearer_to_the_fisher_than_kfac_and_has_its_trace(classifier: Classifier) -> None:
    fisher, statistics = classifier.fisher(), classifier.statistics()
    factors = statistics.kronecker("layer.0")
    means = {
        "kfac": (factors.output.diagonal().mean() * factors.input.diagonal().mean()).item(),
        "ekfac": statistics.corrected_eigenvalues("layer.0").values.mean().item(),
    }
    blocks = {
        name: _undamped(fit_preconditioner(name, statistics, classifier.layout, LAMBDA), "layer.0", mean)
        for name, mean in means.items()
    }
    assert _relative(blocks["ekfac"], fisher) < _relative(blocks["kfac"], fisher)
    torch.testing.assert_close(blocks["ekfac"].trace(), fisher.trace(), rtol=EXACT, atol=EXACT)


def test_e3_ekfac_applies_the_inverse_of_its_dense_matrix(classifier: Classifier) -> None:
    statistics = classifier.statistics()
    corrected = statistics.corrected_eigenvalues("layer.0")
    basis = torch.kron(corrected.output_basis, corrected.input_basis)
    dense = basis @ corrected.values.flatten().diag() @ basis.T
    dense += LAMBDA * torch.eye(20, dtype=torch.float64)
    fitted = fit_preconditioner("ekfac", statistics, classifier.layout, LAMBDA / corrected.values.mean().item())
    gradients = _normal(3, 20)
    assert _relative(fitted.apply(gradients), torch.linalg.solve(dense, gradients.T).T) < EXACT


def test_e4_damping_is_added_to_the_product_and_not_to_the_factors(classifier: Classifier) -> None:
    statistics = classifier.statistics()
    factors = statistics.kronecker("layer.0")
    dense = torch.kron(factors.output, factors.input) + LAMBDA * torch.eye(20, dtype=torch.float64)
    mean = (factors.output.diagonal().mean() * factors.input.diagonal().mean()).item()
    fitted = fit_preconditioner("kfac", statistics, classifier.layout, LAMBDA / mean)
    gradient = _normal(1, 20)
    applied = fitted.apply(gradient)
    assert _relative(applied, torch.linalg.solve(dense, gradient.T).T) < EXACT
    damped = [f + LAMBDA**0.5 * torch.eye(len(f), dtype=torch.float64) for f in (factors.output, factors.input)]
    factored = torch.linalg.inv(damped[0]) @ gradient.view(4, 5) @ torch.linalg.inv(damped[1])
    assert _relative(factored.reshape(1, -1), applied) > 0.05


def test_e5_sampled_labels_converge_to_the_fisher_and_training_labels_do_not(classifier: Classifier) -> None:
    fisher, errors = classifier.fisher(), []
    for draws in (1, 10, 100):
        accumulator = StatisticsAccumulator(classifier.layout, ["covariance"])
        for _ in range(draws):
            labels = torch.multinomial(classifier.probabilities, 1).flatten()
            accumulator.update(classifier.rows(labels))
        errors.append(_relative(accumulator.snapshot().covariance("layer.0"), fisher))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 3 * errors[0] / 10  # a tenth for a hundred times the draws, within a factor of 3
    accumulator = StatisticsAccumulator(classifier.layout, ["covariance"])
    accumulator.update(classifier.rows(torch.randint(0, 3, (40,))))
    assert _relative(accumulator.snapshot().covariance("layer.0"), fisher) > errors[2]


def _sequences() -> tuple[Statistics, Tensor, Tensor, Tensor]:
    """Factors of a layer on sequences; inputs ``[n, t, 5]``, output gradients ``[n, t, 4]`` and rows."""
    inputs, outputs = _normal(40, 12, 5) + 1, _normal(40, 12, 4) + 0.3
    factors = torch.einsum("nta,ntb->ab", outputs, outputs) / 40, torch.einsum("nta,ntb->ab", inputs, inputs) / 480
    statistics = _factor_statistics(blocks_layout((4, 5)), {"layer.0": factors})
    return statistics, inputs, outputs, torch.einsum("nto,nti->noi", outputs, inputs).flatten(1)


def test_e6_eigenvalues_square_the_sum_over_a_sample_and_not_each_token() -> None:
    statistics, inputs, outputs, rows = _sequences()
    corrected = statistics.with_corrected(corrected_sums(statistics, rows.split(7))).corrected_eigenvalues("layer.0")
    rotated = corrected.output_basis.T @ rows.view(-1, 4, 5) @ corrected.input_basis
    assert _relative(corrected.values, rotated.square().mean(0)) < EXACT
    by_token = (outputs @ corrected.output_basis).square(), (inputs @ corrected.input_basis).square()
    wrong = torch.einsum("nta,ntb->ab", *by_token) / len(rows)
    assert _relative(wrong, corrected.values) > 0.3


def test_e7_eigenvalues_sum_to_the_mean_squared_norm() -> None:
    statistics, _, _, rows = _sequences()
    corrected = statistics.with_corrected(corrected_sums(statistics, [rows])).corrected_eigenvalues("layer.0")
    torch.testing.assert_close(corrected.values.sum(), rows.square().sum() / len(rows), rtol=EXACT, atol=EXACT)


def _covariance_scores(rows: Tensor, damping: float = 0.1) -> Tensor:
    """Scores of all rows for one another, ``[n, n]``, as the engine answers."""
    layout = blocks_layout((rows.shape[1], 1))
    ids = tuple(range(len(rows)))
    engine = QueryEngine(MemoryStore(layout, rows, ids))
    query = QueryGradients(ids, rows, layout)
    result = engine.influence(query, preconditioner="covariance", damping=damping)
    return cast(Tensor, result.scores)


def _relative_damping(rows: Tensor) -> float:
    """What makes the code's damping equal to ``LAMBDA``."""
    return LAMBDA / rows.square().mean().item()


def test_f3_an_orthogonal_projection_of_full_rank_changes_no_score() -> None:
    gradients = torch.einsum("nto,nti->noi", _normal(16, 10, 6), _normal(16, 10, 8))
    turn_out, turn_in = (torch.linalg.qr(_normal(size, size))[0] for size in (6, 8))
    projected = turn_out @ gradients @ turn_in.T
    plain, turned = _covariance_scores(gradients.flatten(1)), _covariance_scores(projected.flatten(1))
    assert _relative(turned, plain) < EXACT


def test_f3_also_by_kronecker_factors() -> None:
    outputs, inputs = _normal(16, 10, 6), _normal(16, 10, 8)
    turn_out, turn_in = (torch.linalg.qr(_normal(size, size))[0] for size in (6, 8))
    found = []
    for out, inn in ((outputs, inputs), (outputs @ turn_out.T, inputs @ turn_in.T)):
        factors = torch.einsum("nta,ntb->ab", out, out) / 16, torch.einsum("nta,ntb->ab", inn, inn) / 160
        layout = blocks_layout((6, 8))
        rows = torch.einsum("nto,nti->noi", out, inn).flatten(1)
        store = MemoryStore(layout, rows, statistics=_factor_statistics(layout, {"layer.0": factors}))
        query = QueryGradients(("a", "b"), rows[:2], layout)
        for name in ("kfac", "ekfac"):
            found.append(cast(Tensor, QueryEngine(store).influence(query, preconditioner=name).scores))
    assert _relative(found[2], found[0]) < EXACT
    assert _relative(found[3], found[1]) < EXACT


def test_f4_scores_equal_the_dual_form() -> None:
    rows = _normal(16, 48)
    gram, n = rows @ rows.T, len(rows)
    dual = (gram - gram @ torch.linalg.solve(gram + n * LAMBDA * torch.eye(n, dtype=torch.float64), gram)) / LAMBDA
    assert _relative(_covariance_scores(rows, _relative_damping(rows)), dual) < EXACT


def test_f5_a_pca_projection_of_data_of_low_rank_loses_nothing() -> None:
    kept = 3
    base_in, base_out = (torch.linalg.qr(_normal(size, kept))[0] for size in (8, 6))
    inputs, outputs = _normal(16, 10, kept) @ base_in.T, _normal(16, 10, kept) @ base_out.T
    tops = [torch.linalg.eigh(torch.einsum("nti,ntj->ij", side, side))[1][:, -kept:].T for side in (outputs, inputs)]
    gradients = torch.einsum("nto,nti->noi", outputs, inputs)
    projected = (tops[0] @ gradients @ tops[1].T).flatten(1)
    whole = gradients.flatten(1)
    full = _covariance_scores(whole, _relative_damping(whole))
    assert _relative(_covariance_scores(projected, _relative_damping(projected)), full) < EXACT


def test_f6_self_influence_is_a_leverage() -> None:
    rows = _normal(16, 48)
    layout = blocks_layout((48, 1))
    engine = QueryEngine(MemoryStore(layout, rows))
    own = engine.self_influence(preconditioner="covariance", damping=_relative_damping(rows)).scores
    assert (own > 0).all() and (own < len(rows)).all()
    eigenvalues = torch.linalg.eigvalsh(rows.T @ rows / len(rows))
    effective = (eigenvalues / (eigenvalues + LAMBDA)).sum()
    torch.testing.assert_close(own.mean(), effective, rtol=EXACT, atol=EXACT)


def test_f8_more_numbers_than_rows_need_damping() -> None:
    with pytest.raises(StatisticsError, match="singular with damping 0"):
        _covariance_scores(_normal(20, 40), damping=0.0)
