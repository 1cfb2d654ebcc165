"""The asking side of a run: queries captured at one or several checkpoints, and the engine that answers them."""

from __future__ import annotations

import reprlib
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from logix_like.capture.tracker import Tracker
from logix_like.config import QueryConfig
from logix_like.errors import CaptureError, ConfigError, QueryError, StoreError
from logix_like.layout import DataId, Layout
from logix_like.query.engine import QueryEngine
from logix_like.query.gradients import QueryGradients
from logix_like.query.tokens import TokenCollector, TokenScores
from logix_like.run.block import BlockOptions
from logix_like.run.logbook import Logbook, per_token
from logix_like.run.tracking import first_of, stored_projections
from logix_like.store import GradientStore, OnDamage, Place, open_store, projections_digest
from logix_like.weights import fingerprint, load_weights, restored_weights, undisturbed
from logix_like.wrapping import named_modules

OPTIONS = ("where", "per", "normalize", "client", "index", "progress")
"""Options of a question that no config holds."""


class Query:
    """What ``with run.query(...) as query`` yields; :attr:`gradients` is there once the block has ended."""

    def __init__(self, data_id: tuple[DataId, ...]) -> None:
        self.data_id = data_id
        self._sum: Tensor | None = None
        self._layout: Layout | None = None
        self._projections = ""
        self._count = 0
        self._open = False

    @contextmanager
    def opened(self) -> Iterator[Self]:
        """While a block is captured; nothing can be asked meanwhile."""
        self._open = True
        try:
            yield self
        finally:
            self._open = False

    def add(self, rows: Tensor, layout: Layout, projections: str) -> None:
        """Take one block's rows ``[queries, width]`` and the digest of what projected them; blocks are averaged."""
        self._sum = rows if self._sum is None else self._sum + rows
        self._layout = layout
        self._projections = projections
        self._count += 1

    @property
    def gradients(self) -> QueryGradients:
        """Mean over the captured blocks.

        Raises:
            QueryError: the block has not ended, or ended with an exception.
        """
        if self._open:
            raise QueryError("the query's block is still open: ask behind 'with run.query(...)', not inside it")
        if self._sum is None or self._layout is None:
            raise QueryError("the query holds no gradient: run forward and backward inside 'with run.query(...)'")
        note = "" if self._count == 1 else f"query gradient averaged over {self._count} checkpoints"
        return QueryGradients(self.data_id, self._sum / self._count, self._layout, note, self._projections)

    def __len__(self) -> int:
        return len(self.data_id)

    def __repr__(self) -> str:
        return f"Query(data_id={reprlib.repr(list(self.data_id))}, {'no ' if self._sum is None else ''}gradients)"


class _Averages:
    """Queries by their ids and, where several have the same, by their order at each checkpoint."""

    def __init__(self) -> None:
        self._queries: dict[tuple[tuple[DataId, ...], int], Query] = {}
        self._seen: Counter[tuple[DataId, ...]] = Counter()

    def next_checkpoint(self) -> None:
        """Begin again to count queries of equal ids."""
        self._seen.clear()

    def of(self, data_id: tuple[DataId, ...]) -> Query:
        """The query that the next block of these ids adds to."""
        number = self._seen[data_id]
        self._seen[data_id] += 1
        return self._queries.setdefault((data_id, number), Query(data_id))


