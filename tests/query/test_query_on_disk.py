"""Queries to real stores on disk, written by the background writer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from logix_like.capture.batch import ProjectedBatch
from logix_like.errors import EmptyStoreError, ModelMismatchError, StatisticsError
from logix_like.layout import Layout
from logix_like.query.engine import QueryEngine
from logix_like.query.gradients import QueryGradients
from logix_like.query.modes import MODES
from logix_like.query.question import REDUCTIONS
from logix_like.statistics import StatisticsAccumulator
from logix_like.store import GradientStore, StoreWriter, create_store, describe, open_store, projections_digest
from tests.reference import blocks_layout, dense_inverse, dense_ranking, dense_scores, second_moment_matrix

LAYOUT = blocks_layout((4, 3), (3, 4), (4, 3))
DAMPING = 0.1
TOLERANCE = {"bfloat16": 2e-4, "float32": 2e-4, "float16": 2e-4, "float64": 1e-10, "int8": 2e-2}
"""Float32 products (float64 for such stores) against float64 on the rows as they are stored."""


def _write(folder: Path, rows: Tensor, ids: list[str | int], encoding: str, layout: Layout = LAYOUT) -> GradientStore:
    """Write ``rows`` in batches of 10 with small chunks, so that a scan crosses several."""
    create_store(folder, {})
    describe(folder, layout, encoding, {block.name: (None, None) for block in layout})
    chunk_mib = 16 * layout.width * 4 / 2**20
    statistics = StatisticsAccumulator(layout, ["covariance"])
    with StoreWriter(folder, layout, encoding, chunk_mib=chunk_mib, statistics=statistics) as writer:
        for start in range(0, len(rows), 10):
            batch = slice(start, start + 10)
            writer.put(ProjectedBatch(tuple(ids[batch]), rows[batch], step=start // 10, epoch=start // 50))
    return open_store(folder)


@pytest.fixture
def query() -> QueryGradients:
    return QueryGradients(("q0", "q1"), torch.randn(2, LAYOUT.width), LAYOUT)


def _combined(store: GradientStore, reduce: str) -> Tensor:
    """One row for each of 50 samples of two visits each, from the stored rows."""
    visits = store.gradients[:].double().view(2, 50, -1)
    if reduce == "mean":
        # The view is stored as the rows are; what is ranked is what is stored.
        return store.view("mean").gradients[:].double()
    return {"sum": 2 * store.view("mean").gradients[:].double(), "last": visits[1], "none": visits.flatten(0, 1)}[
        reduce
    ]


@pytest.mark.parametrize("encoding", TOLERANCE)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_scores_equal_the_dense_reference(tmp_path: Path, query: QueryGradients, encoding: str, reduce: str) -> None:
    ids: list[str | int] = [i if i % 2 else str(i) for i in range(50)] * 2
    rows = torch.randn(100, LAYOUT.width, dtype=torch.float64) * 1e-4
    store = _write(tmp_path / "store", rows, ids, encoding)
    # Statistics are of the rows as they were computed, before they were rounded to be stored.
    inverse = dense_inverse(LAYOUT, lambda b: second_moment_matrix(rows[:, b.columns]), DAMPING)
    engine = QueryEngine(store)
    for mode in MODES:
        if mode == "l2":
            continue  # queries are far longer than such rows: differences drown in rounding
        full = engine.influence(query, reduce=reduce, mode=mode, damping=DAMPING, preconditioner="covariance")
        expected = dense_scores(query.gradients, _combined(store, reduce), inverse, mode)
        assert full.scores is not None and full.data_id is not None
        error = (full.scores.double() - expected).norm() / expected.norm()
        assert error < TOLERANCE[encoding]
        assert full.data_id.tolist() == (ids if reduce == "none" else ids[:50])
        few = engine.influence(query, k=5, reduce=reduce, mode=mode, damping=DAMPING, preconditioner="covariance")
        columns = dense_ranking(full.scores, 5)
        assert few.proponents().ids.tolist() == [[full.data_id[c] for c in line] for line in columns]


def test_rows_that_are_not_finite_take_no_part(tmp_path: Path, query: QueryGradients) -> None:
    rows = torch.randn(60, LAYOUT.width)
    rows[7, 3], rows[33] = float("nan"), float("inf")
    store = _write(tmp_path / "store", rows, [f"s{i}" for i in range(60)], "bfloat16")
    for reduce in REDUCTIONS:
        result = QueryEngine(store).influence(query, k=58, reduce=reduce)
        ranked = set(result.proponents().ids.ravel())
        assert ranked == {f"s{i}" for i in range(60)} - {"s7", "s33"}
        assert torch.isfinite(result.proponents().scores).all()
        assert "2 stored rows left out" in result.note


def test_rows_that_came_later_are_seen_after_a_refresh(tmp_path: Path, query: QueryGradients) -> None:
    rows = torch.randn(40, LAYOUT.width)
    store = _write(tmp_path / "store", rows, [f"s{i}" for i in range(40)], "float32")
    engine = QueryEngine(store)
    assert engine.influence(query).samples == 40
    with StoreWriter(tmp_path / "store", LAYOUT, "float32") as writer:
        writer.put(ProjectedBatch(("new0", "new1"), 100 * torch.randn(2, LAYOUT.width)))
    assert engine.influence(query).samples == 40
    store.refresh()
    grown = engine.influence(query, k=2)
    assert grown.samples == 42
    assert {*grown.proponents().ids.ravel(), *grown.opponents().ids.ravel()} & {"new0", "new1"}
    assert "empirical Fisher over 42 rows" in grown.note


def test_a_store_without_rows(tmp_path: Path, query: QueryGradients) -> None:
    create_store(tmp_path / "store", {})
    with pytest.raises(EmptyStoreError, match="the store holds no rows"):
        QueryEngine(open_store(tmp_path / "store")).influence(query)


def test_a_query_does_not_write_to_the_store(tmp_path: Path, query: QueryGradients) -> None:
    rows = torch.randn(30, LAYOUT.width)
    store = _write(tmp_path / "store", rows, ["same"] * 30, "bfloat16")
    before = {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()}
    QueryEngine(store).influence(query, k=1, mode="cosine")
    assert {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()} == before


def test_scores_sum_over_modules_of_unequal_size(tmp_path: Path) -> None:
    layout = blocks_layout((5, 2), (1, 1), (2, 5), (5, 2))
    rows = torch.randn(80, layout.width)
    store = _write(tmp_path / "store", rows, list(range(80)), "float32", layout)
    query = QueryGradients(("q",), torch.randn(1, layout.width), layout)
    result = QueryEngine(store).influence(query, preconditioner="covariance")
    inverse = dense_inverse(layout, lambda b: second_moment_matrix(rows[:, b.columns]), DAMPING)
    expected = dense_scores(query.gradients, rows, inverse, "dot")
    assert result.scores is not None
    assert (result.scores.double() - expected).norm() < TOLERANCE["float32"] * expected.norm()


def test_a_covariance_of_a_killed_resumption_covers_all_valid_rows(tmp_path: Path, query: QueryGradients) -> None:
    rows = torch.randn(60, LAYOUT.width)
    rows[:30] = float("nan")
    store = _write(tmp_path / "store", rows, list(range(60)), "float32")
    assert (store.statistics.rows, int(store.valid.sum())) == (60, 30)
    later = 50 * torch.randn(24, LAYOUT.width)
    with StoreWriter(tmp_path / "store", LAYOUT, "float32") as writer:  # none are written, as by one that was killed
        writer.put(ProjectedBatch(tuple(range(60, 84)), later))
    result = QueryEngine(store.refresh()).influence(query, damping=DAMPING)
    every = torch.cat([rows[30:], later]).double()
    inverse = dense_inverse(LAYOUT, lambda b: second_moment_matrix(every[:, b.columns]), DAMPING)
    expected = dense_scores(query.gradients, every, inverse, "dot")
    assert result.scores is not None
    assert (result.scores.double() - expected).norm() < TOLERANCE["float32"] * expected.norm()
    assert "empirical Fisher over 54 rows" in result.note


def test_queries_of_another_seed_are_refused(tmp_path: Path, query: QueryGradients) -> None:
    def projections(seed: int) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        generator = torch.Generator().manual_seed(seed)
        return {b.name: (torch.randn(b.rank[1], b.shape[1], generator=generator), None) for b in LAYOUT}

    create_store(tmp_path / "store", {})
    store = open_store(tmp_path / "store")
    assert store.projections_digest == ""
    describe(tmp_path / "store", LAYOUT, "float32", projections(0))
    with StoreWriter(tmp_path / "store", LAYOUT, "float32") as writer:
        writer.put(ProjectedBatch((1, 2), torch.randn(2, LAYOUT.width)))
    engine = QueryEngine(store.refresh())
    assert store.projections_digest == projections_digest(LAYOUT, projections(0))
    engine.influence(replace(query, projections=projections_digest(LAYOUT, projections(0))))
    with pytest.raises(ModelMismatchError, match="another seed or another basis"):
        engine.influence(replace(query, projections=projections_digest(LAYOUT, projections(1))))


@pytest.mark.parametrize("preconditioner", ["auto", "covariance"])
def test_a_visit_too_large_to_square_names_the_module(
    tmp_path: Path, query: QueryGradients, preconditioner: str
) -> None:
    rows = torch.randn(40, LAYOUT.width)
    rows[3] = 1e22
    engine = QueryEngine(_write(tmp_path / "store", rows, list(range(20)) * 2, "bfloat16"))
    with pytest.raises(StatisticsError, match=r"module 'layer.0' hold numbers that are not finite"):
        engine.influence(query, preconditioner=preconditioner)
    assert engine.influence(query, preconditioner="identity").samples == 20
