"""The index finds what the exact engine finds."""

from __future__ import annotations

import builtins
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from logix_like.errors import MissingDependencyError
from logix_like.query import codes, indexing
from logix_like.query.engine import QueryEngine
from logix_like.query.gradients import QueryGradients
from logix_like.query.index import RowIndex, _plain_codes, load_faiss
from logix_like.query.indexing import IndexSearch, Measured
from logix_like.query.modes import MODES
from logix_like.query.products import row_products
from logix_like.query.question import REDUCTIONS
from logix_like.query.result import InfluenceResult
from logix_like.query.scan import Candidates
from logix_like.query.scoring import Task, extremes_among
from logix_like.query.sieve import Scorer
from tests.query.memory_store import MemoryStore
from tests.reference import blocks_layout

pytest.importorskip("faiss", reason="needs the faiss extra")

LAYOUT = blocks_layout((4, 3), (3, 2), (4, 3))

SINGLE = 1e-5
"""Both sides score in float32; products may be summed in another order."""


@pytest.fixture(autouse=True)
def however_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is asked, though every row would be scored sooner."""
    monkeypatch.setattr(indexing, "SHARE_OF_EACH", float("inf"))
    monkeypatch.setattr(indexing, "SHARE_OF_ALL", float("inf"))


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(200, LAYOUT.width) * torch.linspace(0.2, 3, LAYOUT.width)


@pytest.fixture
def query() -> QueryGradients:
    return QueryGradients(("q0", "q1", "q2"), torch.randn(3, LAYOUT.width), LAYOUT)


def _both(engine: QueryEngine, query: QueryGradients, **options: Any) -> tuple[InfluenceResult, InfluenceResult]:
    return engine.influence(query, **options), engine.influence(query, engine="faiss", **options)


def _assert_same(exact: InfluenceResult, indexed: InfluenceResult) -> None:
    assert indexed.engine == "faiss"
    for one, other in ((exact.proponents(), indexed.proponents()), (exact.opponents(), indexed.opponents())):
        assert one.ids.tolist() == other.ids.tolist()
        torch.testing.assert_close(one.scores, other.scores, rtol=SINGLE, atol=SINGLE * one.scores.abs().max().item())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("preconditioner", ["identity", "covariance"])
def test_ids_order_and_scores_are_those_of_the_exact_engine(
    rows: Tensor, query: QueryGradients, preconditioner: str, mode: str
) -> None:
    engine = QueryEngine(MemoryStore(LAYOUT, rows), keep_bytes=0)
    _assert_same(*_both(engine, query, k=10, preconditioner=preconditioner, mode=mode))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_visits_are_combined(rows: Tensor, query: QueryGradients, reduce: str, mode: str) -> None:
    ids = [f"s{i % 60}" for i in range(200)]  # some with four visits and some with three
    engine = QueryEngine(MemoryStore(LAYOUT, rows, ids), keep_bytes=0)
    exact, indexed = _both(engine, query, k=7, reduce=reduce, mode=mode)
    _assert_same(exact, indexed)
    if reduce == "none":
        assert indexed.top is not None and exact.top is not None
        assert indexed.top.step is not None and exact.top.step is not None
        assert indexed.top.step.tolist() == exact.top.step.tolist()


def test_invalid_rows_and_other_samples_are_left_out(rows: Tensor, query: QueryGradients) -> None:
    rows[::5] = float("nan")
    valid = [i % 5 != 0 for i in range(200)]
    engine = QueryEngine(MemoryStore(LAYOUT, rows, valid=valid), keep_bytes=0)
    _assert_same(*_both(engine, query, k=20, reduce="none"))
    some = [f"s{i}" for i in range(1, 200, 5)]
    exact, indexed = _both(engine, query, k=40, reduce="none", data_id=some)
    _assert_same(exact, indexed)
    assert set(indexed.proponents().ids.ravel()) == set(some)


def test_equal_rows_rank_in_row_order() -> None:
    # Small whole numbers: float32 sums of them are exact in any order, so equal rows have equal scores.
    query = QueryGradients(("q",), torch.arange(LAYOUT.width).float()[None], LAYOUT)
    engine = QueryEngine(MemoryStore(LAYOUT, torch.ones(30, LAYOUT.width)), keep_bytes=0)
    _assert_same(*_both(engine, query, k=5, preconditioner="identity"))


def test_the_index_is_kept_until_something_changes(
    rows: Tensor, query: QueryGradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore(LAYOUT, rows)
    engine = QueryEngine(store, keep_bytes=0)
    engine.influence(query, k=5, engine="faiss")
    with monkeypatch.context() as patch:
        patch.delattr(RowIndex, "build")
        engine.influence(query, k=5, engine="faiss")
    for change in ({"damping": 1.0}, {"mode": "relatif", "damping": 1.0}, {"reduce": "sum"}):
        _assert_same(*_both(engine, query, k=5, **change))
    store.grow(rows.flip(0), store.statistics)
    _assert_same(*_both(engine, query, k=5))


def test_float64_rows_are_scored_in_float64(rows: Tensor, query: QueryGradients) -> None:
    engine = QueryEngine(MemoryStore(LAYOUT, rows.double()), keep_bytes=0)
    exact, indexed = _both(engine, query, k=5)
    assert indexed.proponents().scores.dtype == torch.float64
    _assert_same(exact, indexed)


def test_a_missing_faiss_says_what_to_install(
    rows: Tensor, query: QueryGradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_faiss(name: str, *args: Any, **kwargs: Any) -> ModuleType:
        if name == "faiss":
            raise ImportError("No module named 'faiss'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    with pytest.raises(MissingDependencyError, match=r"pip install 'logix_like\[faiss\]'"):
        QueryEngine(MemoryStore(LAYOUT, rows), keep_bytes=0).influence(query, k=5, engine="faiss")


def test_a_recall_is_measured_anew_for_another_curvature(
    rows: Tensor, query: QueryGradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def measure(search: IndexSearch, task: Task, k: int, index: RowIndex) -> Measured:
        measured.append(k)
        return Measured(200, f"recall@{k} {len(measured) / 10:.3f}")

    monkeypatch.setattr(IndexSearch, "_measured", measure)
    engine, notes = QueryEngine(MemoryStore(LAYOUT, rows), keep_bytes=0), []
    for name, damping in (("identity", 0.1), ("covariance", 0.1), ("covariance", 1e-3), ("covariance", 0.1)):
        notes.append(engine.influence(query, k=3, engine="faiss", preconditioner=name, damping=damping).note)
    assert measured == [3, 3, 3]
    for note, recall in zip(notes, ("0.100", "0.200", "0.300", "0.200"), strict=True):
        assert f"recall@3 {recall}" in note


@pytest.mark.parametrize("some", [False, True])
def test_a_product_with_the_codes_names_what_faiss_names(some: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "PIECE_ROWS", 7)
    monkeypatch.setattr(codes, "TILE_SCORES", 100)
    faiss = load_faiss()
    index = faiss.index_factory(24, "SQ8", faiss.METRIC_INNER_PRODUCT)
    rows = torch.randn(300, 24).numpy() * 3 + 1
    index.train(rows)
    index.add(rows)
    asked = torch.randn(4, 24)
    inside = torch.rand(300) < 0.5 if some else None
    parameters = (
        None
        if inside is None
        else faiss.SearchParameters(sel=faiss.IDSelectorBatch(inside.nonzero().flatten().numpy()))
    )
    found = _plain_codes(index)
    assert found is not None
    for sign, numbers in zip((1, -1), found.extremes(asked, 20, inside), strict=True):
        _, expected = index.search((sign * asked).numpy(), 20, params=parameters)
        assert numbers.tolist() == expected.tolist()


def test_only_plain_codes_are_multiplied() -> None:
    faiss = load_faiss()
    for factory in ("Flat", "SQ4", "SQ6", "SQfp16", "HNSW4", "IVF2,SQ8"):
        assert _plain_codes(faiss.index_factory(8, factory, faiss.METRIC_INNER_PRODUCT)) is None


def test_queries_are_ranked_among_rows_of_their_own(rows: Tensor) -> None:
    store = MemoryStore(LAYOUT, rows)
    candidates = Candidates.valid(store.view("none"))
    queries = torch.randn(3, LAYOUT.width)
    scorer = Scorer(MODES["dot"], queries, torch.empty(0), torch.empty(0), None)
    named = torch.stack([torch.randperm(200)[:12] for _ in range(3)])
    named[1, 4:6] = named[1, 0]  # named twice
    named[2, 7] = -1  # no row
    found = extremes_among(Task(candidates, scorer, None), named, 5)
    for side, sign in zip(found, (1, -1), strict=True):
        for query, (scores, positions) in enumerate(zip(side.scores, side.positions, strict=True)):
            own = named[query][named[query] >= 0].unique()
            products = row_products(rows[own], queries[query].double())
            best = (sign * products).argsort(descending=True)[:5]
            assert positions.tolist() == own[best].tolist()
            assert scores.equal(products[best])
