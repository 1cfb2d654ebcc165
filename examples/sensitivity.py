"""A test loss without a test set: leave-one-out estimates while a network overfits, and over strengths of its penalty.

A small network learns to read digits from a few hundred images and soon overfits. At each epoch a monitor estimates,
from the training images alone, what the loss on images it has not seen would be. Then the strength of a classifier's
penalty is chosen the same way. Run it with ``python examples/sensitivity.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from logix_like.examples.images import Digits, load_digits
from torch import Tensor, nn

from logix_like.sensitivity import SensitivityMonitor, choose_strength


@dataclass(frozen=True)
class Settings:
    """Size of the example; a test makes it smaller."""

    training: int = 300
    width: int = 24
    epochs: int = 40
    looks: int = 8
    batch: int = 50
    strength: float = 3.0
    strengths: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0, 10.0)
    seed: int = 0


def while_training(data: Digits, settings: Settings) -> float:
    """Print the losses by epoch; returns the correlation of estimate and test loss."""
    images, tests = shrunk(data.images), [(shrunk(data.test_images), data.test_labels)]
    model = nn.Sequential(nn.Linear(images.shape[1], settings.width), nn.ReLU(), nn.Linear(settings.width, 10)).double()
    decay = settings.strength / settings.training
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=decay)
    monitor = SensitivityMonitor(model, samples=settings.training, posterior="kronecker", strength=settings.strength)
    print("epoch   training   leave-one-out estimate   test (never seen)")
    for epoch in range(1, settings.epochs + 1):
        for ids in torch.randperm(settings.training).split(settings.batch):
            optimizer.zero_grad()
            F.cross_entropy(model(images[ids]), data.labels[ids]).backward()
            optimizer.step()
        if epoch % (settings.epochs // settings.looks) == 0:
            monitor.measure([(images, data.labels)], validation=tests, epoch=epoch)
            look = monitor.history[-1]
            print(f"{epoch:>5}   {look.train_loss:>8.3f}   {look.loo_loss:>22.3f}   {look.validation_loss:>17.3f}")
    assert monitor.latest is not None
    print("\nmost sensitive images: " + "; ".join(data.describe(i) for i in monitor.latest.most_sensitive(5)))
    estimates = [look.loo_loss for look in monitor.history]
    tested = [look.validation_loss or 0.0 for look in monitor.history]
    return float(torch.corrcoef(torch.tensor([estimates, tested]))[0, 1])


def over_strengths(data: Digits, settings: Settings) -> tuple[float, float]:
    """Print a classifier's losses by strength; returns the strength that is chosen and the best on the test set."""
    small, tests = shrunk(data.images), shrunk(data.test_images)
    model = nn.Linear(small.shape[1], 10).double()
    sweep = choose_strength(model, [(small, data.labels)], settings.strengths)
    print("\nstrength   training   leave-one-out estimate   test (trained anew)")
    tested = []
    for strength, train, estimate in zip(sweep.strengths, sweep.train_loss, sweep.loo_loss, strict=True):
        trained = fitted(model, small, data.labels, strength)
        with torch.no_grad():
            tested.append(F.cross_entropy(trained(tests), data.test_labels).item())
        print(f"{strength:>8}   {train:>8.3f}   {estimate:>22.3f}   {tested[-1]:>19.3f}")
    best = sweep.strengths[tested.index(min(tested))]
    print(f"\nchosen without a test set: {sweep.best}; best on the test set: {best}")
    return sweep.best, best


def shrunk(images: Tensor) -> Tensor:
    """Images of 7 x 7 pixels, so that a classifier has some hundred weights."""
    side = int(images.shape[1] ** 0.5)
    return F.adaptive_avg_pool2d(images.view(-1, 1, side, side), 7).flatten(1).double()


def fitted(start: nn.Linear, images: Tensor, labels: Tensor, strength: float) -> nn.Linear:
    """The classifier trained with a penalty, for comparison."""
    model = nn.Linear(start.in_features, start.out_features).double()
    model.load_state_dict(start.state_dict())
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = torch.stack([p.square().sum() for p in model.parameters()]).sum()
        loss = F.cross_entropy(model(images), labels, reduction="sum") + strength / 2 * penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def main(settings: Settings | None = None) -> tuple[float, float, float]:
    """Both parts; returns the correlation, the chosen strength and the best one."""
    settings = settings or Settings()
    generator = torch.Generator().manual_seed(settings.seed)
    torch.manual_seed(settings.seed)
    data = load_digits(settings.training, 0.0, generator)
    correlation = while_training(data, settings)
    print(f"correlation of estimate and test loss over training: {correlation:.3f}")
    return correlation, *over_strengths(data, settings)


if __name__ == "__main__":
    main()
