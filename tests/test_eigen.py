"""Rows that keep only the largest coordinates of the Kronecker eigenbasis."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logix_like as logix
from logix_like.curvature import fit_curvature
from logix_like.errors import ConfigError, ModelMismatchError
from logix_like.layout import Layout, ModuleBlock
from logix_like.projection import INITS, largest_coordinates
from tests.training import SAMPLES, batches, data, full, network, own_gradients

RANK = 2
EIGEN = {"init": "eigen", "rank": RANK, "warmup": 12}
EXACT = 1e-9


def logged(tmp_path: Path, **settings: object) -> tuple[logix.Run, torch.nn.Module]:
    model = network()
    run = logix.init("run", model, full(tmp_path, projection=EIGEN, **settings), verbose=False)
    x, y = data()
    for index in batches():
        with run(data_id=index):
            F.cross_entropy(model(x[index]), y[index]).backward()
    run.finalize()
    return run, model


def queried(run: logix.Run, model: torch.nn.Module, **options: object) -> Tensor:
    x, y = data()
    with run.query(data_id=["q0", "q1"]) as query:
        F.cross_entropy(model(x[:2]), y[:2]).backward()
    scores = run.compute_influence_all(query, **options).scores
    assert isinstance(scores, Tensor)
    return scores


def test_the_largest_products_of_all_modules_are_kept() -> None:
    inward, outward = torch.diag(torch.tensor([9.0, 5.0, 1.0])), torch.tensor([4.0, 1.0])
    # products: 36 20 4 / 9 5 1
    moments, ranks = {"a": (inward, outward)}, {"a": (2, 3)}
    assert largest_coordinates(moments, ranks, 4) == {"a": (0, 1, 3, 4)}
    larger, nothing = (10 * inward, outward), (0 * inward, outward)
    both = largest_coordinates({"a": moments["a"], "b": larger}, {"a": (2, 3), "b": (2, 3)}, 6)
    assert both == {"a": (0,), "b": (0, 1, 2, 3, 4)}
    unused = largest_coordinates({"a": moments["a"], "b": nothing}, {"a": (2, 3), "b": (2, 3)}, 4)
    assert unused == {"a": (0, 1, 3), "b": (0,)}
    assert INITS["eigen"].capped(2, 5) == 5


def test_rows_are_the_chosen_coordinates_of_projected_gradients(tmp_path: Path) -> None:
    run, model = logged(tmp_path)
    store, gradients = run.store, own_gradients(model, *data())
    expected = []
    for block, matrices in zip(
        store.layout, (gradients[:, : 8 * 7].view(-1, 8, 7), gradients[:, 8 * 7 :].view(-1, 3, 9)), strict=True
    ):
        inward, outward = (matrix.double() for matrix in store.projections[block.name])
        assert block.coordinates is not None
        expected.append((outward @ matrices @ inward.T).flatten(1)[:, list(block.coordinates)])
    assert store.layout.width == 2 * RANK * RANK
    rows = store.gradients[:].double()
    assert float((rows - torch.cat(expected, 1)).norm() / rows.norm()) < EXACT
    assert list(store.data_id[:]) == list(range(SAMPLES))


@pytest.mark.parametrize("preconditioner", ["ekfac", "kfac", "diagonal", "covariance", "identity", "auto"])
def test_scores_are_plain_products_in_the_eigenbasis(tmp_path: Path, preconditioner: str) -> None:
    run, model = logged(tmp_path)
    found = queried(run, model, preconditioner=preconditioner)
    rows, layout = run.store.gradients[:].double(), run.store.layout
    expected = torch.zeros(2, len(rows), dtype=torch.float64)
    for block in layout:
        part = rows[:, block.columns]
        second = part.T @ part / len(rows)
        if preconditioner == "kfac":
            factors = run.store.statistics.kronecker(block.name)
            products = torch.outer(factors.output.diagonal(), factors.input.diagonal()).flatten()
            second = products[list(block.coordinates)].diag()
        elif preconditioner in ("ekfac", "diagonal"):
            second = second.diagonal().diag()
        elif preconditioner == "identity":
            expected += part[:2] @ part.T
            continue
        damped = second + 0.1 * second.diagonal().mean() * torch.eye(len(second), dtype=torch.float64)
        expected += part[:2] @ torch.linalg.solve(damped, part.T)
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_later_process_asks_with_the_same_coordinates(tmp_path: Path) -> None:
    run, model = logged(tmp_path)
    later = logix.load(tmp_path / "run", model)
    assert later.store.layout == run.store.layout
    assert torch.allclose(queried(later, model), queried(run, model))


def test_a_resumed_run_keeps_them(tmp_path: Path) -> None:
    run, model = logged(tmp_path)
    with logix.init("run", model, full(tmp_path, projection=EIGEN), resume=True, verbose=False) as resumed:
        x, y = data()
        with resumed(data_id=["again"] * 2):
            F.cross_entropy(model(x[:2]), y[:2]).backward()
    rows = resumed.store.gradients[:]
    assert torch.allclose(rows[-2:], rows[:2])
    changed = Layout([ModuleBlock(**{**vars(b), "coordinates": b.coordinates[::-1]}) for b in run.store.layout])
    with pytest.raises(ModelMismatchError, match="other coordinates"):
        run.store.layout.require_same(changed)


def test_tokens_of_a_sample_add_up_in_the_eigenbasis() -> None:
    block = ModuleBlock("m", "linear", (3, 4), (3, 4), 0, "m", coordinates=(1, 2, 6, 11))
    layout = Layout([block])
    matrices, numbers = torch.randn(5, 3, 4), torch.randn(2, 4)
    spread = layout.spread("m", numbers)
    assert torch.equal(layout.pick("m", spread), numbers)
    assert torch.allclose(torch.einsum("qoi,noi->qn", spread, matrices), numbers @ layout.pick("m", matrices).T)
    assert Layout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize("init", ["pca", "eigen"])
def test_projections_are_made_from_a_curvature_fitted_before(tmp_path: Path, init: str) -> None:
    model, (x, y) = network(), data()
    samples = [(x[index], y[index]) for index in batches()]
    curvature = fit_curvature(model, samples, labels="empirical", kind="kfac", progress=False)
    settings = full(tmp_path, projection={"init": init, "rank": RANK})
    run = logix.init("run", model, settings, curvature=curvature, verbose=False)
    with run(data_id=range(len(x))):
        F.cross_entropy(model(x), y).backward()
    run.finalize()
    for block in run.store.layout:
        pairs = zip(run.store.projections[block.name], curvature.bases[block.name], strict=True)
        for matrix, basis in pairs:
            turned = basis.rotate(matrix.double()).abs()  # eigenvectors, the largest first
            expected = torch.eye(len(basis.parts[0]), dtype=torch.float64).flip(0)[: len(matrix)]
            torch.testing.assert_close(turned, expected, rtol=0, atol=1e-6)


def test_a_curvature_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    model, (x, y) = network(), data()
    curvature = fit_curvature(model, [(x, y)], kind="kfac", progress=False)
    with pytest.raises(ConfigError, match="'orthogonal' is not made from a curvature; take 'pca' or 'eigen'"):
        logix.init("a", model, full(tmp_path, projection={"init": "orthogonal"}), curvature=curvature)
    with pytest.raises(ConfigError, match=r"give init\(model=...\) as well"):
        logix.init("b", config=full(tmp_path, projection=EIGEN), curvature=curvature)
    other = torch.nn.Sequential(torch.nn.Linear(3, 2))
    with pytest.raises(ModelMismatchError, match=r"module '0' has gradients of shape .* and the curvature has"):
        logix.init("c", other, full(tmp_path, projection=EIGEN), curvature=curvature)
