"""Gradients, inner products, squares and eigenbases of the whole zoo against one dense gradient at a time."""

from __future__ import annotations

import pytest
import torch

from logix_like.curvature.curvature import damped_inverse_of
from logix_like.curvature.fitting import fit_curvature
from logix_like.curvature.gradients import Gradients, InnerProducts, QuadraticForms
from logix_like.linalg.basis import Basis
from tests.curvature.cases import dense_gradients, objective_of, sweep_of
from tests.models import ZOO, Case


def dense_basis(pair: tuple[Basis, Basis]) -> torch.Tensor:
    inward, outward = (torch.block_diag(*basis.parts) for basis in pair)
    return torch.kron(outward, inward)


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_gradients_are_those_of_single_samples(case: Case) -> None:
    sweep, model, batch = sweep_of(case)
    sink = Gradients()
    losses = sweep.run(batch, case.losses, sink)
    expected = dense_gradients(case, model, batch, sweep.layout)
    scale = max(float(values.abs().max()) for values in expected.values())
    assert torch.allclose(losses, case.losses(model.eval(), batch))
    for name, values in expected.items():
        found = sink.blocks.get(name, torch.zeros_like(values))
        assert torch.allclose(found, values, rtol=0, atol=case.tolerance * scale), name


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("case", ZOO, ids=str)
def test_inner_products_are_those_of_gradients(case: Case, count: int) -> None:
    sweep, _, batch = sweep_of(case)
    gradients = Gradients()
    sweep.run(batch, case.losses, gradients)
    vectors = {b.name: torch.randn(count, *b.shape, dtype=torch.float64) for b in sweep.layout}
    sink = InnerProducts(vectors)
    sweep.run(batch, case.losses, sink)
    for name, gradient in gradients.blocks.items():
        expected = torch.einsum("qoi,noi->qn", vectors[name], gradient)
        assert torch.allclose(sink.modules[name], expected, rtol=1e-9, atol=1e-11), name


@pytest.mark.parametrize("widest", [8192, 4])
@pytest.mark.parametrize("case", ZOO, ids=str)
def test_ekfac_is_the_best_diagonal_in_its_basis(case: Case, widest: int) -> None:
    sweep, model, batch = sweep_of(case)
    curvature = fit_curvature(
        model,
        [batch, batch],
        objective_of(case),
        labels="empirical",
        selection=sweep.selection,
        mask=lambda b: b.get("mask"),
        widest=widest,
        progress=False,
    )
    assert curvature.fisher.samples == 10
    gradients = dense_gradients(case, model, batch, sweep.layout)
    scale = max(float(values.abs().max()) for values in gradients.values())
    for block in curvature.layout:
        flat, basis = gradients[block.name].flatten(1), dense_basis(curvature.bases[block.name])
        assert torch.allclose(basis.T @ basis, torch.eye(len(basis), dtype=basis.dtype), atol=1e-10)
        expected = (flat @ basis).square().mean(0).view(block.shape)
        found = curvature.eigenvalues[block.name]
        assert torch.allclose(found, expected, rtol=1e-9, atol=10 * case.tolerance * scale**2), block.name
        # E7: the trace is the mean squared norm
        mean_square = flat.square().sum(1).mean()
        assert abs(found.sum() - mean_square) <= 10 * case.tolerance * max(mean_square, scale**2)


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_functions_of_eigenvalues_are_those_of_the_dense_matrix(case: Case) -> None:
    sweep, model, batch = sweep_of(case)
    curvature = fit_curvature(
        model, [batch], objective_of(case), labels="empirical", selection=sweep.selection, progress=False
    )
    gradients = {
        name: values
        for name, values in dense_gradients(case, model, batch, sweep.layout).items()
        if bool(curvature.eigenvalues[name].any())
    }
    inverse = damped_inverse_of(0.1)
    applied = curvature.apply(inverse, gradients)
    exponential = curvature.apply(lambda _, values: torch.exp(-values), gradients)
    sink = QuadraticForms(curvature.bases, curvature.weights(inverse), "highest")
    sweep.run(batch, case.losses, sink)
    forms = torch.zeros(len(batch["y"]), dtype=torch.float64)
    for name, values in gradients.items():
        basis, flat = dense_basis(curvature.bases[name]), values.flatten(1)
        dense = basis @ curvature.eigenvalues[name].flatten().diag() @ basis.T
        damped = dense + curvature.shift(name, 0.1) * torch.eye(len(dense), dtype=dense.dtype)
        expected = torch.linalg.solve(damped, flat.T).T
        assert torch.allclose(applied[name].flatten(1), expected, rtol=1e-7, atol=1e-8 * float(expected.abs().max()))
        decayed = flat @ torch.matrix_exp(-dense)
        assert torch.allclose(exponential[name].flatten(1), decayed, rtol=1e-7, atol=1e-9)
        forms += (flat * expected).sum(1)
    assert torch.allclose(sink.values, forms, rtol=1e-4 if case.tolerance > 1e-9 else 1e-7)
