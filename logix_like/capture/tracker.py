"""A model's tracked modules with their projections: what opens blocks and owns the row's layout."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from logix_like.capture.batch import FactorMoments
from logix_like.capture.factors import FactorReader, OnFactors
from logix_like.capture.hooks import HookSet
from logix_like.capture.projector import Projector
from logix_like.capture.recorder import BlockRecorder, CallReader
from logix_like.capture.selection import Selection, TrackedModule
from logix_like.errors import CaptureError
from logix_like.layout import Layout
from logix_like.timing import Stopwatch


@dataclass(frozen=True)
class _RawCall:
    """One call of a module, un-projected; kept only during a warm-up."""

    tracked: TrackedModule
    value: Tensor
    gradient: Tensor


class Tracker:
    """Opens one recording for each block of training code.

    Some projections are made from the data of the first samples (``needs_warmup``): until :meth:`fit`,
    recordings hold their calls un-projected; afterwards every recording can be turned into rows.
    """

    def __init__(self, model: nn.Module, selection: Selection, projector: Projector) -> None:
        self.model = model
        self.selection = selection
        self.projector = projector
        weights = [tracked.module.weight for tracked in selection.modules]
        self.dtype = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32
        """Of the rows."""
        self._layout: Layout | None = None
        self._expected = projector.layout()

    @property
    def device(self) -> torch.device:
        """Where rows are summed: the first tracked module's device."""
        return next(self.selection.modules[0].module.parameters()).device

    @property
    def needs_warmup(self) -> bool:
        """Whether projections wait for the moments of a warm-up."""
        return self.projector.needs_moments

    @property
    def layout(self) -> Layout:
        """The row's layout: final once a block has ended, expected before."""
        return self._layout or self._expected

    @property
    def settled(self) -> bool:
        """Whether the layout is final."""
        return self._layout is not None

    def settle(self) -> Layout:
        """Fix the layout: modules not called so far have an input projection of their own."""
        if self._layout is None:
            self._layout = self.projector.layout()
        return self._layout

    def recording(
        self,
        batch: int,
        *,
        mask: Tensor | None = None,
        moments: bool = False,
        detached: bool = False,
        on_factors: OnFactors | None = None,
        watch: Stopwatch | None = None,
    ) -> Recording:
        """Open a block for ``batch`` samples; use it as a context manager around forward and backward.

        ``mask [batch, positions]`` says which positions count in the moments; ``detached`` starts the
        graph at the first tracked module (for models whose weights are frozen); ``on_factors`` is told of
        each call's part as well; ``watch`` counts the time that hooks take.
        """
        return Recording(self, batch, mask=mask, moments=moments, detached=detached, on_factors=on_factors, watch=watch)

    def fit(self, recordings: Iterable[Recording]) -> None:
        """Make the projections from the un-projected calls of a warm-up."""
        sums: dict[str, list[Tensor]] = {}
        for recording in recordings:
            for call in recording.calls:
                for block, moments in self._raw_moments(recording, call):
                    known = sums.get(block)
                    sums[block] = [a + b for a, b in zip(known, moments, strict=True)] if known else moments
        means = {name: (inward / positions, outward) for name, (inward, outward, positions) in sums.items()}
        for uncalled in self._expected:
            if uncalled.name not in means:  # it takes no part
                means[uncalled.name] = (torch.zeros(uncalled.shape[1]), torch.zeros(uncalled.shape[0]))
        self.fit_to(means)

    def fit_to(self, moments: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Make the projections from the mean second moments ``(input, output)`` of every block."""
        self.projector.fit(moments)
        self._expected = self.projector.layout()

    def _raw_moments(self, recording: Recording, call: _RawCall) -> Iterable[tuple[str, list[Tensor]]]:
        """By block: sums over positions of the input's and the output's moment, and how many these are."""
        rule, module = call.tracked.rule, call.tracked.module
        value, gradient = _finite(call.value, call.gradient, recording.mask if rule.by_position else None)
        wide = value if value.is_floating_point() else gradient
        for use in call.tracked.uses:
            inward, outward = self.projector.raw_sides(use, wide.dtype, wide.device)
            kept = rule.read_input(module, value, inward)
            gradients = rule.read_gradient(module, kept, gradient, inward, outward)[1]
            flat = gradients.reshape(-1, gradients.shape[-1]) * recording.factor
            moments = [
                rule.input_moment(module, value, inward).double().cpu(),
                (flat.T @ flat).double().cpu(),
            ]
            if use.transposed and moments[0].ndim == 1:
                moments[0] = moments[0].diag()
            yield use.block, [*(moments[::-1] if use.transposed else moments), torch.tensor(max(len(flat), 1))]


def gradient_matrices(selection: Selection) -> dict[str, Tensor]:
    """By block: the gradient ``[d_out, d_in]`` that the last backward pass left in the parameters.

    Raises:
        CaptureError: a block's gradient is missing or spread over processes.
    """
    found = _matrices(selection.modules)
    missing = [block.name for block in selection.blocks if block.name not in found]
    if missing:
        raise CaptureError(f"module {missing[0]!r} holds no plain gradient of its weight; exclude it")
    return found


def _matrices(modules: Iterable[TrackedModule]) -> dict[str, Tensor]:
    matrices = {tracked.name: tracked.matrix(_plain_gradient) for tracked in modules}
    return {name: matrix for name, matrix in matrices.items() if matrix is not None}


def _plain_gradient(parameter: nn.Parameter) -> Tensor | None:
    """None where it is missing or spread over processes."""
    if parameter.grad is None or type(parameter.grad) is not Tensor:
        return None
    gradient = parameter.grad.detach()
    return gradient.to_dense() if gradient.is_sparse else gradient


def _finite(value: Tensor, gradient: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both without the samples of which a number is not finite: they would spoil every moment.

    Positions that ``mask`` leaves out are not there either; the others are samples of their own then.
    """
    keep = value.flatten(1).isfinite().all(1) & gradient.flatten(1).isfinite().all(1)
    if mask is not None and mask.shape == value.shape[:2] == gradient.shape[:2]:
        counted = mask.bool().to(keep.device) & keep.unsqueeze(1)
        return value[counted], gradient[counted]
    return (value, gradient) if bool(keep.all()) else (value[keep], gradient[keep])


class Recording:
    """What one block of training code called, and the rows that come of it."""

    def __init__(
        self,
        tracker: Tracker,
        batch: int,
        *,
        mask: Tensor | None,
        moments: bool,
        detached: bool,
        on_factors: OnFactors | None = None,
        watch: Stopwatch | None = None,
    ) -> None:
        self._on_factors = on_factors
        self._watch = watch or Stopwatch()
        self._tracker = tracker
        self._batch = batch
        self.mask = mask
        """``[batch, positions]``, true where a position counts."""
        self._with_moments = moments
        self.factor: float | Tensor = 1.0
        """What the captured gradients are to be multiplied by, a number or ``[]``; set before :meth:`project`."""
        self.calls: list[_RawCall] = []
        """Un-projected calls; empty unless a warm-up is going on."""
        self._recorder = None if tracker.needs_warmup else self._new_recorder()
        self._reader = self._new_reader(detached)
        self._kept: list[tuple[weakref.ref[Tensor], int, Tensor]] = []
        self._stack = ExitStack()
        self._without_gradient: set[str] = set()

    def __enter__(self) -> Recording:
        if not self._tracker.settled:  # the first block: its rows are compared with the gradients that it leaves
            self._without_gradient = {
                tracked.name
                for tracked in self._tracker.selection.modules
                if all(p.grad is None for p in tracked.module.parameters(recurse=False))
            }
        hooks = HookSet(self._tracker.selection, self._reader, self._batch, self._watch)
        self._stack.push(hooks)  # first: Ctrl-C may come while they are being attached
        hooks.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()
        self._reader.close()
        self._kept.clear()

    @property
    def device(self) -> torch.device:
        """Where rows are summed."""
        return self._tracker.device

    @property
    def uncalled(self) -> tuple[TrackedModule, ...]:
        """Tracked modules that the block did not call."""
        return tuple(t for t in self._tracker.selection.modules if t.name not in self._reader.called)

    @property
    def called_weights(self) -> set[Any]:
        """Weights of the tracked modules that the block called, also where others share them."""
        return {t.module.weight for t in self._tracker.selection.modules if t.name in self._reader.called}

    def fresh_gradients(self) -> dict[str, Tensor]:
        """By block: the gradient matrix that the block's backward passes left in parameters that had none before."""
        return _matrices(t for t in self._tracker.selection.modules if t.name in self._without_gradient)

    @property
    def has_gradients(self) -> bool:
        """Whether a backward pass reached a tracked module."""
        return self._reader.gradients > 0

    def check(self) -> None:
        """Raise :class:`CaptureError` unless a backward pass reached at least one tracked module."""
        if self.has_gradients:
            return
        if not self._reader.called:
            raise CaptureError(
                "no tracked module was called in this block: run the forward pass of the watched model inside it"
            )
        raise CaptureError(
            "no gradient reached any tracked module in this block: call loss.backward() inside it (and not under "
            "torch.no_grad())"
        )

    def project(self) -> tuple[Tensor, FactorMoments | None]:
        """Rows ``[batch, width]``, times the factor, and the moments if they were asked for."""
        recorder = self._recorder
        if recorder is None:
            recorder = self._new_recorder()
            factors = self._factors(recorder)
            for call in self.calls:
                factors.read_gradient(call.tracked, factors.read_input(call.tracked, call.value), call.gradient)
            self.calls = []
        rows = recorder.rows()
        return rows.mul_(self.factor), recorder.moments(self.factor)

    def _new_reader(self, detached: bool) -> CallReader:
        device_type, timed = self._tracker.device.type, self._watch.timed
        if self._recorder is None:
            return CallReader(
                self._batch, self._keep_value, timed(self._keep_call), detached=detached, device_type=device_type
            )
        factors = self._factors(self._recorder)
        return CallReader(
            self._batch, factors.read_input, timed(factors.read_gradient), detached=detached, device_type=device_type
        )

    def _factors(self, recorder: BlockRecorder) -> FactorReader:
        # Not owned by the recorder: a cycle would keep its rows until Python's collector comes by.
        told = recorder.add_factors if self._on_factors is None else _both(recorder.add_factors, self._on_factors)
        return FactorReader(self._tracker.projector, told, recorder.add_shared_input)

    def _new_recorder(self) -> BlockRecorder:
        return BlockRecorder(
            self._tracker.layout,
            self._batch,
            mask=self.mask,
            moments=self._with_moments,
            dtype=self._tracker.dtype,
            device=self._tracker.device,
        )

    def _keep_value(self, tracked: TrackedModule, value: Tensor) -> Tensor:
        # Modules that read one tensor keep one copy, so that they are seen to share it when it is projected.
        for tensor, version, copy in self._kept:
            if tensor() is value and version == value._version:
                return copy
        copy = value.detach().clone()
        self._kept.append((weakref.ref(value), value._version, copy))
        return copy

    def _keep_call(self, tracked: TrackedModule, kept: object, gradient: Tensor) -> None:
        assert isinstance(kept, Tensor)
        self.calls.append(_RawCall(tracked, kept, gradient.detach().clone()))


def _both(first: OnFactors, second: OnFactors) -> OnFactors:
    def hand_on(block: str, inward: Tensor, outward: Tensor, shared: bool) -> None:
        first(block, inward, outward, shared)
        second(block, inward, outward, shared)

    return hand_on
