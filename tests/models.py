"""The model zoo: small models whose per-sample gradients every capture test checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BATCH = 5
CLASSES = 3
VOCABULARY = 11
LENGTH = 6
Batch = dict[str, Tensor]
"""Tensors whose dimension 0 counts the samples."""

EXACT = 1e-9
"""Sums in another order, nothing else."""
FLOAT32_INSIDE = 1e-5
"""The model itself computes parts in float32 (LLaMA's norms and rotary embedding), whatever its dtype."""

EVERY_TYPE = (
    "Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
    "Embedding", "LayerNorm", "RMSNorm", "GroupNorm",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model with data and a loss for each sample."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    losses: Callable[[nn.Module, Batch], Tensor]
    """``losses(model, batch) -> [batch]``."""
    types: tuple[str, ...] = EVERY_TYPE
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of ``select_modules``."""
    tolerance: float = EXACT
    """Relative error that float64 rows may have."""

    def __repr__(self) -> str:
        return self.name


def classify(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def classify_positions(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]).mean((1, 2)), batch["y"], reduction="none")


def token_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Mean loss over the counted positions of each sequence."""
    losses = F.cross_entropy(logits.transpose(1, 2), batch["y"], reduction="none")
    mask = batch["mask"].to(losses.dtype)
    return (losses * mask).sum(1) / mask.sum(1)


def features(*shape: int) -> Callable[[], Batch]:
    def make() -> Batch:
        generator = torch.Generator().manual_seed(1)
        return {
            "x": torch.randn(BATCH, *shape, generator=generator),
            "y": torch.randint(CLASSES, (BATCH,), generator=generator),
        }

    return make


def tokens() -> Batch:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([LENGTH, 3, LENGTH - 1, 2, LENGTH])
    mask = torch.arange(LENGTH) < lengths[:, None]
    x = torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=generator) * mask
    return {"x": x, "y": torch.randint(VOCABULARY, x.shape, generator=generator), "mask": mask}


class Attention(nn.Module):
    """One-head self-attention with padding; q, k and v read the same tensor."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=bias) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / x.shape[-1] ** 0.5
        scores = scores.masked_fill(~mask[:, None, :], -1e9)
        return self.o(scores.softmax(-1) @ self.v(x))


class Transformer(nn.Module):
    """Embedding, attention, MLP and norms, with a head that may be tied to the embedding."""

    def __init__(
        self,
        norm: type[nn.Module] = nn.LayerNorm,
        *,
        tied: bool = False,
        head_bias: bool = False,
        head_first: bool = False,
    ) -> None:
        super().__init__()
        width = 8
        if head_first:  # so that the head, not the embedding, owns the block of the tied weight
            self.head = nn.Linear(width, VOCABULARY, bias=head_bias)
        self.embed = nn.Embedding(VOCABULARY, width, padding_idx=0)
        self.first_norm = norm(width)
        self.attention = Attention(width, bias=norm is nn.LayerNorm)
        self.second_norm = norm(width)
        self.up = nn.Linear(width, 10)
        self.down = nn.Linear(10, width)
        if not head_first:
            self.head = nn.Linear(width, VOCABULARY, bias=head_bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = self.embed(x)
        hidden = hidden + self.attention(self.first_norm(hidden), mask)
        hidden = hidden + self.down(F.gelu(self.up(self.second_norm(hidden))))
        return self.head(hidden)


def transform(model: nn.Module, batch: Batch) -> Tensor:
    return token_losses(model(batch["x"], batch["mask"]), batch)


class Reused(nn.Module):
    """One linear layer called three times, once with a keyword only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.never = nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(torch.tanh(self.layer(x)))
        return self.head(torch.tanh(self.layer(input=torch.tanh(x))))


class SequenceFirst(nn.Module):
    """Works on ``[positions, batch, width]``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x.transpose(0, 1))).mean(0))


class Checkpointed(nn.Module):
    """Activation checkpointing of either kind around the middle."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.middle, self.head = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if torch._C._functorch.peek_interpreter_stack() is not None:  # torch.func knows no checkpoints
            return self.head(torch.tanh(self.middle(hidden)))
        inner = checkpoint(lambda h: torch.tanh(self.middle(h)), hidden, use_reentrant=self.reentrant)
        return self.head(inner)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5, bias=False), nn.Tanh(), nn.Linear(5, CLASSES))


