"""Is an influence score true? Retrain on random halves and see whether the scores foretold the outcome.

``python examples/is_it_true.py`` trains a small network on 300 images of digits, 120 times on random halves, and prints
the LDS of several scores. With ``--cache FOLDER`` what was retrained is kept, and an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from logix_like.examples.images import load_digits
from logix_like.examples.quickstart import network
from torch import Tensor, nn

import logix_like as logix
from logix_like.estimators.knn_shapley import KNNShapley
from logix_like.evaluation import LDS, lds, subset_truth
from logix_like.retraining import SubsetOracle


@dataclass(frozen=True)
class Settings:
    """Size of the experiment."""

    training: int = 300
    queries: int = 50
    width: int = 64
    epochs: int = 10
    batch: int = 20
    subsets: int = 60
    seeds: int = 2


class Experiment:
    """The data, training, and what is measured."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        data = load_digits(settings.training, 0.0, torch.Generator().manual_seed(0))
        self.images, self.labels = data.images, data.labels
        self.asked = data.test_images[: settings.queries], data.test_labels[: settings.queries]

    def train(self, samples: list[int], seed: int, root: Path | None = None) -> nn.Module:
        """Train a new network on ``samples``; with a ``root`` it is logged there."""
        torch.manual_seed(seed)
        model: nn.Module = network(self.images.shape[1], self.settings.width)
        chosen = torch.tensor(samples)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = None
        if root is not None:
            run = logix.init("run", model, root=root, checkpoints="every_epoch", verbose=False)
        for epoch in range(self.settings.epochs):
            if run is not None:
                run.epoch(epoch)
            for ids in chosen[torch.randperm(len(chosen))].split(self.settings.batch):
                with nullcontext() if run is None else run(data_id=ids):
                    F.cross_entropy(model(self.images[ids]), self.labels[ids]).backward()
                optimizer.step()
                optimizer.zero_grad()
        if run is not None:
            run.finalize()
        return model

    def measure(self, model: nn.Module) -> Tensor:
        """Minus the loss of each query."""
        with torch.no_grad():
            return -F.cross_entropy(model(self.asked[0]).double(), self.asked[1], reduction="none")


def scores_of(experiment: Experiment, root: Path) -> dict[str, logix.InfluenceResult | Tensor]:
    """Scores by several methods, all from one training."""
    model = experiment.train(list(range(experiment.settings.training)), 0, root)
    run = logix.load(root / "run", model=model)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    final = run.query_fn(experiment.asked, loss)
    averaged = run.query_fn(experiment.asked, loss, checkpoints="all")
    return {
        "rows of training, queries averaged over checkpoints": run.compute_influence_all(averaged),
        "rows of training (default)": run.compute_influence_all(final),
        "rows of the last epoch": run.compute_influence_all(final, reduce="last"),
        "damping 3 in place of 0.1": run.compute_influence_all(final, damping=3.0),
        "no preconditioner": run.compute_influence_all(final, preconditioner="identity"),
        "kNN-Shapley on pixels": KNNShapley(experiment.images, experiment.labels).scores(experiment.asked),
    }


def main(arguments: Sequence[str] | None = None, settings: Settings | None = None) -> dict[str, LDS]:
    """Retrain, score, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, help="folder that keeps what was retrained")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    settings = settings or Settings()
    experiment = Experiment(settings)
    oracle = SubsetOracle(
        experiment.train,
        experiment.measure,
        settings.training,
        seeds=settings.seeds,
        cache=options.cache,
        name="digits",
    )
    truth = subset_truth(oracle, subsets=settings.subsets)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        found = {name: lds(scores, truth) for name, scores in scores_of(experiment, Path(scratch)).items()}
    for name, one in found.items():
        print(f"{name:<52} {one}")
    return found


if __name__ == "__main__":
    try:
        main()
    except logix.LogixError as error:
        sys.exit(f"error: {error}")
