"""Estimators of the training path on a problem's truth: rows of the table of LDS.

``--rows path`` for all problems; ``--rows unrolled --problem small`` for what carries derivatives through every step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import logix_like as logix
from logix_like.curvature import fit_curvature
from logix_like.estimators import (
    Estimator,
    ExactUnrolling,
    Hydra,
    InRunShapley,
    RepresenterPoints,
    Source,
    TracIn,
    TracInCP,
    TracInLastLayer,
    TracInRP,
)
from logix_like.estimators.flat import FlatModel
from logix_like.evaluation.scored import score_matrix
from logix_like.path import TrainingPath
from logix_like.run.live import LiveScores
from logix_like.sensitivity.posterior import KroneckerPosterior, Posterior, posterior_of
from logix_like.weights import differentiable
from tests.bench.lds.bench import Bench, Row
from tests.bench.lds.problems import Problem

CHECKPOINTS = 20
"""Besides the first weights; also how often the stored rows are asked, and the tracked queries' gradients taken."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """One training with its path, its rows, and its queries tracked."""

    problem: Problem
    model: nn.Module
    optimizer: torch.optim.Optimizer
    run: logix.Run
    path: TrainingPath
    live: LiveScores

    def estimated(self, kind: Callable[..., Estimator], **options: Any) -> Tensor:
        """Scores of an estimator over the path."""
        made = kind(
            self.path, self.model, self.problem.objective, lambda ids: self.problem.training(list(ids)), **options
        )
        return self.matrix(made.scores(self.problem.asked()), made.data_id.tolist())

    def matrix(self, scores: Tensor, ids: list[int]) -> Tensor:
        """``[queries, samples]`` in the order of the truth."""
        ordered = torch.zeros(len(scores), self.problem.samples, dtype=torch.float64)
        ordered[:, torch.tensor(ids)] = scores.double().cpu()
        return score_matrix(ordered, self.problem.samples, self.problem.queries)


_MADE: weakref.WeakKeyDictionary[Bench, Recorded] = weakref.WeakKeyDictionary()


def recorded(bench: Bench) -> Recorded:
    """The problem trained with the bench's seed, its path recorded; once for all rows."""
    if bench not in _MADE:
        _MADE[bench] = _record(bench.problem, bench.seed, str(bench.root))
    return _MADE[bench]


def _record(problem: Problem, seed: int, root: str) -> Recorded:
    torch.manual_seed(seed)
    model = problem.model()
    optimizer = problem.optimizer(model)
    steps = problem.epochs * -(-problem.samples // problem.batch)
    settings = {"record": "path", "checkpoints": {"every_steps": max(steps // CHECKPOINTS, 1)}}
    run = logix.init("path", model, problem.preset, root=root, optimizer=optimizer, verbose=False, **settings)
    batch = problem.asked()
    every = max(steps // CHECKPOINTS, 1)
    live = run.track(batch, problem.loss, data_id=range(problem.queries), mask=problem.mask(batch), every=every)
    order = torch.Generator().manual_seed(seed)
    for _ in range(problem.epochs):
        for ids in problem.order(range(problem.samples), order):
            one = problem.training(ids)
            with problem.logged(run, ids, one):
                problem.loss(model, one).backward()
            optimizer.step()
            optimizer.zero_grad()
    run.finalize()
    return Recorded(problem, model.eval(), optimizer, run, run.training_path, live)


def _over(kind: Callable[..., Estimator], **options: Any) -> Row:
    return lambda bench: recorded(bench).estimated(kind, **options)


def _tracked(bench: Bench) -> Tensor:
    found = recorded(bench)
    return found.matrix(found.live.scores, list(found.live.data_id))


def _projected(bench: Bench) -> Tensor:
    found = recorded(bench)
    batch = found.problem.asked()
    asked = {}
    for number, checkpoint in enumerate(found.path.checkpoints, 1):
        for _ in found.run.at_checkpoints([number]):
            asked[checkpoint.step] = found.run.query_fn(
                batch, found.problem.loss, data_id=range(found.problem.queries), mask=found.problem.mask(batch)
            )
    made = TracInRP(found.run.store)
    return found.matrix(made.scores(asked), made.data_id.tolist())


def _representers(bench: Bench) -> Tensor:
    batches = [batch for _, batch in bench.batches()]
    made = RepresenterPoints(bench.model, bench.problem.objective, batches)
    return score_matrix(made, bench.problem.samples, bench.problem.queries, bench.problem.asked())


def _by_posterior(make: Callable[[Recorded, FlatModel, list[Any]], Posterior], layer: str = "") -> Row:
    """The Memory-Perturbation Equation for a query's loss: ``g_q^T S g_i``."""

    def row(bench: Bench) -> Tensor:
        found = recorded(bench)
        names = [name for name, _ in found.model.named_parameters() if name.startswith(layer)]
        flat = FlatModel(found.model, bench.problem.objective, names)
        batches = [batch for _, batch in bench.batches()]
        posterior = make(found, flat, batches)
        with differentiable(found.model):
            moved = posterior.times(flat.sample_gradients(flat.theta, bench.problem.asked()))
            scores = [moved @ flat.sample_gradients(flat.theta, batch).T for batch in batches]
        return score_matrix(torch.cat(scores, 1), bench.problem.samples, bench.problem.queries)

    return row


def _of_optimizer(found: Recorded, flat: FlatModel, batches: list[Any]) -> Posterior:
    return posterior_of(found.optimizer, flat, found.problem.samples, STRENGTH)


def _of_laplace(found: Recorded, flat: FlatModel, batches: list[Any]) -> Posterior:
    curvature = fit_curvature(found.model, batches, found.problem.objective, progress=False)
    return KroneckerPosterior(curvature, flat, found.problem.samples, STRENGTH)


STRENGTH = 3.0
"""Of the penalty in the posteriors."""

PATH: Mapping[str, Row] = {
    "TracIn-RP: stored rows, queries at 21 moments": _projected,
    "in-run Shapley while training, order 2": _tracked,
    "TracIn, every step": _over(TracIn),
    "TracInCP, 20 checkpoints": _over(TracInCP),
    "TracInCPFast, last layer": _over(TracInLastLayer),
    "SOURCE, 1 segment": _over(Source, segments=1),
    "SOURCE, 3 segments": _over(Source, segments=3),
    "representer points": _representers,
    "MPE, covariance of the optimizer": _by_posterior(_of_optimizer),
    "MPE, Laplace, Kronecker": _by_posterior(_of_laplace),
}

UNROLLED: Mapping[str, Row] = {
    "SOURCE, 3 segments, dense curvature": _over(Source, segments=3, curvature="dense"),
    "HyDRA fast": _over(Hydra, fast=True),
    "HyDRA": _over(Hydra),
    "in-run Shapley, every step, order 2": _over(InRunShapley),
    "exact unrolling": _over(ExactUnrolling),
}
"""For some thousand parameters."""
