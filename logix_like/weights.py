"""A model's weights: fingerprints, as one vector, freezing and swapping them for a while, leaving no trace."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from logix_like.errors import ConfigError, ModelMismatchError
from logix_like.wrapping import plain_names

_SAMPLED = 4096
"""Numbers of each tensor that enter a fingerprint: enough to see any training step, cheap at any size."""


def fingerprint(model: nn.Module) -> str:
    """BLAKE2b-128 hex over the names, shapes and evenly spaced values of all parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in whole_tensors(model).items():
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLED)]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module is in eval mode; all is as before afterwards."""
    training = [m for m in model.modules() if m.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient and every module is in eval mode; all is as before afterwards.

    Torch's transformer encoder would then lay padded sequences one behind the other (as nested tensors), which no
    layer's rule reads; it is kept from that.

    Raises:
        ConfigError: no gradient can be had here at all.
    """
    if torch.is_inference_mode_enabled():
        raise ConfigError(
            "no gradient can be had inside torch.inference_mode(); ask outside of it (no_grad() is no matter)"
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    fast = torch.backends.mha.get_fastpath_enabled()
    with evaluating(model):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for parameter in trained:
                parameter.requires_grad_(True)


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Frozen as by :func:`frozen`, and attention by a formula that can be derived twice (fused kernels cannot)."""
    fused = torch.backends.mha.get_fastpath_enabled()  # whole layers of torch, of transformers in eval mode
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with frozen(model), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def trained_parameters(model: nn.Module, globs: Sequence[str] = ("*",)) -> tuple[str, ...]:
    """Names of the parameters that require a gradient and fit one of the globs.

    Raises:
        ConfigError: a glob fits none, or there is none.
    """
    globs = (globs,) if isinstance(globs, str) else tuple(globs)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    listed = ", ".join(trained[:8]) or "none"
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in trained):
            raise ConfigError(f"no trained parameter of the model fits {glob!r}; there are {listed}")
    if not globs:
        raise ConfigError(f"no parameters were named; name some of the model's: {listed}")
    return tuple(name for name in trained if any(fnmatchcase(name, glob) for glob in globs))


class Flattener:
    """Some parameters of a model as one vector.

    Args:
        model: Whose parameters they are.
        names: In the order of the vector; all that are trained unless told otherwise.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] | None = None) -> None:
        self.model = model
        self.names = trained_parameters(model) if names is None else tuple(names)
        self.sizes = [p.numel() for p in self.parameters.values()]
        self.size = sum(self.sizes)
        """Numbers in the vector."""

    @property
    def parameters(self) -> dict[str, Tensor]:
        """By name, as they are in the model now."""
        own = dict(self.model.named_parameters())
        return {name: own[name].detach() for name in self.names}

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter lies."""
        return next(self.model.parameters()).device

    def split(self, vectors: Tensor) -> dict[str, Tensor]:
        """By name, ``vectors [..., size]`` in the parameters' shapes, dtypes and devices."""
        pieces = zip(self.parameters.items(), vectors.split(self.sizes, -1), strict=True)
        return {name: piece.view(*vectors.shape[:-1], *p.shape).to(p) for (name, p), piece in pieces}

    def join(self, tensors: Mapping[str, Tensor], leading: int = 0) -> Tensor:
        """``[..., size]`` of tensors by name that have ``leading`` dimensions before the parameters' own."""
        return torch.cat([tensors[name].flatten(leading).to(self.device) for name in self.names], -1)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Forward and backward passes inside change nothing of a training that goes on behind them.

    Gradients, buffers (batch norm's averages) and the random states (dropout) are as before afterwards.
    """
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = sorted({p.device.index for p, _ in gradients if p.device.type == "cuda" and p.device.index is not None})
    with torch.random.fork_rng(devices=devices):
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


@contextmanager
def restored_weights(model: nn.Module) -> Iterator[None]:
    """Whatever is loaded into the model inside, its weights and buffers are the same bits afterwards."""
    kept = {name: tensor.detach().clone() for name, tensor in tensors(model).items()}
    try:
        yield
    finally:
        load_weights(model, kept)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights`` (by ``state_dict`` name) into the model's own tensors.

    Raises:
        ModelMismatchError: a name or a shape differs.
    """
    own = tensors(model)
    for name, tensor in own.items():
        if name not in weights:
            raise ModelMismatchError(f"the checkpoint has no {name!r}; it was taken from another model")
        if weights[name].shape != tensor.shape:
            raise ModelMismatchError(
                f"the checkpoint's {name!r} has shape {tuple(weights[name].shape)}, the model's {tuple(tensor.shape)}"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(_spread_like(tensor, weights[name]))


def _spread_like(own: Tensor, value: Tensor) -> Tensor:
    """``value`` spread over processes as ``own`` is."""
    mesh, placements = getattr(own, "device_mesh", None), getattr(own, "placements", None)
    if mesh is None or placements is None or hasattr(value, "placements"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), mesh, placements)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and persistent buffers, without any extra state.

    Names are those of the plain model's ``state_dict``, whatever is wrapped around it. The tensors are the model's
    own, so that what is copied into them is in the model.
    """
    plain = plain_names(model)
    named = ((name.rpartition("."), value) for name, value in model.state_dict().items())
    return {
        f"{prefix}.{own}" if (prefix := plain.get(path, path)) else own: value
        for (path, _, own), value in named
        if isinstance(value, Tensor)
    }


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The same, with those that are spread over processes (FSDP) gathered; all processes must call it together."""
    return {name: whole(tensor) for name, tensor in tensors(model).items()}


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is spread over processes, gathered; any other as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
