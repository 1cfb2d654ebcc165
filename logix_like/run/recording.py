"""Recording the path of a training: its steps into the store's journal, the optimizer's state into checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.optim import Optimizer

from logix_like.errors import CaptureError
from logix_like.path import OPTIMIZER, PathBlock, PathStep
from logix_like.ranks import Ranks
from logix_like.run.block import BlockOptions
from logix_like.run.session import StoreSession
from logix_like.steps import Progress
from logix_like.store import PathJournal, last_checkpoint, next_attempt
from logix_like.updates import settings_of
from logix_like.weights import whole
from logix_like.wrapping import plain_names


class PathRecorder:
    """Writes down each optimizer step with the blocks before it.

    Processes that train together must make it together; each writes its own part of every batch.

    Raises:
        CaptureError: the optimizer trains a tensor that is none of the model's.
    """

    def __init__(
        self,
        session: StoreSession,
        model: nn.Module,
        optimizer: Optimizer,
        progress: Progress,
        checkpoint: Callable[[], None],
    ) -> None:
        self._session = session
        self._ranks = Ranks.here()
        self._attempt = self._ranks.agree(lambda: next_attempt(session.path))
        self._optimizer = optimizer
        self._names = _parameter_names(model, optimizer)
        self._progress = progress
        self._checkpoint = checkpoint
        self._journal: PathJournal | None = None
        self._blocks: list[PathBlock] = []

    def block(self, options: BlockOptions, overflow: bool) -> None:
        """A block has ended; with ``overflow`` the scaler will skip its step and all blocks of it."""
        if self._journal is None:
            self._session.attempt(self._open)
            self._checkpoint()  # where the path begins
        if overflow:
            self._blocks.clear()
        else:
            # The optimizer sees the mean of the processes' gradients.
            weight = 1 / (options.factor(options.scale) * self._ranks.size)
            self._blocks.append(PathBlock(options.data_id, weight))

    def stepped(self, step: int) -> None:
        """The optimizer has taken a step; ``step`` are taken now."""
        blocks, self._blocks = tuple(self._blocks), []
        if self._journal is not None:
            settings = settings_of(self._optimizer)
            step_taken = PathStep(step - 1, self._progress.epoch, blocks, settings)
            self._session.attempt(partial(self._journal.append, step_taken))

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state by the names it has in a checkpoint."""
        return {
            f"{OPTIMIZER}{self._names[parameter]}/{key}": whole(value)
            for parameter, state in self._optimizer.state.items()
            if parameter in self._names  # some keep counts of their own beside
            for key, value in state.items()
            if isinstance(value, Tensor)
        }

    def _open(self) -> None:
        kind = type(self._optimizer).__name__
        store, ranks = self._session.path, self._ranks
        earlier = ranks.agree(lambda: last_checkpoint(store))
        self._journal = PathJournal(store, self._attempt, kind, self._groups(), ranks, earlier)

    def _groups(self) -> list[list[str]]:
        # An optimizer is often given all parameters, and passes over those that are frozen.
        groups = self._optimizer.param_groups
        return [[self._names[p] for p in group["params"] if p.requires_grad] for group in groups]


def _parameter_names(model: nn.Module, optimizer: Optimizer) -> dict[Tensor, str]:
    plain = plain_names(model)
    names: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters():
        path, _, own = name.rpartition(".")
        prefix = plain.get(path, path)
        names[parameter] = f"{prefix}.{own}" if prefix else own
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter not in names:
                raise CaptureError(
                    f"group {number} of the optimizer trains a tensor of shape {tuple(parameter.shape)} that is no "
                    "parameter of the watched model, so that its path cannot be replayed; give init(model=...) the "
                    "whole model, or set record: none"
                )
    return names
