"""Figures that were measured before, so that a table that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
CODE = ("logix_like/**/*.py", "configs/*.yaml", "examples/*.py", "tests/bench/lds/*.py")
"""What a figure depends on, beside the truth."""


@dataclass(frozen=True)
class Figure:
    """LDS of one row of the table on one problem."""

    values: tuple[float, ...]
    """One for each logged training."""
    low: float
    """Of the 95 % interval, mean over the trainings."""
    high: float
    seconds: float
    """What they took together."""

    @property
    def value(self) -> float:
        """Mean over the trainings."""
        return sum(self.values) / len(self.values)


class Figures:
    """Figures in a file, a line each, by the problem, the row's name, the trainings and the code that made them."""

    def __init__(self, file: Path, problem: str, runs: int) -> None:
        self._file = file
        self._key = {"problem": problem, "runs": runs, "code": code()}
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text().splitlines() if file.exists() else []
        made = [record for record in map(json.loads, lines) if self._key.items() <= record.items()]
        self._known = {record["row"]: _figure(record) for record in made}

    def get(self, row: str) -> Figure | None:
        """The figure of a row, or None if it was not measured with this code."""
        return self._known.get(row)

    def keep(self, row: str, figure: Figure) -> Figure:
        """Write it down."""
        with self._file.open("a") as file:
            file.write(json.dumps({**self._key, "row": row, **asdict(figure)}) + "\n")
        return figure


def _figure(record: Mapping[str, Any]) -> Figure:
    return Figure(tuple(record["values"]), record["low"], record["high"], record["seconds"])


@cache
def code() -> str:
    """Fingerprint of all files that a figure depends on."""
    digest = hashlib.blake2b(digest_size=12)
    for file in sorted(file for pattern in CODE for file in ROOT.glob(pattern)):
        digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()
