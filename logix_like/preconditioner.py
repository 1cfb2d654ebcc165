"""Preconditioners: fitted once from statistics, applied often to rows.

A preconditioner is the damped inverse ``(F + lambda I)^-1`` of a curvature ``F``, block-diagonal over
modules. ``lambda`` of a module is ``damping`` times the mean eigenvalue of that module's own block (or another
amount, see :mod:`logix_like.damping`), so that one setting means the same in every module:

========== ===================================================== ========================================
name       F of one module                                       mean eigenvalue
========== ===================================================== ========================================
identity   I (no damping)                                        -
diagonal   diag(E[g^2])                                          mean of E[g^2]
covariance E[g g^T], the empirical Fisher                        trace / k
kfac       S (x) A (Martens and Grosse 2015)                     mean of S's times mean of A's eigenvalues
ekfac      U diag(Lambda) U^T (George et al. 2018)               mean of Lambda
auto       covariance where it was gathered over at least 2 k    that of the one chosen
           samples (k, where only some coordinates are kept),
           else ekfac where its eigenvalues were gathered,
           else kfac, else the covariance there is
========== ===================================================== ========================================

Where only some coordinates of the eigenbasis of a warm-up are kept, kfac and ekfac are diagonals: they cannot follow
the basis as it turns in training, which the covariance does. So it is preferred there with half as many samples.

A covariance of more than 4,096 numbers a side is not held: it is sketched by a Nystrom approximation of rank
``2^24 / k`` (:mod:`logix_like.linalg.sketch`), or as many as there are rows, where these are no more than ``2^26 / k``
and memory allows: that is exact. Else the rest of its trace is spread over the directions outside, which is rough: of
4,000 synthetic rows of 16,384 numbers a sketch that held 97 % of the trace found 3 of the 10 highest scores (rank
correlation .88). What share of the trace a sketch holds is said with the answer; kfac and ekfac need no sketch.

For kfac and ekfac the damping is added in the joint eigenbasis, never to each factor. A module whose
block is zero (it was never used) gets the preconditioner 0: it takes no part in any score.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from logix_like.damping import LEAST, Damping, DampingSetting, shrinkage_damping
from logix_like.errors import QueryError, StatisticsError
from logix_like.inverses import Dense, Diagonal, Eigenbasis, Identity, LowRank, Preconditioner
from logix_like.layout import Layout, ModuleBlock
from logix_like.linalg.eigen import Eigen, symmetric_eigen
from logix_like.linalg.finite import require_finite
from logix_like.linalg.inverse import damped_inverse, damped_reciprocal
from logix_like.linalg.kronecker import product_eigenvalues
from logix_like.linalg.sketch import nystrom
from logix_like.statistics import CorrectedEigenvalues, Statistics


@dataclass(frozen=True)
class ModuleFit:
    """What was fitted for one module."""

    kind: str
    """Name of the preconditioner; never ``auto``."""
    damping: float
    """The ``lambda`` that was added to the module's eigenvalues."""
    preconditioner: Preconditioner
    """Its tensors are float64."""
    rows: int | None = None
    """How many rows it was fitted to; None where no row matters."""
    held: float = 1.0
    """The share of the curvature's trace that it knows direction by direction."""


ROUNDED = 1e-6
"""A curvature of which less than this share is not known is known."""


class Eigenbases:
    """Statistics together with the eigenbases taken from them, each computed once.

    Keeping one of these makes fitting again with another damping cheap. ``samples`` says how many samples the rows
    are of, where that is known: visits of a sample are much alike, and tell little more than one.
    """

    def __init__(self, statistics: Statistics, samples: int | None = None) -> None:
        self.statistics = statistics
        self.samples = samples
        self._eigen: dict[tuple[str, str], Eigen] = {}

    def kronecker(self, block: ModuleBlock) -> tuple[Eigen, Eigen]:
        """Eigenvectors of the module's output factor and of its group's input factor."""
        keys = ("output", block.name), ("input", block.input_group)
        if any(key not in self._eigen for key in keys):
            factors = self.statistics.kronecker(block.name)
            for key, matrix in zip(keys, (factors.output, factors.input), strict=True):
                if key not in self._eigen:
                    require_finite(matrix, block.name)
                    self._eigen[key] = symmetric_eigen(matrix)
        return self._eigen[keys[0]], self._eigen[keys[1]]

    def corrected(self, block: ModuleBlock) -> CorrectedEigenvalues:
        """EK-FAC's eigenvalues of the module, with their basis."""
        return self.statistics.corrected_eigenvalues(block.name)

    def counted(self, block: ModuleBlock, field: str) -> int:
        """The module's count ``field`` of rows or samples."""
        return int(self.statistics.sums[block.name][field].item())

    def distinct(self, rows: int) -> int:
        """How many samples so many rows are of, as far as that is known."""
        return rows if self.samples is None else min(rows, self.samples)


