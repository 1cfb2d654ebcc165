"""Reading a store: nothing is ever written to it, and no model is needed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from torch import Tensor

from logix_like.errors import ConfigError, QueryError, StoreDamagedError
from logix_like.layout import Layout
from logix_like.path import Checkpoint, TrainingPath
from logix_like.statistics import Statistics
from logix_like.store.encoding.kinds import ENCODINGS
from logix_like.store.format.attempts import WriterInfo, read_intact, read_writers
from logix_like.store.format.checkpoints import CheckpointRecord, load_checkpoint
from logix_like.store.format.commits import CommitReader
from logix_like.store.format.creation import projections_digest, read_projections
from logix_like.store.format.damage import IntactRows, unrecorded_rows
from logix_like.store.format.journal import load_state, read_path
from logix_like.store.format.retractions import Retraction, read_retractions, standing_checkpoints
from logix_like.store.format.schema import (
    CHECKPOINTS,
    COMMITS,
    DOCUMENT,
    PROJECTIONS,
    STATISTICS_FOLDER,
    VIEWS,
    WRITER_COLUMNS,
    WRITERS,
    StoreManifest,
    read_manifest,
)
from logix_like.store.format.sums import Coverage
from logix_like.store.places.files import Place, as_place, files_of, folder_size, reached
from logix_like.store.reading.gathered import GatheredStatistics
from logix_like.store.reading.gradients import GradientReader, RowChunk
from logix_like.store.reading.means import cache_folder
from logix_like.store.reading.table import PartSource, RowTable, make_table
from logix_like.store.reading.view import REDUCTIONS, Rows
from logix_like.store.reading.views import SampleViews
from logix_like.timing import Timing

if TYPE_CHECKING:
    import zarr

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Snapshot:
    """A store as it was at one moment."""

    manifest: StoreManifest
    writers: tuple[WriterInfo, ...]
    retractions: tuple[Retraction, ...]
    table: RowTable
    gathered: GatheredStatistics
    views: SampleViews
    damages: tuple[str, ...]
    damaged_rows: int


OnDamage = Literal["raise", "skip"]


def open_store(path: str | PathLike[str] | Place, *, on_damage: OnDamage = "raise") -> GradientStore:
    """Open the store at ``path`` for reading.

    Args:
        path: The store's folder.
        on_damage: ``raise``: reading a damaged file raises; ``skip``: everything is read and checked now, and
            chunks with a damaged file, damaged lines of records and damaged statistics are left out of all that is
            read later. ``store.damages`` names them, and so does a warning in the log.

    Raises :class:`StoreNotFoundError`, :class:`StoreVersionError` or :class:`StoreDamagedError`.
    """
    if on_damage not in ("raise", "skip"):
        raise ConfigError(f"on_damage is {on_damage!r}; known: raise, skip")
    return GradientStore(path, on_damage=on_damage)


class GradientStore:
    """All committed rows of a store, of all its writers, as one table.

    What is seen is the store as it was when it was opened, or at the last :meth:`refresh`. Rows are
    in the order of the writers' starts, then ranks, then commits.
    """

    factor: np.ndarray | None = None
    """Rows of visits are not scaled."""
    left_out = 0
    """No visit is left out."""

    def __init__(self, path: str | PathLike[str] | Place, *, on_damage: OnDamage = "raise") -> None:
        self.path: Place = as_place(path)
        """The store's folder."""
        self._intact = IntactRows() if on_damage == "skip" else None
        self._commits = CommitReader(salvages=self._intact is not None)
        self._snapshot = _read(self.path, self._commits, self._intact)
        self._tell_damages()

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"GradientStore({str(self.path)!r}: {len(self)} rows, {self.layout or 'not described yet'})"

    def refresh(self) -> Self:
        """See what was committed since; returns the store itself."""
        snapshot = _read(self.path, self._commits, self._intact)
        known_state = (self.writers, self.manifest, self.retractions)
        if known_state != (snapshot.writers, snapshot.manifest, snapshot.retractions):
            known, self._snapshot = self.damages, snapshot
            if self.damages != known:
                self._tell_damages()
            for name in ("projections", "projections_digest"):
                self.__dict__.pop(name, None)
        return self

    @property
    def damages(self) -> tuple[str, ...]:
        """With ``on_damage="skip"``: each damaged file that is left out, which rows it holds and what is wrong."""
        return self._snapshot.damages

    @property
    def damaged_rows(self) -> int:
        """How many committed rows are left out since a file of theirs is damaged."""
        return self._snapshot.damaged_rows

    def _tell_damages(self) -> None:
        for writer in self.writers:
            if writer.commits.spoilt:
                _log.warning("%s: %s; restore %s from a copy", self.path, writer.dropped, writer.folder / COMMITS)
        if self.damages:
            lines = "\n  ".join(self.damages)
            _log.warning("%s: %d damaged rows are left out; damaged files:\n  %s", self.path, self.damaged_rows, lines)

    @property
    def table(self) -> RowTable:
        """The rows themselves; unlike the store, a table never changes."""
        return self._snapshot.table

    @property
    def manifest(self) -> StoreManifest:
        """What the store says of itself."""
        return self._snapshot.manifest

    @property
    def layout(self) -> Layout | None:
        """The module table, None before the first batch was logged."""
        return self.manifest.layout

    @property
    def modules(self) -> Layout:
        """The module table, empty before the first batch was logged."""
        return self.table.layout

    @property
    def writers(self) -> tuple[WriterInfo, ...]:
        """The writing processes and restarts, in row order."""
        return self._snapshot.writers

    @property
    def retractions(self) -> tuple[Retraction, ...]:
        """What was taken back after its commit."""
        return self._snapshot.retractions

    @property
    def key(self) -> str:
        """Identifies the rows: equal keys, equal rows."""
        return self.table.key

    @property
    def data_id(self) -> np.ndarray:
        """The sample's id of each row, object ``[n]`` of str and int."""
        return self.table.data_id

    @property
    def step(self) -> np.ndarray:
        """Optimizer step of each row, -1 unknown."""
        return self.table.step

    @property
    def epoch(self) -> np.ndarray:
        """Epoch of each row, -1 unknown."""
        return self.table.epoch

    @property
    def loss(self) -> np.ndarray:
        """Loss of each row's sample, NaN unknown."""
        return self.table.loss

    @property
    def norm(self) -> np.ndarray:
        """Euclidean norm of each row."""
        return self.table.norm

    @property
    def lr(self) -> np.ndarray:
        """Learning rate of each row's step, NaN unknown."""
        return self.table.lr

    @property
    def flags(self) -> np.ndarray:
        """Bits of :class:`~logix_like.store.format.schema.Flag`."""
        return self.table.flags

    @property
    def metadata(self) -> Mapping[str, np.ndarray]:
        """The user's columns by name."""
        return self.table.metadata

    @property
    def valid(self) -> np.ndarray:
        """Mask of the rows that are finite and not superseded."""
        return self.table.valid

    @property
    def visits(self) -> np.ndarray:
        """One for each row."""
        return self.table.visits

    @property
    def gradients(self) -> GradientReader:
        """Rows by slice, numbers or mask: decoded tensors ``[n, width]``."""
        return self.table.gradients

    @property
    def cache(self) -> Path:
        """A folder of the user's for what others make of this store, such as indexes; it need not be there."""
        return cache_folder(self.path, self.manifest.created, "indexes")

    def chunks(self) -> Iterator[RowChunk]:
        """All rows in order, chunk by chunk, mapped and not copied."""
        return self.table.chunks()

    @property
    def statistics(self) -> Statistics:
        """All writers' statistics together; ``statistics.rows`` may be behind ``len(store)``."""
        return self._snapshot.gathered.together

    @property
    def statistics_of_writers(self) -> Mapping[str, Statistics]:
        """The latest statistics of each writer that has written some, by the writer's name.

        Those that stand for several writers (a resumed run's, once it is finished) are the last one's.
        """
        return self._snapshot.gathered.of_writers

    @property
    def covered_rows(self) -> Mapping[str, int]:
        """How many of its rows the statistics cover, by writer."""
        return self._snapshot.gathered.covered_rows

    @property
    def whole_coverage(self) -> Coverage:
        """What statistics cover that are taken over all rows that count as the store is now."""
        return self._snapshot.gathered.whole

    @cached_property
    def projections(self) -> Mapping[str, tuple[Tensor | None, Tensor | None]]:
        """By module: input ``[rank_in, d_in]`` and output ``[rank_out, d_out]``, None for the identity."""
        return read_projections(self.path, self.manifest)

    @cached_property
    def projections_digest(self) -> str:
        """Tells the stored projections from others (another seed, another basis); empty before the first batch."""
        return "" if self.layout is None else projections_digest(self.layout, self.projections)

    @property
    def checkpoints(self) -> tuple[CheckpointRecord, ...]:
        """The checkpoints in the store, in order, without those of steps that were taken back."""
        return standing_checkpoints(self.path, self.retractions)

    def load_checkpoint(self, number: int) -> dict[str, Tensor]:
        """The tensors of a checkpoint, by its number."""
        return load_checkpoint(self.path, number)

    def checkpoint(self, number: int) -> Checkpoint:
        """A checkpoint with its step and, with ``record: path``, the optimizer's state, by its number."""
        known = {record.number: record for record in self.checkpoints}
        if number not in known:
            load_checkpoint(self.path, number)  # says which there are
        return load_state(self.path, known[number])

    @property
    def training_path(self) -> TrainingPath:
        """The steps that were recorded with ``record: path``.

        Raises :class:`StoreError` if none were.
        """
        return read_path(self.path)

    def view(self, reduce: str = "mean") -> Rows:
        """One row for each sample: ``mean`` or ``sum`` of its valid visits, the ``last``, or all (``none``).

        A mean over several visits is built once, in a cache folder of the user's unless the run left it in
        the store; without repeated visits the view is the rows as they are.

        Raises :class:`QueryError` for an unknown name.
        """
        if reduce not in REDUCTIONS:
            raise QueryError(f"unknown reduce {reduce!r}; known: {', '.join(REDUCTIONS)}")
        return self._snapshot.views.get(reduce)

    @property
    def bytes(self) -> Mapping[str, int]:
        """Bytes on disk by kind: rows (with their columns and records), statistics, projections, ..."""
        total = folder_size(self.path)
        sizes = {name: folder_size(self.path / name) for name in (PROJECTIONS, VIEWS, CHECKPOINTS)}
        sizes[STATISTICS_FOLDER] = sum(folder_size(w.folder / STATISTICS_FOLDER) for w in self.writers)
        sizes["rows"] = folder_size(self.path / WRITERS) - sizes[STATISTICS_FOLDER]
        return sizes | {"other": total - sum(sizes.values())}

    @property
    def timing(self) -> Timing:
        """What the training took so far, from each start's second block on, and logging of it.

        Restarts count one after another; of processes side by side it is the mean.
        """
        processes = len({writer.rank for writer in self.writers})
        return sum((writer.timing for writer in self.writers), Timing()) / max(1, processes)

    def as_zarr(self) -> zarr.Group:
        """The store as a read-only Zarr group, for tools of that world.

        The arrays' shapes may go beyond the committed rows there; what is read behind them is NaN (by their scale,
        where rows have one). A tool that knows no commit records also sees what a merge under way has written so far.
        ``gradients`` holds the stored numbers: the bits of bfloat16 as uint16; the others' rows
        are these times ``scale`` (by row and module) times ``coordinate_scale`` (one row for each chunk), where there
        are such arrays. The attributes of ``gradients`` say how int4 and sign are packed.
        """
        return files_of(self.path).zarr_group(self.path)


