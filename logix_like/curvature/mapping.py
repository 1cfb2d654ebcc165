"""EK-FAC as an approximate inverse for vectors of all parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from logix_like.capture.selection import Selection, TrackedModule
from logix_like.curvature.curvature import Curvature
from logix_like.errors import ModelMismatchError
from logix_like.linalg.inverse import damped_reciprocal
from logix_like.weights import Flattener


class KroneckerPreconditioner:
    """``(F + mu I)^-1`` block by block; parameters without a block are divided by the mean curvature.

    ``mu`` is the geometric mean of ``lambda`` and ``F``'s mean eigenvalue, or ``lambda`` if that is more: blocks know
    nothing of what the modules have in common, and where ``F`` is flat, dividing by little more than ``lambda`` blows
    that up, so that conjugate gradients take more steps, not fewer.

    Args:
        model: Whose parameters are flattened.
        curvature: What is inverted.
        selection: The tracked modules of ``curvature``.
        flattener: The order of the parameters.
        damping: ``lambda`` of the system, absolute.
    """

    def __init__(
        self, model: nn.Module, curvature: Curvature, selection: Selection, flattener: Flattener, damping: float
    ) -> None:
        names = {id(p): name for name, p in model.named_parameters()}
        self._curvature = curvature
        self._flattener = flattener
        self._parts = [
            (tracked, tracked.uses[-1].block, *_names(tracked, names))
            for tracked in selection.modules
            if tracked.uses[-1].block == tracked.name and tracked.name in curvature.eigenvalues
        ]
        if not self._parts:
            raise ModelMismatchError(
                f"the curvature has the modules {', '.join(curvature.layout.names)}, none of which the model has: it "
                "is that of another model; fit one for this"
            )
        values = [curvature.eigenvalues[block].flatten() for _, block, *_ in self._parts]
        self._mean = float(torch.cat(values).mean())
        self._damping = max(damping, math.sqrt(damping * self._mean))

    def __call__(self, vectors: Tensor) -> Tensor:
        """The approximate inverse times each of ``vectors [n, size]``."""
        tensors = self._flattener.split(vectors)
        rest = float(self._inverse("parameters without a block", torch.tensor(self._mean, dtype=torch.float64)))
        found = {name: tensor * rest for name, tensor in tensors.items()}
        for tracked, block, weight, bias in self._parts:
            if any(name is not None and name not in tensors for name in (weight, bias)):
                continue
            matrices = _matrices(tracked, tensors, weight, bias)
            if matrices is None:
                continue
            if matrices.shape[1:] != self._curvature.layout[block].shape:
                raise ModelMismatchError(
                    f"module {block!r} has {tuple(matrices.shape[1:])} numbers and the curvature "
                    f"{self._curvature.layout[block].shape}: it is that of another model; fit one for this"
                )
            moved = self._curvature.apply(self._inverse, {block: matrices})[block]
            _scatter(tracked, moved, found, weight, bias)
        return self._flattener.join(found, 1).to(vectors)

    def _inverse(self, block: str, values: Tensor) -> Tensor:
        return damped_reciprocal(values, self._damping, block).to(values.device)


def _names(tracked: TrackedModule, names: dict[int, str]) -> tuple[str | None, str | None]:
    use = tracked.uses[-1]
    weight = names.get(id(tracked.module.weight)) if use.weight else None
    bias = names.get(id(tracked.module.bias)) if use.bias else None
    return weight, bias


def _matrices(
    tracked: TrackedModule, tensors: dict[str, Tensor], weight: str | None, bias: str | None
) -> Tensor | None:
    """``[n, d_out, d_in]`` as the block's."""
    columns = []
    if weight is not None:
        value = tensors[weight]
        value = value.mT if tracked.rule.transposed else value
        columns.append(value.flatten(2) if value.ndim > 2 else value.unsqueeze(2))
    if bias is not None:
        columns.append(tensors[bias].unsqueeze(2))
    return torch.cat(columns, 2) if columns else None


def _scatter(
    tracked: TrackedModule, matrices: Tensor, tensors: dict[str, Tensor], weight: str | None, bias: str | None
) -> None:
    if bias is not None:
        tensors[bias] = matrices[:, :, -1]
        matrices = matrices[:, :, :-1]
    if weight is not None:
        value = matrices.mT if tracked.rule.transposed else matrices
        tensors[weight] = value.reshape(tensors[weight].shape)