def _fit_identity(eigenbases: Eigenbases, block: ModuleBlock, damping: Damping) -> ModuleFit:
    return ModuleFit("identity", 0.0, Identity())


def _fit_diagonal(eigenbases: Eigenbases, block: ModuleBlock, damping: Damping) -> ModuleFit:
    values = eigenbases.statistics.second_moment(block.name)
    return _in_eigenbasis("diagonal", values, damping, block, eigenbases.counted(block, "rows"))


def _fit_covariance(eigenbases: Eigenbases, block: ModuleBlock, damping: Damping) -> ModuleFit:
    rows = eigenbases.counted(block, "rows")
    if eigenbases.statistics.has(block.name, "sketch_sum"):
        return _fit_sketch(eigenbases, block, damping, rows)
    covariance = eigenbases.statistics.covariance(block.name)
    trace, shrinkage = covariance.diagonal().sum().item(), LEAST
    if damping.kind == "auto":
        squares = covariance.square().sum().item()
        shrinkage = shrinkage_damping(block.size, trace, squares, eigenbases.distinct(rows))
    shift = damping.shift(trace / block.size, shrinkage)
    return ModuleFit("covariance", shift, Dense(damped_inverse(covariance, shift, block.name, rows)), rows)


def _fit_sketch(eigenbases: Eigenbases, block: ModuleBlock, damping: Damping, rows: int) -> ModuleFit:
    products, trace = eigenbases.statistics.sketch(block.name)
    require_finite(products, block.name)
    found = nystrom(products, trace)
    outside = block.size - len(found.values)
    squares = found.values.square().sum().item() + outside * found.rest**2
    shrinkage = shrinkage_damping(block.size, trace, squares, eigenbases.distinct(rows))
    shift = damping.shift(trace / block.size, shrinkage)
    values = torch.cat([found.values, found.values.new_full((1,), found.rest)])
    weights = damped_reciprocal(values, shift, block.name)
    leaf = LowRank(found.vectors, weights[:-1] - weights[-1], weights[-1])
    return ModuleFit(f"covariance sketched at rank {len(found.values):,}", shift, leaf, rows, found.held)


def _fit_kfac(eigenbases: Eigenbases, block: ModuleBlock, damping: Damping) -> ModuleFit:
    if block.coordinates is not None:  # of an eigenbasis: the factors are diagonal there
        factors = eigenbases.statistics.kronecker(block.name)
        for factor in (factors.output, factors.input):
            require_finite(factor, block.name)
        products = product_eigenvalues(factors.output.diagonal(), factors.input.diagonal())
        values = products.flatten()[list(block.coordinates)]
        return _in_eigenbasis("kfac", values, damping, block, eigenbases.counted(block, "samples"))
    output, input_ = eigenbases.kronecker(block)
    values = product_eigenvalues(output.values, input_.values)
    samples = eigenbases.counted(block, "samples")
    shift = damping.shift(values.mean().item())
    weights = damped_reciprocal(values, shift, block.name)
    return ModuleFit("kfac", shift, Eigenbasis(output.vectors, input_.vectors, weights), samples)


def _in_eigenbasis(kind: str, values: Tensor, damping: Damping, block: ModuleBlock, rows: int) -> ModuleFit:
    shift = damping.shift(values.mean().item())
    return ModuleFit(kind, shift, Diagonal(damped_reciprocal(values, shift, block.name)), rows)


def _fit_ekfac(eigenbases: Eigenbases, block: ModuleBlock, damping: Damping) -> ModuleFit:
    if block.coordinates is not None:
        values = eigenbases.statistics.corrected_values(block.name).flatten()
        return _in_eigenbasis("ekfac", values, damping, block, eigenbases.counted(block, "corrected_rows"))
    corrected = eigenbases.corrected(block)
    rows = eigenbases.counted(block, "corrected_rows")
    shift = damping.shift(corrected.values.mean().item())
    weights = damped_reciprocal(corrected.values, shift, block.name)
    return ModuleFit("ekfac", shift, Eigenbasis(corrected.output_basis, corrected.input_basis, weights), rows)


