"""One rule for each layer type: what a call of it contributes to the per-sample gradient.

Every supported layer is, seen from its parameters, a linear map applied at a number of positions:
sample i's gradient is ``G_i = sum_t d_t a_t^T`` with ``a_t`` what the parameters multiply at position
t and ``d_t`` the gradient of the loss there. A rule reads the projected ``P_in a_t`` off the module's
input and the projected ``P_out d_t`` off its output's gradient. A bias is one more column of ``G``
(``a_t`` with a 1 appended).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logix_like.errors import CaptureError


@dataclass(frozen=True)
class Side:
    """One side's projection, as one use of a parameter sees it, in one dtype on one device."""

    matrix: Tensor | None
    """``[rank, width]``; None is the identity."""
    width: int
    """Size of the vectors that are projected, a bias's 1 not counted."""
    bias: Tensor | None = None
    """``[rank]``: what the appended 1 adds; None if nothing is appended.

    On an identity side it is the last unit vector, or zeros where the block has a bias column and this
    use has none.
    """
    weight: bool = True
    """Whether the weight itself is tracked; without it only the appended 1 is."""

    @cached_property
    def columns(self) -> Tensor:
        """``[width, rank]``: the matrix's columns one after another, to be looked up."""
        if self.matrix is not None:
            return self.matrix.T.contiguous()
        raise AssertionError("an identity side has no matrix")

    def project(self, vectors: Tensor) -> Tensor:
        """Project the last dimension of ``vectors [..., width]`` (the appended 1 included)."""
        if not self.weight:
            assert self.bias is not None
            return self.bias.expand(*vectors.shape[:-1], -1)
        if self.matrix is None:
            return self._with_ones(vectors)
        # Columns stored one after another: thin products are a tenth faster that way.
        return vectors @ self.columns if self.bias is None else F.linear(vectors, self.matrix, self.bias)

    def _with_ones(self, vectors: Tensor) -> Tensor:
        if self.bias is None:
            return vectors
        return torch.cat([vectors, self.bias[-1].expand(*vectors.shape[:-1], 1)], -1)


class Rule(ABC):
    """How one layer type's calls are read. Rules have no state."""

    kind: str
    transposed = False
    """Whether the module's ``weight`` is stored as ``[d_in, d_out]``."""
    shares_input = False
    """Whether several modules that read one tensor may share its projection."""
    by_position = False
    """Whether what is between the first and the last dimension counts positions that have nothing to do with others."""

    @abstractmethod
    def shape(self, module: Any) -> tuple[int, int]:
        """``(d_out, d_in)`` of the weight's gradient matrix, without a bias column."""

    @abstractmethod
    def read_input(self, module: Any, value: Tensor, side: Side) -> Tensor:
        """What must be kept of the input until the backward pass (projected at once where possible)."""

    @abstractmethod
    def read_gradient(
        self, module: Any, kept: Tensor, gradient: Tensor, input_side: Side, output_side: Side
    ) -> tuple[Tensor, Tensor]:
        """Projected factors ``(a [batch, positions, rank_in], d [batch, positions, rank_out])``."""

    def check(self, module: Any) -> str | None:
        """Why this very module cannot be captured, or None if it can."""
        return None

    def matrix(self, module: Any, gradient: Tensor) -> Tensor:
        """The weight's gradient as its matrix ``[d_out, d_in]``."""
        if gradient.ndim == 1:
            return gradient.unsqueeze(1)
        return (gradient.T if self.transposed else gradient).flatten(1)

    def input_moment(self, module: Any, value: Tensor, side: Side) -> Tensor:
        """Sum of ``a a^T`` over the positions of ``value``, or its diagonal where all else is zero."""
        kept = self.read_input(module, value, side)
        flat = kept.reshape(-1, kept.shape[-1])
        return flat.T @ flat


class LinearRule(Rule):
    """``nn.Linear``; any number of positions between batch and features."""

    kind = "linear"
    shares_input = True
    by_position = True

    def shape(self, module: Any) -> tuple[int, int]:
        return module.out_features, module.in_features

    def read_input(self, module: Any, value: Tensor, side: Side) -> Tensor:
        projected = _positions(side.project(value))
        # Un-projected it would be the live activation, which a later layer may change in place.
        return projected.clone() if projected.data_ptr() == value.data_ptr() else projected

    def read_gradient(
        self, module: Any, kept: Tensor, gradient: Tensor, input_side: Side, output_side: Side
    ) -> tuple[Tensor, Tensor]:
        return kept, _positions(output_side.project(gradient))


class Conv1DRule(LinearRule):
    """``transformers.pytorch_utils.Conv1D``: a linear layer whose weight is ``[in, out]``."""

    kind = "conv1d_transformers"
    transposed = True

    def shape(self, module: Any) -> tuple[int, int]:
        return module.weight.shape[1], module.weight.shape[0]


