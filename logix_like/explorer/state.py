"""What the explorer knows: an open store, its samples, its engine, and what is computed in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from torch import Tensor, nn

from logix_like.damping import DampingSetting
from logix_like.errors import LogixError, QueryError
from logix_like.explorer.catalogue import Catalogue, Wish
from logix_like.layout import DataId
from logix_like.query.engine import QueryEngine
from logix_like.query.gradients import QueryGradients
from logix_like.query.modes import MODES
from logix_like.query.result import InfluenceResult, Provider
from logix_like.report.content import Contents
from logix_like.run.starting import load
from logix_like.store import GradientStore, Place, VerifyReport, open_store, verify
from logix_like.store.reading.table import RowTable

LossOfText = Callable[[nn.Module, str], Tensor]
SCORED_AT_ONCE = 400_000_000
"""Self-influence is computed without being asked for while the rows together hold fewer numbers than this."""
SPLIT_PAIRS = 5_000_000
"""Scores are split by layer while samples times modules are no more than this."""
PATIENCE = 0.3
"""Seconds that a page waits for the samples' ids before it shows the first rows alone."""


@dataclass
class Job:
    """Something that runs in the background, once."""

    work: Callable[[Job], Any]
    done: int = 0
    total: int = 0
    result: Any = None
    error: str = ""
    thread: threading.Thread | None = field(default=None, repr=False)

    def start(self) -> Job:
        """Begin; returns the job."""
        self.thread = threading.Thread(target=self._run, name="logix-explorer", daemon=True)
        self.thread.start()
        return self

    def wait(self, seconds: float | None = None) -> None:
        """Until it has ended, or for some seconds."""
        if self.thread is not None:
            self.thread.join(seconds)

    @property
    def running(self) -> bool:
        """Whether it is at work."""
        return self.thread is not None and self.thread.is_alive()

    def _run(self) -> None:
        try:
            self.result = self.work(self)
        except Exception as error:  # whatever it was, the page says so
            self.error = str(error) if isinstance(error, LogixError) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Options:
    """How to ask."""

    k: int = 10
    mode: str = "dot"
    preconditioner: str = "auto"
    damping: DampingSetting = 0.1


