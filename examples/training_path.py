"""What one recorded training tells: wrong labels by TracIn, and how near each estimator comes to exact unrolling.

A small network learns to read digits, a tenth of them labelled wrongly on purpose, and is stopped long before it has
converged. Its path is recorded; every estimator below asks the same path. Exact unrolling derives through every step
and is what the others are measured against. Run it with ``python examples/training_path.py``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from logix_like.examples.images import Digits, load_digits
from logix_like.examples.measuring import auroc
from torch import Tensor, nn

import logix_like as logix
from logix_like.estimators.checkpointed import TracInCP
from logix_like.estimators.kronecker import EKFAC
from logix_like.estimators.source import Source
from logix_like.estimators.tracin import InRunShapley, TracIn
from logix_like.estimators.unrolling import ExactUnrolling
from logix_like.layout import DataId
from logix_like.objective import Objective


@dataclass(frozen=True)
class Settings:
    """Size of the example; a test makes it smaller."""

    training: int = 150
    wrong: float = 0.1
    width: int = 16
    steps: int = 100
    batch: int = 15
    queries: int = 6
    seed: int = 0


def network(pixels: int, width: int) -> nn.Module:
    """Two layers."""
    return nn.Sequential(nn.Linear(pixels, width), nn.Tanh(), nn.Linear(width, 10)).double()


def train(model: nn.Module, images: Tensor, labels: Tensor, settings: Settings, root: Path) -> logix.Run:
    """An ordinary loop; ``record: path`` keeps what each step used."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    config = {"record": "path", "checkpoints": {"every_steps": max(settings.steps // 12, 1)}}
    run = logix.init("path", model, config, root=root, optimizer=optimizer, verbose=False)
    order = torch.cat([torch.randperm(len(images)) for _ in range(settings.steps * settings.batch // len(images) + 1)])
    for ids in order.split(settings.batch)[: settings.steps]:
        with run(data_id=ids):
            F.cross_entropy(model(images[ids]), labels[ids]).backward()
        optimizer.step()
        optimizer.zero_grad()
    run.finalize()
    return run


def main(settings: Settings | None = None) -> tuple[float, dict[str, float]]:
    """Print both findings; returns the AUROC and each estimator's correlation with exact unrolling."""
    settings = settings or Settings()
    torch.manual_seed(settings.seed)
    data = load_digits(settings.training, settings.wrong, torch.Generator().manual_seed(settings.seed))
    images, tests = shrunk(data.images), shrunk(data.test_images[: settings.queries])
    model = network(images.shape[1], settings.width)
    with tempfile.TemporaryDirectory() as folder:
        path = train(model, images, data.labels, settings, Path(folder)).training_path

        def batch_of(ids: Sequence[DataId]) -> tuple[Tensor, Tensor]:
            index = torch.tensor([int(one) for one in ids])
            return images[index], data.labels[index]

        asked = (tests, data.test_labels[: settings.queries])
        given = (path, model, Objective(), batch_of)
        found = wrong_labels(TracInCP(*given), data)
        exact = ExactUnrolling(*given).scores(asked)
        ids = path.data_id
        estimates = {
            "in-run Shapley": InRunShapley(*given).scores(asked),
            "TracIn": TracIn(*given).scores(asked),
            "SOURCE, 3 segments": Source(*given, segments=3).scores(asked),
            "SOURCE, 1 segment": Source(*given, segments=1).scores(asked),
            "influence function": EKFAC(model, [batch_of(ids)], progress=False).scores(asked),
        }
    correlations = {name: correlation(scores, exact) for name, scores in estimates.items()}
    print(f"\nAfter {settings.steps} steps the network has not converged. Correlation with exact unrolling:")
    for name, value in correlations.items():
        print(f"  {name:<20} {value:.3f}")
    return found, correlations


def wrong_labels(estimator: TracInCP, data: Digits) -> float:
    """Rank the training images by self-influence; returns the AUROC of wrong labels."""
    flipped = data.flipped[torch.tensor([int(i) for i in estimator.data_id])]
    scores = estimator.self_influence()
    first = flipped[scores.argsort(descending=True)[: int(flipped.sum())]].double().mean()
    found: float = auroc(scores, flipped)
    print(f"{int(flipped.sum())} of {len(flipped)} labels were made wrong. Ranked by TracIn's self-influence,")
    print(f"{first:.0%} of as many first images are labelled wrongly (AUROC {found:.3f}, chance is 0.500).")
    return found


def correlation(scores: Tensor, exact: Tensor) -> float:
    """Mean over the queries of Pearson's correlation."""
    rows = zip(scores.double(), exact.double(), strict=True)
    return float(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in rows]).mean())


def shrunk(images: Tensor) -> Tensor:
    """Images of 7 x 7 pixels."""
    side = int(images.shape[1] ** 0.5)
    return F.adaptive_avg_pool2d(images.view(-1, 1, side, side), 7).flatten(1).double()


if __name__ == "__main__":
    main()
