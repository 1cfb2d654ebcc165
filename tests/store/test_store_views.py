"""One row for each sample: means, sums, last visits; found, made, and never stale."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from logix_like.capture.batch import ProjectedBatch
from logix_like.errors import QueryError, StoreError
from logix_like.layout import DataId
from logix_like.store import ENCODINGS, GradientStore, Rows, build_view, open_store, supersede_samples
from logix_like.store.format.parts import PartWriter
from logix_like.store.reading import means
from tests.store.store_runs import WIDTH, batches, log, new_store, writer, zarr_values

SAMPLES = 37
EPOCHS = 3
IDS: list[DataId] = [f"{i}" if i % 2 else i for i in range(SAMPLES)]

# Sums of three float32 numbers, divided; and what each encoding rounds.
ROUNDING = {"float32": 1e-6, "float64": 1e-14, "bfloat16": 2.0**-8, "float16": 2.0**-10}
ROUNDING |= {"int8": 2.0**-6, "int4": 2.0**-6, "sign": 2.0**-3}  # means of the last two are kept as int8 and int4


def visited_store(path: Path, encoding: str = "float32") -> tuple[GradientStore, torch.Tensor, list[list[int]]]:
    """Three epochs in shuffled orders; returns rows ``[epochs, samples, width]`` by sample, and the orders."""
    store = new_store(path / "s", encoding)
    rows = torch.randn(EPOCHS, SAMPLES, WIDTH, dtype=ENCODINGS[encoding].staging)
    orders = [torch.randperm(SAMPLES).tolist() for _ in range(EPOCHS)]
    with writer(store, encoding) as out:
        for epoch, order in enumerate(orders):
            given: list[DataId] = [IDS[i] for i in order]
            for batch in batches(rows[epoch, order], given, epoch=epoch, step=100 * epoch, metadata={}):
                out.put(batch)
    return open_store(store), rows, orders


def check_face(rows: Rows) -> None:
    """What the query engine relies on, for any view."""
    n = len(rows)
    for column in (rows.data_id, rows.step, rows.epoch, rows.loss, rows.norm, rows.lr, rows.valid, rows.visits):
        assert column.shape == (n,)
    assert rows.valid.dtype == bool
    assert rows.factor is None or rows.factor.shape == (n,)
    everything = rows.gradients[:]
    assert everything.shape == (n, rows.layout.width)
    assert torch.cat([chunk.decode() for chunk in rows.chunks()]).equal(everything)
    ends = [(chunk.start, chunk.start + len(chunk.raw)) for chunk in rows.chunks()]
    assert [start for start, _ in ends] == [0] + [end for _, end in ends[:-1]] and ends[-1][1] == n
    assert rows.gradients[[n - 1, 0]].equal(everything[[n - 1, 0]])
    assert rows.gradients[1].equal(everything[1])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_mean_is_over_each_samples_visits(tmp_path: Path, encoding: str) -> None:
    store, rows, orders = visited_store(tmp_path, encoding)
    losses = rows.sum(2).mean(0)[orders[0]].numpy()
    view = store.view("mean")
    check_face(view)
    assert view.data_id.tolist() == [IDS[i] for i in orders[0]]
    if ENCODINGS[encoding].packed:
        places = [np.argsort(order) + epoch * SAMPLES for epoch, order in enumerate(orders)]
        rows = torch.stack([store.gradients[place] for place in places])
    expected = rows.mean(0)[orders[0]]
    scale = rows.abs().amax()
    assert (view.gradients[:] - expected).abs().max() <= 2 * ROUNDING[encoding] * scale
    assert view.visits.tolist() == [EPOCHS] * SAMPLES
    assert view.factor is None and view.left_out == 0 and view.valid.all()
    assert view.epoch.tolist() == [2] * SAMPLES and (view.step >= 200).all()
    np.testing.assert_allclose(view.loss, losses, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(view.norm, expected.norm(dim=1).numpy(), rtol=2e-2)


def test_the_sum_is_the_mean_with_a_factor(tmp_path: Path) -> None:
    store, rows, orders = visited_store(tmp_path)
    view = store.view("sum")
    check_face(view)
    assert view.factor is not None
    summed = view.gradients[:] * torch.from_numpy(view.factor).unsqueeze(1)
    torch.testing.assert_close(summed.float(), rows.sum(0)[orders[0]], rtol=1e-5, atol=1e-5)


def test_the_last_is_each_samples_last_visit(tmp_path: Path) -> None:
    store, rows, orders = visited_store(tmp_path)
    view = store.view("last")
    check_face(view)
    assert view.data_id.tolist() == [IDS[i] for i in orders[-1]]
    assert view.gradients[:].equal(rows[-1, orders[-1]])
    assert view.gradients[-1].equal(rows[-1, orders[-1][-1]])
    assert view.visits.tolist() == [EPOCHS] * SAMPLES


def test_the_last_is_told_by_epoch_and_step_and_not_by_writer(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    for rank, epoch in ((0, 1), (1, 0)):
        with writer(store, rank=rank) as out:
            rows = torch.full((1, WIDTH), float(epoch))
            out.put(ProjectedBatch(("a",), rows, epoch=epoch, metadata={"split": (f"epoch {epoch}",)}))
    for reduce in ("last", "mean"):
        view = open_store(store).view(reduce)
        assert view.epoch.tolist() == [1]
        assert view.metadata["split"].tolist() == ["epoch 1"]
    assert open_store(store).view("last").gradients[0].tolist() == [1.0] * WIDTH
    assert open_store(store).view("mean").gradients[0].tolist() == [0.5] * WIDTH


def test_none_is_every_visit(tmp_path: Path) -> None:
    store, rows, orders = visited_store(tmp_path)
    view = store.view("none")
    check_face(view)
    assert len(view) == EPOCHS * SAMPLES == len(store)
    assert view.gradients[:].equal(torch.cat([rows[e, order] for e, order in enumerate(orders)]))
    assert view.visits.tolist() == [1] * len(view)


def test_one_visit_each_needs_no_copy(tmp_path: Path, cache_folder: Path) -> None:
    store = new_store(tmp_path / "s")
    rows = torch.randn(40, WIDTH)
    rows[[5, 20]] = torch.nan
    log(store, rows)
    good = [i for i in range(40) if i not in (5, 20)]
    for reduce in ("mean", "sum", "last"):
        view = open_store(store).view(reduce)
        check_face(view)
        assert view.gradients[:].equal(rows[good]) and view.data_id.tolist() == good
        assert view.left_out == 2 and view.factor is None and view.valid.all()
    assert build_view(store) is None
    assert not list(cache_folder.iterdir()) and not (store / "views").exists()


def test_invalid_visits_take_no_part(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    rows = torch.tensor([[1.0], [torch.nan], [3.0], [torch.inf], [5.0], [7.0]]).expand(6, WIDTH).contiguous()
    log(store, rows, ids=["a", "a", "b", "c", "a", "b"])
    view = open_store(store).view("mean")
    assert dict(zip(view.data_id, view.gradients[:][:, 0].tolist(), strict=True)) == {"a": 3.0, "b": 5.0}
    assert view.visits.tolist() == [2, 2] and view.left_out == 1
    last = open_store(store).view("last")
    assert dict(zip(last.data_id, last.gradients[:][:, 0].tolist(), strict=True)) == {"a": 5.0, "b": 7.0}
    reopened = open_store(store).view("sum")
    assert reopened.left_out == 1


def test_a_text_and_a_number_are_two_samples(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    log(store, torch.randn(4, WIDTH), ids=[1, "1", 1, "1"])
    assert open_store(store).view("mean").data_id.tolist() == [1, "1"]


def test_metadata_and_ids_are_in_the_view(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    with writer(store) as out:
        for epoch in range(2):
            values: dict[str, tuple[str | int | float, ...]] = {"label": (3, "x"), "é..": (epoch, 0.5)}
            out.put(ProjectedBatch(("a", 7), torch.randn(2, WIDTH), epoch=epoch, metadata=values))
    view = open_store(store).view("mean")
    assert view.data_id.tolist() == ["a", 7]
    assert view.metadata["label"].tolist() == [3, "x"]
    assert view.metadata["é.."].tolist() == [1, 0.5]


def test_the_view_in_the_store_is_found_and_the_cache_left_alone(tmp_path: Path, cache_folder: Path) -> None:
    store, rows, orders = visited_store(tmp_path)
    folder = build_view(store.path)
    assert folder is not None and folder.is_relative_to(store.path)
    assert build_view(store.path) == folder
    view = open_store(store.path).view("mean")
    torch.testing.assert_close(view.gradients[:], rows.mean(0)[orders[0]])
    assert not list(cache_folder.iterdir())
    assert zarr_values(folder / "tails/0/gradients").shape == (SAMPLES, WIDTH)  # fewer than a chunk
    assert store.bytes["views"] > SAMPLES * WIDTH * 4


def test_a_readers_view_is_kept_in_the_cache_for_the_next(tmp_path: Path, cache_folder: Path) -> None:
    store, _, _ = visited_store(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in store.path.rglob("*")}
    first = store.view("mean")
    files = {p: p.stat().st_mtime_ns for p in cache_folder.rglob("*")}
    assert files and before == {p: p.stat().st_mtime_ns for p in store.path.rglob("*")}
    assert store.view("mean") is first
    again = open_store(store.path).view("mean")
    assert again.gradients[:].equal(first.gradients[:]) and again.key == first.key
    assert files == {p: p.stat().st_mtime_ns for p in cache_folder.rglob("*")}


def test_a_view_of_fewer_rows_is_never_used(tmp_path: Path, cache_folder: Path) -> None:
    store, rows, _ = visited_store(tmp_path)
    build_view(store.path)
    old = store.view("mean")
    log(store.path, torch.full((1, WIDTH), 100.0), ids=[IDS[0]])
    assert store.view("mean") is old
    new = store.refresh().view("mean")
    assert new.key != old.key
    where = new.data_id.tolist().index(IDS[0])
    torch.testing.assert_close(new.gradients[where], (rows[:, 0].sum(0) + 100) / 4)
    assert new.visits[where] == 4


def test_keys_tell_views_and_rows_apart(tmp_path: Path) -> None:
    store, _, _ = visited_store(tmp_path / "a")
    other, _, _ = visited_store(tmp_path / "b")
    keys = [s.view(reduce).key for s in (store, other) for reduce in ("mean", "sum", "last", "none")]
    assert len(set(keys)) == 8
    assert open_store(store.path).view("last").key == store.view("last").key


def test_old_views_are_removed_when_nobody_uses_them(tmp_path: Path) -> None:
    store, _, _ = visited_store(tmp_path)
    views = [build_view(store.path)]
    used = {reduce: open_store(store.path).view(reduce) for reduce in ("mean", "sum")}
    for _ in range(3):
        log(store.path, torch.randn(1, WIDTH), ids=[IDS[0]])
        views.append(build_view(store.path))
    assert [view is not None and view.exists() for view in views] == [True, False, False, True]
    del used["mean"]
    log(store.path, torch.randn(1, WIDTH), ids=[IDS[0]])
    views.append(build_view(store.path))
    assert len(used["sum"].gradients[:]) == len(used["sum"].data_id) == SAMPLES
    used.clear()
    log(store.path, torch.randn(1, WIDTH), ids=[IDS[0]])
    views.append(build_view(store.path))
    assert [view is not None and view.exists() for view in views] == [False, False, False, False, False, True]


def test_the_cache_keeps_one_view_of_a_growing_store(tmp_path: Path, cache_folder: Path) -> None:
    store, _, _ = visited_store(tmp_path)
    for _ in range(4):
        open_store(store.path).view("mean")
        log(store.path, torch.randn(1, WIDTH), ids=[IDS[0]])
    (own,) = (cache_folder / "views").iterdir()
    assert len(list(own.iterdir())) == 1
    unfinished = own / ".1-1.partial"
    unfinished.mkdir()
    open_store(store.path).view("mean")
    assert len(list(own.iterdir())) == 2  # another process may be writing it
    long_ago = time.time() - 2 * means.STALE_SECONDS
    os.utime(unfinished, (long_ago, long_ago))
    log(store.path, torch.randn(1, WIDTH), ids=[IDS[0]])
    open_store(store.path).view("mean")
    assert len(list(own.iterdir())) == 1


@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "int8"])
def test_a_large_visit_that_is_finite_takes_part(tmp_path: Path, encoding: str) -> None:
    store = new_store(tmp_path / "s", encoding)
    with writer(store, encoding) as out:
        for epoch in range(2):
            rows = torch.ones(2, WIDTH)
            rows[0] *= 1e22 if epoch else 1.0
            out.put(ProjectedBatch(("large", "usual"), rows, epoch=epoch))
    view = open_store(store).view("mean")
    assert view.valid.all() and np.isfinite(view.norm).all()
    assert view.norm[0] == pytest.approx(5e21 * WIDTH**0.5, rel=0.02)


def test_a_view_is_built_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, rows, orders = visited_store(tmp_path)
    monkeypatch.setattr(means, "BLOCK_BYTES", 1)
    monkeypatch.setattr(means, "VIEW_CHUNK_MIB", 5 * WIDTH * 4 / 2**20)
    view = store.view("mean")
    check_face(view)
    assert [len(chunk) for chunk in view.chunks()] == [5] * 7 + [2]
    torch.testing.assert_close(view.gradients[:], rows.mean(0)[orders[0]])


def test_a_half_built_view_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    store, _, _ = visited_store(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PartWriter, "prepare", full)
        with pytest.raises(StoreError, match=r"No space left.*LOGIX_LIKE_CACHE"):
            store.view("mean")
    assert not list(cache_folder.rglob("*.partial")) and not list(cache_folder.rglob("commits"))
    assert len(store.view("mean")) == SAMPLES


def test_a_read_only_store_is_enough(tmp_path: Path) -> None:
    store, rows, orders = visited_store(tmp_path)
    paths = [store.path, *store.path.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        opened = open_store(store.path)
        torch.testing.assert_close(opened.view("mean").gradients[:], rows.mean(0)[orders[0]])
        assert opened.statistics.rows == 0 and len(opened.projections) == 3
    finally:
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_an_unknown_reduction_is_refused(tmp_path: Path) -> None:
    store = open_store(new_store(tmp_path / "s"))
    with pytest.raises(QueryError, match="unknown reduce 'median'; known: mean, sum, last, none"):
        store.view("median")


def test_a_store_has_one_cache_by_whatever_name_it_is_opened(tmp_path: Path, cache_folder: Path) -> None:
    store, _, _ = visited_store(tmp_path)
    (tmp_path / "link").symlink_to(store.path)
    open_store(tmp_path / "link").view("mean")
    assert len(list(cache_folder.glob("views/*/*"))) == 1
    supersede_samples(store.path, [IDS[0]])
    assert not list(cache_folder.glob("views/*/*"))
