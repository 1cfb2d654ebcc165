"""What people do with influence: explain an answer, find wrong labels, clean a data set, find a planted backdoor.

Sign: a positive score means that training on the sample lowered the query's loss (a proponent, helpful); negative,
that it raised it (an opponent, harmful).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from logix_like.errors import EvaluationError, QueryError
from logix_like.estimators.base import Estimator
from logix_like.evaluation.removal import with_random_removals
from logix_like.evaluation.scored import BY_SAMPLE, Scores, as_scores, score_vector, whole_result
from logix_like.evaluation.statistics import mean_and_error
from logix_like.ids import as_data_ids
from logix_like.layout import DataId
from logix_like.objective import IGNORED, Batch, Categorical, Objective
from logix_like.query.result import Ids, InfluenceResult, SelfInfluence, is_count
from logix_like.query.table import shown_id
from logix_like.retraining import SubsetOracle
from logix_like.run.extraction import batch_ids
from logix_like.subsets import size_of
from logix_like.weights import evaluating

SHOWN = 10


class Run(Protocol):
    """What is asked: a :class:`~logix_like.Run`."""

    def query(self, data_id: Any, mask: Tensor | None = None, loss_reduction: str | None = None) -> Any:
        """Capture queries."""

    def at_checkpoints(self, which: str | Sequence[int] = "all") -> Any:
        """The model at its checkpoints."""

    def compute_influence_all(self, query: Any, k: int | None = None, **options: Any) -> InfluenceResult:
        """Scores of the stored samples."""

    def compute_self_influence(self, query: Any = None, **options: Any) -> SelfInfluence:
        """Self-influence of the stored samples."""


def explain(
    run: Run,
    model: nn.Module,
    batch: Batch,
    *,
    k: int | None = 5,
    objective: Objective | None = None,
    predicted: bool = True,
    data_id: Any = None,
    mask: Tensor | None = None,
    checkpoints: str | Sequence[int] | None = None,
    **options: Any,
) -> InfluenceResult:
    """Which training samples made ``model`` answer ``batch`` as it does?

    It is asked in eval mode, and left in the one it was in.

    Args:
        run: Logged or loaded; its rows are asked.
        model: The run's model, with its trained weights.
        batch: Of the objective's kind, e.g. ``(inputs, labels)``.
        k: So many proponents and opponents for each; None for the scores of all samples.
        objective: What the model is trained for; a classifier unless told otherwise.
        predicted: Explain the most likely answer (by the final weights); otherwise the one in ``batch``.
        data_id: Names of the queries; running numbers unless given.
        mask: ``[batch, positions]``, as in training.
        checkpoints: Average the queries' gradients over these, e.g. ``"all"``.
        options: Of :meth:`logix_like.Run.compute_influence_all`.

    Raises:
        QueryError: the answer of a model that does not classify is to be predicted.
    """
    objective = objective or Objective()
    targets = _targets(model, batch, objective, predicted)
    ids = batch_ids(batch, 0) if data_id is None else data_id

    def ask() -> Any:
        with run.query(ids, mask=mask, loss_reduction="sum") as query:
            objective.likelihood.losses(objective.forward(model, batch), targets).sum().backward()
        return query

    with evaluating(model):  # of all its answers, those it gives in use
        if checkpoints is None:
            query = ask()
        else:
            with closing(run.at_checkpoints(checkpoints)) as models:
                query = [ask() for _ in models][-1]
    return run.compute_influence_all(query, k=k, **options)


def _targets(model: nn.Module, batch: Batch, objective: Objective, predicted: bool) -> Tensor:
    given = objective.labels(batch)
    if not predicted:
        return given
    if not isinstance(objective.likelihood, Categorical):
        raise QueryError(
            f"the most likely answer under a {type(objective.likelihood).__name__} likelihood has no loss to explain; "
            "give predicted=False to explain the batch's own targets"
        )
    with evaluating(model), torch.no_grad():
        answers = objective.forward(model, batch).argmax(-1)
    return torch.where(given == IGNORED, given, answers)


@dataclass(frozen=True, eq=False)
class Suspects:
    """Samples in the order in which they should be checked."""

    data_id: Ids
    """``[suspects]``, the most suspicious first."""
    scores: Tensor
    """``[suspects]``: suspicion, falling."""
    samples: int
    """How many samples were looked at."""

    def __str__(self) -> str:
        """The first of them."""
        lines = [f"{len(self.data_id)} of {self.samples} samples to check, the most suspicious first"]
        pairs = zip(self.data_id[:SHOWN], self.scores[:SHOWN].tolist(), strict=True)
        lines += [f"  {shown_id(name, 40):<40} {score:>11.4g}" for name, score in pairs]
        left = len(self.data_id) - SHOWN
        return "\n".join(lines + ([f"  ... and {left} more"] if left > 0 else []))


def find_mislabeled(
    source: Run | Estimator, *, share: float = 0.05, validation: Any = None, **options: Any
) -> Suspects:
    """The training samples whose labels should be checked first.

    By self-influence: what only the sample itself could teach the model comes first, and labels that contradict all
    others are of that kind, as are rare samples. With ``validation`` queries whose labels are right, by harm instead:
    samples that raised their loss come first.

    Args:
        source: A run, or any estimator.
        share: Of the samples, to be checked.
        validation: Queries, as the source takes them.
        options: Of the run's ``compute_...`` (preconditioner, damping, ...).

    Raises:
        EvaluationError: ``share`` names no sample, or more than there are, or an option is of no use here.
    """
    if not isinstance(source, Estimator) and not hasattr(source, "compute_self_influence"):
        raise EvaluationError(f"the source is a {type(source).__name__}; give a run or an estimator")
    if isinstance(source, Estimator) and options:
        raise EvaluationError(f"an estimator takes no options here ({', '.join(options)}); give them to the estimator")
    if "k" in options:
        raise EvaluationError("all samples are ranked; say with share=, not k=, how many are to be checked")
    if options.get("reduce") == "none":
        raise EvaluationError(f"samples are ranked, not their visits; {BY_SAMPLE}")
    if isinstance(source, Estimator):
        names, scores = source.data_id, _suspicion(source, validation)
    elif validation is None:
        own = source.compute_self_influence(**options)
        names, scores = own.data_id, own.scores
    else:
        result = source.compute_influence_all(validation, **options)
        assert result.scores is not None  # asked for without k
        assert result.data_id is not None
        names, scores = result.data_id, -result.scores.sum(0)
    scores = scores.cpu()
    if not bool(scores.isfinite().all()):
        raise EvaluationError(f"{int((~scores.isfinite()).sum())} of {len(names)} samples have no finite score")
    count = size_of(share, len(names))
    if not 0 < count <= len(names):
        raise EvaluationError(
            f"share is {share}: {count} of {len(names)} samples to check; it must be above 0, up to 1"
        )
    order = scores.argsort(stable=True, descending=True)[:count]
    return Suspects(np.asarray(names, dtype=object)[order.numpy()], scores[order], len(names))


def _suspicion(estimator: Estimator, validation: Any) -> Tensor:
    return estimator.self_influence() if validation is None else -estimator.scores(validation).sum(0)


@dataclass(frozen=True, eq=False)
class Curation:
    """A data set without its least valuable samples, and what that does to the model."""

    kept: tuple[int, ...]
    """Indices of the samples that stay."""
    dropped: tuple[int, ...]
    """Of those that go, the most harmful first."""
    before: float
    """Measured after training on all samples (mean over the queries)."""
    after: float
    """Measured after training on ``kept``."""
    random: Tensor
    """``[draws]``: measured after dropping as many at random."""

    def __str__(self) -> str:
        """One line."""
        return (
            f"without {len(self.dropped)} of {len(self.kept) + len(self.dropped)} samples: {self.before:.4f} -> "
            f"{self.after:.4f} (as many at random: {mean_and_error(self.random)})"
        )


def curate(
    oracle: SubsetOracle,
    values: Scores,
    *,
    drop: float = 0.1,
    draws: int = 5,
    seed: int = 0,
    data_id: Sequence[DataId] | None = None,
) -> Curation:
    """Drop the least valuable share of the samples, retrain, and compare with dropping as many at random.

    ``drop=0.1`` removes the most harmful tenth; ``drop=0.7`` keeps the most valuable three tenths.

    Args:
        oracle: Trains and measures: on data that ``values`` were not made with, if the comparison is to be fair.
        values: ``[samples]``, high is valuable; or a result over a validation set's queries, which is summed.
        drop: Share to drop.
        draws: Random subsets to compare with.
        seed: Of these.
        data_id: Names of the oracle's samples 0, 1, ... where values carry names.

    Raises:
        EvaluationError: the values do not fit, or nothing is dropped or kept.
        RetrainingError: a retraining failed.
    """
    if not isinstance(oracle, SubsetOracle):
        raise EvaluationError(
            f"the oracle is a {type(oracle).__name__}; curate retrains to see what dropping is worth, and needs a "
            "SubsetOracle(train, measure, n=...); to rank samples without retraining take "
            "find_mislabeled(run, validation=query), whose first samples harm the queries most"
        )
    if isinstance(values, Estimator | SelfInfluence):
        raise EvaluationError(
            "self-influence is no value: wrong labels have the highest; give a result over validation queries "
            "(an estimator's is influence(queries)), or [samples] numbers, high where a sample is valuable"
        )
    vector = score_vector(values, oracle.n, data_id)
    count = size_of(drop, oracle.n)
    if not 0 < count < oracle.n:
        raise EvaluationError(
            f"drop is {drop}: {count} of {oracle.n} samples to drop; some must go and some must be kept"
        )
    order = vector.argsort(stable=True).tolist()
    kept = torch.ones(2, oracle.n, dtype=torch.bool)
    kept[1, order[:count]] = False
    (before, after), random = with_random_removals(oracle, kept, (count,), draws, seed)
    return Curation(
        kept=tuple(sorted(order[count:])),
        dropped=tuple(order[:count]),
        before=before.mean().item(),
        after=after.mean().item(),
        random=random[0].mean(1),
    )


@dataclass(frozen=True, eq=False)
class Poison:
    """The queries whose answers hang on the same few samples, and these samples."""

    overlap: float
    """How much of their top samples the most alike queries have in common, 0 to 1."""
    concentration: Tensor
    """``[queries]``: share of each query's positive influence that those common samples hold."""
    suspicious: Tensor
    """``[queries]`` bool: the share is far above that of the others."""
    samples: Tensor
    """``[samples]``: mean share of the suspicious queries' positive influence less that of the other queries'; the
    samples behind a backdoor are highest."""
    data_id: Ids
    """``[samples]``: their names."""

    def first(self, k: int) -> list[DataId]:
        """Names of the ``k`` samples that the suspicious queries hang on most; none where nothing is suspicious."""
        if not bool(self.suspicious.any()):
            return []
        names: list[DataId] = self.data_id[self.samples.argsort(stable=True, descending=True)[:k].numpy()].tolist()
        return names

    def __str__(self) -> str:
        """What was found, in two lines."""
        count, queries = int(self.suspicious.sum()), len(self.suspicious)
        if not count:
            return (
                f"no group among {queries} queries hangs on the same few samples (largest overlap {self.overlap:.0%})"
            )
        named = ", ".join(shown_id(name, 20) for name in self.first(SHOWN))
        inside, outside = self.concentration[self.suspicious].mean(), self.concentration[~self.suspicious].mean()
        return (
            f"{count} of {queries} queries hang on the same few samples (overlap {self.overlap:.0%}; these hold "
            f"{inside:.1%} of their influence, {outside:.1%} elsewhere)\n  first of these samples: {named}"
        )


