"""The two functions that make a run: one to log, one to ask."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import nn
from torch.optim import Optimizer

from logix_like.config import Config, EverySteps, load_config
from logix_like.config_errors import section_of
from logix_like.errors import ConfigError
from logix_like.run import Run
from logix_like.session import StoreSession
from logix_like.store import GradientStore, OnDamage, Place, as_place, is_store, open_store
from logix_like.tracking import new_tracker


def init(
    project: str | None = None,
    model: nn.Module | None = None,
    config: str | PathLike[str] | Mapping[str, Any] | Config | None = None,
    *,
    optimizer: Optimizer | None = None,
    resume: bool = False,
    overwrite: bool = False,
    verbose: bool = True,
    **overrides: Any,
) -> Run:
    """Start a run that logs into the store ``<root>/<project>``, or ``<store.url>/<project>`` where that is set.

    Args:
        project: name of the run; may also stand in the config.
        model: the model to track; may be given later to :meth:`Run.watch`.
        config: a YAML file, a preset's name, a mapping or a :class:`Config`.
        optimizer: lets rows carry optimizer steps and learning rates.
        resume: go on behind the last commit of an earlier run in the same place.
        overwrite: replace an earlier run in the same place.
        verbose: print once, to stderr, what is tracked.
        overrides: settings that win over the config.

    Raises:
        ConfigError: a setting is unknown or wrong, or no project is named.
        StoreExistsError: the place holds another run, and neither ``resume`` nor ``overwrite`` is set.
    """
    settings = load_config(config, project=project, **overrides)
    if settings.project is None:
        raise ConfigError("no project is named; give init(project=...) or 'project:' in the config")
    if resume and overwrite:
        raise ConfigError("resume and overwrite exclude each other")
    path = as_place(settings.store.url or settings.root) / settings.project
    if resume and is_store(path):
        settings = _with_stored(settings, _stored_config(open_store(path)))
    if isinstance(settings.checkpoints, EverySteps) and optimizer is None:
        raise ConfigError("checkpoints: every_steps counts optimizer steps; give init(optimizer=...)")
    if model is not None and not resume:
        new_tracker(model, settings)  # what is wrong with the choice of modules is said before a store is touched
    session = StoreSession(path, settings, resume=resume, overwrite=overwrite)
    run = Run(settings, path, session, optimizer=optimizer, verbose=verbose)
    if model is not None:
        run.watch(model)
    return run


def load(path: str | PathLike[str] | Place, model: nn.Module | None = None, *, on_damage: OnDamage = "raise") -> Run:
    """Open a finished (or still growing) store for queries; it needs no config and never writes.

    Args:
        path: the store's folder or URL (``s3://bucket/key``).
        model: the model to ask with.
        on_damage: ``raise``: a query that meets a damaged file fails; ``skip``: damaged chunks are left out, and
            every answer's note says how many rows.

    Raises:
        StoreNotFoundError: there is no store at ``path``.
        StoreDamagedError: what a store cannot be opened without is damaged.
        ModelMismatchError: ``model`` is not the one that was logged (names the first difference).
    """
    path = as_place(path)
    run = Run(_stored_config(open_store(path)), path, None, verbose=False, on_damage=on_damage)
    if model is not None:
        run.watch(model)
    return run


def _stored_config(store: GradientStore) -> Config:
    """The settings that a store was made with, read leniently: later ones must not keep an old store from opening."""
    sections = {name: section_of(field) for name, field in Config.model_fields.items()}
    known: dict[str, Any] = {}
    for key, value in store.manifest.config.items():
        section = sections.get(key)
        if section is not None and isinstance(value, Mapping):
            known[key] = {name: setting for name, setting in value.items() if name in section.model_fields}
        elif key in sections:
            known[key] = value
    return load_config(known)


def _with_stored(settings: Config, stored: Config) -> Config:
    """``settings`` with everything that decides what a row is as the resumed store has it."""
    kept = settings.model_copy(
        update={
            "modules": stored.modules,
            "projection": stored.projection,
            "store": settings.store.model_copy(update={"dtype": stored.store.dtype}),
        }
    )
    if kept != settings:
        warnings.warn(
            "the resumed store's modules, projection and dtype are kept; they differ from this config's, and rows of "
            "one store are all alike: start another project to change them",
            RuntimeWarning,
            stacklevel=3,
        )
    return kept
