"""Every preconditioner by name: dense truth, what must hold of all of them, and the identities E and F."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from logix_like.damping import Damping, shrinkage_damping
from logix_like.errors import ModelMismatchError, QueryError, StatisticsError
from logix_like.layout import Layout
from logix_like.preconditioner import PRECONDITIONERS, Eigenbases, FittedPreconditioner, fit_preconditioner
from logix_like.statistics import Statistics, StatisticsAccumulator, corrected_sums
from tests.reference import blocks_layout, damped, second_moment_matrix

EXACT = 1e-10
"""Float64 on both sides, condition numbers up to about 1e3."""

SINGLE = 1e-4
"""Float32 against float64 with such condition numbers."""

DAMPED = sorted(set(PRECONDITIONERS) - {"identity"})


def _scalar(number: float) -> Tensor:
    return torch.tensor(float(number), dtype=torch.float64)


def with_factors(statistics: Statistics, factors: dict[str, tuple[Tensor, Tensor]]) -> Statistics:
    """``statistics`` with Kronecker factors ``(S, A)`` by module."""
    sums = {
        name: fields
        | {"samples": _scalar(1), "output_outer_sum": factors[name][0]}
        | {"positions": _scalar(1), "input_outer_sum": factors[name][1]}
        for name, fields in statistics.sums.items()
    }
    return Statistics(statistics.layout, sums, statistics.rows)


def gathered(layout: Layout, rows: Tensor, factors: dict[str, tuple[Tensor, Tensor]] | None = None) -> Statistics:
    """All statistics of ``rows``; Kronecker factors of random activations unless given."""
    accumulator = StatisticsAccumulator(layout, ["covariance", "variance"])
    accumulator.update(rows)
    if factors is None:
        factors = {b.name: (_spread(b.rank[0]), _spread(b.rank[1])) for b in layout}
    statistics = with_factors(accumulator.snapshot(), factors)
    return statistics.with_corrected(corrected_sums(statistics, [rows]))


def _spread(size: int) -> Tensor:
    root = torch.randn(4 * size, size, dtype=torch.float64) * torch.linspace(0.5, 2, size)
    return root.T @ root / (4 * size)


@pytest.fixture
def layout() -> Layout:
    return blocks_layout((2, 3), (4, 2), (2, 3), (3, 2))


@pytest.fixture
def rows(layout: Layout) -> Tensor:
    return torch.randn(50, layout.width, dtype=torch.float64) * torch.linspace(0.3, 3, layout.width)


@pytest.fixture
def statistics(layout: Layout, rows: Tensor) -> Statistics:
    return gathered(layout, rows)


def dense(fitted: FittedPreconditioner) -> Tensor:
    """The matrix that ``fitted`` multiplies with."""
    return fitted.apply(torch.eye(fitted.layout.width, dtype=torch.float64))


@pytest.mark.parametrize("name", PRECONDITIONERS)
class TestEveryPreconditioner:
    """What holds whatever the name."""

    def test_the_input_is_not_changed(self, name: str, statistics: Statistics, layout: Layout, rows: Tensor) -> None:
        before = rows.clone()
        applied = fit_preconditioner(name, statistics, layout, 0.1).apply(rows)
        assert torch.equal(rows, before)
        assert applied.data_ptr() != rows.data_ptr()

    def test_it_is_symmetric_positive_and_block_diagonal(
        self, name: str, statistics: Statistics, layout: Layout
    ) -> None:
        matrix = dense(fit_preconditioner(name, statistics, layout, 0.1))
        torch.testing.assert_close(matrix, matrix.T, rtol=EXACT, atol=EXACT)
        assert torch.linalg.eigvalsh(matrix)[0] > 0
        blocks = torch.block_diag(*(matrix[b.columns, b.columns] for b in layout))
        assert torch.equal(matrix, blocks)

    def test_float32_is_close_to_float64(self, name: str, statistics: Statistics, layout: Layout, rows: Tensor) -> None:
        fitted = fit_preconditioner(name, statistics, layout, 0.1)
        exact, single = fitted.apply(rows), fitted.apply(rows.float())
        assert (exact.dtype, single.dtype) == (torch.float64, torch.float32)
        assert (single.double() - exact).norm() < SINGLE * exact.norm()

    def test_rows_are_independent_of_their_company(
        self, name: str, statistics: Statistics, layout: Layout, rows: Tensor
    ) -> None:
        fitted = fit_preconditioner(name, statistics, layout, 0.1)
        alone = torch.cat([fitted.apply(rows[i : i + 1]) for i in range(5)])
        torch.testing.assert_close(fitted.apply(rows)[:5], alone, rtol=EXACT, atol=EXACT)

    def test_an_unused_module_gives_zero_and_no_nan(self, name: str, layout: Layout, rows: Tensor) -> None:
        rows[:, layout["layer.1"].columns] = 0
        factors = {b.name: (_spread(b.rank[0]), _spread(b.rank[1])) for b in layout}
        factors["layer.1"] = (torch.zeros(4, 4).double(), torch.zeros(2, 2).double())
        fitted = fit_preconditioner(name, gathered(layout, rows, factors), layout, 0.1)
        applied = fitted.apply(torch.ones(1, layout.width, dtype=torch.float64))
        assert torch.isfinite(applied).all()
        if name != "identity":
            assert not applied[:, layout["layer.1"].columns].any()

    def test_each_module_is_described(self, name: str, statistics: Statistics, layout: Layout) -> None:
        fitted = fit_preconditioner(name, statistics, layout, 0.1)
        described = fitted.describe()
        assert tuple(described) == layout.names
        assert all(str(layout[module].size) in text for module, text in described.items())
        assert fitted.name == name
        assert "auto (" not in fitted.summary()

    def test_another_models_statistics_are_refused(self, name: str, statistics: Statistics) -> None:
        with pytest.raises(ModelMismatchError, match="layer"):
            fit_preconditioner(name, statistics, blocks_layout((2, 3), (4, 2)), 0.1)


@pytest.mark.parametrize("name", DAMPED)
class TestDamping:
    """Damping is a multiple of each block's own mean eigenvalue."""

    def test_it_is_relative_to_the_block(self, name: str, statistics: Statistics, layout: Layout) -> None:
        undamped = dense(fit_preconditioner(name, statistics, layout, 0.0))
        with_damping = dense(fit_preconditioner(name, statistics, layout, 0.4))
        for block in layout:
            own = torch.linalg.inv(undamped[block.columns, block.columns])
            expected = torch.linalg.inv(damped(own, 0.4))
            found = with_damping[block.columns, block.columns]
            torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)

    def test_a_changed_damping_takes_effect_with_old_eigenbases(
        self, name: str, statistics: Statistics, layout: Layout
    ) -> None:
        eigenbases = Eigenbases(statistics)
        fit_preconditioner(name, statistics, layout, 0.1, eigenbases=eigenbases)
        again = dense(fit_preconditioner(name, statistics, layout, 0.7, eigenbases=eigenbases))
        assert torch.equal(again, dense(fit_preconditioner(name, statistics, layout, 0.7)))
        assert not torch.allclose(again, dense(fit_preconditioner(name, statistics, layout, 0.1)), rtol=0.1)

    def test_scaling_rows_scales_the_inverse(self, name: str, statistics: Statistics, layout: Layout) -> None:
        sums = {
            module: {
                f: t * (100 if f in ("square_sum", "outer_sum", "output_outer_sum", "corrected_square_sum") else 1)
                for f, t in fields.items()
            }
            for module, fields in statistics.sums.items()
        }
        scaled = Statistics(layout, sums, statistics.rows)
        small, large = (dense(fit_preconditioner(name, s, layout, 0.1)) for s in (statistics, scaled))
        torch.testing.assert_close(large * 100, small, rtol=EXACT, atol=EXACT)


