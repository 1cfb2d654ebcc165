"""Queries as files: what is read is what was written, and nothing else is taken for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logix_like.errors import QueryError
from logix_like.layout import Layout, ModuleBlock
from logix_like.query.gradients import QueryGradients

LAYOUT = Layout(
    [
        ModuleBlock("first", "linear", (4, 3), (2, 3), 0, "first"),
        ModuleBlock("layers.1", "conv", (5, 9), (2, 2), 6, "first", tied=("head",), parameters=45),
    ]
)
IDS = ("q0", 7, "7", "", "naïve ✓\x00", 2**70)
HEADER = {"format": "logix_like.queries", "version": 1, "layout": LAYOUT.to_json()}


def gradients(dtype: torch.dtype = torch.float32) -> QueryGradients:
    values = torch.randn(len(IDS), LAYOUT.width, dtype=torch.float64).to(dtype)
    return QueryGradients(IDS, values, LAYOUT, "mean over 3 checkpoints", "0123abcd")


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def header(**changes: object) -> np.ndarray:
    return np.frombuffer(json.dumps(HEADER | changes).encode(), np.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_read_is_what_was_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = gradients(dtype)
    path = saved.save(tmp_path / "queries.npz")
    read = QueryGradients.load(path)
    assert read.data_id == IDS
    assert [type(one) for one in read.data_id] == [type(one) for one in IDS]
    assert torch.equal(read.gradients, saved.gradients)
    assert read.gradients.dtype == dtype
    assert read.layout == LAYOUT
    assert (read.note, read.projections) == (saved.note, "0123abcd")
    assert [file.name for file in tmp_path.iterdir()] == ["queries.npz"]


def test_half_precision_is_widened(tmp_path: Path) -> None:
    saved = gradients(torch.bfloat16)
    read = QueryGradients.load(saved.save(str(tmp_path / "queries.npz")))
    assert torch.equal(read.gradients, saved.gradients.float())


def test_the_file_keeps_its_own_module_table(tmp_path: Path) -> None:
    other = Layout([ModuleBlock("other", "linear", (2, 5), (2, 5), 0, "other")])
    assert QueryGradients.load(gradients().save(tmp_path / "queries.npz"), other).layout == LAYOUT


@pytest.mark.parametrize("ids", [np.array(["a", "b"]), np.array([3, 4])])
@pytest.mark.parametrize("dtype", ["float16", "float32", ">f8", "int64"])
def test_a_file_made_elsewhere_needs_a_module_table(tmp_path: Path, ids: np.ndarray, dtype: str) -> None:
    values = np.arange(20, dtype=dtype).reshape(2, 10)
    path = write(tmp_path / "queries.npz", data_id=ids, gradients=values)
    read = QueryGradients.load(path, LAYOUT)
    assert read.data_id == tuple(ids.tolist())
    assert read.gradients.tolist() == values.tolist()
    with pytest.raises(QueryError, match=r"does not say which modules .* give layout=store.modules"):
        QueryGradients.load(path)


def test_a_width_that_is_not_the_layouts(tmp_path: Path) -> None:
    path = write(tmp_path / "queries.npz", data_id=np.arange(2), gradients=np.zeros((2, 9)))
    with pytest.raises(QueryError, match=r"shape \(2, 9\).* need \(2, 10\)"):
        QueryGradients.load(path, LAYOUT)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(QueryError, match=r"there are no queries at .*save some with query\.gradients\.save"):
        QueryGradients.load(tmp_path / "queries.npz")


@pytest.mark.parametrize("name", ["queries.json", "queries"])
def test_another_suffix(tmp_path: Path, name: str) -> None:
    with pytest.raises(QueryError, match=r"queries are kept as \.npz"):
        gradients().save(tmp_path / name)
    with pytest.raises(QueryError, match=r"queries are kept as \.npz"):
        QueryGradients.load(tmp_path / name)


@pytest.mark.parametrize(
    "arrays",
    [
        {"gradients": np.zeros((2, 10))},
        {"data_id": np.arange(2)},
        {"data_id": np.array(["a", None]), "gradients": np.zeros((2, 10))},  # would have to be unpickled
        {"data_id": np.zeros(2), "gradients": np.zeros((2, 10))},
        {"data_id": np.zeros((2, 1), int), "gradients": np.zeros((2, 10))},
        {"data_id": np.arange(2), "gradients": np.zeros((2, 10), complex)},
        {"data_id": np.arange(2), "gradients": np.array([["x"] * 10] * 2)},
        {"data_id": np.arange(2), "gradients": np.zeros((2, 10)), "header": header(format="logix_like.influence")},
        {"data_id": np.arange(2), "gradients": np.zeros((2, 10)), "header": header(version=2)},
        {"data_id": np.arange(2), "gradients": np.zeros((2, 10)), "header": header(layout=[{"name": "x"}])},
        {"data_id": np.arange(2), "gradients": np.zeros((2, 10)), "header": np.frombuffer(b"[1]", np.uint8)},
        {"data_id": np.arange(2), "gradients": np.zeros((2, 10)), "header": np.frombuffer(b"\xff", np.uint8)},
    ],
)
def test_something_else_is_refused(tmp_path: Path, arrays: dict[str, Any]) -> None:
    path = write(tmp_path / "queries.npz", **arrays)
    with pytest.raises(QueryError, match=r"queries\.npz cannot be read as queries"):
        QueryGradients.load(path, LAYOUT)


@pytest.mark.parametrize("kept", [0, 10, 200, -1])
def test_half_a_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = gradients().save(tmp_path / "queries.npz")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(QueryError, match="cannot be read as queries"):
        QueryGradients.load(path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(QueryError, match=r"there is no folder .*nowhere; create it first"):
        gradients().save(tmp_path / "nowhere" / "queries.npz")


def test_a_file_of_before_has_no_projections(tmp_path: Path) -> None:
    path = write(tmp_path / "queries.npz", data_id=np.arange(2), gradients=np.zeros((2, 10)), header=header())
    assert QueryGradients.load(path).projections == ""


def test_another_kind_of_file_is_named_without_advice_to_unpickle_it(tmp_path: Path) -> None:
    (tmp_path / "queries.npz").write_text("not at all")
    with pytest.raises(QueryError, match="it is no npz file") as raised:
        QueryGradients.load(tmp_path / "queries.npz")
    assert "pickle" not in str(raised.value)
