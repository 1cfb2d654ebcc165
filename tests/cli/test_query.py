"""What the command answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import logix_like as logix
from logix_like.query.gradients import QueryGradients
from tests.cli.calling import WIDTH, call, refused, usage_error
from tests.training import CLASSES, FEATURES, data, network


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "dott"], "'dott' is none of dot, cosine, relatif, l2"),
        (["--reduce", "max"], "'max' is none of mean, sum, last, none"),
        (["--preconditioner", "x"], "'x' is none of identity, diagonal, covariance, kfac, ekfac, auto"),
        (["--engine", "dask"], "'dask' is none of exact, faiss"),
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


@pytest.mark.parametrize(
    ("damping", "words"),
    [("auto", "damping auto"), (".1", "damping 0.1"), ("absolute:1e-3", "damping 0.001 (absolute)")],
)
def test_a_damping_is_typed(run: logix.Run, queries: Path, damping: str, words: str) -> None:
    told = json.loads(call("query", run.path, "--queries", queries, "--damping", damping, "--json").stdout)
    assert words in told["note"]


@pytest.mark.parametrize("wrong", ["nan", "-1", "much", "absolute:", "absolute:-1", "relative:1", "absolute:auto"])
def test_what_is_no_damping_is_refused(run: logix.Run, queries: Path, wrong: str) -> None:
    assert "auto, or absolute:NUMBER" in usage_error(call("query", run.path, "--queries", queries, "--damping", wrong))
