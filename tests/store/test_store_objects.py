"""A whole run in object storage: memory and a real S3 server, the same rows as in a folder."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from obstore.exceptions import PermissionDeniedError

import logix_like as logix
from logix_like.errors import MissingDependencyError, StoreDamagedError, StoreError, StoreExistsError, StoreWriteError
from logix_like.statistics import StatisticsAccumulator
from logix_like.store import (
    Place,
    as_place,
    create_store,
    is_store,
    load_checkpoint,
    open_store,
    save_checkpoint,
    verify,
)
from logix_like.store.format import commits
from logix_like.store.places import lease as leases
from logix_like.store.places.files import files_of, read_bytes, write_file
from tests.store.s3_server import BUCKET, KEYS
from tests.store.store_runs import WIDTH, batches, log, new_store, small_layout, writer
from tests.store.writer_process import start
from tests.training import data, network, trained_run


@pytest.fixture(params=["memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty place."""
    if request.param == "memory":
        return f"memory://test-objects/{tmp_path.name}"
    environment: dict[str, str] = request.getfixturevalue("s3_environment")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{tmp_path.name}"


def fill(store: Place, rows: torch.Tensor) -> None:
    """A full chunk, a tail, metadata, statistics and a checkpoint."""
    with writer(store, "bfloat16", statistics=StatisticsAccumulator(small_layout(), ["covariance"])) as out:
        for batch in batches(rows, size=10, metadata={"label": ("a",) * 10}):
            out.put(batch)
            out.commit()
    save_checkpoint(store, {"w": torch.ones(3)}, step=1)


def test_a_store_is_the_same_wherever_it_lies(root: str, tmp_path: Path) -> None:
    rows = torch.randn(40, WIDTH)
    here, there = new_store(tmp_path / "s", "bfloat16"), new_store(as_place(root), "bfloat16")
    for store in (here, there):
        fill(store, rows)
    local, remote = open_store(here), open_store(root)
    assert remote.gradients[:].equal(local.gradients[:]) and remote.gradients[[7, 3]].equal(local.gradients[[7, 3]])
    assert remote.data_id.tolist() == local.data_id.tolist() and remote.key == local.key
    for name in ("step", "epoch", "loss", "norm", "lr", "flags"):
        np.testing.assert_array_equal(getattr(remote, name), getattr(local, name))
    assert remote.metadata["label"].tolist() == ["a"] * 40
    torch.testing.assert_close(remote.statistics.covariance("encoder.q"), local.statistics.covariance("encoder.q"))
    assert remote.projections_digest == local.projections_digest
    assert load_checkpoint(root, 1)["w"].equal(torch.ones(3))
    assert remote.view("mean").gradients[:].equal(local.view("mean").gradients[:])
    assert remote.bytes.keys() == local.bytes.keys() and remote.bytes["rows"] > 0
    report = verify(root)
    assert report.ok and report.rows == 40


def test_a_store_goes_on_where_it_was(root: str) -> None:
    rows = torch.randn(40, WIDTH)
    log(new_store(as_place(root)), rows[:20])
    with pytest.raises(StoreExistsError, match="already holds a run"):
        create_store(root, {})
    create_store(root, {}, resume=True)
    reader = open_store(root)
    log(as_place(root), rows[20:])
    assert len(reader) == 20 and reader.refresh().gradients[:].equal(rows)
    assert [one.name for one in reader.writers] == ["0-1", "0-2"]
    create_store(root, {}, overwrite=True)
    assert is_store(as_place(root)) and len(open_store(root)) == 0 and open_store(root).layout is None


def test_readers_see_what_is_committed_and_no_more(root: str) -> None:
    rows = torch.randn(20, WIDTH)
    with writer(new_store(as_place(root))) as out:
        for number, batch in enumerate(batches(rows, size=5), start=1):
            out.put(batch)
            out.commit()
            assert open_store(root).gradients[:].equal(rows[: 5 * number])


