"""Bars B4 and B7 on the store alone; ``python -m pytest tests/bench/test_store.py -s`` prints them.

Rows have W1's shape (28 modules of 16 x 16). Both sides of a ratio run in turn in one process. What counts is the time
from the making of a writer to the return of its ``close``, for rows that come in W1's batches of 8 and in whole chunks,
as float32 (rounding them is included) and as bfloat16, in which they are stored; norms, checksums, ids, columns and
records are always included. It is compared with files of the same chunks, written from memory: into the page cache,
where raw writing is a memory copy, and forced to the disk. Removing what was written is not counted.

The bar of .6 was reached where a slow disk is waited for, and not in the page cache: there writing raw and the passes
over the data that no store can do without (rounding, norms, a checksum) come close to it already by themselves, of
which the last line of each case prints the time. The writer spreads them over two threads; with the one that puts rows,
and with what the kernel does for three files a chunk where raw writing has one, two cores are busy throughout.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch

from logix_like.capture.batch import ProjectedBatch
from logix_like.layout import Layout, ModuleBlock
from logix_like.store import ENCODINGS, StoreWriter, create_store, describe, open_store
from logix_like.store.places.files import as_bytes, checksum
from tests.bench import w1

ROWS, BATCH, CHUNK_MIB, PAIRS = 16_384, 8, 4.0, 20
BAR = 0.6
"""B7."""
LIMITS = {"bfloat16": 14_500, "int8": 7_500}
"""B4, bytes a row."""
MANY, NARROW = 1_000_000, 64


def wide_layout() -> Layout:
    """W1's 28 modules."""
    return Layout(
        [ModuleBlock(f"layers.{n}", "linear", (256, 256), (16, 16), 256 * n, f"layers.{n}") for n in range(28)]
    )


def new_store(path: Path, layout: Layout, encoding: str) -> Path:
    create_store(path, {"project": "bench"}, overwrite=path.exists())
    describe(path, layout, encoding, {block.name: (None, None) for block in layout})
    return path


def w1_batches(width: int, count: int, dtype: torch.dtype = torch.float32, size: int = BATCH) -> list[ProjectedBatch]:
    rows = torch.randn(512, width, generator=torch.Generator().manual_seed(0)).to(dtype).split(size)
    return [
        ProjectedBatch(
            tuple(f"sample-{n}" for n in range(b * size, (b + 1) * size)),
            rows[b % len(rows)],
            step=b,
            epoch=0,
            lr=0.1,
            loss=torch.ones(size),
        )
        for b in range(count // size)
    ]


def show(line: object) -> None:
    sys.stdout.write(f"\n{line}")


def write_raw(folder: Path, size: int, *, sync: bool) -> None:
    """Files of one chunk each, to hold ``size`` bytes together."""
    folder.mkdir()
    buffer = memoryview(torch.full((int(CHUNK_MIB * 2**20),), 7, dtype=torch.uint8).numpy())
    for number, start in enumerate(range(0, size, len(buffer))):
        with open(folder / str(number), "wb", buffering=0) as file:
            file.write(buffer[: size - start])
            if sync:
                os.fsync(file.fileno())


def timed(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def needed_passes(batches: list[ProjectedBatch]) -> float:
    """Seconds to round the rows, and to take their norms and checksums, by one thread that does nothing else."""
    rounded = torch.empty_like(batches[0].rows, dtype=torch.bfloat16)

    def passes() -> None:
        for batch in batches:
            torch.linalg.vector_norm(batch.rows.float(), dim=1)
            checksum(as_bytes(rounded.copy_(batch.rows)))

    return timed(passes)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [BATCH, 256])
@pytest.mark.parametrize("durability", ["process", "commit"])
def test_b7_writing(tmp_path: Path, durability: Literal["process", "commit"], size: int, dtype: torch.dtype) -> None:
    layout = wide_layout()
    batches, stored = w1_batches(layout.width, ROWS, dtype, size), ROWS * layout.width * 2
    store, folder = new_store(tmp_path / "store", layout, "bfloat16"), tmp_path / "raw"

    def ours() -> None:
        with StoreWriter(store, layout, "bfloat16", chunk_mib=CHUNK_MIB, durability=durability) as out:
            for batch in batches:
                out.put(batch)

    raw, written, passes = [], [], []
    for _ in range(PAIRS + 1):
        shutil.rmtree(store / "writers/0-1", ignore_errors=True)
        written.append(timed(ours))
        raw.append(timed(lambda: write_raw(folder, stored, sync=durability == "commit")))
        shutil.rmtree(folder)
        passes.append(needed_passes(batches))
    where = "forced to the disk" if durability == "commit" else "page cache"
    name = f"B7 raw / writer, {where}, {size} {str(dtype)[6:]} rows a batch"
    ratio = w1.ratio_of(name, raw[1:], written[1:])
    mib, needed = stored / 2**20, statistics.median(passes[1:])
    alone = ratio.ours / (ratio.ours + needed)
    show(ratio)
    show(f"    store {mib / ratio.other:,.0f} MiB/s, raw {mib / ratio.ours:,.0f} MiB/s")
    show(f"    raw writing and {needed * 1e3:.0f} ms of needed passes, by one thread: {alone:.2f}")
    assert len(open_store(store)) == ROWS
    assert ratio.quartiles[1] >= BAR


@pytest.mark.timeout(900)
def test_b4_bytes(tmp_path: Path) -> None:
    """As many rows as W1 has sequences; ``test_encodings.py`` says what the bytes buy."""
    layout = wide_layout()
    for encoding in ENCODINGS:
        store = new_store(tmp_path / encoding, layout, encoding)
        with StoreWriter(store, layout, encoding) as out:
            for batch in w1_batches(layout.width, w1.SEQUENCES):
                out.put(batch)
        size = open_store(store).bytes["rows"] / w1.SEQUENCES
        show(f"B4 {encoding:<9} {size:8,.0f} bytes a row of {layout.width:,} numbers")
        assert size <= LIMITS.get(encoding, size)


OPENING = """
import json, resource, sys, time
import logix_like as logix
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
store = logix.open_store(sys.argv[1])
opened = time.perf_counter() - start
rows = len(store), len(store.data_id), store.step[-1]
read = time.perf_counter() - start
print(json.dumps({"open": opened, "columns": read, "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before}))
"""


@pytest.mark.timeout(900)
def test_b7_opening(tmp_path: Path) -> None:
    """A million rows in as many chunks as they would take at W1's width (292 rows each)."""
    layout = Layout([ModuleBlock("m", "linear", (64, 64), (8, 8), 0, "m")])
    store = new_store(tmp_path / "store", layout, "bfloat16")
    rows = torch.randn(1000, NARROW)
    with StoreWriter(store, layout, "bfloat16", chunk_mib=292 * NARROW * 2 / 2**20) as out:
        for start in range(0, MANY, 1000):
            out.put(ProjectedBatch(tuple(f"sample-{n}" for n in range(start, start + 1000)), rows, step=start))
    told = json.loads(
        subprocess.run([sys.executable, "-c", OPENING, str(store)], check=True, capture_output=True).stdout
    )
    show(
        f"B7 {MANY:,} rows: open {told['open']:.2f} s, with ids and columns {told['columns']:.2f} s, "
        f"memory {told['rss'] / 1024:.0f} MiB"
    )
    assert told["open"] < 1 and told["rss"] < 200 * 1024
