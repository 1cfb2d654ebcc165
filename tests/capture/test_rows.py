"""Rows equal per-sample gradients: over the whole zoo, in float64, with and without projection."""

import pickle
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from logix_like.capture.projector import Projector
from logix_like.capture.selection import Selection, select_modules
from logix_like.capture.tracker import Recording, Tracker
from logix_like.errors import CaptureError
from logix_like.projection import INITS
from tests.models import BATCH, ZOO, Batch, Case, build
from tests.reference_capture import full_rows, sample_gradients

HALF = 2e-2
"""Relative error under bfloat16 autocast, which keeps 8 bits of each activation."""


def tracker_for(model: nn.Module, case: Case, init: str = "identity", rank: int = 3, **options: object) -> Tracker:
    selection = selected(model, case)
    return Tracker(model, selection, Projector(selection.blocks, INITS[init], rank=rank, seed=0))


def selected(model: nn.Module, case: Case) -> Selection:
    return select_modules(model, types=case.types, **case.options)


def record(tracker: Tracker, case: Case, model: nn.Module, batch: Batch, **options: bool) -> Recording:
    with tracker.recording(BATCH, mask=batch.get("mask"), **options) as recording:
        case.losses(model, batch).mean().backward()
    recording.factor = float(BATCH)
    return recording


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_identity_rows_are_the_per_sample_gradients(case: Case) -> None:
    model, batch = build(case)
    tracker = tracker_for(model, case)
    rows, _ = record(tracker, case, model, batch).project()
    expected = full_rows(model, tracker.layout, sample_gradients(case, model, batch))
    assert rows.shape == expected.shape
    for name, block in tracker.layout.split(rows).items():
        reference = tracker.layout.split(expected)[name]
        assert torch.allclose(block, reference, rtol=0, atol=case.tolerance * float(expected.abs().max())), name
    assert relative(rows, expected) < case.tolerance


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_rows_add_up_to_the_gradients_that_are_left(case: Case) -> None:
    model, batch = build(case)
    tracker = tracker_for(model, case)
    recording = record(tracker, case, model, batch)
    left = recording.fresh_gradients()
    rows, _ = recording.project()
    total = tracker.layout.split(rows.sum(0))
    assert left
    for name, gradient in left.items():
        assert relative(total[name] / BATCH, gradient) < 10 * case.tolerance, name


def test_an_output_size_that_the_layer_does_not_say_is_refused() -> None:
    model = nn.ConvTranspose1d(2, 3, 3, stride=2)
    selection = select_modules(model, types=("ConvTranspose1d",))
    tracker = Tracker(model, selection, Projector(selection.blocks, INITS["identity"], rank=3, seed=0))
    with tracker.recording(BATCH), pytest.raises(CaptureError, match="an output_size that its output_padding does not"):
        model(torch.randn(BATCH, 2, 4), output_size=[10]).sum().backward()


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pca", "eigen"])
@pytest.mark.parametrize("case", ZOO, ids=str)
def test_projected_rows_are_the_projected_gradients(case: Case, init: str) -> None:
    model, batch = build(case)
    tracker = tracker_for(model, case, init)
    recording = record(tracker, case, model, batch)
    if tracker.needs_warmup:
        tracker.fit([recording])
    rows, _ = recording.project()
    full = tracker_for(model, case)
    gradients = full.layout.split(full_rows(model, full.layout, sample_gradients(case, model, batch)))
    for block in tracker.settle():
        projection = tracker.projector.projection(block.name)
        inward, outward = projection.input.double(), projection.output.double()
        expected = tracker.layout.pick(block.name, outward @ gradients[block.name] @ inward.T).unflatten(
            -1, block.matrix
        )
        found = tracker.layout.split(rows)[block.name]
        scale = max(float(gradients[block.name].norm()), 1e-3)
        assert float((found - expected).abs().max()) < 10 * case.tolerance * scale, block.name


