"""Uses that once gave wrong rows, lost them, or said nothing: each is right now, or a named error."""

import os
from collections import UserDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import logix_like as logix
from logix_like.capture.selection import select_modules
from logix_like.errors import CaptureError, ConfigError, StoreError
from tests.training import batches, data, full, network, own_gradients, trained_run

CLOSE = 1e-9


def log(run: logix.Run, model: nn.Module, ids: Any = range(4), x: Tensor | None = None) -> None:
    inputs, labels = data()
    inputs = inputs[:4] if x is None else x
    with run(data_id=ids):
        F.cross_entropy(model(inputs), labels[: len(inputs)]).backward()


def squared(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().flatten(1).sum(1).mean()


def assert_rows_add_up(run: logix.Run, model: nn.Module, samples: int) -> None:
    """The rows' mean is the gradient that the backward pass of their mean loss left."""
    store = run.store
    total = store.layout.split(store.gradients[:].double().mean(0))
    assert len(store) == samples
    for name, found in total.items():
        module = model.get_submodule(name)
        parts: list[Any] = [module.weight.grad] if store.layout[name].kind != "bias" else []
        if found.shape[1] > sum(part.shape[1] for part in parts):
            parts.append(module.bias.grad[:, None])
        assert torch.allclose(found, torch.cat(parts, 1), rtol=CLOSE, atol=CLOSE), name


def test_a_change_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = network()
    run = logix.init("run", model, root="here", verbose=False)
    log(run, model, ["a", "b", "c", "d"])
    run.commit()
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    log(run, model, ["e", "f", "g", "h"])
    run.finalize()
    assert list(run.store.data_id) == list("abcdefgh")
    assert len(logix.open_store(tmp_path / "here" / "run")) == 8


def test_what_a_loop_does_with_its_tensors_afterwards_is_not_stored(tmp_path: Path) -> None:
    inputs, labels = data()
    model, losses = network(), torch.arange(4.0)
    with logix.init("run", model, root=str(tmp_path), verbose=False, store={"dtype": "float32"}) as run:
        with run(data_id=range(4), loss=losses):
            F.cross_entropy(model(inputs[:4]), labels[:4]).backward()
        expected = run.get_log().gradients.clone()
        run.get_log().gradients.zero_()
        losses.fill_(7.0)
        run.commit()
        assert run.store.loss.tolist() == [0.0, 1.0, 2.0, 3.0]
        assert torch.equal(run.store.gradients[:], expected.float())


class TiedWithOneBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x)


class InPlaceResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        x += self.a(x)
        return self.b(x)


def test_tied_weights_of_which_one_has_a_bias(tmp_path: Path) -> None:
    model = TiedWithOneBias().double()
    run = logix.init("run", model, full(tmp_path), verbose=False)
    with run(data_id=range(5)):
        squared(model, torch.randn(5, 4, dtype=torch.float64)).backward()
    run.finalize()
    assert_rows_add_up(run, model, 5)


def test_an_activation_that_is_changed_in_place_after_it_was_read(tmp_path: Path) -> None:
    model, x = InPlaceResidual().double(), torch.randn(5, 4, dtype=torch.float64)
    run = logix.init("run", model, full(tmp_path), verbose=False)
    run.extract([x], squared, progress=False)
    run.finalize()
    rows = run.store.gradients[:].mean(0)
    hidden = torch.tanh(x)
    weight = model.a.weight.detach().requires_grad_()
    F.linear(hidden + F.linear(hidden, weight), model.b.weight, model.b.bias).square().sum(1).mean().backward()
    assert torch.allclose(run.store.layout.split(rows)["a"], weight.grad, atol=CLOSE)


def test_a_weight_that_is_also_used_without_its_module(tmp_path: Path) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.a(x)), self.a.weight)

    model = Functional()
    run = logix.init("run", model, root=str(tmp_path), verbose=False)
    with pytest.warns(RuntimeWarning, match="rows of a do not add up"), run(data_id=range(3)):
        squared(model, torch.randn(3, 4)).backward()
    run.finalize()


def test_a_backward_pass_that_makes_a_graph_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    run = logix.init("run", model, root=str(tmp_path), verbose=False)
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(CaptureError, match="create_graph=True"), run(data_id=range(3)):
        torch.autograd.grad(squared(model, x), x, create_graph=True)
    run.finalize()


