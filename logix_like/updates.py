"""What torch's optimizers do in a step, as differentiable functions of flat vectors.

An optimizer changes weights in place, so that nothing can be derived through its step. The rules here compute the
same numbers from weights, gradient and moments, for replaying a recorded run and for deriving through it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from logix_like.errors import ConfigError

Hyper = Mapping[str, Any]
"""Settings of one parameter group: numbers, truth values and ``betas``, by torch's names."""

Moments = dict[str, Tensor]
"""An optimizer's running averages by torch's names, each ``[parameters]``."""


class UpdateRule(ABC):
    """One optimizer's step on a flat vector of parameters that share their settings."""

    moments: ClassVar[tuple[str, ...]]
    """Names of the running averages it keeps, as in the optimizer's ``state``."""
    refused: ClassVar[tuple[str, ...]] = ("amsgrad", "centered", "maximize")
    """Settings that must be off."""

    adaptive: ClassVar[bool] = False
    """Whether each weight has a step size of its own, from its second moment."""

    @abstractmethod
    def step(
        self, theta: Tensor, gradient: Tensor, moments: Moments, taken: int, hyper: Hyper, *, fixed_scale: bool = False
    ) -> tuple[Tensor, Moments]:
        """Weights and moments after step number ``taken`` (from 0).

        With ``fixed_scale`` the second moment counts as a constant when the result is derived: the update is then
        linear in the gradients, and each sample has a share of it.
        """

    @abstractmethod
    def rate(self, hyper: Hyper) -> float:
        """How far a unit of one step's gradient moves a weight in the long run, unscaled."""

    @abstractmethod
    def impulse(self, age: int, taken: int, hyper: Hyper) -> float:
        """What step number ``taken`` moves the weights for a unit of the gradient of ``age`` steps ago, unscaled."""

    def scale(self, moments: Mapping[str, Tensor], taken: int, hyper: Hyper) -> Tensor | None:
        """By which an adaptive optimizer multiplies :meth:`rate` and :meth:`impulse`; None for the others.

        ``[parameters]`` as the ``moments``, which are those after ``taken`` steps.
        """
        return None

    def shrinkage(self, hyper: Hyper) -> float:
        """The part of itself that a step takes from each weight apart from its gradient (decoupled weight decay)."""
        return 0.0

    def penalty(self, hyper: Hyper) -> float:
        """What a step adds of each weight to its gradient (L2 weight decay)."""
        return float(hyper["weight_decay"])

    def check(self, hyper: Hyper) -> None:
        """Raise :class:`ConfigError` if a setting is on that the rule does not know."""
        for name in self.refused:
            if hyper.get(name):
                raise ConfigError(
                    f"the optimizer was used with {name}={hyper[name]!r}, which cannot be replayed; use {name}=False"
                    + ("" if name == "maximize" else ", or an estimator that needs no replay (TracInCP, stored rows)")
                )


class SGDRule(UpdateRule):
    """``torch.optim.SGD``: momentum, dampening, Nesterov, weight decay."""

    moments = ("momentum_buffer",)

    def step(
        self, theta: Tensor, gradient: Tensor, moments: Moments, taken: int, hyper: Hyper, *, fixed_scale: bool = False
    ) -> tuple[Tensor, Moments]:
        gradient = gradient + hyper["weight_decay"] * theta
        momentum = hyper["momentum"]
        if not momentum:
            return theta - hyper["lr"] * gradient, moments
        # The first step takes the gradient whole, whatever the dampening.
        fresh = 1 - hyper["dampening"] if taken else 1.0
        buffer = momentum * moments["momentum_buffer"] + fresh * gradient
        direction = gradient + momentum * buffer if hyper["nesterov"] else buffer
        return theta - hyper["lr"] * direction, {"momentum_buffer": buffer}

    def rate(self, hyper: Hyper) -> float:
        momentum = hyper["momentum"]
        return float(hyper["lr"] * ((1 - hyper["dampening"]) / (1 - momentum) if momentum else 1.0))

    def impulse(self, age: int, taken: int, hyper: Hyper) -> float:
        momentum = hyper["momentum"]
        if not momentum:
            return float(hyper["lr"]) if age == 0 else 0.0
        part = (1 - hyper["dampening"]) * momentum**age
        if hyper["nesterov"]:
            part = momentum * part + (age == 0)
        return float(hyper["lr"] * part)


