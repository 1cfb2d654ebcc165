"""nn.MultiheadAttention and the fused experts of transformers 5: rows are the per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logix_like.capture.projector import Projector
from logix_like.capture.selection import select_modules
from logix_like.capture.tracker import Tracker
from logix_like.errors import CaptureError, ConfigError
from logix_like.projection import INITS
from logix_like.weights import frozen

BATCH, LENGTH, WIDTH = 3, 5, 8
EXACT = 1e-9
FLOAT32_INSIDE = 1e-5
"""The router computes its softmax in float32."""


class Encoder(nn.Module):
    """Self-attention, then cross-attention to a longer memory, with masks of both kinds."""

    def __init__(self, batch_first: bool = True, dropout: float = 0.0, bias: bool = True, weights: bool = True) -> None:
        super().__init__()
        options: Any = {"batch_first": batch_first, "dropout": dropout, "bias": bias}
        self.own = nn.MultiheadAttention(WIDTH, 2, **options)
        self.cross = nn.MultiheadAttention(WIDTH, 2, **options)
        self.head = nn.Linear(WIDTH, 3, bias=bias)
        self.batch_first, self.weights = batch_first, weights

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        if not self.batch_first:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        causal = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)
        x = x + self.own(x, x, x, attn_mask=causal, need_weights=self.weights)[0]
        x = x + self.cross(x, memory, value=memory, key_padding_mask=padding, need_weights=self.weights)[0]
        return self.head(x.mean(1 if self.batch_first else 0))


def encoder_batch() -> tuple[Tensor, Tensor, Tensor]:
    x, memory = (torch.randn(BATCH, length, WIDTH, dtype=torch.float64) for length in (LENGTH, LENGTH + 2))
    return x, memory, torch.arange(LENGTH + 2) >= torch.tensor([LENGTH + 2, 4, 3])[:, None]


def tracker_for(model: nn.Module, **options: Any) -> Tracker:
    selection = select_modules(model, types=("Linear",), **options)
    return Tracker(model, selection, Projector(selection.blocks, INITS["identity"], rank=1, seed=0))


def captured(model: nn.Module, tracker: Tracker, losses: Callable[[], Tensor], **options: bool) -> dict[str, Tensor]:
    """Blocks of every sample's row, ``[batch, d_out, columns]``."""
    with tracker.recording(BATCH, **options) as recording:
        losses().sum().backward()
    return tracker.layout.split(recording.project()[0])


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward(retain_graph=True)
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return found


def attention_block(found: dict[str, Tensor], name: str) -> Tensor:
    weight, bias = ("_weight", "_bias") if name.endswith("in_proj") else (".weight", ".bias")
    parts = [found[name + weight], *([found[name + bias][:, None]] if name + bias in found else [])]
    return torch.cat(parts, 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": False},
        {"bias": False},
        {"weights": False},
        {"dropout": 0.4},
        {"dropout": 0.4, "weights": False},
    ],
    ids=str,
)
def test_attention(options: dict[str, Any]) -> None:
    model = Encoder(**options).double()
    batch, labels = encoder_batch(), torch.tensor([0, 2, 1])
    tracker = tracker_for(model)
    seen: list[Tensor] = []

    def losses() -> Tensor:
        seen.append(F.cross_entropy(model(*batch), labels, reduction="none"))
        return seen[0]

    state = torch.get_rng_state()
    with tracker.recording(BATCH) as recording:
        losses().sum().backward(retain_graph=True)
    after = torch.get_rng_state()
    blocks = tracker.layout.split(recording.project()[0])
    assert set(blocks) == {"own.in_proj", "own.out_proj", "cross.in_proj", "cross.out_proj", "head"}
    for i in range(BATCH):
        expected = gradients(model, seen[0][i])
        for name, block in blocks.items():
            reference = attention_block(expected, name)
            assert float((block[i] - reference).abs().max()) < EXACT * max(1.0, float(reference.norm())), name
    torch.set_rng_state(state)
    plain = model(*batch)
    assert torch.equal(F.cross_entropy(plain, labels, reduction="none"), seen[0])
    assert torch.equal(torch.get_rng_state(), after)  # the replay draws from a state of its own


def test_a_transformer_encoder_layer_in_train_mode_and_frozen_in_eval_mode() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True), nn.Linear(WIDTH, 3))
    model = model.double()
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    tracker = tracker_for(model)
    trained = captured(model, tracker, lambda: model(x).pow(2).sum((1, 2)))
    model.eval().requires_grad_(False)
    frozen = captured(model, tracker, lambda: model(x).pow(2).sum((1, 2)), detached=True)
    assert {"0.self_attn.in_proj", "0.self_attn.out_proj", "0.linear1"} < set(trained)
    for name, block in trained.items():
        assert block.abs().max() > 0
        assert torch.allclose(block, frozen[name], rtol=EXACT, atol=EXACT), name


