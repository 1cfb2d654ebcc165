"""What is put into a store is what comes out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from logix_like.capture.batch import FactorMoments, ProjectedBatch
from logix_like.errors import StoreDamagedError
from logix_like.layout import Layout, ModuleBlock
from logix_like.statistics import StatisticsAccumulator
from logix_like.store import ENCODINGS, StoreWriter, create_store, describe, open_store
from logix_like.store.format.schema import Flag
from logix_like.store.reading import gradients
from logix_like.store.reading.gradients import GradientReader
from tests.store.store_runs import (
    CHUNK_ROWS,
    WIDTH,
    batches,
    chunk_mib,
    log,
    new_store,
    projections,
    small_layout,
    writer,
    zarr_values,
)

# Half a unit in the last place: 8, 24, 53 and 11 bits of precision. Of few bits, by a block's largest: half a unit
# times what the scales of two coordinates may differ by (less than 12 in a module of 12, by the damping).
ROUNDING = {"bfloat16": 2.0**-8, "float32": 0.0, "float64": 0.0, "float16": 2.0**-11, "int8": 6 / 127, "int4": 6 / 7}
ROUNDING["sign"] = torch.inf  # what it keeps is tested with the encodings


def close(found: torch.Tensor, expected: torch.Tensor, encoding: str) -> bool:
    """Equal up to the rounding of the encoding, number by number (those with scales: by block)."""
    error = (found - expected).abs()
    if not ENCODINGS[encoding].scaled:
        return bool((error <= ROUNDING[encoding] * expected.abs()).all())
    split = small_layout().split
    return all(
        bool((e.flatten(1).amax(1) <= ROUNDING[encoding] * x.abs().flatten(1).amax(1)).all())
        for e, x in zip(split(error).values(), split(expected).values(), strict=True)
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("size", [1, 7, CHUNK_ROWS, 50])
def test_rows_come_back_in_order(tmp_path: Path, encoding: str, size: int) -> None:
    store = new_store(tmp_path / "s", encoding)
    rows = torch.randn(50, WIDTH, dtype=ENCODINGS[encoding].staging)
    log(store, rows, encoding, size=size)
    opened = open_store(store)
    assert len(opened) == 50
    assert opened.gradients[:].dtype == ENCODINGS[encoding].staging
    assert close(opened.gradients[:], rows, encoding)
    assert opened.data_id.tolist() == list(range(50))
    assert opened.step.tolist() == [i // size for i in range(50)]
    assert torch.cat([chunk.decode() for chunk in opened.chunks()]).equal(opened.gradients[:])
    assert [chunk.start for chunk in opened.chunks()] == [0, 16, 32, 48]


@pytest.mark.parametrize("encoding", ["bfloat16", "float16", "float32", "int8", "int4"])
@pytest.mark.parametrize("magnitude", [1e-12, 1e-8, 1.0, 1e12])
def test_gradients_of_any_size_survive(tmp_path: Path, encoding: str, magnitude: float) -> None:
    store = new_store(tmp_path / "s", encoding)
    rows = torch.randn(20, WIDTH) * magnitude
    rows[3] = 0
    log(store, rows, encoding)
    found = open_store(store).gradients[:]
    assert close(found, rows, encoding)
    assert found[3].count_nonzero() == 0


@pytest.mark.parametrize("encoding", ["float16", "int8", "int4"])
def test_each_module_is_scaled_by_itself(tmp_path: Path, encoding: str) -> None:
    store = new_store(tmp_path / "s", encoding)
    rows = torch.randn(5, WIDTH)
    rows[:, :12] *= 1e-10
    log(store, rows, encoding)
    assert close(open_store(store).gradients[:], rows, encoding)


@pytest.mark.parametrize("encoding", [name for name, one in ENCODINGS.items() if one.scaled])
def test_modules_of_one_size_are_scaled_together_and_alike(encoding: str) -> None:
    blocks = [ModuleBlock(f"m{n}", "linear", (4, 4), (3, 4), 12 * n, f"m{n}") for n in range(3)]
    rows = torch.randn(6, 36) * torch.tensor([1e-9, 1.0, 1e5]).repeat_interleave(12)
    codec, layout = ENCODINGS[encoding], Layout(blocks)
    stored = codec.encode(rows, layout, codec.buffer(6, 36))
    for n in range(3):
        part, one = slice(12 * n, 12 * n + 12), Layout(blocks[:1])
        alone = codec.encode(rows[:, part], one, codec.buffer(6, 12))
        assert stored.scale is not None and alone.scale is not None
        torch.testing.assert_close(alone.scale[:, 0], stored.scale[:, n])
        assert codec.codes(stored, layout)[:, part].equal(codec.codes(alone, one))
        error = (codec.decode(stored, layout)[:, part] - rows[:, part]).abs()
        assert (error.amax(1) <= ROUNDING[encoding] * rows[:, part].abs().amax(1)).all()


@pytest.mark.parametrize("encoding", ["int8", "int4", "sign"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_few_bits_do_not_hide_what_is_not_finite(tmp_path: Path, encoding: str, bad: float) -> None:
    store, rows = new_store(tmp_path / "s", encoding), torch.randn(5, WIDTH)
    rows[2, 3] = bad
    log(store, rows, encoding)
    opened = open_store(store)
    assert opened.valid.tolist() == [True, True, False, True, True]
    assert opened.gradients[2][:12].isnan().all() and opened.gradients[2][12:].isfinite().all()


def test_columns_and_ids_keep_their_types(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    ids: list[Any] = ["7", 7, "naïve ☃", -3, 2**70, "", "line\nbreak", np.int64(12)]
    rows = torch.randn(8, WIDTH)
    log(store, rows, ids=ids, epoch=4, step=100, size=8)
    opened = open_store(store)
    assert opened.data_id.tolist() == ["7", 7, "naïve ☃", -3, 2**70, "", "line\nbreak", 12]
    assert [type(i) for i in opened.data_id] == [str, int, str, int, int, str, str, int]
    assert opened.epoch.tolist() == [4] * 8
    assert opened.step[2:4].tolist() == [100, 100]
    assert opened.lr[[0, 7]].tolist() == [0.5, 0.5]
    assert np.allclose(opened.loss, rows.sum(1).numpy())
    assert np.allclose(opened.norm, rows.norm(dim=1).numpy())
    assert opened.flags.tolist() == [0, 4, 0, 4, 4, 0, 0, 4]
    assert opened.visits.tolist() == [1] * 8
    assert opened.valid.all()


def test_unknown_columns_hold_nan_and_minus_one(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    with writer(store) as out:
        out.put(ProjectedBatch(("a",), torch.ones(1, WIDTH)))
    opened = open_store(store)
    assert (opened.step[0], opened.epoch[0]) == (-1, -1)
    assert np.isnan(opened.loss[0]) and np.isnan(opened.lr[0])


def test_metadata_keeps_types_and_gaps(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    rows = torch.randn(30, WIDTH)
    with writer(store) as out:
        for i, batch in enumerate(batches(rows, size=10)):
            values = {"a b.c": tuple(range(10)), "é": ("x", 1, 0.1, 1e300, "é", "1", -1, 2.0, "", 5)}
            more = {} if i == 0 else values
            out.put(ProjectedBatch(batch.data_id, batch.rows, metadata=more))
    metadata = open_store(store).metadata
    assert sorted(metadata) == ["a b.c", "é"]
    assert metadata["a b.c"].tolist() == [None] * 10 + 2 * list(range(10))
    assert metadata["é"][10:20].tolist() == ["x", 1, 0.1, 1e300, "é", "1", -1, 2.0, "", 5]
    assert [type(v) for v in metadata["é"][10:14]] == [str, int, float, float]
    with pytest.raises(KeyError, match=r"no metadata column 'label'; there are: .*a b\.c"):
        metadata["label"]


def test_gradients_are_chosen_like_rows_of_an_array(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    rows = torch.randn(50, WIDTH)
    log(store, rows)
    gradients = open_store(store).gradients
    for key in (slice(3, 40), slice(None, None, -3), [49, 0, 17, 17, -1], torch.tensor([15, 16]), []):
        expected = rows[list(range(50))[key]] if isinstance(key, slice) else rows[torch.as_tensor(key).long()]
        assert gradients[key].equal(expected)
    mask = np.arange(50) % 7 == 0
    assert gradients[mask].equal(rows[torch.from_numpy(mask)])
    assert gradients[-2].equal(rows[-2])
    assert gradients[...].equal(rows)
    assert gradients.shape == (50, WIDTH)
    with pytest.raises(IndexError, match="row 50 of 50 rows"):
        gradients[[1, 50]]
    with pytest.raises(IndexError, match="one entry for each row"):
        gradients[mask[:3]]
    fractions: Any = [0.5]
    with pytest.raises(IndexError, match="by numbers, a slice or a mask"):
        gradients[fractions]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("joined", [0, 1, 2**20])
def test_few_rows_of_chunks_are_read_alone(
    tmp_path: Path, encoding: str, joined: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "KEPT_BYTES", 1)  # so that chunks are not at hand
    monkeypatch.setattr(gradients, "JOINED_BYTES", joined)
    store = new_store(tmp_path / "s", encoding)
    log(store, torch.randn(100, WIDTH), encoding)
    reader = open_store(store).gradients
    rows = torch.cat([chunk.decode() for chunk in reader.chunks()])  # compares checksums
    monkeypatch.delattr(GradientReader, "_open")  # no chunk but the last, which is at hand, is mapped again
    wanted = [3, 40, 17, 1, 17, 2, 60, 99, 41]
    assert reader[wanted].equal(rows[wanted])
    assert torch.cat([chunk.decode() for chunk in reader.selected(np.sort(wanted))]).equal(rows[sorted(wanted)])


def test_a_chunk_that_changes_after_it_was_checked_is_checked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "KEPT_BYTES", 1)
    store = new_store(tmp_path / "s")
    log(store, torch.randn(50, WIDTH))
    reader = open_store(store).gradients
    list(reader.chunks())
    file = next(store.glob("writers/*/gradients/c.1.0"))
    content = file.read_bytes()
    file.write_bytes(content[: 2 * WIDTH * 4])
    with pytest.raises(StoreDamagedError, match=r"c\.1\.0, which holds rows 16 to 31, has 168 bytes, expected"):
        reader[[16, 17]]
    file.write_bytes(bytes(len(content)))
    with pytest.raises(StoreDamagedError, match=r"c\.1\.0, which holds rows 16 to 31, does not match its checksum"):
        reader[[16, 18]]


def test_a_reader_of_a_store_that_was_replaced_gives_no_row_of_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "KEPT_BYTES", 1)
    store = new_store(tmp_path / "s")
    log(store, torch.zeros(50, WIDTH))
    reader = open_store(store).gradients
    list(reader.chunks())
    create_store(store, {}, overwrite=True)
    describe(store, small_layout(), "float32", projections())
    log(store, torch.ones(50, WIDTH))
    for key in ([0, 20], slice(16)):
        with pytest.raises(StoreDamagedError, match=r"does not match its checksum"):
            reader[key]


def test_reading_does_not_let_its_memory_reach_the_file(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    rows = torch.randn(20, WIDTH)
    log(store, rows)
    next(open_store(store).chunks()).raw.zero_()
    open_store(store).gradients[:].zero_()
    assert open_store(store).gradients[:].equal(rows)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_any_zarr_reader_reads_the_arrays(tmp_path: Path, encoding: str) -> None:
    store = new_store(tmp_path / "s", encoding)
    rows = torch.randn(2 * CHUNK_ROWS, WIDTH, dtype=ENCODINGS[encoding].staging)
    ids: list[str | int] = [f"é{i}" if i % 2 else i for i in range(2 * CHUNK_ROWS)]
    log(store, rows, encoding, ids=ids)
    part = store / "writers/0-1"
    array = zarr.open_array(part / "gradients", mode="r")
    assert array.shape == (2 * CHUNK_ROWS, ENCODINGS[encoding].stored_width(WIDTH))
    assert array.attrs["dtype"] == encoding
    values = torch.from_numpy(zarr_values(part / "gradients"))
    assert (part / "coordinate_scale").exists() == ENCODINGS[encoding].coordinate_scaled
    if encoding == "bfloat16":
        values = values.view(torch.bfloat16)
    raw = torch.cat([chunk.raw for chunk in open_store(store).chunks()])
    assert values.dtype == raw.dtype and values.equal(raw)
    names = zarr.open_array(part / "columns", mode="r").attrs["columns"]
    assert names == ["step", "epoch", "loss", "norm", "lr", "flags"]
    assert zarr_values(part / "columns")[:, 0].tolist() == open_store(store).step.tolist()
    assert zarr_values(part / "data_id").tolist() == [str(i) for i in ids]
    assert (part / "scale").exists() == ENCODINGS[encoding].scaled
    if ENCODINGS[encoding].scaled:
        assert zarr_values(part / "scale").shape == (2 * CHUNK_ROWS, 3)
    assert open_store(store).as_zarr().attrs["format"] == "logix_like"


def test_what_is_not_there_reads_as_nan_in_zarr(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s", "bfloat16")
    log(store, torch.randn(CHUNK_ROWS, WIDTH), "bfloat16")
    (store / "writers/0-1/gradients/c.0.0").unlink()
    values = torch.from_numpy(zarr_values(store / "writers/0-1/gradients")).view(torch.bfloat16)
    assert values.isnan().all()


def test_projections_come_back(tmp_path: Path) -> None:
    opened = open_store(new_store(tmp_path / "s"))
    assert list(opened.projections) == ["encoder.q", "encoder.k", ""]
    for name, expected in projections().items():
        for found, matrix in zip(opened.projections[name], expected, strict=True):
            assert (found is None) if matrix is None else (found is not None and found.equal(matrix))
    stored = sorted(str(p.relative_to(opened.path)) for p in opened.path.glob("projections/*/*/zarr.json"))
    assert stored == [
        "projections/@root/input/zarr.json",
        "projections/encoder.k/output/zarr.json",
        "projections/encoder.q/input/zarr.json",
        "projections/encoder.q/output/zarr.json",
    ]
    assert zarr_values(opened.path / "projections/encoder.q/input").tolist() == np.arange(32).reshape(4, 8).tolist()


def test_statistics_come_back(tmp_path: Path) -> None:
    store, layout = new_store(tmp_path / "s"), small_layout()
    names = ["mean", "variance", "covariance", "kronecker"]
    rows = torch.randn(50, WIDTH)
    moments = FactorMoments(
        inputs={"encoder.q": torch.eye(4), "": torch.eye(1)},
        outputs={block.name: torch.eye(block.rank[0]) for block in layout},
        positions={"encoder.q": 70, "": 7},
        samples=7,
    )
    expected = StatisticsAccumulator(layout, names)
    expected.update(rows)
    with writer(store, statistics=StatisticsAccumulator(layout, names)) as out:
        for batch in batches(rows):
            out.put(ProjectedBatch(batch.data_id, batch.rows, moments=moments))
            expected.add_moments(moments)
    found = open_store(store).statistics
    assert found.rows == 50
    for module, sums in expected.snapshot().sums.items():
        assert found.sums[module].keys() == sums.keys()
        for field, tensor in sums.items():
            torch.testing.assert_close(found.sums[module][field], tensor, rtol=1e-5, atol=1e-5)


def test_given_statistics_replace_the_gathered_ones(tmp_path: Path) -> None:
    store, layout = new_store(tmp_path / "s"), small_layout()
    rows = torch.randn(20, WIDTH)
    with writer(store, statistics=StatisticsAccumulator(layout, ["covariance"])) as out:
        for batch in batches(rows):
            out.put(batch)
        out.commit()
        gathered = open_store(store).statistics
        corrected = {"": {"corrected_rows": torch.tensor(20.0, dtype=torch.float64)}}
        out.write_statistics(gathered.with_corrected(corrected))
    opened = open_store(store)
    assert opened.statistics.sums[""]["corrected_rows"].item() == 20
    assert opened.statistics.covariance("").equal(gathered.covariance(""))
    assert [p.name for p in (store / "writers/0-1/statistics").iterdir() if p.is_dir()] == ["2"]
    assert zarr_values(store / "writers/0-1/statistics/2/outer_sum").size == 12**2 + 4**2 + 5**2


def test_nonfinite_rows_are_kept_flagged_and_left_out(tmp_path: Path) -> None:
    store, layout = new_store(tmp_path / "s", "bfloat16"), small_layout()
    rows = torch.randn(40, WIDTH)
    rows[3, 2], rows[17, 0], rows[39] = torch.nan, torch.inf, -torch.inf
    rows[20, 5] = 3.4e38  # finite in float32, not in bfloat16
    rows[21, 5] = 1e30  # large and fine
    bad = [3, 17, 20, 39]
    with writer(store, "bfloat16", statistics=StatisticsAccumulator(layout, ["mean"])) as out:
        for batch in batches(rows):
            out.put(batch)
        out.commit()
        assert out.nonfinite == 4
    opened = open_store(store)
    assert np.flatnonzero(~opened.valid).tolist() == bad
    assert np.flatnonzero(opened.flags & Flag.NONFINITE).tolist() == bad
    assert opened.gradients[3].isnan().sum() == 1
    assert opened.gradients[39].isinf().all()
    good = [i for i in range(40) if i not in bad]
    assert opened.statistics.rows == 40
    assert opened.statistics.sums[""]["rows"].item() == 36
    torch.testing.assert_close(opened.statistics.mean("").float(), rows[good][:, 16:].mean(0), rtol=1e-4, atol=1e-4)


def test_size_on_disk_is_the_rows_and_little_more(tmp_path: Path) -> None:
    layout = Layout(
        [ModuleBlock(f"layers.{i}", "linear", (256, 256), (16, 16), 256 * i, f"layers.{i}") for i in range(28)]
    )
    store = new_store(tmp_path / "s", "bfloat16", layout)
    with StoreWriter(store, layout) as out:
        for start in range(0, 512, 8):
            ids = tuple(range(start, start + 8))
            out.put(ProjectedBatch(ids, torch.randn(8, 7168), step=start, loss=torch.randn(8)))
    opened = open_store(store)
    assert opened.bytes["rows"] / 512 <= 14_500
    assert sum(opened.bytes.values()) == sum(p.stat().st_size for p in store.rglob("*") if p.is_file())


def test_chunk_sizes_are_in_mebibytes(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    with writer(store, chunk_mib=chunk_mib(5)) as out:
        for batch in batches(torch.randn(20, WIDTH)):
            out.put(batch)
    assert [len(chunk) for chunk in open_store(store).chunks()] == [5, 5, 5, 5]
