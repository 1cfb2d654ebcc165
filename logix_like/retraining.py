"""What really happens: models retrained on subsets of the training samples, and what is measured of them.

One oracle serves all that asks this question (leave-one-out, Shapley values, LDS, brittleness, ...). It trains a
subset with a seed once, keeps the result on disk, and goes on where it was interrupted::

    def train(samples, seed):            # samples: list of indices, ascending
        model = new_model()
        ...
        return model

    def measure(model):                  # the larger, the better: a margin, or minus a loss
        return -per_query_losses(model)  # [queries]

    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        oracle = SubsetOracle(train, measure, n=len(data), cache="retrained/mnist", executor=pool)
        values = oracle.values(random_subsets(len(data), len(data) // 2, 100))

Sign: what is measured grows as the model gets better, so that a sample whose removal lowers it has a positive score.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from logix_like.errors import RetrainingError
from logix_like.subsets import as_subsets, subset_name, whole_number

Train = Callable[[list[int], int], Any]
"""``train(samples, seed) -> model``: trains on the samples with these indices (ascending)."""
Measure = Callable[[Any], Tensor]
"""``measure(model) -> [queries]``: larger is better."""

FORMAT = "logix_like.retraining/1"
SUBMITTED_AHEAD = 64
"""So many retrainings wait in an executor at a time: enough for any pool, few enough to stop soon."""
SHOWN_FAILURES = 3

Key = tuple[str, int]
"""A subset's name and a seed."""
Outcome = list[float] | str
"""What was measured, or why nothing was."""

_RANDOM_NUMBERS = RLock()
"""Held while a model is trained: torch's generator is the process's, and threads would draw from each other's seeds.
A training may itself ask an oracle."""


@dataclass(frozen=True)
class Failure:
    """One retraining that came to no result."""

    subset: str
    """Name of the subset (:func:`~logix_like.subsets.subset_name`)."""
    size: int
    """Samples in it."""
    seed: int
    reason: str

    def __str__(self) -> str:
        told = f"training on {self.size} samples (subset {self.subset[:8]}, seed {self.seed}): {self.reason}"
        return told if self.size else told + " (give the oracle empty=, what is measured without any training)"


@dataclass(frozen=True, eq=False)
class Measurements:
    """What was measured of models retrained on subsets."""

    masks: Tensor
    """``[subsets, n]`` bool: which samples each was trained on."""
    values: Tensor
    """``[subsets, seeds, queries]`` float64; NaN where a retraining failed."""
    failures: tuple[Failure, ...] = ()

    def __repr__(self) -> str:
        """How much was measured."""
        (subsets, seeds, queries), samples = self.values.shape, self.masks.shape[1]
        return (
            f"Measurements(subsets={subsets}, samples={samples}, seeds={seeds}, queries={queries}, "
            f"failures={len(self.failures)})"
        )

    @property
    def means(self) -> Tensor:
        """``[subsets, queries]``: mean over the seeds; NaN where one of them failed."""
        return self.values.mean(1)

    def complete(self) -> Measurements:
        """Without the subsets of which a retraining failed, which a warning counts.

        Raises:
            RetrainingError: none is left.
        """
        good = self.means.isfinite().all(1)
        if bool(good.all()):
            return self
        if not bool(good.any()):
            raise RetrainingError(_told("all retrainings failed", self.failures))
        warnings.warn(
            _told(f"{int((~good).sum())} of {len(good)} subsets are left out", self.failures), RuntimeWarning, 3
        )
        return Measurements(self.masks[good], self.values[good])


def _told(what: str, failures: Sequence[Failure]) -> str:
    shown = "; ".join(map(str, failures[:SHOWN_FAILURES]))
    more = len(failures) - SHOWN_FAILURES
    return what + (f": {shown}" if shown else "") + (f"; and {more} more" if more > 0 else "")


