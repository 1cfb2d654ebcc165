"""A callback that logs what a ``lightning.Trainer`` trains on.

A block is open from the start of a training batch to the end of its backward pass; nothing of the Trainer or of the
module is patched. The loader's batch sampler is watched for the samples' indices and given back at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

import logix_like as logix
from logix_like.config import Config
from logix_like.errors import CaptureError, MissingDependencyError
from logix_like.run.block import Block

from .naming import NamedBy, SampleNames
from .starting import Setup, begun, refuse_second_training
from .telling import Telling

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise MissingDependencyError(
        "logix_like.integrations.lightning needs lightning: pip install 'logix_like[lightning]'"
    ) from error


class LogixCallback(Callback):
    """Logs every training sample's gradient while a ``lightning.Trainer`` trains.

    ``Trainer(callbacks=[LogixCallback(project="mnist")])`` is all. A row is the gradient of the sample's own loss,
    before clipping and free of what precision and accumulation multiply the loss by; the config's ``loss_reduction``
    says what ``training_step`` returns. Validation is not logged. With manual optimization every backward pass that
    has a forward pass of its own is one visit of the batch's samples, and steps count those of the first optimizer.

    Args:
        project: name of the run; may also stand in the config.
        config: as in :func:`logix_like.init`.
        data_id: what samples are called: the names in the dataset's order, a column of the dataset, or a function
            that takes the batch and returns one id for each sample; by default the index in the dataset.
        dataset: holds the column named by ``data_id``, where the loader's dataset does not.
        mask: takes the batch, returns ``[batch, positions]``, true where a position counts.
        scale: what the training step multiplies its loss by itself (manual optimization with accumulation).
        log_to: where numbers about the logging go every ``log_every_n_steps`` (rows, overhead, gradient norms): the
            LightningModule itself, a logger, a wandb run, or what else :func:`logix_like.scalars.sink_of` knows.
        overwrite: replace an earlier run in the same place.
        verbose: print once what is tracked.
        overrides: settings that win over the config.
    """

    def __init__(
        self,
        project: str | None = None,
        config: str | PathLike[str] | Mapping[str, Any] | Config | None = None,
        *,
        data_id: NamedBy = None,
        dataset: Any = None,
        mask: Callable[[Any], Tensor] | None = None,
        scale: float = 1.0,
        log_to: Any = None,
        overwrite: bool = False,
        verbose: bool = True,
        **overrides: Any,
    ) -> None:
        self._setup = Setup.of(
            project, config, overrides, named_by=data_id, dataset=dataset, overwrite=overwrite, verbose=verbose
        )
        self._mask = mask
        self._scale = scale
        self._run: logix.Run | None = None
        self._names: SampleNames | None = None
        self._loader: Any = None
        self._block: Block | None = None
        self._batch: dict[str, Any] = {}
        self._passes = 0
        self._saved_steps: int | None = None
        self._telling = Telling(log_to)

    @property
    def run(self) -> logix.Run:
        """The run, for queries during and after training.

        Raises:
            CaptureError: training has not begun.
        """
        return begun(self._run, "trainer.fit()")

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Watch the loader before its workers start, where it is known so early."""
        if stage != "fit":
            return
        self._saved_steps = None  # of a checkpoint that was validated or tested before
        loader = trainer.fit_loop._data_source.instance
        # With several processes the Trainer will build another loader from this one.
        if isinstance(loader, DataLoader) and trainer.world_size == 1 and not trainer.overfit_batches:
            self._watch(loader)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the run, or go on with it where the Trainer resumes from a checkpoint.

        Raises:
            CaptureError: this callback has logged a training already.
        """
        # Before it starts the Trainer still tells of the checkpoint of its last fit or test.
        if self._run is not None and trainer.ckpt_path is None:
            refuse_second_training("fit()", "with ckpt_path")
        self._follow(trainer)
        steps, self._saved_steps = self._saved_steps, None
        steps = trainer.global_step if steps is None else steps
        self._run = self._setup.start(pl_module, trainer.optimizers[0], steps=steps)
        self._telling.begin(self._run)
        self._run.epoch(trainer.current_epoch)  # the start of an epoch that is resumed in its midst is not told

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Tell the run of the epoch, for which loaders may have been made anew."""
        self._follow(trainer)
        self.run.epoch(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A block begins."""
        assert self._names is not None
        if batch is None:
            raise CaptureError(
                "the training step takes dataloader_iter and reads its batches itself, so that none is known when it "
                "begins; have it take (batch, batch_idx)"
            )
        mask = None if self._mask is None else self._mask(batch)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = self._scale
        if pl_module.automatic_optimization:
            scale /= trainer.accumulate_grad_batches
        ids = self._names.take(batch, mask, _training_pass(trainer))
        self._batch = {"data_id": ids, "mask": mask, "scale": scale, "scaler": scaler}
        self._passes = 0
        self._open()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """With manual optimization the block began before the last step, behind which a scaler may have moved on."""
        if self._block is not None and not pl_module.automatic_optimization:
            self._block.measure()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """The block's rows go to the run; with manual optimization another pass may follow.

        Raises:
            CaptureError: no gradient reached a tracked module, or it was that of a forward pass of an earlier block.
        """
        block, self._block = self._block, None
        if block is not None:
            if self._passes and block.recording is not None and not block.has_gradients:
                block.drop()
                raise CaptureError(
                    "manual_backward was called again without a forward pass since the last call (retain_graph=True, "
                    "or two losses that were computed before), so its gradients are of no block; add the losses up for "
                    "one call, or compute each loss behind the call for the one before"
                )
            block.__exit__(None, None, None)
            self._passes += 1
            if not pl_module.automatic_optimization:
                self._open()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """What was opened for a further backward pass is not needed.

        Raises:
            CaptureError: there was one, of which Lightning was not told.
        """
        passed = self._block is not None and self._block.has_gradients
        self._drop()
        if batch is None and self._names is not None:  # what its collator gave: of it nothing was told before
            self._names.pass_over(_training_pass(trainer))
        if passed:
            raise CaptureError(
                "the training step called loss.backward() itself, of which no callback hears, so its batch could not "
                "be logged; call self.manual_backward(loss)"
            )
        if trainer.is_global_zero and trainer.log_every_n_steps and (batch_idx + 1) % trainer.log_every_n_steps == 0:
            self._telling.tell(trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """A batch at which the module ended the epoch (its ``on_train_batch_start`` gave -1) is not trained on."""
        self._drop()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """A checkpoint from which training may be resumed: all rows up to it are to be safe as well."""
        if self._names is not None and self._run is not None:
            self._run.commit()

    @property
    def state_key(self) -> str:
        """Under which a checkpoint keeps what :meth:`state_dict` gives."""
        return str(self._generate_state_key(project=self._setup.config.project))

    def state_dict(self) -> dict[str, Any]:
        """Steps as the run counts them: the Trainer counts skipped ones, and those of all optimizers together."""
        return {} if self._run is None else {"steps": self._run.step()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Where a training that is resumed goes on."""
        self._saved_steps = int(state_dict["steps"])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End the run."""
        self.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Keep what was logged before training was broken off."""
        self._release()
        if self._run is not None:
            self._run.__exit__(type(exception), exception, exception.__traceback__)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave nothing behind."""
        self.close()

    def close(self) -> None:
        """End logging; calling it again does nothing."""
        self._release()
        if self._run is not None:
            self._run.finalize()

    def _release(self) -> None:
        """Take everything off the module and the loader."""
        self._drop()
        if self._names is not None:
            self._names.close()
        self._names = self._loader = None

    def _watch(self, loader: Any) -> None:
        if self._names is not None:
            self._names.close()
        self._names, self._loader = self._setup.names(loader), loader

    def _follow(self, trainer: Any) -> None:
        """Watch the loader that the Trainer has made, unless it is watched."""
        if trainer.train_dataloader is not self._loader:
            self._watch(trainer.train_dataloader)
            assert self._names is not None
            if self._names.order is not None:
                self._names.order.join(_training_pass(trainer))

    def _open(self) -> None:
        self._block = self.run(**self._batch)
        self._block.__enter__()

    def _drop(self) -> None:
        if self._block is not None:
            self._block.drop()
            self._block = None


def _training_pass(trainer: Any) -> Any:
    """The training loader's iterator, which Lightning makes for the first pass before callbacks hear of the loader.

    None where several loaders are read, by none of which samples are named.
    """
    iterators = trainer.fit_loop._combined_loader._iterator.iterators
    return iterators[0] if len(iterators) == 1 else None
