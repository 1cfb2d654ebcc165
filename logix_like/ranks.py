"""This process's place among those that train together (``torch.distributed``), and what they do in turn."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from logix_like.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

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

    def post(self, subject: str, text: str) -> None:
        """Leave word for the other processes, which need not be here; they read it with :meth:`posted`."""
        if self.size > 1:
            _board().set(subject, text)

    def posted(self, subject: str) -> str | None:
        """What a process has left word of, None if there is none yet."""
        if self.size == 1 or not _board().check([subject]):
            return None
        return str(_board().get(subject), "utf-8")


def _board() -> Store:
    """The keys and values by which the processes found each other; torch has no public name for it."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()
