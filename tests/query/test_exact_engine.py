"""The exact engine against dense float64 references, over all options."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from logix_like.layout import Layout, ModuleBlock
from logix_like.preconditioner import PRECONDITIONERS
from logix_like.query.engine import KEPT_BYTES, QueryEngine
from logix_like.query.gradients import QueryGradients
from logix_like.query.modes import MODES
from logix_like.query.question import REDUCTIONS
from logix_like.statistics import Statistics, StatisticsAccumulator, corrected_sums
from tests.query.memory_store import MemoryStore
from tests.reference import blocks_layout, dense_inverse, dense_ranking, dense_scores, second_moment_matrix

EXACT = 1e-10
"""Float64 on both sides; condition numbers up to about 1e3."""

SINGLE = 2e-4
"""Float32 against float64: some 1e3 products, condition numbers up to about 1e3."""

LAYOUT = blocks_layout((2, 3), (3, 2), (2, 3))
DAMPING = 0.2


def _rows(number: int, dtype: torch.dtype = torch.float64) -> Tensor:
    scales = torch.linspace(0.2, 3, LAYOUT.width)
    return (torch.randn(number, LAYOUT.width) * scales).to(dtype)


def _gathered(rows: Tensor) -> Statistics:
    """All sums over ``rows``, with Kronecker factors of some activations."""
    accumulator = StatisticsAccumulator(LAYOUT, ["covariance", "variance", "kronecker"])
    accumulator.update(rows)
    sums = {name: dict(fields) for name, fields in accumulator.snapshot().sums.items()}
    for block in LAYOUT:
        outward, inward = torch.randn(50, block.rank[0]).double(), torch.randn(50, block.rank[1]).double()
        sums[block.name] |= {
            "samples": torch.tensor(10.0, dtype=torch.float64),
            "output_outer_sum": outward.T @ outward,
            "positions": torch.tensor(50.0, dtype=torch.float64),
            "input_outer_sum": inward.T @ inward,
        }
    statistics = Statistics(LAYOUT, sums, len(rows))
    return statistics.with_corrected(corrected_sums(statistics, [rows]))


def _dense_curvature(name: str, statistics: Statistics, rows: Tensor, block: ModuleBlock) -> Tensor:
    own = second_moment_matrix(rows[:, block.columns])
    factors = statistics.kronecker(block.name)
    if name == "diagonal":
        return own.diagonal().diag()
    if name == "kfac":
        return torch.kron(factors.output, factors.input)
    if name == "ekfac":
        basis = torch.kron(torch.linalg.eigh(factors.output)[1], torch.linalg.eigh(factors.input)[1])
        return basis @ (basis.T @ own @ basis).diagonal().diag() @ basis.T
    return own  # covariance, and auto with so many rows


def _inverse(name: str, statistics: Statistics, rows: Tensor) -> Tensor:
    if name == "identity":
        return torch.eye(LAYOUT.width, dtype=torch.float64)
    return dense_inverse(LAYOUT, lambda block: _dense_curvature(name, statistics, rows, block), DAMPING)


@pytest.fixture(params=[0, KEPT_BYTES], ids=["streamed", "kept"])
def keep_bytes(request: pytest.FixtureRequest) -> int:
    """Whether decoded rows are kept between questions; answers do not depend on it."""
    return int(request.param)


@pytest.fixture
def rows() -> Tensor:
    return _rows(40)


@pytest.fixture
def store(rows: Tensor) -> MemoryStore:
    return MemoryStore(LAYOUT, rows, statistics=_gathered(rows))


@pytest.fixture
def query() -> QueryGradients:
    return QueryGradients(("q0", 7, "q2"), _rows(3), LAYOUT)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_scores_equal_the_dense_reference(
    keep_bytes: int, store: MemoryStore, rows: Tensor, query: QueryGradients, preconditioner: str, mode: str
) -> None:
    result = QueryEngine(store, keep_bytes=keep_bytes).influence(
        query, preconditioner=preconditioner, damping=DAMPING, mode=mode
    )
    expected = dense_scores(query.gradients, rows, _inverse(preconditioner, store.statistics, rows), mode)
    assert result.scores is not None and result.data_id is not None
    torch.testing.assert_close(result.scores, expected, rtol=EXACT, atol=EXACT)
    assert result.query_id == ("q0", 7, "q2")
    assert result.data_id.tolist() == [f"s{i}" for i in range(40)]
    assert result.samples == 40
    assert (result.mode, result.preconditioner, result.damping) == (mode, preconditioner, DAMPING)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_rows_are_scored_in_float32(
    keep_bytes: int, query: QueryGradients, dtype: torch.dtype, mode: str
) -> None:
    stored = _rows(40, dtype)
    store = MemoryStore(LAYOUT, stored, statistics=_gathered(stored.double()))
    result = QueryEngine(store, keep_bytes=keep_bytes).influence(
        query, preconditioner="covariance", damping=DAMPING, mode=mode
    )
    inverse = _inverse("covariance", store.statistics, stored.double())
    expected = dense_scores(query.gradients, stored, inverse, mode)
    assert result.scores is not None and result.scores.dtype == torch.float32
    error = (result.scores.double() - expected).norm() / expected.norm()
    assert error < SINGLE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k", [1, 5, 40])
def test_extremes_are_those_of_all_scores(
    keep_bytes: int, store: MemoryStore, rows: Tensor, query: QueryGradients, k: int, mode: str
) -> None:
    engine = QueryEngine(store, keep_bytes=keep_bytes)
    result = engine.influence(query, k=k, damping=DAMPING, mode=mode)
    expected = dense_scores(query.gradients, rows, _inverse("auto", store.statistics, rows), mode)
    assert result.scores is None and result.top is not None and result.bottom is not None
    for ranking, scores in ((result.top, expected), (result.bottom, -expected)):
        columns = dense_ranking(scores, k)
        assert ranking.ids.tolist() == [[f"s{c}" for c in line] for line in columns]
        torch.testing.assert_close(ranking.scores, expected.gather(1, torch.tensor(columns)), rtol=EXACT, atol=EXACT)
    full = engine.influence(query, damping=DAMPING, mode=mode)
    assert full.proponents(k).ids.tolist() == result.top.ids.tolist()
    assert full.opponents(k).ids.tolist() == result.bottom.ids.tolist()


def test_equal_scores_rank_in_row_order(keep_bytes: int, query: QueryGradients) -> None:
    rows = torch.ones(30, LAYOUT.width, dtype=torch.float64)
    result = QueryEngine(MemoryStore(LAYOUT, rows), keep_bytes=keep_bytes).influence(
        query, k=9, preconditioner="identity"
    )
    assert result.proponents().ids[0].tolist() == [f"s{i}" for i in range(9)]
    assert result.opponents().ids[0].tolist() == [f"s{i}" for i in range(9)]


def test_invalid_rows_take_no_part(keep_bytes: int, rows: Tensor, query: QueryGradients) -> None:
    rows[3], rows[11] = float("nan"), 1e6
    valid = [i not in (3, 11) for i in range(len(rows))]
    good = rows[torch.tensor(valid)]
    store = MemoryStore(LAYOUT, rows, valid=valid, statistics=_gathered(good))
    engine = QueryEngine(store, keep_bytes=keep_bytes)
    for k in (None, 5):
        result = engine.influence(query, k=k, damping=DAMPING, reduce="none")
        ids = result.proponents().ids.ravel().tolist() + result.opponents().ids.ravel().tolist()
        assert "s3" not in ids and "s11" not in ids
        assert result.samples == 38
        assert torch.isfinite(result.proponents().scores).all()
        assert "2 stored rows left out" in result.note
    own = engine.self_influence(damping=DAMPING, reduce="none")
    assert len(own.data_id) == 38 and "s3" not in own.data_id.tolist()


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_visits_are_combined(keep_bytes: int, rows: Tensor, query: QueryGradients, reduce: str, mode: str) -> None:
    ids = [f"s{i % 10}" for i in range(40)]
    store = MemoryStore(LAYOUT, rows, ids, statistics=_gathered(rows))
    result = QueryEngine(store, keep_bytes=keep_bytes).influence(query, damping=DAMPING, reduce=reduce, mode=mode)
    visits = rows.view(4, 10, -1)
    combined = {"mean": visits.mean(0), "sum": visits.sum(0), "last": visits[-1], "none": rows}[reduce]
    # 40 visits are enough for auto to take the covariance (2 k = 12); the 10 samples that they are of are not: EK-FAC.
    expected = dense_scores(query.gradients, combined, _inverse("ekfac", store.statistics, rows), mode)
    assert result.scores is not None and result.data_id is not None
    torch.testing.assert_close(result.scores, expected, rtol=EXACT, atol=EXACT)
    assert result.data_id.tolist() == (ids if reduce == "none" else ids[:10])
    if reduce == "none":
        assert result.step is not None
        assert result.step.tolist() == list(range(0, 400, 10))
    else:
        assert result.step is None


def test_single_visits_are_ranked_with_their_steps(keep_bytes: int, rows: Tensor, query: QueryGradients) -> None:
    store = MemoryStore(LAYOUT, rows, ["same"] * 40, statistics=_gathered(rows))
    top = QueryEngine(store, keep_bytes=keep_bytes).influence(query, k=4, reduce="none").proponents()
    full = QueryEngine(store, keep_bytes=keep_bytes).influence(query, reduce="none").proponents(4)
    assert top.step is not None and full.step is not None
    assert top.step.shape == (3, 4) and top.step.tolist() == full.step.tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("asked", [["s30", "s2", "s17"], [f"s{i}" for i in range(0, 40, 2)]])
def test_only_some_samples(
    keep_bytes: int, store: MemoryStore, query: QueryGradients, asked: list[str], mode: str
) -> None:
    engine = QueryEngine(store, keep_bytes=keep_bytes)
    part = engine.influence(query, data_id=asked, mode=mode)
    whole = engine.influence(query, mode=mode)
    in_order = sorted(asked, key=lambda one: int(one[1:]))
    assert part.scores is not None and whole.scores is not None and part.data_id is not None
    assert part.data_id.tolist() == in_order
    columns = [int(one[1:]) for one in in_order]
    torch.testing.assert_close(part.scores, whole.scores[:, columns], rtol=EXACT, atol=EXACT)


def test_repeating_a_query_repeats_its_scores_and_leaves_it_alone(
    keep_bytes: int, store: MemoryStore, query: QueryGradients
) -> None:
    before = query.gradients.clone()
    engine = QueryEngine(store, keep_bytes=keep_bytes)
    first, second = (engine.influence(query, mode="cosine").scores for _ in range(2))
    assert first is not None and second is not None
    assert torch.equal(first, second)
    assert torch.equal(query.gradients, before)


def test_a_changed_damping_takes_effect_and_the_old_one_comes_back(
    keep_bytes: int, store: MemoryStore, query: QueryGradients
) -> None:
    engine = QueryEngine(store, keep_bytes=keep_bytes)
    for name in ("diagonal", "covariance", "kfac", "ekfac"):
        small, large, again = (
            engine.influence(query, preconditioner=name, damping=damping).scores for damping in (0.1, 1, 0.1)
        )
        fresh = QueryEngine(store, keep_bytes=keep_bytes).influence(query, preconditioner=name, damping=1).scores
        assert small is not None and large is not None and again is not None and fresh is not None
        assert torch.equal(small, again) and torch.equal(large, fresh)
        assert not torch.allclose(small, large, rtol=0.1)


def test_changed_rows_take_effect(keep_bytes: int, rows: Tensor, query: QueryGradients) -> None:
    store = MemoryStore(LAYOUT, rows[:20], statistics=_gathered(rows[:20]))
    engine = QueryEngine(store, keep_bytes=keep_bytes)
    engine.influence(query, mode="cosine")
    store.grow(rows, _gathered(rows))
    grown = engine.influence(query, mode="cosine")
    fresh = QueryEngine(store, keep_bytes=keep_bytes).influence(query, mode="cosine")
    assert grown.scores is not None and fresh.scores is not None
    assert grown.scores.shape == (3, 40) and torch.equal(grown.scores, fresh.scores)


def test_statistics_that_come_after_their_rows_take_effect(
    keep_bytes: int, store: MemoryStore, query: QueryGradients
) -> None:
    engine = QueryEngine(store, keep_bytes=keep_bytes)
    before = engine.influence(query, preconditioner="kfac", mode="cosine").scores
    store.statistics = _gathered(store.rows)  # factors of other activations
    found, fresh = (
        one.influence(query, preconditioner="kfac", mode="cosine").scores
        for one in (engine, QueryEngine(store, keep_bytes=keep_bytes))
    )
    assert before is not None and found is not None and fresh is not None
    assert torch.equal(found, fresh) and not torch.allclose(found, before, rtol=1e-3)


def test_self_influence_equals_the_dense_reference(keep_bytes: int, store: MemoryStore, rows: Tensor) -> None:
    own = QueryEngine(store, keep_bytes=keep_bytes).self_influence(preconditioner="kfac", damping=DAMPING)
    inverse = _inverse("kfac", store.statistics, rows)
    torch.testing.assert_close(own.scores, (rows @ inverse * rows).sum(1), rtol=EXACT, atol=EXACT)
    best = own.highest(3)
    assert best.ids[0, 0] == own.data_id[own.scores.argmax()]


def test_self_influence_of_sums_and_of_some(keep_bytes: int, rows: Tensor) -> None:
    store = MemoryStore(LAYOUT, rows, [f"s{i % 10}" for i in range(40)], statistics=_gathered(rows))
    engine = QueryEngine(store, keep_bytes=keep_bytes)
    inverse = _inverse("covariance", store.statistics, rows)
    summed = rows.view(4, 10, -1).sum(0)
    expected = (summed @ inverse * summed).sum(1)
    own = engine.self_influence(preconditioner="covariance", damping=DAMPING, reduce="sum")
    torch.testing.assert_close(own.scores, expected, rtol=EXACT, atol=EXACT)
    some = engine.self_influence(preconditioner="covariance", damping=DAMPING, reduce="sum", data_id=["s4", "s9"])
    torch.testing.assert_close(some.scores, expected[[4, 9]], rtol=EXACT, atol=EXACT)


def test_self_influence_of_queries(keep_bytes: int, store: MemoryStore, rows: Tensor, query: QueryGradients) -> None:
    own = QueryEngine(store, keep_bytes=keep_bytes).self_influence(query, damping=DAMPING)
    inverse = _inverse("auto", store.statistics, rows)
    expected = (query.gradients @ inverse * query.gradients).sum(1)
    torch.testing.assert_close(own.scores, expected, rtol=EXACT, atol=EXACT)
    assert own.data_id.tolist() == ["q0", 7, "q2"]


def test_self_influence_is_computed_once(store: MemoryStore, query: QueryGradients) -> None:
    engine = QueryEngine(store, keep_bytes=0)
    engine.influence(query, mode="cosine")
    view = store.view("mean")
    scans = view.scans
    engine.influence(query, mode="relatif")
    assert view.scans == scans + 1  # the scores alone


def test_a_sample_without_gradient_has_cosine_zero(keep_bytes: int, rows: Tensor, query: QueryGradients) -> None:
    rows[4] = 0
    engine = QueryEngine(MemoryStore(LAYOUT, rows, statistics=_gathered(rows)), keep_bytes=keep_bytes)
    for mode in ("cosine", "relatif"):
        scores = engine.influence(query, mode=mode).scores
        assert scores is not None
        assert torch.isfinite(scores).all() and not scores[:, 4].any()


def test_an_unused_module_takes_no_part(keep_bytes: int, rows: Tensor, query: QueryGradients) -> None:
    unused: Layout = LAYOUT
    rows[:, unused["layer.1"].columns] = 0
    statistics = StatisticsAccumulator(LAYOUT, ["covariance"])
    statistics.update(rows)
    store = MemoryStore(LAYOUT, rows, statistics=statistics.snapshot())
    for mode in MODES:
        scores = QueryEngine(store, keep_bytes=keep_bytes).influence(query, mode=mode).scores
        assert scores is not None and torch.isfinite(scores).all()


def test_a_small_store_is_read_once(store: MemoryStore, query: QueryGradients) -> None:
    engine = QueryEngine(store)
    first = engine.influence(query, k=3)
    scans = store.view("mean").scans
    assert engine.influence(query, k=3).proponents().ids.tolist() == first.proponents().ids.tolist()
    engine.self_influence()
    assert store.view("mean").scans == scans


def test_a_progress_bar_on_request(
    store: MemoryStore, query: QueryGradients, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = QueryEngine(store, keep_bytes=0)
    engine.influence(query)
    assert capsys.readouterr().err == ""
    engine.influence(query, progress=True)
    assert "influence" in capsys.readouterr().err


def test_the_note_says_what_was_computed(keep_bytes: int, store: MemoryStore, query: QueryGradients) -> None:
    note = QueryEngine(store, keep_bytes=keep_bytes).influence(query, damping=DAMPING).note
    assert note == (
        "40 samples, each the mean of its visits; dot score; preconditioner covariance (3 modules), "
        "damping 0.2, empirical Fisher over 40 rows; exact engine"
    )
