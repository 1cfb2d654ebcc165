"""The sample view on disk: one mean row for each sample, written once, read like any part."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from platformdirs import user_cache_path
from torch import Tensor

from logix_like.errors import StoreDamagedError, StoreWriteError
from logix_like.store.encoding.kinds import encoding_of_means
from logix_like.store.format.arrays import write_group
from logix_like.store.format.columns import id_text, value_text
from logix_like.store.format.commits import read_commits
from logix_like.store.format.damage import damaged_files
from logix_like.store.format.documents import unsealed
from logix_like.store.format.parts import EncodedRows, flag_nonfinite
from logix_like.store.format.schema import DATA_ID, DOCUMENT, METADATA, VIEW_COLUMNS, segment
from logix_like.store.places.files import Place, make_folder, read_bytes, remove_tree, sync_folder, temporary_name
from logix_like.store.places.hold import FolderHold, remove_unheld
from logix_like.store.reading.table import PartSource, RowTable, make_table
from logix_like.store.reading.view import Visits, last_visits
from logix_like.store.writing.pipeline import chunk_rows
from logix_like.store.writing.rowwriter import RowWriter

CACHE_VARIABLE = "LOGIX_LIKE_CACHE"
"""Environment variable that names the cache folder."""
VIEW_CHUNK_MIB = 4.0
BLOCK_BYTES = 16 * 2**20
"""Sums of this size are in memory at a time."""
STALE_SECONDS = 3600.0
"""Half-written views are removed when they are older: by then their writer is gone."""


def cache_folder(store: Place, created: str, kind: str = "views") -> Path:
    """The folder of a user's for what is made of a store that this process may not write to (not created)."""
    chosen = os.environ.get(CACHE_VARIABLE)
    root = Path(chosen).absolute() if chosen else user_cache_path("logix_like", appauthor=False)
    place = store.resolve() if isinstance(store, Path) else store  # by whatever name it is opened
    name = hashlib.blake2b(f"{place}\n{created}".encode(), digest_size=12).hexdigest()
    return root / kind / name


