"""From a model and a config (or a store) to a tracker, and what is said about it."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from logix_like.capture.projector import Projector
from logix_like.capture.selection import Selection, select_modules, select_stored
from logix_like.capture.tracker import Recording, Tracker
from logix_like.config import Config
from logix_like.curvature import Curvature
from logix_like.errors import ConfigError, ModelMismatchError
from logix_like.projection import INITS
from logix_like.store import ENCODINGS, GradientStore
from logix_like.wrapping import named_modules

DISAGREEMENT = 0.05
"""Relative difference between summed rows and a weight's gradient from which on it is spoken of; autocast has 0.02."""


def new_tracker(model: nn.Module, config: Config, curvature: Curvature | None = None) -> Tracker:
    """A tracker with projections of its own, made from ``curvature`` in place of a warm-up where it is given.

    Raises:
        ConfigError: the projection's init asks for no curvature.
        ModelMismatchError: the curvature lacks a tracked module, or has it in another shape.
    """
    tracker = Tracker(model, *chosen_modules(model, config))
    if curvature is not None:
        if not tracker.needs_warmup:
            raise ConfigError(
                f"projection.init {config.projection.init!r} is not made from a curvature; take 'pca' or 'eigen', or "
                "leave curvature= out"
            )
        for block in tracker.layout:
            known = curvature.layout[block.name].shape if block.name in curvature.layout.names else None
            if known != block.shape:
                raise ModelMismatchError(
                    f"module {block.name!r} has gradients of shape {block.shape}, and the curvature "
                    f"{'does not have it' if known is None else f'has {known}'}: fit it to this model and these modules"
                )
        tracker.fit_to({block.name: curvature.moments(block.name) for block in tracker.layout})
    return tracker


def chosen_modules(model: nn.Module, config: Config, *, meta: bool = False) -> tuple[Selection, Projector]:
    """The modules that a config chooses (with ``meta`` also where weights are on the meta device), and projections."""
    modules = config.modules
    selection = select_modules(
        model,
        include=modules.include,
        exclude=modules.exclude,
        types=modules.types,
        batch_dim=modules.batch_dim,
        frozen=modules.frozen,
        meta=meta,
    )
    settings = config.projection
    return selection, Projector(selection.blocks, INITS[settings.init], rank=settings.rank, seed=settings.seed)


def tracker_of_store(model: nn.Module, config: Config, store: GradientStore) -> Tracker:
    """A tracker of the modules that ``store`` holds, with its projections.

    Raises:
        ModelMismatchError: the model lacks a module or one differs (names the first).
    """
    layout = store.layout
    assert layout is not None
    selection = select_stored(model, layout, batch_dim=config.modules.batch_dim)
    projector = Projector(
        selection.blocks,
        INITS[config.projection.init],
        rank=config.projection.rank,
        seed=config.projection.seed,
    )
    projector.restore(layout, store.projections)
    tracker = Tracker(model, selection, projector)
    tracker.settle()
    return tracker


def stored_projections(tracker: Tracker) -> Mapping[str, tuple[Tensor | None, Tensor | None]]:
    """Both matrices of every block, for the store."""
    projections = {block.name: tracker.projector.projection(block.name) for block in tracker.layout}
    return {name: (p.input, p.output) for name, p in projections.items()}


def describe(tracker: Tracker, config: Config) -> str:
    """What is tracked, in a few lines for the user."""
    selection, layout = tracker.selection, tracker.layout
    size = ENCODINGS[config.store.dtype].row_bytes(layout)
    share = selection.covered / selection.parameters
    lines = [
        f"logix_like: {len(layout)} modules, {layout.width:,} numbers ({size:,} bytes as "
        f"{config.store.dtype}) a sample, {share:.1%} of the model's {selection.parameters:,} parameters"
    ]
    if len(selection.modules) > len(layout):
        lines.append("  modules that share a weight count as one")
    if tracker.projector.capped:
        names = [repr(name) for name in sorted(tracker.projector.capped)]
        lines.append(f"  rank capped by a layer's size: {first_of(names)}")
    if selection.skipped:
        reasons = [f"{name} ({reason})" for name, reason in selection.skipped.items()]
        reasons.sort(key=lambda reason: "frozen" in reason)  # of an adapted model most are: what is trained comes first
        lines.append(f"  not tracked: {first_of(reasons)}")
    if tracker.needs_warmup:
        lines.append(
            f"  the first {config.projection.warmup} samples are kept un-projected in memory until the "
            "projections are made"
        )
    return "\n".join(lines)


