"""The command line: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner, Result

import logix_like as logix
from logix_like.cli import app
from logix_like.query.gradients import QueryGradients
from tests.training import CLASSES, FEATURES, SAMPLES, batches, data, network

EPOCHS = 2
WIDTH = 8 * (FEATURES + 1) + CLASSES * 9


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def refused(result: Result) -> str:
    """The one line that an error is."""
    assert result.exit_code == 1
    assert result.stdout == ""
    line, end = result.stderr.split("\n")
    assert end == ""
    assert line.startswith("error: ")
    return line


def usage_error(result: Result) -> str:
    assert result.exit_code == 2
    return " ".join(result.stderr.replace("│", " ").split())


def logged(root: Path, names: Sequence[str | int]) -> logix.Run:
    model = network(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = logix.init("cli", model, optimizer=optimizer, root=root, checkpoints="every_epoch", verbose=False)
    x, y = data(torch.float32)
    for epoch in range(EPOCHS):
        run.epoch(epoch)
        for ids in batches():
            with run(data_id=[names[i] for i in ids.tolist()]):
                F.cross_entropy(model(x[ids]), y[ids]).backward()
            optimizer.step()
            optimizer.zero_grad()
    run.finalize()
    with run.query(data_id=["first", 2]):
        F.cross_entropy(model(x[:2]), y[:2]).backward()
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> logix.Run:
    return logged(tmp_path_factory.mktemp("cli"), [f"s{i}" for i in range(SAMPLES - 1)] + [99])


@pytest.fixture(scope="module")
def asked(run: logix.Run) -> QueryGradients:
    generator = torch.Generator().manual_seed(1)
    rows = run.store.gradients[:2] + 0.01 * torch.randn(2, WIDTH, generator=generator)
    return QueryGradients(("first", 2), rows, run.store.modules)


@pytest.fixture
def queries(asked: QueryGradients, tmp_path: Path) -> Path:
    return asked.save(tmp_path / "queries.npz")


# Help


def test_help_names_every_command() -> None:
    result = call("--help")
    assert result.exit_code == 0
    for command in ("demo", "info", "query"):
        assert command in result.stdout


def test_every_help_has_an_example() -> None:
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert {"demo", "info", "query", "report"} <= set(names)
    for command in ([], *([name] for name in names)):
        assert "Example: logix-like " in call(*command, "--help").stdout, command


def test_no_command_shows_the_help() -> None:
    assert "Usage" in (result := call()).stdout + result.stderr


def test_the_version_is_printed() -> None:
    assert call("--version").stdout == f"logix_like {logix.__version__}\n"


# info


def test_info_tells_everything(run: logix.Run) -> None:
    result = call("info", run.path)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["store", str(run.path)] in lines
    assert ["project", "cli"] in lines
    assert ["rows", "46", "of", "23", "samples"] in lines
    assert ["0", "linear", "8", "x", "7", "8", "x", "7", "56"] in lines
    assert ["2", "linear", "3", "x", "9", "3", "x", "9", "27"] in lines
    assert ["0-1", "46", str(len(run.store.writers[0].commits.rows)), "1", "9", "closed"] in lines
    assert "covariance (2 modules), kronecker (2 modules), over 46 of 46 rows" in result.stdout
    assert ["checkpoints", "2:"] in lines
    assert f"{sum(run.store.bytes.values()):,} bytes: " in result.stdout


def test_info_as_json_is_the_same_as_plain_data(run: logix.Run) -> None:
    told = json.loads(call("info", run.path, "--json").stdout)
    assert (told["project"], told["format"], told["library"]) == ("cli", 1, logix.__version__)
    assert (told["rows"], told["samples"], told["numbers"], told["dtype"]) == (46, 23, WIDTH, "bfloat16")
    assert [m["module"] for m in told["modules"]] == ["0", "2"]
    assert told["modules"][0] == {
        "module": "0",
        "kind": "linear",
        "shape": [8, 7],
        "rank": [8, 7],
        "numbers": 56,
        "tied": [],
    }
    assert told["statistics"] == {"covariance": 2, "kronecker": 2}
    assert told["statistics_rows"] == 46
    assert [c["number"] for c in told["checkpoints"]] == [1, 2]
    assert told["bytes"] == dict(run.store.bytes)
    (writer,) = told["writers"]
    assert (writer["rows"], writer["state"], writer["statistics_rows"]) == (46, "closed", 46)


def test_info_counts_rows_that_are_not_finite(tmp_path: Path) -> None:
    model = network(torch.float32)
    run = logix.init("bad", model, root=tmp_path, verbose=False)
    x, y = data(torch.float32)
    x[3] = float("nan")
    with run(data_id=range(5)):
        F.cross_entropy(model(x[:5]), y[:5]).backward()
    run.finalize()
    assert "5 of 5 samples (1 not finite: left out of scores)" in call("info", run.path).stdout


def test_info_of_a_store_without_rows(tmp_path: Path) -> None:
    run = logix.init("empty", network(), root=tmp_path, verbose=False)
    run.finalize()
    assert "nothing was logged yet" in call("info", run.path).stdout
    told = json.loads(call("info", run.path, "--json").stdout)
    assert (told["rows"], told["modules"], told["writers"], told["dtype"]) == (0, [], [], None)


def test_info_refuses_what_is_no_store(tmp_path: Path) -> None:
    assert f"{tmp_path} holds no store" in refused(call("info", tmp_path))
    assert "holds no store" in refused(call("info", tmp_path / "nothing"))


# query


def test_query_answers_as_the_library_does(run: logix.Run, asked: QueryGradients, queries: Path) -> None:
    expected = run.compute_influence_all(asked, k=3)
    told = json.loads(call("query", run.path, "--queries", queries, "-k", 3, "--json").stdout)
    assert told["note"] == expected.note
    assert [one["query_id"] for one in told["queries"]] == ["first", 2]
    for number, one in enumerate(told["queries"]):
        for side, ranking in (("proponents", expected.proponents()), ("opponents", expected.opponents())):
            assert [line["data_id"] for line in one[side]] == ranking.ids[number].tolist()
            assert [line["score"] for line in one[side]] == ranking.scores[number].tolist()


def test_query_prints_as_many_samples_as_were_asked_for(run: logix.Run, queries: Path) -> None:
    lines = call("query", run.path, "--queries", queries, "-k", 7).stdout.splitlines()
    start = lines.index("query first")
    assert lines[start + 1].split() == ["proponents", "score", "opponents", "score"]
    assert lines[start + 2].split()[0] == "s0"  # its own gradient, but for a little noise
    assert lines[start + 9] == ""
    assert any("A positive score means that training on the sample lowered" in line for line in lines)


def test_query_passes_its_options_on(run: logix.Run, queries: Path) -> None:
    options = ("--preconditioner", "kfac", "--damping", 0.5, "--mode", "cosine", "--reduce", "last")
    told = json.loads(call("query", run.path, "--queries", queries, *options, "--json").stdout)
    for words in ("cosine score", "kfac (2 modules)", "damping 0.5", "each its last visit", "exact engine"):
        assert words in told["note"]


def test_visits_are_named_with_their_step(run: logix.Run, queries: Path) -> None:
    told = json.loads(call("query", run.path, "--queries", queries, "--reduce", "none", "--json").stdout)
    assert all(0 <= line["step"] < 10 for line in told["queries"][0]["proponents"])


def test_fewer_samples_than_are_shown_by_default(tmp_path: Path) -> None:
    model = network(torch.float32)
    run = logix.init("few", model, root=tmp_path, verbose=False)
    x, y = data(torch.float32)
    with run(data_id=range(4)):
        F.cross_entropy(model(x[:4]), y[:4]).backward()
    run.finalize()
    saved = run.get_log().save(tmp_path / "queries.npz")
    told = json.loads(call("query", run.path, "--queries", saved, "--json").stdout)
    assert len(told["queries"]) == len(told["queries"][0]["proponents"]) == 4
    assert "there are only 4 samples" in refused(call("query", run.path, "--queries", saved, "-k", 5))


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_an_answer_is_saved(run: logix.Run, asked: QueryGradients, queries: Path, tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"answer{suffix}"
    result = call("query", run.path, "--queries", queries, "-k", 3, "--output", output)
    assert result.stderr == f"saved to {output}\n"
    saved, expected = logix.InfluenceResult.load(output), run.compute_influence_all(asked, k=3)
    assert (saved.proponents().ids == expected.proponents().ids).all()
    assert torch.equal(saved.opponents().scores, expected.opponents().scores)


def test_an_answer_is_saved_as_a_page(run: logix.Run, queries: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    result = call("query", run.path, "--queries", queries, "--output", tmp_path / "answer.html")
    assert result.exit_code == 0
    assert "s0" in (tmp_path / "answer.html").read_text()


def test_a_file_made_by_hand_is_answered_alike(
    run: logix.Run, asked: QueryGradients, queries: Path, tmp_path: Path
) -> None:
    by_hand = tmp_path / "hand.npz"
    np.savez(by_hand, data_id=np.array(["first", "second"]), gradients=asked.gradients.numpy())
    told, expected = (
        json.loads(call("query", run.path, "--queries", file, "--json").stdout) for file in (by_hand, queries)
    )
    assert [one["query_id"] for one in told["queries"]] == ["first", "second"]
    assert [one["proponents"] for one in told["queries"]] == [one["proponents"] for one in expected["queries"]]


def test_a_file_of_another_width_is_refused(run: logix.Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "hand.npz", data_id=np.arange(2), gradients=np.zeros((2, 5)))
    line = refused(call("query", run.path, "--queries", tmp_path / "hand.npz"))
    assert f"shape (2, 5); 2 ids and rows of {WIDTH} numbers need (2, {WIDTH})" in line


def test_queries_of_another_model_are_refused_by_name(run: logix.Run, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(FEATURES, 8), torch.nn.Tanh(), torch.nn.Linear(8, CLASSES + 1))
    other = logix.init("other", model, root=tmp_path, verbose=False)
    with other(data_id=["q"]):
        model(torch.ones(1, FEATURES)).sum().backward()
    saved = other.get_log().save(tmp_path / "queries.npz")
    other.finalize()
    assert "module '2' of this model differs" in refused(call("query", run.path, "--queries", saved))


def test_an_empty_store_is_refused(tmp_path: Path, queries: Path) -> None:
    run = logix.init("empty", network(), root=tmp_path, verbose=False)
    run.finalize()
    assert "the store holds no rows" in refused(call("query", run.path, "--queries", queries))


def test_an_output_that_cannot_be_written_is_one_line(run: logix.Run, queries: Path, tmp_path: Path) -> None:
    result = call("query", run.path, "--queries", queries, "--output", tmp_path / "missing" / "answer.json")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "missing" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "dott"], "'dott' is none of dot, cosine, relatif, l2"),
        (["--reduce", "max"], "'max' is none of mean, sum, last, none"),
        (["--preconditioner", "x"], "'x' is none of identity, diagonal, covariance, kfac, ekfac, auto"),
        (["--engine", "x"], "'x' is none of exact, faiss"),
        (["--output", "answer.txt"], "'answer.txt' ends in none of .json, .npz, .html"),
        (["-k", 0], "Invalid value for '-k'"),
        (["--damping", -1], "Invalid value for '--damping'"),
    ],
)
def test_wrong_usage(run: logix.Run, queries: Path, options: list[object], message: str) -> None:
    assert message in usage_error(call("query", run.path, "--queries", queries, *options))


def test_wrong_usage_of_arguments(run: logix.Run, tmp_path: Path) -> None:
    assert "does not exist" in usage_error(call("query", run.path, "--queries", tmp_path / "missing.npz"))
    assert "--queries" in usage_error(call("query", run.path))
    assert "frobnicate" in usage_error(call("frobnicate"))
    usage_error(call("info"))


# report


def test_a_report_with_contents(run: logix.Run, queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "contents_of_samples.py").write_text("def text(data_id):\n    return f'words of {data_id}'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    output = tmp_path / "answer.html"
    data = ("--data", "contents_of_samples:text")
    result = call("report", run.path, "--queries", queries, "--output", output, "-k", 3, *data)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", f"saved to {output}\n")
    page = output.read_text(encoding="utf-8")
    for words in (
        "words of s0",
        "visits 2",
        "46 rows of 23 samples",
        "How concentrated influence is",
        "Where in the model",
    ):
        assert words in page


def test_a_report_asks_as_it_is_told(run: logix.Run, queries: Path, tmp_path: Path) -> None:
    output = tmp_path / "answer.html"
    told = ("--preconditioner", "identity", "--damping", "auto", "--mode", "cosine", "--reduce", "none")
    result = call("report", run.path, "--queries", queries, "--output", output, *told)
    assert result.exit_code == 0, result.stderr
    page = output.read_text(encoding="utf-8")
    assert "cosine, in the curvature “identity”" in page and "<span>step " in page


def test_a_damping_is_a_number_or_auto(run: logix.Run, queries: Path) -> None:
    assert call("query", run.path, "--queries", queries, "--damping", "auto").exit_code == 0
    for wrong in ("nan", "-1", "much"):
        refused = usage_error(call("query", run.path, "--queries", queries, "--damping", wrong))
        assert "neither a number of at least 0 nor auto" in refused


def test_what_is_no_function_is_said(run: logix.Run) -> None:
    assert "it must be a function" in usage_error(call("plan", "--model", "sys:path", "--samples", 1))
    assert "it must be a function" in usage_error(call("serve", run.path, "--model", "sys:path"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "is not of the form module:name"),
        ("no_such_module:x", "there is no module 'no_such_module'"),
        ("json:no_such_name", "'json' has no 'no_such_name'"),
    ],
)
def test_contents_that_are_not_there(run: logix.Run, queries: Path, name: str, message: str) -> None:
    assert message in usage_error(call("report", run.path, "--queries", queries, "--data", name))


# plan


def test_a_plan_for_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "from torch import nn", "def build():", "    return nn.Linear(1000, 1000)", "def wrong():", "    return 3"
    (tmp_path / "model_to_plan.py").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ("--samples", 1000, "--epochs", 2)
    told = json.loads(call("plan", "--model", "model_to_plan:build", *arguments, "--json").stdout)
    assert (told["modules"], told["numbers"], told["rows"], told["row"]) == (1, 1024, 2000, 2048)
    assert "for 2,000 rows" in call("plan", "--model", "model_to_plan:build", *arguments).stdout
    assert "returned a int; it must return the model" in usage_error(
        call("plan", "--model", "model_to_plan:wrong", *arguments)
    )


# serve


def test_a_port_in_use_is_said(run: logix.Run) -> None:
    pytest.importorskip("starlette")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(call("serve", run.path, "--port", port))
    assert f"port {port} of 127.0.0.1 cannot be used" in line and "--port 0" in line


def test_what_is_no_store_is_not_served(tmp_path: Path) -> None:
    assert "holds no store" in refused(call("serve", tmp_path))


def test_an_address_that_is_not_ours_is_said(run: logix.Run) -> None:
    pytest.importorskip("starlette")
    assert "cannot be used" in refused(call("serve", run.path, "--host", "192.0.2.1"))


def test_serving_needs_its_packages(run: logix.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'logix_like[serve]'" in refused(call("serve", run.path))


def test_a_model_that_is_no_pair_is_said(run: logix.Run) -> None:
    assert "must return (model, loss_fn)" in usage_error(call("serve", run.path, "--model", "builtins:dict"))


# The command itself


HEAVY = ("transformers", "faiss", "pandas", "sklearn", "jinja2", "mlxtend")


def test_the_command_in_a_process_of_its_own(run: logix.Run, tmp_path: Path) -> None:
    code = f"import sys; from logix_like.cli import app; assert not set({HEAVY}) & set(sys.modules); app()"
    command = [sys.executable, "-W", "error", "-c", code, "info"]
    done = subprocess.run([*command, str(run.path), "--json"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["rows"] == 46
    failed = subprocess.run([*command, "nowhere"], capture_output=True, text=True, cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
