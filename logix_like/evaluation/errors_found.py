"""Does a score find wrong labels?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logix_like.errors import EvaluationError
from logix_like.evaluation.scored import Scores, score_vector
from logix_like.evaluation.statistics import ranks
from logix_like.layout import DataId
from logix_like.query.result import InfluenceResult


@dataclass(frozen=True, eq=False)
class LabelErrors:
    """How well scores put wrongly labelled samples first."""

    auroc: float
    """Chance that a wrong label scores above a right one: 0.5 tells nothing, 1 finds all."""
    standard_error: float
    """Of the AUROC (Hanley and McNeil 1982)."""
    found: Tensor
    """``[samples]``: share of all errors among the first 1, 2, ..., n samples by falling score; ``found[k - 1]``.
    Samples of equal scores come in random order: their expected share."""

    def found_in(self, share: float) -> float:
        """Share of all errors found by checking the first ``share`` of the samples.

        Raises:
            EvaluationError: ``share`` is not between 0 and 1.
        """
        if not 0 <= share <= 1:
            raise EvaluationError(f"share is {share}; give one between 0 and 1")
        checked = round(share * len(self.found))
        return self.found[checked - 1].item() if checked else 0.0

    def __str__(self) -> str:
        """The AUROC and three points of the curve."""
        points = ", ".join(f"{self.found_in(share):.0%} in the first {share:.0%}" for share in (0.05, 0.1, 0.2))
        return f"AUROC {self.auroc:.3f} (standard error {self.standard_error:.3f}); errors found: {points}"


def label_errors(scores: Scores, wrong: Any, *, data_id: Sequence[DataId] | None = None) -> LabelErrors:
    """Hold suspicion against known label errors; the highest score is the most suspicious.

    Args:
        scores: ``[samples]``, a :class:`~logix_like.query.result.SelfInfluence`, or an estimator (its self-influence).
            Influence on a validation set's loss is negative for errors: of a result with all scores, minus the sum
            over its queries is taken; of an array, give that yourself.
        wrong: ``[samples]`` bool: which labels are wrong.
        data_id: Names of the samples in the order of ``wrong``, where scores carry names; else numbers are expected.

    Raises:
        EvaluationError: the shapes differ, or all labels are wrong, or none.
    """
    try:
        wrong = torch.as_tensor(wrong).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise EvaluationError(f"wrong is a {type(wrong).__name__}; it must be [samples] bool") from error
    if wrong.ndim != 1 or wrong.dtype != torch.bool:
        raise EvaluationError(f"wrong is {wrong.dtype} of shape {tuple(wrong.shape)}; it must be [samples] bool")
    errors, n = int(wrong.sum()), len(wrong)
    if not 0 < errors < n:
        raise EvaluationError(f"{errors} of {n} labels are wrong; there must be both wrong and right ones")
    suspicion = score_vector(scores, n, data_id)
    if isinstance(scores, InfluenceResult):
        suspicion = -suspicion
    auroc = (ranks(suspicion)[wrong].sum().item() / errors - (errors + 1) / 2) / (n - errors)
    return LabelErrors(auroc, _standard_error(auroc, errors, n - errors), _curve(suspicion, wrong) / errors)


def _curve(suspicion: Tensor, wrong: Tensor) -> Tensor:
    """``[samples]``: errors to be expected among the first 1, 2, ..., n by falling suspicion."""
    # Scores that rise, so that equal ones stand together; each then counts the mean of its equals.
    equals: Tensor
    counts: Tensor
    _, equals, counts = (-suspicion).unique(return_inverse=True, return_counts=True)
    errors = torch.zeros(len(counts), dtype=torch.float64).scatter_add_(0, equals, wrong.double())
    expected: Tensor = (errors / counts).repeat_interleave(counts)
    return expected.cumsum(0)


def _standard_error(auroc: float, errors: int, others: int) -> float:
    twice_above, twice_below = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = auroc * (1 - auroc)
    variance += (errors - 1) * (twice_above - auroc**2) + (others - 1) * (twice_below - auroc**2)
    root: float = max(0.0, variance / (errors * others)) ** 0.5
    return root
