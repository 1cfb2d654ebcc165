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
from torch.autograd.function import once_differentiable

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

    def with_residual(
        self, outputs: Tensor, targets: Tensor, *, draw: bool = False, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses and residual, of ``targets`` or of ones drawn from the model; nothing is traced by autograd.

        To be overridden where both are cheaper together.
        """
        outputs = outputs.detach()
        if draw:
            targets = self.sample(outputs, targets, generator)
        return self.losses(outputs, targets), self.residual(outputs, targets)


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Classes by logits: ``outputs [batch, ..., classes]``, whole-number ``targets [batch, ...]``."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy, summed over positions; those with the target -100 do not count."""
        _require_classes(outputs, targets)
        losses = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=IGNORED)
        return losses.view(len(targets), -1).sum(1)

    def sample(self, outputs: Tensor, targets: Tensor, generator: Generator | None = None) -> Tensor:
        """Classes drawn by their probabilities."""
        return _drawn(outputs.detach().softmax(-1, dtype=_wide(outputs)), targets, generator)

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

    def with_residual(
        self, outputs: Tensor, targets: Tensor, *, draw: bool = False, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """One softmax for the draw, the losses and the residual: with many classes each costs much of a step."""
        _require_classes(outputs, targets)
        logarithms = outputs.detach().log_softmax(-1, dtype=_wide(outputs))
        if draw:
            p = logarithms.exp_()
            targets = _drawn(p, targets, generator)
        counted = targets != IGNORED
        labels = targets.where(counted, 0).unsqueeze(-1)
        if draw:
            likely = p.gather(-1, labels).log()
        else:
            likely = logarithms.gather(-1, labels)
            p = logarithms.exp_()
        p.view(-1, p.shape[-1]).index_fill_(0, (~counted).flatten().nonzero().squeeze(1), 0)
        residual = p.scatter_add_(-1, labels, -counted.to(p).unsqueeze(-1))
        losses = -likely.squeeze(-1).where(counted, 0).view(len(targets), -1).sum(1)
        return losses.to(outputs.dtype), residual.to(outputs.dtype)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Independent yes or no by logits: ``outputs`` and ``targets`` of one shape, targets 0 to 1."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Binary cross entropy, summed over a sample's outputs."""
        _same_shape(outputs, targets)
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

    def __post_init__(self) -> None:
        if not 0 < self.variance < math.inf:
            raise ConfigError(f"the variance is {self.variance!r}; it must be a finite number above 0")

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
            f"outputs have the shape {tuple(outputs.shape)} and targets {tuple(targets.shape)}; this "
            "likelihood needs the same: squeeze or unsqueeze one of them"
        )


