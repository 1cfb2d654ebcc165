"""Sums of a fit that is still going on, kept on disk."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logix_like.curvature.curvature import Curvature
from logix_like.curvature.files import load_curvature, save_curvature
from logix_like.curvature.sums import Sums
from logix_like.curvature.sweep import Sweep
from logix_like.errors import ConfigError, StatisticsError
from logix_like.store.format.tensors import read_tensors, write_tensors

SAVE_SECONDS = 300.0
"""How much work a kill may cost."""
FILES = ("factors", "eigenvalues", "kfac", "signature")
"""All that is ever written into the folder; what else lies there is somebody else's."""


class PartialFit:
    """A folder in which an interrupted fit finds what it had done; without one nothing is kept.

    ``signature`` is plain data that must be the same for a fit to go on.
    """

    def __init__(self, folder: str | Path | None, signature: Mapping[str, Any]) -> None:
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None and self._folder.exists() and not self._folder.is_dir():
            raise ConfigError(f"resume_from is {self._folder}, a file; it must be a folder, which is made if missing")
        self._signature = dict(signature)
        self._saved = time.monotonic()

    def restore(self, name: str, sums: Sums, sweep: Sweep) -> int:
        """Fill ``sums`` with those of the pass ``name``; returns how many batches they hold.

        Raises:
            StatisticsError: the folder holds another fit.
        """
        if self._folder is None or not (self._folder / f"{name}.safetensors").is_file():
            return 0
        tensors, about = read_tensors(self._folder / f"{name}.safetensors")
        self._require_same(about["signature"])
        sweep.groups = about["groups"]
        sums.restore(tensors)
        return int(about["batches"])

    def offer(self, name: str, batches: int, sums: Sums, sweep: Sweep) -> None:
        """Save ``sums``, which hold ``batches`` batches, if the last time is long enough ago."""
        if self._folder is None or time.monotonic() - self._saved < SAVE_SECONDS:
            return
        about = {"batches": batches, "groups": sweep.groups, "signature": self._signature}
        write_tensors(self._folder / f"{name}.safetensors", sums.all(), about)
        self._saved = time.monotonic()

    def factors(self) -> Curvature | None:
        """The curvature of the first pass, if that was finished."""
        if self._folder is None or not (self._folder / "kfac.safetensors").is_file():
            return None
        _, about = read_tensors(self._folder / "signature.safetensors")
        self._require_same(about)
        return load_curvature(self._folder / "kfac.safetensors")

    def keep(self, curvature: Curvature) -> None:
        """The first pass is finished."""
        if self._folder is not None:
            write_tensors(self._folder / "signature.safetensors", {}, self._signature)
            save_curvature(curvature, self._folder / "kfac.safetensors")

    def remove(self) -> None:
        """The fit is finished: nothing is left of it here."""
        if self._folder is not None and self._folder.is_dir():
            for name in FILES:
                (self._folder / f"{name}.safetensors").unlink(missing_ok=True)
            if not any(self._folder.iterdir()):
                self._folder.rmdir()

    def _require_same(self, found: Mapping[str, Any]) -> None:
        for key, value in self._signature.items():
            if found.get(key) != value:
                raise StatisticsError(
                    f"{self._folder} holds a half-finished fit with {key} {found.get(key)!r}, and this one has "
                    f"{value!r}: delete the folder, or give resume_from another"
                )
