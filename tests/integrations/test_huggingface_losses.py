"""Losses that the Trainer computes outside the model, compiled models, and what cannot be logged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from logix_like.integrations.huggingface import LogixCallback
from logix_like.integrations.logits import cross_entropy_factor
from logix_like.integrations.loss import LossReader
from transformers import Trainer, TrainingArguments

from logix_like.errors import CaptureError
from tests.integrations import sentences as s

FLOAT32 = 2e-5
EXACT = 1e-9


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss of the user's own, divided by what the Trainer says."""
    logits = outputs.logits
    if labels.ndim == 2:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


def averaged(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """One that divides by its own batch's count."""
    counted = labels[:, 1:].ne(-100).sum() if labels.ndim == 2 else len(labels)
    return summed(outputs, labels, counted)


LOSSES: dict[str, dict[str, Any]] = {
    "smoothed": {"label_smoothing_factor": 0.1},
    "summed": {"trainer": {"compute_loss_func": summed}},
    "averaged": {"trainer": {"compute_loss_func": averaged}},
}


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tokens", [True, False])
def test_rows_with_a_loss_outside_the_model(tmp_path: Path, loss: str, accumulated: int, tokens: bool) -> None:
    network, data = (s.llama(), s.sentences()) if tokens else (s.bert(), s.labelled())
    settings = LOSSES[loss]
    store = s.trained(tmp_path, network, data, gradient_accumulation_steps=accumulated, **settings).run.store
    assert len(store) == 22
    own = s.own_rows(network, store, data, settings.get("label_smoothing_factor", 0.0))
    assert s.relative_error(store.gradients[:], own) <= FLOAT32


def test_rows_with_smoothed_labels_under_autocast(tmp_path: Path) -> None:
    data = s.sentences()
    store = s.trained(tmp_path, s.llama(), data, bf16=True, label_smoothing_factor=0.1).run.store
    assert s.relative_error(store.gradients[:], s.own_rows(s.llama(), store, data, 0.1)) <= 3e-2


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("sureness", [0.1, 1.0, 10.0])
def test_the_factor_of_a_cross_entropy_is_found(smoothing: float, sureness: float) -> None:
    """However sure the model is, also where it is surer than a smoothed target, and wherever labels are ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = (sureness * torch.randn(3, 50, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.where(torch.rand(3, 50, generator=generator) < 0.5, logits.argmax(-1), 2)
    labels[0] = -100
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(loss * 0.013, logits)
    assert cross_entropy_factor(logits, gradient, smoothing) == pytest.approx(0.013, rel=EXACT)


@pytest.mark.parametrize("kind", ["weighted", "other", "turned", "none"])
def test_another_loss_of_the_logits_is_refused(kind: str) -> None:
    logits = torch.randn(40, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(40) % 5
    loss = {
        "weighted": F.cross_entropy(logits, labels, weight=torch.arange(1.0, 6.0).double()),
        "other": logits.square().mean(),
        "turned": -F.cross_entropy(logits, labels),
        "none": 0 * logits.sum(),
    }[kind]
    (gradient,) = torch.autograd.grad(loss, logits)
    with pytest.raises(CaptureError, match="no gradient at all" if kind == "none" else "nor a cross-entropy"):
        cross_entropy_factor(logits, gradient, 0.0)


def test_a_loss_that_is_no_cross_entropy_is_refused(tmp_path: Path) -> None:
    callback = LogixCallback("run", root=tmp_path, verbose=False)
    trainer = Trainer(
        s.bert(), s.arguments(tmp_path), train_dataset=s.labelled(), callbacks=[callback],
        compute_loss_func=lambda outputs, *_, **__: outputs.logits.square().mean(),
    )  # fmt: skip
    with pytest.raises(CaptureError, match="nor a cross-entropy of its logits"):
        trainer.train()
    callback.close()


@pytest.mark.parametrize("case", ["a further loss", "labels of another length"])
def test_a_loss_that_is_no_mean_of_its_labels_is_warned_of(case: str) -> None:
    reader, logits = LossReader(torch.nn.Linear(1, 1)), torch.randn(2, 4, 5)
    labels = torch.tensor([[1, 2, -100, 0], [3, 3, 0, -100]])
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert reader.divisor({"labels": labels}, {"loss": loss, "logits": logits}, 2) == 6
    said = "6 labels in a batch, and divides their sum by 4:"
    if case == "labels of another length":
        logits, said = torch.randn(2, 9, 5), "6 labels in a batch, and does not show in its logits"
    reader = LossReader(torch.nn.Linear(1, 1))
    with pytest.warns(RuntimeWarning, match=said):
        reader.divisor({"labels": labels}, {"loss": 1.5 * loss, "logits": logits}, 2)
    assert reader.divisor({"labels": labels}, {"loss": 1.5 * loss, "logits": logits}, 2) == 6  # said once


@pytest.mark.parametrize("divisor", [6.0, 11.0])
def test_the_divisor_of_a_rounded_loss_is_found(divisor: float) -> None:
    logits, labels = torch.randn(2, 4, 5).bfloat16(), torch.tensor([[1, 2, -100, 0], [3, 3, 0, -100]])
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / divisor
    batch = {"labels": labels, "num_items_in_batch": torch.tensor(11)}
    assert LossReader(torch.nn.Linear(1, 1)).divisor(batch, {"loss": loss, "logits": logits}, 2) == divisor


def test_tokens_that_cannot_be_counted_are_said(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="set per_token: false"):
        s.trained(
            tmp_path, s.llama(), s.sentences(), label_smoothing_factor=0.1,
            callback={"per_token": True, "loss_reduction": "token_mean"},
        )  # fmt: skip


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_compiled_model_is_logged_eagerly(tmp_path: Path, accumulated: int) -> None:
    torch._dynamo.reset()
    network, data = s.llama(), s.sentences()
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 3}
    with pytest.warns(RuntimeWarning, match="training steps are logged, and so run, eagerly"):
        store = s.trained(tmp_path, network, data, gradient_accumulation_steps=accumulated, **settings).run.store
    assert len(store) == (6, 11)[accumulated - 1]
    assert s.relative_error(store.gradients[:], s.own_rows(network, store, data)) <= FLOAT32
    compiled = torch.compile(torch.nn.Linear(2, 2), backend="aot_eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled(torch.ones(1, 2))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1  # other code is compiled as ever
    torch._dynamo.reset()


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    class TwoGpus(TrainingArguments):
        n_gpu = 2

    callback = LogixCallback("run", root=tmp_path, verbose=False)
    args = TwoGpus(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(CaptureError, match=r"over 2 GPUs in one process \(DataParallel\)"):
        callback.on_train_begin(args, SimpleNamespace(global_step=0), None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("network", [s.llama, s.gpt2])
def test_a_batch_without_any_label_has_rows_of_nothing(tmp_path: Path, network: Any, accumulated: int) -> None:
    """As where the prompt alone fills a sample, and the Trainer goes on; the first batch and one in between."""
    data = s.sentences()
    for empty in (0, 1, 6, 7):
        data[empty]["labels"] = torch.full_like(data[empty]["labels"], -100)
    model = network()
    store = s.trained(
        tmp_path, model, data, gradient_accumulation_steps=accumulated, train_sampling_strategy="sequential",
        num_train_epochs=1,
    ).run.store  # fmt: skip
    assert list(store.data_id) == list(range(s.SAMPLES))
    counted = torch.tensor([i not in (0, 1, 6, 7) for i in range(s.SAMPLES)])
    assert bool((store.gradients[:][~counted] == 0).all())
    own = s.own_rows(model, store, data)
    assert s.relative_error(store.gradients[:][counted], own[counted]) <= FLOAT32


def test_rows_that_do_not_add_up_to_what_is_trained_on_are_warned_of(tmp_path: Path) -> None:
    """Also though the Trainer has clipped by then."""

    class Penalised(Trainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, *args, **kwargs) + model.classifier.weight.square().sum()

    with pytest.warns(RuntimeWarning, match="the rows of classifier do not add up") as said:
        s.trained(tmp_path, s.bert(), s.labelled(), kind=Penalised, max_grad_norm=1e-3)
    assert len(said) == 1


class Plain(torch.nn.Module):
    """A causal language model that is none of transformers' classes, and shifts the labels itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = s.llama()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(input_ids=input_ids, attention_mask=attention_mask).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_rows_of_a_language_model_of_the_users_own(tmp_path: Path, accumulated: int) -> None:
    data = s.sentences()
    store = s.trained(tmp_path, Plain(), data, gradient_accumulation_steps=accumulated).run.store
    expected = s.trained(tmp_path / "known", s.llama(), data, gradient_accumulation_steps=accumulated).run.store
    assert list(store.data_id) == list(expected.data_id)
    assert s.relative_error(store.gradients[:], expected.gradients[:]) <= FLOAT32
