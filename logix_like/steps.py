"""Where training stands: optimizer step, learning rate, epoch."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from logix_like.errors import ConfigError


class Progress:
    """Counts optimizer steps through the optimizer's own hook, or blocks where no optimizer is known.

    Owns the hook; :meth:`close` removes it.
    """

    def __init__(self, optimizer: Optimizer | None, *, step: int = 0, epoch: int = -1) -> None:
        self._optimizer = optimizer
        self.step = step
        self.epoch = epoch
        self.on_step: Callable[[int], None] | None = None
        """Called after each optimizer step with the number of steps taken."""
        self._handle = None if optimizer is None else optimizer.register_step_post_hook(self._stepped)

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer whose steps are counted."""
        return self._optimizer

    @property
    def counts_steps(self) -> bool:
        """Whether steps are the optimizer's."""
        return self._optimizer is not None

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group, NaN if no optimizer is known, or it has nothing to step."""
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        return float(groups[0]["lr"]) if groups else float("nan")

    def block_ended(self) -> None:
        """A block has ended; it counts as a step where no optimizer is known."""
        if self._optimizer is None:
            self.step += 1

    def close(self) -> None:
        """Remove the hook from the optimizer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        # A fused optimizer is called for a step that the GradScaler skips, and told to do nothing.
        skipped = getattr(optimizer, "found_inf", None)
        if isinstance(skipped, Tensor) and bool(skipped):
            return
        self.step += 1
        if self.on_step is not None:
            self.on_step(self.step)


def counted(value: Any, what: str) -> int:
    """``value`` as a number of steps or epochs; raises :class:`ConfigError` if it is none."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ConfigError(f"{what} is {value!r}; give a whole number, 0 or more")
    return number
