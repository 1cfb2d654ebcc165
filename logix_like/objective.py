"""What a model is trained for, told once: outputs of a batch, its targets, and how likely outputs make targets.

From these three come all that estimators ask for: per-sample losses (any gradient), labels sampled from the model
(the true Fisher), residuals and Hessians in the outputs (Gauss-Newton, the Memory-Perturbation Equation) and
margins (TRAK).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from logix_like.errors import ConfigError

Batch = Any
"""What a data loader yields."""

Model = Callable[..., Any]
"""A module, or a module bound to other parameters (:func:`bound`)."""

IGNORED = -100
"""Class of a position that does not count, as in ``torch.nn.functional.cross_entropy``."""


class Likelihood(ABC):
    """How likely ``outputs [batch, ...]`` make ``targets``; a sample's loss is its negative logarithm."""

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``[batch]``: each sample's loss, summed over its positions."""

    @abstractmethod
    def sample(self, outputs: Tensor, targets: Tensor, generator: Generator | None = None) -> Tensor:
        """Targets drawn from the model, shaped as ``targets``; positions that do not count stay so."""

    @abstractmethod
    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The losses' derivative by the outputs, shaped as them (for classes: probabilities minus labels)."""

    @abstractmethod
    def hessian_product(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        """The losses' Hessian in the outputs times ``vector``; all three are shaped as the outputs."""


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Classes by logits: ``outputs [batch, ..., classes]``, whole-number ``targets [batch, ...]``."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy, summed over positions; those with the target -100 do not count."""
        losses = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=IGNORED)
        return losses.view(len(targets), -1).sum(1)

    def sample(self, outputs: Tensor, targets: Tensor, generator: Generator | None = None) -> Tensor:
        """Classes drawn by their probabilities."""
        # By the inverse of the distribution function: torch.multinomial costs half a training step at 8,192 classes.
        logits = outputs.detach().flatten(0, -2).float()
        cumulative = (logits - logits.amax(-1, keepdim=True)).exp_().cumsum(-1)
        total = cumulative[:, -1:]
        uniform = torch.empty_like(total).uniform_(generator=generator)
        # Strictly below the total, so that no class without probability is drawn.
        level = torch.minimum(uniform * total, total * (1 - torch.finfo(total.dtype).eps))
        # Logits that are not finite would draw a class that does not exist; so they go on into the losses.
        last = outputs.shape[-1] - 1
        drawn = torch.searchsorted(cumulative, level, right=True).clamp_max_(last).view(targets.shape)
        return torch.where(targets == IGNORED, targets, drawn)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Probabilities minus one-hot labels; 0 where a position does not count."""
        counted = targets != IGNORED
        labels = F.one_hot(targets.where(counted, 0), outputs.shape[-1]).to(outputs.dtype)
        return (outputs.softmax(-1) - labels) * counted.unsqueeze(-1)

    def hessian_product(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        """``(diag(p) - p p^T) vector`` at each position that counts."""
        p = outputs.softmax(-1)
        weighted = p * vector
        return (weighted - p * weighted.sum(-1, keepdim=True)) * (targets != IGNORED).unsqueeze(-1)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Independent yes or no by logits: ``outputs`` and ``targets`` of one shape, targets 0 to 1."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Binary cross entropy, summed over a sample's outputs."""
        losses = F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none")
        return losses.reshape(len(targets), -1).sum(1)

    def sample(self, outputs: Tensor, targets: Tensor, generator: Generator | None = None) -> Tensor:
        """Zeros and ones drawn by their probabilities."""
        return torch.bernoulli(outputs.detach().sigmoid(), generator=generator).to(targets.dtype)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Probabilities minus targets."""
        return outputs.sigmoid() - targets.to(outputs.dtype)

    def hessian_product(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        """``p (1 - p) vector``."""
        p = outputs.sigmoid()
        product: Tensor = p * (1 - p) * vector
        return product


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Numbers with noise: ``outputs`` and ``targets`` of one shape; the loss is half the squared error / variance."""

    variance: float = 1.0
    """Of the noise."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``sum (outputs - targets)^2 / (2 variance)`` over a sample's outputs."""
        _same_shape(outputs, targets)
        return (outputs - targets).square().reshape(len(targets), -1).sum(1) / (2 * self.variance)

    def sample(self, outputs: Tensor, targets: Tensor, generator: Generator | None = None) -> Tensor:
        """Outputs with noise."""
        noise = torch.empty_like(outputs.detach()).normal_(generator=generator)
        return outputs.detach() + noise * math.sqrt(self.variance)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``(outputs - targets) / variance``."""
        _same_shape(outputs, targets)
        return (outputs - targets) / self.variance

    def hessian_product(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        """``vector / variance``."""
        return vector / self.variance


def _same_shape(outputs: Tensor, targets: Tensor) -> None:
    if outputs.shape != targets.shape:
        # Broadcasting [batch, 1] against [batch] would silently compare every sample with every other.
        raise ConfigError(
            f"outputs have the shape {tuple(outputs.shape)} and targets {tuple(targets.shape)}; a Gaussian "
            "likelihood needs the same: squeeze or unsqueeze one of them"
        )


@dataclass(frozen=True)
class Objective:
    """What a model is trained for.

    ``Objective()`` fits classifiers whose batches are ``(inputs, labels)`` pairs, or mappings with ``labels`` as
    Hugging Face's models take them; :meth:`language_model` shifts labels by one; anything else gives its own
    ``outputs`` and ``targets``::

        Objective(Gaussian(), outputs=lambda model, batch: model(batch["x"]), targets=lambda batch: batch["y"])
    """

    likelihood: Likelihood = Categorical()
    """How a target is scored."""
    outputs: Callable[[Model, Batch], Tensor] | None = None
    """``outputs(model, batch) -> [batch, ...]``: what the likelihood reads (logits, means)."""
    targets: Callable[[Batch], Tensor] | None = None
    """``targets(batch) -> [batch, ...]``."""

    @classmethod
    def language_model(cls) -> Objective:
        """Causal language models of transformers: batches are mappings with ``input_ids`` and ``labels``.

        Position ``t`` predicts label ``t + 1``; labels of -100 do not count. Without ``labels`` the input's tokens
        are, save those that ``attention_mask`` leaves out.
        """
        return cls(Categorical(), outputs=_next_token_logits, targets=_next_tokens)

    def forward(self, model: Model, batch: Batch) -> Tensor:
        """Outputs of ``batch``, ``[batch, ...]``."""
        return _outputs(model, batch) if self.outputs is None else self.outputs(model, batch)

    def labels(self, batch: Batch) -> Tensor:
        """Targets of ``batch``, ``[batch, ...]``."""
        return _targets(batch) if self.targets is None else self.targets(batch)

    def losses(self, model: Model, batch: Batch) -> Tensor:
        """``[batch]``: each sample's loss, summed over its positions."""
        return self.likelihood.losses(self.forward(model, batch), self.labels(batch))

    def sampled_losses(self, model: Model, batch: Batch, generator: Generator | None = None) -> Tensor:
        """``[batch]``: losses on targets drawn from the model; their gradients' second moment is the true Fisher."""
        outputs, targets = self.forward(model, batch), self.labels(batch)
        return self.likelihood.losses(outputs, self.likelihood.sample(outputs, targets, generator))

    def margins(self, model: Model, batch: Batch) -> Tensor:
        """``[batch]``: ``log(p / (1 - p))`` of each sample's target, ``p`` its likelihood (TRAK, Park 2023, section 3).

        For sequences ``p`` is the likelihood of all counted tokens together.
        """
        log_p = -self.losses(model, batch)
        # p rounds to 1 for a sample that is certain; log(1 - p) stays finite a step below it.
        below = torch.clamp(log_p, max=-torch.finfo(log_p.dtype).eps)
        return log_p - torch.log(-torch.expm1(below))


