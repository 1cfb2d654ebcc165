"""Scores from whatever gives them, as one matrix in the order of the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from logix_like.errors import ConfigError, EvaluationError, QueryError
from logix_like.estimators.base import Estimator
from logix_like.ids import as_data_ids
from logix_like.layout import DataId
from logix_like.query.result import Ids, InfluenceResult, SelfInfluence
from logix_like.retraining import SubsetOracle

TAKEN = "an estimator, a result with all scores, or numbers as a tensor, an array or lists"
BY_SAMPLE = "ask with reduce='mean' or another"

Scores = Estimator | InfluenceResult | Tensor | Any
"""An estimator, a result with all scores, or anything that makes a ``[queries, samples]`` tensor."""


def score_matrix(
    scores: Scores, n: int, queries: int | None, asked: Any = None, data_id: Sequence[DataId] | None = None
) -> Tensor:
    """``[queries, n]`` float64; columns are the samples 0, 1, ..., n - 1 of the truth.

    Args:
        scores: An estimator (which is asked for ``asked``), a result, or an array.
        n: Samples of the truth.
        queries: Queries of the truth; None for any number.
        asked: What an estimator's ``scores`` is called with.
        data_id: Names of the truth's samples, for estimators and results that name theirs; 0, 1, ... unless given.

    Raises:
        EvaluationError: the shape is another, a sample is missing, or a score is not finite.
    """
    if isinstance(scores, Estimator):
        matrix = _reordered(_answer(scores, asked), scores.data_id, n, data_id)
    elif isinstance(scores, InfluenceResult):
        matrix = _reordered(*whole_result(scores), n, data_id)
    else:
        matrix = as_scores(scores)
    matrix = matrix.to("cpu", torch.float64)
    expected = f"({'queries' if queries is None else queries}, {n})"
    if matrix.ndim != 2 or matrix.shape[1] != n or queries not in (None, len(matrix)):
        raise EvaluationError(
            f"the scores have the shape {tuple(matrix.shape)}; {expected} is needed: one line for each measured "
            "quantity and one column for each training sample"
        )
    return _finite(matrix)


def require_oracle(oracle: Any) -> None:
    """Raise :class:`EvaluationError` unless ``oracle`` is one."""
    if not isinstance(oracle, SubsetOracle):
        raise EvaluationError(
            f"the oracle is a {type(oracle).__name__}; give the SubsetOracle(train, measure, n=...) that retrains"
        )


def score_vector(scores: Scores, n: int, data_id: Sequence[DataId] | None = None) -> Tensor:
    """``[n]`` float64: one score a sample, from an array or an estimator's or a store's self-influence.

    A result's scores are summed over its queries: what each sample is worth to all of them.

    Raises:
        EvaluationError: as :func:`score_matrix`.
    """
    if isinstance(scores, Estimator):
        vector = _reordered(scores.self_influence()[None], scores.data_id, n, data_id)[0]
    elif isinstance(scores, SelfInfluence):
        vector = _reordered(scores.scores[None], scores.data_id, n, data_id)[0]
    elif isinstance(scores, InfluenceResult):
        vector = score_matrix(scores, n, None, data_id=data_id).sum(0)
    else:
        vector = as_scores(scores)
    if vector.shape != (n,):
        raise EvaluationError(f"the scores have the shape {tuple(vector.shape)}; ({n},) is needed: one for each sample")
    return _finite(vector.to("cpu", torch.float64))


def _answer(estimator: Estimator, asked: Any) -> Tensor:
    try:
        return estimator.scores(asked)
    except (ConfigError, QueryError, AttributeError, TypeError) as error:
        if asked is not None:
            raise
        raise EvaluationError(
            f"{estimator.name} cannot answer without queries ({error}); give queries=, what its scores() takes"
        ) from error


def whole_result(result: InfluenceResult) -> tuple[Tensor, Ids]:
    """``[queries, samples]`` and the samples' names, of a result that holds them all.

    Raises:
        EvaluationError: it holds only the first and last, or scores visits.
    """
    if result.scores is None or result.data_id is None:
        raise EvaluationError("the result holds the highest and lowest scores only; ask without k= for all of them")
    if result.reduce == "none":
        raise EvaluationError(f"the result scores visits, not samples; {BY_SAMPLE}")
    return result.scores, result.data_id


def as_scores(scores: Any, taken: str = TAKEN) -> Tensor:
    """Real numbers as a tensor; ``taken`` says what else would do.

    Raises:
        EvaluationError: they are none.
    """
    try:
        tensor: Tensor = torch.as_tensor(scores).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise EvaluationError(f"scores are a {type(scores).__name__}; give {taken}") from error
    if tensor.is_complex():
        raise EvaluationError("the scores are complex numbers, which have no order; give real ones")
    return tensor


def _finite(scores: Tensor) -> Tensor:
    if not bool(scores.isfinite().all()):
        raise EvaluationError(f"{int((~scores.isfinite()).sum())} of {scores.numel()} scores are NaN or infinite")
    return scores


def _reordered(scores: Tensor, held: Ids, n: int, data_id: Sequence[DataId] | None) -> Tensor:
    wanted = tuple(range(n)) if data_id is None else as_data_ids(data_id)
    if (named := len(set(wanted))) != n or len(wanted) != n:
        raise EvaluationError(f"data_id names {named} samples ({len(wanted)} names); the truth has {n}")
    names: list[DataId] = held.tolist()
    place = {name: column for column, name in enumerate(names)}
    if len(place) < len(names):
        twice = next(name for column, name in enumerate(names) if place[name] != column)
        raise EvaluationError(
            f"{len(names) - len(place)} scores bear the name of another sample (first: {twice!r}), so that it is not "
            "known whose they are; each sample needs a name of its own"
        )
    missing = [name for name in wanted if name not in place]
    if missing:
        shown = ", ".join(map(repr, missing[:3]))
        raise EvaluationError(
            f"{len(missing)} of the truth's {n} samples have no score (first: {shown}; scored are {len(place)}); log "
            "all of them, or give data_id=, the names of the truth's samples in order"
        )
    return scores[:, [place[name] for name in wanted]]
