"""Writing one part of a store: a group of arrays that grow by whole chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from logix_like.layout import Layout
from logix_like.store.encoding.codecs import UNCOMPRESSED, Codec
from logix_like.store.encoding.kinds import Encoding, StoredRows
from logix_like.store.format.arrays import ArraySpec, chunk_file, write_group
from logix_like.store.format.columns import encode_texts
from logix_like.store.format.schema import (
    COLUMNS,
    COORDINATE_SCALE,
    DATA_ID,
    DOCUMENT,
    GRADIENTS,
    METADATA,
    SCALE,
    WRITER_COLUMNS,
    Flag,
)
from logix_like.store.places.files import Bytes, Pending, Place, as_bytes, prepare_checked, write_files


@dataclass(frozen=True)
class EncodedRows:
    """Some rows as they will stand on disk."""

    stored: StoredRows
    """The gradients, with their scales."""
    numbers: np.ndarray
    """``[rows, columns]`` float64: step, epoch, loss, ..."""
    texts: Mapping[str, list[str]]
    """By array (``data_id``, ``metadata/<name>``): one text for each row."""

    def __len__(self) -> int:
        return len(self.stored)


GROWTH = 8
"""By how much the arrays' shapes grow at a time: there is a document for each, a file to be written."""
SUSPICIOUS_NORM = 1e18
"""A row of a smaller norm (in float32) is finite, and stays so in each encoding."""


def flag_nonfinite(rows: EncodedRows, encoding: Encoding, layout: Layout) -> None:
    """Flag the rows that are not finite as stored; correct norms that overflowed though their row did not."""
    norm, flags = WRITER_COLUMNS.index("norm"), WRITER_COLUMNS.index("flags")
    for row in np.flatnonzero(~(rows.numbers[:, norm] < SUSPICIOUS_NORM)).tolist():
        stored = encoding.decode(rows.stored.select(slice(row, row + 1)), layout).double()
        rows.numbers[row, norm] = torch.linalg.vector_norm(stored)
        if not stored.isfinite().all():
            rows.numbers[row, flags] = int(rows.numbers[row, flags]) | Flag.NONFINITE


class PartWriter:
    """Writes the arrays of one part; every chunk once, each file atomically."""

    def __init__(
        self,
        folder: Place,
        layout: Layout,
        encoding: Encoding,
        *,
        chunk_rows: int,
        column_names: tuple[str, ...],
        codec: Codec = UNCOMPRESSED,
        sync: bool = False,
    ) -> None:
        self._folder = folder
        self._chunk_rows = chunk_rows
        self._sync = sync
        self._specs = part_arrays(layout, encoding, column_names, codec)
        self._codec = codec
        self._capacity = 0
        self._rows = 0

    def prepare(self, chunk: int, rows: EncodedRows) -> tuple[Mapping[str, int], Pending]:
        """Chunk number ``chunk`` of every array: checksums by array, and the files, which are to be published."""
        self._make_room(chunk + 1, rows.texts)
        buffers = self._buffers(rows)
        files = {name: self._chunk_file(name, chunk) for name in buffers}
        crc, pending = prepare_checked({files[name]: [data] for name, data in buffers.items()}, sync=self._sync)
        self._rows = chunk * self._chunk_rows + len(rows)
        return {name: crc[file] for name, file in files.items()}, pending

    def finish(self) -> None:
        """Cut the arrays' shapes to the rows that were written."""
        self._write_documents(self._rows)

    def restore_documents(self, rows: int, texts: Iterable[str]) -> None:
        """Write the documents of a part that has ``rows`` rows and these arrays of text."""
        self._specs |= {name: _TEXTS for name in texts if name not in self._specs}
        if any(name.startswith(METADATA) for name in self._specs):
            write_group(self._folder / METADATA, sync=self._sync)
        self._write_documents(rows)

    def _chunk_file(self, name: str, chunk: int) -> Place:
        return chunk_file(self._folder / name, chunk, 1 if self._specs[name].width is None else 2)

    def _buffers(self, rows: EncodedRows) -> dict[str, Bytes]:
        stored = rows.stored
        scales = {SCALE: stored.scale, COORDINATE_SCALE: stored.coordinate_scale}
        values = self._codec.encode(as_bytes(stored.values), stored.values.dtype.itemsize)
        buffers: dict[str, Bytes] = {GRADIENTS: values}
        buffers |= {name: as_bytes(scale) for name, scale in scales.items() if scale is not None}
        buffers[COLUMNS] = as_bytes(torch.from_numpy(rows.numbers))
        return buffers | {name: encode_texts(texts) for name, texts in rows.texts.items()}

    def _make_room(self, chunks: int, texts: Mapping[str, list[str]]) -> None:
        """Grow the shapes well ahead of the rows: rows beyond the record do not exist anyway."""
        new = [name for name in texts if name not in self._specs]
        if new:
            if not any(name.startswith(METADATA) for name in self._specs):
                write_group(self._folder / METADATA, sync=self._sync)
            self._specs |= dict.fromkeys(new, _TEXTS)
        if chunks > self._capacity:
            # The first chunk of a part is often its only one.
            self._capacity = chunks if self._capacity == 0 else GROWTH * chunks
        elif not new:
            return
        self._write_documents(self._capacity * self._chunk_rows)

    def _write_documents(self, rows: int) -> None:
        documents = {
            self._folder / name / DOCUMENT: [spec.document(rows, self._chunk_rows)]
            for name, spec in self._specs.items()
        }
        write_files(documents, sync=self._sync)


_TEXTS = ArraySpec("string", "")


def part_arrays(
    layout: Layout, encoding: Encoding, column_names: tuple[str, ...], codec: Codec
) -> dict[str, ArraySpec]:
    """The arrays that each part has."""
    arrays = {
        GRADIENTS: ArraySpec(
            encoding.data_type,
            encoding.fill_value,
            encoding.stored_width(layout.width),
            encoding.attributes(),
            codec.metadata(encoding.dtype.itemsize),
        ),
        COLUMNS: ArraySpec("float64", "NaN", len(column_names), {"columns": list(column_names)}),
        DATA_ID: _TEXTS,
    }
    if encoding.scaled:
        arrays[SCALE] = ArraySpec("float32", "NaN", len(layout), {"modules": list(layout.names)})
    if encoding.coordinate_scaled:
        arrays[COORDINATE_SCALE] = ArraySpec("float32", "NaN", layout.width, of_chunks=True)
    return arrays
