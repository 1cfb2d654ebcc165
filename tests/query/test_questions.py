"""What people ask beside scores of everything: some samples, parts of the model, sets, look-alikes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from logix_like.errors import QueryError
from logix_like.layout import Layout, ModuleBlock
from logix_like.query import groups
from logix_like.query.engine import KEPT_BYTES, QueryEngine
from logix_like.query.gradients import QueryGradients
from logix_like.query.parts import layer_of
from logix_like.query.result import InfluenceResult, SelfInfluence
from logix_like.query.scan import Candidates
from logix_like.statistics import StatisticsAccumulator
from tests.query.memory_store import MemoryStore
from tests.reference import blocks_layout, dense_inverse, dense_scores, second_moment_matrix

NAMES = ("embed", "model.layers.0.attention", "model.layers.0.mlp", "model.layers.1.mlp")
PLAIN = blocks_layout((2, 3), (3, 2), (2, 2), (4, 2))
LAYOUT = Layout(
    tuple(
        ModuleBlock(name, block.kind, block.shape, block.rank, block.offset, name)
        for name, block in zip(NAMES, PLAIN, strict=True)
    )
)
DAMPING = 0.2
EXACT = 1e-9
"""Float64 on both sides."""


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(60, LAYOUT.width, dtype=torch.float64) * torch.linspace(0.3, 2, LAYOUT.width)


@pytest.fixture(params=[0, KEPT_BYTES], ids=["streamed", "kept"])
def engine(rows: Tensor, request: pytest.FixtureRequest) -> QueryEngine:
    return QueryEngine(_store(rows), keep_bytes=request.param)


@pytest.fixture
def query() -> QueryGradients:
    return QueryGradients(("q0", "q1", "q2"), torch.randn(3, LAYOUT.width, dtype=torch.float64), LAYOUT)


def _store(rows: Tensor, ids: list[Any] | None = None) -> MemoryStore:
    statistics = StatisticsAccumulator(LAYOUT, ["covariance"])
    statistics.update(rows)
    store = MemoryStore(LAYOUT, rows, ids, statistics=statistics.snapshot())
    store.columns["label"] = np.array([i % 3 for i in range(len(rows))], dtype=object)
    store.columns["split"] = np.array(["ab"[i % 2] for i in range(len(rows))], dtype=object)
    return store


def _inverse(rows: Tensor) -> Tensor:
    return dense_inverse(LAYOUT, lambda b: second_moment_matrix(rows[:, b.columns]), DAMPING)


OPTIONS: dict[str, Any] = {"preconditioner": "covariance", "damping": DAMPING}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"label": 1}, [i for i in range(60) if i % 3 == 1]),
        ({"label": [0, 2], "split": "a"}, [i for i in range(60) if i % 3 != 1 and i % 2 == 0]),
        ({"step": range(0, 100, 10)}, list(range(10))),
        ({"data_id": ("s5", "s3")}, [3, 5]),
        (["s7", "s2"], [2, 7]),
        (np.arange(60) < 4, [0, 1, 2, 3]),
        (torch.arange(60) > 57, [58, 59]),
    ],
)
def test_some_samples(engine: QueryEngine, query: QueryGradients, where: Any, expected: list[int]) -> None:
    options = {**OPTIONS, "reduce": "none"}
    every = engine.influence(query, **options)
    some = engine.influence(query, where=where, **options)
    assert some.data_id.tolist() == [f"s{i}" for i in expected]
    torch.testing.assert_close(some.scores, every.scores[:, expected], rtol=EXACT, atol=EXACT)
    few = engine.influence(query, where=where, k=2, **options)
    assert few.proponents().ids.tolist() == some.proponents(2).ids.tolist()
    assert engine.self_influence(where=where, **options).data_id.tolist() == some.data_id.tolist()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            {"labels": 1},
            "there is no column 'labels' to choose samples by; the store has data_id, step, epoch, label, sp",
        ),
        ({"label": 7}, "no sample has label = 7; the first values of the column 'label' are 0, 1, 2"),
        ({"label": 1, "data_id": "s0"}, r"where=\{'label': 1, 'data_id': 's0'\} names no sample that can be ranked"),
        (np.ones(5, dtype=bool), r"the mask given as where has the shape \(5,\), but 60 rows are ranked"),
        (np.zeros(60, dtype=bool), "the mask given as where names no sample"),
        ([], "data_id names no sample"),
        (2.5, "data_id or where is 2.5; it must be"),
    ],
)
def test_a_choice_that_makes_no_sense(query: QueryGradients, rows: Tensor, where: Any, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        QueryEngine(_store(rows)).influence(query, where=where, reduce="none", **OPTIONS)


def test_two_filters_that_agree_are_a_filter_still(engine: QueryEngine, query: QueryGradients) -> None:
    """The second leaves all that the first had left, which is not all that there is."""
    chosen, options = [f"s{i}" for i in range(60) if i % 3 == 1], {**OPTIONS, "reduce": "none"}
    every = engine.influence(query, mode="cosine", **options)
    some = engine.influence(query, where={"label": 1}, data_id=chosen, mode="cosine", **options)
    assert some.data_id.tolist() == chosen
    torch.testing.assert_close(some.scores, every.scores[:, 1::3], rtol=EXACT, atol=EXACT)
    few = engine.influence(query, where={"label": 1}, data_id=chosen, k=20, **options)
    assert set(few.proponents().ids[0]) == set(chosen)
    assert engine.influence(query, k=60, **options).samples == 60


def test_what_the_first_filter_leaves_is_not_kept_for_all(rows: Tensor, query: QueryGradients) -> None:
    engine, chosen = QueryEngine(_store(rows)), ["s1", "s4"]
    engine.influence(query, where=chosen, data_id=chosen, **OPTIONS)
    expected = QueryEngine(_store(rows)).influence(query, k=5, **OPTIONS).proponents()
    assert engine.influence(query, k=5, **OPTIONS).proponents().ids.tolist() == expected.ids.tolist()


@pytest.mark.parametrize("mode", ["dot", "cosine", "relatif"])
def test_scores_split_by_modules(engine: QueryEngine, rows: Tensor, query: QueryGradients, mode: str) -> None:
    result = engine.influence(query, per="module", mode=mode, **OPTIONS)
    inverse, asked = _inverse(rows), query.gradients
    lengths = [(g @ inverse * g).sum(1).sqrt() for g in (asked, rows)]
    for part, block in enumerate(LAYOUT):
        own = asked[:, block.columns] @ inverse[block.columns, block.columns] @ rows[:, block.columns].T
        if mode != "dot":
            own = own / lengths[1]
        if mode == "cosine":
            own = own / lengths[0][:, None]
        torch.testing.assert_close(result.parts[:, :, part], own, rtol=EXACT, atol=EXACT)
    assert result.part_names == NAMES
    torch.testing.assert_close(result.parts.sum(2), result.scores, rtol=EXACT, atol=EXACT)
    few = engine.influence(query, k=4, per="module", mode=mode, **OPTIONS)
    for ranking, expected in ((few.top, result.proponents(4)), (few.bottom, result.opponents(4))):
        assert ranking.ids.tolist() == expected.ids.tolist()
        torch.testing.assert_close(ranking.parts, expected.parts, rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(ranking.parts.sum(2), ranking.scores, rtol=EXACT, atol=EXACT)


def test_scores_split_by_layers(engine: QueryEngine, query: QueryGradients) -> None:
    modules = engine.influence(query, per="module", **OPTIONS)
    layers = engine.influence(query, per="layer", **OPTIONS)
    assert layers.part_names == ("embed", "model.layers.0", "model.layers.1")
    torch.testing.assert_close(layers.parts[:, :, 1], modules.parts[:, :, 1:3].sum(2), rtol=EXACT, atol=EXACT)


def test_summed_visits_are_split_too(rows: Tensor, query: QueryGradients) -> None:
    engine = QueryEngine(_store(rows, [f"s{i % 25}" for i in range(60)]), keep_bytes=0)
    result = engine.influence(query, k=3, per="module", reduce="sum", mode="relatif", **OPTIONS)
    torch.testing.assert_close(result.top.parts.sum(2), result.top.scores, rtol=EXACT, atol=EXACT)


def test_layers_are_called_by_their_last_number() -> None:
    names = {"model.layers.3.mlp.up": "model.layers.3", "features.0": "features.0", "fc": "fc", "": ""}
    assert {name: layer_of(name) for name in names} == names
    assert layer_of("h.2.experts.7.w1") == "h.2.experts.7"


@pytest.mark.parametrize("suffix", ["json", "npz"])
@pytest.mark.parametrize("k", [None, 3])
def test_split_scores_are_saved(
    engine: QueryEngine, query: QueryGradients, tmp_path: Path, suffix: str, k: Any
) -> None:
    result = engine.influence(query, k=k, per="layer", preconditioner="covariance", damping={"absolute": 0.5})
    read = InfluenceResult.load(result.save(tmp_path / f"a.{suffix}"))
    assert read.part_names == result.part_names and read.damping == {"absolute": 0.5}
    for side in ("proponents", "opponents"):
        assert getattr(read, side)(2).parts.equal(getattr(result, side)(2).parts)


def test_distances_are_not_split(engine: QueryEngine, query: QueryGradients) -> None:
    with pytest.raises(QueryError, match="mode 'l2' is no sum over modules"):
        engine.influence(query, per="module", mode="l2")
    with pytest.raises(QueryError, match="unknown per 'head'; known: None, module, layer"):
        engine.influence(query, per="head")


@pytest.mark.parametrize("k", [None, 5])
def test_queries_at_length_one(engine: QueryEngine, rows: Tensor, query: QueryGradients, k: int | None) -> None:
    inverse = _inverse(rows)
    lengths = (query.gradients @ inverse * query.gradients).sum(1).sqrt()
    for mode in ("dot", "relatif", "cosine"):
        result = engine.influence(query, k=k, mode=mode, normalize=True, **OPTIONS)
        expected = dense_scores(query.gradients / lengths[:, None], rows, inverse, mode)
        found = result.proponents(5).scores
        torch.testing.assert_close(found, expected.topk(5, dim=1).values, rtol=EXACT, atol=EXACT)
    assert "queries at length 1" in result.note


def test_a_query_of_length_zero_stays_zero(engine: QueryEngine) -> None:
    query = QueryGradients(("q",), torch.zeros(1, LAYOUT.width), LAYOUT)
    assert engine.influence(query, normalize=True, **OPTIONS).scores.eq(0).all()


def test_a_set_scores_the_sum_of_its_samples(engine: QueryEngine, query: QueryGradients) -> None:
    every = engine.influence(query, **OPTIONS).scores
    groups = {"even": [f"s{i}" for i in range(0, 60, 2)], "one": ["s7"]}
    found = engine.group_influence(query, groups, **OPTIONS)
    expected = torch.stack([every[:, ::2].sum(1), every[:, 7]], 1).float()
    torch.testing.assert_close(found.scores, expected)
    assert (found.groups, found.sizes, found.order) == (("even", "one"), (30, 1), 1)
    assert "one" in str(found) and "sum of scores" in found.note
    alone = engine.group_influence(query, ["s7", "s7"], **OPTIONS)
    assert alone.groups == ("group",) and alone.sizes == (1,)


def test_second_order_is_the_dense_newton_step(engine: QueryEngine, rows: Tensor, query: QueryGradients) -> None:
    chosen = list(range(25))
    found = engine.group_influence(query, [f"s{i}" for i in chosen], order=2, **OPTIONS)
    full = torch.zeros(LAYOUT.width, LAYOUT.width, dtype=torch.float64)
    for block in LAYOUT:
        own = rows[:, block.columns]
        curvature = second_moment_matrix(own)
        shift = DAMPING * curvature.diagonal().mean() * torch.eye(block.size, dtype=torch.float64)
        full[block.columns, block.columns] = curvature + shift - own[chosen].T @ own[chosen] / len(rows)
    expected = query.gradients @ torch.linalg.solve(full, rows[chosen].sum(0))
    torch.testing.assert_close(found.scores[:, 0].double(), expected, rtol=1e-6, atol=1e-6)


def test_second_order_is_exact_on_ridge_whose_errors_are_one() -> None:
    """There every sample's gradient has the outer product that is its Hessian, so one Newton step retrains exactly."""
    layout, count, delta = blocks_layout((1, 4)), 40, 3.0
    features = torch.randn(count, 4, dtype=torch.float64)
    errors = torch.randint(2, (count, 1)).double() * 2 - 1
    theta = -(features.T @ errors) / delta  # stationary: sum of gradients + delta theta = 0
    targets = features @ theta - errors
    kept = torch.arange(count) >= 12
    system = features[kept].T @ features[kept] + delta * torch.eye(4, dtype=torch.float64)
    retrained = torch.linalg.solve(system, features[kept].T @ targets[kept])
    query = QueryGradients(("q",), torch.randn(1, 4, dtype=torch.float64), layout)
    engine = QueryEngine(MemoryStore(layout, features * errors))
    options: dict[str, Any] = {"preconditioner": "covariance", "damping": {"absolute": delta / count}}
    left_out = [f"s{i}" for i in range(12)]
    score = engine.group_influence(query, left_out, order=2, **options).scores / count
    change = query.gradients @ (retrained - theta)
    torch.testing.assert_close(score.double(), change, rtol=1e-6, atol=1e-7)
    first = engine.group_influence(query, left_out, **options).scores / count
    assert (first - change).abs() > 10 * (score - change).abs()