class SubsetOracle:
    """Retrains on subsets and measures; never the same subset with the same seed twice.

    Args:
        train: ``train(samples, seed) -> model``; torch is seeded with the seed before it is called.
        measure: ``measure(model) -> [queries]``, larger is better.
        n: Number of training samples.
        seeds: Each subset is trained this many times, with the seeds 0, 1, ..., and the mean is taken.
        cache: Folder that keeps results; without one they last as long as this object. Several processes may use one
            at once, but what they need at the same time each trains for itself: share work by ``executor``.
        name: What is trained and measured, in a word; a cache made under another name is refused. Change it
            when ``train`` or ``measure`` change.
        executor: Any ``concurrent.futures`` executor, or a ``dask.distributed`` client; None trains in this process.
            A process pool needs ``train`` and ``measure`` that can be pickled (functions of a module, or objects
            that load their data themselves). Threads take turns, since they share torch's random numbers.
        empty: What is measured without any training, a number or ``[queries]``; None trains on no samples.
        progress: Show a bar with the time left: always, never, or (None) on a terminal.

    Raises:
        RetrainingError: an argument makes no sense, or the cache belongs to something else.
    """

    def __init__(
        self,
        train: Train,
        measure: Measure,
        n: int,
        *,
        seeds: int = 1,
        cache: str | os.PathLike[str] | None = None,
        name: str = "",
        executor: Any = None,
        empty: Tensor | float | None = None,
        progress: bool | None = None,
    ) -> None:
        n, seeds = whole_number(n, "n"), whole_number(seeds, "seeds")
        if n < 2:
            raise RetrainingError(f"there is {n} training sample; comparing subsets needs at least 2")
        if seeds < 1:
            raise RetrainingError(f"seeds is {seeds}; each subset must be trained at least once")
        self.n = n
        self.seeds = seeds
        self._train = train
        self._measure = measure
        self._executor = _as_executor(executor)
        self._empty = None if empty is None else torch.tensor(_numbers(empty, "empty"), dtype=torch.float64)
        self._progress = progress
        self._results = _Results(None if cache is None else Path(cache), {"format": FORMAT, "name": name, "n": n})
        self._queries: int | None = None

    @property
    def queries(self) -> int:
        """How many quantities are measured; trains on all samples if nothing was measured yet."""
        if self._queries is None:
            self.full()
        assert self._queries is not None
        return self._queries

    def full(self) -> Tensor:
        """``[queries]``: what is measured after training on all samples."""
        return self.values(torch.ones(1, self.n, dtype=torch.bool))[0]

    def values(self, masks: Tensor) -> Tensor:
        """``[subsets, queries]`` float64: what is measured after training on each of ``masks [subsets, n]``.

        Raises:
            RetrainingError: some retraining failed; all others are done and kept by then.
        """
        found = self.measurements(masks)
        if found.failures:
            raise RetrainingError(_told(f"{len(found.failures)} retrainings failed", found.failures))
        return found.means

    def measurements(self, masks: Tensor) -> Measurements:
        """The same for every seed; a retraining that fails is named in the result and loses no other.

        Raises:
            RetrainingError: a worker process died, or two models gave different numbers of measurements.
        """
        masks = as_subsets(masks, self.n)
        names = [subset_name(mask) for mask in masks]
        wanted = {(name, seed): mask for name, mask in zip(names, masks, strict=True) for seed in range(self.seeds)}
        failures = self._compute({key: mask for key, mask in wanted.items() if self._known(key, mask) is None})
        return Measurements(masks, self._table(names, masks), tuple(failures))

    def _table(self, names: Sequence[str], masks: Tensor) -> Tensor:
        lines = [
            [self._known((name, s), mask) for s in range(self.seeds)] for name, mask in zip(names, masks, strict=True)
        ]
        widths = {value.numel() for line in lines for value in line if value is not None}
        if len(widths) > 1 or (self._queries is not None and widths - {self._queries}):
            counts = sorted(widths | ({self._queries} if self._queries else set()))
            raise RetrainingError(
                f"measure() gave {counts} numbers for different models; it must always give as many (if it has changed "
                "since a cache was made, give the new results another name=; an empty= with a line must fit too)"
            )
        if not widths:
            return torch.full((len(masks), self.seeds, self._queries or 1), math.nan, dtype=torch.float64)
        (self._queries,) = widths
        missing = torch.full((self._queries,), math.nan, dtype=torch.float64)
        return torch.stack([torch.stack([missing if v is None else v for v in line]) for line in lines])

    def _known(self, key: Key, mask: Tensor) -> Tensor | None:
        if self._empty is not None and not bool(mask.any()):
            return self._empty.expand(self.queries) if self._empty.numel() == 1 else self._empty
        return self._results.get(key)

    def _compute(self, wanted: Mapping[Key, Tensor]) -> list[Failure]:
        failures = []
        bar = tqdm(total=len(wanted), desc="retraining", unit="model", disable=self._hidden(len(wanted)))
        with bar, closing(self._outcomes(wanted)) as outcomes:  # closed at once when interrupted
            for key, outcome in outcomes:
                if isinstance(outcome, str):
                    failures.append(Failure(key[0], int(wanted[key].sum()), key[1], outcome))
                    bar.set_postfix(failed=len(failures))
                else:
                    self._results.put(key, outcome)
                bar.update()
        return failures

    def _hidden(self, count: int) -> bool | None:
        return True if not count else None if self._progress is None else not self._progress

    def _outcomes(self, wanted: Mapping[Key, Tensor]) -> Generator[tuple[Key, Outcome]]:
        tasks = ((key, mask.nonzero().flatten().tolist()) for key, mask in wanted.items())
        if self._executor is None:
            for key, samples in tasks:
                yield key, retrain(self._train, self._measure, samples, key[1])
            return
        yield from self._parallel(self._executor, tasks)

    def _parallel(self, executor: Executor, tasks: Iterable[tuple[Key, list[int]]]) -> Generator[tuple[Key, Outcome]]:
        waiting: dict[Future[Outcome], Key] = {}
        tasks = iter(tasks)
        try:
            while True:
                for key, samples in islice(tasks, SUBMITTED_AHEAD - len(waiting)):
                    waiting[executor.submit(retrain, self._train, self._measure, samples, key[1])] = key
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting[future], _outcome(future)
                    del waiting[future]
        except BrokenExecutor as error:
            raise RetrainingError(
                "a worker process died (out of memory, or killed); what was retrained before is kept: start again "
                "with a new executor, perhaps of fewer workers, to go on"
            ) from error
        except RuntimeError as error:
            raise RetrainingError(
                f"the executor takes no tasks ({error}); ask the oracle before it is shut down, inside its 'with'"
            ) from error
        finally:
            self._keep_done(waiting)

    def _keep_done(self, waiting: Mapping[Future[Outcome], Key]) -> None:
        """Whatever broke off, what had ended by then is not lost; what had not begun is not begun."""
        for future, key in waiting.items():
            if not future.cancel() and future.done() and not future.cancelled() and future.exception() is None:
                outcome = future.result()
                if not isinstance(outcome, str):
                    self._results.put(key, outcome)


