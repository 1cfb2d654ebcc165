"""Influence functions with the curvature itself, solved to a stated residual (Koh and Liang 2017)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from logix_like.curvature.curvature import Curvature
from logix_like.curvature.fitting import default_selection, fit_curvature
from logix_like.curvature.mapping import KroneckerPreconditioner
from logix_like.curvature.operators import (
    OPERATORS,
    directional_derivatives,
    sample_gradients,
)
from logix_like.curvature.sweep import Losses, on_device
from logix_like.damping import DampingSetting, require_amount
from logix_like.errors import ConfigError, QueryError, StatisticsError
from logix_like.estimators.base import Estimator
from logix_like.estimators.samples import DataIds, Samples, require_samples
from logix_like.linalg.solvers import Arnoldi, ConjugateGradient, Exact, Lissa, Solution, Solver, System
from logix_like.objective import Batch, Objective
from logix_like.query.result import Ids
from logix_like.weights import Flattener, fingerprint, trained_parameters

SOLVERS: Mapping[str, Callable[[], Solver]] = MappingProxyType(
    {
        "exact": Exact,
        "cg": ConjugateGradient,
        "ekfac-cg": ConjugateGradient,
        "lissa": Lissa,
        "arnoldi": Arnoldi,
    }
)
"""By name, with their defaults; ``ekfac-cg`` is preconditioned by EK-FAC."""


class InfluenceFunction(Estimator):
    """``g_q^T (H + lambda I)^-1 g_i`` over all trained parameters, ``H`` the mean over samples.

    The change of the query's loss when sample ``i`` is left out is score / n. ``H`` is seen through its products
    with vectors alone, one pass over the samples each; no layer needs a rule.

    Args:
        model: At the weights that are asked about; not changed.
        loader: Batches of training samples, always in the same order.
        objective: What the model is trained for; a classifier unless told otherwise.
        solver: A key of :data:`SOLVERS`, or a solver with options of its own. ``ekfac-cg`` needs far fewer products
            than ``cg`` where curvatures differ much (layers, inputs of several scales); where they do not, ``cg`` needs
            fewer, as it does then with the exact blocks of ``H`` in EK-FAC's place: what modules share is in none.
        matrix: ``ggn`` (Gauss-Newton, never negative) or ``hessian``.
        damping: ``lambda`` itself, a number or ``{"absolute": number}``: nothing here has eigenvalues to measure it
            by. An L2 penalty of the training, divided by the number of samples, belongs here.
        parameters: Globs on the names of trained parameters.
        curvature: EK-FAC fitted before, for ``ekfac-cg``; fitted when first needed if not given.
        data_id: Names of the samples, as in :class:`KroneckerInfluence`.
        progress: Whether bars are shown.

    Warns:
        RuntimeWarning: a solution has not converged; it states residual and steps.
    """

    name = "influence function"

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Batch],
        objective: Objective | None = None,
        *,
        solver: str | Solver = "ekfac-cg",
        matrix: str = "ggn",
        damping: float | Mapping[str, float] = 1e-3,
        parameters: Sequence[str] = ("*",),
        curvature: Curvature | None = None,
        data_id: DataIds = None,
        progress: bool = True,
    ) -> None:
        if isinstance(solver, str) and solver not in SOLVERS:
            raise ConfigError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
        if not isinstance(solver, str | Solver):
            raise ConfigError(
                f"solver is {solver!r}; it must be one of {', '.join(SOLVERS)}, or a solver: Exact(), ..."
            )
        if matrix not in OPERATORS:
            raise ConfigError(f"unknown matrix {matrix!r}; known: {', '.join(OPERATORS)}")
        self._model = model
        self._loader = loader
        self._objective = objective or Objective()
        self._samples = Samples(loader, self._objective, data_id=data_id, progress=progress)
        self._flattener = Flattener(model, trained_parameters(model, parameters))
        self._operator = OPERATORS[matrix](model, self._objective, self._flattener)
        self._matrix = matrix
        self._kronecker = solver == "ekfac-cg"
        self._solver = SOLVERS[solver]() if isinstance(solver, str) else solver
        self._curvature = curvature
        self._progress = progress
        require_amount(damping)
        self.damping = damping
        """May be changed from question to question."""
        self.solution: Solution | None = None
        """Of the last question: residuals, steps, whether it converged."""

    @property
    def data_id(self) -> Ids:
        """``[samples]``."""
        return self._samples.data_id

    @property
    def damping_setting(self) -> DampingSetting:
        """Absolute."""
        return {"absolute": require_amount(self.damping)}

    @property
    def note(self) -> str:
        """Which matrix, how it was solved, how well."""
        told = f"{self.name}, {self._matrix} matrix, solver {self._solver.name!r}"
        if self.solution is None:
            return f"{told}."
        residual = float(self.solution.residual.max())
        return f"{told}, relative residual {residual:.1g} after {self.solution.steps} steps."

    def scores(self, queries: Batch, losses: Losses | None = None) -> Tensor:
        """``[queries, samples]`` for a batch of queries.

        Args:
            queries: A batch as the training's.
            losses: What is asked about, ``losses(model, batch) -> [queries]``, where it is not the objective's loss.
        """
        with self._system() as system:
            vectors = self._solve(self._gradients(queries, losses), system)

        def of_batch(batch: Batch) -> Tensor:
            batch = self._moved(batch)
            return directional_derivatives(self._model, self._flattener, batch, self._objective.losses, vectors)

        return self._samples.collect("influence scores", of_batch)

    def self_influence(self) -> Tensor:
        """``[samples]``: one solution for each sample, so for few samples."""
        with self._system() as system:

            def of_batch(batch: Batch) -> Tensor:
                gradients = self._gradients(batch, None)
                return (gradients * self._solve(gradients, system)).sum(1)

            return self._samples.collect("self-influence", of_batch)

    def group_influence(self, queries: Batch, group: Batch, *, order: int = 2, losses: Losses | None = None) -> Tensor:
        """``[queries]``: the score of ``group``'s samples, a batch, as a whole; / n, the change without them.

        Of order 1 the sum of their scores; of order 2 one Newton step with the curvature of the remaining samples.
        """
        if order not in (1, 2):
            raise QueryError(f"order is {order!r}; it must be 1 (sum of scores) or 2 (Newton step)")
        total = self._gradients(group, None).sum(0, keepdim=True)
        with self._system(without=group if order == 2 else None) as system:
            moved = self._solve(total, system)
        return (self._gradients(queries, losses) @ moved.T)[:, 0]

    @contextmanager
    def _system(self, without: Batch | None = None) -> Iterator[System]:
        """What is to be solved; a bar counts the batches that its solutions take, however many passes those are."""
        count = len(self.data_id)
        preconditioner = self._preconditioner() if self._kronecker else None
        bar = tqdm(desc=f"solving ({self._solver.name})", unit="batch", leave=False, disable=not self._progress)

        def product(vectors: Tensor) -> Tensor:
            whole = self._operator.mean(_counted(self._loader, bar), vectors)
            return whole if without is None else whole - self._operator.sum(without, vectors) / count

        batches = _counted(cycled(self._loader), bar)

        def sampled(vectors: Tensor) -> Tensor:
            batch = next(batches)
            return self._operator.sum(batch, vectors) / self._operator.samples(batch)

        with bar:
            yield System(product, require_amount(self.damping), sampled, preconditioner)

    def _preconditioner(self) -> KroneckerPreconditioner:
        if self._curvature is None:
            try:
                selection = default_selection(self._model)
            except ConfigError as error:
                raise ConfigError(f"{error}; solver='cg' needs none") from error
            self._curvature = fit_curvature(
                self._model, self._loader, self._objective, selection=selection, progress=self._progress
            )
        weights = self._curvature.fisher.weights
        if weights and weights != fingerprint(self._model):
            warnings.warn(
                "the curvature was fitted at other weights: solutions stay right but take more steps; fit it again",
                RuntimeWarning,
                stacklevel=3,
            )
        return KroneckerPreconditioner(self._curvature, self._flattener, require_amount(self.damping))

    def _gradients(self, batch: Batch, losses: Losses | None) -> Tensor:
        require_samples(self._objective, batch)
        samples, losses = self._operator.samples(batch), losses or self._objective.losses
        found = sample_gradients(self._model, self._flattener, self._moved(batch), losses, samples)
        if not bool(found.isfinite().all()):
            raise QueryError("a gradient is not finite: it cannot be scored")
        return found

    def _moved(self, batch: Batch) -> Batch:
        return on_device(batch, self._flattener.device)

    def _solve(self, b: Tensor, system: System) -> Tensor:
        # Products of the smallest gradients that float32 holds would be 0, and the system is linear.
        size = b.abs().amax(1, keepdim=True)
        size = torch.where(size > 0, size, 1)
        solution = self._solver.solve(system, b / size)
        self.solution = replace(solution, x=solution.x * size)
        if not self.solution.converged:
            other = "more steps" if self._kronecker else "more steps, or use 'ekfac-cg'"
            more = "a wider type of the weights" if isinstance(self._solver, Exact) else other
            warnings.warn(
                f"solver {self._solver.name!r} has not converged: the relative residual is "
                f"{float(self.solution.residual.max()):.2g} after {self.solution.steps} steps (tolerance "
                f"{self.solution.tolerance:.2g}); allow a larger damping, {more}",
                RuntimeWarning,
                stacklevel=3,
            )
        return self.solution.x


def _counted(batches: Iterable[Batch], bar: tqdm[Any]) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        bar.update()


def cycled(loader: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, round and round."""
    while True:
        number = -1
        for number, batch in enumerate(loader):  # noqa: B007 (told apart from no batch below)
            yield batch
        if number < 0:
            raise StatisticsError("the loader yielded no batch (a generator is spent after one pass: give a list)")
