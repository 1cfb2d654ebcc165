"""Streaming statistics of rows and factors: additive sums, gathered chunk by chunk.

Everything kept here is a sum over samples (or positions), in float64, so that statistics of
disjoint sets of rows are merged by adding, in any order. What users ask for (mean, variance,
covariance, Kronecker factors, corrected eigenvalues) is read off the sums.

"Covariance" is the uncentred second moment ``E[g g^T]``, the empirical Fisher, as everywhere in
the influence literature. Kronecker factors follow K-FAC (Martens and Grosse 2015; expanded over
positions as in Grosse et al. 2018): ``A`` is the mean over positions of ``a a^T`` and ``S`` the mean
over samples of ``sum_t d_t d_t^T``, so that ``S (x) A`` has the scale of ``E[g g^T]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from logix_like.capture.batch import FactorMoments
from logix_like.errors import StatisticsError
from logix_like.layout import Layout
from logix_like.linalg.sketch import directions

STATISTICS = ("mean", "variance", "covariance", "kronecker", "corrected_eigval")
"""Statistics that can be asked for by name."""

ROW_SUMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "mean": ("sum",),
        "variance": ("sum", "square_sum"),
        "covariance": ("outer_sum",),
        "kronecker": (),
        "corrected_eigval": (),
    }
)
"""Which sums over rows each statistic needs."""

_ROW_FIELDS = frozenset({"rows", "sketch_sum", *(field for fields in ROW_SUMS.values() for field in fields)})

COVARIANCE_LIMIT = 1024
"""Blocks with more numbers than this keep no covariance: it is computed from the store on demand."""

DENSE_NUMBERS = 2**24
"""A covariance of more numbers than this (128 MiB) is held as a sketch of so many."""


EXACT_NUMBERS = 2**26
"""Rows of no more numbers than this (512 MiB) are sketched with as many directions as they are: that is exact."""


def sketch_rank(size: int, rows: int | None = None) -> int:
    """With how many directions the covariance of a block of ``size`` numbers is sketched; 0 where it is held whole.

    Of ``rows`` rows, where they are known, and few.
    """
    if size**2 <= DENSE_NUMBERS:
        return 0
    rank = max(1, DENSE_NUMBERS // size)
    return rank if rows is None or rows >= size or rows * size > EXACT_NUMBERS else max(rank, rows)


def covariance_field(size: int) -> str:
    """Which sum holds the covariance of a block of ``size`` numbers."""
    return "sketch_sum" if sketch_rank(size) else "outer_sum"


@dataclass(frozen=True)
class KroneckerFactors:
    """The two factors of one block's curvature ``S (x) A``."""

    input: Tensor
    """``A``: ``[rank_in, rank_in]``, float64."""
    output: Tensor
    """``S``: ``[rank_out, rank_out]``, float64."""


@dataclass(frozen=True)
class CorrectedEigenvalues:
    """EK-FAC's diagonal (George et al. 2018) with the eigenbasis it belongs to."""

    values: Tensor
    """``[rank_out, rank_in]``: mean square of the rows' coordinates in the eigenbasis."""
    input_basis: Tensor
    """``[rank_in, rank_in]``, eigenvectors in columns."""
    output_basis: Tensor
    """``[rank_out, rank_out]``, eigenvectors in columns."""


