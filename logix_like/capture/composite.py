"""Modules that use several weights in one forward pass, without calling a module for each.

Such a module is *replayed*: when the gradient of its output arrives, its forward pass is computed once more in pieces
on detached weights, each weight as a linear layer of its own, and the gradient is sent back through these pieces. What
they read and what they receive is captured as with any linear layer. The user's own pass is not touched.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logix_like.errors import CaptureError

Call = Callable[[str, Tensor, Tensor], Tensor]
"""``call(part, value, output) -> output``: a part has read ``value [batch, positions, d_in]`` and gives ``output``."""


class Part(nn.Linear):
    """A weight ``[d_out, d_in]`` of a composite module, seen as a linear layer; it is never called."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)


@dataclass(frozen=True)
class ModuleCall:
    """One call of a composite module, as its hook saw it."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    random: Tensor | None
    """Torch's random state before the call, where the module draws numbers."""


class Composite(ABC):
    """How one kind of composite module is taken apart. Has no state."""

    @abstractmethod
    def parts(self, module: Any) -> dict[str, nn.Module]:
        """The module's weights as linear layers, by their names below the module's."""

    @abstractmethod
    def reason_against(self, module: Any) -> str | None:
        """Why this very module cannot be replayed, or None if it can."""

    @abstractmethod
    def replay(self, module: Any, call: ModuleCall, batch: int, on_part: Call) -> Tensor:
        """Compute the module's first output again, telling ``on_part`` of each part's call."""

    def draws(self, module: Any) -> bool:
        """Whether a call of the module draws random numbers."""
        return False


class Attention(Composite):
    """``nn.MultiheadAttention``: one weight for queries, keys and values, and the output projection.

    The attention between the two is torch's own function, called with identity matrices as its weights, so that
    masks, dropout and scaling are exactly what they were.
    """

    def parts(self, module: Any) -> dict[str, nn.Module]:
        if module.in_proj_weight is None:
            return {"out_proj": module.out_proj}
        return {"in_proj": Part(module.in_proj_weight, module.in_proj_bias), "out_proj": module.out_proj}

    def reason_against(self, module: Any) -> str | None:
        if module.in_proj_weight is None:
            return "nn.MultiheadAttention with kdim or vdim uses its weights without calling them"
        if module.bias_k is not None:
            return "nn.MultiheadAttention with add_bias_kv adds keys that belong to no sample"
        return None

    def draws(self, module: Any) -> bool:
        return bool(module.training and module.dropout > 0)

    def replay(self, module: Any, call: ModuleCall, batch: int, on_part: Call) -> Tensor:
        given = inspect.signature(nn.MultiheadAttention.forward).bind(module, *call.args, **call.kwargs)
        given.apply_defaults()
        options = given.arguments
        query, key, value = (options[name] for name in ("query", "key", "value"))
        if query.ndim != 3:
            raise CaptureError(
                f"nn.MultiheadAttention was called with an input of shape {tuple(query.shape)}; expected a batch of "
                "sequences in three dimensions"
            )
        streams = self._streams(module, (query, key, value), on_part)
        with _drawing_from(call.random, query.device):
            mixed = _mix(module, [s.transpose(0, 1) for s in streams], options).transpose(0, 1)
        out = module.out_proj
        return self._as_given(module, on_part("out_proj", mixed, _linear(mixed, out.weight, out.bias)))

    def _streams(self, module: Any, inputs: tuple[Tensor, ...], on_part: Call) -> list[Tensor]:
        """Projected queries, keys and values, each ``[batch, positions, width]``."""
        projected: dict[int, Tensor] = {}
        for tensor in inputs:
            if id(tensor) not in projected:
                own = self._as_given(module, tensor.detach())
                leaf = _linear(own, module.in_proj_weight, module.in_proj_bias).requires_grad_()
                projected[id(tensor)] = on_part("in_proj", own, leaf)
        return [projected[id(tensor)].chunk(3, -1)[i] for i, tensor in enumerate(inputs)]

    def _as_given(self, module: Any, tensor: Tensor) -> Tensor:
        """From the module's order of dimensions to batch first, and back."""
        return tensor if module.batch_first else tensor.transpose(0, 1)


