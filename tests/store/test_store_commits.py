"""The commit record: what is torn is dropped, what is damaged is named, what is crafted does no harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logix_like.errors import LogixError, StoreDamagedError
from logix_like.report.summary import StoreSummary
from logix_like.statistics import StatisticsAccumulator
from logix_like.store import open_store
from logix_like.store.format.commits import CommitLog, RowsRecord, format_record, read_commits
from logix_like.store.places.files import checksum
from tests.store.store_runs import WIDTH, batches, log, new_store, small_layout, writer


def three_commits(path: Path) -> tuple[Path, torch.Tensor, Path]:
    """A store with three committed tails whose writer was never closed, and its record file."""
    store, rows = new_store(path / "s"), torch.randn(30, WIDTH)
    with writer(store) as out:
        for batch in batches(rows, size=10):
            out.put(batch)
            out.commit()
    commits = store / "writers/0-1/commits"
    commits.write_bytes(b"".join(commits.read_bytes().splitlines(keepends=True)[:3]))
    return store, rows, commits


@pytest.mark.parametrize("cut", [1, 2, 30, "all but one"])
def test_a_torn_last_line_is_dropped(tmp_path: Path, cut: int | str) -> None:
    store, rows, commits = three_commits(tmp_path)
    lines = commits.read_bytes().splitlines(keepends=True)
    keep = 1 if isinstance(cut, str) else len(lines[2]) - cut
    commits.write_bytes(lines[0] + lines[1] + lines[2][:keep])
    opened = open_store(store)
    assert opened.gradients[:].equal(rows[:20])
    assert opened.writers[0].commits.torn and opened.writers[0].state == "open"


def test_a_bad_last_line_is_dropped_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, rows, commits = three_commits(tmp_path)
    content = bytearray(commits.read_bytes())
    content[-20] ^= 1
    commits.write_bytes(content)
    opened = open_store(store)
    assert opened.gradients[:].equal(rows[:20])
    assert "last record is damaged, and the rows of that commit are left out" in caplog.text
    assert "last record is damaged" in str(StoreSummary.of(opened))


def test_a_bad_line_before_the_last_is_named(tmp_path: Path) -> None:
    store, _, commits = three_commits(tmp_path)
    intact = commits.read_bytes()
    first = len(intact.splitlines(keepends=True)[0])
    for position in (0, 8, first // 2, first - 2):
        content = bytearray(intact)
        content[position] ^= 4
        commits.write_bytes(content)
        with pytest.raises(StoreDamagedError, match=r"commits, line 1: the record is damaged .* restore"):
            open_store(store)


def test_a_missing_line_is_named(tmp_path: Path) -> None:
    store, _, commits = three_commits(tmp_path)
    lines = commits.read_bytes().splitlines(keepends=True)
    commits.write_bytes(lines[0] + lines[2] + lines[2])
    with pytest.raises(StoreDamagedError, match=r"line 2: .*it has number 2, expected 1"):
        open_store(store)


def test_rows_beyond_the_record_do_not_exist(tmp_path: Path) -> None:
    store, rows, commits = three_commits(tmp_path)
    commits.write_bytes(b"".join(commits.read_bytes().splitlines(keepends=True)[:1]))
    opened = open_store(store)
    assert opened.gradients[:].equal(rows[:10]) and len(opened.data_id) == 10
    commits.write_bytes(b"")
    assert len(open_store(store)) == 0


@pytest.mark.parametrize("array", ["gradients", "columns", "data_id"])
@pytest.mark.parametrize("damage", ["missing", "short", "long", "empty"])
def test_a_chunk_of_another_size_is_named_with_its_rows(tmp_path: Path, array: str, damage: str) -> None:
    store = new_store(tmp_path / "s")
    log(store, torch.randn(40, WIDTH))
    file = next((store / "writers/0-1" / array).glob("c.1*"))
    content = file.read_bytes()
    file.write_bytes({"short": content[:-1], "long": content + b"x", "empty": b""}.get(damage, b""))
    if damage == "missing":
        file.unlink()
    opened = open_store(store)
    with pytest.raises(StoreDamagedError, match=rf"{array}.c\.1.*rows 16 to 31") as caught:
        _ = opened.gradients[:], opened.step, opened.data_id
    assert str(file) in str(caught.value)
    if array == "gradients":
        assert opened.gradients[:16].shape == (16, WIDTH)


@pytest.mark.parametrize("array", ["columns", "data_id"])
def test_a_flipped_bit_in_a_column_is_found(tmp_path: Path, array: str) -> None:
    store = new_store(tmp_path / "s")
    log(store, torch.randn(20, WIDTH))
    file = next((store / "writers/0-1" / array).glob("c.0*"))
    for position in (0, 40, -1):
        content = bytearray(file.read_bytes())
        content[position] ^= 16
        file.write_bytes(content)
        with pytest.raises(StoreDamagedError, match="does not match its checksum"):
            _ = open_store(store).data_id
        content[position] ^= 16
        file.write_bytes(content)
    assert len(open_store(store).data_id) == 20


def test_a_chunk_of_another_commit_is_found(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    log(store, torch.randn(40, WIDTH))
    first, second = (store / f"writers/0-1/columns/c.{n}.0" for n in (0, 1))
    second.write_bytes(first.read_bytes())
    with pytest.raises(StoreDamagedError, match=r"rows 16 to 31.*does not match its checksum"):
        _ = open_store(store).step


@pytest.mark.parametrize("field", ["outer_sum", "rows"])
@pytest.mark.parametrize("file", ["c.0", "zarr.json"])
def test_damaged_statistics_are_found(tmp_path: Path, field: str, file: str) -> None:
    store = new_store(tmp_path / "s")
    with writer(store, statistics=StatisticsAccumulator(small_layout(), ["covariance"])) as out:
        out.put(next(batches(torch.randn(20, WIDTH), size=20)))
    target = store / "writers/0-1/statistics/1" / field / file
    content = bytearray(target.read_bytes())
    content[0] ^= 1
    target.write_bytes(content)
    with pytest.raises(StoreDamagedError, match=field):
        _ = open_store(store).statistics


def test_a_reader_follows_a_live_writer_to_its_next_statistics(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    with writer(store, statistics=StatisticsAccumulator(small_layout(), ["mean"])) as out:
        out.put(next(batches(torch.randn(5, WIDTH))))
        out.commit()
        reader = open_store(store)
        out.put(next(batches(torch.randn(5, WIDTH))))
        out.commit()
        assert reader.statistics.rows == 10 and len(reader) == 5


RECORD = {
    "sequence": 0,
    "part": "",
    "chunk": 0,
    "start": 0,
    "rows": 5,
    "crc": {"gradients": 1, "columns": 2, "data_id": 3},
    "epoch": 0,
    "step": 0,
}


@pytest.mark.parametrize(
    "change",
    [
        {"part": "../../outside"},
        {"part": "tails/../.."},
        {"part": "/etc"},
        {"part": None},
        {"crc": {"../gradients": 1}},
        {"crc": {"metadata/..": 1}},
        {"crc": {"metadata/a/b": 1}},
        {"crc": []},
        {"crc": {"gradients": "x"}},
        {"rows": 0},
        {"rows": -1},
        {"rows": 1.5},
        {"rows": 1 << 60},
        {"chunk": "0"},
        {"sequence": True},
        {"step": None},
        {"step": float("inf")},
    ],
)
def test_a_crafted_record_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    lines = [_line({**RECORD, **change}), _line({**RECORD, "sequence": 1})]
    if change == {"sequence": True}:
        lines[0] = _line({**RECORD, "sequence": 5})
    (tmp_path / "commits").write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(StoreDamagedError, match="commits, line 1"):
        read_commits(tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200) | st.lists(st.binary(max_size=40).map(lambda b: _checked(b))).map(b"\n".join))
def test_any_record_file_opens_or_is_named_as_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "commits").write_bytes(content)
    try:
        assert read_commits(tmp_path).total == 0
    except LogixError as error:
        assert "commits" in str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(sorted(RECORD)), value=json_values)
def test_a_fuzzed_field_is_refused_or_harmless(tmp_path: Path, key: str, value: object) -> None:
    (tmp_path / "commits").write_bytes(_line({**RECORD, key: value}) + b"\n" + _line({**RECORD, "sequence": 1}) + b"\n")
    try:
        records = read_commits(tmp_path).rows
    except StoreDamagedError as error:
        assert "line 1" in str(error)
    else:
        assert all(record.rows >= 1 for record in records)


def test_records_survive_their_file(tmp_path: Path) -> None:
    log_file = CommitLog(tmp_path)
    records = [
        RowsRecord(0, "", 0, 0, 16, {"gradients": 2**32 - 1, "metadata/%2e": 0}, 1, 2),
        RowsRecord(1, "tails/12", 0, 0, 3, {"gradients": 5}, -1, -1),
    ]
    for record in records:
        log_file.append(record)
    log_file.close()
    log_file.close()
    commits = read_commits(tmp_path)
    assert list(commits.rows) == records
    assert (commits.total, commits.closed, commits.torn, commits.statistics) == (19, False, False, None)
    assert (tmp_path / "commits").read_bytes() == b"".join(format_record(r) + b"\n" for r in records)


def _line(entry: dict[str, Any]) -> bytes:
    return _checked(json.dumps(entry).encode())


def _checked(content: bytes) -> bytes:
    return b"%08x %s" % (checksum(content), content)
