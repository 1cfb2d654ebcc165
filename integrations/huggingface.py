"""A callback that logs what ``transformers.Trainer`` trains on.

Nothing of the Trainer is patched or subclassed. While it trains, two hooks on the model see each forward pass (a
block begins) and its loss (which tells, by its gradient, what the Trainer multiplied it by); the loader's batch
sampler is watched for the samples' indices. All is removed when training ends.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from os import PathLike
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import logix_like as logix
from logix_like.capture.eager import eager
from logix_like.capture.hooks import OwnHook
from logix_like.config import Config
from logix_like.errors import CaptureError, LogixError, MissingDependencyError

from .loop import RunningLoop
from .loss import LossReader, logits_of, loss_of
from .naming import NamedBy, SampleNames
from .openbatch import OpenBatch
from .starting import Setup, begun, refuse_second_training
from .telling import Telling

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise MissingDependencyError(
        "logix_like.integrations.huggingface needs transformers: pip install 'logix_like[huggingface]'"
    ) from error


class LogixCallback(TrainerCallback):
    """Logs every training sample's gradient while a ``transformers.Trainer`` trains.

    ``trainer.add_callback(LogixCallback(project="bert"))`` is all. A row is the gradient of the sample's own loss:
    for labels of one number a sample its loss, for token labels the *sum* over its counted tokens (the mean with
    ``per_token: true``), whatever the Trainer divides by. Samples are called by their index in the dataset, those
    of an iterable dataset by a hash of their token ids. Evaluation is not logged.

    Args:
        project: name of the run; may also stand in the config.
        config: as in :func:`logix_like.init`.
        data_id: what samples are called: a column's name, the names in the dataset's order, or a function that takes
            the model's inputs (a mapping) and returns one id for each sample.
        dataset: holds the column named by ``data_id`` where the Trainer removes unused columns.
        log_to: where numbers about the logging go whenever the Trainer logs (rows, overhead, gradient norms): the
            Trainer itself, a SummaryWriter, a wandb run, or what else :func:`logix_like.scalars.sink_of` knows.
        overwrite: replace an earlier run in the same place.
        verbose: print once what is tracked.
        overrides: settings that win over the config.
    """

    _logging: ClassVar[WeakSet[LogixCallback]] = WeakSet()
    """Those whose training goes on, or was broken off."""

    def __init__(
        self,
        project: str | None = None,
        config: str | PathLike[str] | Mapping[str, Any] | Config | None = None,
        *,
        data_id: NamedBy = None,
        dataset: Any = None,
        log_to: Any = None,
        overwrite: bool = False,
        verbose: bool = True,
        **overrides: Any,
    ) -> None:
        self._setup = Setup.of(
            project, config, overrides, named_by=data_id, dataset=dataset, overwrite=overwrite, verbose=verbose
        )
        self._run: logix.Run | None = None
        self._session: _Training | None = None
        self._eager = ExitStack()
        self._telling = Telling(log_to)

    @property
    def run(self) -> logix.Run:
        """The run, for queries during and after training.

        Raises:
            CaptureError: training has not begun.
        """
        if self._is_broken_off:
            self.close()
        return begun(self._run, "trainer.train()")

    def close(self) -> None:
        """End logging; calling it again does nothing.

        The callback does this itself when training ends and, where an error broke it off, when it is asked for the
        run, when the model is next trained on, or when any Trainer next begins to train with such a callback.
        """
        self._eager.close()
        self._logging.discard(self)
        if self._session is not None:
            self._session.close()
            self._session = None
            self.run.finalize()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the run, or go on with it where the Trainer resumes from a checkpoint.

        Raises:
            CaptureError: this callback has logged a training already, or the way of training cannot be logged.
        """
        self._require_fit(args, state)
        for other in [other for other in self._logging if other._is_broken_off]:
            other._end_broken_off()
        if args.torch_compile:
            warnings.warn(
                "torch_compile=True: training steps are logged, and so run, eagerly; what lies between is compiled",
                RuntimeWarning,
                stacklevel=2,
            )
        model, loader, optimizer = kwargs["model"], kwargs["train_dataloader"], kwargs["optimizer"]
        names = self._setup.names(loader)
        try:
            scaler = getattr(optimizer, "scaler", None)
            optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the one that steps
            again = self._run is not None and not state.global_step
            steps = state.stateful_callbacks.get(self._state_key, {}).get("steps", state.global_step)
            self._run = self._setup.start(model, optimizer, steps=steps, again=again)
        except BaseException:
            names.close()
            raise
        if names.order is not None and not args.ignore_data_skip:
            names.order.skip(_batches_to_skip(state.global_step, len(loader), args.gradient_accumulation_steps))
        self._telling.begin(self._run)
        self._session = _Training(
            self._run,
            model,
            names,
            epoch=int(state.epoch or 0),
            smoothing=args.label_smoothing_factor,
            scaler=scaler,
            on_broken_off=self._broken_off,
        )
        self._logging.add(self)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the run of the epoch."""
        if self._session is not None:
            self._session.begin_epoch()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A compiled model is to run eagerly, which alone calls the hooks that see its batches."""
        if self._session is not None and args.torch_compile:
            self._eager.enter_context(eager())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What comes between steps may be compiled; a checkpoint that is saved now has the steps that were counted.

        The Trainer counts those as well that a gradient scaler has skipped.
        """
        self._eager.close()
        if self._session is not None:
            state.stateful_callbacks[self._state_key] = {"steps": self.run.step()}

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A micro-batch has ended without an optimizer step."""
        if self._session is not None:
            self._session.end_batch()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last micro-batch of a step has ended."""
        if self._session is not None:
            self._session.end_batch()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint from which training may be resumed: all rows up to it are to be safe as well."""
        if self._session is not None:
            self.run.commit()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer has logged: so does this."""
        if self._session is not None and state.is_world_process_zero:
            self._telling.tell(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run."""
        self.close()

    @property
    def _state_key(self) -> str:
        # Not the class's name: the Trainer would make another callback from what it finds under it.
        return f"{type(self).__name__} of {self._setup.config.project}"

    @property
    def _is_broken_off(self) -> bool:
        return self._session is not None and self._session.broken_off

    def _end_broken_off(self) -> None:
        """Another training begins, which is not to suffer from what may have become of this one's store."""
        try:
            self.close()
        except LogixError as error:
            warnings.warn(
                f"a training was broken off, and its logging could not be ended: {error}", RuntimeWarning, stacklevel=4
            )

    def _broken_off(self) -> None:
        self._end_broken_off()
        warnings.warn(
            "train() was broken off, and with it the logging; what was logged before is kept",
            RuntimeWarning,
            stacklevel=5,
        )

    def _require_fit(self, args: Any, state: Any) -> None:
        if self._session is not None:  # broken off; before the first batch was logged e.g. to find a batch size
            batches = self._session.batches
            self.close()
            if batches and not state.global_step:
                raise CaptureError(
                    "train() was called again after it had been broken off; rows of both attempts would be mixed: "
                    "resume from a checkpoint, or make a new LogixCallback with overwrite=True"
                )
        elif self._run is not None and not state.global_step:
            refuse_second_training("train()", "from a checkpoint")
        if args.n_gpu > 1:
            raise CaptureError(
                f"the Trainer spreads each batch over {args.n_gpu} GPUs in one process (DataParallel), which cannot "
                "be logged; start one process for each GPU with torchrun, or show the process one GPU"
            )


