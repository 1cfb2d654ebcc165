"""What a query answers: scores of samples for queries, with all that is needed to read them."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logix_like.damping import DampingSetting
from logix_like.errors import MissingDependencyError, QueryError
from logix_like.layout import DataId
from logix_like.query.ranking import stable_top
from logix_like.query.table import influence_table, self_influence_table

if TYPE_CHECKING:
    import pandas

    from logix_like.store import GradientStore

Provider = Mapping[Any, Any] | Sequence[Any] | Callable[[DataId], Any]
"""Gives for an id what a person would look at: a text, a picture, facts."""

Ids = NDArray[np.object_]
"""Data ids, ``str`` or ``int``, in an object array."""


def is_count(k: object) -> bool:
    """Whether ``k`` is a whole number and no truth value."""
    return isinstance(k, Integral) and not isinstance(k, bool)


@dataclass(frozen=True, eq=False)
class Ranking:
    """For each query some samples, the most extreme first."""

    ids: Ids
    """``[queries, k]``."""
    scores: Tensor
    """``[queries, k]``."""
    step: NDArray[np.int64] | None = None
    """``[queries, k]``: the step of the visit, when every visit was ranked by itself."""
    parts: Tensor | None = None
    """``[queries, k, parts]``: what each part of the model adds to the score, when that was asked for."""

    def __repr__(self) -> str:
        """How much there is, and the first of the first query."""
        shown = zip(self.ids[0, :3].tolist(), self.scores[0, :3].tolist(), strict=True)
        first = ", ".join(f"{reprlib.repr(one)}: {score:+.4g}" for one, score in shown)
        return f"Ranking(queries={len(self.ids)}, k={self.k}, first {first}{', ...' if self.k > 3 else ''})"

    @property
    def k(self) -> int:
        """Samples for each query."""
        return int(self.ids.shape[1])

    def first(self, k: int) -> Ranking:
        """The first ``k`` of each query."""
        step = None if self.step is None else self.step[:, :k]
        parts = None if self.parts is None else self.parts[:, :k]
        return Ranking(self.ids[:, :k], self.scores[:, :k], step, parts)

    def without(self, ids: Sequence[DataId], k: int) -> Ranking:
        """The first ``k`` of each query that are not ``ids[query]``; each query must have so many others."""
        others = np.stack([np.flatnonzero(line != own)[:k] for line, own in zip(self.ids, ids, strict=True)])
        lines, chosen = np.arange(len(ids))[:, None], torch.from_numpy(others)
        rows = torch.from_numpy(lines)
        step = None if self.step is None else self.step[lines, others]
        parts = None if self.parts is None else self.parts[rows, chosen]
        return Ranking(self.ids[lines, others], self.scores[rows, chosen], step, parts)


@dataclass(frozen=True, eq=False)
class InfluenceResult:
    """Scores of samples for queries.

    A positive score means that training on the sample lowered the query's loss (a proponent, helpful);
    negative, that it raised it (an opponent, harmful).
    """

    query_id: tuple[DataId, ...]
    """One id for each query."""
    samples: int
    """How many samples (or visits) were ranked."""
    mode: str
    """``dot``, ``cosine``, ``relatif`` or ``l2``."""
    preconditioner: str
    """The preconditioner that was asked for."""
    damping: DampingSetting
    """Its damping, as it was given; a number is a multiple of each block's mean eigenvalue."""
    reduce: str
    """How the visits of one sample were combined: ``mean``, ``sum``, ``last`` or ``none``."""
    engine: str
    """``exact``, ``faiss`` or ``dask``."""
    note: str
    """What was computed, in words."""
    data_id: Ids | None = None
    """``[samples]``, in the store's order; None when only the extremes were asked for."""
    scores: Tensor | None = None
    """``[queries, samples]``; None when only the extremes were asked for."""
    step: NDArray[np.int64] | None = None
    """``[samples]``: the step of each visit, when every visit was ranked by itself."""
    top: Ranking | None = None
    """The proponents that were asked for with ``k=``."""
    bottom: Ranking | None = None
    """The opponents that were asked for with ``k=``, the lowest score first."""
    source: str = ""
    """Folder of the store that was asked; empty: not known."""
    part_names: tuple[str, ...] = ()
    """The parts of the model that scores were split into, with ``per=``; else empty."""
    parts: Tensor | None = None
    """``[queries, samples, parts]``: the scores split so; they sum to the scores."""

    @property
    def held(self) -> int:
        """How many samples a ranking can hold: the k that was asked for, else all samples."""
        return self.samples if self.top is None else self.top.k

    def proponents(self, k: int | None = None) -> Ranking:
        """The ``k`` highest scores of each query (all that there are, without ``k``)."""
        return self._extremes(k, self.top, largest=True)

    def opponents(self, k: int | None = None) -> Ranking:
        """The ``k`` lowest scores of each query, the lowest first (all that there are, without ``k``)."""
        return self._extremes(k, self.bottom, largest=False)

    def _extremes(self, k: int | None, held: Ranking | None, *, largest: bool) -> Ranking:
        k = self.held if k is None else k
        if not is_count(k) or not 1 <= k <= self.held:
            why = f"ranked {self.samples} samples" if held is None else f"was asked for with k={held.k}"
            raise QueryError(f"k is {k!r}; this result {why}, so k must be between 1 and {self.held}")
        if held is not None:
            return held.first(k)
        assert self.scores is not None and self.data_id is not None
        best, chosen = stable_top(self.scores if largest else -self.scores, k)
        columns = chosen.numpy()
        step = None if self.step is None else self.step[columns]
        parts = None
        if self.parts is not None:
            parts = self.parts.gather(1, chosen[:, :, None].expand(-1, -1, self.parts.shape[2]))
        return Ranking(self.data_id[columns], best if largest else -best, step, parts)

    def __str__(self) -> str:
        """Show a table of the first proponents and opponents of each query."""
        return influence_table(self)

    def to_pandas(self) -> pandas.DataFrame:
        """A data frame.

        With all scores: one line for each query and one column for each sample. With extremes only: one line
        for each pair, with the columns query_id, kind (proponent: one of the highest scores; opponent: of the
        lowest), rank, data_id, score and, when visits were ranked, step.
        """
        if self.scores is not None and self.data_id is not None:
            columns: Any = list(self.data_id)
            if self.step is not None:
                columns = _pandas().MultiIndex.from_arrays([columns, self.step], names=["data_id", "step"])
            return _frame(self.scores.numpy(), index=list(self.query_id), columns=columns)
        return _frame(self._lines())

    def _lines(self) -> list[dict[str, Any]]:
        return [
            {"query_id": query, "kind": kind, "rank": place + 1, "data_id": ranking.ids[q, place]}
            | {"score": ranking.scores[q, place].item()}
            | ({} if ranking.step is None else {"step": int(ranking.step[q, place])})
            for q, query in enumerate(self.query_id)
            for kind, ranking in (("proponent", self.proponents()), ("opponent", self.opponents()))
            for place in range(ranking.k)
        ]

    def save(self, path: str | Path) -> Path:
        """Write the result to a ``.json`` or ``.npz`` file, at once or not at all; returns its path.

        Ids keep their type and scores their bits; nothing is pickled.
        """
        from logix_like.query.files import write_result

        return write_result(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> InfluenceResult:
        """Read what :meth:`save` wrote."""
        from logix_like.query.files import read_result

        return read_result(Path(path))

    def report(
        self,
        path: str | Path,
        *,
        k: int = 10,
        data: Provider | None = None,
        queries: Provider | None = None,
        store: GradientStore | str | PathLike[str] | None = None,
        modules: Mapping[str, float] | None = None,
    ) -> Path:
        """Write one self-contained HTML page with up to ``k`` proponents and opponents of each query.

        Args:
            path: The page's file.
            k: Samples on each side of a query.
            data: Mapping, list or function from a sample's id to its text, picture (PIL image, array, tensor,
                ``pathlib.Path``), list of ``(token, score)`` pairs, or a mapping with any of ``text``, ``image``,
                ``tokens`` and further facts such as ``label``. It may lack some ids.
            queries: The same for the ids of the queries.
            store: The store that was asked, or its path; by default the one that the result names, if it is there.
            modules: By module its share of the scores, to be drawn.
        """
        from logix_like.report.page import write_report

        return write_report(self, Path(path), k=k, data=data, queries=queries, store=store, modules=modules)

    def _repr_html_(self) -> str:
        """The first proponents and opponents, for notebooks."""
        from logix_like.report.notebook import influence_html

        return influence_html(self)


@dataclass(frozen=True, eq=False)
class SelfInfluence:
    """``g^T F^-1 g`` of samples: how much training on a sample lowered that very sample's loss.

    Never negative; large for mislabelled, rare and memorised samples.
    """

    data_id: Ids
    """``[samples]``."""
    scores: Tensor
    """``[samples]``."""
    preconditioner: str
    """The preconditioner that was asked for."""
    damping: DampingSetting
    """Its damping, as it was given; a number is a multiple of each block's mean eigenvalue."""
    reduce: str
    """How the visits of one sample were combined."""
    note: str
    """What was computed, in words."""
    step: NDArray[np.int64] | None = None
    """``[samples]``: the step of each visit, when every visit was scored by itself."""
    rows: int | None = None
    """Over how many rows the curvature is a mean; None where that is not known."""

    @property
    def leverage(self) -> Tensor:
        """``[samples]``: scores divided by the rows of the curvature.

        With the covariance of the very rows as curvature each lies between 0 and 1, and all together add up to the
        effective number of directions that the rows determine: near 1, a sample stands alone in its own.
        """
        if not self.rows:
            raise QueryError("the leverage needs the number of rows of the curvature, which this result does not tell")
        return self.scores / self.rows

    def save(self, path: str | Path) -> Path:
        """Write the self-influences to a ``.json`` or ``.npz`` file, at once or not at all; returns its path.

        Ids keep their type and scores their bits; nothing is pickled.
        """
        from logix_like.query.files import write_self_influence

        return write_self_influence(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> SelfInfluence:
        """Read what :meth:`save` wrote."""
        from logix_like.query.files import read_self_influence

        return read_self_influence(Path(path))

    def highest(self, k: int) -> Ranking:
        """The ``k`` samples with the highest scores, as a ranking of one line."""
        if not is_count(k) or not 1 <= k <= len(self.data_id):
            raise QueryError(f"k is {k!r}; it must be between 1 and {len(self.data_id)}, the number of samples")
        best, chosen = stable_top(self.scores[None], k)
        columns = chosen.numpy()
        return Ranking(self.data_id[columns], best, None if self.step is None else self.step[columns])

    def __str__(self) -> str:
        """Show a table of the highest scores."""
        return self_influence_table(self)

    def to_pandas(self) -> pandas.DataFrame:
        """A data frame with the columns data_id, score and, when visits were scored, step."""
        columns: dict[str, Any] = {"data_id": list(self.data_id), "score": self.scores.numpy()}
        return _frame(columns if self.step is None else columns | {"step": self.step})


def _frame(data: Any, **axes: Any) -> pandas.DataFrame:
    frame: pandas.DataFrame = _pandas().DataFrame(data, **axes)
    return frame


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise MissingDependencyError(
            "to_pandas() needs pandas, which is not installed: pip install 'logix_like[report]'"
        ) from error
    return pandas
