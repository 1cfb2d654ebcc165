"""Passes over the training samples that fit a curvature; an interrupted fit goes on where it was saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from logix_like.capture.selection import Selection, select_modules
from logix_like.curvature.curvature import Curvature, Fisher, Kind, Labels
from logix_like.curvature.gradients import SquareSums
from logix_like.curvature.moments import FactorSums
from logix_like.curvature.partial import PartialFit
from logix_like.curvature.sweep import Losses, Sink, Sweep
from logix_like.errors import ConfigError, StatisticsError
from logix_like.layout import Layout
from logix_like.linalg.basis import Basis, eigenbasis
from logix_like.linalg.finite import require_finite
from logix_like.linalg.kronecker import product_eigenvalues
from logix_like.linalg.products import PRECISIONS, Precision
from logix_like.objective import Batch, Objective
from logix_like.weights import fingerprint

At = Callable[[], Iterable[object]]
"""Each call yields once for each set of weights, after loading it into the model."""

WIDEST = 8192
"""Sides wider than this are split into parts."""


def once() -> Iterable[object]:
    """The weights that the model has."""
    return (None,)


def fit_curvature(
    model: nn.Module,
    loader: Iterable[Batch],
    objective: Objective | None = None,
    *,
    kind: Kind = "ekfac",
    labels: Labels = "sampled",
    seed: int = 0,
    selection: Selection | None = None,
    mask: Callable[[Batch], Tensor | None] | None = None,
    at: At = once,
    widest: int = WIDEST,
    precision: Precision = "highest",
    resume_from: str | Path | None = None,
    progress: bool = True,
) -> Curvature:
    """Fit K-FAC (one pass over ``loader``) or EK-FAC (two) to ``model``; the model is not changed.

    Args:
        model: Run in eval mode, weights frozen.
        loader: Batches of training samples, the same in each pass.
        objective: What the model is trained for; a classifier unless told otherwise.
        kind: ``ekfac`` or ``kfac``.
        labels: ``sampled`` from the model: the true Fisher, a Gauss-Newton matrix. ``empirical``: the data's own.
        seed: Of the sampled labels; both passes see the same ones.
        selection: Tracked modules; all with a rule for linear maps unless told otherwise.
        mask: ``mask(batch) -> [batch, positions]``, which positions count; default a batch's ``attention_mask``.
        at: Fits at several sets of weights together: each call yields once for each after loading it into the model,
            as ``lambda: run.at_checkpoints("all")`` does.
        widest: Sides wider than this are split into parts whose cross terms are dropped.
        precision: Of the products of factors, in torch's words; the model's own are not touched.
        resume_from: A folder to which the sums go every few minutes; a fit that was interrupted goes on from it, and
            what a finished one had there is removed.
        progress: Whether a bar is shown.

    Raises:
        ConfigError: an option is unknown.
        CaptureError: a batch's losses do not depend on a tracked module.
        StatisticsError: ``loader`` is empty, or sums overflow; names the module.
    """
    _require(kind, ("ekfac", "kfac"), "kind")
    _require(labels, ("sampled", "empirical"), "labels")
    _require(precision, PRECISIONS, "precision")
    _require_whole(widest, "widest", 1)
    _require_whole(seed, "seed", 0)
    sweep = Sweep(model, objective or Objective(), selection or default_selection(model), mask=mask)
    weights = fingerprint(model) if at is once else ""
    partial = PartialFit(
        resume_from,
        {
            "labels": labels,
            "seed": seed,
            "weights": weights,
            "widest": widest,
            "modules": _described(sweep.layout),
            "batches": len(loader) if isinstance(loader, Sized) else None,
        },
    )
    passes = _Passes(sweep, loader, labels, seed, at, partial, progress)
    curvature = partial.factors()
    if curvature is None:
        curvature = passes.factors(FactorSums(widest, precision), weights)
        partial.keep(curvature)
    if kind == "ekfac":
        curvature = passes.corrected(curvature, precision)
    partial.remove()
    return curvature


def _described(layout: Layout) -> str:
    """Tells the modules of a fit from others, in few letters."""
    blocks = json.dumps([(block.name, block.kind, block.shape) for block in layout])
    return f"{len(layout)} modules ({hashlib.blake2b(blocks.encode(), digest_size=6).hexdigest()})"


def default_selection(model: nn.Module) -> Selection:
    """All modules of ``model`` that are linear maps and trained."""
    return select_modules(model, types=("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d"))


class _Passes:
    """One pass after another over the same batches."""

    def __init__(
        self, sweep: Sweep, loader: Iterable[Batch], labels: Labels, seed: int, at: At, partial: PartialFit, bar: bool
    ) -> None:
        self._sweep = sweep
        self._loader = loader
        self._labels: Labels = labels
        self._seed = seed
        self._at = at
        self._partial = partial
        self._bar = bar

    def factors(self, sink: FactorSums, weights: str) -> Curvature:
        """Both factors of every block, and their eigenvectors."""
        self._run("factors", sink, sink.sums)
        if "samples" not in sink.sums:
            raise StatisticsError("there are no samples to fit a curvature to: the loader yielded no batch")
        layout = self._sweep.layout
        inputs = {name: _side(sink, "input", name, layout) for name in dict.fromkeys(self._sweep.groups.values())}
        bases: dict[str, tuple[Basis, Basis]] = {}
        eigenvalues: dict[str, Tensor] = {}
        for block in layout:
            (inward, input_basis), (outward, output_basis) = (
                inputs[block.input_group],
                _side(sink, "output", block.name, layout),
            )
            bases[block.name] = input_basis, output_basis
            eigenvalues[block.name] = product_eigenvalues(outward, inward)
        fisher = Fisher(self._labels, int(sink.sums["samples"]), weights)
        return Curvature("kfac", layout, bases, eigenvalues, fisher)

    def corrected(self, curvature: Curvature, precision: Precision) -> Curvature:
        """The same with EK-FAC's eigenvalues."""
        self._sweep.groups = {block.name: block.input_group for block in curvature.layout}
        curvature.layout.require_same(self._sweep.layout)
        sink = SquareSums(curvature.bases, precision)
        self._run("eigenvalues", sink, sink.sums)
        self._require_same_samples(curvature.fisher.samples, int(sink.sums.get("samples", 0)))
        eigenvalues = {}
        for name, values in curvature.eigenvalues.items():
            total = sink.sums.get(f"squares/{name}", torch.zeros_like(values))
            require_finite(total, name)
            eigenvalues[name] = total / sink.sums["samples"].to(total.device)
        return Curvature("ekfac", curvature.layout, curvature.bases, eigenvalues, curvature.fisher)

    def _require_same_samples(self, first: int, second: int) -> None:
        if first != second:
            raise StatisticsError(
                f"the first pass over the loader saw {first:,} samples and the second {second:,}: EK-FAC needs the "
                "same ones twice; give a list or a DataLoader (a generator is spent after one pass), or fit kind='kfac'"
            )

    def _run(self, name: str, sink: Sink, sums: dict[str, Tensor]) -> None:
        done = self._partial.restore(name, sums, self._sweep)
        for position, batch in self._batches(f"curvature: {name}"):
            if position < done:
                continue
            self._sweep.run(batch, self._losses(position), sink)
            self._partial.offer(name, position + 1, sums, self._sweep)

    def _batches(self, description: str) -> Iterator[tuple[int, Batch]]:
        total = len(self._loader) if isinstance(self._loader, Sized) else None
        position = 0
        for _ in self._at():
            with tqdm(total=total, desc=description, unit="batch", disable=not self._bar) as bar:
                for batch in self._loader:
                    yield position, batch
                    position += 1
                    bar.update()

    def _losses(self, position: int) -> Losses:
        objective = self._sweep.objective
        if self._labels == "empirical":
            return objective.losses
        generator = Generator(self._sweep.device).manual_seed(self._seed * 2**32 + position)
        return lambda model, batch: objective.sampled_losses(model, batch, generator)


def _side(sink: FactorSums, side: str, name: str, layout: Layout) -> tuple[Tensor, Basis]:
    moments = sink.moments(side, name)
    for moment in moments:
        require_finite(moment, name)
    if moments:
        return eigenbasis(moments)
    width = layout[name].shape[1 if side == "input" else 0]  # never called: it takes no part
    return torch.zeros(width, dtype=torch.float64), Basis((torch.eye(width, dtype=torch.float64),))


def _require_whole(value: object, what: str, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
        raise ConfigError(f"{what} is {value!r}; it must be a whole number from {least} to {2**31 - 1}")


def _require(value: object, known: tuple[str, ...], what: str) -> None:
    if value not in known:
        raise ConfigError(f"unknown {what} {value!r}; known: {', '.join(known)}")
