"""Which samples a data loader's batches hold: watched where the loader asks for them, and given back afterwards."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from logix_like.errors import CaptureError


class Pass(Iterator[Any]):
    """One pass over a batch sampler: hands out its lists of indices, and remembers them in order.

    Args:
        batches: the sampler's.
        skip: how many of them are read and thrown away.
        on_end: told of this pass when all is handed out.
    """

    def __init__(self, batches: Iterator[Any], skip: int, on_end: Callable[[Pass], None]) -> None:
        self.batches = batches
        """The sampler's, or those of a pass that another callback watches."""
        self._skip = skip
        self._on_end = on_end
        self.read: deque[tuple[int, ...]] = deque()
        """What was handed out and not taken yet."""

    def __next__(self) -> Any:
        try:
            indices = next(self.batches)
        except StopIteration:
            self._on_end(self)
            raise
        if self._skip:
            self._skip -= 1
        else:
            self.read.append(tuple(map(_plain, indices)))
        return indices


def _plain(index: Any) -> int:
    try:
        return operator.index(index)
    except TypeError:
        raise CaptureError(
            f"the batch sampler of the trainer's data loader hands out {index!r}, which is no dataset index; name the "
            "samples with LogixCallback(data_id=...), a function of the batch"
        ) from None


class RecordedBatches(BatchSampler):
    """Stands in for a batch sampler: hands out the same lists of indices, each pass remembering its own.

    Everything else is the inner sampler's. A pass that is given up is forgotten, with what it had read ahead; one that
    was read to its end, whose last batches may still be trained on, when the next begins.
    """

    def __init__(self, inner: Any) -> None:
        # The parent's constructor is not called: all its attributes are the inner sampler's.
        self.inner = inner
        self._passes: list[ref[Pass]] = []
        self._ended: Pass | None = None
        self.skip = 0
        """How many batches of the next pass are read and thrown away, when a training is resumed in an epoch."""

    def __iter__(self) -> Iterator[Any]:
        return self.follow(iter(self.inner))

    def follow(self, batches: Iterator[Any]) -> Pass:
        """A pass over the same batches."""
        skip, self.skip, self._ended = self.skip, 0, None
        begun = Pass(batches, skip, self._end)
        self._passes = [*(known for known in self._passes if known() is not None), ref(begun)]
        return begun

    def _end(self, ended: Pass) -> None:
        self._ended = ended

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # asked for before it is set, by copying
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("inner", "skip", "_passes", "_ended"):
            super().__setattr__(name, value)
        else:  # a batch size that grows, which is to reach the one that forms the batches
            setattr(self.inner, name, value)

    def take(self, of: Any = None) -> tuple[int, ...]:
        """Indices of the oldest batch that was not taken yet, of the pass ``of``, or of the only one that has such.

        Raises:
            CaptureError: more batches were trained on than the loader handed out, or several passes go on.
        """
        passes = [found for known in self._passes if (found := known()) is not None]
        while isinstance(of, Pass) and of not in passes:
            of = of.batches
        waiting = [known.read for known in passes if known.read and (known is of or not isinstance(of, Pass))]
        if len(waiting) != 1:
            what = "hands out while something else reads it as well" if waiting else "did not hand out"
            raise CaptureError(
                f"a batch was trained on that the trainer's data loader {what}, so its samples are unknown; name them "
                "with LogixCallback(data_id=...), a function of the batch"
            )
        return waiting[0].popleft()


class LoaderOrder:
    """Watches one loader's batch sampler from here until :meth:`close`, which puts the loader as it was.

    Raises:
        CaptureError: the loader hands its batches out in another order than it reads them.
    """

    def __init__(self, loader: Any) -> None:
        # accelerate wraps the loader that does the reading.
        self._loader = getattr(loader, "base_dataloader", loader)
        self._name = _sampler_attribute(self._loader)
        if not getattr(self._loader, "in_order", True):
            raise CaptureError(
                "the data loader has in_order=False, so its batches cannot be told apart by their order; use "
                "in_order=True, or name the samples with LogixCallback(data_id=...), a function of the batch"
            )
        self._batches = RecordedBatches(getattr(self._loader, self._name))
        self._replace(self._batches)

    @staticmethod
    def fits(loader: Any) -> bool:
        """Whether ``loader`` reads a dataset by index."""
        loader = getattr(loader, "base_dataloader", loader)
        indexed = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
        return indexed and _sampler_attribute(loader) != ""

    def skip(self, batches: int) -> None:
        """The next pass begins behind so many batches."""
        self._batches.skip = batches

    def join(self, iterator: Any) -> None:
        """Watch a pass that has been prepared, but has read nothing yet.

        Raises:
            CaptureError: the loader has workers, which have begun to read.
        """
        if self._loader.num_workers:
            raise CaptureError(
                f"the data loader has {self._loader.num_workers} workers, which have read batches before the callback "
                "was told of the loader; use num_workers=0, or name the samples with LogixCallback(data_id=...), a "
                "function of the batch"
            )
        iterator._sampler_iter = self._batches.follow(iterator._sampler_iter)

    def take(self, iterator: Any = None) -> tuple[int, ...]:
        """Dataset indices of the next batch, of the loader's ``iterator`` where it is known."""
        return self._batches.take(getattr(iterator, "_sampler_iter", None))

    def close(self) -> None:
        """Put the loader's own sampler back; calling it again does nothing."""
        sampler = getattr(self._loader, self._name)
        if sampler is self._batches:
            self._replace(self._batches.inner)
        while isinstance(sampler, RecordedBatches):  # another callback's, who watched this one
            if sampler.inner is self._batches:
                sampler.inner = self._batches.inner
            sampler = sampler.inner

    def _replace(self, sampler: Any) -> None:
        # A DataLoader refuses the assignment, since it would not reach a pass that is going on; that is meant here.
        object.__setattr__(self._loader, self._name, sampler)


def _sampler_attribute(loader: Any) -> str:
    """Where a loader keeps what yields lists of indices; empty if nothing does."""
    if getattr(loader, "batch_sampler", None) is not None:
        return "batch_sampler"
    return "sampler" if isinstance(getattr(loader, "sampler", None), BatchSampler) else ""
