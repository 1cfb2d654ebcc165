"""The exact scan of large stores: whatever arithmetic it multiplies in, the answer is that of float64 products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from logix_like.query import products, scoring, sieve
from logix_like.query.engine import QueryEngine
from logix_like.query.gradients import QueryGradients
from logix_like.query.products import row_products, summation_error
from logix_like.query.result import InfluenceResult
from tests.query.memory_store import MemoryStore
from tests.reference import blocks_layout, dense_ranking, dense_scores

LAYOUT = blocks_layout((8, 8), (6, 12), (8, 8))
IDENTITY = torch.eye(LAYOUT.width, dtype=torch.float64)

SINGLE = 2e-7
"""Scores are float64 products rounded to float32 once."""


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 128 rows."""
    monkeypatch.setattr(scoring, "SIEVED_ROWS", 128)


@pytest.fixture(params=["narrow", "wide"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force one of the two ways of multiplying, where the rows allow both."""
    narrow = request.param == "narrow"
    monkeypatch.setattr(products.Products, "_prefers_narrow", lambda self, tile, raw: narrow)
    return str(request.param)


@pytest.fixture(params=["once", "twice"])
def looked_at(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Look at what passes the sieve never again, or always, by products of matrices."""
    monkeypatch.setattr(sieve, "OPEN", 2**40 if request.param == "once" else 0)
    return str(request.param)


def _rows(count: int, scale: float = 1.0) -> Tensor:
    """Gradients of very different lengths that share a few directions."""
    shared = torch.randn(count, 4) @ torch.randn(4, LAYOUT.width)
    lengths = torch.logspace(-2, 1, count)[torch.randperm(count), None]
    return (scale * lengths * (torch.randn(count, LAYOUT.width) + shared)).bfloat16()


def _ask(rows: Tensor, queries: Tensor, k: int, mode: str = "dot", **options: object) -> InfluenceResult:
    store = MemoryStore(LAYOUT, rows, range(len(rows)), chunk_rows=37)
    query = QueryGradients(tuple(range(len(queries))), queries, LAYOUT)
    engine = QueryEngine(store, keep_bytes=0)
    return engine.influence(query, k=k, mode=mode, preconditioner="identity", **options)


def _assert_is_the_reference(result: InfluenceResult, expected: Tensor, k: int) -> None:
    for ranking, scores in ((result.proponents(), expected), (result.opponents(), -expected)):
        columns = dense_ranking(scores, k)
        assert ranking.ids.tolist() == columns
        assert ranking.scores.dtype == torch.float32
        own = expected.gather(1, torch.tensor(columns))
        torch.testing.assert_close(ranking.scores.double(), own, rtol=SINGLE, atol=0)


@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("mode", ["dot", "cosine", "relatif"])
@pytest.mark.parametrize("queries", [1, 5])
def test_ids_order_and_scores_are_those_of_float64(
    arithmetic: str, looked_at: str, queries: int, mode: str, k: int
) -> None:
    rows, asked = _rows(700), torch.randn(queries, LAYOUT.width)
    lengths = rows.double().square().sum(1), asked.double().square().sum(1)
    expected = asked.double() @ rows.double().T
    if mode != "dot":
        expected = expected / lengths[0].sqrt()
    if mode == "cosine":
        expected = expected / lengths[1].sqrt()[:, None]
    _assert_is_the_reference(_ask(rows, asked, k, mode), expected, k)


def test_distances_of_close_rows(arithmetic: str) -> None:
    rows = _rows(300)
    asked = rows[:3].float() + 1e-3
    expected = dense_scores(asked, rows, IDENTITY, "l2")
    result = _ask(rows, asked, 5, "l2")
    assert [line[0] for line in result.proponents().ids.tolist()] == [0, 1, 2]
    assert result.opponents().ids.tolist() == dense_ranking(-expected, 5)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12])
def test_gradients_of_any_size(arithmetic: str, scale: float) -> None:
    rows, asked = _rows(300, scale), torch.randn(2, LAYOUT.width)
    _assert_is_the_reference(_ask(rows, asked, 5), asked.double() @ rows.double().T, 5)


@pytest.mark.parametrize("k", [5, 200])
@pytest.mark.parametrize("mode", ["cosine", "relatif"])
@pytest.mark.parametrize("scale", [1e-19, 1e-21, 1e-30])
@pytest.mark.parametrize("asked_scale", [1.0, 1e-21])
def test_rows_whose_squares_underflow_are_compared_all_the_same(
    arithmetic: str, asked_scale: float, scale: float, mode: str, k: int
) -> None:
    """So small are the gradients of samples that are fitted to the last bit."""
    rows, asked = _rows(300), asked_scale * torch.randn(2, LAYOUT.width)
    rows[::2] *= scale
    expected = asked.double() @ rows.double().T / rows.double().norm(dim=1)
    if mode == "cosine":
        expected = expected / asked.double().norm(dim=1)[:, None]
    _assert_is_the_reference(_ask(rows, asked, k, mode), expected, k)


def test_equal_rows_rank_in_row_order(arithmetic: str, looked_at: str) -> None:
    rows = _rows(3)[torch.randint(3, (600,))]
    asked = torch.randn(2, LAYOUT.width)
    _assert_is_the_reference(_ask(rows, asked, 8), asked.double() @ rows.double().T, 8)


def test_scores_that_bfloat16_cannot_tell_apart(arithmetic: str) -> None:
    """All scores lie within a thousandth of one another, less than the products' own rounding."""
    rows = (torch.ones(600, LAYOUT.width) + 1e-2 * torch.randn(600, LAYOUT.width)).bfloat16()
    asked = torch.ones(1, LAYOUT.width) + 1e-3 * torch.randn(1, LAYOUT.width)
    expected = asked.double() @ rows.double().T
    assert (expected.max() / expected.min()).item() < 1.01
    _assert_is_the_reference(_ask(rows, asked, 7), expected, 7)