def test_two_batches_of_queries_at_each_checkpoint(tmp_path: Path) -> None:
    model, (x, y) = network(), data()
    run = trained_run(tmp_path, model, epochs=2, lr=0.5, checkpoints="every_epoch")

    def loss_fn(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(network(batch[0]), batch[1])

    first, second = (x[:2], y[:2]), (x[2:4], y[2:4])
    for _ in run.at_checkpoints():
        one, two = run.query_fn(first, loss_fn), run.query_fn(second, loss_fn)
    for found, batch in ((one, first), (two, second)):
        alone = run.query_fn(batch, loss_fn, checkpoints="all")
        assert torch.equal(found.gradients.gradients, alone.gradients.gradients)
        assert "2 checkpoints" in found.gradients.note


def test_a_query_inside_a_block_is_refused(tmp_path: Path) -> None:
    model = network()
    run = logix.init("run", model, root=str(tmp_path), verbose=False)
    with pytest.raises(CaptureError, match="a query inside it"), run(data_id=range(4)), run.query(data_id=["q"]):
        pass
    run.finalize()


def test_a_block_is_used_once(tmp_path: Path) -> None:
    model = network()
    run = logix.init("run", model, root=str(tmp_path), verbose=False)
    x, y = data()
    block = run(data_id=range(4))
    with block:
        F.cross_entropy(model(x[:4]), y[:4]).backward()
    with pytest.raises(CaptureError, match="entered before"), block:
        pass
    with run(data_id=range(4)):
        F.cross_entropy(model(x[:4]), y[:4]).backward()
        run.end()
    run(data_id=range(4))  # never entered: of no consequence
    run.start(data_id=range(4))
    run.abort()
    log(run, model)
    run.finalize()
    assert len(run.store) == 12


def test_a_scaler_that_is_updated_inside_the_block(tmp_path: Path) -> None:
    model, (x, y) = network(), data()
    expected = own_gradients(model, x[:4], y[:4])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    run = logix.init("run", model, full(tmp_path), verbose=False)
    with run(data_id=range(4), scaler=scaler):
        scaler.scale(F.cross_entropy(model(x[:4]), y[:4])).backward()
        scaler.step(optimizer)
        scaler.update()
    run.finalize()
    assert torch.allclose(run.store.gradients[:].double(), expected, rtol=1e-6, atol=1e-9)


def test_overwriting_touches_nothing_before_all_is_well(tmp_path: Path) -> None:
    model = network()
    trained_run(tmp_path, model)
    with pytest.raises(ConfigError, match="typo"):
        logix.init("run", model, root=str(tmp_path), overwrite=True, modules={"include": ["typo"]})
    assert len(logix.open_store(tmp_path / "run")) == 23
    with pytest.raises(ConfigError, match="typo"):
        logix.init("new", model, root=str(tmp_path), modules={"include": ["typo"]})
    logix.init("new", model, root=str(tmp_path), verbose=False).finalize()


def test_extracting_into_a_finished_run_is_refused(tmp_path: Path) -> None:
    run = trained_run(tmp_path, network())
    with pytest.raises(StoreError, match="would store nothing"):
        run.extract([], squared)


def test_a_run_that_is_finalized_inside_a_block(tmp_path: Path) -> None:
    model = network()
    run = logix.init("run", model, root=str(tmp_path), verbose=False)
    log(run, model)
    run.start(data_id=["lost"])
    with pytest.warns(RuntimeWarning, match="still open"):
        run.finalize()
    assert len(run.store) == 4
    assert not any(m._forward_hooks for m in model.modules())


def test_every_block_is_a_log_where_nothing_is_stored(tmp_path: Path) -> None:
    model = network()
    run = logix.init("run", model, root=str(tmp_path), every=2, verbose=False)
    log(run, model, ["a", "b", "c", "d"])
    run.save(False)
    log(run, model, ["e", "f", "g", "h"])
    assert run.get_log().data_id == ("e", "f", "g", "h")
    run.finalize()


def test_a_norm_that_only_sounds_like_one_is_left_out() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.rand(4)), 0.5

        def forward(self, x: Tensor) -> Tensor:
            return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight

    selection = select_modules(nn.Sequential(nn.Linear(4, 4), OddRMSNorm()))
    assert [module.name for module in selection.modules] == ["0"]


