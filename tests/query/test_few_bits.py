"""Rows of few bits a number are scored in units of their coordinates, and ranked as their decoded numbers rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from logix_like.query import scoring
from logix_like.query.engine import KEPT_BYTES, QueryEngine
from logix_like.query.gradients import QueryGradients
from logix_like.query.products import Approximate, Products
from logix_like.query.scan import Tile
from logix_like.store import GradientStore
from tests.query.test_query_on_disk import LAYOUT, _write
from tests.reference import dense_ranking

SINGLE = 2e-7
"""Scores are float64 products rounded to float32 once."""


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "SIEVED_ROWS", 64)


@pytest.fixture(params=["int8", "int4", "sign"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> GradientStore:
    lengths = torch.logspace(-2, 1, 300)[torch.randperm(300), None]
    rows = torch.randn(300, LAYOUT.width) * lengths * torch.randn(LAYOUT.width).exp()
    return _write(tmp_path / "store", rows, [f"s{i}" for i in range(300)], request.param)


@pytest.mark.parametrize("size", [1e-12, 1.0])
def test_ids_order_and_scores_are_those_of_float64(store: GradientStore, size: float) -> None:
    query = QueryGradients(("q0", "q1"), size * torch.randn(2, LAYOUT.width), LAYOUT)
    expected = query.gradients.double() @ store.gradients[:].double().T
    engine = QueryEngine(store, keep_bytes=0)
    found = engine.influence(query, k=7, preconditioner="identity")
    for side, sign in ((found.proponents(), 1), (found.opponents(), -1)):
        columns = dense_ranking(sign * expected, 7)
        assert side.ids.tolist() == [[f"s{c}" for c in line] for line in columns]
        own = expected.gather(1, torch.tensor(columns))
        torch.testing.assert_close(side.scores.double(), own, rtol=SINGLE, atol=0)
    every = engine.influence(query, preconditioner="identity")
    assert every.scores is not None
    torch.testing.assert_close(every.scores.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("encoding", ["int8", "int4", "sign"])
@pytest.mark.parametrize("keep_bytes", [0, KEPT_BYTES])
def test_the_worst_arithmetic_that_its_bounds_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_bytes: int, encoding: str
) -> None:
    """A large row of coordinates that its chunk hardly knows comes back longer: bounds go by what was stored."""
    rows = torch.randn(300, LAYOUT.width)
    rows[:, ::2] = 0
    rows[::16] = 1e3 * rows[::16].roll(1, dims=1)
    store = _write(tmp_path / "store", rows, [f"s{i}" for i in range(300)], encoding)
    stored = store.gradients[:].double()

    def roughly(products: Products, tile: Tile) -> Approximate:
        values, queries = stored[tile.positions], query.gradients.double()
        absolute = 0.2 * queries.norm(dim=1)
        off = torch.outer(values.norm(dim=1), absolute) * torch.randn(len(values), len(queries)).sign()
        return Approximate(values @ queries.T + 0.99 * off, 0.0, absolute)

    monkeypatch.setattr(Products, "of", roughly)
    query = QueryGradients(tuple(range(40)), torch.randn(40, LAYOUT.width), LAYOUT)
    found = QueryEngine(store, keep_bytes=keep_bytes).influence(query, k=1, preconditioner="identity")
    expected = query.gradients.double() @ stored.T
    for side, sign in ((found.proponents(), 1), (found.opponents(), -1)):
        assert side.ids[:, 0].tolist() == [f"s{line[0]}" for line in dense_ranking(sign * expected, 1)]
