"""The two functions that make a run: one to log, one to ask."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import nn
from torch.optim import Optimizer

from logix_like.config import AtSteps, Config, EverySteps, load_config
from logix_like.curvature import Curvature, stored_curvature
from logix_like.errors import ConfigError
from logix_like.run.curvatures import TRAINING
from logix_like.run.resuming import require_resume_step, stored_config, warn_of_missing_steps, with_stored
from logix_like.run.run import Run
from logix_like.run.session import StoreSession
from logix_like.run.tracking import new_tracker, require_training
from logix_like.store import OnDamage, Place, as_place, is_store, read_manifest


def init(
    project: str | None = None,
    model: nn.Module | None = None,
    config: str | PathLike[str] | Mapping[str, Any] | Config | None = None,
    *,
    optimizer: Optimizer | None = None,
    curvature: Curvature | None = None,
    resume: bool = False,
    resume_step: int | None = None,
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
        curvature: of the model, fitted before (:func:`logix_like.curvature.fit_curvature`): projections of init
            ``pca`` and ``eigen`` are made from it instead of from a warm-up. Needs ``model``.
        resume: go on behind the last commit of an earlier run in the same place.
        resume_step: how many steps the training's own checkpoint had taken that it goes on from. Rows of steps after
            it, which the training is about to take again, are taken back: they stay on disk and count no more.
        overwrite: replace an earlier run in the same place.
        verbose: print once, to stderr, what is tracked.
        overrides: settings that win over the config.

    Raises:
        ConfigError: a setting is unknown or wrong, no project is named, or the optimizer trains another model.
        StoreExistsError: the place holds another run, and neither ``resume`` nor ``overwrite`` is set.
    """
    settings = load_config(config, project=project, **overrides)
    _require_consistent(settings, resume and overwrite, curvature is not None and model is None)
    resume_step = require_resume_step(resume_step, resume=resume)
    path = place_of(settings)
    if "curvature" in settings.statistics:
        stored_curvature(path, TRAINING)  # refuses where none can be kept
    if resume and is_store(path):
        settings = with_stored(settings, stored_config(read_manifest(path)))
    if optimizer is None:
        _require_no_steps(settings)
    # What is wrong with the choice of modules is said before a store is touched.
    tracker = None if model is None or resume else new_tracker(model, settings, curvature)
    if tracker is not None:
        require_training(optimizer, tracker.model)
    session = StoreSession(path, settings, resume=resume, overwrite=overwrite, resume_step=resume_step)
    warn_of_missing_steps(session, resume_step)
    run = Run(settings, path, session, optimizer=optimizer, verbose=verbose)
    if resume_step is not None:
        run.step(resume_step)
    if tracker is not None:
        run.follow(tracker)
    elif model is not None:
        run.watch(model)
    return run


def _require_consistent(settings: Config, both: bool, curvature_alone: bool) -> None:
    """Raise :class:`ConfigError` for arguments of :func:`init` that lack or exclude one another."""
    if settings.project is None:
        raise ConfigError("no project is named; give init(project=...) or 'project:' in the config")
    if both:
        raise ConfigError("resume and overwrite exclude each other")
    if curvature_alone:
        raise ConfigError("curvature= makes the projections of a model: give init(model=...) as well")


def _require_no_steps(settings: Config) -> None:
    """Raise :class:`ConfigError` where settings count steps, which only an optimizer takes."""
    if isinstance(settings.checkpoints, EverySteps | AtSteps):
        asked = next(iter(settings.checkpoints.model_dump()))
        raise ConfigError(f"checkpoints: {asked} counts optimizer steps; give init(optimizer=...)")
    if settings.record == "path":
        raise ConfigError("record: path keeps what each optimizer step does; give init(optimizer=...)")


def place_of(config: Config) -> Place:
    """Where the store of a run with these settings is."""
    return as_place(config.store.url or config.root) / str(config.project)


def load(path: str | PathLike[str] | Place, model: nn.Module | None = None, *, on_damage: OnDamage = "raise") -> Run:
    """Open a finished (or still growing) store for queries, by folder or URL; it needs no config and never writes.

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
    run = Run(stored_config(read_manifest(path)), path, None, verbose=False, on_damage=on_damage)
    if model is not None:
        run.watch(model)
    return run