def test_second_order_of_repeated_visits_takes_all_of_them_out(rows: Tensor, query: QueryGradients) -> None:
    engine = QueryEngine(_store(rows, [f"s{i % 20}" for i in range(60)]))
    found = engine.group_influence(query, ["s0", "s1"], order=2, **OPTIONS)
    visits = [i for i in range(60) if i % 20 < 2]
    means = rows.view(3, 20, -1).mean(0)[:2].sum(0)
    full = torch.linalg.inv(_inverse(rows))
    for block in LAYOUT:
        own = rows[visits][:, block.columns]
        full[block.columns, block.columns] -= own.T @ own / len(rows)
    expected = query.gradients @ torch.linalg.solve(full, means)
    torch.testing.assert_close(found.scores[:, 0].double(), expected, rtol=1e-6, atol=1e-6)


def test_sets_that_make_no_sense(engine: QueryEngine, query: QueryGradients) -> None:
    senseless: tuple[Any, ...] = ([], {}, "s1", 3, [["s1", "s2"], ["s3"]], [1.5])
    for ids in senseless:
        with pytest.raises(QueryError, match=r"groups is .*; it must be a list of ids, or groups a mapping"):
            engine.group_influence(query, ids, **OPTIONS)
    with pytest.raises(QueryError, match="no sample with the id 'x'"):
        engine.group_influence(query, ["x"], **OPTIONS)
    with pytest.raises(QueryError, match=r"order is 3; it must be 1 \(sum of scores\) or 2"):
        engine.group_influence(query, ["s1"], order=3, **OPTIONS)


