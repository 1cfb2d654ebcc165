"""Bar B17: size and time of a report, the explorer's first view; ``python -m pytest tests/bench/test_pages.py -s``."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from logix_like.capture.batch import ProjectedBatch
from logix_like.explorer.app import make_app
from logix_like.explorer.state import Explorer
from logix_like.layout import Layout, ModuleBlock
from logix_like.query.result import InfluenceResult
from logix_like.store import StoreWriter
from tests.bench.test_store import MANY, NARROW, new_store

QUERIES, SAMPLES, SHOWN, WORDS = 100, 10_000, 20, 80


def result() -> InfluenceResult:
    ids = np.empty(SAMPLES, dtype=object)
    ids[:] = [f"doc-{n}" for n in range(SAMPLES)]
    scores = torch.from_numpy(np.random.default_rng(0).standard_t(2.5, (QUERIES, SAMPLES)).astype(np.float32))
    names = tuple(f"question {n}" for n in range(QUERIES))
    return InfluenceResult(names, SAMPLES, "dot", "auto", 0.1, "mean", "exact", "a bench", data_id=ids, scores=scores)


def text_of(data_id: object) -> dict[str, object]:
    """Words as long as English ones, another text for each id."""
    generator = random.Random(str(data_id))
    words = ["".join(generator.choices("etaoinshrdlu", k=generator.randint(2, 8))) for _ in range(WORDS)]
    return {"text": " ".join(words), "label": generator.randint(0, 9)}


@pytest.mark.timeout(300)
def test_b17_report(tmp_path: Path) -> None:
    answer, seconds = result(), []
    for _ in range(5):
        start, cpu = time.perf_counter(), time.process_time()
        path = answer.report(tmp_path / "a.html", k=SHOWN, data=text_of, queries=text_of)
        seconds.append((time.perf_counter() - start, time.process_time() - cpu))
    first, median = seconds[0], sorted(seconds)[2]
    sys.stdout.write(
        f"\nB17 report, {QUERIES} queries x 2 x {SHOWN} texts of {WORDS} words: {path.stat().st_size / 1e6:.2f} MB; "
        f"first {first[0]:.2f} s (processor {first[1]:.2f} s), median {median[0]:.2f} s ({median[1]:.2f} s)"
    )
    assert path.stat().st_size <= 5e6


@pytest.mark.timeout(900)
def test_b17_first_view(tmp_path: Path) -> None:
    """From the command's store path to the first page, with a million rows."""
    from starlette.testclient import TestClient

    layout = Layout([ModuleBlock("m", "linear", (64, 64), (8, 8), 0, "m")])
    store = new_store(tmp_path / "store", layout, "bfloat16")
    rows, labels = torch.randn(1000, NARROW), tuple(str(n % 10) for n in range(1000))
    with StoreWriter(store, layout, "bfloat16", chunk_mib=292 * NARROW * 2 / 2**20) as out:
        for start in range(0, MANY, 1000):
            names = tuple(f"sample-{n}" for n in range(start, start + 1000))
            out.put(ProjectedBatch(names, rows, step=start, metadata={"label": labels}))
    begun, cpu = time.perf_counter(), time.process_time()
    explorer = Explorer(store, text_of)
    client = TestClient(make_app(explorer, "t"), base_url="http://127.0.0.1:1", cookies={"logix-like-1": "t"})
    answer = client.get("/")
    first = time.perf_counter() - begun, time.process_time() - cpu
    assert answer.status_code == 200
    explorer._listing.wait()
    listed = time.perf_counter() - begun
    again = time.perf_counter()
    assert client.get("/?sort=gradient norm&is:label=3").status_code == 200
    again = time.perf_counter() - again
    sys.stdout.write(
        f"\nB17 explorer, {MANY:,} rows: first view {first[0]:.2f} s (processor {first[1]:.2f} s), all ids and classes "
        f"read after {listed:.2f} s, then sorted and filtered by class in {again:.2f} s"
    )
    explorer.close()