class Statistics:
    """Sums over ``rows`` rows of a store, by module and field; immutable.

    ``sums[module][field]`` holds float64 tensors: ``rows`` [], ``sum`` [k], ``square_sum`` [k],
    ``outer_sum`` [k, k] (of large blocks in its place ``sketch_sum`` [k, r], its product with
    :func:`logix_like.linalg.sketch.directions`), ``samples`` [], ``output_outer_sum`` [rank_out, rank_out], and in the
    first member of each input group ``positions`` [], ``input_outer_sum`` [rank_in, rank_in].
    ``corrected_square_sum`` comes with the bases it was taken in.
    """

    ADDITIVE = (
        "rows",
        "sum",
        "square_sum",
        "outer_sum",
        "sketch_sum",
        "samples",
        "output_outer_sum",
        "positions",
        "input_outer_sum",
    )
    CORRECTED = ("corrected_rows", "corrected_square_sum", "input_basis", "output_basis")

    def __init__(
        self,
        layout: Layout,
        sums: Mapping[str, Mapping[str, Tensor]],
        rows: int,
        superseded: int = 0,
        stale: int | None = None,
    ) -> None:
        self.layout = layout
        self.sums = {name: dict(fields) for name, fields in sums.items()}
        self.rows = rows
        """How many stored rows the sums cover (the watermark)."""
        self.superseded = superseded
        """How many of these were taken back since (or lost), though they are in some sum still."""
        self.stale = superseded if stale is None else stale
        """How many of these are in sums over rows; the others are in Kronecker factors alone."""

    @classmethod
    def merge(cls, parts: Iterable[Statistics]) -> Statistics:
        """Statistics of all parts' rows together; a sum that one part lacks is left out.

        Corrected eigenvalues of several parts lie in different bases and are left out too.
        """
        parts = list(parts)
        if not parts:
            raise StatisticsError("no statistics to merge")
        if len(parts) == 1:
            return parts[0]
        merged: dict[str, dict[str, Tensor]] = {}
        for name in parts[0].sums:
            shared = [f for f in cls.ADDITIVE if all(f in part.sums.get(name, {}) for part in parts)]
            merged[name] = {f: torch.stack([part.sums[name][f] for part in parts]).sum(0) for f in shared}
        rows, superseded = sum(part.rows for part in parts), sum(part.superseded for part in parts)
        return cls(parts[0].layout, merged, rows, superseded, sum(part.stale for part in parts))

    def __repr__(self) -> str:
        fields = sorted({field for sums in self.sums.values() for field in sums})
        return f"Statistics({self.rows} rows, {len(self.sums)} modules: {', '.join(fields)})"

    def has(self, module: str, field: str) -> bool:
        """Whether the sum ``field`` was gathered for ``module``."""
        return field in self.sums.get(module, {})

    def mean(self, module: str) -> Tensor:
        """Mean of the module's rows, ``[k]``."""
        return self._per_row(module, "sum")

    def variance(self, module: str) -> Tensor:
        """Variance of each number of the module's rows over samples, ``[k]``."""
        return (self._per_row(module, "square_sum") - self.mean(module).square()).clamp_min(0)

    def second_moment(self, module: str) -> Tensor:
        """Mean square of each number of the module's rows, ``[k]``."""
        if self.has(module, "outer_sum") and not self.has(module, "square_sum"):
            return self.covariance(module).diagonal()
        return self._per_row(module, "square_sum")

    def covariance(self, module: str) -> Tensor:
        """Uncentred covariance ``E[g g^T]`` of the module's rows, ``[k, k]``."""
        return self._per_row(module, "outer_sum")

    def sketch(self, module: str) -> tuple[Tensor, float]:
        """The product ``[k, r]`` of a large block's covariance with some directions, and the covariance's trace."""
        return self._per_row(module, "sketch_sum"), self._per_row(module, "square_sum").sum().item()

    def kronecker(self, module: str) -> KroneckerFactors:
        """Kronecker factors of the module's block; zero for a module that no sample ever went through."""
        group = self.layout[module].input_group
        output = self._ratio(module, "output_outer_sum", "samples")
        if self.has(group, "positions") and self.sums[group]["positions"].item() == 0:
            return KroneckerFactors(input=self.sums[group]["input_outer_sum"], output=output)
        return KroneckerFactors(input=self._ratio(group, "input_outer_sum", "positions"), output=output)

    def corrected_values(self, module: str) -> Tensor:
        """EK-FAC's eigenvalues of the module's block, shaped as its numbers (:attr:`ModuleBlock.matrix`)."""
        return self._ratio(module, "corrected_square_sum", "corrected_rows")

    def corrected_eigenvalues(self, module: str) -> CorrectedEigenvalues:
        """EK-FAC's eigenvalues of the module's block, with their basis."""
        return CorrectedEigenvalues(
            values=self.corrected_values(module),
            input_basis=self.sums[module]["input_basis"],
            output_basis=self.sums[module]["output_basis"],
        )

    def with_corrected(self, corrected: Mapping[str, Mapping[str, Tensor]]) -> Statistics:
        """A copy that also holds the fields of :func:`corrected_sums`."""
        sums = {name: {**fields, **corrected.get(name, {})} for name, fields in self.sums.items()}
        others = any(_ROW_FIELDS & fields.keys() for fields in self.sums.values())
        return Statistics(self.layout, sums, self.rows, self.superseded, self.stale if others else 0)

    def less(self, superseded: int) -> Statistics:
        """The same sums, known to cover so many rows that were taken back since."""
        if not superseded:
            return self
        return Statistics(self.layout, self.sums, self.rows, self.superseded + superseded, self.stale + superseded)

    def over(self, rows: int) -> Statistics:
        """The same sums, of so many stored rows: rows were dropped that are in none of them."""
        return Statistics(self.layout, self.sums, rows, self.superseded, self.stale)

    def with_row_sums(self, computed: Statistics, rows: int) -> Statistics:
        """A copy of which all sums over rows are those of ``computed``, of ``rows`` stored rows.

        Kronecker factors stay, and with them the count of rows that were taken back; corrected eigenvalues, which
        are sums over rows too, are left out.
        """
        factors = set(self.ADDITIVE) - _ROW_FIELDS
        sums = {
            name: {field: total for field, total in self.sums.get(name, {}).items() if field in factors} | fields
            for name, fields in computed.sums.items()
        }
        kept = any(factors & fields.keys() for fields in sums.values())
        covered = rows if any(computed.sums.values()) else min(rows, self.rows)
        return Statistics(self.layout, sums, covered, self.superseded if kept else 0, stale=0)

    def _per_row(self, module: str, field: str) -> Tensor:
        return self._ratio(module, field, "rows")

    def _ratio(self, module: str, field: str, count: str) -> Tensor:
        if not self.has(module, field) or not self.has(module, count):
            known = ", ".join(sorted(self.sums.get(module, {}))) or "nothing"
            raise StatisticsError(
                f"{field!r} was not gathered for module {module!r} (gathered: {known}); "
                "name the statistic under 'statistics' in the config, or let the query compute it"
            )
        total = self.sums[module][count]
        if total.item() == 0:
            raise StatisticsError(f"the statistics of module {module!r} cover no sample yet")
        return self.sums[module][field] / total