class AdamRule(UpdateRule):
    """``torch.optim.Adam`` and ``AdamW``."""

    moments = ("exp_avg", "exp_avg_sq")
    adaptive = True

    def __init__(self, *, decoupled: bool) -> None:
        self._decoupled = decoupled

    def step(
        self, theta: Tensor, gradient: Tensor, moments: Moments, taken: int, hyper: Hyper, *, fixed_scale: bool = False
    ) -> tuple[Tensor, Moments]:
        first, second = hyper["betas"]
        gradient = gradient + self.penalty(hyper) * theta
        theta = theta * (1 - self.shrinkage(hyper))
        mean = first * moments["exp_avg"] + (1 - first) * gradient
        square = second * moments["exp_avg_sq"] + (1 - second) * gradient * gradient
        scale = _root(square.detach() if fixed_scale else square) / (1 - second ** (taken + 1)) ** 0.5
        size = hyper["lr"] / (1 - first ** (taken + 1))
        return theta - size * mean / (scale + hyper["eps"]), {"exp_avg": mean, "exp_avg_sq": square}

    def rate(self, hyper: Hyper) -> float:
        return float(hyper["lr"])

    def impulse(self, age: int, taken: int, hyper: Hyper) -> float:
        first = hyper["betas"][0]
        return float(hyper["lr"] * (1 - first) * first**age / (1 - first ** (taken + 1)))

    def scale(self, moments: Mapping[str, Tensor], taken: int, hyper: Hyper) -> Tensor | None:
        corrected = moments["exp_avg_sq"] / (1 - hyper["betas"][1] ** max(taken, 1))
        scale: Tensor = 1 / (corrected.sqrt() + hyper["eps"])
        return scale

    def shrinkage(self, hyper: Hyper) -> float:
        return float(hyper["lr"] * hyper["weight_decay"]) if self._decouples(hyper) else 0.0

    def penalty(self, hyper: Hyper) -> float:
        return 0.0 if self._decouples(hyper) else float(hyper["weight_decay"])

    def _decouples(self, hyper: Hyper) -> bool:
        return self._decoupled or bool(hyper.get("decoupled_weight_decay"))


class RMSpropRule(UpdateRule):
    """``torch.optim.RMSprop``, with momentum, not centred."""

    moments = ("square_avg", "momentum_buffer")
    adaptive = True

    def step(
        self, theta: Tensor, gradient: Tensor, moments: Moments, taken: int, hyper: Hyper, *, fixed_scale: bool = False
    ) -> tuple[Tensor, Moments]:
        gradient = gradient + hyper["weight_decay"] * theta
        square = hyper["alpha"] * moments["square_avg"] + (1 - hyper["alpha"]) * gradient * gradient
        scaled = gradient / (_root(square.detach() if fixed_scale else square) + hyper["eps"])
        buffer = hyper["momentum"] * moments["momentum_buffer"] + scaled
        return theta - hyper["lr"] * buffer, {"square_avg": square, "momentum_buffer": buffer}

    def rate(self, hyper: Hyper) -> float:
        return float(hyper["lr"] / (1 - hyper["momentum"]))

    def impulse(self, age: int, taken: int, hyper: Hyper) -> float:
        return float(hyper["lr"] * hyper["momentum"] ** age)

    def scale(self, moments: Mapping[str, Tensor], taken: int, hyper: Hyper) -> Tensor | None:
        scale: Tensor = 1 / (moments["square_avg"].sqrt() + hyper["eps"])
        return scale


MOVES = ("lr", "momentum", "dampening", "nesterov", "betas", "alpha")
"""The settings that say how far a gradient moves a weight."""

RULES: Mapping[str, UpdateRule] = {
    "SGD": SGDRule(),
    "Adam": AdamRule(decoupled=False),
    "AdamW": AdamRule(decoupled=True),
    "RMSprop": RMSpropRule(),
}
"""By the optimizer's class name."""


def rule_of(optimizer: str) -> UpdateRule:
    """The rule of an optimizer by its class name.

    Raises:
        ConfigError: there is none (lists the known).
    """
    if optimizer not in RULES:
        raise ConfigError(f"the optimizer {optimizer!r} has no known update rule; known are {', '.join(RULES)}")
    return RULES[optimizer]


def common_settings(groups: Sequence[Hyper], what: str, instead: str) -> Hyper:
    """The settings of all parameter groups, which must agree in what moves weights.

    Args:
        groups: settings of each group.
        what: needs one for all, e.g. ``tracked queries``.
        instead: what to do where the groups differ.

    Raises:
        ConfigError: they differ (says in what).
    """
    for name in MOVES:
        if any(group.get(name) != groups[0].get(name) for group in groups):
            raise ConfigError(f"the optimizer's groups differ in {name}; {what} need one for all: {instead}")
    return groups[0]


def require_descent(groups: Sequence[Hyper]) -> None:
    """Raise :class:`ConfigError` if the optimizer climbed: the sign of a score would be another."""
    if any(group.get("maximize") for group in groups):
        raise ConfigError(
            "the optimizer was used with maximize=True, where the sign of a score would be another; minimise the "
            "negated objective instead"
        )


def settings_of(optimizer: Optimizer) -> tuple[dict[str, Any], ...]:
    """The settings of each parameter group, plain data: numbers, truth values and tuples of numbers."""
    return tuple(
        {name: plain for name, value in group.items() if (plain := _plain(value)) is not None}
        for group in optimizer.param_groups
    )


def optimizer_facts(optimizer: Optimizer) -> dict[str, Any]:
    """What a store says of an optimizer: the ``name`` of its class and the settings of its ``groups``."""
    return {"name": type(optimizer).__name__, "groups": list(settings_of(optimizer))}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, tuple) and value and all(isinstance(_plain(one), int | float) for one in value):
        return [_plain(one) for one in value]
    return None


def _root(square: Tensor) -> Tensor:
    """Square root with derivative 0 at 0: where no gradient has ever come, none comes through."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
