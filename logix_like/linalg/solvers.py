"""Solving ``(H + lambda I) x = b`` when only products ``H v`` can be had; every answer comes with its residual."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from logix_like.errors import ConfigError, StatisticsError
from logix_like.linalg.inverse import damped_inverse

T = TypeVar("T")

Linear = Callable[[Tensor], Tensor]
"""A linear map of each of ``vectors [n, p]``."""


@dataclass(frozen=True)
class System:
    """``H + lambda I``, symmetric, seen through its products."""

    product: Linear
    """``H v`` of each of ``[n, p]``, over all samples."""
    damping: float
    """``lambda``."""
    sampled: Linear | None = None
    """``H v`` with the samples of the next batch only, round and round: an unbiased guess."""
    preconditioner: Linear | None = None
    """An approximate inverse of ``H + lambda I``, symmetric and positive definite."""
    _known: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, vectors: Tensor) -> Tensor:
        """``(H + lambda I) v``."""
        return self.product(vectors) + self.damping * vectors

    def residual(self, x: Tensor, b: Tensor) -> Tensor:
        """``[n]``: ``|b - (H + lambda I) x| / |b|``."""
        return relative_norm(b - self(x), b)

    def once(self, name: str, work: Callable[[], T]) -> T:
        """What ``work`` makes of the whole system, found once for all right-hand sides."""
        if name not in self._known:
            self._known[name] = work()
        found: T = self._known[name]
        return found


@dataclass(frozen=True)
class Solution:
    """An answer and how far it can be trusted."""

    x: Tensor = field(repr=False)
    """``[n, p]``."""
    residual: Tensor
    """``[n]``: ``|b - (H + lambda I) x| / |b|``."""
    steps: int
    """Products with all samples that were spent (batches, where they are sampled)."""
    tolerance: float
    """What the residual was to be at most."""

    @property
    def converged(self) -> bool:
        """Whether every residual is within the tolerance."""
        return bool((self.residual <= self.tolerance).all())


class Solver(ABC):
    """One way of solving."""

    name: ClassVar[str]

    @abstractmethod
    def solve(self, system: System, b: Tensor) -> Solution:
        """``(H + lambda I)^-1 b`` for each of ``b [n, p]``."""


@dataclass(frozen=True)
class Exact(Solver):
    """Forms ``H`` column by column and inverts it by Cholesky in float64; for small models."""

    most: int = 20_000
    """Refuses more parameters than this."""
    tolerance: float = 1e-4
    """Warns of a larger residual: what rounding leaves in products of float32 is smaller."""
    name = "exact"

    def __post_init__(self) -> None:
        _require_positive(self, "most", "tolerance")

    def solve(self, system: System, b: Tensor) -> Solution:
        """The inverse itself."""
        size = b.shape[1]
        if size > self.most:
            raise StatisticsError(
                f"an exact solution needs a matrix of {size:,} x {size:,} numbers (limit {self.most:,}); choose the "
                "solver 'cg' or 'ekfac-cg', or fewer parameters"
            )
        inverse = system.once("inverse", lambda: self._inverse(system, b))
        x = (b.double() @ inverse).to(b.dtype)
        return Solution(x, system.residual(x, b), size, self.tolerance)

    def _inverse(self, system: System, b: Tensor) -> Tensor:
        matrix = system.product(torch.eye(b.shape[1], dtype=b.dtype, device=b.device))
        try:
            return damped_inverse(matrix, system.damping, "all parameters").to(b.device)
        except StatisticsError as error:
            raise StatisticsError(
                f"{error}; a Hessian, which need not be positive away from a minimum, needs a damping above its most "
                "negative eigenvalue, or matrix='ggn'"
            ) from error


@dataclass(frozen=True)
class ConjugateGradient(Solver):
    """Conjugate gradients, with the system's preconditioner if it has one; at most ``p`` steps in exact arithmetic."""

    tolerance: float = 1e-5
    """Stops when every residual is at most this."""
    most: int = 200
    """Steps at most."""
    name = "cg"

    def __post_init__(self) -> None:
        _require_positive(self, "most", "tolerance")

    def solve(self, system: System, b: Tensor) -> Solution:
        """Hestenes and Stiefel 1952; queries side by side, each with its own step sizes.

        Rounding takes the residual that is carried along away from the true one. Where the first is small enough and
        the second is not, it starts again from there, as long as that gains something.
        """
        x, r, steps, worst = torch.zeros_like(b), b, 0, math.inf
        while steps < self.most and not bool((relative_norm(r, b) <= self.tolerance).all()):
            x, spent = self._descend(system, b, x, r, self.most - steps)
            r = b - system(x)
            steps += spent
            before, worst = worst, float(relative_norm(r, b).max())
            if worst > before / 2:
                break
        return Solution(x, relative_norm(r, b), steps, self.tolerance)

    def _descend(self, system: System, b: Tensor, x: Tensor, r: Tensor, most: int) -> tuple[Tensor, int]:
        """Steps from ``x``, whose residual is ``r``; and how many."""
        precondition = system.preconditioner or torch.clone
        z = precondition(r)
        d, rz = z, _dots(r, z)
        steps = 0
        while steps < most and not bool((relative_norm(r, b) <= self.tolerance).all()):
            moved = system(d)
            curved = _dots(d, moved)
            active = (relative_norm(r, b) > self.tolerance).to(b)[:, None]
            if bool(((curved <= 0) & (active[:, 0] > 0)).any()):
                raise StatisticsError(
                    "the curvature is not positive along a direction, so that conjugate gradients cannot go on: take "
                    "the Gauss-Newton matrix (matrix='ggn') or a larger damping"
                )
            length = active * (rz / curved.clamp_min(torch.finfo(b.dtype).tiny))[:, None]
            x = x + length * d
            r = r - length * moved
            z = precondition(r)
            before, rz = rz, _dots(r, z)
            d = z + (rz / before.clamp_min(torch.finfo(b.dtype).tiny))[:, None] * d
            steps += 1
        return x, steps


