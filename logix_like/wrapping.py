"""What training wraps around a model, seen through: names are the plain model's own.

``DistributedDataParallel``, ``torch.compile`` and the checkpoint wrapper put a module around a module, which adds a
part to every name below it. A store that is logged under them must be read by the plain model, so that these parts
are left out of every name.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from logix_like.errors import ConfigError

WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
"""By the wrapper's class: the name of the one child that it wraps."""


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, wrappers left out, with the name that it has in the plain model."""
    seen: set[int] = set()
    for _, plain, module in _walk(model, "", ""):
        if not _is_wrapper(module) and id(module) not in seen:
            seen.add(id(module))
            yield plain, module


def plain_names(model: nn.Module) -> dict[str, str]:
    """By a module's name in the model as it is: its name in the plain model."""
    return {name: plain for name, plain, _ in _walk(model, "", "")}


def _walk(module: nn.Module, name: str, plain: str) -> Iterator[tuple[str, str, nn.Module]]:
    yield name, plain, module
    wrapper = _is_wrapper(module)
    for child_name, child in module._modules.items():
        if child is not None:
            below = plain if wrapper else _joined(plain, child_name)
            yield from _walk(child, _joined(name, child_name), below)


def _is_wrapper(module: nn.Module) -> bool:
    # By name: the classes live in parts of torch that a plain run never imports.
    child = WRAPPERS.get(type(module).__name__)
    return child is not None and type(module).__module__.startswith("torch.") and child in module._modules


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def require_own_weights(model: nn.Module) -> None:
    """Raise :class:`ConfigError` where layers do not hold the weights that they use, but processes parts of them.

    ``fully_shard`` puts the weights together for each layer's call; FSDP's first version keeps them elsewhere, and
    tensor parallelism splits the layer's work as well.
    """
    modules = list(model.modules())
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in modules):
        raise ConfigError(
            "the model is wrapped in FullyShardedDataParallel (FSDP1), which takes the weights out of the layers; "
            "shard it with torch.distributed.fsdp.fully_shard (accelerate: fsdp_version 2)"
        )
    shards = int(any(kind.__name__ == "FSDPModule" for module in modules for kind in type(module).__mro__))
    for name, parameter in model.named_parameters():
        if sum(hasattr(placement, "dim") for placement in getattr(parameter, "placements", ())) > shards:
            raise ConfigError(
                f"the weight {name!r} is split by tensor parallelism, so that no process sees a sample's whole "
                "gradient; log with DistributedDataParallel or fully_shard"
            )