def require_training(optimizer: Optimizer | None, model: nn.Module) -> None:
    """Is it this model that the optimizer trains? Steps and learning rates would else be another training's.

    Raises:
        ConfigError: it holds none of the model's parameters, nor anything that may stand for them.

    Warns:
        RuntimeWarning: it holds none of them, but tensors that may be flattened from them, or their copies in a wider
            type.
    """
    own = list(model.parameters())
    groups = [] if optimizer is None else optimizer.param_groups
    held = [parameter for group in groups for parameter in group["params"]]
    if not held or {id(parameter) for parameter in own} & {id(parameter) for parameter in held}:
        return
    none = f"optimizer= holds none of the {len(own)} parameters of the model, but {len(held)} other tensors"
    types, largest = {parameter.dtype for parameter in own}, max((parameter.numel() for parameter in own), default=0)
    if any(one.dtype not in types or (one.dim() == 1 and one.numel() > largest) for one in held):
        warnings.warn(
            f"{none}, which may be flattened from them or copies of them: steps and learning rates are taken from it; "
            "if it trains another model, give the optimizer that trains this one",
            RuntimeWarning,
            stacklevel=3,
        )
        return
    raise ConfigError(
        f"{none}, so that its steps and learning rates are those of another training; give the optimizer that trains "
        "this very model: one made before the model was made again, copied or sharded trains what was there before"
    )


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
            f"{first_of(coupled)}; rows are the batch's gradient split by sample",
            RuntimeWarning,
            stacklevel=6,
        )
    used = recording.called_weights
    bypassed = [t.name for t in recording.uncalled if t.module.weight.grad is not None and t.module.weight not in used]
    if bypassed:
        warnings.warn(
            f"the weights of {first_of(bypassed)} were used without calling the modules: their gradients are not "
            "captured; exclude them",
            RuntimeWarning,
            stacklevel=6,
        )


def compare_with_gradients(recording: Recording, rows: Tensor, tracker: Tracker) -> None:
    """At the first block: do the rows add up to the gradients that the backward pass left? If not, say so by name.

    A weight that is also used without its module, a second backward pass, or a gradient that was changed inside the
    block would otherwise go unnoticed. Gradients that were there before the block say nothing.
    """
    total = tracker.layout.split(rows.detach().sum(0))
    pairs = {name: (total[name], g) for name, g in projected(recording.fresh_gradients(), rows, tracker).items()}
    pairs = {
        name: (found, left) for name, (found, left) in pairs.items() if bool(left.any()) and bool(left.isfinite().all())
    }
    if not pairs:
        return
    # One factor for all modules is no difference: a scaler or a clipping inside the block multiplies all alike.
    factor = statistics.median(float((found * left).sum() / left.square().sum()) for found, left in pairs.values())
    wrong = [
        name
        for name, (found, left) in pairs.items()
        if not float((found - factor * left).norm()) <= DISAGREEMENT * float(found.norm())
    ]
    if wrong:
        warnings.warn(
            f"the rows of {first_of(wrong)} do not add up to the gradients of their weights in this block: a weight is "
            "also used without calling its module, something else went backward, or gradients were changed inside the "
            "block (clip, step and zero_grad belong behind it); such modules' rows are not the samples' gradients",
            RuntimeWarning,
            stacklevel=7,
        )


def projected(gradients: Mapping[str, Tensor], rows: Tensor, tracker: Tracker) -> dict[str, Tensor]:
    """Gradient matrices by block, each projected as the rows are (of the type of ``rows``)."""
    found = {}
    for name, gradient in gradients.items():
        projection, matrix = tracker.projector.projection(name), gradient.to(rows)
        if projection.input is not None:
            matrix = matrix @ projection.input.to(rows).T
        if projection.output is not None:
            matrix = projection.output.to(rows) @ matrix
        found[name] = tracker.layout.pick(name, matrix).view(tracker.layout[name].matrix)
    return found


def first_of(names: list[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
