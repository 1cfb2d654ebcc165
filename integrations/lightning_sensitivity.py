"""A callback that watches, for ``lightning.Trainer``, how sensitive the model is to its training samples."""

from __future__ import annotations

from typing import Any

from logix_like.errors import MissingDependencyError
from logix_like.objective import Objective
from logix_like.sensitivity import SensitivityMonitor

from .looking import Watch

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise MissingDependencyError(
        "logix_like.integrations.lightning_sensitivity needs lightning: pip install 'logix_like[lightning]'"
    ) from error


class SensitivityCallback(Callback):
    """At the end of each epoch: sensitivities of all training samples and the leave-one-out loss.

    ``Trainer(callbacks=[SensitivityCallback(posterior="diagonal", strength=5.0, submodule="net")])``. Samples are
    called by their index in the dataset. The losses are logged as ``loo_loss`` and ``sensitivity_train_loss`` (and the
    validation set's as ``sensitivity_val_loss``).

    Args:
        objective: what the model is trained for; a classifier unless told otherwise.
        submodule: the part of the LightningModule that makes the outputs; empty: the module's own ``forward``.
        every: epochs between two looks.
        options: of :class:`~logix_like.sensitivity.SensitivityMonitor`.
    """

    def __init__(
        self, objective: Objective | None = None, *, submodule: str = "", every: int = 1, **options: Any
    ) -> None:
        self._submodule = submodule
        self._watch = Watch(objective, every, options, "trainer.fit()")

    @property
    def monitor(self) -> SensitivityMonitor:
        """Its ``history`` and what the last look found.

        Raises:
            CaptureError: training has not begun.
        """
        return self._watch.monitor

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to watch."""
        self._watch.begin(pl_module.get_submodule(self._submodule), trainer.optimizers[0], trainer.train_dataloader)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Look at all samples."""
        if not self._watch.is_due(trainer.current_epoch + 1):
            return
        loaders = trainer.val_dataloaders
        look = self._watch.look(trainer.current_epoch, loaders[0] if isinstance(loaders, list) else loaders)
        pl_module.log("loo_loss", look.loo_loss)
        pl_module.log("sensitivity_train_loss", look.train_loss)
        if look.validation_loss is not None:
            pl_module.log("sensitivity_val_loss", look.validation_loss)
