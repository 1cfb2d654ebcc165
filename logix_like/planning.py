"""What logging a model will take, before anything is logged: bytes on disk, memory, time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from logix_like.config import Config
from logix_like.errors import ConfigError
from logix_like.layout import Layout, ModuleBlock
from logix_like.run.tracking import chosen_modules
from logix_like.statistics import COVARIANCE_LIMIT
from logix_like.store.encoding.kinds import encoding_named, encoding_of_means

QUEUE_MIB = 16
"""Batches that wait for the writer take no more than this."""
CHUNKS = 6
"""The writer holds about so many chunks: one staged in float32, two encoded, and copies while it encodes."""
COLUMN_BYTES = 72
"""About what a row takes beside its gradient: id, step, epoch, loss, norm, learning rate, flags."""
FLOAT, DOUBLE = 4, 8
"""Bytes of a number in memory, and in a statistic."""


@dataclass(frozen=True)
class Plan:
    """What a run will take. Bytes are bytes; shares lie between 0 and 1."""

    modules: int
    """Tracked modules."""
    parameters: int
    """Of the whole model."""
    covered: float
    """Share of the parameters that is tracked."""
    numbers: int
    """Of one row."""
    row: int
    """Bytes of a row's gradient as it is stored."""
    rows: int
    """Rows: samples times epochs."""
    rows_on_disk: int
    """Bytes of all rows with their columns."""
    view_on_disk: int
    """Bytes of the mean row of each sample, kept beside the rows where a sample is visited more than once."""
    statistics: int
    """Bytes of the statistics, in memory and, once, on disk."""
    projections: int
    """Bytes of the projections' matrices, in memory and on disk."""
    memory: int
    """Bytes beyond the training's own while it is logged, about."""
    arithmetic: float
    """Arithmetic of projecting over that of a training step, where all layers see equally many positions."""
    full: int
    """Bytes that all rows would take as full gradients in float32, for comparison."""

    @property
    def disk(self) -> int:
        """Bytes on disk in all, checkpoints aside."""
        return self.rows_on_disk + self.view_on_disk + self.statistics + self.projections

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the fields' names."""
        return asdict(self) | {"disk": self.disk}

    def __str__(self) -> str:
        """Show a page of text."""
        return "\n".join(f"{name:<14} {line}" for name, line in self._lines())

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield "tracked", f"{self.modules:,} modules, {self.covered:.1%} of {self.parameters:,} parameters"
        yield "row", f"{self.numbers:,} numbers, {size(self.row)}"
        yield "disk", f"{size(self.disk)} for {self.rows:,} rows (full gradients in float32: {size(self.full)})"
        yield "", f"rows {size(self.rows_on_disk)}, mean rows {size(self.view_on_disk)},"
        yield "", f"statistics {size(self.statistics)}, projections {size(self.projections)}"
        yield "memory", f"about {size(self.memory)} beyond the training's own"
        yield (
            "time",
            f"about {self.arithmetic:.1%} more arithmetic in a step; hooks and statistics come on top "
            "(`logix-like info` tells what a run took)",
        )


def plan(model: nn.Module, config: Config, *, samples: int, epochs: int = 1, batch: int = 8) -> Plan:
    """What logging ``epochs`` passes over ``samples`` will take.

    The model may be on the ``meta`` device: none of its numbers is read. Disk follows from the layout of a row;
    memory and time are estimates, to be checked by a short run.

    Raises:
        ConfigError: a count is less than 1.
        UnsupportedModuleError: a module chosen by name has no rule.
    """
    for name, count in {"samples": samples, "epochs": epochs, "batch": batch}.items():
        if count < 1:
            raise ConfigError(f"{name} is {count}; it must be at least 1")
    selection, projector = chosen_modules(model, config, meta=True)
    layout = projector.layout()
    numbers = layout.width
    encoding = encoding_named(config.store.dtype)
    row, mean_row = encoding.row_bytes(layout), encoding_of_means(encoding).row_bytes(layout)
    statistics = sum(_statistics_bytes(block, config) for block in layout)
    projections = sum(FLOAT * (_matrix(b.rank[0], b.shape[0]) + _matrix(b.rank[1], b.shape[1])) for b in layout)
    chunk = int(config.store.chunk_mib * 2**20)
    queued = min(QUEUE_MIB * 2**20, 4 * batch * numbers * FLOAT)
    return Plan(
        modules=len(layout),
        parameters=selection.parameters,
        covered=selection.covered / selection.parameters,
        numbers=numbers,
        row=row,
        rows=samples * epochs,
        rows_on_disk=samples * epochs * (row + COLUMN_BYTES),
        view_on_disk=samples * (mean_row + COLUMN_BYTES) if epochs > 1 else 0,
        statistics=statistics,
        projections=projections,
        memory=2 * statistics + projections + CHUNKS * chunk + queued + 2 * batch * numbers * FLOAT,
        arithmetic=_arithmetic(model, layout),
        full=samples * epochs * FLOAT * sum(block.shape[0] * block.shape[1] for block in layout),
    )


def _statistics_bytes(block: ModuleBlock, config: Config) -> int:
    names, (rank_out, rank_in) = set(config.statistics), block.rank
    covariance = block.size**2 if "covariance" in names and block.size <= COVARIANCE_LIMIT else 0
    kronecker = rank_out**2 + rank_in**2 if "kronecker" in names else 0
    sums = block.size * len(names & {"mean", "variance", "corrected_eigval"})
    return DOUBLE * (covariance + kronecker + sums)


def _matrix(rank: int, width: int) -> int:
    """Numbers of a side's matrix; a side of full rank may be the identity, which has none."""
    return rank * width if rank < width else 0


def _arithmetic(model: nn.Module, layout: Layout) -> float:
    """Multiplications by position: both projections and their product, over forward and backward of all weights."""
    projecting = sum(b.rank[0] * b.shape[0] + b.rank[1] * b.shape[1] + b.rank[0] * b.rank[1] for b in layout)
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    training = 3 * sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in looked_up)
    return projecting / max(1, training)


def size(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} bytes" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"
