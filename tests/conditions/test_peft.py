"""LoRA by PEFT: adapters are tracked, the frozen base is not, also where it is quantised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import logix_like as logix
from tests.training import full

peft = pytest.importorskip("peft")

# PEFT asks transformers for something under a name that transformers no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SAMPLES, LENGTH, VOCABULARY = 6, 5, 11
FLOAT32 = 1e-4


def adapted() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    lora = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False, lora_dropout=0.0
    )
    return peft.get_peft_model(LlamaForCausalLM(config), lora)


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits
    return F.cross_entropy(logits.transpose(1, 2), tokens)


def test_adapters_are_tracked_and_the_frozen_base_is_not(tmp_path: Path) -> None:
    model, tokens = adapted(), torch.randint(VOCABULARY, (SAMPLES, LENGTH))
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


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_left_alone(tmp_path: Path, bits: int) -> None:
    quantised = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    kind = quantised.nn.Linear4bit if bits == 4 else quantised.nn.Linear8bitLt
    model = nn.Sequential(kind(8, 8), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    run = logix.init("run", model, full(tmp_path), verbose=False)
    with run(data_id=range(SAMPLES)):
        F.cross_entropy(model(torch.randn(SAMPLES, 8)), torch.zeros(SAMPLES, dtype=torch.long)).backward()
    run.finalize()
    assert run.store.modules.names == ("1",)