def test_following_a_live_store_reads_what_is_new(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, rows, read = new_store(as_place(root)), torch.randn(40, WIDTH), list[str]()
    original = commits.read_commits

    def counting(folder: Place) -> commits.Commits:
        read.append(folder.name)
        return original(folder)

    log(store, rows[:20])
    reader = open_store(root)
    monkeypatch.setattr(commits, "read_commits", counting)
    with writer(store, rank=1) as out:
        for number, batch in enumerate(batches(rows[20:], size=10), start=1):
            out.put(batch)
            out.commit()
            assert reader.refresh().gradients[:].equal(rows[: 20 + 10 * number])
            table = reader.table
            assert reader.refresh().table is table, "nothing has changed"
    assert set(read) == {"1-1"} and len(read) == 2
    assert reader.refresh().writers[1].state == "closed"


def test_a_flipped_bit_is_found_and_can_be_left_out(root: str) -> None:
    rows = torch.randn(40, WIDTH)
    store = new_store(as_place(root))
    log(store, rows)
    file = store / "writers/0-1/gradients/c.1.0"
    content = read_bytes(file)
    content[77] ^= 4
    write_file(file, [content])
    (damage,) = verify(root).damages
    assert str(damage.file) == f"{root}/writers/0-1/gradients/c.1.0" and damage.rows == (16, 32)
    with pytest.raises(StoreDamagedError, match=r"c\.1\.0.*rows 16 to 31"):
        _ = open_store(root).gradients[:]
    assert open_store(root, on_damage="skip").gradients[:].equal(torch.cat([rows[:16], rows[32:]]))


def test_a_writer_whose_store_was_replaced_writes_nothing_more(root: str) -> None:
    old = writer(new_store(as_place(root)))
    old.put(next(batches(torch.zeros(5, WIDTH))))
    old.commit()
    store = as_place(root)
    create_store(root, {}, overwrite=True)
    before = [str(file) for file, _ in files_of(store).walk(store)]
    old.put(next(batches(torch.zeros(5, WIDTH))))
    with pytest.raises(StoreWriteError, match="was removed or replaced"):
        old.commit()
    old.close()
    assert [str(file) for file, _ in files_of(store).walk(store)] == before


def test_a_rank_has_one_writer_until_its_holder_is_gone(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(as_place(root))
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    with writer(store):
        with pytest.raises(StoreError, match=rf"process {os.getpid()} on .* writes to {root}"):
            writer(store)
        with writer(store, rank=1):
            pass
        lock = store / "writers/0.lock"
        held = bytes(read_bytes(lock))
    # What a process that was killed leaves behind: of this machine it is known to be gone, of others after a while.
    write_file(lock, [held.replace(str(os.getpid()).encode(), str(child).encode())])
    writer(store).close()
    write_file(lock, [held.replace(b'"host": "', b'"host": "other-')])
    with pytest.raises(StoreError, match="on other-"):
        writer(store)
    monkeypatch.setattr(leases, "STALE_SECONDS", 0.0)
    files_of(store).lock(store, store / "writers", 0).close()


def test_a_lease_that_was_taken_over_is_noticed(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "STALE_SECONDS", 0.2)
    store = new_store(as_place(root))
    out = writer(store)
    out.put(next(batches(torch.ones(5, WIDTH))))
    out.commit()
    write_file(store / "writers/0.lock", [b'{"renewed": 1e12}'])
    time.sleep(1.0)  # it renews every 0.05 seconds
    out.put(next(batches(torch.ones(5, WIDTH))))
    with pytest.raises(StoreWriteError, match="another process took over"):
        out.commit()
    out.close()
    assert len(open_store(root)) == 5


def test_what_the_storage_refuses_a_lock_is_named(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(as_place(root))

    def refuse(*arguments: object) -> None:
        raise PermissionDeniedError("no permission to put it")

    monkeypatch.setattr(leases._State, "_put", refuse)
    with pytest.raises(StoreWriteError, match="no permission to put it"):
        writer(store)


def test_a_run_logs_and_answers_by_url(root: str, tmp_path: Path) -> None:
    tables = []
    for place in (root, str(tmp_path)):
        model = network(torch.float32)
        trained_run(tmp_path, model, epochs=2, checkpoints="every_epoch", store={"url": place})
        path = f"{place}/run"
        run = logix.load(path, model=model)
        assert str(run.path) == path
        x, y = data(torch.float32)
        with run.query(data_id=["q"]) as query:
            F.cross_entropy(model(x[:1]), y[:1]).backward()
        result = run.compute_influence_all(query, k=3)
        tables.append((result.proponents(3).ids.tolist(), result.proponents(3).scores))
    assert tables[0][0] == tables[1][0]
    np.testing.assert_array_equal(tables[0][1], tables[1][1])
    assert len(list(open_store(f"{root}/run").checkpoints)) == 2
    stored = open_store(f"{root}/run").manifest.config
    assert stored["store"]["url"] == root and KEYS["AWS_SECRET_ACCESS_KEY"] not in str(stored)


def test_any_zarr_reader_reads_it(root: str) -> None:
    rows = torch.randn(40, WIDTH)
    log(new_store(as_place(root)), rows)
    array = open_store(root).as_zarr()["writers/0-1/gradients"]
    np.testing.assert_array_equal(np.asarray(array[:32]), rows[:32].numpy())


def test_what_is_missing_to_use_a_url_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(MissingDependencyError, match=r"logix_like\[s3\]"):
        logix.open_store("s3://bucket/key")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["kill", "exit"])
def test_acknowledged_objects_survive_the_process(
    s3_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{BUCKET}/{tmp_path.name}"
    store = new_store(as_place(url))
    process = start(store, mode)
    with process:
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(6)] if mode == "kill" else [147]
        if mode == "kill":
            process.kill()
    assert process.returncode == (-9 if mode == "kill" else 3)
    opened = open_store(url)
    assert len(opened) >= told[-1] and opened.gradients[:][:, 0].tolist() == list(range(len(opened)))
    assert verify(url).ok
    log(store, torch.ones(3, WIDTH))  # a killed holder of this machine is known to be gone
    assert len(open_store(url)) == len(opened) + 3
