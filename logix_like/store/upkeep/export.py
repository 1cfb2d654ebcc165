"""Writing a store's rows for other tools: one ``.npz`` or ``.parquet`` file, streamed chunk by chunk."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from logix_like.errors import ConfigError, EmptyStoreError, MissingDependencyError
from logix_like.store.places.files import Place, files_of, named_errors, temporary_name
from logix_like.store.reading.reader import open_store
from logix_like.store.reading.view import Rows

Progress = Callable[[int, int], None]
"""Told of each piece: rows written, and rows to be written."""

PIECE_BYTES = 16 * 2**20
"""Decoded rows of about this size are in memory at a time."""

NUMBERS = ("step", "epoch", "loss", "norm", "lr", "visits")


def export_rows(
    path: str | PathLike[str] | Place,
    target: str | PathLike[str],
    *,
    reduce: str = "none",
    progress: Progress | None = None,
) -> int:
    """Write the valid rows of the store at ``path`` to ``target``; returns how many.

    An ``.npz`` has the arrays ``gradients [n, width]``, ``data_id``, ``step``, ``epoch``, ``loss``, ``norm``, ``lr``,
    ``visits`` and, as ``metadata_<name>``, the user's columns; text is stored as text, never pickled. A
    ``.parquet`` has them as columns, the gradients as lists of fixed length. Columns that hold text and numbers are
    written as text. Gradients are float32 (float64 where they are stored so). The file appears complete or not at all.

    Args:
        path: The store's folder or URL.
        target: The file to write; its ending chooses the format.
        reduce: ``none``: each visit is a row; else how a sample's visits are combined (``mean``, ``sum``, ``last``).
        progress: Told of each piece.

    Raises:
        ConfigError: The target ends in neither, or is no file in a folder that exists.
        EmptyStoreError: No row is valid.
        MissingDependencyError: pyarrow is needed for parquet and not installed.
    """
    file = Path(target).absolute()
    if file.suffix not in WRITERS:
        raise ConfigError(f"{file.name!r} ends in none of {', '.join(WRITERS)}; the ending chooses the format")
    if "://" in str(target) or not file.parent.is_dir() or file.is_dir():
        raise ConfigError(f"{str(target)!r} cannot be written to: give a file in a folder of this machine that exists")
    rows = open_store(path).view(reduce)
    kept = np.flatnonzero(rows.valid)
    if not len(kept):
        raise EmptyStoreError(f"{path} holds no valid row to export")
    hidden = temporary_name(file)
    try:
        with named_errors(file):
            WRITERS[file.suffix](_Source(rows, kept, progress or (lambda done, of: None)), hidden)
            files_of(file).move(hidden, file)
    finally:
        hidden.unlink(missing_ok=True)
    return len(kept)


class _Source:
    """The rows to write, in pieces."""

    def __init__(self, rows: Rows, kept: np.ndarray, progress: Progress) -> None:
        self._rows = rows
        self._progress = progress
        self.kept = kept
        self.width = rows.layout.width
        columns = {"data_id": rows.data_id} | {name: getattr(rows, name) for name in NUMBERS}
        columns |= {f"metadata_{name}": column for name, column in rows.metadata.items()}
        self.columns = {name: plain_column(column[kept]) for name, column in columns.items()}
        self.dtype = np.dtype(str(rows.gradients[kept[:1]].dtype).removeprefix("torch."))

    def pieces(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows by their numbers among those that are written, decoded."""
        size = max(1, PIECE_BYTES // (self.width * self.dtype.itemsize))
        for start in range(0, len(self.kept), size):
            part = slice(start, min(start + size, len(self.kept)))
            gradients = self._rows.gradients[self.kept[part]].numpy()
            if self._rows.factor is not None:
                gradients = gradients * self._rows.factor[self.kept[part], None]
            yield part, gradients.astype(self.dtype, copy=False)
            self._progress(part.stop, len(self.kept))


def plain_column(values: np.ndarray) -> np.ndarray:
    """Numbers, or texts (an object array) where the values are anything else."""
    if values.dtype != object:
        return values
    kinds = {type(value) for value in values.tolist()}
    if kinds == {int} and all(-(2**63) <= value < 2**63 for value in values.tolist()):
        return values.astype(np.int64)
    if kinds and kinds <= {float, int, type(None)} and float in kinds | {float if type(None) in kinds else int}:
        return np.array([np.nan if value is None else float(value) for value in values.tolist()])
    texts = np.empty(len(values), dtype=object)
    texts[:] = ["" if value is None else str(value) for value in values.tolist()]
    return texts


def _write_npz(source: _Source, file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("gradients.npy", "w", force_zip64=True) as entry:
            shape = (len(source.kept), source.width)
            header = {"descr": source.dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_2_0(entry, header)
            for _, gradients in source.pieces():
                entry.write(gradients.tobytes())
        for name, column in source.columns.items():
            content = io.BytesIO()
            plain = column.astype(str) if column.dtype == object else column
            np.lib.format.write_array(content, plain, allow_pickle=False)
            archive.writestr(f"{name}.npy", content.getvalue())


def _write_parquet(source: _Source, file: Path) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError(
            "parquet files need pyarrow, which is not installed; run: pip install 'logix_like[parquet]', or export to "
            ".npz"
        ) from error
    columns: dict[str, Any] = {name: pa.array(column) for name, column in source.columns.items()}
    number = pa.from_numpy_dtype(source.dtype)
    schema = pa.schema(
        [*((name, column.type) for name, column in columns.items()), ("gradients", pa.list_(number, source.width))]
    )
    with pq.ParquetWriter(file, schema) as writer:
        for part, gradients in source.pieces():
            flat = pa.array(gradients.reshape(-1), number)
            lists = pa.FixedSizeListArray.from_arrays(flat, source.width)
            own = [column.slice(part.start, part.stop - part.start) for column in columns.values()]
            writer.write_table(pa.table([*own, lists], schema=schema))


WRITERS: dict[str, Callable[[_Source, Path], None]] = {".npz": _write_npz, ".parquet": _write_parquet}
"""How a file is written, by its ending."""
