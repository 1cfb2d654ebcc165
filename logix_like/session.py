"""The writing side of a run: from projected batches to a finished store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from logix_like.capture.batch import ProjectedBatch
from logix_like.config import Config
from logix_like.layout import Layout
from logix_like.query.completion import ensure_statistics
from logix_like.statistics import StatisticsAccumulator
from logix_like.store import (
    GradientStore,
    StoreWriter,
    add_fingerprints,
    build_view,
    create_store,
    describe,
    open_store,
    save_checkpoint,
)
from logix_like.weights import fingerprint, tensors

Projections = Mapping[str, tuple[Tensor | None, Tensor | None]]


class StoreSession:
    """One process's writing into one store, from its creation to :meth:`finish`.

    The writer's thread starts with the first batch, when the layout of a row is known.
    """

    def __init__(self, path: Path, config: Config, *, resume: bool, overwrite: bool) -> None:
        self.path = path
        self._config = config
        create_store(path, config.model_dump(mode="json"), resume=resume, overwrite=overwrite)
        self.resumed = open_store(path) if resume else None
        """The store as it was found, when a run is being resumed."""
        self._writer: StoreWriter | None = None
        self._statistics: frozenset[str] = frozenset()
        self._last_checkpoint: tuple[int, str] | None = None

    @property
    def cursor(self) -> tuple[int, int] | None:
        """``(epoch, step)`` of the last commit of the run that is being resumed."""
        writers = () if self.resumed is None else self.resumed.writers
        return max((writer.cursor for writer in writers), key=lambda cursor: cursor[1], default=None)

    def begin(self, layout: Layout, projections: Projections, statistics: frozenset[str]) -> None:
        """Write the module table and the projections, and start the writer's thread."""
        self._statistics = statistics
        settings = self._config.store
        describe(
            self.path,
            layout,
            settings.dtype,
            projections,
            projection=self._config.projection.model_dump(mode="json"),
            fingerprints={"structure": layout.fingerprint()},
            durability=settings.durability,
        )
        self._writer = StoreWriter(
            self.path,
            layout,
            settings.dtype,
            chunk_mib=settings.chunk_mib,
            commit_seconds=settings.commit_seconds,
            durability=settings.durability,
            statistics=StatisticsAccumulator(layout, statistics),
            on_error=settings.on_error,
        )

    @property
    def begun(self) -> bool:
        """Whether a batch has arrived."""
        return self._writer is not None

    @property
    def nonfinite(self) -> int:
        """Rows so far that were stored flagged because they are not finite."""
        return 0 if self._writer is None else self._writer.nonfinite

    def put(self, batch: ProjectedBatch) -> None:
        """Hand one batch to the writer; blocks while its queue is full.

        Raises:
            StoreWriteError: the writer failed and the config's ``store.on_error`` is ``raise``.
        """
        assert self._writer is not None
        self._writer.put(batch)

    def commit(self) -> None:
        """Everything put so far is durable when this returns."""
        if self._writer is not None:
            self._writer.commit()

    def checkpoint(self, model: nn.Module, step: int, epoch: int) -> None:
        """Keep the model's weights, unless the last checkpoint holds the same."""
        seen = (step, fingerprint(model))
        if seen != self._last_checkpoint:
            save_checkpoint(self.path, tensors(model), step=step, epoch=epoch, fingerprint=seen[1])
            self._last_checkpoint = seen

    def finish(self, model: nn.Module | None) -> None:
        """Commit, gather what needs all rows, and close; the store then holds its sample view."""
        if self._writer is None:
            return
        with self._writer as writer:
            writer.commit()
            if "corrected_eigval" in self._statistics:
                _correct_eigenvalues(open_store(self.path), writer)
        if model is not None:
            add_fingerprints(self.path, {"weights": fingerprint(model)})
        build_view(self.path)


def _correct_eigenvalues(store: GradientStore, writer: StoreWriter) -> None:
    # With several writers they belong to all rows together, and to no one writer: a query computes them.
    if store.valid.any() and len(store.writers) == 1:
        writer.write_statistics(ensure_statistics(store, {"corrected_eigval"}))
