"""What a run can be asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from logix_like.ids import as_stored_ids
from logix_like.layout import DataId
from logix_like.query.gradients import QueryGradients
from logix_like.query.groups import GroupInfluence
from logix_like.query.result import InfluenceResult, SelfInfluence
from logix_like.query.tokens import TokenScores
from logix_like.run.asking import Asker, Query, as_gradients
from logix_like.run.extraction import batch_ids
from logix_like.run.logbook import Logbook


class Questions(ABC):
    """The asking half of :class:`~logix_like.run.run.Run`: every method hands on to its :class:`Asker`."""

    _asker: Asker
    _logbook: Logbook

    @abstractmethod
    def commit(self) -> None:
        """Everything logged so far is durable when this returns."""

    def query(
        self, data_id: Any, mask: Tensor | None = None, loss_reduction: str | None = None
    ) -> AbstractContextManager[Query]:
        """A context manager that captures the gradients of queries at the model's present weights.

        Nothing is stored. Gradients that the model's parameters hold are put aside meanwhile, so that a query in the
        midst of training changes nothing. Inside :meth:`at_checkpoints`, queries of equal ids are averaged.
        """
        return self._asker.query(self._logbook.options(data_id, mask=mask, loss_reduction=loss_reduction))

    def at_checkpoints(self, which: str | Sequence[int] = "all") -> Iterator[nn.Module]:
        """The model at its checkpoints, one after another; queries inside are averaged over them.

        ``which`` is ``"all"``, ``"last"`` or a list of checkpoint numbers (they count from 1). The weights are
        restored at the end, whatever happens.

        Raises:
            StoreError: there are no checkpoints, or not those asked for.
        """
        return self._asker.at_checkpoints(which)

    def query_fn(
        self,
        batch: Any,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        *,
        data_id: Any = None,
        mask: Tensor | None = None,
        checkpoints: str | Sequence[int] | None = None,
    ) -> Query:
        """Gradients of one batch of queries, at the present weights or averaged over ``checkpoints``.

        ``loss_fn(model, batch)`` returns the batch's loss, reduced as the config says; ids are running numbers
        unless given.
        """
        options = self._logbook.options(batch_ids(batch, 0) if data_id is None else data_id, mask=mask)
        return self._asker.query_fn(batch, loss_fn, options, checkpoints)

    def compute_influence_all(
        self, query: Query | QueryGradients, k: int | None = None, **options: Any
    ) -> InfluenceResult:
        """Scores of all stored samples for each query.

        Args:
            query: what :meth:`query`, :meth:`query_fn` or :meth:`get_log` gave.
            k: keep only the k highest and lowest for each query; None for all scores ``[queries, samples]``.
            options: ``preconditioner``, ``damping``, ``mode``, ``reduce``, ``engine`` where they differ from the
                config's; ``where``, ``per``, ``normalize``, ``client``, ``index`` and ``progress`` as for
                :meth:`logix_like.query.engine.QueryEngine.influence`.

        Raises:
            EmptyStoreError: nothing was logged.
            QueryError: an option or the query makes no sense.
        """
        self.commit()
        return self._asker.engine().influence(as_gradients(query), k=k, **self._asker.settings(options))

    def compute_influence(
        self, query: Query | QueryGradients, data_id: Any = None, *, k: int | None = None, **options: Any
    ) -> InfluenceResult:
        """Scores of the samples named by ``data_id`` (all if None) for each query; else as above."""
        self.commit()
        ids = None if data_id is None else as_stored_ids(data_id)
        settings = self._asker.settings(options)
        return self._asker.engine().influence(as_gradients(query), k=k, data_id=ids, **settings)

    def compute_self_influence(self, query: Query | QueryGradients | None = None, **options: Any) -> SelfInfluence:
        """``g^T (F + lambda I)^-1 g`` of every stored sample, or of the given log's samples.

        ``options`` are ``preconditioner``, ``damping``, ``reduce`` and ``progress``.
        """
        self.commit()
        settings = self._asker.settings(options, "preconditioner", "damping", "reduce", "progress")
        gradients = None if query is None else as_gradients(query)
        return self._asker.engine().self_influence(gradients, **settings)

    def compute_group_influence(
        self,
        query: Query | QueryGradients,
        groups: Mapping[str, Sequence[DataId]] | Sequence[DataId],
        order: int = 1,
        **options: Any,
    ) -> GroupInfluence:
        """Scores of sets of samples (ids by name, or one list of ids) for each query.

        ``order`` 1 sums the samples' scores; 2 takes one Newton step on the loss of the remaining samples. ``options``
        are ``preconditioner``, ``damping``, ``reduce`` and ``progress``.
        """
        self.commit()
        settings = self._asker.settings(options, "preconditioner", "damping", "reduce", "progress")
        return self._asker.engine().group_influence(as_gradients(query), groups, order=order, **settings)

    def find_similar(self, data_id: Any, k: int = 10, **options: Any) -> InfluenceResult:
        """The ``k`` samples whose stored gradients point the same way as those of ``data_id``; cosine unless ``mode=``.

        ``options`` are those of :meth:`compute_influence_all`; without a ``preconditioner`` gradients are compared as
        they are.
        """
        self.commit()
        chosen = self._asker.settings(options)
        settings = {"preconditioner": "identity", "mode": "cosine", "reduce": chosen["reduce"], **options}
        return self._asker.engine().similar(as_stored_ids(data_id), k=k, **settings)

    def token_scores(
        self,
        query: Query | QueryGradients,
        batch: Any,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        *,
        data_id: Any = None,
        mask: Tensor | None = None,
        **options: Any,
    ) -> TokenScores:
        """How much each position of a batch's samples adds to the samples' scores for each query.

        One forward and backward pass at the present weights: meant for a query's first proponents. ``loss_fn`` and
        ``data_id`` are as for :meth:`query_fn`; ``options`` are ``preconditioner``, ``damping`` and ``progress``.
        """
        self.commit()
        asked = self._logbook.options(batch_ids(batch, 0) if data_id is None else data_id, mask=mask)
        settings = self._asker.settings(options, "preconditioner", "damping", "progress")
        return self._asker.token_scores(as_gradients(query), batch, loss_fn, asked, settings)
