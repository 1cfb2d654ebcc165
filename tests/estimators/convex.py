"""Two convex models with exact answers: ridge regression and softmax regression, fitted by Newton steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logix_like.objective import Categorical, Gaussian, Likelihood, Objective

FEATURES, SAMPLES, CLASSES = 5, 30, 3


@dataclass
class Convex:
    """``sum_i w_i l_i + (penalty / 2) |theta|^2`` at its minimum."""

    likelihood: Likelihood
    x: Tensor
    y: Tensor
    penalty: float
    outputs: int

    @property
    def objective(self) -> Objective:
        return Objective(self.likelihood, outputs=lambda m, b: m(b[0]), targets=lambda b: b[1])

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x.split(7), self.y.split(7), strict=True))

    @property
    def damping(self) -> float:
        """The penalty, as part of the mean over samples."""
        return self.penalty / len(self.x)

    def model(self, weight: Tensor) -> nn.Module:
        layer = nn.Linear(FEATURES, self.outputs, bias=False).double()
        with torch.no_grad():
            layer.weight.copy_(weight.view_as(layer.weight))
        return layer

    def losses(self, weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self.likelihood.losses(x @ weight.view(self.outputs, FEATURES).T, y)

    def fit(self, weights: Tensor | None = None) -> Tensor:
        """The minimum with each sample's loss times its weight, ``[outputs * FEATURES]``."""
        sample_weights = torch.ones(len(self.x), dtype=torch.float64) if weights is None else weights

        def total(theta: Tensor) -> Tensor:
            return (sample_weights * self.losses(theta, self.x, self.y)).sum() + self.penalty / 2 * theta @ theta

        theta = torch.zeros(self.outputs * FEATURES, dtype=torch.float64)
        for _ in range(40):
            gradient, hessian = torch.func.grad(total)(theta), torch.func.jacrev(torch.func.grad(total))(theta)
            step = torch.linalg.solve(hessian, gradient)
            theta = theta - step
            if step.norm() < 1e-13:
                break
        return theta

    def without(self, *left_out: int) -> Tensor:
        weights = torch.ones(len(self.x), dtype=torch.float64)
        weights[list(left_out)] = 0
        return self.fit(weights)


def ridge() -> Convex:
    x, y = torch.randn(SAMPLES, FEATURES, dtype=torch.float64), torch.randn(SAMPLES, 1, dtype=torch.float64)
    return Convex(Gaussian(), x, y, 0.7, 1)


def softmax() -> Convex:
    x = torch.randn(60, FEATURES, dtype=torch.float64)
    noisy = x @ torch.randn(FEATURES, CLASSES, dtype=torch.float64) + 1.5 * torch.randn(
        60, CLASSES, dtype=torch.float64
    )
    return Convex(Categorical(), x, noisy.argmax(1), 1.0, CLASSES)


def prediction(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The model's first output, asked about as if it were a loss."""
    return model(batch[0])[:, 0]


def residuals(convex: Convex, theta: Tensor) -> Tensor:
    logits = convex.x @ theta.view(convex.outputs, FEATURES).T
    if convex.outputs == 1:
        return logits - convex.y
    return logits.softmax(1) - F.one_hot(convex.y, CLASSES)