def detect_poison(
    scores: InfluenceResult | Any,
    *,
    top: int = 10,
    group: int = 5,
    overlap: float = 0.5,
    deviations: float = 6.0,
    data_id: Sequence[DataId] | None = None,
) -> Poison:
    """Find queries whose answers hang on the same few samples, as those of a planted trigger do.

    Ask about the model's own answers, with normalised scores: ``explain(run, model, batch, k=None, mode="relatif")``.
    The queries whose ``top`` lists are most alike give the samples in question; every query is then judged by how much
    of its influence these hold, and suspicious is one that stands ``deviations`` robust standard deviations (1.48
    median absolute deviations) above the median, and above what influence spread evenly would give them.
    Near-duplicates among the training samples make such groups too: look at what is named. Most queries should be
    clean.

    Args:
        scores: A result with all scores, or anything that makes a ``[queries, samples]`` tensor.
        top: Length of the lists that are compared.
        group: So many other queries must be alike.
        overlap: How much of the lists they must have in common, 0 to 1; below, nothing is suspicious.
        deviations: How far from the others a suspicious query is.
        data_id: Names of the samples of a plain tensor, 0, 1, ... unless given.

    Raises:
        EvaluationError: the scores are those of the top samples only, not finite, or of too few queries or samples.
    """
    matrix, names = _scores_and_names(scores, data_id)
    counts = is_count(top) and is_count(group) and top >= 1 and group >= 1
    if not counts or not (0 <= overlap <= 1 and deviations >= 0):
        raise EvaluationError(
            f"top is {top}, group {group}, overlap {overlap} and deviations {deviations}; lists and groups need a "
            "whole number of 1 or more, an overlap is a share, and deviations are at least 0"
        )
    if len(matrix) <= 2 * group or matrix.shape[1] < top:
        raise EvaluationError(
            f"there are {len(matrix)} queries and {matrix.shape[1]} samples; groups of {group + 1} queries can only "
            f"stand out among more than {2 * group}, and lists need {top} samples"
        )
    found, core = _most_alike(matrix, top, group)
    positive = matrix.clamp_min(0)
    shares = positive / positive.sum(1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    concentration = shares[:, core].sum(1)
    middle = concentration.median()
    spread = 1.4826 * (concentration - middle).abs().median()
    # Where these samples oppose most queries the deviations vanish, and next to nothing would stand out.
    even = len(core) / matrix.shape[1]
    suspicious = (concentration > (middle + deviations * spread).clamp_min(even)) & (found >= overlap)
    behind = torch.zeros(matrix.shape[1], dtype=matrix.dtype)
    if bool(suspicious.any()):
        behind = shares[suspicious].mean(0) - shares[~suspicious].mean(0)
    return Poison(found, concentration, suspicious, behind, names)


def _most_alike(scores: Tensor, top: int, group: int) -> tuple[float, Tensor]:
    """How much the most alike queries' top lists overlap, and the samples in at least half of the lists."""
    lists = torch.zeros_like(scores).scatter_(1, scores.topk(top, dim=1).indices, 1.0)
    common = (lists @ lists.T / top).fill_diagonal_(-1)  # a query is no neighbour of its own
    nearest = common.topk(group, dim=1)
    query = int(nearest.values.mean(1).argmax())
    votes = lists[[query, *nearest.indices[query].tolist()]].sum(0)
    return nearest.values[query].mean().item(), (votes >= (group + 1) / 2).nonzero().flatten()


def _scores_and_names(scores: InfluenceResult | Any, data_id: Sequence[DataId] | None) -> tuple[Tensor, Ids]:
    if isinstance(scores, InfluenceResult):
        matrix, names = whole_result(scores)
    else:
        matrix = as_scores(scores, "a result (an estimator's is influence(queries)) or numbers [queries, samples]")
        columns = matrix.shape[-1] if matrix.ndim else 0
        given = as_data_ids(range(columns) if data_id is None else data_id)
        if len(given) != columns:
            raise EvaluationError(f"data_id names {len(given)} samples; the scores have {columns} columns")
        names = np.empty(columns, dtype=object)
        names[:] = given
    if matrix.ndim != 2 or not bool(matrix.isfinite().all()):
        raise EvaluationError(f"the scores have the shape {tuple(matrix.shape)}; finite [queries, samples] are needed")
    return matrix.to("cpu", torch.float64), names
