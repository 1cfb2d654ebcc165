"""A callback that watches, for ``lightning.Trainer``, how sensitive the model is to its training samples."""

from __future__ import annotations

from typing import Any

from logix_like.errors import CaptureError, MissingDependencyError
from logix_like.objective import Objective
from logix_like.sensitivity import SensitivityMonitor

from .looking import in_order

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
        self._objective = objective
        self._submodule = submodule
        self._every = every
        self._options = options
        self._monitor: SensitivityMonitor | None = None

    @property
    def monitor(self) -> SensitivityMonitor:
        """Its ``history`` and what the last look found.

        Raises:
            CaptureError: training has not begun.
        """
        if self._monitor is None:
            raise CaptureError("there is no monitor yet: it begins with trainer.fit()")
        return self._monitor

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to watch; what is wrong with the options is said before a long training."""
        self._loader = in_order(trainer.train_dataloader)
        options = {"samples": len(self._loader.dataset), **self._options}  # type: ignore[arg-type]
        model = pl_module.get_submodule(self._submodule)
        self._monitor = SensitivityMonitor(model, trainer.optimizers[0], self._objective, **options)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Look at all samples."""
        if (trainer.current_epoch + 1) % self._every:
            return
        loaders = trainer.val_dataloaders
        validation = loaders[0] if isinstance(loaders, list) else loaders
        self.monitor.measure(self._loader, validation=validation, epoch=trainer.current_epoch)
        look = self.monitor.history[-1]
        pl_module.log("loo_loss", look.loo_loss)
        pl_module.log("sensitivity_train_loss", look.train_loss)
        if look.validation_loss is not None:
            pl_module.log("sensitivity_val_loss", look.validation_loss)