class StatisticsAccumulator:
    """Gathers the named statistics of a stream of rows; not thread-safe, one owner."""

    def __init__(
        self,
        layout: Layout,
        names: Iterable[str],
        *,
        covariance_limit: int = COVARIANCE_LIMIT,
        expected: int | None = None,
    ) -> None:
        """``expected`` rows will come, where that is known: few make sketches exact (:func:`sketch_rank`)."""
        self._layout = layout
        self.names = frozenset(names)
        unknown = sorted(self.names - set(STATISTICS))
        if unknown:
            raise StatisticsError(f"unknown statistic {unknown[0]!r}; known: {', '.join(STATISTICS)}")
        self._rows = 0
        needed = {field for name in self.names for field in ROW_SUMS[name]}
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._directions: dict[int, Tensor] = {}
        for block in layout:
            k = block.size
            shapes = {"sum": (k,), "square_sum": (k,), "outer_sum": (k, k)}
            wanted = set(needed)
            if k > covariance_limit:
                wanted.discard("outer_sum")
            elif "outer_sum" in wanted and (rank := sketch_rank(k, expected)):
                shapes["sketch_sum"] = (k, rank)
                wanted = (wanted - {"outer_sum"}) | {"sketch_sum", "square_sum"}
            fields: dict[str, tuple[int, ...]] = {f: s for f, s in shapes.items() if f in wanted}
            if fields or needed:
                fields["rows"] = ()
            if "kronecker" in self.names:
                fields |= {"samples": (), "output_outer_sum": (block.rank[0],) * 2}
                if block.input_group == block.name:
                    fields |= {"positions": (), "input_outer_sum": (block.rank[1],) * 2}
            self._sums[block.name] = {field: torch.zeros(shape, dtype=torch.float64) for field, shape in fields.items()}

    def update(self, rows: Tensor, covered: int | None = None) -> None:
        """Add finite ``rows [n, width]``; ``covered`` rows of the store are accounted for by them.

        ``covered`` (default n) is larger than n when rows that are not finite were left out.
        """
        for block in self._layout:
            sums, values = self._sums[block.name], rows[:, block.columns]
            if "rows" in sums:
                sums["rows"] += len(rows)
            if "sum" in sums:
                sums["sum"] += values.sum(0, dtype=torch.float64)
            if "square_sum" in sums:
                sums["square_sum"] += values.square().sum(0, dtype=torch.float64)
            if "outer_sum" in sums:
                sums["outer_sum"] += values.T @ values
            if "sketch_sum" in sums:
                exact = values.double()
                if block.size not in self._directions:
                    self._directions[block.size] = directions(*sums["sketch_sum"].shape)
                sums["sketch_sum"] += exact.T @ (exact @ self._directions[block.size])
        self._rows += len(rows) if covered is None else covered

    def add_moments(self, moments: FactorMoments) -> None:
        """Add the Kronecker moments of one batch."""
        if "kronecker" not in self.names:
            return
        for group, moment in moments.inputs.items():
            self._sums[group]["input_outer_sum"] += moment
            self._sums[group]["positions"] += moments.positions[group]
        for module, moment in moments.outputs.items():
            self._sums[module]["output_outer_sum"] += moment
        for block in self._layout:
            self._sums[block.name]["samples"] += moments.samples

    def snapshot(self) -> Statistics:
        """The sums as they stand, copied."""
        sums = {name: {f: t.clone() for f, t in fields.items()} for name, fields in self._sums.items()}
        return Statistics(self._layout, sums, self._rows)