def test_a_set_too_large_for_second_order_is_refused_before_it_is_read(
    rows: Tensor, query: QueryGradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "LARGEST_GROUP", 10)
    monkeypatch.setattr(Candidates, "fetch", None)
    with pytest.raises(QueryError, match="a group of 11 rows is too large for order=2, which takes up to 10"):
        QueryEngine(_store(rows)).group_influence(query, [f"s{i}" for i in range(11)], order=2, **OPTIONS)


def test_near_duplicates_in_gradient_space(rows: Tensor) -> None:
    rows[40] = 3 * rows[4]
    rows[50] = rows[4] + 1e-3
    rows[51] = -rows[9]
    engine = QueryEngine(_store(rows))
    result = engine.similar(["s9", "s4"], k=3)
    assert result.query_id == ("s4", "s9")  # in the store's order
    assert result.proponents().ids[0, :2].tolist() == ["s40", "s50"]
    assert result.opponents().ids[1, 0] == "s51"
    assert result.proponents().scores[0, 0].item() == pytest.approx(1)
    assert "s4" not in result.proponents().ids[0] and result.proponents().k == 3
    with pytest.raises(QueryError, match="k is 60; it must be between 1 and 59"):
        engine.similar(["s4"], k=60)


def test_the_visits_of_a_sample_are_not_its_look_alikes(rows: Tensor) -> None:
    engine = QueryEngine(_store(rows, [f"s{i % 20}" for i in range(60)]))
    result = engine.similar(["s3"], k=5, reduce="none")
    assert len(result.query_id) == 3 and "s3" not in result.proponents().ids


