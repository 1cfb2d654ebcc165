"""What a store holds, in one record: for the terminal as text, for programs as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from logix_like.curvature.files import told_curvatures
from logix_like.layout import Layout
from logix_like.statistics import Statistics
from logix_like.store import GradientStore
from logix_like.store.format.schema import VERSION, Flag
from logix_like.timing import Timing

# Which stored sums show that a statistic was gathered, for the words of the config.
GATHERED = {
    "mean": "sum",
    "variance": "square_sum",
    "covariance": "outer_sum",
    "kronecker": "output_outer_sum",
    "corrected_eigval": "corrected_square_sum",
}

WRITER_COLUMNS = ("writer", "rows", "commits", "epoch", "step", "state")


@dataclass(frozen=True)
class StoreSummary:
    """Everything that ``logix-like info`` tells of a store."""

    path: str
    """The store's folder."""
    project: str
    """Name of the run."""
    created: str
    """When, ISO 8601, UTC."""
    library: str
    """Version of the library that created it."""
    format: int
    """Version of the store's format."""
    rows: int
    """Committed rows: visits of samples."""
    samples: int
    """Different data ids among them."""
    nonfinite: int
    """Rows that hold a number which is not finite; they take part in no score."""
    superseded: int
    """Rows that were taken back; they take part in no score."""
    numbers: int
    """Numbers of one row."""
    dtype: str | None
    """How they are stored; None before the first batch."""
    modules: tuple[dict[str, Any], ...]
    """Name, kind, shape ``(d_out, d_in)``, rank ``(rank_out, rank_in)``, numbers of each tracked module, in order."""
    statistics: dict[str, int]
    """For each gathered statistic, how many modules have it."""
    statistics_rows: int
    """How many of the rows the statistics cover."""
    statistics_superseded: int
    """How many of these were taken back since: Kronecker factors still hold them, all else is computed anew."""
    kronecker_rows: int | None
    """How many samples the Kronecker factors are of; None where there are none."""
    curvatures: tuple[dict[str, Any], ...]
    """Name, kind, labels, samples of each curvature at full size, and whether the training gathered it."""
    writers: tuple[dict[str, Any], ...]
    """Name, rows, commits, epoch and step of the last row, state of each writing process."""
    checkpoints: tuple[dict[str, Any], ...]
    """Number, step, epoch, bytes of each checkpoint."""
    bytes: dict[str, int]
    """Bytes on disk by kind."""
    timing: dict[str, float | None]
    """Seconds of the training that were measured, how many of them went into logging, and the overhead: by what part
    of itself logging prolonged the training (None where nothing was measured)."""

    @classmethod
    def of(cls, store: GradientStore) -> StoreSummary:
        """Read everything from ``store``; its rows are not read."""
        manifest, flags = store.manifest, store.flags
        return cls(
            path=str(store.path),
            project=str(manifest.config.get("project") or store.path.name),
            created=manifest.created,
            library=manifest.library,
            format=VERSION,
            rows=len(store),
            samples=len(set(store.data_id.tolist())),
            nonfinite=int(np.count_nonzero(flags & Flag.NONFINITE)),
            superseded=int(np.count_nonzero(flags & Flag.SUPERSEDED)),
            numbers=store.modules.width,
            dtype=manifest.encoding,
            modules=_modules(store.modules),
            statistics=_gathered(store.statistics),
            statistics_rows=store.statistics.rows,
            statistics_superseded=store.statistics.superseded,
            kronecker_rows=_samples(store.statistics),
            curvatures=tuple(told_curvatures(store.path)),
            writers=_writers(store),
            checkpoints=tuple(
                {"number": c.number, "step": c.step, "epoch": c.epoch, "bytes": c.size} for c in store.checkpoints
            ),
            bytes=dict(store.bytes),
            timing=_timing(store.timing),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the fields' names."""
        return asdict(self)

    def __str__(self) -> str:
        """Show a page of text."""
        return "\n".join(f"{name:<12} {line}".rstrip() for name, line in self._lines())

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield "store", self.path
        yield "project", self.project
        yield "created", f"{self.created} by logix_like {self.library}, format {self.format}"
        yield "rows", f"{self.rows:,} of {self.samples:,} samples" + self._left_out()
        if not self.modules:
            yield "", "nothing was logged yet"
            return
        yield "row", f"{self.numbers:,} numbers as {self.dtype}, {len(self.modules)} modules:"
        yield from (("", line) for line in _table(["module", "kind", "shape", "rank", "numbers"], self.modules))
        covered = f", over {self.statistics_rows:,} of {self.rows:,} rows" if self.statistics else ""
        if self.statistics and self.statistics_rows < self.rows:
            covered += " (a query computes sums over rows anew, Kronecker factors stay those of the rows covered)"
        if self.kronecker_rows is not None and self.kronecker_rows < min(self.statistics_rows, self.rows):
            covered += f"; the Kronecker factors over {self.kronecker_rows:,}"
        if self.statistics_superseded:
            covered += f"; {self.statistics_superseded:,} of them superseded, in the Kronecker factors still"
        yield from self._timed()
        kinds = [f"{name} ({count} modules)" for name, count in self.statistics.items()]
        yield "statistics", (", ".join(kinds) or "none") + covered
        yield from self._curved()
        yield "writers", f"{len(self.writers)}:"
        yield from (
            ("", line) for line in _table(["writer", "rows", "commits", "epoch", "step", "state"], self.writers)
        )
        yield "checkpoints", f"{len(self.checkpoints)}" + (":" if self.checkpoints else "")
        yield from (("", line) for line in _table(["number", "epoch", "step", "bytes"], self.checkpoints))
        yield (
            "on disk",
            f"{sum(self.bytes.values()):,} bytes: "
            + ", ".join(f"{name} {size:,}" for name, size in self.bytes.items() if size),
        )

    def _curved(self) -> Iterator[tuple[str, str]]:
        if not self.curvatures:
            return
        yield "curvatures", f"{len(self.curvatures)}:"
        yield from (("", line) for line in _table(["name", "kind", "labels", "samples"], self.curvatures))
        if self.superseded and any(told["gathered"] for told in self.curvatures):
            yield "", f"some of the {self.superseded:,} superseded rows are in what the training gathered still"

    def _timed(self) -> Iterator[tuple[str, str]]:
        overhead, seconds = self.timing["overhead"], self.timing["seconds"]
        if overhead is not None:
            yield "overhead", f"logging prolonged {seconds:,.1f} seconds of training by {overhead:.1%} (threads aside)"

    def _left_out(self) -> str:
        counts = {"not finite": self.nonfinite, "superseded": self.superseded}
        told = [f"{count:,} {what}" for what, count in counts.items() if count]
        return f" ({', '.join(told)}: left out of scores)" if told else ""


def _modules(layout: Layout) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"module": b.name, "kind": b.kind, "shape": b.shape, "rank": b.rank, "numbers": b.size, "tied": b.tied}
        for b in layout
    )