def _require_classes(outputs: Tensor, targets: Tensor) -> None:
    if outputs.shape[:-1] != targets.shape or targets.is_floating_point():
        raise ConfigError(
            f"outputs have the shape {tuple(outputs.shape)} and targets {tuple(targets.shape)} of {targets.dtype}; "
            "classes need whole numbers, one for each row of logits [batch, ..., classes]: squeeze the targets, move "
            "the classes to the end, or take another likelihood (Bernoulli, Gaussian)"
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
        return cls(Categorical(), outputs=_outputs, targets=_next_tokens)

    def forward(self, model: Model, batch: Batch) -> Tensor:
        """Outputs of ``batch``, ``[batch, ...]``."""
        return _outputs(model, batch) if self.outputs is None else self.outputs(model, batch)

    def labels(self, batch: Batch) -> Tensor:
        """Targets of ``batch``, ``[batch, ...]``.

        Raises:
            ConfigError: they are a single number.
        """
        labels = _targets(batch) if self.targets is None else self.targets(batch)
        if not getattr(labels, "ndim", 1):
            raise ConfigError(
                "the targets are a single number: a batch of samples [batch, ...] is needed (a DataLoader in place of "
                "a dataset; x[None], y[None] in place of one sample)"
            )
        return labels

    def losses(self, model: Model, batch: Batch) -> Tensor:
        """``[batch]``: each sample's loss, summed over its positions."""
        return self.likelihood.losses(self.forward(model, batch), self.labels(batch))

    def backward_losses(
        self, model: Model, batch: Batch, *, draw: bool = False, generator: Generator | None = None
    ) -> Tensor:
        """``[batch]``: the losses for a single backward pass, of which the first step is known and not traced.

        Cheaper than :meth:`losses`, and like those but for rounding. With ``draw`` the targets are drawn from the
        model: the gradients' second moment is then the true Fisher.
        """
        outputs = self.forward(model, batch)
        found: Tensor = _KnownResidual.apply(
            outputs, *self.likelihood.with_residual(outputs, self.labels(batch), draw=draw, generator=generator)
        )
        return found

    def margins(self, model: Model, batch: Batch) -> Tensor:
        """``[batch]``: ``log(p / (1 - p))`` of each sample's target, ``p`` its likelihood (TRAK, Park 2023, section 3).

        For sequences ``p`` is the likelihood of all counted tokens together.
        """
        log_p = -self.losses(model, batch)
        # p rounds to 1 for a sample that is certain; log(1 - p) stays finite a step below it.
        below = torch.clamp(log_p, max=-torch.finfo(log_p.dtype).eps)
        return log_p - torch.log(-torch.expm1(below))


class _KnownResidual(torch.autograd.Function):
    """Losses whose derivative by the outputs has been worked out already."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, losses: Tensor, residual: Tensor) -> Tensor:
        ctx.save_for_backward(residual)
        return losses.view_as(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (residual,) = ctx.saved_tensors
        if bool((gradient == 1).all()):  # that of a sum
            return residual, None, None
        return residual * gradient.view(-1, *(1,) * (residual.ndim - 1)), None, None


def _wide(outputs: Tensor) -> torch.dtype:
    return outputs.dtype if outputs.dtype == torch.float64 else torch.float32


def _drawn(p: Tensor, targets: Tensor, generator: Generator | None) -> Tensor:
    """Classes drawn by the probabilities ``p [..., classes]``; -100 where ``targets`` are.

    By the inverse of the distribution function, first of runs of classes, then within one: a sum over all classes one
    after another costs a twentieth of a training step at 8,192 classes, ``torch.multinomial`` half of one.
    """
    p = p.flatten(0, -2)
    classes = p.shape[1]
    run = math.isqrt(classes)
    whole = classes - classes % run
    runs = p[:, :whole].unflatten(1, (-1, run)).sum(-1)
    if whole < classes:
        runs = torch.cat([runs, p[:, whole:].sum(-1, keepdim=True)], 1)
    ends = runs.cumsum(-1)
    level = torch.empty_like(ends[:, -1:]).uniform_(generator=generator) * ends[:, -1:]
    chosen = _first_above(ends, level)
    columns = chosen * run + torch.arange(run, device=p.device)
    inside = p.gather(1, columns.clamp_max(classes - 1)).masked_fill_(columns >= classes, 0).cumsum(-1)
    level -= ends.gather(1, chosen) - runs.gather(1, chosen)
    # Probabilities that are not finite would draw a class that does not exist; so they go on into the losses.
    drawn = (chosen * run + _first_above(inside, level)).clamp_max_(classes - 1).view(targets.shape)
    return torch.where(targets == IGNORED, targets, drawn)


def _first_above(cumulative: Tensor, level: Tensor) -> Tensor:
    """By row, the first place whose sum exceeds ``level``: always one that adds something."""
    total = cumulative[:, -1:]
    level = torch.minimum(level.clamp_min(0), total * (1 - torch.finfo(total.dtype).eps))
    return torch.searchsorted(cumulative, level, right=True).clamp_max_(cumulative.shape[1] - 1)


def require_objective(objective: object) -> None:
    """Raise :class:`ConfigError` for what is no objective, such as a loss function."""
    if not isinstance(objective, Objective):
        raise ConfigError(
            f"the objective is a {type(objective).__name__}; a logix.Objective is needed: Objective() for a "
            "classifier, Objective.language_model(), or Objective(outputs=..., targets=..., likelihood=...)"
        )


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


def _next_tokens(batch: Batch) -> Tensor:
    """Shifted by one; the last position predicts nothing (leaving it out would copy all logits)."""
    if "labels" in batch:
        tokens = _targets(batch)
    else:
        tokens, mask = batch["input_ids"], batch.get("attention_mask")
        tokens = tokens if mask is None else tokens.where(mask.bool(), IGNORED)
    return F.pad(tokens[:, 1:], (0, 1), value=IGNORED)


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