def test_leverages_are_bounded_and_add_up(rows: Tensor, tmp_path: Path) -> None:
    result = QueryEngine(_store(rows)).self_influence(preconditioner="covariance", damping=1e-9)
    assert (result.leverage > 0).all() and (result.leverage < len(LAYOUT)).all()
    # Each module's leverages sum to its dimension.
    assert result.leverage.sum().item() == pytest.approx(LAYOUT.width, rel=1e-5)
    for suffix in ("json", "npz"):
        assert SelfInfluence.load(result.save(tmp_path / f"a.{suffix}")).leverage.equal(result.leverage)
    with pytest.raises(QueryError, match="the leverage needs the number of rows"):
        _ = SelfInfluence(result.data_id, result.scores, "identity", 0.1, "mean", "").leverage


@pytest.mark.parametrize("preconditioner", ["covariance", "diagonal"])
def test_absolute_damping(engine: QueryEngine, rows: Tensor, query: QueryGradients, preconditioner: str) -> None:
    found = engine.influence(query, preconditioner=preconditioner, damping={"absolute": 0.7})
    full = torch.zeros(LAYOUT.width, LAYOUT.width, dtype=torch.float64)
    for block in LAYOUT:
        own = second_moment_matrix(rows[:, block.columns])
        own = own if preconditioner == "covariance" else own.diagonal().diag()
        full[block.columns, block.columns] = own + 0.7 * torch.eye(block.size, dtype=torch.float64)
    expected = query.gradients @ torch.linalg.solve(full, rows.T)
    torch.testing.assert_close(found.scores, expected, rtol=EXACT, atol=EXACT)
    assert found.damping == {"absolute": 0.7} and "damping 0.7 (absolute)" in found.note
    again = engine.influence(query, preconditioner=preconditioner, damping=0.7)
    assert not torch.allclose(again.scores, found.scores)


