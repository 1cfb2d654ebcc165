"""Going on with the store of an earlier run: what of its settings holds, and where the training stands."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from logix_like.config import Config, load_config
from logix_like.config_errors import section_of
from logix_like.errors import ConfigError
from logix_like.run.session import StoreSession
from logix_like.steps import counted
from logix_like.store import StoreManifest


def stored_config(manifest: StoreManifest) -> Config:
    """The settings that a store was made with, read leniently: later ones must not keep an old store from opening."""
    sections = {name: section_of(field) for name, field in Config.model_fields.items()}
    known: dict[str, Any] = {}
    for key, value in manifest.config.items():
        section = sections.get(key)
        if section is not None and isinstance(value, Mapping):
            known[key] = {name: setting for name, setting in value.items() if name in section.model_fields}
        elif key in sections:
            known[key] = value
    return load_config(known)


def with_stored(settings: Config, stored: Config) -> Config:
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


def require_resume_step(step: int | None, *, resume: bool) -> int | None:
    """The step; raises :class:`ConfigError` for one that makes no sense."""
    if step is None:
        return None
    if not resume:
        raise ConfigError("resume_step says where an earlier run is gone on with; give resume=True too")
    return counted(step, "resume_step, how many steps the checkpoint had taken,")


def require_no_step_twice(session: StoreSession, stands_at: int, step: int, *, logged: bool) -> None:
    """Raise :class:`ConfigError` when a run that has rows, logged or found, is told an earlier step."""
    if step < stands_at and (logged or session.cursor is not None):
        raise ConfigError(
            f"the step is {step}, but the run stands at {stands_at} and has the rows of the steps between, which would "
            f"count twice; begin again with logix.init(..., resume=True, resume_step={step}), which takes them back"
        )


def warn_of_missing_steps(session: StoreSession, resume_step: int | None) -> None:
    """Warn when the store ends before the step that training goes on from."""
    if resume_step is None or session.resumed is None:
        return
    committed = 0 if session.cursor is None else session.cursor[1] + 1
    if committed >= resume_step:
        return
    warnings.warn(
        f"training goes on from step {resume_step}, but rows of the first {committed} steps only were committed: the "
        "steps between are missing in the store; call run.commit() whenever the training saves a checkpoint",
        RuntimeWarning,
        stacklevel=3,
    )


def stand_of(session: StoreSession | None) -> dict[str, int]:
    """Epoch and next step of a run that is gone on with; nothing for a new one."""
    if session is None or session.cursor is None:
        return {}
    epoch, step = session.cursor
    return {"epoch": epoch, "step": step + 1}