def in_place_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(inplace=True), nn.Linear(7, CLASSES))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, (3, 2), dilation=2, groups=2, padding=2),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, groups=8, padding="same", bias=False),
        nn.Tanh(),
        nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 6, 3, stride=2, groups=2),
        nn.Tanh(),
        nn.Conv1d(6, 4, 1),
        nn.Flatten(),
        nn.LazyLinear(CLASSES),
    )


def conv3d() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 4, 2, dilation=2, padding=1), nn.Tanh(), nn.Flatten(), nn.LazyLinear(CLASSES))


def autoencoder() -> nn.Module:
    """Down and up again: strides, paddings, dilations and groups of transposed convolutions, and group norms."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.GroupNorm(4, 8),
        nn.Tanh(),
        nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1),
        nn.GroupNorm(3, 6),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, (2, 3), dilation=2, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 4, 2, stride=2, groups=4, bias=False),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.GroupNorm(2, 16),
        nn.Linear(16, CLASSES),
    )


def upsampling(dimensions: int) -> Callable[[], nn.Module]:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose3d)[dimensions // 2]

    def make() -> nn.Module:
        return nn.Sequential(
            kind(4, 6, 3, stride=2, groups=2, padding=1), nn.Tanh(), kind(6, 2, 2, dilation=2), nn.Flatten(),
            nn.LazyLinear(CLASSES),
        )  # fmt: skip

    return make


def partly_frozen() -> nn.Module:
    model = mlp()
    model[0].weight.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return model


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=VOCABULARY, n_positions=LENGTH, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, attn_implementation="eager", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, attn_implementation="eager", bos_token_id=0,
        eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def causal(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["x"], attention_mask=batch["mask"].long(), use_cache=False).logits
    return token_losses(logits, batch)


# Position embeddings are looked up once for the whole batch: their per-sample gradients do not exist separately.
_NO_POSITIONS = {"exclude": ("*.wpe",)}

ZOO = (
    Case("mlp", mlp, features(6), classify),
    Case("mlp_positions", mlp, features(4, 3, 6), classify_positions),
    Case("in_place", in_place_mlp, features(6), classify),
    Case("cnn", cnn, features(4, 9, 8), classify),
    Case("conv1d", conv1d, features(4, 9), classify),
    Case("conv3d", conv3d, features(2, 4, 4, 5), classify),
    Case("autoencoder", autoencoder, features(3, 6, 8), classify),
    Case("upsampling_1d", upsampling(1), features(4, 5), classify),
    Case("upsampling_3d", upsampling(3), features(4, 2, 3, 2), classify),
    Case("transformer", Transformer, tokens, transform),
    Case("rms_norm", lambda: Transformer(nn.RMSNorm), tokens, transform),
    Case("tied", lambda: Transformer(tied=True), tokens, transform),
    Case("tied_with_bias", lambda: Transformer(tied=True, head_bias=True), tokens, transform),
    Case("tied_head_first", lambda: Transformer(tied=True, head_bias=True, head_first=True), tokens, transform),
    Case("reused", Reused, features(6), classify),
    Case("partly_frozen", partly_frozen, features(6), classify),
    Case("sequence_first", SequenceFirst, features(4, 4), classify, options={"batch_dim": {"inner": 1}}),
    Case("checkpoint_reentrant", lambda: Checkpointed(True), features(6), classify),
    Case("checkpoint", lambda: Checkpointed(False), features(6), classify),
    Case("gpt2", gpt2, tokens, causal, options=_NO_POSITIONS),
    Case("llama", llama, tokens, causal, tolerance=FLOAT32_INSIDE),
)  # fmt: skip


def build(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, Batch]:
    """The case's model (random weights, also in norms and biases) and its batch in ``dtype``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, batch = case.model(), case.batch()
        case.losses(model, batch)  # lazy layers take their shape
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype), {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
