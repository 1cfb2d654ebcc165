"""Find wrong labels, drop the harmful samples, and see whether the model gets better.

``python examples/clean_labels.py`` trains on 600 images of digits, one in five labelled wrongly, names the images to
check, and retrains without the tenth that harmed a validation set most, beside dropping as many at random.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from logix_like.examples.images import Digits, load_digits
from logix_like.examples.quickstart import network
from torch import Tensor, nn

import logix_like as logix
from logix_like.evaluation import LabelErrors, label_errors
from logix_like.retraining import SubsetOracle
from logix_like.workflows import Curation, Suspects, curate, find_mislabeled


@dataclass(frozen=True)
class Settings:
    """Size of the experiment."""

    training: int = 600
    wrong: float = 0.2
    validation: int = 300
    width: int = 64
    epochs: int = 8
    batch: int = 20
    drop: float = 0.1
    draws: int = 4
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was found."""

    suspects: Suspects
    errors: LabelErrors
    curation: Curation


class Experiment:
    """The data, and training on any part of it, logged or not."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        generator = torch.Generator().manual_seed(settings.seed)
        self.data: Digits = load_digits(settings.training, settings.wrong, generator)

    def train(self, samples: list[int], seed: int, root: Path | None = None) -> tuple[nn.Module, logix.Run | None]:
        """Train a new network on ``samples``."""
        torch.manual_seed(seed)
        settings, chosen = self.settings, torch.tensor(samples)
        model = network(self.data.images.shape[1], settings.width)
        run = None if root is None else logix.init("labels", model, root=root, verbose=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(settings.epochs):
            for ids in chosen[torch.randperm(len(chosen))].split(settings.batch):
                self._step(model, ids, run)
                optimizer.step()
                optimizer.zero_grad()
        if run is not None:
            run.finalize()
        return model, run

    def _step(self, model: nn.Module, ids: Tensor, run: logix.Run | None) -> None:
        if run is None:
            F.cross_entropy(model(self.data.images[ids]), self.data.labels[ids]).backward()
            return
        with run(data_id=ids):
            F.cross_entropy(model(self.data.images[ids]), self.data.labels[ids]).backward()

    def validation(self, run: logix.Run, model: nn.Module) -> logix.QueryGradients:
        """Gradients of images whose labels are right."""
        count = self.settings.validation
        with run.query(range(count)) as query:
            F.cross_entropy(model(self.data.test_images[:count]), self.data.test_labels[:count]).backward()
        return query.gradients

    def measure(self, trained: tuple[nn.Module, logix.Run | None]) -> Tensor:
        """Minus the loss on images that neither training nor the validation set has seen."""
        images, labels = (part[self.settings.validation :] for part in (self.data.test_images, self.data.test_labels))
        with torch.no_grad():
            return -F.cross_entropy(trained[0](images), labels)


def run_experiment(settings: Settings, root: Path) -> Outcome:
    """Train with logging, find wrong labels, curate."""
    experiment = Experiment(settings)
    everything = list(range(len(experiment.data.images)))
    model, run = experiment.train(everything, settings.seed, root)
    assert run is not None
    suspects = find_mislabeled(run, share=0.1)
    errors = label_errors(run.compute_self_influence(), experiment.data.flipped)
    values = run.compute_influence_all(experiment.validation(run, model))
    oracle = SubsetOracle(experiment.train, experiment.measure, len(everything))
    curation = curate(oracle, values, drop=settings.drop, draws=settings.draws)
    return Outcome(suspects, errors, curation)


def main(settings: Settings | None = None) -> Outcome:
    """Run it and say what was found."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        outcome = run_experiment(settings or Settings(), Path(scratch))
    print(outcome.suspects)
    print(f"Self-influence against the planted errors: {outcome.errors}")
    print(f"Minus the loss on other images, {outcome.curation}")
    return outcome


if __name__ == "__main__":
    try:
        main()
    except logix.LogixError as error:
        sys.exit(f"error: {error}")
