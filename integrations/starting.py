"""What both callbacks are told, and starting the run of a training that a trainer begins or resumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from torch import nn
from torch.optim import Optimizer

import logix_like as logix
from logix_like.config import Config, load_config
from logix_like.errors import CaptureError, ConfigError
from logix_like.run.starting import place_of
from logix_like.store import is_store

from .naming import NamedBy, SampleNames


@dataclass(frozen=True)
class Setup:
    """A callback's settings, checked before a long training begins."""

    config: Config
    """The run's."""
    named_by: NamedBy
    """What samples are called."""
    dataset: Any
    """Holds the column that names them, where the loader's dataset does not."""
    overwrite: bool
    """Whether an earlier run in the same place is replaced."""
    verbose: bool
    """Whether what is tracked is printed."""

    @classmethod
    def of(
        cls,
        project: str | None,
        config: str | PathLike[str] | Mapping[str, Any] | Config | None,
        overrides: Mapping[str, Any],
        **others: Any,
    ) -> Setup:
        """What a user gave; ``others`` are the other fields.

        Raises:
            ConfigError: a setting is unknown or wrong, or no project is named.
        """
        settings = load_config(config, project=project, **overrides)
        if settings.project is None:
            raise ConfigError("no project is named; give LogixCallback(project=...) or 'project:' in the config")
        return cls(settings, **others)

    def names(self, loader: Any) -> SampleNames:
        """Ids of the batches that ``loader`` hands out."""
        return SampleNames(self.named_by, loader, self.dataset)

    def start(self, model: nn.Module, optimizer: Optimizer, *, steps: int, again: bool = False) -> logix.Run:
        """A new run; where ``steps`` optimizer steps were taken before, one that goes on in the store of those.

        They are counted as the run counts them: trainers count skipped steps, and those of further optimizers, too.
        Rows of later steps than these, which an older attempt left, are taken back. ``again``: a training that was
        broken off before anything was logged begins once more.

        Raises:
            StoreExistsError: a new training would mix its rows with those of another.
        """
        resume = steps > 0 and is_store(place_of(self.config))
        run = logix.init(
            model=model,
            config=self.config,
            optimizer=optimizer,
            resume=resume,
            resume_step=steps if resume else None,
            overwrite=(self.overwrite or again) and not resume,
            verbose=self.verbose,
        )
        run.step(steps)
        return run


def begun(run: logix.Run | None, how: str) -> logix.Run:
    """The run, once training has begun; ``how`` it begins.

    Raises:
        CaptureError: it has not.
    """
    if run is None:
        raise CaptureError(f"there is no run yet: it begins with {how}")
    return run


def refuse_second_training(how: str, resumed: str) -> None:
    """Raise :class:`CaptureError`: one callback logs one training, but for one that is resumed."""
    raise CaptureError(
        f"this callback has logged a training already; give the next {how} a LogixCallback of its own (another "
        f"project, or overwrite=True), or resume {resumed}"
    )
