"""TracIn from stored rows: un-projected, it is TracIn itself where the query's gradient is known at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import logix_like as logix
from logix_like.errors import ConfigError, QueryError, StoreDamagedError, StoreError
from logix_like.estimators.tracin import TracIn
from logix_like.estimators.tracin_rows import TracInRP
from logix_like.query.gradients import QueryGradients
from logix_like.store.format.journal import journals
from logix_like.store.format.schema import write_manifest
from tests.path_runs import BATCH, OBJECTIVE, batch_of, network, queries, train

FLOAT32 = 1e-5


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _asked(run: logix.Run) -> dict[int, QueryGradients]:
    """The queries' gradients at every checkpoint, by its step."""
    found = {}
    for number, record in enumerate(run.store.checkpoints, 1):
        found[record.step] = run.query_fn(queries(), _loss, checkpoints=[number]).gradients
    return found


def test_with_the_query_at_every_step_it_is_tracin(tmp_path: Path) -> None:
    path, _ = train(tmp_path, steps=6, checkpoints={"every_steps": 1})
    run = logix.load(tmp_path / "run", network())
    found = TracInRP(run.store)
    exact = TracIn(path, network(), OBJECTIVE, batch_of)
    assert list(found.data_id) == list(exact.data_id)
    torch.testing.assert_close(found.scores(_asked(run)).double(), exact.scores(queries()), rtol=FLOAT32, atol=1e-7)


def test_one_query_serves_all_steps_and_momentum_counts(tmp_path: Path) -> None:
    train(tmp_path, steps=5, momentum=0.5)
    run = logix.load(tmp_path / "run", network())
    query = run.query_fn(queries(), _loss, checkpoints="last").gradients
    store = run.store
    expected = 0.15 / 0.5 / BATCH * query.gradients.double() @ store.gradients[:].double().T
    found = TracInRP(store)
    columns = [list(found.data_id).index(i) for i in store.data_id]
    total = torch.zeros(4, 24, dtype=torch.float64).index_add_(1, torch.tensor(columns), expected)
    torch.testing.assert_close(found.scores(query).double(), total, rtol=FLOAT32, atol=1e-7)
    own = torch.zeros(24, dtype=torch.float64)
    own.index_add_(0, torch.tensor(columns), 0.3 / BATCH * store.gradients[:].double().square().sum(1))
    torch.testing.assert_close(found.self_influence().double(), own, rtol=FLOAT32, atol=0)


def test_without_a_recorded_path_rows_of_a_step_are_a_mean(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    run = logix.init("run", model, root=str(tmp_path), optimizer=optimizer, verbose=False)
    with run(data_id=["a", "b"]):
        _loss(model, batch_of([0, 1])).backward()
    optimizer.step()
    run.finalize()
    with run.query(data_id=["q"]) as query:
        _loss(model, batch_of([2])).backward()
    expected = 0.1 * query.gradients.gradients.float() @ run.store.gradients[:].T
    found = TracInRP(run.store).scores(query.gradients)
    torch.testing.assert_close(found, expected, rtol=FLOAT32, atol=1e-7)


def test_without_a_recorded_path_the_optimizer_is_known_all_the_same(tmp_path: Path) -> None:
    def logged(kind: str, **settings: float) -> logix.GradientStore:
        model = network()
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.2, **settings)
        run = logix.init(f"{kind}-{settings}", model, root=str(tmp_path), optimizer=optimizer, verbose=False)
        with run(data_id=["a", "b"]):
            _loss(model, batch_of([0, 1])).backward()
        run.finalize()
        return run.store

    plain, momentum = TracInRP(logged("SGD")), TracInRP(logged("SGD", momentum=0.75))
    torch.testing.assert_close(momentum.self_influence(), 4 * plain.self_influence())
    with pytest.raises(ConfigError, match=r"used AdamW, .* use TracIn or TracInCP"):
        TracInRP(logged("AdamW"))
    with pytest.raises(ConfigError, match="'Rprop' has no known update rule; known are SGD"):
        TracInRP(logged("Rprop"))
    store = logged("SGD", weight_decay=0.1)
    write_manifest(store.path, store.manifest.described(optimizer={}))  # as an earlier version left it
    with pytest.warns(RuntimeWarning, match="does not know which optimizer trained"):
        TracInRP(logix.open_store(store.path))


def test_a_query_is_taken_as_the_run_gave_it(tmp_path: Path) -> None:
    train(tmp_path, steps=2)
    run = logix.load(tmp_path / "run", network())
    query = run.query_fn(queries(), _loss)
    found = TracInRP(run.store)
    assert torch.equal(found.scores(query), found.scores(query.gradients))
    assert torch.equal(found.scores({0: query}), found.scores(query))


def test_what_cannot_be_told_from_rows_is_said(tmp_path: Path) -> None:
    train(tmp_path, "Adam", steps=2, lr=0.01)
    with pytest.raises(ConfigError, match=r"used Adam, .* use TracIn or TracInCP"):
        TracInRP(logix.open_store(tmp_path / "run"))
    with logix.init("plain", network(), root=str(tmp_path), verbose=False) as run:
        with pytest.raises(StoreError, match="holds no row"):
            TracInRP(run.store)
        with run(data_id=[0, 1]):
            _loss(run._logbook.tracker.model, batch_of([0, 1])).backward()
    with pytest.raises(StoreError, match=r"no learning rate, .* init\(optimizer=...\)"):
        TracInRP(run.store)
    train(tmp_path / "sgd", steps=2)
    estimator = TracInRP(logix.open_store(tmp_path / "sgd" / "run"))
    with pytest.raises(QueryError, match="there is no query"):
        estimator.scores({})


def test_a_step_taken_again_counts_its_own_rows_alone(tmp_path: Path) -> None:
    def go(ids: list[int], **options: Any) -> logix.Run:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        config = {"root": str(tmp_path), "projection": {"init": "identity"}}
        run = logix.init("run", model, config, optimizer=optimizer, verbose=False, **options)
        with run(data_id=ids):
            _loss(model, batch_of(ids)).backward()
        optimizer.step()
        run.finalize()
        return run

    go([0, 1, 2])
    run = go([3, 4], resume=True, resume_step=0)
    found = TracInRP(run.store)
    squares = run.store.norm[run.store.valid] ** 2
    assert list(found.data_id) == [3, 4]
    torch.testing.assert_close(found.self_influence(), torch.tensor(0.2 / 2 * squares).float(), rtol=1e-2, atol=0)


def test_a_damaged_path_is_not_taken_for_none(tmp_path: Path) -> None:
    train(tmp_path, steps=3)
    (journal,) = journals(tmp_path / "run")
    journal.write_bytes(journal.read_bytes().replace(b'"step":1', b'"step":5'))
    with pytest.raises(StoreDamagedError, match="the record is damaged"):
        TracInRP(logix.open_store(tmp_path / "run"))


def test_groups_of_different_rates_are_refused(tmp_path: Path) -> None:
    train(tmp_path, steps=2, head_lr=0.5)
    with pytest.raises(ConfigError, match="groups differ in lr; projected rows need one for all: use TracIn"):
        TracInRP(logix.open_store(tmp_path / "run"))
