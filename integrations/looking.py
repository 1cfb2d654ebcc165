"""What the sensitivity callbacks of both trainers do alike: begin with the training, look at the end of epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from logix_like.errors import CaptureError
from logix_like.objective import Objective
from logix_like.sensitivity import SensitivityMonitor, Snapshot


class Watch:
    """The monitor of one training, which ``begun_by`` begins."""

    def __init__(self, objective: Objective | None, every: int, options: Mapping[str, Any], begun_by: str) -> None:
        self._objective = objective
        self._every = every
        self._options = dict(options)
        self._begun_by = begun_by
        self._monitor: SensitivityMonitor | None = None

    @property
    def monitor(self) -> SensitivityMonitor:
        """The monitor; raises :class:`CaptureError` before training has begun."""
        if self._monitor is None:
            raise CaptureError(f"there is no monitor yet: it begins with {self._begun_by}")
        return self._monitor

    def begin(self, model: nn.Module, optimizer: Optimizer, loader: Any) -> None:
        """Begin to watch; what is wrong with the options is said before a long training.

        Raises:
            CaptureError: the dataset has no order, or no length and ``samples`` is not among the options.
        """
        self._loader = in_order(loader)
        options = self._options
        if "samples" not in options:
            if not isinstance(self._loader.dataset, Sized):
                raise CaptureError("the training data does not tell its length; give the callback samples=")
            options = {"samples": len(self._loader.dataset), **options}
        self._monitor = SensitivityMonitor(model, optimizer, self._objective, **options)

    def is_due(self, ended: int) -> bool:
        """Whether to look when ``ended`` epochs are over."""
        return ended % self._every == 0

    def look(self, epoch: int, validation: Any) -> Snapshot:
        """Look at all samples."""
        self.monitor.measure(self._loader, validation=validation, epoch=epoch)
        return self.monitor.history[-1]


def in_order(loader: Any) -> DataLoader[Any]:
    """A loader over the same samples as a trainer's, in the dataset's order.

    Raises:
        CaptureError: the dataset has no order.
    """
    loader = getattr(loader, "base_dataloader", loader)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise CaptureError(
            "sensitivities need a dataset with an index, so that a sample has the same number at each look; this "
            f"trainer's loader is a {type(loader).__name__} over a {type(getattr(loader, 'dataset', None)).__name__}"
        )
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
    return DataLoader(loader.dataset, batch_size=size, collate_fn=loader.collate_fn, shuffle=False)
