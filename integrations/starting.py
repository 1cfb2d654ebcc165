"""Starting the run of a training that a trainer begins or resumes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

import logix_like as logix
from logix_like.config import Config, load_config
from logix_like.errors import ConfigError, StoreNotFoundError


def settings_of(
    project: str | None, config: str | PathLike[str] | Mapping[str, Any] | Config | None, overrides: Mapping[str, Any]
) -> Config:
    """The callback's settings, checked before a long training begins.

    Raises:
        ConfigError: a setting is unknown or wrong, or no project is named.
    """
    settings = load_config(config, project=project, **overrides)
    if settings.project is None:
        raise ConfigError("no project is named; give LogixCallback(project=...) or 'project:' in the config")
    return settings


def start_run(
    config: Config, model: nn.Module, optimizer: Optimizer, *, steps: int, overwrite: bool, verbose: bool
) -> logix.Run:
    """A new run; where ``steps`` optimizer steps were taken before, one that goes on in the store of those.

    Raises:
        StoreExistsError: a new training would mix its rows with those of another.
    """
    resume = steps > 0 and _is_store(Path(config.root) / str(config.project))
    run = logix.init(
        model=model,
        config=config,
        optimizer=optimizer,
        resume=resume,
        overwrite=overwrite and not resume,
        verbose=verbose,
    )
    if steps:
        _warn_of_repeated_steps(run, steps)
        run.step(steps)
    return run


def _is_store(path: Path) -> bool:
    try:
        logix.open_store(path)
    except StoreNotFoundError:
        return False
    return True


def _warn_of_repeated_steps(run: logix.Run, steps: int) -> None:
    logged = -1 if run.resumed_at is None else run.resumed_at[1]
    if logged >= steps:
        warnings.warn(
            f"training goes on from step {steps}, but steps {steps} to {logged} are in the store already: their "
            "samples have one visit more than they had in training",
            RuntimeWarning,
            stacklevel=2,
        )
