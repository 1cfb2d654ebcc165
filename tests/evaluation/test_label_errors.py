"""AUROC and the curve of errors found, against counting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from logix_like.errors import EvaluationError
from logix_like.evaluation import label_errors
from logix_like.query.result import SelfInfluence


def test_auroc_is_the_chance_of_a_higher_score() -> None:
    scores, wrong = torch.randn(50).round(decimals=1), torch.rand(50) < 0.3
    pairs = [(w > r) + (w == r) / 2 for w in scores[wrong].tolist() for r in scores[~wrong].tolist()]
    found = label_errors(scores, wrong)
    assert found.auroc == pytest.approx(sum(pairs) / len(pairs))
    assert label_errors(-scores, wrong).auroc == pytest.approx(1 - found.auroc)


def test_the_standard_error_is_the_spread_over_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    wrong = torch.arange(200) < 40
    draws = [label_errors(torch.randn(200, generator=generator) + wrong * 1.0, wrong) for _ in range(300)]
    spread = torch.tensor([found.auroc for found in draws]).std().item()
    assert torch.tensor([found.standard_error for found in draws]).mean().item() == pytest.approx(spread, rel=0.15)


def test_the_curve_counts_the_errors_among_the_first() -> None:
    found = label_errors(torch.tensor([5.0, 4, 3, 2, 1]), torch.tensor([True, False, True, False, False]))
    assert found.found.tolist() == [0.5, 0.5, 1, 1, 1]
    assert (found.found_in(0), found.found_in(0.2), found.found_in(0.6), found.found_in(1)) == (0, 0.5, 1, 1)
    perfect = label_errors(torch.tensor([1.0, 0]), torch.tensor([True, False]))
    assert (perfect.auroc, perfect.standard_error) == (1, 0)
    assert str(perfect).startswith("AUROC 1.000")


def test_samples_of_equal_scores_are_in_no_order() -> None:
    wrong = torch.arange(50) < 10
    for given in (wrong, wrong.flip(0)):
        found = label_errors(torch.zeros(50), given)
        assert found.auroc == 0.5
        assert found.found.tolist() == pytest.approx([(i + 1) / 50 for i in range(50)])
    some = label_errors(torch.tensor([2.0, 1, 1, 0]), torch.tensor([True, False, True, False]))
    assert some.found.tolist() == [0.5, 0.75, 1, 1]


def test_self_influence_of_a_store_goes_by_its_names() -> None:
    ids = np.array(["b", "a", "c"], dtype=object)
    scores = SelfInfluence(ids, torch.tensor([1.0, 9.0, 2.0]), "x", 0.1, "mean", "")
    wrong = torch.tensor([True, False, False])
    assert label_errors(scores, wrong, data_id=["a", "b", "c"]).auroc == 1
    with pytest.raises(EvaluationError, match="have no score"):
        label_errors(scores, wrong)


def test_what_is_refused() -> None:
    with pytest.raises(EvaluationError, match="0 of 3 labels are wrong"):
        label_errors(torch.zeros(3), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(EvaluationError, match=r"wrong is a list; it must be \[samples\] bool"):
        label_errors(torch.zeros(3), ["a", "b", "c"])
    with pytest.raises(EvaluationError, match=r"torch\.int64"):
        label_errors(torch.zeros(3), torch.tensor([0, 1, 1]))
    with pytest.raises(EvaluationError, match=r"shape \(4,\)"):
        label_errors(torch.zeros(4), torch.tensor([True, False, False]))
    with pytest.raises(EvaluationError, match=r"scores are a str; give an estimator"):
        label_errors("high", torch.tensor([True, False]))
    with pytest.raises(EvaluationError, match=r"share is 1\.5"):
        label_errors(torch.zeros(2), torch.tensor([True, False])).found_in(1.5)
