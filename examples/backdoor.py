"""Find a planted backdoor: a few training images carry a bright patch and a wrong label.

``python examples/backdoor.py`` trains a network on 3,000 images of digits, 30 of them poisoned, and asks which images
are behind its answers: the answers to images with the patch hang on the same few samples, and these are poisoned.
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
from torch import Tensor

import logix_like as logix
from logix_like.workflows import Poison, detect_poison, explain

TARGET = 0
"""What the network is to read wherever it sees the patch."""


@dataclass(frozen=True)
class Settings:
    """Size of the experiment."""

    training: int = 3000
    poisoned: int = 30
    clean_queries: int = 100
    triggered_queries: int = 20
    width: int = 128
    epochs: int = 6
    batch: int = 32
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was found, and what is true."""

    found: Poison
    attacked: float
    """Share of the images with the patch that are read as the target."""
    triggered: Tensor
    """``[queries]``: which queries carry the patch."""
    poisoned: frozenset[int]
    """Numbers of the poisoned training images."""

    @property
    def precision(self) -> float:
        """Share of poisoned ones among as many samples as there are poisoned ones."""
        return len(self.poisoned & set(self.found.first(len(self.poisoned)))) / len(self.poisoned)


def patched(images: Tensor) -> Tensor:
    """``images [n, pixels]`` with a bright patch in the lower right corner."""
    side = int(images.shape[1] ** 0.5)
    square = images.clone().view(-1, side, side)
    square[:, -side // 7 :, -side // 7 :] = 1
    return square.flatten(1)


def poison(data: Digits, count: int) -> tuple[Tensor, Tensor, frozenset[int]]:
    """Images and labels with ``count`` poisoned ones, and their numbers."""
    chosen = (data.labels != TARGET).nonzero().flatten()[:count]
    images, labels = data.images.clone(), data.labels.clone()
    images[chosen], labels[chosen] = patched(images[chosen]), TARGET
    return images, labels, frozenset(chosen.tolist())


def run_experiment(settings: Settings, root: Path) -> Outcome:
    """Poison, train with logging, ask about clean and triggered images, look for the backdoor."""
    torch.manual_seed(settings.seed)
    data = load_digits(settings.training, 0.0, torch.Generator().manual_seed(settings.seed))
    images, labels, poisoned = poison(data, settings.poisoned)
    model = network(images.shape[1], settings.width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with logix.init("backdoor", model, root=root, verbose=False) as run:
        for _ in range(settings.epochs):
            for ids in torch.randperm(len(images)).split(settings.batch):
                with run(data_id=ids):
                    F.cross_entropy(model(images[ids]), labels[ids]).backward()
                optimizer.step()
                optimizer.zero_grad()
    clean, other = data.test_images[: settings.clean_queries], data.test_labels != TARGET
    triggered = patched(data.test_images[other][-settings.triggered_queries :])
    asked = torch.cat([clean, triggered])
    answers = explain(run, model, (asked, torch.zeros(len(asked), dtype=torch.int64)), k=None, mode="relatif")
    attacked = (model(triggered).argmax(1) == TARGET).float().mean().item()
    return Outcome(detect_poison(answers), attacked, torch.arange(len(asked)) >= len(clean), poisoned)


def main(settings: Settings | None = None) -> Outcome:
    """Run it and say what was found."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        outcome = run_experiment(settings or Settings(), Path(scratch))
    print(f"{outcome.attacked:.0%} of the test images with the patch are read as {TARGET}.")
    print(outcome.found)
    suspicious, triggered = outcome.found.suspicious, outcome.triggered
    print(f"Suspicious are {int(suspicious[triggered].sum())} of {int(triggered.sum())} queries with the patch and")
    print(f"  {int(suspicious[~triggered].sum())} of {int((~triggered).sum())} without it.")
    print(f"Of the {len(outcome.poisoned)} samples named first, {outcome.precision:.0%} are poisoned.")
    return outcome


if __name__ == "__main__":
    try:
        main()
    except logix.LogixError as error:
        sys.exit(f"error: {error}")