class ConvRule(Rule):
    """``nn.Conv1d/2d/3d`` with any stride, padding, dilation and groups.

    The input is projected by *convolving* it with the projection's rows as kernels: the patches are
    never unfolded. With groups, each group's outputs see their own patch: a position is a pair of
    group and place.
    """

    kind = "conv"

    def shape(self, module: Any) -> tuple[int, int]:
        return module.out_channels, module.in_channels // module.groups * prod(module.kernel_size)

    def read_input(self, module: Any, value: Tensor, side: Side) -> Tensor:
        matrix, groups = _explicit(side, value), module.groups
        kernel = matrix.view(len(matrix), -1, *module.kernel_size)
        bias = None if side.bias is None else side.bias.repeat(groups)
        places = self._places(module, value, kernel, bias)
        return places.reshape(len(value), groups, len(matrix), -1).transpose(2, 3).flatten(1, 2)

    def _places(self, module: Any, value: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        """``value`` convolved with ``kernel [rank, d_in of a group, ...]``: ``[batch, groups x rank, ...]``."""
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(module.kernel_size) - 1]
        padding = module.padding
        if module.padding_mode != "zeros":
            value = F.pad(value, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        kernel = kernel.repeat(module.groups, *(1,) * (kernel.ndim - 1))
        places: Tensor = convolve(value, kernel, bias, module.stride, padding, module.dilation, module.groups)
        return places

    def read_gradient(
        self, module: Any, kept: Tensor, gradient: Tensor, input_side: Side, output_side: Side
    ) -> tuple[Tensor, Tensor]:
        groups = module.groups
        matrix = _explicit(output_side, gradient)
        matrix = matrix.view(len(matrix), groups, -1).permute(1, 2, 0)
        places = gradient.reshape(len(gradient), groups, module.out_channels // groups, -1)
        return kept, (places.transpose(2, 3) @ matrix).flatten(1, 2)


class ConvTransposeRule(ConvRule):
    """``nn.ConvTranspose1d/2d/3d``: a convolution whose patches have zeros between the input's numbers.

    The matrix is ``[out, in / groups x kernel]`` as for any convolution, though the weight is stored as
    ``[in, out / groups, kernel]``; the projection is convolved with in the module's own, transposed way.
    """

    def _places(self, module: Any, value: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(module.kernel_size) - 1]
        kernel = kernel.transpose(0, 1).repeat(module.groups, *(1,) * (kernel.ndim - 1))
        settings = module.stride, module.padding, module.output_padding, module.groups, module.dilation
        places: Tensor = convolve(value, kernel, bias, *settings)
        return places

    def read_gradient(
        self, module: Any, kept: Tensor, gradient: Tensor, input_side: Side, output_side: Side
    ) -> tuple[Tensor, Tensor]:
        inward, outward = super().read_gradient(module, kept, gradient, input_side, output_side)
        if inward.shape[1] != outward.shape[1]:
            raise CaptureError(
                f"{type(module).__name__} was called with an output_size that its output_padding does not give: its "
                f"output has {outward.shape[1]} places for {inward.shape[1]}; set output_padding, or exclude the module"
            )
        return inward, outward

    def matrix(self, module: Any, gradient: Tensor) -> Tensor:
        groups = gradient.unflatten(0, (module.groups, -1))
        joined: Tensor = groups.transpose(1, 2).flatten(0, 1).flatten(1)
        return joined


class EmbeddingRule(Rule):
    """``nn.Embedding``: the input is a one-hot vector, so its projection is looked up."""

    kind = "embedding"
    transposed = True
    by_position = True

    def shape(self, module: Any) -> tuple[int, int]:
        return module.embedding_dim, module.num_embeddings

    def check(self, module: Any) -> str | None:
        if module.max_norm is not None:
            return "max_norm rewrites the weight in each forward pass"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq couples the samples of a batch"
        return None

    def read_input(self, module: Any, value: Tensor, side: Side) -> Tensor:
        ids = value.reshape(len(value), -1)
        if side.matrix is None:
            looked_up = F.one_hot(ids, side.width).to(module.weight.dtype)
        else:
            looked_up = F.embedding(ids, side.columns)
        if module.padding_idx is not None:
            looked_up = looked_up * (ids != module.padding_idx).unsqueeze(-1)
        return looked_up

    def read_gradient(
        self, module: Any, kept: Tensor, gradient: Tensor, input_side: Side, output_side: Side
    ) -> tuple[Tensor, Tensor]:
        return kept, _positions(output_side.project(gradient))

    def input_moment(self, module: Any, value: Tensor, side: Side) -> Tensor:
        return torch.bincount(value.flatten(), minlength=side.width).to(module.weight.dtype)


class NormRule(Rule):
    """LayerNorm, RMSNorm and GroupNorm: elementwise weight (and bias).

    The per-sample gradient of the weight, ``sum_t d_t * x^_t``, and of the bias, ``sum_t d_t``, are the
    columns of a matrix ``[d, 1 or 2]``; each column counts as a position whose ``a`` is its unit vector.
    """

    def __init__(self, kind: str, normalize: Callable[[Any, Tensor], Tensor], *, channels_first: bool = False) -> None:
        self.kind = kind
        self._normalize = normalize
        self._channels_first = channels_first

    def shape(self, module: Any) -> tuple[int, int]:
        return module.weight.numel(), 1

    def read_input(self, module: Any, value: Tensor, side: Side) -> Tensor:
        return self._normalize(module, value)

    def input_moment(self, module: Any, value: Tensor, side: Side) -> Tensor:
        return torch.eye(side.width * side.weight + (side.bias is not None), dtype=value.dtype, device=value.device)

    def read_gradient(
        self, module: Any, kept: Tensor, gradient: Tensor, input_side: Side, output_side: Side
    ) -> tuple[Tensor, Tensor]:
        batch = len(gradient)
        gradient = self._vectors(module, gradient)
        columns, units = [], []
        if input_side.weight:
            columns.append((gradient * self._vectors(module, kept)).sum(1))
            units.append(_explicit(input_side, gradient)[:, 0])
        if input_side.bias is not None:
            columns.append(gradient.sum(1))
            units.append(input_side.bias)
        outputs = output_side.project(torch.stack(columns, 1).to(gradient.dtype))
        return torch.stack(units).expand(batch, -1, -1), outputs

    def _vectors(self, module: Any, value: Tensor) -> Tensor:
        """``[batch, positions, width]``."""
        if self._channels_first:
            return value.flatten(2).transpose(1, 2) if value.ndim > 2 else value.unsqueeze(1)
        return value.reshape(len(value), -1, module.weight.numel())


def _group_norm(module: Any, value: Tensor) -> Tensor:
    return F.group_norm(value, module.num_groups, eps=module.eps)


def _layer_norm(module: Any, value: Tensor) -> Tensor:
    return F.layer_norm(value, module.normalized_shape, eps=module.eps)


def _rms_norm(module: Any, value: Tensor) -> Tensor:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return F.rms_norm(value, module.weight.shape, eps=eps)


def _positions(factor: Tensor) -> Tensor:
    """``[batch, ..., rank]`` with everything between flattened to positions."""
    if factor.ndim == 3:
        return factor
    return factor.unsqueeze(1) if factor.ndim == 2 else factor.flatten(1, -2)


def _explicit(side: Side, like: Tensor) -> Tensor:
    if side.matrix is not None:
        return side.matrix
    rows = side.width + (side.bias is not None)
    return torch.eye(rows, side.width, dtype=like.dtype, device=like.device)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "Linear": LinearRule(),
        "Conv1D": Conv1DRule(),
        "Conv1d": ConvRule(),
        "Conv2d": ConvRule(),
        "Conv3d": ConvRule(),
        "ConvTranspose1d": ConvTransposeRule(),
        "ConvTranspose2d": ConvTransposeRule(),
        "ConvTranspose3d": ConvTransposeRule(),
        "Embedding": EmbeddingRule(),
        "LayerNorm": NormRule("layer_norm", _layer_norm),
        "RMSNorm": NormRule("rms_norm", _rms_norm),
        "GroupNorm": NormRule("group_norm", _group_norm, channels_first=True),
    }
)
"""Rules by the type name that a config's ``modules.types`` uses."""