@pytest.mark.parametrize("ids", [torch.tensor([7, 2]), np.array([2, 7]), [np.int64(2), 7]])
def test_ids_come_in_tensors_and_arrays(rows: Tensor, query: QueryGradients, ids: Any) -> None:
    engine = QueryEngine(_store(rows, list(range(60))))
    assert engine.influence(query, data_id=ids, **OPTIONS).data_id.tolist() == [2, 7]
    whole = engine.group_influence(query, {"two": ids}, **OPTIONS).scores
    torch.testing.assert_close(whole, engine.group_influence(query, [2, 7], **OPTIONS).scores, rtol=EXACT, atol=0)
    assert torch.equal(whole, engine.group_influence(query, ids, **OPTIONS).scores)


def test_truth_values_are_a_mask_and_never_the_ids_0_and_1(rows: Tensor, query: QueryGradients) -> None:
    engine = QueryEngine(_store(rows, list(range(60))))
    mask = [i in (5, 9) for i in range(60)]
    assert engine.influence(query, where=mask, **OPTIONS).data_id.tolist() == [5, 9]
    with pytest.raises(QueryError, match="has the shape"):
        engine.influence(query, where=[True, False], **OPTIONS)
    with pytest.raises(QueryError, match=r"no sample with the id True \(bool\)"):
        engine.influence(query, data_id=[3, True], **OPTIONS)
    with pytest.raises(QueryError, match="the group 'a' is"):
        engine.group_influence(query, {"a": [True, False]}, **OPTIONS)


