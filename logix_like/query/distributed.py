"""The exact scan on several processes or machines: ranges of rows as futures of any executor.

Each future reads its range from the files, wherever it runs, and gives back the k highest and lowest of each query; the
parts are joined in row order. Scores are those of the exact engine, number by number, since both multiply what they
rank in float64. ``client`` may be a ``dask.distributed.Client`` (a range whose worker died is run again by another), or
any ``concurrent.futures.Executor`` (ranges of a broken pool are scanned here). Every worker must see the store under
the same path, a shared file system or an object store.

A plan for 10^9 rows of 16,384 numbers: 4 bits a number make 8.2 TB. At 2 GB/s a machine (NVMe, or 16 parallel readers
of an object store) 32 machines read it in about 130 s a question, however many queries the question holds up to the
hundred or so whose products take as long as the reading; at 1 bit a number in a quarter of that. A range of
:data:`RANGE_BYTES` is the unit that is lost with a worker. Below 10^7 rows one machine is faster than the start of
a cluster.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from logix_like.errors import MissingDependencyError, QueryError
from logix_like.query.modes import MODES
from logix_like.query.scan import Candidates, Memory
from logix_like.query.scoring import Extremes, Sides, Task, exact_extremes, joined
from logix_like.query.sieve import Scorer
from logix_like.store.ranges import RangeGradients, RowRange, row_range
from logix_like.store.view import Rows

RANGE_BYTES = 512 * 2**20
"""A future scans about so many bytes of rows, decoded to two bytes a number."""


@dataclass(frozen=True, eq=False)
class RangeTask:
    """What one future does; plain data."""

    source: RowRange
    wanted: np.ndarray
    """``[n]`` bool: which rows of the range take part."""
    norm: np.ndarray
    """``[n]``."""
    mode: str
    scorer: Scorer
    """The queries; its ``mode`` is left out, and what it has of rows is of this range."""
    k: int


@dataclass(frozen=True, eq=False)
class _RangeRows:
    """What a scan needs of rows."""

    gradients: RangeGradients
    source: RowRange
    norm: np.ndarray

    def __len__(self) -> int:
        return len(self.norm)

    @property
    def layout(self) -> Any:
        return self.source.layout

    def chunks(self) -> Iterator[Any]:
        return self.gradients.selected(np.arange(len(self)))


def distributed_extremes(task: Task, mode: str, k: int, client: object) -> Sides:
    """The ``k`` highest and the ``k`` lowest; as :func:`exact_extremes`, on the workers of ``client``."""
    executor = as_executor(client)
    parts = _range_tasks(task, mode, k)
    futures = [executor.submit(scan_range, part) for part in parts]
    hidden = not task.progress
    try:
        with tqdm(total=task.candidates.count, desc="influence", unit="row", unit_scale=True, disable=hidden) as bar:
            return joined(_results(parts, futures, bar), k)
    finally:
        for future in futures:
            future.cancel()


def as_executor(client: object) -> Executor:
    """An executor as it is, or that of a Dask client; :class:`QueryError` for anything else."""
    if isinstance(client, Executor):
        return client
    if client is None:
        try:
            from distributed import default_client
        except ImportError as error:
            raise MissingDependencyError(
                "engine='dask' without client= needs Dask, which is not installed: pip install 'logix_like[dask]', or "
                "give client= an executor of concurrent.futures"
            ) from error
        try:
            client = default_client()
        except ValueError as error:
            raise QueryError(
                "engine='dask' found no Dask client: make one (dask.distributed.Client()) or give client="
            ) from error
    if not hasattr(client, "get_executor"):
        raise QueryError(
            f"client is a {type(client).__name__}; it must be a dask.distributed.Client or an executor of "
            "concurrent.futures"
        )
    return cast(Executor, client.get_executor(pure=False))


def scan_range(part: RangeTask) -> Sides:
    """Run in a worker: the extremes of one range, with positions among all rows."""
    rows = _RangeRows(_open(part.source), part.source, part.norm)
    wanted = torch.from_numpy(part.wanted)
    count = int(wanted.sum())
    queries = part.scorer.queries
    candidates = Candidates(cast(Rows, rows), wanted, count, count == len(rows), queries.dtype, Memory(0))
    task = Task(candidates, replace(part.scorer, mode=MODES[part.mode]), False)
    with _worker_threads():
        sides = exact_extremes(task, min(part.k, count))
    top, bottom = (Extremes(one.scores, one.positions + part.source.start) for one in sides)
    return top, bottom


@lru_cache(maxsize=64)
def _open(source: RowRange) -> RangeGradients:
    """Kept, so that a worker compares checksums once and not at each question."""
    return source.open()


@contextmanager
def _worker_threads() -> Iterator[None]:
    """Inside a Dask worker as many threads as it was given; elsewhere as many as there are."""
    dask = sys.modules.get("distributed")  # a Dask worker has imported it; others need not
    try:
        threads = None if dask is None else dask.get_worker().state.nthreads
    except ValueError:
        threads = None
    if threads is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _range_tasks(task: Task, mode: str, k: int) -> list[RangeTask]:
    candidates, scorer = task.candidates, task.scorer
    rows, norm = candidates.rows, np.asarray(candidates.rows.norm)
    step = max(1, RANGE_BYTES // (2 * rows.layout.width))
    found = []
    for start in range(0, len(rows), step):
        stop = min(start + step, len(rows))
        wanted = candidates.wanted[start:stop]
        if not bool(wanted.any()):
            continue
        own = replace(
            scorer,
            mode=cast(Any, None),
            row_lengths=_cut(scorer.row_lengths, start, stop),
            factor=None if scorer.factor is None else _cut(scorer.factor, start, stop),
        )
        source = row_range(rows, start, stop)
        found.append(RangeTask(source, wanted.clone().numpy(), norm[start:stop].copy(), mode, own, k))
    return found


def _cut(column: Tensor, start: int, stop: int) -> Tensor:
    """A copy of a part: pickling a view would send the whole."""
    return column[start:stop].clone()


def _results(parts: list[RangeTask], futures: list[Future[Sides]], bar: Any) -> Iterator[Sides]:
    for part, future in zip(parts, futures, strict=True):
        try:
            found = future.result()
        except BrokenExecutor:
            found = scan_range(part)
        yield found
        bar.update(int(part.wanted.sum()))
