"""EK-FAC at full size, at the final weights and averaged over checkpoints: what projection loses is measured by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from logix_like.capture.selection import select_modules
from logix_like.curvature import damped_inverse_of, fit_curvature
from logix_like.curvature.gradients import Gradients, InnerProducts
from logix_like.curvature.sweep import Sweep
from tests.bench.lds.bench import Bench

At = Callable[[], Iterable[object]]


def ekfac(bench: Bench, *, averaged: bool = False, labels: Any = "sampled", damping: float = 0.1) -> Tensor:
    """``[queries, samples]``; ``averaged``: curvature, rows and queries are means over the checkpoints."""
    problem = bench.problem
    logged = bench.training() if averaged else None
    model = bench.model if logged is None else logged.model
    at: At = (lambda: (None,)) if logged is None else (lambda: logged.run.at_checkpoints("all"))
    selection = select_modules(model, types=("Linear", "Conv2d"), exclude=problem.exclude)
    mask = problem.mask
    batches = [batch for _, batch in bench.batches()]
    options: dict[str, Any] = {"at": at} if averaged else {}
    curvature = fit_curvature(
        model, batches, problem.objective, labels=labels, selection=selection, mask=mask, progress=False, **options
    )
    sweep = Sweep(model, problem.objective, selection, mask=mask)
    queries = _mean(at, lambda: _gradients(sweep, problem.asked(), problem))
    solved = curvature.apply(damped_inverse_of(damping), queries)
    return _mean(at, lambda: {"": torch.cat([_products(sweep, b, solved, problem) for b in batches], 1)})[""]


def _gradients(sweep: Sweep, batch: Any, problem: Any) -> dict[str, Tensor]:
    sink = Gradients()
    sweep.run(batch, problem.losses, sink)
    return sink.blocks


def _products(sweep: Sweep, batch: Any, vectors: Any, problem: Any) -> Tensor:
    sink = InnerProducts(vectors)
    sweep.run(batch, problem.losses, sink)
    return torch.stack(list(sink.modules.values())).sum(0)


def _mean(at: At, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    count = 0
    for _ in at():
        for name, value in compute().items():
            total[name] = total.get(name, torch.zeros_like(value)) + value
        count += 1
    return {name: value / count for name, value in total.items()}
