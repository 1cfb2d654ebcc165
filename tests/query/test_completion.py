"""Statistics are completed by a pass over the store, and only when they must be."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from logix_like import statistics as sums
from logix_like.damping import DampingSetting
from logix_like.errors import EmptyStoreError, StatisticsError
from logix_like.query import completion
from logix_like.query.completion import ensure_statistics, statistics_for
from logix_like.query.engine import QueryEngine
from logix_like.query.gradients import QueryGradients
from logix_like.query.result import InfluenceResult
from logix_like.statistics import Statistics, StatisticsAccumulator
from tests.query.memory_store import MemoryStore
from tests.reference import blocks_layout, second_moment_matrix

EXACT = 1e-12
"""Float64 sums of some tens of rows in another order."""

LAYOUT = blocks_layout((2, 3), (3, 2))


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(30, LAYOUT.width, dtype=torch.float64)


def _statistics(rows: Tensor, *names: str) -> Statistics:
    accumulator = StatisticsAccumulator(LAYOUT, names)
    accumulator.update(rows)
    statistics = accumulator.snapshot()
    if "kronecker" not in names:
        return statistics
    one = torch.ones((), dtype=torch.float64)
    samples = one * max(1, len(rows))
    factors = {
        b.name: {"samples": samples, "output_outer_sum": samples * _moment(b.rank[0])}
        | {"positions": one, "input_outer_sum": _moment(b.rank[1])}
        for b in LAYOUT
    }
    return Statistics(LAYOUT, {b.name: statistics.sums[b.name] | factors[b.name] for b in LAYOUT}, len(rows))


def _moment(size: int) -> Tensor:
    root = torch.randn(9, size, dtype=torch.float64)
    return root.T @ root


def test_complete_statistics_are_taken_as_they_are(rows: Tensor) -> None:
    store = MemoryStore(LAYOUT, rows, statistics=_statistics(rows, "covariance", "variance"))
    assert ensure_statistics(store, ["covariance", "variance"]) is store.statistics
    assert store.scans == 0


@pytest.mark.parametrize("covered", [0, 10])
def test_a_missing_or_stale_covariance_is_computed_over_valid_rows(rows: Tensor, covered: int) -> None:
    rows[5] = float("nan")
    valid = [i != 5 for i in range(30)]
    good = rows[torch.tensor(valid)]
    statistics = _statistics(good[:covered], "covariance", "kronecker")
    store = MemoryStore(LAYOUT, rows, ["same"] * 30, valid=valid, statistics=statistics)
    completed = ensure_statistics(store, ["covariance"])
    assert (store.scans, completed.rows) == (1, 30)  # the row that is not finite is accounted for
    for block in LAYOUT:
        expected = second_moment_matrix(good[:, block.columns])
        torch.testing.assert_close(completed.covariance(block.name), expected, rtol=EXACT, atol=EXACT)
        assert torch.equal(completed.kronecker(block.name).input, statistics.kronecker(block.name).input)


def test_sums_of_other_rows_are_dropped(rows: Tensor) -> None:
    store = MemoryStore(LAYOUT, rows, statistics=_statistics(rows[:10], "mean", "covariance"))
    completed = ensure_statistics(store, ["covariance"])
    assert not completed.has("layer.0", "sum")


def test_large_blocks_get_no_covariance_unless_it_is_asked_for_by_name(rows: Tensor) -> None:
    store = MemoryStore(LAYOUT, rows)
    limited = ensure_statistics(store, ["covariance"], covariance_limit=5)
    assert not limited.has("layer.0", "outer_sum")
    assert statistics_for("covariance", store).has("layer.0", "outer_sum")


def test_eigenvalues_are_computed_in_the_gathered_basis(rows: Tensor) -> None:
    store = MemoryStore(LAYOUT, rows, statistics=_statistics(rows, "kronecker"))
    completed = statistics_for("ekfac", store)
    corrected = completed.corrected_eigenvalues("layer.0")
    rotated = corrected.output_basis.T @ rows[:, :6].view(-1, 2, 3) @ corrected.input_basis
    torch.testing.assert_close(corrected.values, rotated.square().mean(0), rtol=EXACT, atol=EXACT)
    store.statistics = completed
    scans = store.scans
    assert statistics_for("ekfac", store) is completed and store.scans == scans
    store.grow(torch.cat([rows, rows]), completed)
    assert statistics_for("ekfac", store).sums["layer.0"]["corrected_rows"] == 60


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_kronecker_factors_cannot_be_had_from_rows(rows: Tensor, name: str) -> None:
    store = MemoryStore(LAYOUT, rows, statistics=_statistics(rows, "covariance"))
    with pytest.raises(StatisticsError, match=r"'layer\.0' were not gathered.*'kronecker' under 'statistics'"):
        statistics_for(name, store)


def test_auto_makes_no_pass_when_factors_are_there(rows: Tensor) -> None:
    store = MemoryStore(LAYOUT, rows, statistics=_statistics(rows, "kronecker"))
    assert statistics_for("auto", store) is store.statistics
    assert store.scans == 0


def test_auto_brings_corrected_eigenvalues_up_to_date(rows: Tensor) -> None:
    known = ensure_statistics(
        MemoryStore(LAYOUT, rows[:12], statistics=_statistics(rows[:12], "kronecker")), {"corrected_eigval"}
    )
    store = MemoryStore(LAYOUT, rows, statistics=known)
    counts = {int(fields["corrected_rows"]) for fields in statistics_for("auto", store).sums.values()}
    assert counts == {len(rows)}
    assert store.scans == 1


def test_auto_computes_the_covariance_when_nothing_was_gathered(rows: Tensor) -> None:
    store = MemoryStore(LAYOUT, rows)
    query = QueryGradients(("q",), rows[:1].clone(), LAYOUT)
    note = QueryEngine(store).influence(query).note
    assert "covariance (2 modules), damping 0.1, empirical Fisher over 30 rows" in note


def test_auto_takes_visits_of_few_samples_for_few(rows: Tensor) -> None:
    ids = [f"s{n % 5}" for n in range(len(rows))]
    store = MemoryStore(LAYOUT, rows, ids=ids, statistics=_statistics(rows, "covariance", "kronecker"))
    query = QueryGradients(("q",), rows[:1].clone(), LAYOUT)
    assert "kfac (2 modules)" in QueryEngine(store).influence(query).note


def test_partial_coverage_is_said(rows: Tensor) -> None:
    store = MemoryStore(LAYOUT, rows, statistics=_statistics(rows[:12], "kronecker"))
    query = QueryGradients(("q",), rows[:1].clone(), LAYOUT, note="mean over 3 checkpoints")
    note = QueryEngine(store).influence(query, preconditioner="kfac").note
    assert "empirical Fisher over 12 of 30 rows" in note
    assert note.endswith("queries: mean over 3 checkpoints")


def test_a_module_that_was_never_used_is_left_out(rows: Tensor) -> None:
    rows[:, LAYOUT["layer.1"].columns] = 0
    statistics = _statistics(rows, "kronecker")
    for field in ("output_outer_sum", "input_outer_sum", "positions"):
        statistics.sums["layer.1"][field] = torch.zeros_like(statistics.sums["layer.1"][field])
    store = MemoryStore(LAYOUT, rows, statistics=statistics)
    query = QueryGradients(("q",), torch.ones(1, LAYOUT.width, dtype=torch.float64), LAYOUT)
    for name in ("kfac", "ekfac"):
        scores = QueryEngine(store).influence(query, preconditioner=name).scores
        assert scores is not None and torch.isfinite(scores).all() and scores.any()


def test_no_valid_row_is_an_empty_store(rows: Tensor) -> None:
    store = MemoryStore(LAYOUT, rows, valid=[False] * 30)
    with pytest.raises(EmptyStoreError, match="30 rows and none that can be ranked"):
        ensure_statistics(store, ["covariance"])


def _sketched_ask(rows: Tensor, monkeypatch: pytest.MonkeyPatch, numbers: int, **options: object) -> InfluenceResult:
    monkeypatch.setattr(sums, "DENSE_NUMBERS", numbers)
    query = QueryGradients(("q", "r"), torch.randn(2, LAYOUT.width, generator=torch.Generator().manual_seed(5)), LAYOUT)
    store = MemoryStore(LAYOUT, rows.double())
    return QueryEngine(store).influence(query, preconditioner="covariance", **options)


@pytest.mark.parametrize("damping", [0.1, {"absolute": 0.3}, "auto"])
def test_a_large_covariance_is_sketched_and_exact_with_fewer_rows_than_its_rank(
    rows: Tensor, monkeypatch: pytest.MonkeyPatch, damping: DampingSetting
) -> None:
    few = rows[:3]
    whole = _sketched_ask(few, monkeypatch, 2**24, damping=damping)
    sketched = _sketched_ask(few, monkeypatch, 24, damping=damping)  # 4 directions of 6 numbers
    assert "covariance sketched at rank 4 (" in sketched.note and "trace" not in sketched.note
    assert sketched.scores is not None and whole.scores is not None
    torch.testing.assert_close(sketched.scores, whole.scores, rtol=1e-8, atol=1e-10)


def test_a_sketch_of_few_rows_is_as_large_as_it_must_be_to_be_exact(
    rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = rows[:5]
    whole, exact = _sketched_ask(few, monkeypatch, 2**24), _sketched_ask(few, monkeypatch, 12)
    assert "covariance sketched at rank 5 (" in exact.note and "trace" not in exact.note
    assert exact.scores is not None and whole.scores is not None
    torch.testing.assert_close(exact.scores, whole.scores, rtol=1e-8, atol=1e-10)
    monkeypatch.setattr(completion, "allowed_memory", lambda: 2500)  # for 2 directions of 6 numbers, but not for 5
    rough = _sketched_ask(few, monkeypatch, 12)
    assert "covariance sketched at rank 2 (" in rough.note and "of each trace held" in rough.note


def test_what_a_sketch_leaves_is_said_and_bounds_the_error(rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _sketched_ask(rows, monkeypatch, 2**24)
    sketched = _sketched_ask(rows, monkeypatch, 24)
    found = re.search(r"at least ([\d.]+)% of each trace held", sketched.note)
    assert found is not None and 50 < float(found[1]) < 100
    assert sketched.scores is not None and whole.scores is not None
    correlation = torch.corrcoef(torch.stack([sketched.scores.flatten(), whole.scores.flatten()]))[0, 1]
    assert 0.9 < correlation < 1 - 1e-6


def test_covariances_that_memory_does_not_hold_are_refused_before_they_are_tried(
    rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completion, "allowed_memory", lambda: 1000)
    store = MemoryStore(LAYOUT, rows)
    with pytest.raises(StatisticsError, match=r"2 modules.*GiB, and this process may have 0\.0: ask with precond"):
        statistics_for("covariance", store)
    assert store.scans == 0
