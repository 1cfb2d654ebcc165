"""What each dtype and codec costs and keeps; ``python -m pytest tests/bench/test_encodings.py -s`` prints the table.

The rows are those of the example's language model, logged in float32 while it learned the Gospels, a row for each
visit; the queries are passages that it has not seen, at the final weights. Scores are preconditioned by the exact
rows' covariance (damping .1), for every visit by itself and for the mean of a passage's visits. Writing goes through
the background writer, the last commit included; reading decodes every row to float32, with the page cache warm.
Both are in MiB of float32 rows a second, medians of some repetitions; compare them within one run only.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from logix_like.capture.batch import ProjectedBatch
from logix_like.layout import Layout
from logix_like.store import ENCODINGS, GradientStore, StoreWriter, open_store
from logix_like.store.encoding.codecs import CODECS
from tests.bench.test_store import BATCH, new_store, show

PASSAGES, QUERIES, REPEATS = 1200, 40, 3
FLOORS = {"float32": 0.9999, "float16": 0.999, "bfloat16": 0.999, "int8": 0.999, "int4": 0.95}
"""Spearman of the means' scores that a dtype must keep."""


@dataclass(frozen=True)
class Logged:
    """A language model's gradients."""

    layout: Layout
    rows: Tensor
    """``[visits, width]``, float32."""
    sample: Tensor
    """``[visits]``: number of the passage."""
    queries: Tensor
    """``[queries, width]``, preconditioned."""

    def means(self, rows: Tensor) -> Tensor:
        """Mean of each passage's visits."""
        sums = torch.zeros(int(self.sample.max()) + 1, rows.shape[1]).index_add_(0, self.sample, rows)
        return sums / torch.bincount(self.sample).unsqueeze(1)


@cache
def logged(init: str, root: Path) -> Logged:
    """Train the example's language model with logging."""
    from logix_like.examples import language_model as example
    from logix_like.examples.text import Words, batch_of, gospels, shuffled

    import logix_like as logix

    torch.manual_seed(0)
    settings = example.Settings(width=96, vocabulary=2000, length=48, epochs=2)
    texts = dict(islice(gospels().items(), PASSAGES + QUERIES))
    words = Words(list(texts.values()), settings.vocabulary)
    passages = {name: words.encode(text, settings.length) for name, text in texts.items()}
    asked = {name: passages.pop(name) for name in list(passages)[PASSAGES:]}
    model = example.LanguageModel(words.size, settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run = logix.init(
        init, model, "language_model", root=root, projection={"rank": 16, "init": init}, store={"dtype": "float32"}
    )
    for _ in range(settings.epochs):
        for batch in shuffled(passages, settings.batch):
            with run(data_id=batch.ids, mask=batch.mask):
                example.loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    run.finalize()
    questions = batch_of(list(asked), asked)
    with run.query(data_id=questions.ids, mask=questions.mask) as query:
        example.loss_of(model, questions).backward()
    return _logged(run.store, query.gradients.gradients)


def _logged(store: GradientStore, queries: Tensor) -> Logged:
    numbers: dict[object, int] = {}
    sample = torch.tensor([numbers.setdefault(data_id, len(numbers)) for data_id in store.data_id])
    rows = store.gradients[:]
    preconditioned = torch.empty_like(queries)
    for block in store.modules:
        part = rows[:, block.columns].double()
        covariance = part.T @ part / len(part)
        covariance += 0.1 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
        preconditioned[:, block.columns] = torch.linalg.solve(
            covariance, queries[:, block.columns].T.double()
        ).T.float()
    return Logged(store.modules, rows, sample, preconditioned)


def spearman(found: Tensor, exact: Tensor) -> float:
    """Mean over queries of the rank correlation of their scores."""
    pairs = zip(found.argsort(1).argsort(1).double(), exact.argsort(1).argsort(1).double(), strict=True)
    return sum(torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in pairs) / len(exact)


def write(data: Logged, store: Path, dtype: str, codec: str) -> None:
    with StoreWriter(store, data.layout, dtype, codec=codec) as out:
        for first, part in enumerate(data.rows.split(BATCH)):
            ids = tuple(f"passage-{n}" for n in data.sample[first * BATCH : first * BATCH + len(part)].tolist())
            out.put(ProjectedBatch(ids, part, step=first))


def rate(data: Logged, act: Callable[[], object]) -> float:
    """MiB of float32 rows a second, the median of some repetitions."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        act()
        times.append(time.perf_counter() - start)
    return data.rows.nbytes / 2**20 / statistics.median(times)


def every_row(store: Path) -> list[Tensor]:
    return list(decoded(store))


def decoded(store: Path) -> Iterator[Tensor]:
    return (chunk.decode() for chunk in open_store(store).chunks())


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("init", ["orthogonal", "pca"])
def test_dtypes_and_codecs(tmp_path: Path, init: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        data = logged(init, tmp_path_factory.mktemp("logged"))
    exact, exact_means = data.queries @ data.rows.T, data.queries @ data.means(data.rows).T
    show(f"{init} projection, {len(data.rows):,} rows of {data.layout.width:,} numbers in {len(data.layout)} modules")
    show(f"{'dtype':<9} {'codec':<9} {'bytes a row':>11} {'write':>7} {'read':>7}   Spearman: visits, means")
    for dtype in ENCODINGS:
        for codec in CODECS:
            name = f"{dtype}-{codec}"

            def store(name: str = name, dtype: str = dtype, codec: str = codec) -> Path:
                path = new_store(tmp_path / name, data.layout, dtype)
                write(data, path, dtype, codec)
                return path

            written, path = rate(data, store), tmp_path / name
            read = rate(data, partial(every_row, path))
            size = open_store(path).bytes["rows"] / len(data.rows)
            rows = open_store(path).gradients[:].float()
            visits = spearman(data.queries @ rows.T, exact)
            means = spearman(data.queries @ data.means(rows).T, exact_means)
            show(f"{dtype:<9} {codec:<9} {size:>11,.0f} {written:>7,.0f} {read:>7,.0f}   {visits:.4f}, {means:.4f}")
            assert means >= FLOORS.get(dtype, 0)