def test_a_curvature_of_other_statistics_is_not_used(statistics: Statistics, layout: Layout, rows: Tensor) -> None:
    other = gathered(layout, 3 * rows)
    fitted = fit_preconditioner("kfac", other, layout, 0.1, eigenbases=Eigenbases(statistics))
    assert torch.equal(dense(fitted), dense(fit_preconditioner("kfac", other, layout, 0.1)))


def test_shared_inputs_share_their_factor(rows: Tensor) -> None:
    layout = blocks_layout((2, 3), (4, 3), shared_input=True)
    input_, outputs = _spread(3), {"layer.0": _spread(2), "layer.1": _spread(4)}
    sums = {name: {"samples": _scalar(1), "output_outer_sum": output} for name, output in outputs.items()}
    sums["layer.0"] |= {"positions": _scalar(1), "input_outer_sum": input_}
    matrix = dense(fit_preconditioner("kfac", Statistics(layout, sums, 1), layout, 0.1))
    for block in layout:
        expected = torch.linalg.inv(damped(torch.kron(outputs[block.name], input_), 0.1))
        torch.testing.assert_close(matrix[block.columns, block.columns], expected, rtol=EXACT, atol=EXACT)


class TestAuto:
    """Which preconditioner each module gets."""

    def test_covariance_where_there_are_enough_rows(self, layout: Layout, rows: Tensor) -> None:
        fitted = fit_preconditioner("auto", gathered(layout, rows[:12]), layout, 0.1)
        kinds = [text.split(",")[0] for text in fitted.describe().values()]
        assert kinds == ["covariance", "ekfac", "covariance", "covariance"]  # 2 k = 12, 16, 12, 12
        assert fitted.summary() == "covariance (3 modules), ekfac (1 modules)"

    def test_kept_coordinates_need_half_as_many(self, layout: Layout, rows: Tensor) -> None:
        kept = Layout([replace(b, coordinates=tuple(range(b.size)), input_group=b.name) for b in layout])
        for samples, kinds in ((8, "covariance (4 modules)"), (7, "covariance (3 modules), ekfac (1 modules)")):
            assert fit_preconditioner("auto", gathered(kept, rows[:samples]), kept, 0.1).summary() == kinds

    def test_visits_of_few_samples_count_as_few(self, layout: Layout, rows: Tensor) -> None:
        statistics = gathered(layout, rows[:12])
        fitted = fit_preconditioner("auto", statistics, layout, 0.1, eigenbases=Eigenbases(statistics, samples=6))
        assert fitted.summary() == "ekfac (4 modules)"

    def test_automatic_damping_shrinks_a_covariance_by_its_samples(self, layout: Layout, rows: Tensor) -> None:
        """Not by the visits of these; and no other curvature, whose eigenvalues few samples do not spread."""
        statistics = gathered(layout, rows[:12])
        covariance = statistics.covariance("layer.0")
        size, trace, squares = len(covariance), covariance.trace().item(), covariance.square().sum().item()
        for samples, counted in ((None, 12), (6, 6), (40, 12)):
            eigenbases = Eigenbases(statistics, samples)
            of = {name: PRECONDITIONERS[name](eigenbases, layout["layer.0"], Damping.of("auto")) for name in DAMPED}
            expected = shrinkage_damping(size, trace, squares, counted) * trace / size
            assert of["covariance"].damping == pytest.approx(expected)
            for name in ("diagonal", "kfac", "ekfac"):
                plain = PRECONDITIONERS[name](eigenbases, layout["layer.0"], Damping.of(0.1))
                assert of[name].damping == plain.damping

    def test_kfac_where_its_corrected_eigenvalues_were_not_gathered(self, layout: Layout, rows: Tensor) -> None:
        sums = {
            module: {field: values for field, values in fields.items() if field not in Statistics.CORRECTED}
            for module, fields in gathered(layout, rows[:5]).sums.items()
        }
        fitted = fit_preconditioner("auto", Statistics(layout, sums, 5), layout, 0.1)
        assert fitted.summary() == "kfac (4 modules)"

    def test_few_rows_and_no_factors_leave_the_covariance(self, layout: Layout, rows: Tensor) -> None:
        accumulator = StatisticsAccumulator(layout, ["covariance"])
        accumulator.update(rows[:5])
        fitted = fit_preconditioner("auto", accumulator.snapshot(), layout, 0.1)
        assert fitted.summary() == "covariance (4 modules)"

    def test_nothing_gathered_says_what_to_configure(self, layout: Layout, rows: Tensor) -> None:
        accumulator = StatisticsAccumulator(layout, ["variance"])
        accumulator.update(rows)
        with pytest.raises(StatisticsError, match=r"'layer\.0' \(6 numbers\).*'statistics' in the config"):
            fit_preconditioner("auto", accumulator.snapshot(), layout, 0.1)