def open_means(folder: Path, table: RowTable, key: str) -> RowTable | None:
    """The mean view of ``table`` at ``folder``, or None if it is not there, or not complete."""
    try:
        hold = FolderHold(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    commits = read_commits(folder)
    if not commits.closed:
        hold.close()
        return None
    encoding, left_out = encoding_of_means(table.encoding), _left_out(folder)
    means = make_table([PartSource(folder, key, commits)], table.layout, encoding, VIEW_COLUMNS, key)
    return RowTable(means.segments, table.layout, encoding, VIEW_COLUMNS, key, left_out=left_out, hold=hold)


def is_sound(folder: Path) -> bool:
    """Whether there is a mean view, complete, of which nothing is damaged; all of it is read."""
    try:
        _left_out(folder)
        commits = read_commits(folder)
        return commits.closed and not any(any(damaged_files(folder, record, 0)) for record in commits.rows)
    except StoreDamagedError:
        return False


def _left_out(folder: Path) -> int:
    try:
        count = unsealed(read_bytes(folder / DOCUMENT))["left_out"]
        return int(count)
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise StoreDamagedError(
            f"{folder / DOCUMENT} cannot be read ({error!r}); delete the folder, the view is made anew"
        ) from error


def build_means(table: RowTable, visits: Visits, folder: Path) -> None:
    """Write the mean row of each sample to ``folder``, which appears complete or not at all.

    Each row is read once; memory stays bounded by a block of sums and a few chunks. Other views
    beside it, of fewer rows, are removed unless someone reads them.
    """
    temporary = temporary_name(folder)
    try:
        make_folder(folder.parent)
        _write_means(table, visits, temporary)
        if folder.exists() and not is_sound(folder):
            remove_unheld(folder)
        if not folder.exists():  # else another process was faster, with the same rows
            os.rename(temporary, folder)
            sync_folder(folder.parent)
    except OSError as error:
        raise StoreWriteError(
            f"the sample view could not be written to {folder}: {error}; make room or give another "
            f'folder in the environment variable {CACHE_VARIABLE}, or ask with reduce="none"'
        ) from error
    finally:
        with suppress(OSError):  # the next view removes it, once it is old
            remove_tree(temporary)
    _remove_others(folder)


def _remove_others(folder: Path) -> None:
    for other in folder.parent.iterdir():
        try:
            if other == folder or not other.is_dir():
                continue
            if _is_old(other):
                remove_tree(other)
            elif not other.name.startswith("."):  # else another process's, which is being written or removed
                remove_unheld(other)
        except OSError:
            continue  # another process was faster


def _is_old(folder: Path) -> bool:
    """Whether nobody can still be about to write a hidden folder; held views are never so."""
    return folder.name.startswith(".") and time.time() - folder.stat().st_mtime > STALE_SECONDS


def _write_means(table: RowTable, visits: Visits, folder: Path) -> None:
    # Forced to the disk: mapped rows are not checked when read, so none may get lost in a power cut.
    write_group(folder, {"left_out": visits.left_out}, sync=True)
    encoding = encoding_of_means(table.encoding)
    rows = chunk_rows(table.layout, encoding, VIEW_CHUNK_MIB)
    out = RowWriter(folder, table.layout, encoding, chunk_rows=rows, column_names=VIEW_COLUMNS, sync=True)
    last = last_visits(table, visits)
    columns = _columns(table, visits, last)
    try:
        for start, means in _mean_chunks(table, visits, rows):
            samples = slice(start, start + len(means))
            part = {name: column[samples] for name, column in columns.items()}
            out.write(_encode(table, part, last[samples], means))
        out.seal()
    finally:
        out.abandon()


def _columns(table: RowTable, visits: Visits, last: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of the whole view, but for the norms: of each sample's last visit, the mean loss."""
    total = np.bincount(visits.sample, weights=table.loss[visits.rows], minlength=len(visits.count))
    return {
        "step": table.step[last],
        "epoch": table.epoch[last],
        "loss": total / visits.count,
        "lr": table.lr[last],
        "flags": table.flags[last],
        "visits": visits.count,
    }


def _mean_chunks(table: RowTable, visits: Visits, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """First sample and mean rows ``[n, width]`` of one chunk after another."""
    row_bytes = table.layout.width * table.encoding.staging.itemsize
    block = chunk * max(1, BLOCK_BYTES // (row_bytes * chunk))
    samples = len(visits.count)
    order = np.argsort(visits.sample, kind="stable")
    edges = np.searchsorted(visits.sample[order], np.arange(0, samples + block, block))
    for number, first in enumerate(range(0, samples, block)):
        count = min(block, samples - first)
        sums = torch.zeros(count, table.layout.width, dtype=table.encoding.staging)
        wanted = np.sort(order[edges[number] : edges[number + 1]])
        slots = torch.from_numpy(visits.sample[wanted] - first)
        for piece in table.gradients.selected(visits.rows[wanted]):
            sums.index_add_(0, slots[piece.start : piece.stop], piece.decode())
        sums /= torch.from_numpy(visits.count[first : first + count]).unsqueeze(1)
        for start in range(0, count, chunk):
            yield first + start, sums[start : start + chunk]


def _encode(table: RowTable, columns: dict[str, np.ndarray], last: np.ndarray, means: Tensor) -> EncodedRows:
    encoding = encoding_of_means(table.encoding)
    stored = encoding.encode(means, table.layout, encoding.buffer(*means.shape))
    norm = torch.linalg.vector_norm(means, dim=1).double().numpy()
    columns = {**columns, "norm": norm}
    numbers = np.stack([columns[name] for name in VIEW_COLUMNS], axis=1).astype(np.float64)
    texts = {DATA_ID: [id_text(data_id)[0] for data_id in table.data_id[last]]}
    for name, column in table.metadata.items():
        texts[f"{METADATA}/{segment(name)}"] = [value_text(value) for value in column[last]]
    rows = EncodedRows(stored, numbers, texts)
    flag_nonfinite(rows, encoding, table.layout)
    return rows
