"""A stored row is the sample's own gradient, whatever the loop does."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logix_like as logix
from tests.training import SAMPLES, batches, data, full, linear_gradient, network, own_gradients, trained_run

EXACT = 1e-9
NORMS = 1.001
"""R7: largest over smallest ratio of a row's norm to that of the sample's own gradient."""


def log_epoch(run: logix.Run, model: torch.nn.Module, **options: Any) -> None:
    x, y = data(next(model.parameters()).dtype)
    for index in batches():
        with run(data_id=index, **options):
            F.cross_entropy(model(x[index]), y[index]).backward()


def assert_rows(run: logix.Run, expected: Tensor, tolerance: float = EXACT) -> None:
    rows = run.store.gradients[:].double()
    assert rows.shape == expected.shape
    assert float((rows - expected).norm() / expected.norm()) < tolerance


def test_mean_loss_and_an_odd_last_batch(tmp_path: Path) -> None:
    model = network()
    run = logix.init("run", model, full(tmp_path), verbose=False)
    log_epoch(run, model)
    run.finalize()
    assert_rows(run, own_gradients(model, *data()))
    assert list(run.store.data_id[:]) == list(range(SAMPLES))
    assert list(run.store.step[:6]) == [0, 0, 0, 0, 0, 1]


def test_summed_loss(tmp_path: Path) -> None:
    model, (x, y) = network(), data()
    run = logix.init("run", model, full(tmp_path), loss_reduction="sum", verbose=False)
    for index in batches():
        with run(data_id=index):
            F.cross_entropy(model(x[index]), y[index], reduction="sum").backward()
    run.finalize()
    assert_rows(run, own_gradients(model, x, y))


def test_gradient_accumulation_keeps_every_micro_batch(tmp_path: Path) -> None:
    model, (x, y) = network(), data()
    expected = own_gradients(model, x, y)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    run = logix.init("run", model, full(tmp_path), optimizer=optimizer, verbose=False)
    for number, index in enumerate(batches(), 1):
        with run(data_id=index, scale=1 / 2):
            (F.cross_entropy(model(x[index]), y[index]) / 2).backward()
        if number % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
    run.finalize()
    assert_rows(run, expected)
    assert list(run.store.step[::5]) == [0, 0, 1, 1, 2]


def test_a_grad_scaler_is_divided_out(tmp_path: Path) -> None:
    model, (x, y) = network(torch.float32), data(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    run = logix.init("run", model, full(tmp_path), verbose=False)
    for index in batches():
        with run(data_id=index, scaler=scaler):
            scaler.scale(F.cross_entropy(model(x[index]), y[index])).backward()
    run.finalize()
    expected = own_gradients(network(), *data())
    assert_rows(run, expected, 1e-5)


def test_norms_agree_over_batches_accumulation_scaler_and_epochs(tmp_path: Path) -> None:
    model, (x, y) = network(torch.float32), data(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run = logix.init("run", model, full(tmp_path), optimizer=optimizer, verbose=False)
    for _ in range(3):
        for number, index in enumerate(batches(), 1):
            with run(data_id=index, scale=0.5, scaler=scaler):
                scaler.scale(F.cross_entropy(model(x[index]), y[index]) / 2).backward()
            if number % 2 == 0:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    run.finalize()
    expected = own_gradients(network(), *data()).norm(dim=1).repeat(3)
    ratios = run.store.gradients[:].double().norm(dim=1) / expected
    assert float(ratios.max() / ratios.min()) < NORMS
    assert run.store.norm[:] == pytest.approx(expected.numpy(), rel=1e-4)


def token_model() -> tuple[torch.nn.Sequential, Tensor, Tensor, Tensor]:
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9)).double()
    tokens = torch.randint(9, (4, 6))
    mask = torch.arange(6) < torch.tensor([6, 2, 3, 5])[:, None]
    return model, tokens, torch.randint(9, (4, 6)), mask


def token_rows(model: torch.nn.Sequential, tokens: Tensor, labels: Tensor, mask: Tensor, reduction: str) -> Tensor:
    rows = []
    for i in range(len(tokens)):
        model.zero_grad()
        losses = F.cross_entropy(model(tokens[i]), labels[i], reduction="none")[mask[i]]
        getattr(losses, reduction)().backward()
        rows.append(linear_gradient(model[1]).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize(("per_token", "reduction"), [(False, "sum"), (True, "mean")])
def test_token_mean_losses(tmp_path: Path, per_token: bool, reduction: str) -> None:
    model, tokens, labels, mask = token_model()
    settings = full(tmp_path, loss_reduction="token_mean", per_token=per_token)
    run = logix.init("run", model, settings, verbose=False)
    with run(data_id=tokens, mask=mask):
        losses = F.cross_entropy(model(tokens).transpose(1, 2), labels, reduction="none")
        (losses * mask).sum().div(mask.sum()).backward()
    run.finalize()
    assert_rows(run, token_rows(model, tokens, labels, mask, reduction))


def test_padding_does_not_change_the_id_of_a_sequence(tmp_path: Path) -> None:
    model, tokens, labels, mask = token_model()
    run = logix.init("run", model, full(tmp_path), verbose=False)
    longer = torch.cat([tokens * mask, torch.full((4, 2), 7)], 1)
    wider = torch.cat([mask, torch.zeros(4, 2, dtype=torch.bool)], 1)
    for ids, seen in ((tokens, mask), (longer, wider)):
        with run(data_id=ids, mask=seen):
            F.cross_entropy(model(tokens).transpose(1, 2), labels).backward()
    run.finalize()
    hashes = list(run.store.data_id[:])
    assert hashes[:4] == hashes[4:]
    assert len(set(hashes)) == 4
    assert len(hashes[0]) == 32


def test_columns_hold_what_the_loop_said(tmp_path: Path) -> None:
    model, (x, y) = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    run = logix.init("run", model, full(tmp_path), optimizer=optimizer, verbose=False)
    run.epoch(7)
    with torch.no_grad():
        losses = F.cross_entropy(model(x), y, reduction="none")
    with run(data_id=range(SAMPLES), loss=losses, metadata={"label": y.tolist(), "split": ["train"] * SAMPLES}):
        F.cross_entropy(model(x), y).backward()
    run.finalize()
    store = run.store
    assert store.loss[:] == pytest.approx(losses.numpy(), rel=1e-6)
    assert set(store.epoch[:]) == {7}
    assert set(store.lr[:]) == {0.25}
    assert list(store.metadata["label"]) == y.tolist()
    assert set(store.metadata["split"]) == {"train"}


def test_every_third_block_is_logged(tmp_path: Path) -> None:
    model = network()
    run = logix.init("run", model, full(tmp_path), every=3, verbose=False)
    log_epoch(run, model)
    run.finalize()
    assert list(run.store.data_id[:]) == [0, 1, 2, 3, 4, 15, 16, 17, 18, 19]
    assert_rows(run, own_gradients(model, *data())[run.store.data_id[:].astype(int)])


def test_extract_gives_the_rows_of_a_frozen_model_and_restores_it(tmp_path: Path) -> None:
    model, (x, y) = network(), data()
    expected = own_gradients(model, x, y)
    model.append(torch.nn.Dropout(0.5))
    model.train()
    loader = [(x[index], y[index]) for index in batches()]
    run = logix.init("run", model, full(tmp_path), verbose=False)
    run.extract(loader, lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]), progress=False)
    run.finalize()
    assert_rows(run, expected)
    assert list(run.store.data_id[:]) == list(range(SAMPLES))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_pca_rows_wait_for_the_warm_up_and_none_is_lost(tmp_path: Path) -> None:
    model = network()
    settings = full(tmp_path, projection={"init": "pca", "rank": 4, "warmup": 12})
    run = logix.init("run", model, settings, verbose=False)
    log_epoch(run, model)
    run.finalize()
    store = run.store
    assert list(store.data_id[:]) == list(range(SAMPLES))
    expected = own_gradients(model, *data())
    first, second = (store.projections[name] for name in ("0", "2"))
    matrices = expected[:, : 8 * 7].view(-1, 8, 7), expected[:, 8 * 7 :].view(-1, 3, 9)
    projected = [
        (outward.double() @ matrix @ inward.double().T).flatten(1)
        for (inward, outward), matrix in zip((first, second), matrices, strict=True)
    ]
    assert_rows(run, torch.cat(projected, 1))


def test_a_short_run_is_projected_when_it_ends_before_the_warm_up(tmp_path: Path) -> None:
    model = network()
    settings = full(tmp_path, projection={"init": "pca", "rank": 4, "warmup": 1000})
    run = logix.init("run", model, settings, verbose=False)
    log_epoch(run, model)
    with pytest.raises(logix.LogixError, match="first 1000 samples"):
        run.get_log()
    run.finalize()
    assert len(run.store) == SAMPLES


def test_full_rank_orthogonal_projection_leaves_scores_unchanged(tmp_path: Path) -> None:
    x, y = data()
    scores = []
    for init in ("identity", "orthogonal"):
        model = network()
        run = trained_run(tmp_path / init, model, projection={"init": init, "rank": 100}, store={"dtype": "float64"})
        with run.query(data_id=["q"]) as query:
            F.cross_entropy(model(x[:1]), y[:1]).backward()
        scores.append(run.compute_influence_all(query, preconditioner="covariance").scores)
    assert torch.as_tensor(scores[0]) == pytest.approx(torch.as_tensor(scores[1]), rel=1e-4, abs=1e-4)
