"""Curvature at full size, gathered from the forward and backward passes of a training as it goes."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Self
from zlib import crc32

from torch import Tensor

from logix_like.capture.factors import FactorReader
from logix_like.capture.hooks import HookSet
from logix_like.capture.projector import Projector
from logix_like.capture.recorder import CallReader
from logix_like.capture.selection import Selection
from logix_like.curvature.curvature import Curvature, Fisher
from logix_like.curvature.files import packed, unpacked
from logix_like.curvature.gradients import SquareSums
from logix_like.curvature.moments import WIDEST, FactorSums
from logix_like.curvature.passes import kronecker, with_squares
from logix_like.curvature.sums import MEMORY, Sums
from logix_like.errors import CaptureError, StatisticsError
from logix_like.projection import INITS
from logix_like.store.format.tensors import read_tensors, write_tensors
from logix_like.timing import Stopwatch

EVERY = 8
"""One block in so many is looked at, which costs it about half of a training step."""
SAVE_SECONDS = 300.0
"""How much of a training a kill may take out of the averages."""
SAVE_SHARE = 50
"""Saving takes at most one part in so many of the time, however large the model is."""
SUMS = "sums/"


class Look(ExitStack):
    """A context manager around the forward and backward pass of one block that is looked at."""

    def __init__(self, hooks: HookSet, calls: CallReader, sink: FactorSums | SquareSums) -> None:
        super().__init__()
        self._hooks = hooks
        self._calls = calls
        self.sink = sink
        """Holds what the block gave."""

    def __enter__(self) -> Self:
        self.callback(self._calls.close)
        self.push(self._hooks)  # first: Ctrl-C may come while they are being attached
        self._hooks.__enter__()
        return self


class CurvatureStream:
    """EK-FAC averaged over a training's own steps, each sample at the weights that it was used at.

    It is the empirical Fisher: gradients are those of the training's labels. Of the blocks that are looked at, drawn
    by their number, every other one gives the factors, and those between give the eigenvalues in the factors'
    eigenbasis. That is made anew whenever the factors hold twice the samples, and the eigenvalues are carried over
    (as George et al. 2018 keep them from basis to basis). Blocks that end in an exception and blocks with numbers
    that are not finite count for nothing. Samples that are taken back later, and steps that a resumed training takes
    again, stay in the averages.

    Args:
        selection: The tracked modules.
        file: Where it is kept, a file of :func:`load_curvature`; what is there already is gone on with.

    Raises:
        ModelMismatchError: the file holds other modules.
        StatisticsError: it was fitted, not gathered, so that it cannot be gone on with.
        StoreDamagedError: the file is not as it was written.
    """

    def __init__(self, selection: Selection, file: Path) -> None:
        self._selection = selection
        self._file = file
        self._projector = Projector(selection.blocks, INITS["identity"], rank=1, seed=0)
        self._factors, self._squares = Sums(MEMORY), Sums(MEMORY)
        self._factor_sink = FactorSums(WIDEST, "highest")
        self._square_sink: SquareSums | None = None
        self._basis: Curvature | None = None
        self._next_basis = 1
        self._blocks = self._looks = 0
        self._saved, self._took = time.monotonic(), 0.0
        self.written = file.is_file()
        """Whether there is a file of it."""
        if self.written:
            self._restore()

    def look(
        self, samples: int, mask: Tensor | None = None, *, detached: bool = False, watch: Stopwatch | None = None
    ) -> Look | None:
        """For the block that begins now: what follows it, if it is one of those that are looked at.

        ``mask [samples, positions]`` says which positions count; ``detached`` where the weights are frozen; ``watch``
        counts the time that hooks take.
        """
        self._blocks += 1
        # The first two always, one for each kind; then by a hash, lest epochs of so many blocks show the same samples.
        if self._blocks > 2 and crc32(self._blocks.to_bytes(8, "little")) % EVERY:
            return None
        sink = self._factor_sink if self._square_sink is None or self._looks % 2 == 0 else self._square_sink
        sink.sums = Sums(MEMORY)  # of this block alone, until it has ended well
        reader = FactorReader(self._projector, sink.add_factors, sink.add_input)
        device = next(self._selection.modules[0].module.parameters()).device.type
        watch = watch or Stopwatch()
        calls = CallReader(
            samples, reader.read_input, watch.timed(reader.read_gradient), detached=detached, device_type=device
        )
        sink.begin(samples, mask)
        return Look(HookSet(self._selection, calls, samples, watch), calls, sink)

    def take(self, look: Look, factor: float | Tensor) -> None:
        """The block of ``look`` has ended well; its gradients times ``factor`` are the samples' own."""
        try:
            look.sink.end()
        except CaptureError:  # a module was called more often than before: this block is left out, the next is not
            return
        total = self._factors if look.sink is self._factor_sink else self._squares
        square = float(factor) ** 2
        if math.isfinite(square) and total.take(look.sink.sums, {"output": square, "squares": square}):
            self._looks += 1
            if self._factors.samples >= self._next_basis:
                self._turn()

    def curvature(self) -> Curvature | None:
        """What was gathered so far; None before there are eigenvalues."""
        if self._basis is None or not self._squares.samples:
            return None
        fisher = Fisher("empirical", self._factors.samples + self._squares.samples, "")
        return with_squares(self._basis, self._squares.all(), fisher)

    def save(self) -> None:
        """Write what was gathered so far to the file; nothing before there are eigenvalues.

        Raises:
            StoreWriteError: the disk refuses.
        """
        begun, curvature = time.monotonic(), self.curvature()
        if curvature is not None:
            tensors, about = packed(curvature)
            tensors |= {SUMS + name: tensor for name, tensor in self._factors.all().items()}
            counts = {"blocks": self._blocks, "looks": self._looks, "squares": self._squares.samples}
            write_tensors(self._file, tensors, {**about, "stream": {**counts, "next_basis": self._next_basis}})
            self.written = True
        self._saved = time.monotonic()
        self._took = self._saved - begun

    @property
    def due(self) -> bool:
        """Whether the last :meth:`save` is long enough ago."""
        return time.monotonic() - self._saved >= max(SAVE_SECONDS, SAVE_SHARE * self._took)

    def _turn(self) -> None:
        """A new basis, of all factors so far; the eigenvalues are carried over."""
        fisher = Fisher("empirical", self._factors.samples, "")
        basis = kronecker(self._factors.all(), self._projector.layout(), fisher, MEMORY)
        count = self._squares.samples
        if self._basis is not None and count:
            carried = with_squares(self._basis, self._squares.all(), fisher).diagonal_in(basis.bases)
            self._squares = _sums_of(carried, count)
        self._set_basis(basis)
        self._next_basis = 2 * self._factors.samples

    def _set_basis(self, basis: Curvature) -> None:
        self._basis = basis
        self._square_sink = SquareSums(basis.bases, "highest")

    def _restore(self) -> None:
        tensors, about = read_tensors(self._file)
        if "stream" not in about:
            raise StatisticsError(
                f"{self._file} holds a curvature that was fitted, which a training cannot go on with: rename the file, "
                "or leave 'curvature' out of the config's statistics"
            )
        curvature = unpacked(tensors, about, self._file)
        self._projector.layout().require_same(curvature.layout)
        for block in curvature.layout:
            self._projector.assign(block.name, block.input_group)
        sums = {name.removeprefix(SUMS): tensor for name, tensor in tensors.items() if name.startswith(SUMS)}
        self._factors.restore(sums)
        counts = about["stream"]
        self._squares = _sums_of(curvature.eigenvalues, counts["squares"])
        self._blocks, self._looks, self._next_basis = (counts[name] for name in ("blocks", "looks", "next_basis"))
        self._set_basis(curvature)


def _sums_of(means: dict[str, Tensor], count: int) -> Sums:
    sums = Sums(MEMORY)
    sums.count("samples", count)
    sums.restore({f"squares/{name}": values * count for name, values in means.items()})
    return sums
