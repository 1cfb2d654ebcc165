"""Log a training run with three lines, then ask it which images mattered, and which labels are wrong.

A small network learns to read digits from 4,000 images, one in ten of them wrongly labelled on purpose. Run it with
``logix-like demo`` or ``python examples/quickstart.py``.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import logix_like as logix
from logix_like.examples.images import Digits, load_digits, side_by_side
from logix_like.examples.measuring import auroc, compare_steps


@dataclass(frozen=True)
class Settings:
    """Size of the demo; tests make it smaller."""

    training: int = 4000
    epochs: int = 3
    batch: int = 50
    width: int = 1024
    measured_steps: int = 40
    seed: int = 0


def network(pixels: int, width: int) -> nn.Module:
    """Three layers, nothing special."""
    return nn.Sequential(
        nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, 10)
    )


def train(model: nn.Module, data: Digits, settings: Settings, root: Path, overwrite: bool) -> logix.Run:
    """An ordinary loop; the three lines that log it are numbered."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = logix.init(  # 1: what is tracked, and where the rows go
        "demo", model, optimizer=optimizer, root=root, overwrite=overwrite, projection={"rank": 16}
    )
    for epoch in range(settings.epochs):
        run.epoch(epoch)
        for ids in torch.randperm(settings.training).split(settings.batch):
            with run(data_id=ids):  # 2: around forward and backward
                loss = F.cross_entropy(model(data.images[ids]), data.labels[ids])
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    run.finalize()  # 3: all is on disk
    return run


def explain(run: logix.Run, model: nn.Module, data: Digits) -> None:
    """Ask which training images made the model read some test images as it did."""
    answers = model(data.test_images).argmax(1)
    wrong, right = (torch.nonzero((answers == data.test_labels) == good).flatten() for good in (False, True))
    asked = torch.cat([wrong[:2], right[:1]])
    with run.query(data_id=[f"test {i}" for i in asked.tolist()]) as query:
        F.cross_entropy(model(data.test_images[asked]), answers[asked]).backward()
    result = run.compute_influence_all(query, k=4)
    top, bottom = result.proponents(), result.opponents()
    for place, i in enumerate(asked.tolist()):
        truth, read = int(data.test_labels[i]), int(answers[i])
        print(f"\nTest image {i}, a {truth}, was read as {read}{'' if truth == read else ', wrongly'}. Because of these,")
        print(f"  {'for it (proponents)':<42}against it (opponents)")
        for n in range(result.held):
            for ranking, end in ((top, ""), (bottom, "\n")):
                told = f"{ranking.scores[place, n]:+9.3g}  {data.describe(ranking.ids[place, n])}"
                print(f"  {told:<40}", end=end)
        shown = [data.test_images[i], data.images[top.ids[place, 0]], data.images[bottom.ids[place, 0]]]
        print(side_by_side(shown, ["the test image", "first proponent", "first opponent"]))


def find_wrong_labels(run: logix.Run, model: nn.Module, data: Digits) -> None:
    """Rank training images by self-influence: those that the model learnt only from themselves come first."""
    result = run.compute_self_influence()
    flipped = data.flipped[torch.tensor(result.data_id.tolist())]
    print(f"\nWrong labels: {int(flipped.sum())} of {len(flipped)} were planted. Ranked by self-influence,")
    for share in (0.05, 0.1):
        first = result.scores.argsort(descending=True)[: int(share * len(flipped))]
        print(f"  {flipped[first].float().mean():.0%} of the first {share:.0%} are wrong labels")
    print(f"  AUROC {auroc(result.scores, flipped):.3f}  (0.5 is chance)")
    with torch.no_grad():
        losses = F.cross_entropy(model(data.images), data.labels, reduction="none")
    print(f"  the final loss alone, which needs no log, has {auroc(losses, data.flipped):.3f} on such random labels")


def measure(model: nn.Module, data: Digits, settings: Settings, root: Path) -> None:
    """Time plain and logged steps of two copies of the model in turn."""
    plain, logged = copy.deepcopy(model), copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (plain, logged)]
    run = logix.init("measured", logged, root=root, projection={"rank": 16}, verbose=False)

    def step(m: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
        F.cross_entropy(m(data.images[ids]), data.labels[ids]).backward()
        optimizer.step()
        optimizer.zero_grad()
