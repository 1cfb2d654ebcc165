"""The zoo's models seen as objectives, and dense truths about their curvature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from logix_like.capture.selection import select_modules
from logix_like.curvature.sweep import Sweep
from logix_like.layout import Layout
from logix_like.objective import Likelihood, Objective
from tests.models import Batch, Case, build
from tests.reference_capture import full_rows, sample_gradients


@dataclass(frozen=True)
class Given(Likelihood):
    """Outputs are the losses themselves."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs

    def sample(self, outputs: Tensor, targets: Tensor, generator: Generator | None = None) -> Tensor:
        return targets

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.ones_like(outputs)

    def hessian_product(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        return torch.zeros_like(vector)


def objective_of(case: Case) -> Objective:
    return Objective(Given(), outputs=lambda model, batch: case.losses(model, batch), targets=lambda batch: batch["y"])


def sweep_of(case: Case) -> tuple[Sweep, nn.Module, Batch]:
    model, batch = build(case)
    selection = select_modules(model, types=case.types, **case.options)
    return Sweep(model, objective_of(case), selection, mask=lambda b: b.get("mask")), model, batch


def dense_gradients(case: Case, model: nn.Module, batch: Batch, layout: Layout) -> dict[str, Tensor]:
    """By block ``[samples, d_out, d_in]``, one sample at a time."""
    return layout.split(full_rows(model, layout, sample_gradients(case, model, batch)))