def bound(model: nn.Module, parameters: Mapping[str, Tensor]) -> Model:
    """``model`` as a function of ``parameters`` (by name; the others and buffers are its own), for ``torch.func``."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(model, dict(parameters), args, kwargs)

    return call


def _outputs(model: Model, batch: Batch) -> Tensor:
    if isinstance(batch, Mapping):
        return _logits(model(**{key: value for key, value in batch.items() if key != "labels"}))
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return _logits(model(batch[0]))
    raise ConfigError(_unknown(batch))


def _targets(batch: Batch) -> Tensor:
    found: Any = None
    if isinstance(batch, Mapping):
        found = batch.get("labels")
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        found = batch[1]
    if not isinstance(found, Tensor):
        raise ConfigError(_unknown(batch))
    return found


def _next_token_logits(model: Model, batch: Batch) -> Tensor:
    return _outputs(model, batch)[:, :-1]


def _next_tokens(batch: Batch) -> Tensor:
    if "labels" in batch:
        return _targets(batch)[:, 1:]
    tokens: Tensor = batch["input_ids"]
    mask = batch.get("attention_mask")
    return (tokens if mask is None else tokens.where(mask.bool(), IGNORED))[:, 1:]


def _logits(output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise ConfigError(
            f"the model returned a {type(output).__name__}; expected a tensor, or an output with 'logits': give "
            "Objective(outputs=lambda model, batch: ...)"
        )
    return found


def _unknown(batch: Batch) -> str:
    held = f" with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
    return (
        f"a batch is a {type(batch).__name__}{held}; expected a pair (inputs, labels) or a mapping with 'labels': "
        "give Objective(outputs=lambda model, batch: ..., targets=lambda batch: ...)"
    )
