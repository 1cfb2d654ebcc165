"""A curvature as it acts on vectors of all parameters, and EK-FAC as an approximate inverse for such vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from logix_like.curvature.curvature import Curvature, Function
from logix_like.curvature.fitting import default_selection
from logix_like.errors import ModelMismatchError
from logix_like.linalg.inverse import damped_reciprocal
from logix_like.weights import Flattener


class FlatCurvature:
    """A curvature as it acts on vectors of some parameters.

    Args:
        curvature: Its modules that are linear maps of the model and trained are taken.
        flattener: The model, and the order of the parameters. Others of a module's count as 0.

    Raises:
        ModelMismatchError: the curvature is that of another model.
    """

    def __init__(self, curvature: Curvature, flattener: Flattener) -> None:
        self._curvature = curvature
        self._flattener = flattener
        self._names = {id(parameter): name for name, parameter in flattener.model.named_parameters()}
        selection = default_selection(flattener.model)
        shapes = {block.name: block.shape for block in selection.blocks if block.name in curvature.eigenvalues}
        if not shapes:
            raise ModelMismatchError(
                f"the curvature has the modules {', '.join(curvature.layout.names)}, none of which the model has: it "
                "is that of another model; fit one for this"
            )
        for name, shape in shapes.items():
            if shape != curvature.layout[name].shape:
                raise ModelMismatchError(
                    f"module {name!r} has gradients of shape {shape}, and the curvature has "
                    f"{curvature.layout[name].shape}: it is that of another model; fit one for this"
                )
        self.modules = [tracked for tracked in selection.modules if tracked.name in shapes]
        """Those whose blocks the curvature has."""

    def name(self, parameter: object) -> str | None:
        """Of a parameter in the model; None for what is made of a part of one."""
        return self._names.get(id(parameter))

    def apply(self, f: Function, vectors: Tensor) -> Tensor:
        """``U f(Lambda) U^T v`` for ``vectors [n, size]``; 0 outside the curvature's blocks."""
        return self._joined(self._curvature.apply(f, torch.func.vmap(self._blocks)(vectors)), vectors)

    def covered(self, like: Tensor) -> Tensor:
        """``[size]``: which numbers of vectors ``like [n, size]`` belong to a block."""
        blocks = torch.func.vmap(self._blocks)(torch.zeros_like(like[:1]))
        return self._joined({name: torch.ones_like(block) for name, block in blocks.items()}, like[:1])[0] != 0

    def _joined(self, blocks: dict[str, Tensor], like: Tensor) -> Tensor:
        """Vectors ``like [n, size]`` that have these blocks."""
        # Blocks are numbers of the vector in another order: what pulls derivatives back puts them in place.
        pull = torch.func.vjp(self._blocks, torch.zeros_like(like[0]))[1]
        found: Tensor = torch.func.vmap(pull)({name: block.to(like) for name, block in blocks.items()})[0]
        return found

    def _blocks(self, vector: Tensor) -> dict[str, Tensor]:
        """``[d_out, d_in]`` by block of one vector ``[size]``."""
        tensors = self._flattener.split(vector)

        def told(parameter: nn.Parameter) -> Tensor | None:
            name = self.name(parameter)
            if name is None:
                return None
            return tensors[name] if name in tensors else vector.new_zeros(parameter.shape)

        matrices = {tracked.name: tracked.matrix(told) for tracked in self.modules}
        return {name: matrix for name, matrix in matrices.items() if matrix is not None}


class KroneckerPreconditioner:
    """``(F + mu I)^-1`` block by block; parameters without a block are divided by the mean curvature.

    ``mu`` is the geometric mean of ``lambda`` and ``F``'s mean eigenvalue, or ``lambda`` if that is more: blocks know
    nothing of what the modules have in common, and where ``F`` is flat, dividing by little more than ``lambda`` blows
    that up, so that conjugate gradients take more steps, not fewer.

    Args:
        curvature: What is inverted.
        flattener: The model, and the order of the parameters.
        damping: ``lambda`` of the system, absolute.
    """

    def __init__(self, curvature: Curvature, flattener: Flattener, damping: float) -> None:
        self._flat = FlatCurvature(curvature, flattener)
        values = [curvature.eigenvalues[tracked.name].flatten() for tracked in self._flat.modules]
        mean = torch.cat(values).mean()
        self._damping = max(damping, math.sqrt(damping * float(mean)))
        self._rest = float(self._inverse("parameters without a block", mean))

    def __call__(self, vectors: Tensor) -> Tensor:
        """The approximate inverse times each of ``vectors [n, size]``."""
        moved = self._flat.apply(self._inverse, vectors)
        return torch.where(self._flat.covered(vectors), moved, self._rest * vectors)

    def _inverse(self, block: str, values: Tensor) -> Tensor:
        return damped_reciprocal(values, self._damping, block).to(values.device)