class _Training:
    """One training: hooks on the model, the loader's order, and the block that is open."""

    def __init__(
        self,
        run: logix.Run,
        model: nn.Module,
        names: SampleNames,
        *,
        epoch: int,
        smoothing: float,
        scaler: Any,
        on_broken_off: Callable[[], None],
    ) -> None:
        self._run = run
        self._names = names
        self._epoch = epoch - 1
        self._reader = LossReader(model, guess=not run.config.per_token)
        self._smoothing = smoothing
        self._scaler = scaler
        self._loop = RunningLoop(Trainer.train)
        self._on_broken_off = on_broken_off
        self._open: OpenBatch | None = None
        self.batches = 0
        """Batches that were logged."""
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(OwnHook(self._before), with_kwargs=True),
            model.register_forward_hook(OwnHook(self._after), with_kwargs=True),
        ]

    @property
    def broken_off(self) -> bool:
        """Whether the Trainer's loop is left, of which an error tells no callback."""
        return self._loop.is_over

    def begin_epoch(self) -> None:
        """The next epoch begins."""
        self._epoch += 1
        self._run.epoch(self._epoch)

    def end_batch(self) -> None:
        """The batch's backward pass is over: its rows go to the run.

        Raises:
            CaptureError: the model was not trained on its batch, or its loss was not what was trained on.
        """
        batch, self._open = self._open, None
        if batch is None:
            raise CaptureError(
                "a training step ended without a forward pass of the model in train mode and with gradients, so its "
                "batch could not be logged; the callback logs steps that call trainer.model once for each batch (a "
                "model in eval mode is taken to be evaluated: put its parts, such as dropouts, in eval mode instead)"
            )
        batch.end()
        self.batches += 1

    def close(self) -> None:
        """Take everything off the model and the loader; an open block is dropped."""
        while self._handles:
            self._handles.pop().remove()
        self._names.close()
        if self._open is not None:
            self._open.block.drop()
            self._open = None

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or not torch.is_grad_enabled():
            return
        if self.broken_off:
            self._on_broken_off()
            return
        if self._open is not None:
            self._open.block.drop()
            self._open = None
            raise CaptureError(
                "the model was called twice in one training step, so it is not known which call the batch belongs to; "
                "the callback logs steps that call trainer.model once for each batch"
            )
        mask = kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        ids = self._names.take(kwargs, mask)
        if self._names.order is not None:
            _require_row_of_each(len(ids), kwargs.get("input_ids"))
        if self._run.config.per_token:
            targets = self._reader.targets(kwargs)
            mask = mask if targets is None or targets.ndim != 2 else targets.ne(-100)
        mask = mask if mask is not None and len(mask) == len(ids) else None
        self._open = OpenBatch(self._run(data_id=ids, mask=mask, scaler=self._scaler))

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        if self._open is not None and model.training and torch.is_grad_enabled():
            loss, logits = loss_of(outputs), logits_of(outputs)
            if loss is not None and loss.requires_grad:
                divisor = self._reader.divisor(kwargs, outputs, len(self._open.block.options.data_id))
                self._open.returned(loss, divisor)
            elif loss is None and logits is not None and logits.requires_grad:
                self._open.gave(logits, self._smoothing)
            log_chances = outputs.get("log_probs") if isinstance(outputs, Mapping) else None
            if isinstance(log_chances, Tensor) and log_chances.requires_grad:
                self._open.gave_log_chances(log_chances)


def _require_row_of_each(samples: int, tokens: Any) -> None:
    if isinstance(tokens, Tensor) and tokens.ndim and len(tokens) != samples:
        raise CaptureError(
            f"the loader read {samples} samples, and its collator made 'input_ids' of shape {tuple(tokens.shape)} of "
            "them: samples that are packed together, dropped or split have no row each; use a collator that makes one "
            "row of each sample, or name what it makes with LogixCallback(data_id=...), a function of the batch"
        )


def _batches_to_skip(steps: int, batches: int, accumulated: int) -> int:
    """How many batches of its epoch a resumed Trainer reads and throws away."""
    steps_per_epoch = max(1, -(-batches // accumulated))
    return steps % steps_per_epoch * accumulated
