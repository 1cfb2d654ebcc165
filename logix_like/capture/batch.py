"""The records that leave capture: what one block of training code produced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from logix_like.layout import DataId
from logix_like.timing import NOTHING, Timing


@dataclass(frozen=True)
class FactorMoments:
    """Sums over the positions of one batch of the projected factors' second moments.

    All are sums, so that adding two of these (of disjoint batches) gives that of both.
    """

    inputs: Mapping[str, Tensor]
    """By input group: ``sum_t a_t a_t^T``, ``[rank_in, rank_in]``."""
    outputs: Mapping[str, Tensor]
    """By module: ``sum_t d_t d_t^T``, ``[rank_out, rank_out]``, of the samples' own gradients."""
    positions: Mapping[str, int]
    """By input group: how many positions (samples x tokens, unmasked) were summed."""
    samples: int
    """How many samples the batch had."""

    def moved(self, move: Callable[[Tensor], Tensor]) -> FactorMoments:
        """The same, each tensor moved."""
        inputs, outputs = ({name: move(t) for name, t in sums.items()} for sums in (self.inputs, self.outputs))
        return replace(self, inputs=inputs, outputs=outputs)


class Arrival(Protocol):
    """Tensors that are being copied to the host."""

    def wait(self) -> None:
        """Return once they are there."""


@dataclass(frozen=True)
class ProjectedBatch:
    """Rows of one batch, on their way to the statistics and the store."""

    data_id: tuple[DataId, ...]
    """One id for each sample."""
    rows: Tensor
    """``[batch, width]``, projected per-sample gradients."""
    step: int = -1
    """Optimizer step (or block number) at which the samples were used."""
    epoch: int = -1
    """Epoch, -1 if it was never told."""
    lr: float = float("nan")
    """Learning rate at that step, NaN if unknown."""
    loss: Tensor | None = None
    """``[batch]`` per-sample losses, if they were given."""
    metadata: Mapping[str, tuple[str | int | float, ...]] = field(default_factory=dict)
    """Further columns of the user's, one value for each sample."""
    overflow: bool | None = None
    """Whether a gradient scaler skips the step, None if it cannot be skipped."""
    weight: float = 1.0
    """What each sample's own gradient was multiplied by in the gradient that the optimizer saw (1 / batch size)."""
    moments: FactorMoments | None = None
    """Kronecker moments of the batch; None when not gathered or a row is not finite."""
    timing: Timing = NOTHING
    """What the training took since the batch before, and logging of it."""
    arrival: Arrival | None = None
    """Waited for before any tensor is read, where they are still being copied to the host."""

    @property
    def nbytes(self) -> int:
        """Memory that rows and moments take."""
        moments = () if self.moments is None else (*self.moments.inputs.values(), *self.moments.outputs.values())
        return self.rows.nbytes + sum(moment.nbytes for moment in moments)

    def wait(self) -> None:
        """Return once the tensors are there; their shapes are known before."""
        if self.arrival is not None:
            self.arrival.wait()

    def select(self, samples: slice) -> ProjectedBatch:
        """Some of the samples, without the batch's moments and timing."""
        loss = None if self.loss is None else self.loss.reshape(-1)[samples]
        metadata = {name: values[samples] for name, values in self.metadata.items()}
        rows, data_id = self.rows[samples], self.data_id[samples]
        return replace(self, data_id=data_id, rows=rows, loss=loss, metadata=metadata, moments=None, timing=NOTHING)