def retrain(train: Train, measure: Measure, samples: list[int], seed: int) -> Outcome:
    """Train and measure once, wherever an executor runs it; a failure is returned in words."""
    try:
        with _RANDOM_NUMBERS, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            value = measure(train(samples, seed))
        return _numbers(value)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _outcome(future: Future[Outcome]) -> Outcome:
    if future.cancelled():
        return "the executor cancelled it"
    error = future.exception()
    if isinstance(error, BrokenExecutor):
        raise error
    if error is None:
        return future.result()
    return (
        f"the executor could not run it ({type(error).__name__}: {error}); for processes train and measure must be "
        "such as can be pickled, functions of a module"
    )


def _numbers(value: Any, who: str = "measure()") -> list[float]:
    try:
        measured = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RetrainingError(f"{who} gave a {type(value).__name__}; it must give numbers, [queries]") from error
    if measured.ndim > 1 or not measured.numel():
        raise RetrainingError(f"{who} gave a tensor of shape {tuple(measured.shape)}; it must give [queries]")
    measured = measured.reshape(-1)
    if not bool(measured.isfinite().all()):
        first = int(measured.isfinite().to(torch.uint8).argmin())
        raise RetrainingError(f"{who} gave {measured[first].item()} for query {first}; all must be finite numbers")
    numbers: list[float] = measured.tolist()
    return numbers


def _as_executor(executor: Any) -> Executor | None:
    # A dask client is none itself, but gives one; this way dask need not be imported to know it.
    found: Executor | None = executor.get_executor() if hasattr(executor, "get_executor") else executor
    if found is not None and not hasattr(found, "submit"):
        raise RetrainingError(
            f"executor is a {type(executor).__name__}; give a concurrent.futures executor or a dask.distributed client"
        )
    return found


class _Results:
    """Results by (subset, seed), in memory and as one small JSON file each."""

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        self._folder = folder
        self._held: dict[Key, Tensor] = {}
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._require_same(folder / "about.json", dict(about))
            except OSError as error:
                raise RetrainingError(f"the cache {folder} cannot be made ({error}); give another folder") from error

    def get(self, key: Key) -> Tensor | None:
        """What was measured, ``[queries]``, or None."""
        if key not in self._held and self._folder is not None:
            # A file that cannot be read is as one that is missing: the retraining is done again.
            numbers = _read_json(self._path(self._folder, key)).get("values")
            if isinstance(numbers, list) and numbers and all(isinstance(n, float) for n in numbers):
                self._held[key] = torch.tensor(numbers, dtype=torch.float64)
        return self._held.get(key)

    def put(self, key: Key, numbers: list[float]) -> None:
        """Keep a result; on disk it is there whole or not at all."""
        self._held[key] = torch.tensor(numbers, dtype=torch.float64)
        if self._folder is not None:
            try:
                _write_json(self._path(self._folder, key), {"values": numbers})
            except OSError as error:
                raise RetrainingError(
                    f"a result cannot be written to the cache {self._folder} ({error}); what was written before is "
                    "kept: mend the folder and start again"
                ) from error

    def _path(self, folder: Path, key: Key) -> Path:
        return folder / f"{key[0]}-{key[1]}.json"

    def _require_same(self, path: Path, about: dict[str, Any]) -> None:
        if not path.exists():
            _write_json(path, about)
        found = _read_json(path)
        if found != about:
            raise RetrainingError(
                f"the cache {path.parent} holds results of {found or 'something unreadable'}, not of {about}; give "
                "another folder, or remove this one"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    unfinished = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        unfinished.write_text(json.dumps(content))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
