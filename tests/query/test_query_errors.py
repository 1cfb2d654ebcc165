"""What makes no sense is refused, with what was found, what was expected and what to do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from logix_like.capture.batch import FactorMoments
from logix_like.errors import EmptyStoreError, ModelMismatchError, QueryError, StatisticsError
from logix_like.query.engine import QueryEngine
from logix_like.query.gradients import QueryGradients
from logix_like.query.question import ENGINES, REDUCTIONS
from logix_like.statistics import StatisticsAccumulator
from logix_like.store.reading.view import REDUCTIONS as STORE_REDUCTIONS
from tests.query.memory_store import MemoryStore
from tests.reference import blocks_layout

LAYOUT = blocks_layout((2, 3), (3, 2))


@pytest.fixture
def engine() -> QueryEngine:
    return QueryEngine(MemoryStore(LAYOUT, torch.randn(10, LAYOUT.width)))


@pytest.fixture
def query() -> QueryGradients:
    return QueryGradients(("q0", "q1"), torch.randn(2, LAYOUT.width), LAYOUT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "cosin"}, "unknown mode 'cosin'; known: dot, cosine, relatif, l2"),
        ({"reduce": "max"}, "unknown reduce 'max'; known: mean, sum, last, none"),
        ({"engine": "annoy", "k": 1}, "unknown engine 'annoy'; known: exact, faiss, dask"),
        ({"preconditioner": "adam"}, "unknown preconditioner 'adam'; known: identity"),
        ({"damping": -1.0}, "damping is -1.0; it must be a number of at least 0"),
        ({"damping": "a"}, "damping is 'a'; it must be a number"),
        ({"damping": True}, "damping is True; it must be a number"),
        ({"damping": None}, "damping is None; it must be a number"),
        ({"damping": float("nan")}, "damping is nan; it must be a number"),
        ({"preconditioner": ["ekfac"]}, r"unknown preconditioner \['ekfac'\]; known"),
        ({"mode": ["dot"]}, r"unknown mode \['dot'\]; known"),
        ({"k": 0}, "k is 0; it must be at least 1"),
        ({"k": 2.5}, "k is 2.5; it must be a whole number, or None"),
        ({"k": True}, "k is True; it must be a whole number"),
        ({"k": "3"}, "k is '3'; it must be a whole number"),
        ({"data_id": 1.5}, r"data_id or where is 1.5; it must be a list of the ids"),
        ({"k": 11}, "k is 11, but there are only 10 samples to rank; ask for fewer"),
        ({"engine": "faiss"}, "finds the first k only: give k="),
        ({"data_id": ["s1", "s10"]}, r"no sample with the id 's10' \(str\) can be ranked; the store has 10 ids"),
        ({"data_id": [1]}, r"no sample with the id 1 \(int\)"),
        ({"data_id": [["s1"]]}, r"no sample with the id \['s1'\] \(list\)"),
        ({"data_id": ["s1", "s3"], "where": ["s4", "s3"]}, r"'s1' \(str\) can be ranked; the filter leaves 2 ids"),
        ({"data_id": []}, "data_id names no sample"),
        ({"data_id": "s1", "k": 11}, "k is 11, but there are only 10 samples to rank"),
    ],
)
def test_options_that_make_no_sense(
    engine: QueryEngine, query: QueryGradients, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(QueryError, match=message):
        engine.influence(query, **options)


def test_one_id_alone_is_one_sample_and_not_its_letters(engine: QueryEngine, query: QueryGradients) -> None:
    assert engine.influence(query, data_id="s1").samples == 1


@pytest.mark.parametrize("filters", [{"where": ["s1", "s4"]}, {"data_id": ["s4", "s1"]}])
def test_a_filter_that_leaves_fewer_than_k_gives_all_of_them_and_says_so(
    engine: QueryEngine, query: QueryGradients, filters: dict[str, Any]
) -> None:
    result = engine.influence(query, k=10, **filters)
    assert result.held == result.samples == 2
    assert {*result.proponents().ids[0]} == {*result.opponents().ids[0]} == {"s1", "s4"}
    assert result.note.startswith(
        "2 samples, each the mean of its visits; all that the filter leaves, fewer than k=10; dot"
    )
    assert "fewer" not in engine.influence(query, k=2, **filters).note


def test_no_query(engine: QueryEngine) -> None:
    with pytest.raises(QueryError, match="there is no query"):
        engine.influence(QueryGradients((), torch.empty(0, LAYOUT.width), LAYOUT))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_query_that_is_not_finite_is_named(engine: QueryEngine, query: QueryGradients, bad: float) -> None:
    query.gradients[1, 3] = bad
    for ask in (engine.influence, engine.self_influence):
        with pytest.raises(QueryError, match=r"gradient of query 'q1' \(1 of 2 queries\) holds NaN or infinite"):
            ask(query)


def test_a_query_that_overflows_against_tiny_rows_is_named() -> None:
    engine = QueryEngine(MemoryStore(LAYOUT, 1e-21 * torch.randn(40, LAYOUT.width)))
    ones = torch.ones(1, LAYOUT.width, dtype=torch.float64)
    query = QueryGradients(("small", "large"), torch.cat([1e-20 * ones, ones]).float(), LAYOUT)
    wide = QueryGradients(("small", "large"), torch.cat([ones, 1e39 * ones]), LAYOUT)
    told = r"preconditioned gradient of query 'large' \(1 of 2 queries\) holds .*; the query is too large for that"
    for ask in (engine.influence, engine.self_influence, engine.preconditioned):
        with pytest.raises(QueryError, match=told):
            ask(query, preconditioner="diagonal")
    for ask in (engine.influence, engine.self_influence):
        with pytest.raises(QueryError, match=told):
            ask(wide, preconditioner="identity")


def test_large_gradients_are_not_taken_for_infinite(engine: QueryEngine) -> None:
    huge = torch.full((1, LAYOUT.width), 3e37)  # their sum overflows
    assert engine.influence(QueryGradients(("q",), huge, LAYOUT), preconditioner="identity", mode="dot").samples == 10


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("mode", ["dot", "l2"])
def test_scores_that_overflow_are_no_answer(k: int | None, mode: str) -> None:
    rows, huge = torch.full((40, LAYOUT.width), 1e20), torch.full((1, LAYOUT.width), -1e20)
    engine = QueryEngine(MemoryStore(LAYOUT, rows))
    with pytest.raises(QueryError, match=r"some scores are too large for torch\.float32: divide the queries' loss"):
        engine.influence(QueryGradients(("q",), huge, LAYOUT), k=k, preconditioner="identity", mode=mode)


def test_queries_and_ids_must_fit() -> None:
    with pytest.raises(QueryError, match=r"shape \(2, 5\); 1 ids and rows of 12 numbers need \(1, 12\)"):
        QueryGradients(("q",), torch.zeros(2, 5), LAYOUT)
    with pytest.raises(QueryError, match=r"query gradients are a ndarray; they must be a tensor \[queries, 12\]"):
        QueryGradients(("q",), np.zeros((1, LAYOUT.width)), LAYOUT)


def test_another_model_is_refused(engine: QueryEngine) -> None:
    other = blocks_layout((2, 3), (2, 3))
    query = QueryGradients(("q",), torch.ones(1, other.width), other)
    for ask in (engine.influence, engine.self_influence):
        with pytest.raises(ModelMismatchError, match=r"'layer\.1'.*shape is \(2, 3\), logged was \(3, 2\)"):
            ask(query)


def test_empty_stores(query: QueryGradients) -> None:
    empty = MemoryStore(LAYOUT, torch.empty(0, LAYOUT.width))
    for ask in (QueryEngine(empty).influence, QueryEngine(empty).self_influence):
        with pytest.raises(EmptyStoreError, match="the store holds no rows: log some samples"):
            ask(query)
    with pytest.raises(EmptyStoreError, match="no rows"):
        QueryEngine(empty).preconditioner()
    invalid = MemoryStore(LAYOUT, torch.ones(2, LAYOUT.width), valid=[False, False])
    with pytest.raises(EmptyStoreError, match="2 rows and none that can be ranked"):
        QueryEngine(invalid).influence(query, reduce="none")


def test_names_agree_with_the_store() -> None:
    assert tuple(REDUCTIONS) == STORE_REDUCTIONS
    assert ENGINES == ("exact", "faiss", "dask")


@pytest.mark.parametrize("query", [None, torch.ones(1, LAYOUT.width), "q0"])
def test_what_is_no_query_is_refused(engine: QueryEngine, query: Any) -> None:
    with pytest.raises(QueryError, match=f"the query is a {type(query).__name__}; it must be QueryGradients"):
        engine.influence(query)


def test_a_k_from_numpy_is_a_number(engine: QueryEngine, query: QueryGradients) -> None:
    result = engine.influence(query, k=np.int64(3))
    assert result.proponents().k == 3
    for wrong in (1.5, True):
        with pytest.raises(QueryError, match=f"k is {wrong!r}; this result was asked for with k=3"):
            result.proponents(wrong)


def test_queries_of_other_projections_are_refused(query: QueryGradients) -> None:
    store = MemoryStore(LAYOUT, torch.randn(10, LAYOUT.width))
    told = replace(query, projections="a" * 32)
    assert QueryEngine(store).influence(told).samples == 10  # the store's are not known
    store.projections_digest = "b" * 32
    assert QueryEngine(store).influence(query).samples == 10  # the query's are not
    for ask in (QueryEngine(store).influence, QueryEngine(store).self_influence):
        with pytest.raises(ModelMismatchError, match="another seed or another basis"):
            ask(told)
    store.projections_digest = told.projections
    assert QueryEngine(store).influence(told).samples == 10


@pytest.mark.parametrize("preconditioner", ["auto", "covariance", "diagonal", "kfac", "ekfac"])
def test_sums_that_overflowed_name_the_module(query: QueryGradients, preconditioner: str) -> None:
    rows = torch.randn(40, LAYOUT.width)
    rows[3] *= 1e22
    accumulator = StatisticsAccumulator(LAYOUT, ["kronecker"])
    inputs = {b.name: torch.full((b.rank[1],) * 2, torch.inf) for b in LAYOUT}
    outputs = {b.name: torch.eye(b.rank[0]) for b in LAYOUT}
    accumulator.add_moments(FactorMoments(inputs, outputs, dict.fromkeys(inputs, 40), 40))
    statistics = accumulator.snapshot()
    engine = QueryEngine(MemoryStore(LAYOUT, rows, statistics=statistics))
    with pytest.raises(StatisticsError, match=r"module 'layer.0' hold numbers that are not finite"):
        engine.influence(query, preconditioner=preconditioner)
    scores = engine.influence(query, preconditioner="identity").scores
    assert scores is not None and scores.isfinite().all()