class Experts(Composite):
    """The fused experts of transformers 5: ``gate_up_proj [experts, 2 i, h]``, ``down_proj [experts, h, i]``.

    Without a gate the first is ``up_proj [experts, i, h]``; matrices may be transposed, and there may be biases, as the
    module's own attributes say. Each expert's two weights are blocks of their own. Tokens arrive flattened, with the
    experts that the router chose for them; a token that an expert does not see has a zero gradient there.
    """

    def parts(self, module: Any) -> dict[str, nn.Module]:
        names = (_first_weight(module), "down_proj")
        return {
            f"{expert}.{name}": _expert_part(module, name, expert)
            for expert in range(len(module.down_proj))
            for name in names
        }

    def reason_against(self, module: Any) -> str | None:
        if getattr(module, "has_post_expert_norm", False):
            return "its fused experts differ from the usual layouts (has_post_expert_norm)"
        return None

    def replay(self, module: Any, call: ModuleCall, batch: int, on_part: Call) -> Tensor:
        given = inspect.signature(type(module).forward).bind(module, *call.args, **call.kwargs)
        hidden, chosen, weights = tuple(given.arguments.values())[1:4]
        if len(hidden) % batch:
            raise CaptureError(
                f"the experts received {len(hidden)} tokens for {batch} samples, which is not a whole number for each; "
                "pad the sequences of a batch to one length, or exclude the experts"
            )
        value = hidden.detach().view(batch, -1, hidden.shape[-1])
        total = torch.zeros_like(value)
        for expert in range(len(module.down_proj)):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            if len(token):
                made = self._expert(module, expert, value, token, on_part)
                total = total + made * _spread(weights.detach()[token, place].unsqueeze(-1), token, value)
        return total.view_as(hidden)

    def _expert(self, module: Any, expert: int, value: Tensor, token: Tensor, on_part: Call) -> Tensor:
        name, seen = _first_weight(module), value.flatten(0, 1)[token]
        first = _spread(_linear(seen, *_expert_weights(module, name, expert)), token, value).requires_grad_()
        first = on_part(f"{expert}.{name}", value, first).flatten(0, 1)[token]
        inner = module._apply_gate(first) if name == "gate_up_proj" else module.act_fn(first)
        last = _spread(_linear(inner, *_expert_weights(module, "down_proj", expert)), token, value)
        return on_part(f"{expert}.down_proj", _spread(inner, token, value), last)


def _first_weight(module: Any) -> str:
    return "gate_up_proj" if "gate_up_proj" in module._parameters else "up_proj"


def _expert_weights(module: Any, name: str, expert: int) -> tuple[Tensor, Tensor | None]:
    """``[d_out, d_in]`` and the bias ``[d_out]`` of one expert."""
    weight, bias = getattr(module, name)[expert], module._parameters.get(f"{name}_bias")
    return weight.T if getattr(module, "is_transposed", False) else weight, None if bias is None else bias[expert]


def _expert_part(module: Any, name: str, expert: int) -> Part:
    """One expert's layer, trained if the experts' weights are."""
    weight, bias = _expert_weights(module, name, expert)
    trained = getattr(module, name).requires_grad
    if bias is None:
        return Part(nn.Parameter(weight.detach(), trained))
    trained_bias = getattr(module, f"{name}_bias").requires_grad
    return Part(nn.Parameter(weight.detach(), trained), nn.Parameter(bias.detach(), trained_bias))


def composite_for(module: nn.Module) -> Composite | None:
    """How ``module`` is taken apart, None if it is no composite."""
    if isinstance(module, nn.MultiheadAttention):
        return Attention()
    fused = [module._parameters.get(name) for name in (_first_weight(module), "down_proj")]
    if all(weight is not None and weight.ndim == 3 for weight in fused) and hasattr(module, "_apply_gate"):
        return Experts()
    return None


def random_state(module: nn.Module) -> Tensor:
    """Torch's random state of the device that ``module`` is on."""
    device = next(module.parameters()).device
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _drawing_from(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Draw random numbers from ``state`` inside; torch's own state is the same afterwards."""
    if state is None:
        yield
        return
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        if cuda:
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield


def _mix(module: Any, streams: list[Tensor], options: Mapping[str, Any]) -> Tensor:
    """Attention between projected ``[positions, batch, width]`` streams, without any projection."""
    width = module.embed_dim
    query, key, value = streams
    same = torch.eye(width, dtype=query.dtype, device=query.device)
    mixed, _ = F.multi_head_attention_forward(
        query, key, value, width, module.num_heads, None, None, None, None, module.add_zero_attn, module.dropout,
        same, None,
        training=module.training, key_padding_mask=options["key_padding_mask"], need_weights=options["need_weights"],
        attn_mask=options["attn_mask"], use_separate_proj_weight=True, q_proj_weight=same, k_proj_weight=same,
        v_proj_weight=same, average_attn_weights=options["average_attn_weights"], is_causal=options["is_causal"],
    )  # fmt: skip
    return mixed


def _linear(value: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer on detached weights, in the precision of what it reads."""
    own = None if bias is None else bias.detach().to(value.dtype)
    return F.linear(value, weight.detach().to(value.dtype), own)


def _spread(rows: Tensor, token: Tensor, like: Tensor) -> Tensor:
    """``[tokens seen, width]`` at their places among all tokens ``[batch, positions, width]``, zeros elsewhere."""
    batch, positions = like.shape[:2]
    empty = torch.zeros(batch * positions, rows.shape[-1], dtype=rows.dtype, device=rows.device)
    return empty.index_copy(0, token, rows).view(batch, positions, -1)


def parts_of(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Full names and stand-ins of the parts of ``module``, if it is a composite that can be replayed."""
    composite = composite_for(module)
    if composite is not None and composite.reason_against(module) is None:
        for part, stand_in in composite.parts(module).items():
            yield (f"{name}.{part}" if name else part), stand_in