@pytest.mark.parametrize("ids", ["s3", 3, []])
def test_a_group_is_a_list_and_not_the_letters_of_an_id(engine: QueryEngine, query: QueryGradients, ids: Any) -> None:
    with pytest.raises(QueryError, match=r"the group 'a' is .*; it must be a list of ids"):
        engine.group_influence(query, {"a": ids}, **OPTIONS)


@pytest.mark.parametrize("value", [[[1]], slice(1, 2), {"a": [1]}.values()])
def test_what_cannot_stand_in_a_column_is_refused(engine: QueryEngine, query: QueryGradients, value: Any) -> None:
    with pytest.raises(QueryError, match=r"where asks for step = .*; it must be one value, or a list of values"):
        engine.influence(query, where={"step": value}, **OPTIONS)


@pytest.mark.parametrize("mode", ["dot", "l2", "relatif", "cosine"])
def test_sums_of_visits_are_compared_with_sums(rows: Tensor, mode: str) -> None:
    ids = [f"s{i % 20}" for i in range(60)]
    engine = QueryEngine(_store(rows, ids))
    summed = QueryEngine(MemoryStore(LAYOUT, torch.stack([rows[i::20].sum(0) for i in range(20)])))
    found, expected = (one.similar(["s4"], k=5, mode=mode, reduce="sum").proponents() for one in (engine, summed))
    assert found.ids.tolist() == expected.ids.tolist()
    torch.testing.assert_close(found.scores, expected.scores, rtol=EXACT, atol=EXACT)


def test_look_alikes_among_some_samples_only(engine: QueryEngine) -> None:
    others = [f"s{i}" for i in range(20, 25)]
    assert set(engine.similar(["s3"], k=5, where=others).proponents().ids[0]) == set(others)
    fewer = engine.similar(["s20"], k=5, where=others)
    assert set(fewer.proponents().ids[0]) == set(others) - {"s20"}
    assert fewer.note.endswith("; all that the filter leaves, fewer than k=5")
    with pytest.raises(QueryError, match="leaves no sample to be like but the one itself"):
        engine.similar(["s20"], k=5, where=["s20"])


def test_look_alikes_where_samples_have_unlike_numbers_of_visits(rows: Tensor) -> None:
    engine = QueryEngine(_store(rows, ["a", "a", "a", *(f"s{i}" for i in range(57))]))
    assert engine.similar(["a", "s3"], k=57, reduce="none").proponents().ids.shape == (4, 57)
    with pytest.raises(QueryError, match="k is 58; it must be between 1 and 57"):
        engine.similar(["a", "s3"], k=58, reduce="none")


def test_gradients_whose_squares_underflow_keep_their_scores(rows: Tensor, query: QueryGradients) -> None:
    rows, asked = rows.float(), QueryGradients(query.data_id, query.gradients.float(), LAYOUT)
    small = QueryGradients(query.data_id, asked.gradients * 1e-20, LAYOUT)
    plain, tiny = QueryEngine(_store(rows)), QueryEngine(_store(rows * 1e-20))
    expected = plain.influence(asked, **OPTIONS).scores
    assert expected is not None
    close = {"rtol": 1e-3, "atol": 1e-3 * float(expected.abs().max())}
    torch.testing.assert_close(tiny.influence(small, **OPTIONS).scores, expected, **close)
    options = {"preconditioner": "identity", "normalize": True}
    torch.testing.assert_close(
        plain.influence(small, **options).scores, plain.influence(asked, **options).scores, rtol=1e-5, atol=1e-5
    )