def _fit_auto(eigenbases: Eigenbases, block: ModuleBlock, damping: Damping) -> ModuleFit:
    statistics = eigenbases.statistics
    gathered = statistics.has(block.name, "outer_sum")
    known = eigenbases.counted(block, "rows") if gathered else 0
    needed = block.size if block.coordinates is not None else 2 * block.size
    if gathered and eigenbases.distinct(known) >= needed:
        return _fit_covariance(eigenbases, block, damping)
    if has_kronecker(statistics, block):
        if statistics.has(block.name, "corrected_square_sum"):
            return _fit_ekfac(eigenbases, block, damping)
        return _fit_kfac(eigenbases, block, damping)
    if gathered:  # too few rows to be a good estimate, but damped, and the best there is
        return _fit_covariance(eigenbases, block, damping)
    raise StatisticsError(
        f"neither the covariance nor the Kronecker factors of module {block.name!r} ({block.size} numbers) "
        "were gathered, so there is nothing to precondition with; put 'covariance' or 'kronecker' under "
        "'statistics' in the config before training, or ask with preconditioner='identity'"
    )


def has_kronecker(statistics: Statistics, block: ModuleBlock) -> bool:
    """Whether both Kronecker factors of ``block`` were gathered."""
    return statistics.has(block.name, "output_outer_sum") and statistics.has(block.input_group, "input_outer_sum")


PRECONDITIONERS: Mapping[str, Callable[[Eigenbases, ModuleBlock, Damping], ModuleFit]] = MappingProxyType(
    {
        "identity": _fit_identity,
        "diagonal": _fit_diagonal,
        "covariance": _fit_covariance,
        "kfac": _fit_kfac,
        "ekfac": _fit_ekfac,
        "auto": _fit_auto,
    }
)
"""How each preconditioner is fitted to one module, by name."""


class FittedPreconditioner:
    """A preconditioner for whole rows, made by :func:`fit_preconditioner`."""

    def __init__(self, name: str, damping: Damping, layout: Layout, fit: Callable[[ModuleBlock], ModuleFit]) -> None:
        self.name = name
        self.damping = damping
        self.layout = layout
        self._fit = fit
        self._described: dict[str, tuple[str, float]] = {}
        self._rows: dict[str, int] = {}
        self._held: dict[str, float] = {}
        # Fitted at once in float32, so that what is wrong is said now; in float64 only when such rows come,
        # since for large blocks both would not be held without need.
        self._groups = {torch.float32: self._materialise(torch.float32)}

    def __repr__(self) -> str:
        return f"FittedPreconditioner({self.name}, damping {self.damping}: {self.summary()})"

    def apply(self, rows: Tensor) -> Tensor:
        """``rows [n, width]`` times the damped inverse, module by module; ``rows`` is not changed.

        Float64 rows are worked on in float64, others in float32.
        """
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        if dtype not in self._groups:
            self._groups[dtype] = self._materialise(dtype)
        applied = torch.empty_like(rows, dtype=dtype)
        for group in self._groups[dtype]:
            group.apply(rows, applied, dtype)
        return applied

    def _materialise(self, dtype: torch.dtype) -> tuple[_Group, ...]:
        leaves: dict[str, Preconditioner] = {}
        for block in self.layout:
            fitted = self._fit(block)
            self._described[block.name] = fitted.kind, fitted.damping
            self._held[block.name] = fitted.held
            if fitted.rows is not None:
                self._rows[block.name] = fitted.rows
            leaf = _cast(fitted.preconditioner, dtype)
            # The inverse for gradients near 1e-20 is beyond float32, though its product with them is not.
            finite = all(bool(tensor.isfinite().all()) for tensor in _tensors(leaf))
            leaves[block.name] = leaf if finite else fitted.preconditioner
        groups = _equal_blocks(self.layout, leaves)
        return tuple(_Group.stack([(block, leaves[block.name]) for block in group]) for group in groups)

    @property
    def rows(self) -> tuple[int, int]:
        """The smallest and the largest number of rows that a module was fitted to; 0 where none mattered."""
        counts = self._rows.values()
        return min(counts, default=0), max(counts, default=0)

    def summary(self) -> str:
        """How many modules are preconditioned in which way, e.g. ``covariance (28 modules)``."""
        kinds = [kind for kind, _ in self._described.values()]
        told = ", ".join(f"{kind} ({kinds.count(kind)} modules)" for kind in dict.fromkeys(kinds))
        least = min(self._held.values(), default=1.0)
        return told if least > 1 - ROUNDED else f"{told}, at least {least:.1%} of each trace held"

    def describe(self) -> dict[str, str]:
        """By module: the kind of preconditioner, the block's size and the damping that was added."""
        return {
            module: f"{kind}, {self.layout[module].size} numbers, damping {shift:.4g}"
            for module, (kind, shift) in self._described.items()
        }


