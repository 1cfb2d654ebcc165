"""Compressed chunks: the same rows, read by any Zarr reader, and damage that is found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from logix_like.errors import ConfigError, StoreDamagedError
from logix_like.store import ENCODINGS, build_view, merge_parts, open_store, repair, verify
from logix_like.store.encoding.codecs import CODECS, codec_named
from logix_like.store.format.commits import read_commits
from tests.store.store_runs import CHUNK_ROWS, WIDTH, batches, new_store, writer, zarr_values

COMPRESSING = [name for name in CODECS if name != "none"]
SIZES = [1, 255, 256, 257, 65_791, 65_792, 100_000, 5_000_000]
"""Either side of where zstd writes its content's size in more bytes."""


def compressed_store(path: Path, codec: str, rows: torch.Tensor, encoding: str = "bfloat16") -> Path:
    store = new_store(path, encoding)
    with writer(store, encoding, codec=codec) as out:
        for batch in batches(rows):
            out.put(batch)
    return store


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_bytes_come_back(codec: str, size: int, itemsize: int) -> None:
    data = np.random.default_rng(0).integers(0, 4, size * itemsize).astype(np.uint8)
    encoded = np.frombuffer(bytes(CODECS[codec].encode(data, itemsize)), np.uint8)
    assert CODECS[codec].decode(encoded, size * itemsize).tobytes() == data.tobytes()
    with pytest.raises(ValueError, match="bytes"):
        CODECS[codec].decode(encoded, size * itemsize + 1)


@pytest.mark.parametrize("codec", COMPRESSING)
def test_anything_else_is_a_value_error(codec: str) -> None:
    random = np.random.default_rng(0)
    data = random.integers(0, 4, 10_000).astype(np.uint8)
    encoded = np.frombuffer(bytes(CODECS[codec].encode(data, 2)), np.uint8)
    for length in (0, 1, 4, 5, 8, 15, 16, 100, len(encoded) - 1):
        with pytest.raises(ValueError):
            CODECS[codec].decode(encoded[:length], 10_000)
    for _ in range(200):
        with pytest.raises(ValueError):
            CODECS[codec].decode(random.integers(0, 256, 300).astype(np.uint8), 10_000)


@pytest.mark.parametrize("codec", COMPRESSING)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_are_those_of_a_store_that_is_not_compressed(tmp_path: Path, codec: str, encoding: str) -> None:
    rows = torch.randn(50, WIDTH, dtype=ENCODINGS[encoding].staging)
    plain = open_store(compressed_store(tmp_path / "plain", "none", rows, encoding))
    store = open_store(compressed_store(tmp_path / "s", codec, rows, encoding))
    assert store.gradients[:].equal(plain.gradients[:])
    assert store.gradients[[49, 3]].equal(plain.gradients[[49, 3]])
    array = zarr_values(store.path / "writers/0-1/gradients")
    assert array.tobytes() == zarr_values(plain.path / "writers/0-1/gradients").tobytes()
    assert verify(store.path).ok


@pytest.mark.parametrize("codec", COMPRESSING)
def test_rows_that_are_much_alike_take_less(tmp_path: Path, codec: str) -> None:
    rows = torch.randn(1, WIDTH).expand(64, WIDTH)
    plain = open_store(compressed_store(tmp_path / "plain", "none", rows, "float32"))
    store = open_store(compressed_store(tmp_path / "s", codec, rows, "float32"))
    sizes = [[f.stat().st_size for f in one.path.glob("writers/*/gradients/c.*")] for one in (store, plain)]
    assert sum(sizes[0]) < 0.7 * sum(sizes[1])


@pytest.mark.parametrize("codec", COMPRESSING)
def test_flipped_bits_and_cut_files_are_found(tmp_path: Path, codec: str) -> None:
    store = compressed_store(tmp_path / "s", codec, torch.randn(2 * CHUNK_ROWS, WIDTH))
    file = store / "writers/0-1/gradients/c.1.0"
    content = file.read_bytes()
    spoilt = [content[:n] + bytes([content[n] ^ 1 << n % 8]) + content[n + 1 :] for n in range(0, len(content), 23)]
    for one in (*spoilt, b"", content[:3], content[:4], content[:-1], content + b"\0"):
        file.write_bytes(one)
        with pytest.raises(StoreDamagedError, match=r"c\.1\.0, which holds rows 16 to 31, does not match its checksum"):
            open_store(store).gradients[:]
        (damage,) = verify(store).damages
        assert (damage.file, damage.rows) == (file, (16, 32))


def test_a_resumed_run_may_compress_otherwise(tmp_path: Path) -> None:
    rows = torch.randn(100, WIDTH)
    store = new_store(tmp_path / "s")
    for codec, part in zip(CODECS, rows.split(40), strict=True):
        with writer(store, codec=codec) as out:
            for batch in batches(part):
                out.put(batch)
    opened = open_store(store)
    assert opened.gradients[:].equal(rows)
    assert [{record.codec for record in one.commits.rows} for one in opened.writers] == [{name} for name in CODECS]


def test_a_view_of_compressed_rows_is_made(tmp_path: Path) -> None:
    rows = torch.randn(20, WIDTH)
    store = new_store(tmp_path / "s")
    with writer(store, codec="zstd") as out:
        for _ in range(2):
            for batch in batches(rows):
                out.put(batch)
    assert build_view(store) is not None
    torch.testing.assert_close(open_store(store).view("mean").gradients[:], rows)


@pytest.mark.parametrize("codec", COMPRESSING)
@pytest.mark.parametrize("encoding", ["bfloat16", "int4"])
def test_a_repaired_and_a_merged_store_are_compressed_as_before(tmp_path: Path, codec: str, encoding: str) -> None:
    store = compressed_store(tmp_path / "s", codec, torch.randn(40, WIDTH), encoding)
    rows = open_store(store).gradients[:]
    document = store / "writers/0-1/gradients/zarr.json"
    content = document.read_bytes()
    document.write_bytes(content.replace(b"codecs", b"codeCs"))
    repair(store)
    assert json.loads(document.read_bytes())["codecs"] == json.loads(content)["codecs"]
    assert verify(store).ok and open_store(store).gradients[:].equal(rows)
    with writer(store, encoding, codec=codec) as out:
        for batch in batches(torch.randn(24, WIDTH)):
            out.put(batch)
    rows = open_store(store).gradients[:]
    merge_parts(store)
    opened = open_store(store)
    assert opened.gradients[:].equal(rows) and len(opened.writers) == 1
    assert {segment.codec for segment in opened.table.segments} == {codec}
    assert all(len(zarr_values(array)) for array in store.glob("writers/**/gradients"))


def test_an_unknown_codec_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown store codec 'gzip'; known: none, blosc-lz4, zstd"):
        codec_named("gzip")
    store = compressed_store(tmp_path / "s", "zstd", torch.randn(CHUNK_ROWS, WIDTH))
    (record,) = read_commits(store / "writers/0-1").rows
    table = open_store(store).table
    object.__setattr__(table.segments[0], "codec", "later")
    with pytest.raises(StoreDamagedError, match=r"is compressed by 'later' \(known: none, blosc-lz4, zstd\)"):
        table.gradients[:]
    assert record.codec == "zstd"
