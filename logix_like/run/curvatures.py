"""Curvatures at full size that a run keeps in its store, by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from logix_like.capture.tracker import Tracker
from logix_like.curvature import Curvature, fit_curvature, load_curvature, save_curvature, stored_curvature
from logix_like.curvature.stream import CurvatureStream
from logix_like.errors import ConfigError, StoreNotFoundError
from logix_like.objective import Objective
from logix_like.store import Place

TRAINING = "training"
"""Name of the curvature that the training itself gives."""


def gathered_curvature(store: Place, tracker: Tracker, wanted: bool, *, resumed: bool) -> CurvatureStream | None:
    """What gathers the curvature of the training that begins; None if that is not wanted.

    Warns:
        RuntimeWarning: the run that is gone on with gathered it, and this one does not.
    """
    if wanted:
        return CurvatureStream(tracker.selection, stored_curvature(store, TRAINING))
    if resumed and isinstance(store, Path) and stored_curvature(store, TRAINING).is_file():
        warnings.warn(
            "the resumed run gathered a curvature in training, which is not gone on with: add 'curvature' to the "
            "config's statistics",
            RuntimeWarning,
            stacklevel=5,
        )
    return None


def fitted_curvature(
    store: Place,
    tracker: Tracker,
    loader: Iterable[Any],
    objective: Objective | None,
    name: str,
    options: Mapping[str, Any],
) -> Curvature:
    """Fit the curvature of what is tracked, or go on with an interrupted fit, and keep it."""
    if name == TRAINING:
        raise ConfigError(
            f"{name!r} is the name of the curvature that statistics: [..., curvature] gathers in training; give "
            "this one another"
        )
    file = stored_curvature(store, name)
    given = {"selection": tracker.selection, "resume_from": file.with_name(f"{file.stem}.partial"), **options}
    curvature = fit_curvature(tracker.model, loader, objective, **given)
    save_curvature(curvature, file)
    return curvature


def kept_curvature(store: Place, name: str) -> Curvature:
    """What is kept under a name."""
    file = stored_curvature(store, name)
    if name == TRAINING and not file.is_file():
        raise StoreNotFoundError(
            f"there is no file {file}: statistics: [..., curvature] in the config gathers it, and run.commit() or "
            "run.finalize() writes it behind the second block; or fit a curvature first (run.fit_curvature)"
        )
    return load_curvature(file)
