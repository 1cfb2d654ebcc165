"""Training with and without logging ends in the same bits, and the model carries nothing of ours."""

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import logix_like as logix
from tests.models import Transformer, tokens


class ConvNet(nn.Module):
    """Convolutions, batch norm, dropout, in-place activations."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, groups=4, stride=2),
            nn.ReLU(inplace=True),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(8 * 9, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def train_images(logged: Path | None, config: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = ConvNet()
    x, y = torch.randn(40, 2, 8, 8), torch.randint(10, (40,))
    loader = DataLoader(TensorDataset(x, y, torch.arange(40)), batch_size=7, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = None
    if logged is not None:
        run = logix.init("run", model, {"root": str(logged), **config}, optimizer=optimizer, verbose=False)
    for epoch in range(3):
        if run is not None:
            run.epoch(epoch)
        for images, labels, ids in loader:
            optimizer.zero_grad()
            with run(data_id=ids) if run is not None else nullcontext():
                F.cross_entropy(model(images), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if run is not None:
            ask_in_between(run, model, images, labels)
    if run is not None:
        run.finalize()
    return state(model, optimizer)


def ask_in_between(run: logix.Run, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    # The model is asked in eval mode: a forward in train mode would move the user's own batch-norm statistics.
    model.eval()
    with run.query(data_id=range(len(images))) as query:
        F.cross_entropy(model(images), labels).backward()
    model.train()
    run.compute_influence_all(query, k=1)


def train_text(logged: Path | None, config: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    model, batch = Transformer(tied=True), tokens()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = None
    if logged is not None:
        run = logix.init("run", model, {"root": str(logged), **config}, optimizer=optimizer, verbose=False)
    for epoch in range(5):
        optimizer.zero_grad()
        if run is not None:
            run.epoch(epoch)
        with run(data_id=batch["x"], mask=batch["mask"]) if run is not None else nullcontext():
            logits = model(batch["x"], batch["mask"])
            F.cross_entropy(logits.transpose(1, 2), batch["y"]).backward()
        optimizer.step()
        torch.rand(1)
    if run is not None:
        run.finalize()
    return state(model, optimizer)


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": copy.deepcopy(model.state_dict()),
        "gradients": [p.grad for p in model.parameters()],
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "rng": torch.get_rng_state(),
    }


def same_bits(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_bits(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same_bits, first, second))
    return bool(first == second)


EVERYTHING = {
    "modules": {"types": ["Linear", "Conv2d", "Embedding", "LayerNorm"]},
    "checkpoints": "every_epoch",
}


@pytest.mark.parametrize(
    "config",
    [
        {},
        EVERYTHING,
        {**EVERYTHING, "projection": {"init": "pca", "warmup": 9}},
        {**EVERYTHING, "projection": {"init": "identity"}, "statistics": ["mean", "variance", "kronecker"]},
    ],
    ids=["default", "everything", "pca", "identity"],
)
@pytest.mark.parametrize("train", [train_images, train_text])
def test_training_ends_in_the_same_bits(
    train: Callable[[Path | None, dict[str, Any]], dict[str, Any]], config: dict[str, Any], tmp_path: Path
) -> None:
    plain = train(None, config)
    if train is train_images:
        with pytest.warns(RuntimeWarning, match="batch normalisation.*'body.1'|batch normalisation.*body.1"):
            logged = train(tmp_path, config)
    else:
        logged = train(tmp_path, config)
    assert same_bits(plain, logged)


def test_outside_a_block_the_model_is_as_the_user_made_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    before = {
        "keys": list(model.state_dict()),
        "modules": [name for name, _ in model.named_modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "trained": [p.requires_grad for p in model.parameters()],
    }
    run = logix.init("run", model, root=str(tmp_path), verbose=False)

    def after() -> dict[str, Any]:
        assert all(not m._forward_hooks and not m._backward_hooks for m in model.modules())
        assert all(not p._backward_hooks for p in model.parameters())
        pickle.dumps(model)
        return {
            "keys": list(model.state_dict()),
            "modules": [name for name, _ in model.named_modules()],
            "attributes": [sorted(vars(m)) for m in model.modules()],
            "trained": [p.requires_grad for p in model.parameters()],
        }

    with run(data_id=["a", "b"]):
        model(torch.randn(2, 4)).sum().backward()
    assert after() == before
    with pytest.raises(ZeroDivisionError), run(data_id=["c"]):
        model(torch.randn(1, 4)).sum().backward()
        raise ZeroDivisionError
    assert after() == before
    run.finalize()
    assert after() == before
    assert list(run.store.data_id[:]) == ["a", "b"]


def test_a_query_in_the_midst_of_training_leaves_the_gradients_alone(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    run = logix.init("run", model, root=str(tmp_path), verbose=False)
    with run(data_id=["a"]):
        model(torch.randn(1, 4)).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    with run.query(data_id=["q"]):
        model(torch.randn(1, 4)).sum().backward()
    assert same_bits(gradients, [p.grad for p in model.parameters()])
    run.finalize()
