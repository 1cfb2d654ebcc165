"""Which samples a data loader's batches hold: watched where the loader asks for them, and given back afterwards."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from logix_like.errors import CaptureError


class RecordedBatches(BatchSampler):
    """Stands in for a batch sampler: hands out the same lists of indices, and remembers them in order.

    Everything else is the inner sampler's. A new pass forgets what an abandoned one had read ahead.
    """

    def __init__(self, inner: Any) -> None:
        # The parent's constructor is not called: all its attributes are the inner sampler's.
        self._inner = inner
        self._read: deque[tuple[int, ...]] = deque()
        self.skip = 0
        """How many batches of the next pass are read and thrown away, when a training is resumed in an epoch."""

    def __iter__(self) -> Iterator[Any]:
        return self.follow(iter(self._inner))

    def follow(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, remembered as they are handed out."""
        self._read.clear()
        skip, self.skip = self.skip, 0
        for number, indices in enumerate(batches):
            if number >= skip:
                self._read.append(tuple(int(index) for index in indices))
            yield indices

    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":  # asked for before it is set, by copying
            raise AttributeError(name)
        return getattr(self._inner, name)

    def take(self) -> tuple[int, ...]:
        """Indices of the oldest batch that was not taken yet.

        Raises:
            CaptureError: more batches were trained on than the loader handed out.
        """
        if not self._read:
            raise CaptureError(
                "a batch was trained on that the trainer's data loader did not hand out, so its samples are unknown; "
                "name them with LogixCallback(data_id=...), a function of the batch"
            )
        return self._read.popleft()


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

    def take(self) -> tuple[int, ...]:
        """Dataset indices of the next batch."""
        return self._batches.take()

    def close(self) -> None:
        """Put the loader's own sampler back; calling it again does nothing."""
        if getattr(self._loader, self._name) is self._batches:
            self._replace(self._batches._inner)

    def _replace(self, sampler: Any) -> None:
        # A DataLoader refuses the assignment, since it would not reach a pass that is going on; that is meant here.
        object.__setattr__(self._loader, self._name, sampler)


def _sampler_attribute(loader: Any) -> str:
    """Where a loader keeps what yields lists of indices; empty if nothing does."""
    if getattr(loader, "batch_sampler", None) is not None:
        return "batch_sampler"
    return "sampler" if isinstance(getattr(loader, "sampler", None), BatchSampler) else ""
