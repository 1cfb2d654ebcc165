"""How logging goes, as numbers for whatever logger the training has.

::

    scalars = ScalarLog(run, log_to=wandb_run)  # or a SummaryWriter, a trainer, a LightningModule, ...
    ...
    if step % 100 == 0:
        scalars.write(step)

Both trainers' callbacks do this by themselves, whenever the trainer logs: ``LogixCallback(..., log_to=trainer)``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from logix_like.errors import CaptureError, ConfigError
from logix_like.run.run import Run

if TYPE_CHECKING:
    from logix_like.sensitivity import SensitivityMonitor

QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}

Sink = Callable[[Mapping[str, float], int], None]
"""Takes numbers by name, and the step."""


def sink_of(log_to: Any) -> Sink:
    """A way to hand numbers to ``log_to``, by the method that it has.

    In this order: ``add_scalar(name, value, step)`` (a TensorBoard SummaryWriter), ``log_dict(numbers)`` (a
    LightningModule), ``log(numbers)`` (the Hugging Face Trainer, a wandb run), ``log_metrics(numbers, step=step)``
    (Lightning's loggers, MLflow, Comet), or ``log_to(numbers, step)`` itself.

    Raises:
        ConfigError: it is none of these.
    """

    def add_scalars(numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            log_to.add_scalar(name, value, step)

    ways: dict[str, Sink] = {
        "add_scalar": add_scalars,
        "log_dict": lambda numbers, step: log_to.log_dict(dict(numbers)),
        "log": lambda numbers, step: log_to.log(dict(numbers)),
        "log_metrics": lambda numbers, step: log_to.log_metrics(dict(numbers), step=step),
        "__call__": lambda numbers, step: log_to(dict(numbers), step),
    }
    for method, way in ways.items():
        if callable(getattr(log_to, method, None)):
            return way
    raise ConfigError(
        f"log_to is a {type(log_to).__name__}; it must be a function of (numbers, step), or have one of "
        f"{', '.join(name for name in ways if name != '__call__')}: a trainer, a LightningModule, a SummaryWriter, a "
        "wandb run"
    )


class ScalarLog:
    """Reads off a run how its logging goes; training does not notice.

    Args:
        run: A run that logs.
        prefix: What the names begin with.
        monitor: A :class:`~logix_like.sensitivity.SensitivityMonitor` of the same training, for the leave-one-out
            estimate of its last look.
        log_to: Where :meth:`write` writes; see :func:`sink_of`.

    Raises:
        ConfigError: ``log_to`` is nothing to log to.
    """

    def __init__(
        self, run: Run, prefix: str = "logix_like/", *, monitor: SensitivityMonitor | None = None, log_to: Any = None
    ) -> None:
        self._run = run
        self._prefix = prefix
        self._monitor = monitor
        self._sink = None if log_to is None else sink_of(log_to)
        self._last = (time.monotonic(), run.rows, run.timing)

    def read(self) -> dict[str, float]:
        """Rows so far; rows a second and overhead since the last reading; quantiles of the last block's norms.

        ``overhead`` is by what part of itself logging prolonged the training (.04: by 4 %), as
        :class:`~logix_like.timing.Timing` has it. The norms are those of the stored, projected rows. With a monitor
        that has looked, ``loo_loss`` and ``train_loss``. What is not known yet is left out.
        """
        now, rows, timing = time.monotonic(), self._run.rows, self._run.timing
        before, known, timed = self._last
        self._last = (now, rows, timing)
        found = {"rows": float(rows), "rows_per_second": (rows - known) / max(now - before, 1e-9)}
        overhead = (timing - timed).overhead
        found |= ({} if overhead is None else {"overhead": overhead}) | self._norms() | self._left_out()
        return {self._prefix + name: value for name, value in found.items()}

    def write(self, step: int) -> None:
        """Hand what :meth:`read` gives to ``log_to``.

        Raises:
            ConfigError: no ``log_to`` was given.
        """
        if self._sink is None:
            raise ConfigError("there is nothing to write to; give ScalarLog(run, log_to=...), or use read()")
        self._sink(self.read(), step)

    def _norms(self) -> dict[str, float]:
        try:
            gradients = self._run.get_log().gradients
        except CaptureError:
            return {}
        norms = torch.linalg.vector_norm(gradients.detach().float(), dim=1)
        norms = norms[norms.isfinite()]
        if not len(norms):
            return {}
        return {f"gradient_norm_{name}": float(norms.quantile(share)) for name, share in QUANTILES.items()}

    def _left_out(self) -> dict[str, float]:
        if self._monitor is None or not self._monitor.history:
            return {}
        look = self._monitor.history[-1]
        return {"loo_loss": look.loo_loss, "train_loss": look.train_loss}