def test_one_giant_row_hides_no_other(arithmetic: str) -> None:
    rows = _rows(600)
    rows[301] *= 1e6
    asked = torch.randn(2, LAYOUT.width)
    _assert_is_the_reference(_ask(rows, asked, 6), asked.double() @ rows.double().T, 6)


@pytest.mark.parametrize("k", [16, 17, 300])
def test_a_large_k(arithmetic: str, k: int) -> None:
    rows, asked = _rows(300), torch.randn(2, LAYOUT.width)
    expected = asked.double() @ rows.double().T
    _assert_is_the_reference(_ask(rows, asked, k), expected, k)


def test_rows_that_are_kept_in_memory_rank_by_float64_too(arithmetic: str) -> None:
    rows, asked = _rows(300).float(), torch.randn(2, LAYOUT.width)
    rows[100:200] = rows[100] * (1 + 2.0**-20 * torch.randn(100, 1))  # float32 products hardly tell them apart
    store = MemoryStore(LAYOUT, rows, range(300))
    engine, query = QueryEngine(store), QueryGradients((0, 1), asked, LAYOUT)
    for k in (5, 200):
        result = engine.influence(query, k=k, preconditioner="identity")
        _assert_is_the_reference(result, asked.double() @ rows.double().T, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [3, 20, 300])
def test_many_equal_rows_rank_in_row_order(arithmetic: str, dtype: torch.dtype, k: int) -> None:
    rows, asked = torch.randn(7, LAYOUT.width).to(dtype)[torch.arange(331) % 7], torch.randn(9, LAYOUT.width)
    result = _ask(rows, asked, k)
    for line, scores in zip(result.proponents().ids.tolist(), asked.double() @ rows.double()[:7].T, strict=True):
        order = scores.argsort(descending=True).tolist()
        assert line == [row for kind in order for row in range(kind, 331, 7)][:k]


@pytest.mark.parametrize("width", [1, 5, 145, 1000, 40_000])
def test_equal_rows_have_equal_products_wherever_they_stand(width: int) -> None:
    row, query = torch.randn(width), torch.randn(width, dtype=torch.float64)
    alone = row_products(row[None], query)
    torch.testing.assert_close(alone, (row.double() @ query)[None], rtol=1e-9, atol=1e-9)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for count in (1, 2, 3, 17, 64):
                rows = torch.randn(count, width)
                rows[count // 2 :] = row
                assert (row_products(rows, query)[count // 2 :] == alone).all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_order_of_summation_errs_by_more_than_is_said(dtype: torch.dtype) -> None:
    # The worst order for the worst numbers: one by one, each sum rounded down by half a unit.
    terms = torch.ones(4000, dtype=dtype)
    terms[1:] *= torch.finfo(dtype).eps / 2
    total = torch.zeros((), dtype=dtype)
    for term in terms:
        total = total + term
    exact = 1 + 3999 * torch.finfo(dtype).eps / 2
    error = summation_error(4000, dtype) * exact
    assert 0.9 * error < exact - total.item() <= error


def test_summed_visits(arithmetic: str) -> None:
    rows = _rows(400)
    store = MemoryStore(LAYOUT, rows, [i % 150 for i in range(400)], chunk_rows=37)
    asked = torch.randn(2, LAYOUT.width)
    query = QueryGradients((0, 1), asked, LAYOUT)
    result = QueryEngine(store, keep_bytes=0).influence(query, k=5, reduce="sum", preconditioner="identity")
    view = store.view("sum")
    expected = asked.double() @ (view.rows.double() * torch.from_numpy(view.factor)[:, None]).T
    _assert_is_the_reference(result, expected, 5)


def test_only_wanted_rows(arithmetic: str) -> None:
    rows, asked = _rows(500), torch.randn(2, LAYOUT.width)
    chosen = sorted(np.random.default_rng(0).choice(500, 200, replace=False).tolist())
    result = _ask(rows, asked, 5, data_id=chosen)
    expected = asked.double() @ rows[chosen].double().T
    assert result.proponents().ids.tolist() == [[chosen[c] for c in line] for line in dense_ranking(expected, 5)]


def test_an_arithmetic_that_breaks_its_bounds_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = torch.mm

    def careless(a: Tensor, b: Tensor, **out: Tensor) -> Tensor:
        product = multiply(a, b, **out)
        return product * 0.5 if a.dtype == torch.bfloat16 else product

    monkeypatch.setattr(torch, "mm", careless)
    monkeypatch.setattr(products, "_seconds", lambda act: 0.0 if "raw" in act.__code__.co_freevars else 1.0)
    rows, asked = _rows(400), torch.randn(2, LAYOUT.width)
    _assert_is_the_reference(_ask(rows, asked, 5), asked.double() @ rows.double().T, 5)


def test_which_arithmetic_is_faster_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def count(act: object) -> float:
        calls.append(act)
        return 1.0

    monkeypatch.setattr(products, "_seconds", count)
    store = MemoryStore(LAYOUT, _rows(400), chunk_rows=37)
    engine = QueryEngine(store, keep_bytes=0)
    for number in (3, 2, 3, 2):
        asked = QueryGradients(tuple(range(number)), torch.randn(number, LAYOUT.width), LAYOUT)
        engine.influence(asked, k=3, preconditioner="identity")
    assert len(calls) == 2  # 2 and 3 queries are alike
