"""Where committed rows lie: one chunk of one part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from logix_like.store.format.retractions import Retraction
from logix_like.store.places.storage import Place


@dataclass(frozen=True)
class Segment:
    """Rows ``first`` to ``stop`` of a table, which are one chunk of a part's arrays."""

    folder: Place
    """The part."""
    chunk: int
    """Number of the chunk in each of the part's arrays."""
    first: int
    """First row in the table."""
    rows: int
    """How many rows."""
    crc: Mapping[str, int]
    """CRC-32C of the chunk's file by array."""
    retractions: tuple[Retraction, ...] = ()
    """Those that reach the chunk; they may take back some of its rows."""
    codec: str = "none"
    """How the gradients are compressed."""

    @property
    def stop(self) -> int:
        """Row of the table behind the last one."""
        return self.first + self.rows

    def __str__(self) -> str:
        return f"rows {self.first} to {self.stop - 1}"
