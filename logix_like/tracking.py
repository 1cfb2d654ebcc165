"""From a model and a config (or a store) to a tracker, and what is said about it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from logix_like.capture.projector import Projector
from logix_like.capture.selection import select_modules, trackable
from logix_like.capture.tracker import Recording, Tracker
from logix_like.config import Config
from logix_like.errors import ModelMismatchError
from logix_like.projection import INITS
from logix_like.store import GradientStore
from logix_like.wrapping import named_modules


def new_tracker(model: nn.Module, config: Config) -> Tracker:
    """A tracker with projections of its own."""
    modules = config.modules
    selection = select_modules(
        model,
        include=modules.include,
        exclude=modules.exclude,
        types=modules.types,
        batch_dim=modules.batch_dim,
        frozen=modules.frozen,
    )
    settings = config.projection
    projector = Projector(selection.blocks, INITS[settings.init], rank=settings.rank, seed=settings.seed)
    return Tracker(model, selection, projector)


def tracker_of_store(model: nn.Module, config: Config, store: GradientStore) -> Tracker:
    """A tracker of the modules that ``store`` holds, with its projections.

    Raises:
        ModelMismatchError: the model lacks a module or one differs (names the first).
    """
    layout = store.layout
    assert layout is not None
    present = set(trackable(model))
    wanted = [name for block in layout for name in (block.name, *block.tied)]
    missing = next((name for name in wanted if name not in present), None)
    if missing is not None:
        raise ModelMismatchError(
            f"module {missing!r} of the store is not in this model ({type(model).__name__}); its modules are "
            f"{', '.join(sorted(present - {''})[:8])} ...: load the model that was logged"
        )
    selection = select_modules(model, include=wanted, batch_dim=config.modules.batch_dim, frozen=True)
    projector = Projector(
        selection.blocks,
        INITS[config.projection.init],
        rank=config.projection.rank,
        seed=config.projection.seed,
    )
    projector.restore(layout, store.projections)
    return Tracker(model, selection, projector)


def stored_projections(tracker: Tracker) -> Mapping[str, tuple[Tensor | None, Tensor | None]]:
    """Both matrices of every block, for the store."""
    projections = {block.name: tracker.projector.projection(block.name) for block in tracker.layout}
    return {name: (p.input, p.output) for name, p in projections.items()}


def describe(tracker: Tracker, config: Config) -> str:
    """What is tracked, in a few lines for the user."""
    selection, layout = tracker.selection, tracker.layout
    size = layout.width * torch.empty(0, dtype=getattr(torch, config.store.dtype)).itemsize
    share = selection.covered / selection.parameters
    lines = [
        f"logix_like: {len(selection.modules)} modules, {layout.width:,} numbers ({size:,} bytes as "
        f"{config.store.dtype}) a sample, {share:.1%} of the model's {selection.parameters:,} parameters"
    ]
    if tracker.projector.capped:
        names = [repr(name) for name in sorted(tracker.projector.capped)]
        lines.append(f"  rank capped by a layer's size: {_first(names)}")
    if selection.skipped:
        reasons = [f"{name} ({reason})" for name, reason in selection.skipped.items()]
        lines.append(f"  not tracked: {_first(reasons)}")
    if tracker.needs_warmup:
        lines.append(
            f"  the first {config.projection.warmup} samples are kept un-projected in memory until the "
            "projections are made"
        )
    return "\n".join(lines)


def warn_of_coupling(recording: Recording, model: nn.Module) -> None:
    """Say once what makes per-sample gradients meaningless, or misses some of them, by name."""
    coupled = [
        name
        for name, module in named_modules(model)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    if coupled:
        warnings.warn(
            f"batch normalisation in train mode couples the samples of a batch, so that no per-sample gradient exists: "
            f"{_first(coupled)}; rows are the batch's gradient split by sample",
            RuntimeWarning,
            stacklevel=6,
        )
    bypassed = [t.name for t in recording.uncalled if t.module.weight.grad is not None]
    if bypassed:
        warnings.warn(
            f"the weights of {_first(bypassed)} were used without calling the modules: their gradients are not "
            "captured; exclude them",
            RuntimeWarning,
            stacklevel=6,
        )


def _first(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
