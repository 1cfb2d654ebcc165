"""Regressions that are solved exactly, in float64, and their solutions without a sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def softmax_optimum(
    x: Tensor, y: Tensor, classes: int, strength: float, weights: Tensor | None = None, start: Tensor | None = None
) -> Tensor:
    """``W [features, classes]`` that minimises the weighted summed cross entropy plus ``strength / 2 ||W||^2``."""
    weights = torch.ones(len(x), dtype=x.dtype) if weights is None else weights
    found = torch.zeros(x.shape[1], classes, dtype=x.dtype) if start is None else start.clone()
    size = found.numel()
    for _ in range(60):
        p = (x @ found).softmax(1)
        slope = x.T @ (weights[:, None] * (p - F.one_hot(y, classes))) + strength * found
        spread = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        hessian = torch.einsum("n,ni,nj,nab->iajb", weights, x, x, spread).reshape(size, size)
        step = torch.linalg.solve(hessian + strength * torch.eye(size, dtype=x.dtype), slope.flatten())
        found = found - step.view_as(found)
        if step.norm() < 1e-13:
            break
    return found


def without_each(x: Tensor, y: Tensor, classes: int, strength: float, optimum: Tensor) -> Tensor:
    """``[samples, classes]``: each sample's logits under the optimum without it."""
    rows = []
    for one in range(len(x)):
        weights = torch.ones(len(x), dtype=x.dtype)
        weights[one] = 0
        rows.append(x[one] @ softmax_optimum(x, y, classes, strength, weights, optimum))
    return torch.stack(rows)


def linear(weight: Tensor) -> nn.Linear:
    """A layer without bias that computes ``x @ weight``."""
    layer = nn.Linear(weight.shape[0], weight.shape[1], bias=False).to(weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight.T)
    return layer


def classes_of_noise(samples: int = 120, features: int = 6, classes: int = 3) -> tuple[Tensor, Tensor]:
    """A classification that is far from separable, as in ``identities.py``."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(samples, features)
    return x, (x @ normal(features, classes) + 1.5 * normal(samples, classes)).argmax(1)