_TORCH_TYPES = {name: getattr(nn, name) for name in RULES if hasattr(nn, name)}


def type_name(module: nn.Module) -> str | None:
    """The key of :data:`RULES` that fits ``module``, None if there is none.

    A subclass is accepted only if it kept its parent's ``forward``; classes of other libraries are known by
    name and attributes, so that they need not be imported.
    """
    for name, parent in _TORCH_TYPES.items():
        if isinstance(module, parent):
            return name if type(module).forward is parent.forward else None
    cls = type(module).__name__
    if cls == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None:
        return "Conv1D"
    return "RMSNorm" if cls.endswith("RMSNorm") and _is_rms_norm(module) else None


def _is_rms_norm(module: Any) -> bool:
    """Whether a class of some library's computes ``rms_norm(x) * weight`` (or ``* (1 + weight)``), by trying it."""
    weight = getattr(module, "weight", None)
    has_eps = hasattr(module, "variance_epsilon") or hasattr(module, "eps")
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not has_eps or weight.is_meta:
        return False
    with torch.no_grad():
        probe = torch.linspace(-1, 2, 2 * len(weight), device=weight.device).view(2, -1).to(weight.dtype)
        expected = _rms_norm(module, probe)
        # Called past its hooks: nobody is to hear of the trial.
        found = type(module).forward(module, probe)
    slack = 2e-2 * float(expected.abs().max())
    return any(torch.allclose(found, expected * factor, rtol=2e-2, atol=slack) for factor in (weight, 1 + weight))