def build_view(path: str | PathLike[str] | Place) -> Place | None:
    """Build the mean view of a store's present rows into the store, for its readers to find.

    For the process that owns the store (a reader's views go to its cache folder). Returns the view's
    folder, or None when no sample has two visits, where the rows themselves are the view.
    """
    return _read(as_place(path), CommitReader()).views.build()


def _read(path: Place, records: CommitReader, intact: IntactRows | None = None) -> _Snapshot:
    with reached(path):
        return _snapshot(path, records, intact)


def _snapshot(path: Place, records: CommitReader, intact: IntactRows | None) -> _Snapshot:
    manifest = read_manifest(path)
    if manifest.layout is not None and manifest.encoding not in ENCODINGS:
        raise StoreDamagedError(
            f"{path / DOCUMENT} names the dtype {manifest.encoding!r}, expected one of "
            f"{', '.join(ENCODINGS)}; upgrade logix_like, or restore the file from a copy"
        )
    committed = writers = read_writers(path, records) if intact is None else ()
    if intact is not None:
        committed, writers = read_intact(path, records, intact)
    retractions = read_retractions(path)
    parts = [PartSource(writer.folder, writer.name, writer.commits, retractions) for writer in writers]
    # A store without a module table has no rows, so any encoding reads them all.
    encoding = ENCODINGS[manifest.encoding or "float32"]
    layout = manifest.layout or Layout(())
    table = make_table(parts, layout, encoding, WRITER_COLUMNS, "none")
    damaged_rows = sum(writer.rows for writer in committed) - len(table)
    damaged_rows += sum(unrecorded_rows(one.folder, one.commits) for one in committed if one.commits.unreadable)
    gathered = GatheredStatistics(writers, retractions, table, None if intact is None else damaged_rows)
    views = SampleViews(path, manifest.created, table, checked=intact is not None)
    damages = () if intact is None else _findings(writers, intact, gathered)
    return _Snapshot(manifest, writers, retractions, table, gathered, views, damages, damaged_rows)


def _findings(writers: tuple[WriterInfo, ...], intact: IntactRows, gathered: GatheredStatistics) -> tuple[str, ...]:
    """What is left out of these parts, a line for each file."""
    records = (line for writer in writers for line in writer.commits.unreadable)
    return (*records, *intact.findings(writer.folder for writer in writers), *gathered.damages)
