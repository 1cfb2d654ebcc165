"""A callback that watches, for ``transformers.Trainer``, how sensitive the model is to its training samples."""

from __future__ import annotations

from typing import Any

from logix_like.errors import MissingDependencyError
from logix_like.objective import Objective
from logix_like.scalars import sink_of
from logix_like.sensitivity import SensitivityMonitor

from .looking import Watch

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingDependencyError(
        "logix_like.integrations.huggingface_sensitivity needs transformers: pip install 'logix_like[huggingface]'"
    ) from error


class SensitivityCallback(TrainerCallback):
    """At the end of each epoch: sensitivities of all training samples and the leave-one-out loss.

    ``trainer.add_callback(SensitivityCallback(posterior="diagonal", strength=5.0, parameters=["classifier.*"]))``.
    Samples are called by their index in the dataset. The losses go to ``state.log_history`` as ``loo_loss`` and
    ``sensitivity_train_loss`` (and the evaluation set's as ``sensitivity_eval_loss``), or to ``log_to``.

    Args:
        objective: what the model is trained for; a classifier unless told otherwise.
        every: epochs between two looks.
        log_to: the Trainer itself, so that its reporters see the losses as well, a SummaryWriter, a wandb run, or what
            else :func:`logix_like.scalars.sink_of` knows.
        options: of :class:`~logix_like.sensitivity.SensitivityMonitor`.
    """

    def __init__(
        self, objective: Objective | None = None, *, every: int = 1, log_to: Any = None, **options: Any
    ) -> None:
        self._sink = None if log_to is None else sink_of(log_to)
        self._watch = Watch(objective, every, options, "trainer.train()")

    @property
    def monitor(self) -> SensitivityMonitor:
        """Its ``history`` and what the last look found.

        Raises:
            CaptureError: training has not begun.
        """
        return self._watch.monitor

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch."""
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        self._watch.begin(kwargs["model"], optimizer, kwargs["train_dataloader"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at all samples."""
        epoch = round(state.epoch)
        if self._watch.is_due(epoch):
            look = self._watch.look(epoch, kwargs.get("eval_dataloader"))
            losses = {"loo_loss": look.loo_loss, "sensitivity_train_loss": look.train_loss}
            if look.validation_loss is not None:
                losses["sensitivity_eval_loss"] = look.validation_loss
            if self._sink is None:
                state.log_history.append({"epoch": state.epoch, "step": state.global_step, **losses})
            else:
                due = control.should_log
                self._sink(losses, state.global_step)
                control.should_log = due  # the Trainer takes its own log for done when it is written to