class Padded(nn.Module):
    """Encodes sequences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, left_out: Tensor) -> Tensor:
        found: Tensor = self.head(self.encoder(x, src_key_padding_mask=left_out))
        return found.masked_fill(left_out.unsqueeze(-1), 0.0)


def test_a_padded_encoder_frozen_in_eval_mode() -> None:
    """Where nothing needs a gradient, torch would lay the sequences one behind the other, without their padding."""
    torch.manual_seed(1)
    model = Padded().double()
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    left_out = torch.arange(LENGTH) >= torch.tensor([LENGTH, *[LENGTH - 1] * (BATCH - 1)]).unsqueeze(1)
    tracker = tracker_for(model)
    trained = captured(model, tracker, lambda: model(x, left_out).pow(2).sum((1, 2)))
    with frozen(model):
        found = captured(model, tracker, lambda: model(x, left_out).pow(2).sum((1, 2)), detached=True)
    assert torch.backends.mha.get_fastpath_enabled()
    for name, block in trained.items():
        assert block.abs().max() > 0
        assert torch.allclose(block, found[name], rtol=EXACT, atol=EXACT), name


def test_attention_weights_in_the_loss_are_refused() -> None:
    model = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with tracker_for(model).recording(BATCH), pytest.raises(CaptureError, match="uses the attention weights"):
        model(x, x, x)[1].pow(2).sum().backward()


@pytest.mark.parametrize("options", [{"kdim": 4}, {"add_bias_kv": True}], ids=str)
def test_other_attention_is_left_out_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"out_proj' \(nn.MultiheadAttention with "):
        tracker_for(nn.MultiheadAttention(WIDTH, 2, **options))


ATTENTION: dict[str, Any] = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 11,
    "max_position_embeddings": LENGTH, "attn_implementation": "eager",
}  # fmt: skip


def mixtral(implementation: str) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **ATTENTION, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2,
        experts_implementation=implementation,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def gpt_oss(implementation: str) -> nn.Module:
    """Transposed weights with biases; gate and up columns take turns."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **ATTENTION, head_dim=4, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2,
        experts_implementation=implementation,
    )  # fmt: skip
    return GptOssForCausalLM(config)


class Routed(nn.Module):
    """Experts of a class of transformers, between a router and a head."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.embed, self.router = nn.Embedding(11, 8), nn.Linear(8, 4)
        self.experts, self.head = experts, nn.Linear(8, 11)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden = self.embed(input_ids)
        weights, chosen = self.router(hidden).softmax(-1).flatten(0, 1).topk(2)
        made = self.experts(hidden.flatten(0, 1), chosen, weights)
        return SimpleNamespace(logits=self.head(made.view_as(hidden)))


def ungated(implementation: str) -> nn.Module:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    config = SimpleNamespace(
        n_routed_experts=4, hidden_size=8, moe_intermediate_size=12, moe_latent_size=None, mlp_hidden_act="relu2",
        _experts_implementation=implementation,
    )  # fmt: skip
    return Routed(NemotronHExperts(config))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("kind", [mixtral, gpt_oss, ungated])
def test_fused_experts(kind: Callable[[str], nn.Module], implementation: str) -> None:
    torch.manual_seed(2)
    model = kind(implementation).double()
    for parameter in model.parameters():  # some layouts begin with biases of zero, or with memory as it is
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(11, (BATCH, LENGTH))
    tracker = tracker_for(model)
    seen: list[Tensor] = []
    with tracker.recording(BATCH) as recording:
        logits = model(input_ids=tokens, use_cache=False).logits
        seen.append(F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none").mean(1))
        seen[0].sum().backward(retain_graph=True)
    blocks = tracker.layout.split(recording.project()[0])
    experts = {name: block for name, block in blocks.items() if ".experts." in f".{name}"}
    assert len(experts) == 8
    for i in range(BATCH):
        expected = gradients(model, seen[0][i])
        for name, block in experts.items():
            assert torch.allclose(block[i], expert_gradient(expected, name, kind), rtol=FLOAT32_INSIDE, atol=1e-8), name


def expert_gradient(expected: dict[str, Tensor], name: str, kind: object) -> Tensor:
    """``[d_out, d_in]`` of one expert, a bias as the last column."""
    prefix, number, weight = name.rsplit(".", 2)
    found = expected[f"{prefix}.{weight}"][int(number)]
    if kind is not gpt_oss:
        return found
    return torch.cat([found.T, expected[f"{prefix}.{weight}_bias"][int(number), :, None]], 1)


def test_experts_of_another_layout_are_left_out_by_name() -> None:
    model = mixtral("eager")
    model.model.layers[0].mlp.experts.has_post_expert_norm = True
    reasons = [reason for name, reason in select_modules(model, types=("Linear",)).skipped.items() if "experts" in name]
    assert reasons == ["its fused experts differ from the usual layouts (has_post_expert_norm)"]