def corrected_sums(statistics: Statistics, chunks: Iterable[Tensor]) -> dict[str, dict[str, Tensor]]:
    """EK-FAC's sums over all rows of ``chunks`` (each ``[n, width]``, finite).

    Lambda is the mean of the squared *per-sample* coordinates ``U_S^T G U_A`` (George et al. 2018,
    eq. 8), so positions of one sample are summed before squaring, never after.
    Returns, by module, the ``CORRECTED`` fields of :class:`Statistics`.
    """
    bases = {}
    for block in statistics.layout:
        if block.coordinates is not None:
            continue  # they lie in an eigenbasis already
        factors = statistics.kronecker(block.name)
        bases[block.name] = (torch.linalg.eigh(factors.input)[1], torch.linalg.eigh(factors.output)[1])
    sums = {b.name: torch.zeros(b.matrix, dtype=torch.float64) for b in statistics.layout}
    count = 0
    for rows in chunks:
        count += len(rows)
        for block in statistics.layout:
            if block.name not in bases:
                sums[block.name] += rows[:, block.columns].square().sum(0, dtype=torch.float64)
                continue
            inward, outward = (basis.to(rows.dtype) for basis in bases[block.name])
            rotated = outward.T @ rows[:, block.columns].unflatten(1, block.rank) @ inward
            sums[block.name] += rotated.square().sum(0, dtype=torch.float64)
    return {
        name: {
            "corrected_rows": torch.tensor(float(count), dtype=torch.float64),
            "corrected_square_sum": total,
        }
        | ({"input_basis": bases[name][0], "output_basis": bases[name][1]} if name in bases else {})
        for name, total in sums.items()
    }