@dataclass(frozen=True)
class Lissa(Solver):
    """``x <- x + (b - (H + lambda I) x) / scale``: the Neumann series (Agarwal et al. 2017, Koh and Liang 2017)."""

    tolerance: float = 1e-3
    """Stops when every residual is at most this."""
    most: int = 2000
    """Steps at most."""
    scale: float | None = None
    """Must be above half the largest eigenvalue of ``H + lambda I``; 1.01 times it, measured, if not given."""
    sampled: bool = False
    """One batch a step instead of all samples; the residual is then measured once, at the end."""
    name = "lissa"

    def __post_init__(self) -> None:
        _require_positive(self, "most", "tolerance", "scale")

    def solve(self, system: System, b: Tensor) -> Solution:
        """Steps until the residual is small enough, or the steps are spent."""
        scale = self.scale or system.once("scale", lambda: 1.01 * largest_eigenvalue(system, b))
        x = b / scale
        steps = 0
        while steps < self.most:
            steps += 1
            if self.sampled and system.sampled is not None:
                x = x + (b - system.sampled(x) - system.damping * x) / scale
                continue
            r = b - system(x)
            found = relative_norm(r, b)
            _require_finite(found, scale)
            if bool((found <= self.tolerance).all()):
                break
            x = x + r / scale
        found = system.residual(x, b)
        _require_finite(found, scale)
        return Solution(x, found, steps, self.tolerance)


@dataclass(frozen=True)
class Arnoldi(Solver):
    """Inverts in the span of the leading eigenvectors (Schioppa et al. 2022); what lies outside is dropped.

    The Krylov space of one random vector is built once for all of ``b``; ``H`` is symmetric, so its projection is
    tridiagonal, and every new vector is made orthogonal to all before. The residual says how much was dropped.
    """

    steps: int = 100
    """Size of the Krylov space (at most the number of parameters)."""
    rank: int | None = None
    """Eigenvectors kept, those of the largest eigenvalues; all if not given."""
    tolerance: float = 0.5
    """Warns when more than this share of a query is dropped."""
    seed: int = 0
    name = "arnoldi"

    def __post_init__(self) -> None:
        _require_positive(self, "steps", "rank", "tolerance")

    def solve(self, system: System, b: Tensor) -> Solution:
        """Projects on the eigenvectors, divides by their damped eigenvalues."""
        basis, projected = system.once("krylov", lambda: self._krylov(system, b))
        values, vectors = torch.linalg.eigh(projected)
        keep = values.abs().argsort(descending=True)[: self.rank]
        values = values[keep] + system.damping
        if bool((values.abs() <= torch.finfo(values.dtype).eps * values.abs().max()).any()):
            raise StatisticsError(
                f"the curvature is singular in its Krylov space with damping {system.damping:.3g}; ask with a larger "
                "damping, or a smaller rank"
            )
        directions = basis.T @ vectors[:, keep]
        x = ((b @ directions) / values) @ directions.T
        return Solution(x, system.residual(x, b), len(basis), self.tolerance)

    def _krylov(self, system: System, b: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.randn(1, b.shape[1], generator=generator, dtype=b.dtype).to(b.device)
        basis = [start / start.norm()]
        images: list[Tensor] = []
        for _ in range(min(self.steps, b.shape[1])):
            images.append(system.product(basis[-1]))
            known = torch.cat(basis)
            rest = images[-1]
            for _ in range(2):  # once more takes away what rounding left
                rest = rest - (rest @ known.T) @ known
            if float(rest.norm()) <= 1e3 * torch.finfo(b.dtype).eps * float(images[-1].norm()):
                break  # the space is invariant: H has nothing further in it
            basis.append(rest / rest.norm())
        found = torch.cat(basis[: len(images)])
        projected = found @ torch.cat(images).T
        return found, (projected + projected.T) / 2


def largest_eigenvalue(system: System, like: Tensor, steps: int = 30) -> float:
    """Of ``H + lambda I``, by power iteration."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(1, like.shape[1], generator=generator, dtype=like.dtype).to(like.device)
    value = 0.0
    for _ in range(steps):
        vector = vector / vector.norm()
        vector = system(vector)
        value = float(vector.norm())
        if value == 0:
            raise StatisticsError("the curvature is zero, and so is the damping; ask with a larger damping")
    return value


def relative_norm(vectors: Tensor, whole: Tensor) -> Tensor:
    """``[n]``: ``|v| / |whole|``, 0 where both are 0."""
    ratio: Tensor = vectors.norm(dim=1) / whole.norm(dim=1).clamp_min(torch.finfo(whole.dtype).tiny)
    return ratio


def _require_positive(solver: Solver, *names: str) -> None:
    for name in names:
        value = getattr(solver, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} of the solver {solver.name!r} is {value!r}; it must be above 0")


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def _require_finite(residual: Tensor, scale: float) -> None:
    if not bool(residual.isfinite().all()) or bool((residual > 1e6).any()):
        raise StatisticsError(
            f"the series diverges with scale {scale:.4g}: some eigenvalue of the curvature is more than twice that (or "
            "it is not positive); leave scale out, or give a larger one"
        )