class _Group:
    """Modules of one kind and size, applied in one call."""

    def __init__(self, columns: Tensor | slice, count: int, stacked: Preconditioner) -> None:
        self._columns = columns
        self._count = count
        self._leaf = stacked

    @classmethod
    def stack(cls, members: Sequence[tuple[ModuleBlock, Preconditioner]]) -> _Group:
        """Join the leaves of ``members``, which are of one type and shape."""
        blocks = [block for block, _ in members]
        ends = [block.columns.stop for block in blocks]
        adjoining = all(block.offset == end for block, end in zip(blocks[1:], ends[:-1], strict=True))
        columns: Tensor | slice = slice(blocks[0].offset, ends[-1])
        if not adjoining:
            columns = torch.cat([torch.arange(b.columns.start, b.columns.stop) for b in blocks])
        return cls(columns, len(members), _stack([leaf for _, leaf in members]))

    def apply(self, rows: Tensor, out: Tensor, dtype: torch.dtype) -> None:
        """Write the group's columns of the result into ``out``, which has the shape of ``rows``.

        Works in ``dtype``, or in that of its leaf where this is wider.
        """
        dtype = next((tensor.dtype for tensor in _tensors(self._leaf)), dtype)
        blocks = rows[:, self._columns].to(dtype).reshape(len(rows), self._count, -1).transpose(0, 1)
        applied = self._leaf.apply(blocks).transpose(0, 1)
        if isinstance(self._columns, slice):  # written in place: one copy, not two
            out[:, self._columns].view(len(rows), self._count, -1).copy_(applied)
        else:
            out[:, self._columns] = applied.flatten(1).to(out.dtype)


def _equal_blocks(layout: Layout, leaves: Mapping[str, Preconditioner]) -> list[list[ModuleBlock]]:
    """The blocks of ``layout`` in groups whose leaves can be stacked."""
    groups: dict[tuple[Hashable, ...], list[ModuleBlock]] = {}
    for block in layout:
        leaf = leaves[block.name]
        kind = type(leaf), *(tensor.dtype for tensor in _tensors(leaf))
        groups.setdefault((*kind, block.matrix), []).append(block)
    return list(groups.values())


def _tensors(leaf: Preconditioner) -> list[Tensor]:
    return list(vars(leaf).values())  # a dataclass's attributes stand in the order of its fields


def _stack(leaves: Sequence[Preconditioner]) -> Preconditioner:
    columns = zip(*(_tensors(leaf) for leaf in leaves), strict=True)
    return type(leaves[0])(*(torch.stack(tensors) for tensors in columns))


def _cast(leaf: Preconditioner, dtype: torch.dtype) -> Preconditioner:
    return type(leaf)(*(tensor.to(dtype) for tensor in _tensors(leaf)))


def require_preconditioner(name: object) -> None:
    """Raise :class:`QueryError` unless ``name`` is known."""
    if not isinstance(name, str) or name not in PRECONDITIONERS:
        raise QueryError(f"unknown preconditioner {name!r}; known: {', '.join(PRECONDITIONERS)}")


def fit_preconditioner(
    name: str,
    statistics: Statistics,
    layout: Layout,
    damping: DampingSetting | Damping,
    *,
    eigenbases: Eigenbases | None = None,
) -> FittedPreconditioner:
    """Fit the preconditioner ``name`` to ``statistics``; factorisations are done in float64.

    Args:
        name: A key of :data:`PRECONDITIONERS`.
        statistics: Sums over the rows that are to be preconditioned.
        layout: The module table of those rows.
        damping: Added to each module's eigenvalues, in one of the ways of :mod:`logix_like.damping`.
        eigenbases: Those of the same statistics from an earlier fit, used again.

    Raises:
        QueryError: unknown name or a negative damping.
        StatisticsError: a statistic that is needed is missing, or a block is singular; names the module.
    """
    require_preconditioner(name)
    checked = Damping.of(damping)
    layout.require_same(statistics.layout)
    fit, known = PRECONDITIONERS[name], eigenbases
    if known is None or known.statistics is not statistics:
        known = Eigenbases(statistics)
    return FittedPreconditioner(name, checked, layout, lambda block: fit(known, block, checked))