class Asker:
    """Captures queries with a logbook's tracker and holds the engine over its store."""

    def __init__(self, path: Place, settings: QueryConfig, logbook: Logbook, on_damage: OnDamage = "raise") -> None:
        self._path = path
        self._on_damage: OnDamage = on_damage
        self._store: GradientStore | None = None
        self._settings = settings
        self._logbook = logbook
        self._engine: QueryEngine | None = None
        self._engine_key = ""
        self._projections = ""
        self._averaged: _Averages | None = None
        self._warned = self._warned_of_mode = False

    @contextmanager
    def query(self, options: BlockOptions) -> Iterator[Query]:
        """Capture one block of queries; inside :meth:`at_checkpoints`, equal ids are averaged."""
        tracker = self._logbook.tracker
        self._logbook.require_no_block("a query inside it would be logged with it")
        if tracker.needs_warmup:
            raise CaptureError("a query needs the projections first" + self._logbook.warmup_note())
        query = Query(options.data_id)
        if self._averaged is not None:
            query = self._averaged.of(options.data_id)
        recording = tracker.recording(len(options.data_id), detached=True)  # weights may be frozen by now
        with undisturbed(tracker.model), recording, query.opened():
            yield query
        recording.check()
        self._warn_of_train_mode(tracker.model)
        recording.factor = options.factor(options.loss_scale())
        query.add(per_token(recording.project()[0], options).cpu(), tracker.layout, self._digest(tracker))
        if self._logbook.closed and self._averaged is None:
            self._warn_of_other_weights(tracker.model)

    def at_checkpoints(self, which: str | Sequence[int]) -> Generator[nn.Module, None, None]:
        """The model at its checkpoints, one after another; the weights are restored at the end."""
        store, model = self._opened(), self._logbook.tracker.model
        chosen = _chosen([record.number for record in store.checkpoints], which)
        with restored_weights(model):
            self._averaged = _Averages()
            try:
                for number in chosen:
                    self._averaged.next_checkpoint()
                    load_weights(model, store.load_checkpoint(number))
                    yield model
            finally:
                self._averaged = None

    def query_fn(
        self,
        batch: Any,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        options: BlockOptions,
        checkpoints: str | Sequence[int] | None,
    ) -> Query:
        """One batch of queries, at the present weights or averaged over checkpoints."""
        if checkpoints is None:
            return self._ask(self._logbook.tracker.model, batch, loss_fn, options)
        query = None
        with closing(self.at_checkpoints(checkpoints)) as models:
            for model in models:
                query = self._ask(model, batch, loss_fn, options)
        assert query is not None
        return query

    def token_scores(
        self,
        query: QueryGradients,
        batch: Any,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        options: BlockOptions,
        settings: Mapping[str, Any],
    ) -> TokenScores:
        """Scores of the positions of one batch's samples, from one pass at the present weights."""
        tracker = self._logbook.tracker
        self._logbook.require_no_block("token scores inside it would be logged with it")
        asked = self.engine().preconditioned(query, **settings)
        collector = TokenCollector(tracker.layout, asked)
        recording = tracker.recording(len(options.data_id), detached=True, on_factors=collector)
        with undisturbed(tracker.model), recording:
            loss_fn(tracker.model, batch).backward()
        recording.check()
        factor = per_token(torch.ones(len(options.data_id), 1), options)[:, 0] * options.factor(options.loss_scale())
        positions = None if options.mask is None else options.mask.shape[1]
        return TokenScores(query.data_id, options.data_id, *collector.result(positions, factor))

    def engine(self) -> QueryEngine:
        """The engine over all that is committed; it keeps what it has fitted until there are further rows."""
        store = self._opened()
        if self._engine is None or self._engine_key != store.key:
            self._engine, self._engine_key = QueryEngine(store), store.key
        return self._engine

    def settings(self, given: Mapping[str, Any], *only: str) -> dict[str, Any]:
        """The config's query settings with those given over them, reduced to the names in ``only``.

        Raises:
            ConfigError: an option is unknown (lists the known).
        """
        known: dict[str, Any] = {**self._settings.model_dump(), **dict.fromkeys(OPTIONS)}
        if only:
            known = {name: known[name] for name in only}
        unknown = next((name for name in given if name not in known), None)
        if unknown is not None:
            raise ConfigError(f"unknown query option {unknown!r}; known are {', '.join(known)}")
        return {name: value for name, value in {**known, **given}.items() if name not in OPTIONS or name in given}

    def _opened(self) -> GradientStore:
        """The store with all that is committed; kept, so that with ``skip`` each chunk is checked once."""
        if self._store is None:
            self._store = open_store(self._path, on_damage=self._on_damage)
            return self._store
        return self._store.refresh()

    def _ask(
        self,
        model: nn.Module,
        batch: Any,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        options: BlockOptions,
    ) -> Query:
        with self.query(options) as query:
            loss_fn(model, batch).backward()
        return query

    def _digest(self, tracker: Tracker) -> str:
        if not self._projections and tracker.settled:
            self._projections = projections_digest(tracker.layout, stored_projections(tracker))
        return self._projections

    def _warn_of_train_mode(self, model: nn.Module) -> None:
        if self._warned_of_mode:
            return
        changing = [name for name, module in named_modules(model) if module.training and _differs_in_training(module)]
        if changing:
            self._warned_of_mode = True
            warnings.warn(
                f"the query was taken in train mode, in which the model answers otherwise ({first_of(changing)}): call "
                "model.eval() before asking",
                RuntimeWarning,
                stacklevel=4,
            )

    def _warn_of_other_weights(self, model: nn.Module) -> None:
        if self._warned:
            return
        self._warned = True
        store = self._opened()
        weights = store.manifest.fingerprints.get("weights")
        known = {weights, *(record.fingerprint for record in store.checkpoints)} - {None}
        if known and fingerprint(model) not in known:
            warnings.warn(
                "the model's weights are neither those at the end of the logged run nor those of a checkpoint, bit by "
                "bit: scores compare gradients of different models; load the trained weights, or use "
                "run.at_checkpoints() (a cast to another dtype alone does no harm)",
                RuntimeWarning,
                stacklevel=5,
            )


def as_gradients(query: Query | QueryGradients) -> QueryGradients:
    """The gradients of whatever can be asked with."""
    return query.gradients if isinstance(query, Query) else query


def _differs_in_training(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _chosen(known: Sequence[int], which: object) -> Sequence[int]:
    if not known:
        raise StoreError("the store holds no checkpoint; call run.checkpoint() while training, or set 'checkpoints'")
    if which == "all":
        return known
    if which == "last":
        return known[-1:]
    if isinstance(which, str) or not isinstance(which, Sequence) or not which or any(n not in known for n in which):
        listed = ", ".join(map(str, known))
        raise StoreError(f"checkpoints {which!r} were asked for; there are 'all', 'last' and the numbers {listed}")
    return which
