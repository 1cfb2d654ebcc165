"""Curvature at full size, gathered from the forward and backward passes of a training as it goes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from torch import Tensor, nn

from logix_like.capture.factors import FactorReader
from logix_like.capture.hooks import HookSet
from logix_like.capture.projector import Projector
from logix_like.capture.recorder import CallReader
from logix_like.capture.selection import Selection
from logix_like.curvature.curvature import Curvature, Fisher, Kind
from logix_like.curvature.fitting import WIDEST, default_selection
from logix_like.curvature.gradients import SquareSums
from logix_like.curvature.moments import FactorSums
from logix_like.curvature.passes import Settings, kronecker, with_squares
from logix_like.curvature.sums import MEMORY, Sums
from logix_like.errors import CaptureError, ConfigError, StatisticsError
from logix_like.projection import INITS

Reduction = Literal["mean", "sum"]


class CurvatureStream:
    """K-FAC or EK-FAC averaged over a training's own steps, each sample at the weights that it was used at.

    ::

        stream = CurvatureStream(model, basis_samples=4096)
        for x, y, ids in loader:
            with run(data_id=ids), stream(len(ids)):
                loss_fn(model(x), y).backward()
            ...
        curvature = stream.curvature()

    It is the empirical Fisher: gradients are those of the training's labels. The first ``basis_samples`` samples give
    the factors, and so the basis; those after them give EK-FAC's eigenvalues in it (George et al. 2018 keep a basis
    for many steps in the same way). Blocks that end in an exception, and blocks with numbers that are not finite
    (steps that a gradient scaler skips), count for nothing. Sums are kept in memory until the process ends.

    Args:
        model: Is trained; nothing of it is changed.
        basis_samples: How many samples give the factors.
        kind: ``ekfac``; or ``kfac``, for which all samples give the factors.
        selection: Tracked modules; all linear maps unless told otherwise.
        every: Only every so many blocks are looked at; one costs about a quarter (factors) to a half (eigenvalues)
            of a training step.
        widest: Sides wider than this are split into parts whose cross terms are dropped.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        basis_samples: int = 4096,
        kind: Kind = "ekfac",
        selection: Selection | None = None,
        every: int = 1,
        widest: int = WIDEST,
    ) -> None:
        Settings(kind, "empirical", False, 0, widest, "highest")  # refuses what is none
        for name, value in (("basis_samples", basis_samples), ("every", every)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number, 1 or more")
        self._selection = selection or default_selection(model)
        self._projector = Projector(self._selection.blocks, INITS["identity"], rank=1, seed=0)
        self._basis_samples = basis_samples
        self._kind = kind
        self._every = every
        self._blocks = 0
        self._total = Sums(MEMORY)
        self._sink: FactorSums | SquareSums = FactorSums(widest, "highest")
        self._factors: Curvature | None = None

    @contextmanager
    def __call__(
        self,
        samples: int,
        *,
        mask: Tensor | None = None,
        scale: float = 1.0,
        loss_reduction: Reduction = "mean",
    ) -> Iterator[None]:
        """Around the forward and backward pass of one batch.

        Args:
            samples: How many the batch has.
            mask: ``[samples, positions]``, true where a position counts.
            scale: What the loop multiplied its loss by (1 / accumulated batches, a scaler's scale).
            loss_reduction: Whether the loss is the mean of the samples' losses or their sum.

        Raises:
            ConfigError: ``scale`` or ``loss_reduction`` is none of these.
            CaptureError: no gradient reached a tracked module.
        """
        if loss_reduction not in get_args(Reduction):
            raise ConfigError(f"unknown loss_reduction {loss_reduction!r}; known: {', '.join(get_args(Reduction))}")
        if not 0 < scale < math.inf:
            raise ConfigError(
                f"scale is {scale!r}; it must be a finite number above 0: what the loss was multiplied by"
            )
        self._blocks += 1
        if (self._blocks - 1) % self._every:
            yield
            return
        sink = self._sink
        sink.sums = Sums(MEMORY)  # of this block alone, until it has ended well
        reader = FactorReader(self._projector, sink.add_factors, sink.add_input)
        device = next(self._selection.modules[0].module.parameters()).device
        calls = CallReader(samples, reader.read_input, reader.read_gradient, device_type=device.type)
        sink.begin(samples, mask)
        with HookSet(self._selection, calls, samples):
            yield
        calls.close()
        if not calls.gradients:
            raise CaptureError("no gradient reached any tracked module in this block: call loss.backward() inside it")
        sink.end()
        factor = (samples if loss_reduction == "mean" else 1) / scale
        self._total.take(sink.sums, {"output": factor**2, "squares": factor**2})
        self._turn()

    def curvature(self) -> Curvature:
        """What was gathered so far.

        Raises:
            StatisticsError: nothing was; or, for EK-FAC, no block behind those of the factors.
        """
        sums = self._total.all()
        if "samples" not in sums:
            raise StatisticsError("no block of a training was looked at yet")
        if self._kind == "kfac":
            return self._decomposed()
        if self._factors is None:
            raise StatisticsError(
                f"all {int(sums['samples']):,} samples so far went into the factors, none into EK-FAC's eigenvalues: "
                "train on, or take basis_samples smaller or kind='kfac'"
            )
        samples = self._factors.fisher.samples + int(sums["samples"])
        return with_squares(self._factors, sums, Fisher("empirical", samples, ""))

    def _turn(self) -> None:
        """From factors to eigenvalues, once there are samples enough."""
        if self._factors is None and self._kind == "ekfac" and self._total.samples >= self._basis_samples:
            self._factors = self._decomposed()
            self._total = Sums(MEMORY)
            self._sink = SquareSums(self._factors.bases, "highest")

    def _decomposed(self) -> Curvature:
        fisher = Fisher("empirical", self._total.samples, "")
        return kronecker(self._total.all(), self._projector.layout(), fisher, MEMORY)
