"""The last linear layer of a model: what goes in, and what the loss says of what comes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from logix_like.errors import ConfigError
from logix_like.objective import Batch, Objective
from logix_like.weights import frozen, load_weights, restored_weights


@dataclass(frozen=True, eq=False)
class Factors:
    """Inputs and residuals of a batch; a sample's gradient is their outer product."""

    features: Tensor
    """``[batch, inputs]``, with a last column of ones where the layer has a bias."""
    residuals: Tensor
    """``[batch, outputs]``: derivative of each sample's loss by the layer's outputs."""
    outputs: Tensor
    """``[batch, outputs]``."""

    def products(self, other: Factors) -> Tensor:
        """``[batch, others]``: inner products of the gradients."""
        return (self.residuals @ other.residuals.T) * (self.features @ other.features.T)

    def squares(self) -> Tensor:
        """``[batch]``: squared norms of the gradients."""
        return self.residuals.square().sum(1) * self.features.square().sum(1)


class LastLayer:
    """Reads the factors of the layer that makes a model's outputs.

    Args:
        model: the model.
        objective: its likelihood reads the layer's outputs, ``[batch, outputs]``.
        name: name of the layer; None for the last ``nn.Linear``.

    Raises:
        ConfigError: there is no such layer (lists the linear ones).
    """

    def __init__(self, model: nn.Module, objective: Objective, name: str | None = None) -> None:
        linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        chosen = next(reversed(linear), "") if name is None else name
        if chosen not in linear:
            raise ConfigError(
                f"the last layer is to be {chosen!r}, which is no nn.Linear of the model; there are: "
                f"{', '.join(map(repr, linear)) or 'none'}"
            )
        self.name = chosen
        self.module = linear[chosen]
        self._bias: Tensor | None = linear[chosen].bias
        self.model = model
        self.objective = objective

    @property
    def weight(self) -> Tensor:
        """``[outputs, inputs]``, the bias as the last column."""
        weight, bias = self.module.weight.detach(), self._bias
        return weight if bias is None else torch.cat([weight, bias.detach().unsqueeze(1)], 1)

    def factors(self, batch: Batch) -> Factors:
        """The factors of a batch at the model's present weights, in eval mode.

        Raises:
            ConfigError: the layer's outputs are not what the likelihood reads.
        """
        kept: list[tuple[Tensor, Tensor]] = []

        def keep(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            kept.append((args[0] if args else named["input"], output))

        handle = self.module.register_forward_hook(keep, with_kwargs=True)
        try:
            with frozen(self.model), torch.no_grad():
                outputs = self.objective.forward(self.model, batch)
        finally:
            handle.remove()
        if len(kept) != 1 or kept[0][1].shape != outputs.shape or outputs.ndim != 2:
            raise ConfigError(
                f"layer {self.name!r} is called {len(kept)} times in a forward pass and the objective's outputs have "
                f"the shape {tuple(outputs.shape)}; its one output [batch, outputs] must be what the objective reads: "
                "name another layer"
            )
        features = kept[0][0]
        if self._bias is not None:
            features = torch.cat([features, torch.ones_like(features[:, :1])], 1)
        return Factors(features, self.objective.likelihood.residual(outputs, self.objective.labels(batch)), outputs)

    @contextmanager
    def at(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with the weights of a checkpoint; its own are restored afterwards."""
        with restored_weights(self.model):
            load_weights(self.model, weights)
            yield
