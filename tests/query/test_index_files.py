"""Indexes of many rows: reduced, of any factory, kept in files, extended, and never asked for other rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logix_like.capture.batch import ProjectedBatch
from logix_like.errors import QueryError
from logix_like.query import index as index_module
from logix_like.query import indexing
from logix_like.query.engine import KEPT_BYTES, QueryEngine
from logix_like.query.gradients import QueryGradients
from logix_like.query.index import RowIndex
from logix_like.query.indexing import IndexSearch, Measured
from logix_like.query.result import InfluenceResult
from logix_like.query.scoring import Task
from logix_like.store import GradientStore, StoreWriter, open_store
from tests.query.test_query_on_disk import _write
from tests.reference import blocks_layout

LAYOUT = blocks_layout((6, 8), (8, 6), (6, 8))
COUNT = 600


@pytest.fixture(autouse=True)
def few_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 144 numbers are brought to 48."""
    monkeypatch.setattr(index_module, "DIRECTIONS", 48)
    monkeypatch.setattr(index_module, "SAMPLED_ROWS", 300)


@pytest.fixture(autouse=True)
def however_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is asked, though every row would be scored sooner."""
    monkeypatch.setattr(indexing, "SHARE_OF_EACH", float("inf"))
    monkeypatch.setattr(indexing, "SHARE_OF_ALL", float("inf"))


def _rows(count: int, seed: int = 0) -> torch.Tensor:
    """Rows of a spectrum that falls off, as gradients have."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(LAYOUT.width, LAYOUT.width, generator=torch.Generator().manual_seed(9)))[0]
    scales = torch.arange(1, LAYOUT.width + 1).float() ** -1.0
    return torch.randn(count, LAYOUT.width, generator=generator) * scales @ basis


@pytest.fixture
def store(tmp_path: Path) -> GradientStore:
    return _write(tmp_path / "store", _rows(COUNT), list(range(COUNT)), "bfloat16", LAYOUT)


@pytest.fixture
def query() -> QueryGradients:
    return QueryGradients(("q0", "q1", "q2"), _rows(3, 5), LAYOUT)


def _ask(store: GradientStore, query: QueryGradients, **options: Any) -> InfluenceResult:
    return QueryEngine(store, keep_bytes=0).influence(query, k=5, engine="faiss", **{"index": "Flat", **options})


