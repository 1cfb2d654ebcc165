"""Exported rows are the store's rows, with their ids and columns, for any tool."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from logix_like.capture.batch import ProjectedBatch
from logix_like.errors import ConfigError, EmptyStoreError, MissingDependencyError
from logix_like.store import export_rows, open_store, supersede_samples
from logix_like.store.upkeep import export
from tests.store.store_runs import WIDTH, new_store, writer

ROWS = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(3))


def visited(path: Path, encoding: str = "bfloat16") -> Path:
    """20 samples twice, with metadata; one row is not finite, one sample was taken back."""
    store, rows = new_store(path, encoding), ROWS.clone()
    rows[5] = torch.inf
    with writer(store, encoding) as out:
        for epoch in range(2):
            for start in range(0, 20, 5):
                ids = tuple(f"s{n}" for n in range(start, start + 5))
                given = {"label": ("cat",) * 5, "weight": (0.5, 1.5, 2.5, 3.5, 4.5)}
                part = rows[20 * epoch + start : 20 * epoch + start + 5]
                out.put(ProjectedBatch(ids, part, step=start, epoch=epoch, metadata=given))
    supersede_samples(store, ["s7"])
    return store


def read(file: Path) -> dict[str, np.ndarray]:
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as archive:
            return dict(archive)
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(file)
    found = {name: table[name].to_numpy() for name in table.column_names if name != "gradients"}
    return found | {"gradients": np.stack(table["gradients"].to_numpy())}


@pytest.mark.parametrize("suffix", export.WRITERS)
@pytest.mark.parametrize("reduce", ["none", "mean", "sum", "last"])
def test_valid_rows_are_written_with_all_they_carry(
    tmp_path: Path, suffix: str, reduce: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "PIECE_BYTES", 7 * WIDTH * 4)
    store, told = visited(tmp_path / "s"), list[tuple[int, int]]()
    count = export_rows(store, tmp_path / f"out{suffix}", reduce=reduce, progress=lambda a, b: told.append((a, b)))
    found, rows = read(tmp_path / f"out{suffix}"), open_store(store).view(reduce)
    kept = np.flatnonzero(rows.valid)
    assert count == len(kept) == (37 if reduce == "none" else 19) and told[-1] == (count, count)
    expected = rows.gradients[kept].numpy()
    expected = expected if rows.factor is None else (expected * rows.factor[kept, None]).astype(np.float32)
    np.testing.assert_array_equal(found["gradients"], expected)
    assert found["data_id"].tolist() == rows.data_id[kept].tolist() and "s7" not in found["data_id"].tolist()
    for name in ("step", "epoch", "norm", "visits"):
        np.testing.assert_array_equal(found[name], getattr(rows, name)[kept])
    assert set(found["metadata_label"].tolist()) == {"cat"} and found["metadata_weight"].dtype == np.float64
    assert not list(tmp_path.glob(".*"))


def test_columns_have_one_plain_type() -> None:
    def column(*values: object) -> np.ndarray:
        array = np.empty(len(values), dtype=object)
        array[:] = values
        return export.plain_column(array)

    assert column(1, 2).dtype == np.int64 and column(1.5, 2).dtype == np.float64
    np.testing.assert_array_equal(column(1, None), [1.0, np.nan])
    assert column("a", 1).tolist() == ["a", "1"] and column(2**70).tolist() == [str(2**70)]
    assert column(None, "x").tolist() == ["", "x"]


def test_what_cannot_be_exported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = visited(tmp_path / "s")
    with pytest.raises(ConfigError, match=r"'out.csv' ends in none of \.npz, \.parquet"):
        export_rows(store, tmp_path / "out.csv")
    for target in (tmp_path / "none" / "out.npz", "s3://bucket/out.npz"):
        with pytest.raises(ConfigError, match="a file in a folder of this machine that exists"):
            export_rows(store, target)
    with pytest.raises(EmptyStoreError, match="no valid row"):
        export_rows(new_store(tmp_path / "empty"), tmp_path / "out.npz")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"logix_like\[parquet\]"):
        export_rows(store, tmp_path / "out.parquet")
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == []


def test_texts_are_kept_to_their_last_letter_in_parquet(tmp_path: Path) -> None:
    """An array of numpy's texts gives each as much room as the longest, and takes zeros at the end for padding."""
    pytest.importorskip("pyarrow.parquet")
    store, long = new_store(tmp_path / "s"), "x" * 10**6
    with writer(store) as out:
        out.put(ProjectedBatch(("a\0", "a", "b"), ROWS[:3], metadata={"text": ("short\0", "", long)}))
    export_rows(store, tmp_path / "out.parquet")
    found = read(tmp_path / "out.parquet")
    assert found["data_id"].tolist() == ["a\0", "a", "b"] and found["metadata_text"].tolist() == ["short\0", "", long]
