"""Writing and committing rows: full chunks to a part's own arrays, short ones as parts of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from logix_like.errors import StoreWriteError
from logix_like.layout import Layout
from logix_like.store.encoding.codecs import UNCOMPRESSED, Codec
from logix_like.store.encoding.kinds import Encoding
from logix_like.store.format.arrays import write_group
from logix_like.store.format.commits import CloseRecord, CommitLog, ReplacesRecord, RowsRecord, StatisticsRecord
from logix_like.store.format.parts import EncodedRows, PartWriter
from logix_like.store.format.schema import TAILS
from logix_like.store.places.files import Place, files_of
from logix_like.timing import NOTHING, Timing


class RowWriter:
    """One part with its tails and its record; a chunk is written once and then recorded.

    ``guard`` is asked before the files of a chunk get their names, and raises where nothing more may be written.
    """

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
        guard: Callable[[], object] = bool,
    ) -> None:
        self._named = folder
        self._guard = guard
        self._identity = files_of(folder).identity(folder)
        self._anchor = files_of(folder).anchor(folder)
        # By an open handle: what takes the folder's name between a check and a write is never written to.
        self.folder: Place = self._anchor.place
        """The part, to write to."""
        self._layout = layout
        self._encoding = encoding
        self.chunk_rows = chunk_rows
        """Rows of a full chunk."""
        self._column_names = column_names
        self._codec = codec
        self._sync = sync
        self._main = self._part(self.folder, chunk_rows)
        self._log = CommitLog(self.folder, sync=sync)
        self._chunks = self._tails = 0

    def write(self, rows: EncodedRows, *, epoch: int = -1, step: int = -1, timing: Timing = NOTHING) -> None:
        """Write at most a chunk of rows and commit them; a Zarr array cannot end with a short chunk.

        Raises :class:`StoreWriteError` when the part is no longer the one that this was made for.
        """
        self.require_present()
        if len(rows) == self.chunk_rows:
            part, name, chunk = self._main, "", self._chunks
            self._chunks += 1
        else:
            part, name, chunk = self._new_tail(len(rows)), f"{TAILS}/{self._tails}", 0
            self._tails += 1
        crc, files = part.prepare(chunk, rows)
        try:
            self._guard()
            files.publish()
        finally:
            files.discard()
        self.require_present()
        start, codec = chunk * self.chunk_rows, self._codec.name
        self._log.append(RowsRecord(self._log.sequence, name, chunk, start, len(rows), crc, epoch, step, codec, timing))

    def record_replaced(self, parts: Sequence[str]) -> None:
        """Say that this part, once it is sealed, stands in the place of others."""
        self._log.append(ReplacesRecord(self._log.sequence, tuple(parts)))

    def record_statistics(self, generation: int, watermark: int) -> None:
        """Switch to a generation of statistics that is written."""
        self._log.append(StatisticsRecord(self._log.sequence, generation, watermark))

    def require_present(self) -> None:
        """Raise :class:`StoreWriteError` when the part was removed, or another one is in its place.

        That happens when its store is replaced while it is written to; the new store's files are not touched.
        """
        if files_of(self._named).identity(self._named) != self._identity:
            raise StoreWriteError(
                f"the store of {self._named} was removed or replaced (overwrite=True) while it was written to; "
                "what was committed to it is gone with it: give each run a project of its own"
            )

    def seal(self) -> None:
        """Trim the arrays' shapes to their rows and end the record."""
        self.require_present()
        if self._chunks:
            self._main.finish()
        self._log.append(CloseRecord(self._log.sequence))
        self.abandon()

    def abandon(self) -> None:
        """Let go of the record file without ending it; idempotent."""
        try:
            self._log.close()
        finally:
            self._anchor.close()

    def _new_tail(self, rows: int) -> PartWriter:
        if self._tails == 0:
            write_group(self.folder / TAILS, sync=self._sync)
        folder = self.folder / TAILS / str(self._tails)
        write_group(folder, sync=self._sync)
        return self._part(folder, rows)

    def _part(self, folder: Place, rows: int) -> PartWriter:
        return PartWriter(
            folder,
            self._layout,
            self._encoding,
            chunk_rows=rows,
            column_names=self._column_names,
            codec=self._codec,
            sync=self._sync,
        )
