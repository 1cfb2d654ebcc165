"""The object that a training loop talks to, and the two functions that make one.

Sign convention, here as everywhere: a positive score means that training on the sample lowered the query's loss
(a proponent, helpful); negative, that it raised it (an opponent, harmful).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from logix_like.block import Block, BlockOptions
from logix_like.capture.batch import ProjectedBatch
from logix_like.capture.tracker import Recording, Tracker
from logix_like.config import Config, EverySteps, load_config
from logix_like.errors import CaptureError, ConfigError, StoreError
from logix_like.extraction import batch_ids, progress_over
from logix_like.layout import DataId
from logix_like.logtypes import statistics_from_setup
from logix_like.query.engine import QueryEngine
from logix_like.query.gradients import QueryGradients
from logix_like.query.result import InfluenceResult, SelfInfluence
from logix_like.querying import Query
from logix_like.session import StoreSession
from logix_like.steps import Progress
from logix_like.store import GradientStore, open_store
from logix_like.tracking import describe, new_tracker, stored_projections, tracker_of_store, warn_of_coupling
from logix_like.weights import fingerprint, frozen, gradients_put_aside, load_weights, restored_weights


def init(
    project: str | None = None,
    model: nn.Module | None = None,
    config: str | PathLike[str] | Mapping[str, Any] | Config | None = None,
    *,
    optimizer: Optimizer | None = None,
    resume: bool = False,
    overwrite: bool = False,
    verbose: bool = True,
    **overrides: Any,
) -> Run:
    """Start a run that logs into the store ``<root>/<project>``.

    Args:
        project: name of the run; may also stand in the config.
        model: the model to track; may be given later to :meth:`Run.watch`.
        config: a YAML file, a preset's name, a mapping or a :class:`Config`.
        optimizer: lets rows carry optimizer steps and learning rates.
        resume: go on behind the last commit of an earlier run in the same place.
        overwrite: replace an earlier run in the same place.
        verbose: print once, to stderr, what is tracked.
        overrides: settings that win over the config.

    Raises:
        ConfigError: a setting is unknown or wrong, or no project is named.
        StoreExistsError: the place holds another run, and neither ``resume`` nor ``overwrite`` is set.
    """
    settings = load_config(config, project=project, **overrides)
    if settings.project is None:
        raise ConfigError("no project is named; give init(project=...) or 'project:' in the config")
    if resume and overwrite:
        raise ConfigError("resume and overwrite exclude each other")
    path = Path(settings.root) / settings.project
    session = StoreSession(path, settings, resume=resume, overwrite=overwrite)
    run = Run(settings, path, session, optimizer=optimizer, verbose=verbose)
    if model is not None:
        run.watch(model)
    return run


def load(path: str | PathLike[str], model: nn.Module | None = None) -> Run:
    """Open a finished (or still growing) store for queries; it needs no config and never writes.

    Raises:
        StoreNotFoundError: there is no store at ``path``.
        ModelMismatchError: ``model`` is not the one that was logged (names the first difference).
    """
    store = open_store(path)
    # Read leniently: a later version of the settings must not keep an old store from opening.
    known = {key: value for key, value in store.manifest.config.items() if key in Config.model_fields}
    run = Run(load_config(known), Path(path), None, verbose=False)
    if model is not None:
        run.watch(model)
    return run


class Run:
    """Logs the gradients of training samples, and answers queries about them.

    Made by :func:`init` (logging) or :func:`load` (queries only).
    """

    def __init__(
        self,
        config: Config,
        path: Path,
        session: StoreSession | None,
        *,
        optimizer: Optimizer | None = None,
        verbose: bool = True,
    ) -> None:
        self.config = config
        self.path = path
        self._session = session
        self._verbose = verbose
        self._tracker: Tracker | None = None
        self._statistics = frozenset(config.statistics)
        self._saving = True
        self._finished = session is None
        self._open: Block | None = None
        self._blocks = 0
        self._waiting: list[tuple[Recording, BlockOptions, ProjectedBatch | None]] = []
        self._last_log: QueryGradients | None = None
        self._engine: QueryEngine | None = None
        self._averaged: dict[tuple[DataId, ...], Query] | None = None
        self._warned = False
        self._progress = Progress(optimizer, **_cursor(session))
        if isinstance(config.checkpoints, EverySteps):
            if not self._progress.counts_steps:
                raise ConfigError("checkpoints: every_steps counts optimizer steps; give init(optimizer=...)")
            self._progress.on_step = self._checkpoint_every(config.checkpoints.every_steps)

    # What is tracked

    def watch(self, model: nn.Module) -> None:
        """Track ``model``'s modules; calling it again with the same model does nothing.

        Raises:
            CaptureError: another model is being watched already.
            ModelMismatchError: the store was made with another model.
            UnsupportedModuleError: a module chosen by name has no rule.
        """
        if self._tracker is not None:
            if self._tracker.model is not model:
                raise CaptureError("this run watches another model already; one run logs one model")
            return
        stored = self._stored()
        if stored is not None:
            self._tracker = tracker_of_store(model, self.config, stored)
        else:
            self._tracker = new_tracker(model, self.config)
        if self._verbose:
            print(describe(self._tracker, self.config), file=sys.stderr)

    def setup(self, log_types: Mapping[str, Sequence[str]]) -> None:
        """Choose what is gathered, in LogIX's words: ``{"grad": ["log", "covariance"]}``.

        ``grad`` takes ``log`` (rows are stored in any case), ``mean``, ``variance``, ``covariance`` and ``corrected_eigval``;
        ``forward`` and ``backward`` take ``covariance`` (together the Kronecker factors).

        Raises:
            ConfigError: an unknown name (lists the known), or rows were logged already.
        """
        if self._blocks or self._finished:
            raise ConfigError("setup() must be called before the first batch is logged")
        self._statistics = statistics_from_setup(log_types)

    def save(self, enabled: bool = True) -> None:
        """Whether blocks are stored (the default) or only kept for :meth:`get_log`."""
        self._saving = enabled

    # Blocks of the training loop

    def __call__(
        self,
        data_id: Any,
        mask: Tensor | None = None,
        scale: float = 1.0,
        scaler: Any = None,
        loss_reduction: str | None = None,
        loss: Tensor | None = None,
        metadata: Mapping[str, Sequence[Any]] | None = None,
    ) -> Block:
        """A context manager around the forward and backward pass of one batch.

        Args:
            data_id: one ``str`` or ``int`` for each sample; or token ids ``[batch, positions]``, hashed row by row.
            mask: ``[batch, positions]``, true where a position counts (statistics, token means, hashes).
            scale: what the loop multiplied its loss by, e.g. 1 / accumulated batches.
            scaler: the ``torch.amp.GradScaler`` in use.
            loss_reduction: ``mean``, ``sum`` or ``token_mean`` where it differs from the config's.
            loss: per-sample losses ``[batch]``, stored beside the rows.
            metadata: further columns, one value for each sample.

        Raises:
            CaptureError: at the end of the block, if no gradient reached a tracked module.
        """
        options = self._options(data_id, mask, scale, scaler, loss_reduction, loss=loss, metadata=metadata)
        return self._new_block(options, detached=False)

    def start(self, data_id: Any, mask: Tensor | None = None, **options: Any) -> None:
        """Open a block, as ``with run(data_id=...)`` does; :meth:`end` closes it."""
        self(data_id, mask, **options).__enter__()

    def end(self) -> None:
        """Close the block that :meth:`start` opened.

        Raises:
            CaptureError: none is open, or no gradient reached a tracked module.
        """
        if self._open is None:
            raise CaptureError("end() without start(): no block is open")
        self._open.__exit__(None, None, None)

    def epoch(self, number: int) -> None:
        """Say that epoch ``number`` begins; with ``checkpoints: every_epoch`` the weights of the last one are kept."""
        if self._progress.epoch not in (-1, number) and self.config.checkpoints == "every_epoch":
            self.checkpoint()
        self._progress.epoch = number

    def get_log(self) -> QueryGradients:
        """Rows of the last block: ids and projected gradients, usable as a query.

        Raises:
            CaptureError: no block has ended yet, or its rows wait for the projection's warm-up.
        """
        if self._last_log is None:
            raise CaptureError("there is no log yet: run a block first" + self._warmup_note())
        return self._last_log

    def extract(
        self,
        loader: Iterable[Any],
        loss_fn: Callable[[nn.Module, Any], Tensor],
        *,
        data_id: Callable[[Any], Any] | None = None,
        mask: Callable[[Any], Tensor] | None = None,
        progress: bool = True,
    ) -> None:
        """Log one pass over ``loader`` at the present weights, without training.

        For its duration weights are frozen (no weight gradient is computed) and the model is in eval mode; both are
        restored. Ids are running numbers 0, 1, ... unless ``data_id`` takes them from a batch.

        Args:
            loader: yields batches in a fixed order.
            loss_fn: ``loss_fn(model, batch)`` returns the batch's loss, reduced as the config says.
            data_id: ids of a batch.
            mask: mask of a batch, as in :meth:`__call__`.
            progress: whether a bar is shown.
        """
        tracker = self._required_tracker()
        with frozen(tracker.model), torch.enable_grad():
            for number, batch in progress_over(loader, progress, self.path.name, shuffled_ids=data_id is None):
                ids = batch_ids(batch, number) if data_id is None else data_id(batch)
                options = self._options(ids, None if mask is None else mask(batch), 1.0, None, None)
                with self._new_block(options, detached=True):
                    loss_fn(tracker.model, batch).backward()

    # What is kept

    def commit(self) -> None:
        """Everything logged so far is durable when this returns."""
        if self._session is not None:
            self._project_waiting(force=False)
            self._session.commit()

    def checkpoint(self) -> None:
        """Keep the model's weights in the store (safetensors)."""
        if self._session is None or self._finished:
            raise StoreError("this run is finished or was loaded for queries: it keeps no further checkpoints")
        self._session.checkpoint(self._required_tracker().model, self._progress.step, self._progress.epoch)

    def finalize(self) -> None:
        """End logging: commit, write statistics, build the sample view. Calling it again does nothing.

        Afterwards blocks are captured for :meth:`get_log` but not stored, and queries go on working.
        """
        if self._finished or self._session is None:
            return
        self._finished = True
        self._progress.close()
        model = None if self._tracker is None else self._tracker.model
        self._project_waiting(force=True)
        if model is not None and self.config.checkpoints != "none":
            self._session.checkpoint(model, self._progress.step, self._progress.epoch)
        self._session.finish(model)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.finalize()

    @property
    def store(self) -> GradientStore:
        """The store, read-only, with everything committed so far."""
        return open_store(self.path)

    @property
    def resumed_at(self) -> tuple[int, int] | None:
        """``(epoch, step)`` of the last commit of the run that was resumed; None for a new run."""
        return None if self._session is None else self._session.cursor

    # Questions

    @contextmanager
    def query(self, data_id: Any, mask: Tensor | None = None, loss_reduction: str | None = None) -> Iterator[Query]:
        """Capture the gradients of queries at the model's present weights; nothing is stored.

        Gradients that the model's parameters hold are put aside meanwhile, so that a query in the midst of training
        changes nothing. Inside :meth:`at_checkpoints`, queries of equal ids are averaged.
        """
        options = self._options(data_id, mask, 1.0, None, loss_reduction)
        tracker = self._required_tracker()
        if tracker.needs_warmup:
            raise CaptureError("a query needs the projections first" + self._warmup_note())
        query = Query(options.data_id)
        if self._averaged is not None:
            query = self._averaged.setdefault(options.data_id, query)
        recording = tracker.recording(len(options.data_id))
        with gradients_put_aside(tracker.model), recording:
            yield query
        recording.check()
        recording.factor = options.factor()
        query.add(_rows(recording, options)[0].cpu(), tracker.layout)
        if self._finished and self._averaged is None:
            self._warn_of_other_weights()

    def at_checkpoints(self, which: str | Sequence[int] = "all") -> Iterator[nn.Module]:
        """The model at its checkpoints, one after another; queries inside are averaged over them.

        ``which`` is ``"all"``, ``"last"`` or a list of checkpoint numbers. The weights are restored at the end,
        whatever happens.

        Raises:
            StoreError: there are no checkpoints, or not those asked for.
        """
        store, model = self.store, self._required_tracker().model
        chosen = _chosen([record.number for record in store.checkpoints], which)
        with restored_weights(model):
            self._averaged = {}
            try:
                for number in chosen:
                    load_weights(model, store.load_checkpoint(number))
                    yield model
            finally:
                self._averaged = None

    def query_fn(
        self,
        batch: Any,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        *,
        data_id: Any = None,
        mask: Tensor | None = None,
        checkpoints: str | Sequence[int] | None = None,
    ) -> Query:
        """Gradients of one batch of queries in one call, at the present weights or averaged over ``checkpoints``."""
        ids = batch_ids(batch, 0) if data_id is None else data_id
        query = None
        with ExitStack() as stack:
            models: Iterable[nn.Module] = [self._required_tracker().model]
            if checkpoints is not None:
                models = self.at_checkpoints(checkpoints)
                stack.callback(models.close)  # type: ignore[attr-defined]
            for model in models:
                with self.query(ids, mask) as query:
                    loss_fn(model, batch).backward()
        assert query is not None
        return query

    def compute_influence_all(self, query: Query | QueryGradients, k: int | None = None, **options: Any) -> InfluenceResult:
        """Scores of all stored samples for each query.

        Args:
            query: what :meth:`query`, :meth:`query_fn` or :meth:`get_log` gave.
            k: keep only the k highest and lowest for each query; None for all scores ``[queries, samples]``.
            options: ``preconditioner``, ``damping``, ``mode``, ``reduce``, ``engine`` where they differ from the config's.

        Raises:
            EmptyStoreError: nothing was logged.
            QueryError: an option or the query makes no sense.
        """
        return self._query_engine().influence(_gradients(query), k=k, **self._query_options(options))

    def compute_influence(
        self,
        query: Query | QueryGradients,
        data_id: Any = None,
        *,
        k: int | None = None,
        **options: Any,
    ) -> InfluenceResult:
        """Scores of the samples named by ``data_id`` (all if None) for each query."""
        ids = None if data_id is None else BlockOptions.of(data_id).data_id
        return self._query_engine().influence(
            _gradients(query), k=k, data_id=ids, **self._query_options(options)
        )

    def compute_self_influence(self, query: Query | QueryGradients | None = None, **options: Any) -> SelfInfluence:
        """``g^T F^-1 g`` of every stored sample, or of the given log's samples."""
        settings = self._query_options(options)
        settings = {key: settings[key] for key in ("preconditioner", "damping", "reduce") if key in settings}
        gradients = None if query is None else _gradients(query)
        return self._query_engine().self_influence(gradients, **settings)

    # Inside

    def _options(
        self,
        data_id: Any,
        mask: Tensor | None,
        scale: float,
        scaler: Any,
        loss_reduction: str | None,
        **columns: Any,
    ) -> BlockOptions:
        reduction = loss_reduction or self.config.loss_reduction
        if reduction not in ("mean", "sum", "token_mean"):
            raise ConfigError(f"loss_reduction is {reduction!r}; known are mean, sum, token_mean")
        return BlockOptions.of(
            data_id,
            mask=mask,
            scale=scale,
            scaler=scaler,
            reduction=reduction,
            per_token=self.config.per_token,
            **columns,
        )

    def _new_block(self, options: BlockOptions, *, detached: bool) -> Block:
        tracker = self._required_tracker()
        if self._open is not None:
            raise CaptureError("a block is open already: blocks are not nested; close it with end() first")
        recording = None
        if self._finished or self._blocks % self.config.every == 0:
            recording = tracker.recording(
                len(options.data_id),
                mask=options.mask,
                moments=self._storing and "kronecker" in self._statistics,
                detached=detached,
            )
        self._open = Block(recording, options, self._block_ended, self._block_dropped)
        return self._open

    def _block_dropped(self, block: Block) -> None:
        self._open = None

    def _block_ended(self, block: Block) -> None:
        if block.recording is not None:
            self._check_first(block.recording)
            self._waiting.append((block.recording, block.options, self._columns(block.options)))
            self._project_waiting(force=False)
        self._blocks += 1
        if not self._finished:
            self._progress.block_ended()

    @property
    def _storing(self) -> bool:
        return self._saving and not self._finished

    def _columns(self, options: BlockOptions) -> ProjectedBatch | None:
        """What is stored beside the rows, as it is now; None when nothing is stored."""
        if not self._storing:
            return None
        return ProjectedBatch(
            data_id=options.data_id,
            rows=torch.empty(0),
            step=self._progress.step,
            epoch=self._progress.epoch,
            lr=self._progress.lr,
            loss=None if options.loss is None else options.loss.float().cpu(),
            metadata=options.metadata,
        )

    def _project_waiting(self, *, force: bool) -> None:
        """Turn ended blocks into rows; during a warm-up they wait for enough samples."""
        tracker = self._tracker
        if tracker is None or not self._waiting:
            return
        if tracker.needs_warmup:
            samples = sum(len(options.data_id) for _, options, _ in self._waiting)
            if not force and samples < self.config.projection.warmup:
                return
            tracker.fit(recording for recording, _, _ in self._waiting)
        waiting, self._waiting = self._waiting, []
        for recording, options, columns in waiting:
            rows, moments = _rows(recording, options)
            layout = tracker.settle()
            self._last_log = QueryGradients(options.data_id, rows, layout)
            if columns is not None and self._session is not None:
                if not self._session.begun:
                    self._begin(tracker)
                batch = ProjectedBatch(**{**vars(columns), "rows": rows.cpu(), "moments": moments})
                self._session.put(batch)

    def _begin(self, tracker: Tracker) -> None:
        assert self._session is not None
        layout = tracker.settle()
        self._session.begin(layout, stored_projections(tracker), self._statistics)

    def _check_first(self, recording: Recording) -> None:
        if self._blocks == 0 and not self._finished:
            warn_of_coupling(recording, self._required_tracker().model)

    def _stored(self) -> GradientStore | None:
        """The store whose projections must be used: a loaded or resumed one that holds rows' layout."""
        store = self.store if self._session is None else self._session.resumed
        return store if store is not None and store.layout is not None else None

    def _required_tracker(self) -> Tracker:
        if self._tracker is None:
            raise CaptureError("no model is watched: give init(model=...) or call run.watch(model) first")
        return self._tracker

    def _warmup_note(self) -> str:
        if self._tracker is None or not self._tracker.needs_warmup:
            return ""
        return (
            f" (projection.init {self.config.projection.init!r} is made from the first "
            f"{self.config.projection.warmup} samples; log them first)"
        )

    def _query_engine(self) -> QueryEngine:
        if not self._finished:
            self.commit()
        if self._engine is None or not self._finished:
            self._engine = QueryEngine(self.store)
        return self._engine

    def _query_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        settings = self.config.query.model_dump()
        unknown = [key for key in given if key not in settings and key != "progress"]
        if unknown:
            raise ConfigError(f"unknown query option {unknown[0]!r}; known are {', '.join(settings)}, progress")
        return {**settings, **given}

    def _checkpoint_every(self, steps: int) -> Callable[[int], None]:
        def after_step(step: int) -> None:
            if step % steps == 0 and self._tracker is not None and not self._finished:
                self.checkpoint()

        return after_step

    def _warn_of_other_weights(self) -> None:
        if self._warned:
            return
        self._warned = True
        store = self.store
        known = {store.manifest.fingerprints.get("weights"), *(c.fingerprint for c in store.checkpoints)} - {None}
        if known and fingerprint(self._required_tracker().model) not in known:
            warnings.warn(
                "the model's weights are neither those at the end of the logged run nor those of a checkpoint: scores "
                "compare gradients of different models; load the trained weights, or use run.at_checkpoints()",
                RuntimeWarning,
                stacklevel=5,
            )


def _rows(recording: Recording, options: BlockOptions) -> tuple[Tensor, Any]:
    rows, moments = recording.project()
    divisors = options.row_divisors()
    return (rows if divisors is None else rows / divisors.to(rows)), moments


def _gradients(query: Query | QueryGradients) -> QueryGradients:
    return query.gradients if isinstance(query, Query) else query


def _cursor(session: StoreSession | None) -> dict[str, int]:
    if session is None or session.cursor is None:
        return {}
    epoch, step = session.cursor
    return {"epoch": epoch, "step": step + 1}


def _chosen(known: Sequence[int], which: str | Sequence[int]) -> Sequence[int]:
    if not known:
        raise StoreError("the store holds no checkpoint; call run.checkpoint() while training, or set 'checkpoints'")
    if which == "all":
        return known
    if which == "last":
        return known[-1:]
    if isinstance(which, str) or not which or any(number not in known for number in which):
        raise StoreError(
            f"checkpoints {which!r} were asked for; there are 'all', 'last' and the numbers {', '.join(map(str, known))}"
        )
    return which
