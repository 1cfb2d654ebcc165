"""Train a small convolutional network with Lightning, and ask which images drove its mistakes.

One callback logs the training. Run it with ``python examples/lightning_vision.py [folder]``.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from logix_like.integrations.lightning import LogixCallback
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import logix_like as logix


@dataclass(frozen=True)
class Settings:
    """Size of the example; tests make it smaller."""

    training: int = 1400
    epochs: int = 5
    asked: int = 3


class Reader(lightning.LightningModule):
    """Two convolutions and a head, for images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 16, 10),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Scores ``[batch, 10]`` of images ``[batch, 1, 8, 8]``."""
        scores: Tensor = self.net(images)
        return scores

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        """Mean loss of a batch."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 images ``[n, 1, 8, 8]`` and their labels."""
    data, labels = load_digits(return_X_y=True)
    return torch.tensor(data / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)


def explain(run: logix.Run, model: Reader, images: Tensor, labels: Tensor, settings: Settings) -> None:
    """Ask which training images made the model misread some others."""
    rest = torch.arange(settings.training, len(images))
    wrong = rest[model(images[rest]).argmax(1) != labels[rest]][: settings.asked]
    if not len(wrong):
        print("no image was misread")
        return
    answers = model(images[wrong]).argmax(1)
    with run.query(data_id=wrong) as query:
        F.cross_entropy(model(images[wrong]), answers).backward()
    ranking = run.compute_influence_all(query, k=4).proponents()
    for place, number in enumerate(wrong.tolist()):
        helped = ", ".join(f"image {i} (a {labels[i]})" for i in ranking.ids[place])
        print(f"image {number}, a {labels[number]}, was read as {answers[place]}; most helpful to that: {helped}")


def main(folder: Path, settings: Settings | None = None) -> float:
    """Train, ask, and return the accuracy on images that were not trained on."""
    settings = settings or Settings()
    torch.manual_seed(0)
    images, labels = digits()
    dataset = TensorDataset(images[: settings.training], labels[: settings.training])
    model = Reader()
    callback = LogixCallback("digits", root=folder, overwrite=True)
    trainer = lightning.Trainer(
        default_root_dir=folder, max_epochs=settings.epochs, accelerator="cpu", callbacks=[callback], logger=False,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(dataset, batch_size=32, shuffle=True))
    model.eval()
    explain(callback.run, model, images, labels, settings)
    accuracy = float((model(images[settings.training :]).argmax(1) == labels[settings.training :]).float().mean())
    print(f"accuracy on {len(images) - settings.training} other images: {accuracy:.2f}")
    return accuracy


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()))
