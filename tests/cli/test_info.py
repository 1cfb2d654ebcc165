"""What the command tells of a store."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F

import logix_like as logix
from logix_like.store import create_store
from tests.cli.calling import WIDTH, call, refused
from tests.training import data, network


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


def test_a_folder_of_stores_names_those_in_it(tmp_path: Path) -> None:
    for name in ("mnist", "bert"):
        create_store(tmp_path / name, {"project": name})
    (tmp_path / "notes").mkdir()
    said = " ".join(refused(call("info", tmp_path)).split())
    assert "holds no store" in said and said.endswith("in it are the stores bert, mnist")
    assert "in it" not in refused(call("info", tmp_path / "notes"))


def test_info_tells_of_curvatures_and_what_was_taken_back_from_under_them(tmp_path: Path) -> None:
    model = network()
    x, y = data()
    statistics = ["covariance", "curvature"]
    with logix.init("bent", model, root=tmp_path, verbose=False, statistics=statistics) as run:
        for start in (0, 4, 8):
            with run(data_id=range(start, start + 4)):
                F.cross_entropy(model(x[start : start + 4]), y[start : start + 4]).backward()
        run.fit_curvature([(x, y)], kind="kfac", progress=False)
    lines = [line.split() for line in call("info", run.path).stdout.splitlines()]
    assert ["default", "kfac", "sampled", str(len(x))] in lines
    assert ["training", "ekfac", "empirical", "8"] in lines
    assert "superseded" not in call("info", run.path).stdout
    run.forget([1])
    found = call("info", run.path)
    assert "some of the 1 superseded rows are in what the training gathered still" in found.stdout
    (run.path / "curvature" / "default.safetensors").write_bytes(b"torn")
    told = json.loads(call("info", run.path, "--json").stdout)["curvatures"]
    assert [(one["name"], one["kind"], one["gathered"]) for one in told] == [
        ("default", "damaged", False),
        ("training", "ekfac", True),
    ]
