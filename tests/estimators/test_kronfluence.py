"""The same numbers as kronfluence on the same model, data and labels; runs where kronfluence is installed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from logix_like.curvature import fit_curvature
from logix_like.estimators import EKFAC, KFAC
from logix_like.estimators.kronecker import KroneckerInfluence

pytest.importorskip("kronfluence")

EQUAL = 1e-4
"""Relative: kronfluence computes in float32."""


def network(kind: str) -> tuple[nn.Module, TensorDataset, TensorDataset]:
    torch.manual_seed(0)
    if kind == "mlp":
        model: nn.Module = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4))
        shape: tuple[int, ...] = (8,)
    else:
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, stride=2), nn.Flatten(), nn.Linear(12, 4)
        )
        shape = (2, 6, 6)
    data = [TensorDataset(torch.randn(n, *shape), torch.randint(4, (n,))) for n in (60, 5)]
    return model, data[0], data[1]


def kronfluence_scores(
    model: nn.Module, train: TensorDataset, queries: TensorDataset, strategy: str, folder: Path
) -> Tensor:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    task = Classification()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analyzer = Analyzer(
            "same", prepare_model(model, task), task, cpu=True, output_dir=str(folder), disable_tqdm=True
        )
        analyzer.fit_all_factors(
            "f",
            train,
            per_device_batch_size=16,
            factor_args=FactorArguments(strategy=strategy, use_empirical_fisher=True),
        )
        analyzer.compute_pairwise_scores(
            "s",
            "f",
            queries,
            train,
            per_device_query_batch_size=5,
            per_device_train_batch_size=16,
            score_args=ScoreArguments(damping_factor=None),
        )
        scores = analyzer.load_pairwise_scores("s")["all_modules"]
    assert isinstance(scores, Tensor)
    return scores


# In convolutions their K-FAC factors are means over positions, each layer's on a scale of its own.
@pytest.mark.parametrize(("kind", "estimator"), [("mlp", KFAC), ("mlp", EKFAC), ("cnn", EKFAC)])
def test_scores_are_kronfluences(tmp_path: Path, kind: str, estimator: type[KroneckerInfluence]) -> None:
    model, train, queries = network(kind)
    loader = DataLoader(train, batch_size=16)
    curvature = fit_curvature(model, loader, kind=estimator.kind, labels="empirical", progress=False)
    ours = estimator(model, loader, curvature=curvature, progress=False).scores(queries.tensors)
    theirs = kronfluence_scores(model, train, queries, estimator.kind, tmp_path)
    error = float((ours - theirs).norm() / theirs.norm())
    assert error < EQUAL
