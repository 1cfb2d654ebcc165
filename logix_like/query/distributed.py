"""The exact scan on several processes or machines: ranges of rows as futures of any executor.

Each future reads its range from the files, wherever it runs, and gives back the k highest and lowest of each query; the
parts are joined in row order, on Dask a few at a time by the workers. Dask's workers are sent the queries once, not
with each range, and a range goes first to the worker that has compared its checksums before. Scores are those of the
exact engine, number by number, since both multiply what they rank in float64. ``client`` may be a
``dask.distributed.Client`` (a range whose worker died is run again by another), or any ``concurrent.futures.Executor``
(ranges of a broken pool are scanned here). Every worker must see the store under the same path, a shared file system
or an object store.

A plan for 10^9 rows of 16,384 numbers, on paper: 4 bits a number make 8.2 TB. At 2 GB/s a machine (NVMe, or 16 parallel
readers of an object store) 32 machines read it in about 130 s a question, however many queries the question holds up to
the hundred or so whose products take as long as the reading; at 1 bit a number in a quarter of that. A range of
:data:`RANGE_BYTES` is the unit that is lost with a worker. That is 1.2 machine hours, 1 to 3 dollars a question where
a machine costs 1 to 2 dollars an hour, and about 190 dollars a month for the rows where an object store takes 23 a TB.
Below 10^7 rows one machine is faster than the start of a cluster.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from logix_like.errors import MissingDependencyError, QueryError
from logix_like.query.modes import MODES
from logix_like.query.scan import Candidates, Memory
from logix_like.query.scoring import Extremes, Sides, Task, exact_extremes, joined
from logix_like.query.sieve import Scorer
from logix_like.query.table import counted
from logix_like.store.reading.ranges import RangeGradients, RowRange, row_range
from logix_like.store.reading.view import Rows

RANGE_BYTES = 512 * 2**20
"""A future scans about so many bytes of rows, decoded to two bytes a number."""
JOINED_RANGES = 4
"""Dask's workers join the results of so many ranges before they give them back."""
IN_FLIGHT = 64
"""So many ranges are handed out before their results are needed, at most: more than most clusters have threads."""

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of every range; plain data: pools send tensors through memory that dies with a process."""

    mode: str
    queries: np.ndarray
    """``[queries, width]``, preconditioned."""
    query_lengths: np.ndarray
    """``[queries]``."""
    k: int


@dataclass(frozen=True, eq=False)
class RangeTask:
    """A range of rows, and what is known of them; plain data."""

    source: RowRange
    wanted: np.ndarray
    """``[n]`` bool: which rows of the range take part."""
    norm: np.ndarray
    """``[n]``."""
    row_lengths: np.ndarray
    """As in :class:`Scorer`, of this range."""
    factor: np.ndarray | None
    """As in :class:`Scorer`, of this range."""
    number: int
    """Which of all ranges it is."""

    @property
    def count(self) -> int:
        """How many rows take part."""
        return int(self.wanted.sum())


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


Found = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Scores and positions of the highest, then of the lowest: :data:`Sides` as plain data."""


class _Result(Protocol):
    """A future of :mod:`concurrent.futures` or of Dask."""

    def result(self) -> Found: ...

    def cancel(self) -> object: ...


def distributed_extremes(task: Task, mode: str, k: int, client: object) -> tuple[Sides, str]:
    """The ``k`` highest and the ``k`` lowest; as :func:`exact_extremes`, on the workers of ``client``.

    Also a remark, where workers were lost for good.
    """
    workers = as_workers(client)
    scorer, parts = task.scorer, _range_tasks(task)
    asked = Asked(mode, scorer.queries.numpy(), scorer.query_lengths.numpy(), k)
    started = _on_executor(workers, parts, asked) if isinstance(workers, Executor) else _on_dask(workers, parts, asked)
    lost: list[RangeTask] = []
    with task.candidates.bar(task.progress, "influence") as advance:
        sides = joined(_results(started, asked, advance, lost), k)
    return sides, f"workers were lost: {counted(len(lost), 'range', 'ranges')} scanned here" if lost else ""


def as_workers(client: object) -> Any:
    """An executor or a Dask client; :class:`QueryError` for anything else."""
    if client is None:
        try:
            from distributed import default_client
        except ImportError as error:
            raise MissingDependencyError(
                "engine='dask' without client= needs Dask, which is not installed: pip install 'logix_like[dask]', or "
                "give client= an executor of concurrent.futures"
            ) from error
        try:
            return default_client()
        except ValueError as error:
            raise QueryError(
                "engine='dask' found no Dask client: make one (dask.distributed.Client()) or give client="
            ) from error
    if not isinstance(client, Executor) and not hasattr(client, "nthreads"):
        raise QueryError(
            f"client is a {type(client).__name__}; it must be a dask.distributed.Client or an executor of "
            "concurrent.futures"
        )
    return client


Started = tuple[list[RangeTask], _Result]
"""Ranges, and the future of their joint extremes."""


