"""The snippets that users copy run as they are printed, in the README too."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import logix_like as logix
from tests.training import data, network, trained_run

ROOT = Path(__file__).parents[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def image_names() -> dict[str, Any]:
    model = network(torch.float32)
    x, y = data(torch.float32)
    batches = [(x[i : i + 5], y[i : i + 5], list(range(i, min(i + 5, len(x))))) for i in range(0, len(x), 5)]
    return {
        "model": model,
        "loader": batches,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_fn": F.cross_entropy,
        "x_test": x[:2],
        "y_test": y[:2],
    }


def test_the_three_lines_and_the_questions(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = image_names()
    three_lines, questions = SNIPPETS[0], SNIPPETS[1]
    exec(three_lines, names)
    exec(questions, {**names, "logix": logix})
    assert "proponent, helpful" in capsys.readouterr().out
    assert len(logix.InfluenceResult.load("answer.json").proponents(10).ids[0]) == 10
    assert "q0" in Path("answer.html").read_text(encoding="utf-8")


def test_the_snippet_of_logix(workplace: Path) -> None:
    Path("config.yaml").write_text("projection: {rank: 4}\n", encoding="utf-8")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 20))
    texts = torch.randint(20, (12, 5))

    def loss_fn(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = batch["input_ids"]
        return F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:])

    names: dict[str, Any] = {
        "logix": logix,
        "model": model,
        "loss_fn": loss_fn,
        "loader": [{"input_ids": texts[i : i + 4]} for i in range(0, 12, 4)],
        "test_batch": {"input_ids": texts[:2]},
    }
    exec(SNIPPETS[2], names)
    run = names["run"]
    assert len(run.store) == 12
    result = run.compute_influence_all(run.get_log())
    assert result.scores.shape == (2, 12)
    # A query that is a training sample is its own strongest proponent.
    assert [result.proponents(1).ids[q, 0] for q in range(2)] == list(run.get_log().data_id)
    own = run.compute_self_influence(run.get_log())
    assert np.all(np.asarray(own.scores) > 0)


def test_the_slide_without_watching_a_model_says_so(workplace: Path) -> None:
    run = logix.init(project="myproject")
    run.setup({"grad": ["log", "covariance"]})
    run.save(True)
    with pytest.raises(logix.LogixError, match="watch"):
        run.start(data_id=torch.zeros(2, 3, dtype=torch.long))


def test_a_new_process_needs_only_the_path_and_the_model(tmp_path: Path) -> None:
    model = network()
    run = trained_run(tmp_path, model, epochs=2)
    x, y = data()
    with run.query(data_id=["q0", "q1"]) as query:
        F.cross_entropy(model(x[:2]), y[:2]).backward()
    expected = run.compute_influence_all(query).scores
    torch.save(model.state_dict(), tmp_path / "model.pt")
    script = (
        "import sys, torch, numpy as np, torch.nn.functional as F, logix_like as logix\n"
        "from tests.training import network, data\n"
        "model, (x, y) = network(), data()\n"
        f"model.load_state_dict(torch.load({str(tmp_path / 'model.pt')!r}, weights_only=True))\n"
        f"run = logix.load({str(tmp_path / 'run')!r}, model=model)\n"
        "with run.query(data_id=['q0', 'q1']) as query:\n"
        "    F.cross_entropy(model(x[:2]), y[:2]).backward()\n"
        f"np.save({str(tmp_path / 'scores.npy')!r}, run.compute_influence_all(query).scores)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, cwd=tmp_path, env=environment)
    assert np.load(tmp_path / "scores.npy") == pytest.approx(np.asarray(expected), rel=1e-5)


def test_logging_may_be_switched_off_and_on(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    run = logix.init("run", model, root=str(tmp_path), verbose=False)

    def step(name: str) -> None:
        with run(data_id=[name]):
            model(torch.ones(1, 3)).sum().backward()

    step("a")
    run.save(False)
    step("b")
    assert run.get_log().data_id == ("b",)
    run.save(True)
    step("c")
    run.commit()
    assert list(run.store.data_id[:]) == ["a", "c"]
    run.finalize()
    step("d")
    assert run.get_log().data_id == ("d",)
    assert list(run.store.data_id[:]) == ["a", "c"]


def test_visits_are_averaged_and_statistics_cover_all_of_them(tmp_path: Path) -> None:
    model = network()
    run = trained_run(tmp_path, model, epochs=3, lr=0.5, store={"dtype": "float64"})
    store = run.store
    assert len(store) == 3 * 23
    assert store.statistics.rows == 3 * 23
    view = store.view("mean")
    assert list(view.data_id[:]) == [f"s{i}" for i in range(23)]
    assert torch.allclose(view.gradients[:], store.gradients[:].view(3, 23, -1).mean(0), atol=1e-12)
    x, y = data()
    with run.query(data_id=["q"]) as query:
        F.cross_entropy(model(x[:1]), y[:1]).backward()
    every = run.compute_influence_all(query, reduce="none", preconditioner="identity")
    mean = run.compute_influence_all(query, preconditioner="identity")
    total = run.compute_influence_all(query, reduce="sum", preconditioner="identity")
    by_visit = np.asarray(every.scores).reshape(3, 23)
    assert np.asarray(mean.scores)[0] == pytest.approx(by_visit.mean(0), rel=1e-5, abs=1e-8)
    assert np.asarray(total.scores)[0] == pytest.approx(by_visit.sum(0), rel=1e-5, abs=1e-8)


def test_queries_are_averaged_over_checkpoints(tmp_path: Path) -> None:
    model = network()
    run = trained_run(tmp_path, model, epochs=3, lr=0.5, checkpoints="every_epoch")
    x, y = data()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert [record.epoch for record in run.store.checkpoints] == [0, 1, 2]
    separate = []
    for model_then in run.at_checkpoints("all"):
        assert model_then is model
        rows = run.query_fn((x[:2], y[:2]), lambda m, b: F.cross_entropy(m(b[0]), b[1]))
        separate.append(rows.gradients.gradients.clone())
        with run.query(data_id=["a", "b"]) as query:
            F.cross_entropy(model(x[:2]), y[:2]).backward()
    in_one_call = run.query_fn(
        (x[:2], y[:2]), lambda m, b: F.cross_entropy(m(b[0]), b[1]), data_id=["a", "b"], checkpoints="all"
    )
    # Inside the loop equal ids are averaged as they come: means of the first one, two and three checkpoints.
    assert torch.allclose(query.gradients.gradients, separate[-1])
    assert torch.equal(query.gradients.gradients, in_one_call.gradients.gradients)
    assert "3 checkpoints" in run.compute_influence_all(query).note
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_come_back_when_the_loop_is_left_early(tmp_path: Path) -> None:
    model = network()
    run = trained_run(tmp_path, model, epochs=2, lr=0.5, checkpoints="every_epoch")
    weight = next(model.parameters())
    before = weight.clone()

    def leave() -> None:
        for _ in run.at_checkpoints():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert torch.equal(weight, before)


def test_checkpoints_every_n_steps(tmp_path: Path) -> None:
    model = network()
    run = trained_run(tmp_path, model, epochs=1, checkpoints={"every_steps": 2})
    assert [record.step for record in run.store.checkpoints] == [2, 4, 5]


def test_what_is_tracked_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 40), nn.LSTM(3, 3))
    logix.init("run", model, root=str(tmp_path))
    said = capsys.readouterr().err
    assert "2 modules, 200 numbers (400 bytes as bfloat16) a sample" in said
    assert "% of the model's" in said
    assert "capped" in said
