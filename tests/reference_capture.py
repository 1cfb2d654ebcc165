"""Per-sample gradients the slow and obvious way: ``torch.func.grad`` of one sample's loss at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from logix_like.layout import Layout, ModuleBlock
from tests.models import Batch, Case


def sample_gradients(case: Case, model: nn.Module, batch: Batch) -> list[dict[str, Tensor]]:
    """For each sample, the gradient of its own loss with respect to every trainable parameter, by name."""
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, sample: Batch) -> Tensor:
            return case.losses(self.inner, sample).sum()

    bound = Bound()

    def loss(parameters: dict[str, Tensor], sample: Batch) -> Tensor:
        return functional_call(bound, {f"inner.{n}": p for n, p in parameters.items()}, (sample,))

    size = len(batch["x"])
    return [grad(loss)(trained, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(size)]


def full_rows(model: nn.Module, layout: Layout, gradients: list[dict[str, Tensor]]) -> Tensor:
    """Un-projected rows ``[batch, width]`` in ``layout`` from gradients by parameter name."""
    names = {id(p): n for n, p in model.named_parameters()}
    return torch.stack(
        [torch.cat([_matrix(model, block, names, g).flatten() for block in layout]).detach() for g in gradients]
    )


def _matrix(model: nn.Module, block: ModuleBlock, names: dict[int, str], gradient: dict[str, Tensor]) -> Tensor:
    module = model.get_submodule(block.name)
    columns = []
    if block.kind != "bias":
        weight = gradient[names[id(module.weight)]]
        if type(module).__name__ in ("Embedding", "Conv1D"):
            weight = weight.T
        if type(module).__name__.startswith("ConvTranspose"):
            own = weight.shape[0] // module.groups  # [in, out / groups, kernel]: each group's part by itself
            weight = torch.cat([part.transpose(0, 1) for part in weight.split(own)])
        columns.append(weight.reshape(block.shape[0], -1))
    if columns == [] or columns[0].shape[1] < block.shape[1]:
        columns.append(gradient[names[id(module.bias)]].reshape(-1, 1))
    matrix = torch.cat(columns, 1)
    assert matrix.shape == block.shape
    return matrix