def _on_executor(executor: Executor, parts: Iterator[RangeTask], asked: Asked) -> Iterator[Started]:
    """One future for each range, once it is asked for."""
    for part in parts:
        try:
            future: _Result = executor.submit(scan_range, part, asked)
        except BrokenExecutor as error:  # it broke before this range, or even before this question
            future = _failed(error)
        except RuntimeError as error:
            raise QueryError(
                f"client is a {type(executor).__name__} that takes no more work ({error}): ask inside its with block, "
                "or give another one"
            ) from error
        yield [part], future


def _failed(error: Exception) -> Future[Found]:
    failed: Future[Found] = Future()
    failed.set_exception(error)
    return failed


def _on_dask(client: Any, parts: Iterator[RangeTask], asked: Asked) -> Iterator[Started]:
    """A future for each few ranges, which joins theirs on a worker."""
    # A task and not client.scatter: scattered data cannot be made again when the worker that holds them dies.
    there = client.submit(_itself, asked, pure=False)
    while few := list(islice(parts, JOINED_RANGES)):
        futures = [client.submit(scan_range, part, there, pure=False, **_place(client, part)) for part in few]
        yield few, client.submit(join_ranges, futures, asked.k, pure=False)


def _place(client: Any, part: RangeTask) -> dict[str, Any]:
    """The worker that a range goes to as long as it is there and not busier than others."""
    workers = sorted(client.nthreads())
    if not workers:  # a cluster that is still growing
        return {}
    return {"workers": workers[part.number % len(workers)], "allow_other_workers": True}


def _results(
    started: Iterator[Started], asked: Asked, advance: Callable[[int], object], lost: list[RangeTask]
) -> Iterator[Sides]:
    """What each future gives; ranges whose workers cannot give theirs are scanned here, and added to ``lost``."""
    flying: deque[Started] = deque()
    try:
        for parts, future in _ahead(started, flying):
            try:
                yield _sides(future.result())
            except (BrokenExecutor, CancelledError):  # a pool that broke, or all workers that held the queries
                lost += parts
                yield from (_sides(scan_range(part, asked)) for part in parts)
            advance(sum(part.count for part in parts))
    finally:
        for _, future in flying:
            future.cancel()


def _ahead(items: Iterable[Item], flying: deque[Item]) -> Iterator[Item]:
    """The same items, of which those in ``flying`` were taken before they are needed."""
    for item in items:
        flying.append(item)
        if len(flying) > IN_FLIGHT:
            yield flying.popleft()
    while flying:
        yield flying.popleft()


def scan_range(part: RangeTask, asked: Asked) -> Found:
    """Run in a worker: the extremes of one range, with positions among all rows."""
    rows = _RangeRows(_open(part.source), part.source, part.norm)
    wanted, count = torch.tensor(part.wanted), part.count
    # Copies: what came from another process may not be written to.
    queries, query_lengths, row_lengths = map(torch.tensor, (asked.queries, asked.query_lengths, part.row_lengths))
    factor = None if part.factor is None else torch.tensor(part.factor)
    candidates = Candidates(cast(Rows, rows), wanted, count, count == len(rows), queries.dtype, Memory(0))
    scorer = Scorer(MODES[asked.mode], queries, query_lengths, row_lengths, factor)
    with _worker_threads():
        top, bottom = exact_extremes(Task(candidates, scorer, False), min(asked.k, count))
    moved = (Extremes(one.scores, one.positions + part.source.start) for one in (top, bottom))
    return _plain(*moved)


def _itself(asked: Asked) -> Asked:
    return asked


def join_ranges(parts: list[Found], k: int) -> Found:
    """Run in a worker: the extremes of some ranges, in row order."""
    return _plain(*joined(map(_sides, parts), k))


def _plain(top: Extremes, bottom: Extremes) -> Found:
    return top.scores.numpy(), top.positions.numpy(), bottom.scores.numpy(), bottom.positions.numpy()


def _sides(found: Found) -> Sides:
    top, top_positions, bottom, bottom_positions = map(torch.tensor, found)
    return Extremes(top, top_positions), Extremes(bottom, bottom_positions)


def _open(source: RowRange) -> RangeGradients:
    """Mapped files are kept open, so that a worker compares their checksums once and not at each question.

    What is read or decompressed would stay in the worker's memory.
    """
    return _mapped(source) if source.mapped else source.open()


@lru_cache(maxsize=64)
def _mapped(source: RowRange) -> RangeGradients:
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


def _range_tasks(task: Task) -> Iterator[RangeTask]:
    candidates, scorer = task.candidates, task.scorer
    rows, norm = candidates.rows, np.asarray(candidates.rows.norm)
    step = max(1, RANGE_BYTES // (2 * rows.layout.width))
    for start in range(0, len(rows), step):
        stop = min(start + step, len(rows))
        wanted = candidates.wanted[start:stop]
        if not bool(wanted.any()):
            continue
        factor = None if scorer.factor is None else _cut(scorer.factor, start, stop)
        source, lengths = row_range(rows, start, stop), _cut(scorer.row_lengths, start, stop)
        yield RangeTask(source, wanted.clone().numpy(), norm[start:stop].copy(), lengths, factor, start // step)


def _cut(column: Tensor, start: int, stop: int) -> np.ndarray:
    """A copy of a part: pickling a view would send the whole."""
    return column[start:stop].clone().numpy()