class Explorer:
    """A store to be looked at; safe to be used by several threads.

    Args:
        path: The store's folder or URL.
        data: Gives a sample's text, picture or facts for its id.
        model: The trained model and the loss of a typed text, for queries that are typed.
    """

    def __init__(
        self,
        path: str | PathLike[str] | Place,
        data: Provider | None = None,
        model: tuple[nn.Module, LossOfText] | None = None,
    ) -> None:
        self.run = load(path, None if model is None else model[0])
        self.store: GradientStore = open_store(path)
        self.contents = Contents(data)
        self.loss_of_text = None if model is None else model[1]
        self._model = None if model is None else model[0]
        self.defaults = Options(**self.run.config.query.model_dump(include={"mode", "preconditioner", "damping"}))
        self.verification: Job | None = None
        self._engine = QueryEngine(self.store)
        self._lock = threading.RLock()
        self._asking = threading.Lock()
        self._seen: list[tuple[float, int]] = [(time.monotonic(), len(self.store))]
        self._closing = threading.Event()
        self.scoring: Job | None = None
        self._listing = Job(self._list).start()

    def close(self) -> None:
        """Begin nothing more, break off what can be, and wait until nothing runs in the background any more."""
        self._closing.set()
        self._listing.wait()  # it may have begun the scoring
        for job in (self.scoring, self.verification):
            if job is not None:
                job.wait()

    # Samples

    def _list(self, job: Job) -> Catalogue:
        """All samples; ids and classes are read now, since that is what takes time."""
        catalogue = Catalogue(self.store.view("last"))
        _ = catalogue.ids, catalogue.choices, catalogue.numbers, catalogue.place("")
        if 0 < len(self.store) * self.store.modules.width < SCORED_AT_ONCE:
            self.score(catalogue)
        return catalogue

    def catalogue(self, patience: float = PATIENCE) -> Catalogue:
        """All samples; while their ids are being read, those of the first rows.

        Raises:
            LogixError: the samples cannot be read.
        """
        listing = self._listing
        listing.wait(patience)
        if listing.error:
            raise QueryError(f"the samples cannot be read: {listing.error}")
        return _first_rows(self.store) if listing.running else listing.result

    def score(self, catalogue: Catalogue) -> None:
        """Begin to compute all self-influences, if that was not begun."""
        with self._lock:
            wanted = self.scoring is None or (self.scoring.error and not self.scoring.running)
            if wanted and not self._closing.is_set():
                self.scoring = Job(lambda job: self._score(catalogue)).start()

    def _score(self, catalogue: Catalogue) -> bool:
        with self._asking:
            found = self._engine.self_influence(progress=False)
        catalogue.take_self_influence(found.data_id.tolist(), found.scores.double().numpy())
        return True

    def refresh(self) -> bool:
        """See what was committed since; whether there was something."""
        with self._lock:
            key = self.store.key
            self.store.refresh()
            self._seen = [*self._seen[-20:], (time.monotonic(), len(self.store))]
            if self.store.key == key:
                return False
            if not self._listing.running:
                self.scoring = None
                self._listing = Job(self._list).start()
            return True

    @property
    def recent_rate(self) -> float | None:
        """Rows per second over the last refreshes; None before there are two."""
        (start, before), (end, now) = self._seen[0], self._seen[-1]
        return (now - before) / (end - start) if end - start > 0.5 else None

    # Questions

    def ask_sample(self, data_id: DataId, options: Options, wish: Wish) -> InfluenceResult:
        """What influences a stored sample: its own stored gradient is the query.

        Raises:
            QueryError: there is no such sample, or an option makes no sense.
        """
        catalogue = self.catalogue(patience=60)
        place = catalogue.place(data_id)
        if place is None:
            raise QueryError(
                f"the store holds no valid row of a sample {data_id!r}; choose one from the list of samples"
            )
        rows = catalogue.rows.gradients[place : place + 1].float()
        note = "a stored sample's own gradient, at its last visit"
        query = QueryGradients((data_id,), rows, self.store.modules, note, self.store.projections_digest)
        return self._answer(query, options, wish, catalogue)

    def ask_text(self, text: str, options: Options, wish: Wish) -> InfluenceResult:
        """What influences the loss of a text that was typed.

        Raises:
            QueryError: no model was given, or its loss failed.
        """
        if self.loss_of_text is None or self._model is None:
            raise QueryError("a typed query needs the model: start with --model module:function")
        with self._asking:
            try:
                with self.run.query(data_id=[text[:80]]) as query:
                    self.loss_of_text(self._model, text).backward()
            except LogixError:
                raise
            except Exception as error:  # the user's own code may raise anything
                raise QueryError(f"the model's loss failed on this text: {type(error).__name__}: {error}") from error
        return self._answer(query.gradients, options, wish, self.catalogue(patience=60))

    def _answer(self, query: QueryGradients, options: Options, wish: Wish, catalogue: Catalogue) -> InfluenceResult:
        chosen = [catalogue.ids[place] for place in catalogue.chosen(wish)] if wish.restricts else None
        if chosen is not None and not chosen:
            raise QueryError("no sample fits the filter; change or clear it")
        with self._asking:
            return self._engine.influence(
                query,
                preconditioner=options.preconditioner,
                damping=options.damping,
                mode=options.mode,
                data_id=chosen,
                per="layer" if self._splits(options.mode, catalogue) else None,
                progress=False,
            )

    def _splits(self, mode: str, catalogue: Catalogue) -> bool:
        """Whether scores are split by layer: few enough, and of a mode that is a sum over layers."""
        small = len(catalogue) * len(self.store.modules) <= SPLIT_PAIRS
        return small and mode in MODES and MODES[mode].proportional

    # Health

    def verify(self) -> None:
        """Begin to check every byte of the store, unless that is going on."""
        with self._lock:
            if self.verification is None or not self.verification.running:
                self.verification = Job(self._verify).start()

    def _verify(self, job: Job) -> VerifyReport:
        def progress(done: int, total: int) -> None:
            job.done, job.total = done, total
            if self._closing.is_set():
                raise QueryError("the check was broken off: the explorer is closing")

        return verify(self.store.path, progress)


def _first_rows(store: GradientStore) -> Catalogue:
    """The samples of the first chunk of rows, without reading any other."""
    table = store.table
    segments = table.segments[:1]
    return Catalogue(RowTable(segments, table.layout, table.encoding, table.column_names, "first rows"), complete=False)