def test_unknown_names_list_the_known(statistics: Statistics, layout: Layout) -> None:
    with pytest.raises(QueryError, match="unknown preconditioner 'shampoo'; known: identity, diagonal"):
        fit_preconditioner("shampoo", statistics, layout, 0.1)


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf")])
def test_damping_must_be_a_number_of_at_least_zero(statistics: Statistics, layout: Layout, damping: float) -> None:
    with pytest.raises(QueryError, match="damping is"):
        fit_preconditioner("kfac", statistics, layout, damping)


@pytest.mark.parametrize("name", ["covariance", "ekfac", "kfac", "diagonal"])
def test_a_singular_block_without_damping_is_named(name: str, layout: Layout, rows: Tensor) -> None:
    rows[:, layout["layer.2"].columns.start] = 0  # one number of the module is always zero
    factors = {b.name: (torch.eye(b.rank[0]).double(), torch.eye(b.rank[1]).double()) for b in layout}
    factors["layer.2"] = (torch.eye(2).double(), torch.diag(torch.tensor([0.0, 1.0, 2.0])).double())
    with pytest.raises(StatisticsError, match=r"'layer\.2' \(6 numbers\) is singular with damping 0"):
        fit_preconditioner(name, gathered(layout, rows, factors), layout, 0.0)


def test_blocks_of_many_sizes_in_any_order(rows: Tensor) -> None:
    layout = blocks_layout((2, 3), (1, 5), (2, 3), (5, 1), (2, 3))
    rows = torch.randn(60, layout.width, dtype=torch.float64)
    matrix = dense(fit_preconditioner("covariance", gathered(layout, rows), layout, 0.1))
    for block in layout:
        expected = torch.linalg.inv(damped(second_moment_matrix(rows[:, block.columns]), 0.1))
        torch.testing.assert_close(matrix[block.columns, block.columns], expected, rtol=EXACT, atol=EXACT)


def test_a_covariance_of_too_few_rows_needs_damping_however_it_was_rounded() -> None:
    """Of a float32 product of one row too few, every second one looks positive definite."""
    layout = blocks_layout((2, 3))
    for seed in range(20):
        rows = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
        statistics = StatisticsAccumulator(layout, ["covariance"])
        statistics.update(rows)
        with pytest.raises(StatisticsError, match=r"\(6 numbers\) is singular with damping 0"):
            fit_preconditioner("covariance", statistics.snapshot(), layout, 0.0)
        assert fit_preconditioner("covariance", statistics.snapshot(), layout, 0.1).apply(rows).isfinite().all()
