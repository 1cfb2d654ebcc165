"""Content of a store from elsewhere, with checksums that fit: nothing is believed that takes memory or shifts rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from logix_like.errors import StoreDamagedError
from logix_like.query.engine import QueryEngine
from logix_like.query.gradients import QueryGradients
from logix_like.statistics import StatisticsAccumulator
from logix_like.store import open_store, verify
from logix_like.store.format.columns import encode_texts
from logix_like.store.format.commits import RowsRecord, format_record, read_commits
from logix_like.store.format.damage import array_file
from logix_like.store.format.documents import sealed
from logix_like.store.places.files import checksum
from logix_like.store.reading import table
from tests.store.store_runs import WIDTH, batches, log, new_store, small_layout, writer


def forged(store: Path, array: str, payload: bytes) -> None:
    """Put ``payload`` into the first chunk of an array, with all checksums as if it had been written so."""
    part = store / "writers/0-1"
    record, crc = read_commits(part).rows[0], checksum(payload)
    array_file(part, record, array).write_bytes(payload + crc.to_bytes(4, "little"))
    rewrite(store, [replace(record, crc={**record.crc, array: crc})])


def rewrite(store: Path, records: list[RowsRecord]) -> None:
    lines = [format_record(record) + b"\n" for record in records]
    (store / "writers/0-1/commits").write_bytes(b"".join(lines))


def labelled(path: Path) -> Path:
    """Five rows with a column of the user's."""
    store = new_store(path)
    with writer(store) as out:
        out.put(next(batches(torch.randn(5, WIDTH), size=5, metadata={"label": (1, 2, 3, 4, 5)})))
    return store


@pytest.mark.usefixtures("one_gibibyte")
@pytest.mark.parametrize("count", [4, 6, 2**31 - 1, 2**32 - 1])
def test_texts_are_counted_before_there_is_room_for_them(tmp_path: Path, count: int) -> None:
    store = labelled(tmp_path / "s")
    forged(store, "data_id", count.to_bytes(4, "little") + encode_texts(["1"] * 5)[4:])
    with pytest.raises(StoreDamagedError, match=f"found {count} texts, expected 5"):
        _ = open_store(store).data_id


@pytest.mark.parametrize("texts", [["1,2", "3"], ["[" * 200_000, "1"], ["[1]", "2"], ['{"a":1}', "2"], ["1]", "[2"]])
def test_metadata_is_one_scalar_for_each_row(tmp_path: Path, texts: list[str]) -> None:
    store = labelled(tmp_path / "s")
    forged(store, "metadata/label", encode_texts([*texts, "3", "4", "5"]))
    with pytest.raises(StoreDamagedError, match="metadata column 'label'"):
        _ = open_store(store).metadata["label"]


@pytest.mark.usefixtures("one_gibibyte")
def test_many_records_that_claim_rows_get_no_room_for_them(tmp_path: Path) -> None:
    store = labelled(tmp_path / "s")
    (record,) = read_commits(store / "writers/0-1").rows
    rewrite(store, [replace(record, sequence=number, rows=table.MANY_ROWS) for number in range(3000)])
    with pytest.raises(StoreDamagedError, match=r"100000 rows by the commit record, has .* bytes"):
        _ = open_store(store).valid


@pytest.mark.parametrize(
    "shapes", [[["encoder.q", [0, 10**30]]], [["encoder.q", [2]]], [["encoder.q", [3]], ["", [5, 5]]]]
)
def test_sums_of_other_shapes_are_refused(tmp_path: Path, shapes: list[tuple[str, list[int]]]) -> None:
    store = new_store(tmp_path / "s")
    with writer(store, statistics=StatisticsAccumulator(small_layout(), ["covariance"])) as out:
        out.put(next(batches(torch.randn(5, WIDTH), size=5)))
    folder = store / "writers/0-1/statistics/1/outer_sum"
    document = json.loads((folder / "zarr.json").read_text())
    document["attributes"]["modules"] = shapes
    (folder / "zarr.json").write_bytes(sealed(document))
    payload = np.ones(sum(int(np.prod(shape, dtype=object)) for _, shape in shapes)).tobytes()
    (folder / "c.0").write_bytes(payload + checksum(payload).to_bytes(4, "little"))
    query = QueryGradients(("q",), torch.randn(1, WIDTH), small_layout())
    with pytest.raises(StoreDamagedError, match="outer_sum"):
        QueryEngine(open_store(store)).influence(query, k=2, preconditioner="covariance")
    assert not verify(store).ok


def test_a_store_with_rows_enough_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "MANY_ROWS", 3)
    monkeypatch.setattr(table, "MANY_ROWS_IN_ALL", 20)
    store, rows = new_store(tmp_path / "s"), torch.randn(70, WIDTH)
    log(store, rows)
    assert open_store(store).gradients[:].equal(rows)
