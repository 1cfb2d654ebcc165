"""Float64 sums of many float32 terms, in memory or on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from logix_like.errors import ConfigError, StoreWriteError

SETTLE = 16
"""Batches whose terms are added in their own precision before they go into the float64 sum, which costs much more."""


class Scratch:
    """Where large tensors are put: into memory, or on the disk of a folder, from where pages are read as needed."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None and self._folder.exists() and not self._folder.is_dir():
            raise ConfigError(f"scratch is {self._folder}, a file; it must be a folder, which is made if missing")

    def keep(self, tensor: Tensor) -> Tensor:
        """``tensor``, or a copy of it that lies on disk; its file has no name and goes when the tensor does.

        Raises:
            StoreWriteError: the disk refuses.
        """
        if self._folder is None or not tensor.numel():
            return tensor
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder) as file:
                # Now, since a disk that is full when a page is written would end the process without a word.
                os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
                mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        except OSError as error:
            raise StoreWriteError(
                f"{self._folder} could not take {tensor.nbytes:,} bytes of scratch: {error}; see to the disk, or name "
                "another folder"
            ) from error
        return mapped.view(tensor.shape).copy_(tensor)

    def keep_near(self, tensor: Tensor) -> Tensor:
        """The same for what is used often: on another device it stays where it is."""
        return self.keep(tensor) if tensor.device.type == "cpu" else tensor


MEMORY = Scratch()


class Sums:
    """Sums by name, to which batches add."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._settled: dict[str, Tensor] = {}
        self._recent: dict[str, Tensor] = {}
        self._batches = 0

    def begin(self, samples: int) -> None:
        """A batch of ``samples`` begins; they are counted as ``samples``."""
        self.count("samples", samples)
        self._batches += 1
        if self._batches % SETTLE == 0:
            self._settle()

    def count(self, name: str, number: int) -> None:
        """Add a whole number."""
        self._settled[name] = self._settled.get(name, torch.zeros((), dtype=torch.float64)) + number

    def add(self, name: str, term: Tensor) -> None:
        """Add ``term``, which becomes the sum's."""
        recent = self._recent_like(name, term)
        self._recent[name] = self._scratch.keep_near(term) if recent is None else recent.add_(term)

    def add_product(self, name: str, left: Tensor, right: Tensor) -> None:
        """Add ``left @ right``."""
        recent = self._recent_like(name, left)
        self._recent[name] = self._scratch.keep_near(left @ right) if recent is None else recent.addmm_(left, right)

    def take(self, other: Sums, scales: Mapping[str, float]) -> bool:
        """Add all of ``other``, which is given up, times the scale of a name's first word (1 if it has none).

        Nothing is added if a number is not finite; whether it was.
        """
        terms = other._recent
        if not all(bool(term.isfinite().all()) for term in terms.values()):
            return False
        self.begin(other.samples)
        for name, number in other._settled.items():
            if name != "samples":
                self.count(name, int(number))
        for name, term in terms.items():
            self.add(name, term.mul_(scales.get(name.split("/", 1)[0], 1.0)))
        return True

    @property
    def samples(self) -> int:
        """How many were counted."""
        return int(self._settled.get("samples", 0))

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Take ``sums`` as those of batches before."""
        self._settled.update((name, self._scratch.keep(total)) for name, total in sums.items())

    def all(self) -> dict[str, Tensor]:
        """The sums as they stand, float64."""
        self._settle()
        return self._settled

    def _recent_like(self, name: str, term: Tensor) -> Tensor | None:
        recent = self._recent.get(name)
        if recent is None or (recent.dtype == term.dtype and recent.device == term.device):
            return recent
        self._settle()
        return None

    def _settle(self) -> None:
        while self._recent:
            name, recent = self._recent.popitem()
            total = self._settled.get(name)
            if total is None:
                self._settled[name] = self._scratch.keep(recent.double())
            else:
                total.add_(recent.to(total.device))  # sums that were restored lie on the CPU
