"""Fitting a curvature to a model by passes over its training samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor, nn

from logix_like.capture.selection import Selection, require_model, select_modules
from logix_like.curvature.curvature import Curvature, Kind, Labels
from logix_like.curvature.moments import WIDEST
from logix_like.curvature.partial import PartialFit
from logix_like.curvature.passes import At, Batches, Passes, Settings, first_batch, once
from logix_like.curvature.sums import Scratch
from logix_like.curvature.sweep import Sweep
from logix_like.linalg.products import Precision
from logix_like.objective import Batch, Objective
from logix_like.weights import fingerprint


def fit_curvature(
    model: nn.Module,
    loader: Iterable[Batch],
    objective: Objective | None = None,
    *,
    kind: Kind = "ekfac",
    labels: Labels = "sampled",
    split: bool = False,
    seed: int = 0,
    selection: Selection | None = None,
    mask: Callable[[Batch], Tensor | None] | None = None,
    at: At = once,
    widest: int = WIDEST,
    precision: Precision = "highest",
    resume_from: str | Path | None = None,
    scratch: str | Path | None = None,
    progress: bool = True,
) -> Curvature:
    """Fit K-FAC (one pass over ``loader``) or EK-FAC (two) to ``model``, which is not changed.

    Args:
        model: Run in eval mode, weights frozen.
        loader: Batches of training samples, the same in each pass (in any order; see ``resume_from``).
        objective: What the model is trained for; a classifier unless told otherwise.
        kind: ``ekfac`` or ``kfac``.
        labels: ``sampled`` from the model: the true Fisher, a Gauss-Newton matrix. ``empirical``: the data's own.
        split: EK-FAC's factors from every other batch, its eigenvalues from those between: half the time.
        seed: Of the sampled labels; both passes see the same ones, where their batches come in the same order.
        selection: Tracked modules; all with a rule for linear maps unless told otherwise.
        mask: ``mask(batch) -> [batch, positions]``, which positions count; default a batch's ``attention_mask``.
        at: Fits at several sets of weights together, loading them one after another (``run.at_checkpoints``).
        widest: Sides wider than this are split into parts whose cross terms are dropped.
        precision: Of the products of factors, in torch's words; the model's own are not touched.
        resume_from: A folder from which an interrupted fit goes on; sums go there every few minutes and are removed
            at the end. A pass over a loader that shuffles begins anew; a fit of other data is refused.
        scratch: A folder on whose disk sums, eigenvectors and eigenvalues are kept, where memory is too small for them.
        progress: Whether a bar is shown.

    Raises:
        ConfigError: an option is unknown.
        CaptureError: a batch's losses do not depend on a tracked module.
        StatisticsError: ``loader`` is empty, ``resume_from`` holds another fit, or sums overflow; names the module.
        StoreWriteError: a disk is full.
    """
    settings = Settings(kind, labels, split and kind == "ekfac", seed, widest, precision)
    sweep = Sweep(model, objective or Objective(), selection or default_selection(model), mask=mask)
    weights = fingerprint(model) if at is once else ""
    signature = settings.signature(sweep.layout, loader, weights)
    if resume_from is not None:
        signature["data"] = first_batch(loader, sweep)
    interrupted = PartialFit(resume_from, signature)
    passes = Passes(sweep, Batches(loader, at, progress), settings, interrupted, Scratch(scratch))
    curvature = interrupted.factors()
    if curvature is None:
        curvature = passes.factors(weights)
        interrupted.keep(curvature)
    if kind == "ekfac":
        curvature = passes.corrected(curvature)
    interrupted.remove()
    return curvature


def default_selection(model: nn.Module) -> Selection:
    """All modules of ``model`` that are linear maps and trained; where nothing of it is trained any more, all."""
    require_model(model)
    finished = not any(parameter.requires_grad for parameter in model.parameters())
    return select_modules(model, types=("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d"), frozen=finished)
