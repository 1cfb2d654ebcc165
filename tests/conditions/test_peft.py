"""LoRA by PEFT: adapters are tracked, the frozen base is not, also where it is quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import logix_like as logix
from logix_like.errors import CaptureError, ConfigError
from tests.training import full

peft = pytest.importorskip("peft")

# PEFT asks transformers for something under a name that transformers no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SAMPLES, LENGTH, VOCABULARY = 6, 5, 11
FLOAT32 = 1e-4


def adapted(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    lora = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False, lora_dropout=0.0,
        **options,
    )  # fmt: skip
    return peft.get_peft_model(LlamaForCausalLM(config), lora)


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits
    return F.cross_entropy(logits.transpose(1, 2), tokens)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_adapters_are_tracked_and_the_frozen_base_is_not(tmp_path: Path, options: dict[str, Any]) -> None:
    model, tokens = adapted(**options), torch.randint(VOCABULARY, (SAMPLES, LENGTH))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    run = logix.init("run", model, full(tmp_path, store={"dtype": "float32"}), verbose=False)
    with run(data_id=range(SAMPLES)):
        loss(model, tokens).backward()
    model.zero_grad()
    run.finalize()
    assert len(run.store.modules) == 8
    assert all(".lora_A." in name or ".lora_B." in name for name in run.store.modules.names)
    blocks = run.store.modules.split(run.store.gradients[:])
    for i in range(SAMPLES):
        loss(model, tokens[i : i + 1]).backward()
        for name, block in blocks.items():
            reference = model.get_submodule(name).weight.grad
            assert torch.allclose(block[i], reference, rtol=FLOAT32, atol=1e-6), name
        model.zero_grad()
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name in frozen)


def quantise(layer: nn.Linear, bits: int) -> nn.Module:
    """The same layer with its weight in 4 or 8 bits, as transformers makes it at loading."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    sizes, weight = (layer.in_features, layer.out_features), layer.weight.detach()
    if bits == 4:
        made = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=made)
    else:
        made = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
        made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    quantised: nn.Module = made.to("cpu")  # which rounds the weight
    return quantised


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_of_a_quantised_base(tmp_path: Path, bits: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, attn_implementation="eager",
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    for attention in (layer.self_attn for layer in base.model.layers):
        attention.q_proj, attention.v_proj = quantise(attention.q_proj, bits), quantise(attention.v_proj, bits)
    setattr(base, f"is_loaded_in_{bits}bit", True)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.0)
    model, tokens = peft.get_peft_model(base, lora), torch.randint(VOCABULARY, (SAMPLES, LENGTH))
    run = logix.init("run", model, full(tmp_path), verbose=False)
    with run(data_id=range(SAMPLES)):
        model(input_ids=tokens, labels=tokens).loss.backward()
    run.finalize()
    blocks = run.store.modules
    assert len(blocks) == 4
    assert all("lora_" in block.name for block in blocks)
    for row, own in zip(run.store.gradients[:], tokens.split(1), strict=True):
        model.zero_grad()
        model(input_ids=own, labels=own).loss.backward()
        expected = torch.cat([model.get_submodule(block.name).weight.grad.flatten() for block in blocks])
        assert float((row - expected).norm() / expected.norm()) < FLOAT32


def test_magnitudes_that_are_not_tracked_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logix.init("run", adapted(use_dora=True), full(tmp_path)).finalize()
    assert "lora_magnitude_vector.default (DoraLinearLayer has no rule), " in capsys.readouterr().err


def test_a_prompt_that_all_samples_share_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    options: dict[str, Any] = {"num_virtual_tokens": 2, "token_dim": 8, "num_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(adapted().get_base_model().config)
    prompted = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", **options))
    with pytest.raises(ConfigError, match=r"what is trained is 'prompt_encoder.default.embedding' \(Embedding\)"):
        logix.init("run", prompted, full(tmp_path), verbose=False)
    run = logix.init("run", prompted, full(tmp_path, modules={"types": ["Embedding"]}), verbose=False)
    tokens = torch.randint(VOCABULARY, (SAMPLES, 3))
    with (
        pytest.raises(CaptureError, match=r"so 1 samples .*; what all samples share .* one gradient for all"),
        run(data_id=range(SAMPLES)),
    ):
        prompted(input_ids=tokens, labels=tokens).loss.backward()
    run.finalize()
