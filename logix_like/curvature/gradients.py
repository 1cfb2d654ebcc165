"""What is made of the factors of a batch: gradients, inner products with vectors, squares in an eigenbasis."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from logix_like.curvature.sums import MEMORY, Scratch, Sums
from logix_like.curvature.sweep import Blocks, Sink, widened
from logix_like.errors import CaptureError
from logix_like.linalg.basis import Basis
from logix_like.linalg.lowrank import LowRank
from logix_like.linalg.products import Precision, products


class Gradients(Sink):
    """The per-sample gradients themselves; for batches whose gradients fit into memory."""

    def __init__(self) -> None:
        self.blocks: dict[str, Tensor] = {}
        """``[samples, d_out, d_in]`` by block; blocks that got no gradient are missing."""

    def add_factors(self, block: str, inputs: Tensor, outputs: Tensor, shared: bool) -> None:
        gradient = widened(outputs).mT @ widened(inputs)
        known = self.blocks.get(block)
        self.blocks[block] = gradient if known is None else known + gradient


class InnerProducts(Sink):
    """Inner products of per-sample gradients with vectors, taken from the factors.

    A gradient is formed only where that costs less: for ``q`` vectors and ``t`` positions, ``(t + q) d_in d_out``
    products a sample against ``t q d_in d_out`` (less for a single position), or ``t q r (d_in + d_out)`` with
    vectors of rank ``r``.
    """

    def __init__(self, vectors: Mapping[str, Tensor | LowRank], precision: Precision = "highest") -> None:
        self._vectors = dict(vectors)
        self._precision: Precision = precision
        self.modules: dict[str, Tensor] = {}
        """By block: ``[vectors, samples]`` of the last batch; 0 for blocks that got no gradient."""

    def begin(self, samples: int, mask: Tensor | None) -> None:
        for name, vectors in self._vectors.items():
            like = vectors.left if isinstance(vectors, LowRank) else vectors
            self.modules[name] = like.new_zeros(len(like), samples)

    def add_factors(self, block: str, inputs: Tensor, outputs: Tensor, shared: bool) -> None:
        vectors = self._vectors.get(block)
        if vectors is None:
            return
        with products(self._precision):
            found = inner_products(widened(inputs), widened(outputs), vectors)
        self.modules[block] = self.modules[block] + found


def inner_products(inputs: Tensor, outputs: Tensor, vectors: Tensor | LowRank) -> Tensor:
    """``[q, n]``: ``sum_t d_t^T V_q a_t`` for ``inputs [n, t, d_in]``, ``outputs [n, t, d_out]`` and q vectors."""
    (_, positions, d_in), d_out = inputs.shape, outputs.shape[2]
    if isinstance(vectors, LowRank):
        count, _, rank = vectors.left.shape
        if positions * count * rank * (d_in + d_out) < (positions + count) * d_in * d_out:
            mapped = torch.einsum("nti,qri->nqtr", inputs, vectors.right.to(inputs))
            return torch.einsum("nqtr,nto,qor->qn", mapped, outputs, vectors.left.to(inputs))
        whole = vectors.whole().to(inputs)
    else:
        whole = vectors.to(inputs)
    count = len(whole)
    if positions * count > positions + count:
        return whole.flatten(1) @ (outputs.mT @ inputs).flatten(1).T
    mapped = (inputs.reshape(-1, d_in) @ whole.reshape(-1, d_in).T).view(*inputs.shape[:2], count, d_out)
    return torch.einsum("ntqo,nto->qn", mapped, outputs)


class EigenSink(Sink):
    """Turns factors into eigenbases and tells :meth:`take` of each block's whole per-sample factors.

    A block that several calls contribute to waits for the end of the batch, since squares are taken of a sample's
    whole gradient only. Which blocks those are is learnt from the first batch.
    """

    def __init__(
        self, bases: Mapping[str, tuple[Basis, Basis]], precision: Precision, scratch: Scratch = MEMORY
    ) -> None:
        self._bases = dict(bases)
        self._scratch = scratch
        self._cast: dict[int, Basis] = {}
        self._precision: Precision = precision
        self._single: frozenset[str] | None = None
        self._taken: set[str] = set()
        self._again: set[str] = set()
        self._waiting: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._last: tuple[Tensor, Basis, Tensor] | None = None

    @abstractmethod
    def take(self, block: str, inputs: Tensor, outputs: Tensor) -> None:
        """Coordinates ``[samples, positions, d_in]`` and ``[samples, positions, d_out]`` of a block."""

    def begin(self, samples: int, mask: Tensor | None) -> None:
        # Whatever a batch that was broken off has left here is not of this one.
        self._taken.clear()
        self._again.clear()
        self._waiting.clear()
        self._last = None

    def add_factors(self, block: str, inputs: Tensor, outputs: Tensor, shared: bool) -> None:
        with products(self._precision):
            rotated = self._rotated_input(block, inputs), self._rotated(self._bases[block][1], outputs)
            if self._single is not None and block in self._single and block not in self._waiting:
                self._single_call(block, rotated)
            else:
                self._waiting.setdefault(block, []).append(rotated)

    def end(self) -> None:
        self._last = None
        if self._single is None:
            self._single = frozenset(name for name, calls in self._waiting.items() if len(calls) == 1)
        self._single -= self._again
        if self._again:
            raise CaptureError(
                f"module {min(self._again)!r} was called several times in this batch and once in the first: per-sample "
                "squares need every call; put a batch in which it is called several times first"
            )
        with products(self._precision):
            while self._waiting:
                block, calls = self._waiting.popitem()
                inputs, outputs = zip(*calls, strict=True)
                self.take(block, torch.cat(inputs, 1), torch.cat(outputs, 1))

    def _single_call(self, block: str, rotated: tuple[Tensor, Tensor]) -> None:
        if block in self._taken:
            self._again.add(block)
        else:
            self._taken.add(block)
            self.take(block, *rotated)

    def _rotated_input(self, block: str, inputs: Tensor) -> Tensor:
        # Modules that share an input go backward one after another: the last one's is kept. One that was first called
        # when the bases had been made has one of its own. Another device's thread may put its own in between.
        basis, last = self._bases[block][0], self._last
        if last is None or last[0] is not inputs or last[1] is not basis:
            last = self._last = inputs, basis, self._rotated(basis, inputs)
        return last[2]

    def _rotated(self, basis: Basis, factor: Tensor) -> Tensor:
        factor = widened(factor)
        cast = self._cast.get(id(basis))
        if cast is None or cast.parts[0].dtype != factor.dtype or cast.parts[0].device != factor.device:
            parts = (self._scratch.keep_near(part.to(factor)) for part in basis.parts)
            cast = self._cast[id(basis)] = Basis(tuple(parts))
        return cast.rotate(factor)


class SquareSums(EigenSink):
    """``sum_i (U_S^T G_i U_A)^2`` by block, EK-FAC's eigenvalues times the number of samples.

    George et al. 2018, eq. 8: positions of one sample are summed before squaring.
    """

    def __init__(
        self, bases: Mapping[str, tuple[Basis, Basis]], precision: Precision, scratch: Scratch = MEMORY
    ) -> None:
        super().__init__(bases, precision, scratch)
        self.sums = Sums(scratch)
        """``squares/<block>`` ``[d_out, d_in]`` and ``samples``."""

    def begin(self, samples: int, mask: Tensor | None) -> None:
        super().begin(samples, mask)
        self.sums.begin(samples)

    def take(self, block: str, inputs: Tensor, outputs: Tensor) -> None:
        if inputs.shape[1] == 1:
            self.sums.add_product(f"squares/{block}", outputs[:, 0].square().T, inputs[:, 0].square())
        else:
            self.sums.add(f"squares/{block}", (outputs.mT @ inputs).square_().sum(0))


class QuadraticForms(EigenSink):
    """``sum weights (U_S^T G_i U_A)^2`` over all blocks: ``g_i^T f(F) g_i`` of each sample."""

    def __init__(self, bases: Mapping[str, tuple[Basis, Basis]], weights: Blocks, precision: Precision) -> None:
        super().__init__(bases, precision)
        self._weights = dict(weights)
        self.values = torch.empty(0)
        """``[samples]`` of the last batch."""

    def begin(self, samples: int, mask: Tensor | None) -> None:
        super().begin(samples, mask)
        self.values = torch.zeros(samples, dtype=torch.float64)

    def take(self, block: str, inputs: Tensor, outputs: Tensor) -> None:
        weights = self._weights[block].to(inputs)
        if inputs.shape[1] == 1:
            found = ((outputs[:, 0].square() @ weights) * inputs[:, 0].square()).sum(1)
        else:
            found = (outputs.mT @ inputs).square_().flatten(1) @ weights.flatten()
        self.values += found.to(self.values)