def _timing(timing: Timing) -> dict[str, float | None]:
    return {"seconds": timing.seconds, "logging": timing.logging, "overhead": timing.overhead}


def _gathered(statistics: Statistics) -> dict[str, int]:
    counts = {
        name: sum(statistics.has(module, field) for module in statistics.sums) for name, field in GATHERED.items()
    }
    return {name: count for name, count in counts.items() if count}


def _samples(statistics: Statistics) -> int | None:
    counts = [int(fields["samples"].item()) for fields in statistics.sums.values() if "samples" in fields]
    return min(counts, default=None)


def _writers(store: GradientStore) -> tuple[dict[str, Any], ...]:
    return tuple(
        {
            "writer": w.name,
            "rows": w.rows,
            "commits": len(w.commits.rows),
            "epoch": w.cursor[0],
            "step": w.cursor[1],
            "statistics_rows": store.covered_rows[w.name],
            "state": f"{w.state}: {w.dropped}" if w.dropped else w.state,
        }
        for w in store.writers
    )


def _table(heads: Sequence[str], records: Sequence[dict[str, Any]]) -> list[str]:
    """Columns of ``records`` side by side, numbers to the right; nothing for no record."""
    if not records:
        return []
    cells = [[_cell(head, record[head]) for head in heads] for record in records]
    widths = [max(len(line[i]) for line in [list(heads), *cells]) for i in range(len(heads))]
    right = [isinstance(records[0][head], int) for head in heads]
    return [
        "  ".join(
            f"{cell:>{width}}" if align else f"{cell:<{width}}"
            for cell, width, align in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in [list(heads), *cells]
    ]


def _cell(head: str, value: Any) -> str:
    if isinstance(value, tuple):
        return " x ".join(str(part) for part in value)
    if head in ("epoch", "step") and value == -1:
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)