def _assert_exact(found: InfluenceResult, store: GradientStore, query: QueryGradients, **options: Any) -> None:
    exact = QueryEngine(store, keep_bytes=0).influence(query, k=5, **options)
    for one, other in ((exact.proponents(), found.proponents()), (exact.opponents(), found.opponents())):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.scores.equal(other.scores)  # bit by bit: candidates are scored as the exact engine scores


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The factories that were built, one after another."""
    built: list[str] = []
    build = RowIndex.build

    def noted(vectors: Any, factory: str) -> RowIndex:
        built.append(factory)
        return build(vectors, factory)

    monkeypatch.setattr(RowIndex, "build", staticmethod(noted))
    return built


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "HNSW16", "IVF4,Flat"])
def test_any_factory_with_an_exact_answer(store: GradientStore, query: QueryGradients, factory: str) -> None:
    found = _ask(store, query, index=factory, damping=1.0)
    if "recall@5 1.000" in found.note:
        _assert_exact(found, store, query, damping=1.0)
    else:
        assert factory == "IVF4,Flat"  # it looks into one list out of four
    assert f"index {factory}, recall@5" in found.note and "apart from those it was set up with" in found.note


@pytest.mark.parametrize("mode", ["dot", "cosine", "relatif", "l2"])
def test_every_mode(store: GradientStore, query: QueryGradients, mode: str) -> None:
    found = _ask(store, query, mode=mode)
    assert "recall@5 1.000" in found.note
    _assert_exact(found, store, query, mode=mode)


def test_the_stated_recall_is_the_true_one_of_queries_it_was_not_tuned_on(
    store: GradientStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "POOL", 1)
    monkeypatch.setattr(indexing, "SMALLEST_POOL", 5)
    monkeypatch.setattr(indexing, "WANTED_RECALL", 0.0)
    asked = QueryGradients(tuple(range(12)), _rows(12, 5), LAYOUT)
    stated = _ask(store, asked, damping=1e-3).note
    shares = []
    for number in range(1, 12, 2):  # one by one, so that no query has the candidates of others
        one = QueryGradients((number,), asked.gradients[number : number + 1], LAYOUT)
        found = _ask(store, one, damping=1e-3)
        assert "of the query that it was set up with" in found.note
        exact = QueryEngine(store, keep_bytes=0).influence(one, k=5, damping=1e-3)
        pairs = ((exact.proponents(), found.proponents()), (exact.opponents(), found.opponents()))
        shares.append(np.mean([len(set(a.ids[0]) & set(b.ids[0])) / 5 for a, b in pairs]))
    assert np.mean(shares) < 1
    error = np.std(shares, ddof=1) / 6**0.5
    assert f"recall@5 {np.mean(shares):.3f} ± {error:.3f} (6 queries) on queries apart" in stated


@pytest.mark.parametrize(
    ("index", "queries", "k", "indexed"),
    [
        ("Flat", 1, 1, True),
        ("Flat", 1, 200, False),
        ("Flat", 12, 1, True),
        ("Flat", 13, 1, False),
        ("SQ8", 13, 1, True),
        ("SQ8", 16, 1, False),
    ],
)
def test_every_row_is_scored_where_an_index_would_be_slower(
    store: GradientStore, monkeypatch: pytest.MonkeyPatch, index: str, queries: int, k: int, indexed: bool
) -> None:
    for name, value in (("SHARE_OF_EACH", 1 / 25), ("SHARE_OF_ALL", 1 / 4), ("POOL", 1), ("SMALLEST_POOL", 5)):
        monkeypatch.setattr(indexing, name, value)
    asked = QueryGradients(tuple(range(queries)), _rows(queries, 5), LAYOUT)
    note = QueryEngine(store, keep_bytes=0).influence(asked, k=k, engine="faiss", index=index).note
    assert (f"index {index}, recall@" in note) == indexed
    assert ("every row was scored" in note) != indexed


def test_low_recall_takes_more_candidates(
    store: GradientStore, query: QueryGradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "POOL", 1)
    monkeypatch.setattr(indexing, "SMALLEST_POOL", 5)
    found = _ask(store, query, damping=0.1)
    assert "recall@5 1.000" in found.note or "recall@5 0.9" in found.note


def test_an_index_is_found_again(store: GradientStore, query: QueryGradients, builds: list[str]) -> None:
    before = {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()}
    first = _ask(store, query)
    again = _ask(open_store(store.path), query)
    assert builds == ["Flat"]
    assert again.proponents().ids.tolist() == first.proponents().ids.tolist()
    _ask(store, query, damping=0.5)  # the directions are found in the geometry of the preconditioner
    _ask(store, query, mode="cosine")
    _ask(store, query, index="SQ8")
    assert builds == ["Flat", "Flat", "Flat", "SQ8"]
    assert {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()} == before


def test_further_rows_are_added(store: GradientStore, query: QueryGradients, builds: list[str]) -> None:
    _ask(store, query)
    with StoreWriter(store.path, LAYOUT, "bfloat16") as writer:
        writer.put(ProjectedBatch(tuple(range(COUNT, COUNT + 30)), 3 * _rows(30, 7)))
    grown = open_store(store.path)
    found = _ask(grown, query)
    assert builds == ["Flat"]
    assert any(int(one) >= COUNT for one in found.proponents().ids.ravel())
    _assert_exact(found, grown, query)
    with StoreWriter(store.path, LAYOUT, "bfloat16") as writer:
        writer.put(ProjectedBatch(tuple(range(2000, 2000 + 2 * COUNT)), _rows(2 * COUNT, 8)))
    _ask(open_store(store.path), query)
    assert builds == ["Flat", "Flat"]  # its directions were found on too few rows


def test_an_index_of_lengths_is_replaced_when_rows_come(
    store: GradientStore, query: QueryGradients, builds: list[str], cache_folder: Path
) -> None:
    _ask(store, query, mode="relatif")
    with StoreWriter(store.path, LAYOUT, "bfloat16") as writer:
        writer.put(ProjectedBatch(tuple(range(COUNT, COUNT + 30)), 3 * _rows(30, 7)))
    grown = open_store(store.path)
    _assert_exact(_ask(grown, query, mode="relatif"), grown, query, mode="relatif")
    assert builds == ["Flat", "Flat"]
    assert len(list(cache_folder.rglob("about.json"))) == 1


def test_recall_is_measured_for_each_choice_of_rows(
    store: GradientStore, query: QueryGradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    measured = IndexSearch._measured

    def counted(self: IndexSearch, task: Task, k: int, index: RowIndex) -> Measured:
        counts.append(task.candidates.count)
        return measured(self, task, k, index)

    monkeypatch.setattr(IndexSearch, "_measured", counted)
    engine = QueryEngine(store, keep_bytes=0)
    for chosen in (range(100), range(50), range(100), None):
        engine.influence(query, k=5, engine="faiss", data_id=None if chosen is None else list(chosen))
    assert counts == [100, 50, COUNT]


def test_an_index_of_other_rows_is_built_again(
    store: GradientStore, query: QueryGradients, builds: list[str], cache_folder: Path
) -> None:
    _ask(store, query)
    about = next(cache_folder.rglob("about.json"))
    other = _write(store.path.with_name("other"), _rows(COUNT, 11), list(range(COUNT)), "bfloat16", LAYOUT)
    moved = other.cache / about.parent.name
    moved.parent.mkdir(parents=True)
    about.parent.rename(moved)
    _assert_exact(_ask(other, query), other, query)
    assert builds == ["Flat", "Flat"]


@pytest.mark.parametrize("name", ["about.json", "index.faiss", "reduction.npz"])
def test_a_damaged_index_is_built_again(
    store: GradientStore, query: QueryGradients, builds: list[str], cache_folder: Path, name: str
) -> None:
    _ask(store, query)
    file = next(cache_folder.rglob(name))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 8
    file.write_bytes(content)
    _assert_exact(_ask(store, query), store, query)
    assert builds == ["Flat", "Flat"]


def test_a_folder_that_cannot_be_written_costs_time_alone(
    store: GradientStore, query: QueryGradients, cache_folder: Path
) -> None:
    (cache_folder / "indexes").write_text("a file in its place")
    _assert_exact(_ask(store, query), store, query)


def test_too_few_candidates_fall_back_to_every_row(store: GradientStore, query: QueryGradients) -> None:
    found = QueryEngine(store, keep_bytes=0).influence(query, k=500, engine="faiss", index="IVF4,Flat")
    assert "named too few rows: every row was scored" in found.note
    assert found.proponents().k == 500


def test_a_small_store_is_scored_whole(store: GradientStore, query: QueryGradients, builds: list[str]) -> None:
    found = QueryEngine(store).influence(query, k=5, engine="faiss")
    assert builds == [] and "scoring every row is faster than an index" in found.note


def test_a_factory_that_is_none(store: GradientStore, query: QueryGradients) -> None:
    for keep_bytes in (0, KEPT_BYTES):  # also of a store that is scored whole
        engine = QueryEngine(store, keep_bytes=keep_bytes)
        for index in ("Flut", 5):
            with pytest.raises(QueryError, match=rf"cannot make an index {index!r} of \d+ numbers \(.*\); known"):
                engine.influence(query, k=5, engine="faiss", index=index)
    with pytest.raises(QueryError, match="FAISS cannot make an index 'IVF4096,Flat' of 48 numbers from 300 rows"):
        _ask(store, query, index="IVF4096,Flat")


def test_only_wanted_samples(store: GradientStore, query: QueryGradients) -> None:
    chosen = list(range(0, COUNT, 7))
    for factory in ("Flat", "IVF1,Flat", "HNSW16"):
        found = _ask(store, query, index=factory, data_id=chosen)
        assert set(found.proponents().ids.ravel()) <= set(chosen)
        if factory != "HNSW16":  # a graph loses its way when most rows are barred
            assert "recall@5 1.000" in found.note
            _assert_exact(found, store, query, data_id=chosen)