@pytest.mark.parametrize("case", [c for c in ZOO if not c.name.startswith("checkpoint")], ids=str)
def test_frozen_weights_give_the_same_rows(case: Case) -> None:
    model, batch = build(case)
    tracker = tracker_for(model, case)
    expected, _ = record(tracker, case, model, batch).project()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found, _ = record(tracker, case, model, batch, detached=True).project()
    assert relative(found, expected) < case.tolerance
    assert all(p.grad is None or not p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["mlp", "transformer", "cnn", "tied"])
def test_autocast_rows_agree_within_bfloat16(name: str) -> None:
    case = next(c for c in ZOO if c.name == name)
    model, batch = build(case, torch.float32)
    tracker = tracker_for(model, case)
    with tracker.recording(BATCH) as recording:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = case.losses(model, batch).mean()
        loss.backward()
    recording.factor = float(BATCH)
    rows, _ = recording.project()
    exact, exact_batch = build(case)
    expected = full_rows(exact, tracker.layout, sample_gradients(case, exact, exact_batch))
    assert rows.dtype == torch.float32
    assert relative(rows.double(), expected) < HALF


def test_modules_that_read_one_tensor_share_a_projection() -> None:
    case = next(c for c in ZOO if c.name == "transformer")
    model, batch = build(case)
    tracker = tracker_for(model, case, "gaussian")
    record(tracker, case, model, batch)
    layout = tracker.settle()
    assert {layout[f"attention.{n}"].input_group for n in "qkv"} == {"attention.q"}
    assert layout["attention.o"].input_group == "attention.o"
    first, second = (tracker.projector.projection(f"attention.{n}") for n in "qk")
    assert torch.equal(first.input, second.input)
    assert not torch.equal(first.output, second.output)


def test_a_call_under_no_grad_inside_a_block_changes_nothing() -> None:
    case = ZOO[0]
    model, batch = build(case)
    tracker = tracker_for(model, case)
    expected, _ = record(tracker, case, model, batch).project()
    with tracker.recording(BATCH) as recording:
        loss = case.losses(model, batch).mean()
        with torch.no_grad():
            model(batch["x"][:2])
        loss.backward()
    recording.factor = float(BATCH)
    assert torch.equal(recording.project()[0], expected)


def test_a_backward_after_the_block_is_not_counted() -> None:
    case = ZOO[0]
    model, batch = build(case)
    tracker = tracker_for(model, case)
    with tracker.recording(BATCH) as recording:
        loss = case.losses(model, batch).mean()
        loss.backward(retain_graph=True)
    rows = recording.project()[0].clone()
    loss.backward()
    assert torch.equal(recording.project()[0], rows)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_a_model_copied_inside_a_block_is_free_of_us(copied: str) -> None:
    case = ZOO[0]
    model, batch = build(case)
    tracker = tracker_for(model, case)
    with tracker.recording(BATCH) as recording:
        copy = deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
        case.losses(copy, batch).mean().backward()
        case.losses(model, batch).mean().backward()
    recording.factor = float(BATCH)
    expected, _ = record(tracker, case, model, batch).project()
    assert torch.equal(recording.project()[0], expected)
    case.losses(copy, {name: value[:2] for name, value in batch.items()}).mean().backward()


@pytest.mark.parametrize("name", ["transformer", "gpt2"])
def test_a_warm_up_leaves_masked_positions_out(name: str) -> None:
    """Other tokens there, which no loss counts and no counted position reads, change no projection."""
    case = next(c for c in ZOO if c.name == name)
    model, batch = build(case)
    others = {**batch, "x": torch.where(batch["mask"], batch["x"], 7)}
    found = []
    for one in (batch, others):
        tracker = tracker_for(model, case, "pca")
        recording = record(tracker, case, model, one)
        tracker.fit([recording])
        found.append([tracker.projector.projection(block.name) for block in tracker.layout])
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine.input, theirs.input, atol=1e-6)
        assert torch.allclose(mine.output, theirs.output, atol=1e-6)