def test_a_shared_factor_counts_every_reading(tmp_path: Path) -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)

        def forward(self, x: Tensor, both: bool) -> Tensor:
            return self.k(x) + (self.q(x) if both else 0)

    model, x = Sometimes().double(), torch.randn(4, 3, dtype=torch.float64)
    run = logix.init("run", model, full(tmp_path), verbose=False)
    for factor, both in ((1, True), (10, False)):
        with run(data_id=range(4)):
            model(x * factor, both).square().sum(1).mean().backward()
    run.finalize()
    expected = (x.T @ x) * (1 + 100) / 8
    assert torch.allclose(run.store.statistics.kronecker("k").input, expected)


def test_a_bad_sample_does_not_end_a_warm_up(tmp_path: Path) -> None:
    model, (x, y) = network(), data()
    x[2] = float("nan")
    settings = full(tmp_path, projection={"init": "pca", "rank": 3, "warmup": 8})
    run = logix.init("run", model, settings, verbose=False)
    for index in batches():
        with run(data_id=index):
            F.cross_entropy(model(x[index]), y[index]).backward()
    run.finalize()
    assert list(np.flatnonzero(~run.store.valid)) == [2]


def test_a_loaded_run_sees_what_is_committed_later(tmp_path: Path) -> None:
    model, (x, y) = network(), data()
    run = logix.init("run", model, root=str(tmp_path), verbose=False)
    log(run, model, ["a", "b", "c", "d"])
    run.commit()
    reader = logix.load(tmp_path / "run", network())
    with reader.query(data_id=["q"]) as query:
        F.cross_entropy(reader._logbook.tracker.model(x[:1]), y[:1]).backward()
    assert len(reader.compute_influence_all(query).data_id) == 4
    log(run, model, ["e", "f", "g", "h"])
    run.commit()
    assert len(reader.compute_influence_all(query).data_id) == 8
    run.finalize()


def test_resuming_keeps_the_stores_projection_and_says_so(tmp_path: Path) -> None:
    model = network()
    trained_run(tmp_path, model, projection={"rank": 2})
    with pytest.warns(RuntimeWarning, match="resumed store's modules, projection and dtype are kept"):
        run = logix.init("run", model, root=str(tmp_path), resume=True, projection={"rank": 4}, verbose=False)
    assert run.config.projection.rank == 2
    log(run, model)
    run.finalize()
    assert len(run.store) == 27


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight"])
def test_loading_does_not_ask_what_is_trainable_now(tmp_path: Path, frozen: str) -> None:
    model = network()
    model.get_parameter(frozen).requires_grad_(False)
    layout = trained_run(tmp_path, model).store.layout
    for fresh in (network(), network().requires_grad_(False)):
        run = logix.load(tmp_path / "run", fresh)
        assert run._logbook.tracker.layout == layout


def test_names_with_the_characters_of_globs(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("layer[0]", nn.Linear(6, 3).double())
    trained_run(tmp_path, model)
    logix.load(tmp_path / "run", model)


def test_a_query_in_train_mode_leaves_averages_and_random_state_alone(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)).double()
    run = logix.init("run", model, root=str(tmp_path), verbose=False)
    with pytest.warns(RuntimeWarning, match="batch normalisation"):
        log(run, model)
    buffers, state = [b.clone() for b in model.buffers()], torch.get_rng_state()
    x, y = data()
    with pytest.warns(RuntimeWarning, match=r"query was taken in train mode.*\(1, 2\)"), run.query(data_id=range(5)):
        F.cross_entropy(model(x[:5]), y[:5]).backward()
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    run.finalize()


def test_a_batch_of_another_librarys_mapping(tmp_path: Path) -> None:
    model = network()
    run = trained_run(tmp_path, model)
    x, y = data()
    batch = UserDict(x=x[:3], y=y[:3])
    query = run.query_fn(batch, lambda m, b: F.cross_entropy(m(b["x"]), b["y"]))
    assert query.data_id == (0, 1, 2)


def test_arrays_of_either_byte_order_are_ids(tmp_path: Path) -> None:
    model = network()
    run = logix.init("run", model, root=str(tmp_path), verbose=False)
    log(run, model, np.arange(4, dtype=">i4"))
    run.finalize()
    assert list(run.store.data_id) == [0, 1, 2, 3]
