"""This process's place among those that train together (``torch.distributed``), and what they do in turn."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from logix_like.errors import ConfigError, StoreError

Chosen = TypeVar("Chosen")


@dataclass(frozen=True)
class Ranks:
    """One of ``size`` processes; alone where ``torch.distributed`` is not in use."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """This process.

        Raises:
            ConfigError: a launcher has started several processes, and they do not know of each other yet.
        """
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        launched = os.environ.get("WORLD_SIZE", "1")
        if launched.isdigit() and int(launched) > 1:
            raise ConfigError(
                f"this is one of {launched} processes (WORLD_SIZE), but torch.distributed is not initialised; call "
                "torch.distributed.init_process_group() before logix.init(), so that one store is made for all"
            )
        return cls()

    @property
    def first(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0

    def once(self, act: Callable[[], object]) -> None:
        """Let the first process act while the others wait; if it fails, all fail.

        Raises:
            StoreError: the first process failed (it raises the error itself).
        """
        error: Exception | None = None
        if self.first:
            try:
                act()
            except Exception as caught:
                error = caught
        if self.size > 1:
            told = [None if error is None else f"{type(error).__name__}: {error}"]
            dist.broadcast_object_list(told, src=0)
            if told[0] is not None and not self.first:
                raise StoreError(f"process 0 of {self.size} failed, so this one (process {self.rank}) stops: {told[0]}")
        if error is not None:
            raise error

    def agree(self, choose: Callable[[], Chosen]) -> Chosen:
        """What the first process chooses, told to all.

        Raises:
            StoreError: the first process failed (it raises the error itself).
        """
        chosen: list[Any] = [None]
        self.once(lambda: chosen.__setitem__(0, choose()))
        if self.size > 1:
            dist.broadcast_object_list(chosen, src=0)
        found: Chosen = chosen[0]
        return found

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.size > 1:
            dist.barrier()
