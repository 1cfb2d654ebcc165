"""What estimators make of samples that are not finite, of finished models, and of questions that make no sense."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from logix_like.curvature import fit_curvature
from logix_like.errors import CaptureError, ConfigError, QueryError, StatisticsError
from logix_like.estimators import EKFAC, TRAK, InfluenceFunction
from logix_like.objective import Objective

Data = list[tuple[Tensor, Tensor]]


def classifier() -> tuple[nn.Module, Data]:
    """A model of two layers and twelve samples in three batches."""
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, list(zip(x.split(4), y.split(4), strict=True))


def test_a_sample_that_is_not_finite_is_ranked_nowhere_and_named() -> None:
    model, data = classifier()
    curvature = fit_curvature(model, data, progress=False)
    whole = EKFAC(model, data, curvature=curvature, progress=False).influence(data[0])
    x = data[1][0].clone()
    x[2, 0] = math.nan
    broken = [data[0], (x, data[1][1]), data[2]]
    result = EKFAC(model, broken, curvature=curvature, progress=False).influence(data[0])
    assert result.samples == 11 and result.scores is not None and whole.scores is not None
    assert torch.equal(result.scores, whole.scores[:, [i for i in range(12) if i != 6]])
    assert 6 not in result.proponents().ids and bool(result.proponents(1).scores.isfinite().all())
    assert result.note.endswith("Left out, since their scores are not finite: 1 samples (6).")
    nothing = [(x * math.nan, y) for x, y in data]
    with pytest.raises(QueryError, match="no sample has finite scores"):
        EKFAC(model, nothing, curvature=curvature, progress=False).influence(data[0])


def test_a_result_may_hold_the_extremes_only() -> None:
    model, data = classifier()
    influence = EKFAC(model, data, progress=False)
    whole, some = influence.influence(data[0]), influence.influence(data[0], query_id=["a", "b", "c", "d"], k=3)
    assert some.scores is None and some.data_id is None and some.query_id == ("a", "b", "c", "d")
    for mine, theirs in ((some.proponents(), whole.proponents(3)), (some.opponents(), whole.opponents(3))):
        assert mine.ids.tolist() == theirs.ids.tolist() and torch.equal(mine.scores, theirs.scores)
    with pytest.raises(QueryError, match="k must be between 1 and 12"):
        influence.influence(data[0], k=13)
    with pytest.raises(QueryError, match="2 ids were given for 4 queries; give one for each"):
        influence.influence(data[0], query_id=["a", "b"])


def test_a_result_says_which_curvature_it_is_and_how_well_it_was_solved() -> None:
    model, data = classifier()
    empirical = fit_curvature(model, data, labels="empirical", progress=False)
    assert EKFAC(model, data, progress=False).influence(data[0]).note == "EK-FAC, true Fisher over 12 samples."
    told = EKFAC(model, data, curvature=empirical, progress=False).influence(data[0]).note
    assert told == "EK-FAC, empirical Fisher over 12 samples."
    solved = InfluenceFunction(model, data, solver="exact", damping=0.1, progress=False)
    assert solved.note == "influence function, ggn matrix, solver 'exact'."
    assert "ggn matrix, solver 'exact', relative residual" in solved.influence(data[0]).note


@pytest.mark.parametrize("estimator", [EKFAC, TRAK])
def test_a_model_of_which_nothing_is_trained_any_more_is_asked_as_before(estimator: Any) -> None:
    model, data = classifier()
    scores = estimator(model, data, progress=False).scores(data[0])
    model.requires_grad_(False)
    assert torch.equal(estimator(model, data, progress=False).scores(data[0]), scores)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("estimator", [EKFAC, TRAK, InfluenceFunction])
def test_inference_mode_is_refused(estimator: Any) -> None:
    model, data = classifier()
    with torch.inference_mode(), pytest.raises(ConfigError, match=r"inside torch\.inference_mode\(\); ask outside"):
        estimator(model, data, progress=False).scores(data[0])
    with torch.no_grad():
        assert bool(estimator(model, data, progress=False).scores(data[0]).isfinite().all())


def given(mask: Any, batch: object) -> Any:
    return mask


def test_a_mask_of_another_shape_is_refused() -> None:
    x, y = torch.randn(4, 6, 5), torch.randint(3, (4, 6))
    objective = Objective(outputs=lambda model, batch: model(batch["x"]), targets=lambda batch: batch["y"])
    batch: dict[str, Any] = {"x": x, "y": y}
    plain = fit_curvature(nn.Sequential(nn.Linear(5, 3)), [batch], objective, progress=False)
    for mask, told in ((torch.ones(4), r"shape \(4,\)"), (torch.ones(3, 6), r"shape \(3, 6\)"), ([[1]], "type list")):
        with pytest.raises(CaptureError, match=f"the mask has the {told}; expected a tensor .samples, positions. for"):
            EKFAC(nn.Linear(5, 3), [batch], objective, mask=partial(given, mask), progress=False).scores(batch)
    seen = {**batch, "attention_mask": torch.zeros(4, 1, 6, 6)}  # who sees whom, not which positions count
    assert fit_curvature(nn.Sequential(nn.Linear(5, 3)), [seen], objective, progress=False).layout == plain.layout


def test_a_layer_of_torchs_own_transformer_can_be_differentiated_twice() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(32, 3)).double()
    data = [(torch.randn(4, 4, 8, dtype=torch.float64), torch.randint(3, (4,))) for _ in range(3)]
    found = [
        InfluenceFunction(model, data, solver=solver, damping=0.1, progress=False).scores(data[0])
        for solver in ("cg", "ekfac-cg")
    ]
    assert torch.allclose(found[0], found[1], rtol=1e-2, atol=1e-3 * float(found[0].abs().max()))
    assert torch.backends.mha.get_fastpath_enabled()


def test_what_else_to_take_is_said() -> None:
    model, data = classifier()
    with pytest.raises(StatisticsError, match=r"a Hessian, which need not be positive .* or matrix='ggn'"):
        InfluenceFunction(model, data, solver="exact", matrix="hessian", damping=0.0, progress=False).scores(data[0])
    tokens = [(torch.randint(7, (5,)), torch.randint(3, (5,)))]
    with pytest.raises(ConfigError, match=r"no module to track: .*; solver='cg' needs none"):
        InfluenceFunction(nn.Embedding(7, 3), tokens, progress=False).scores(tokens[0])
    assert InfluenceFunction(nn.Embedding(7, 3), tokens, solver="cg", progress=False).scores(tokens[0]).shape == (5, 5)


def test_autocast_is_for_the_models_products_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(12, 5), torch.arange(12) % 3
    data = list(zip(x.split(4), y.split(4), strict=True))

    def cast(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found: Tensor = model(batch[0])
        return found

    inner = EKFAC(model, data, Objective(outputs=cast, targets=lambda batch: batch[1]), progress=False)
    expected, own = inner.scores(data[0]), inner.self_influence()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outer = EKFAC(model, data, progress=False)
        assert torch.allclose(outer.scores(data[0]), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        assert torch.allclose(outer.self_influence(), own, rtol=1e-5)


@pytest.mark.parametrize("estimator", [EKFAC, TRAK])
def test_an_empty_batch_is_spoken_of(estimator: Any) -> None:
    model, data = classifier()
    empty = (data[0][0][:0], data[0][1][:0])
    with pytest.raises(CaptureError, match="a batch holds no sample: leave empty batches out"):
        estimator(model, [*data, empty], progress=False).scores(data[0])
