"""The oracle: nothing is trained twice, nothing is lost, and what goes wrong is said."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from logix_like.errors import RetrainingError
from logix_like.retraining import Measurements, SubsetOracle
from logix_like.subsets import all_subsets, coin_subsets, random_subsets, subset_name, without_each
from tests.games import Ridge


def sums(samples: list[int], seed: int) -> Tensor:
    """A stand-in for training that a worker process can import."""
    if samples == [0, 1]:
        raise ValueError("only one class")
    return torch.tensor([float(sum(samples)), seed + torch.rand(()).item()])


def slow_sums(samples: list[int], seed: int) -> Tensor:
    """The same, long enough for threads to meet."""
    time.sleep(0.001)
    return sums([2, *samples], seed)


def itself(model: Tensor) -> Tensor:
    return model


class Dying(Executor):
    """Its worker is killed at the third task, as a process pool tells it."""

    def __init__(self) -> None:
        self.taken = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.taken += 1
        future: Future[Any] = Future()
        if self.taken < 3:
            future.set_result(fn(*args, **kwargs))
        else:
            future.set_exception(BrokenProcessPool("a process was terminated abruptly"))
        return future


@pytest.fixture
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        yield executor


def test_values_are_what_training_and_measuring_give() -> None:
    ridge = Ridge()
    masks = all_subsets(ridge.n)
    found = ridge.oracle().values(masks)
    expected = torch.stack([ridge.value(tuple(mask.nonzero().flatten().tolist())) for mask in masks])
    assert torch.equal(found, expected)


def test_measurements_print_in_a_line() -> None:
    measured = Measurements(torch.ones(4, 30, dtype=torch.bool), torch.zeros(4, 2, 5))
    assert str(measured) == "Measurements(subsets=4, samples=30, seeds=2, queries=5, failures=0)"


def test_nothing_is_trained_twice_in_this_process_or_the_next(tmp_path: Path) -> None:
    first, again = Ridge(), Ridge()
    masks = random_subsets(8, 4, 20, torch.Generator().manual_seed(0))
    values = first.oracle(tmp_path).values(torch.cat([masks, masks]))
    assert len(first.trained) == len(set(first.trained)) == len(masks.unique(dim=0))
    assert torch.equal(again.oracle(tmp_path).values(masks), values[:20])
    assert not again.trained


def test_an_interrupted_evaluation_goes_on(tmp_path: Path) -> None:
    ridge, again = Ridge(), Ridge()
    masks = without_each(8)

    def interrupted(samples: list[int], seed: int) -> Tensor:
        if len(ridge.trained) == 5:
            raise KeyboardInterrupt
        return ridge.train(samples, seed)

    with pytest.raises(KeyboardInterrupt):
        SubsetOracle(interrupted, ridge.measure, 8, cache=tmp_path).values(masks)
    again.oracle(tmp_path).values(masks)
    assert len(ridge.trained) == 5
    assert len(again.trained) == 3
    assert not set(ridge.trained) & set(again.trained)


def test_a_damaged_result_is_computed_again(tmp_path: Path) -> None:
    first, again = Ridge(), Ridge()
    masks = without_each(8)
    values = first.oracle(tmp_path).values(masks)
    (tmp_path / f"{subset_name(masks[3])}-0.json").write_text('{"values": [1.0, ')
    assert torch.equal(again.oracle(tmp_path).values(masks), values)
    assert len(again.trained) == 1


def test_seeds_are_trained_each_and_averaged() -> None:
    oracle = SubsetOracle(sums, itself, 4, seeds=3)
    before = torch.random.get_rng_state()
    found = oracle.measurements(torch.tensor([[True, False, True, True]]))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert found.values.shape == (1, 3, 2)
    assert found.values[0, :, 0].tolist() == [5, 5, 5]
    assert found.values[0, :, 1].floor().tolist() == [0, 1, 2]
    assert torch.equal(found.means, found.values.mean(1))


def test_worker_processes_give_the_same_and_a_function_that_cannot_travel_is_named(pool: ProcessPoolExecutor) -> None:
    masks = torch.cat([coin_subsets(6, 10, torch.Generator().manual_seed(1)), torch.ones(1, 6, dtype=torch.bool)])
    alone = SubsetOracle(sums, itself, 6, seeds=2).measurements(masks).values
    assert torch.equal(SubsetOracle(sums, itself, 6, seeds=2, executor=pool).measurements(masks).values, alone)
    homebound = SubsetOracle(lambda samples, seed: 0, itself, 3, executor=pool)
    with pytest.raises(RetrainingError, match=r"3 retrainings failed: .*must be such as can be pickled"):
        homebound.values(without_each(3))


def test_threads_draw_the_random_numbers_of_their_own_seed() -> None:
    masks = coin_subsets(6, 20, torch.Generator().manual_seed(1))
    alone = SubsetOracle(slow_sums, itself, 6, seeds=2).measurements(masks).values
    with ThreadPoolExecutor(4) as threads:
        assert torch.equal(
            SubsetOracle(slow_sums, itself, 6, seeds=2, executor=threads).measurements(masks).values, alone
        )


def test_a_dask_client_is_an_executor() -> None:
    class Client:
        def get_executor(self) -> ThreadPoolExecutor:
            return executor

    with ThreadPoolExecutor(1) as executor:
        oracle = SubsetOracle(lambda samples, seed: len(samples), float, 5, executor=Client())
        assert oracle.values(without_each(5)).tolist() == [[4.0]] * 5


def test_a_failure_is_reported_and_loses_no_other(tmp_path: Path) -> None:
    masks = torch.tensor([[True, True, False], [True, False, True], [False, True, True]])
    oracle = SubsetOracle(sums, itself, 3, cache=tmp_path)
    found = oracle.measurements(masks)
    assert [str(failure) for failure in found.failures] == [
        f"training on 2 samples (subset {subset_name(masks[0])[:8]}, seed 0): ValueError: only one class"
    ]
    assert found.values[0].isnan().all()
    assert found.values[1:, 0, 0].tolist() == [2, 3]
    with pytest.raises(RetrainingError, match=r"1 retrainings failed: training on 2 samples .* only one class"):
        oracle.values(masks)
    with pytest.warns(RuntimeWarning, match=r"1 of 3 subsets are left out: .*only one class"):
        assert torch.equal(found.complete().masks, masks[1:])


def test_if_all_fail_it_is_an_error() -> None:
    oracle = SubsetOracle(sums, itself, 3)
    with pytest.raises(RetrainingError, match="all retrainings failed"):
        oracle.measurements(torch.tensor([[True, True, False]])).complete()


def test_a_dead_worker_is_said_and_what_was_done_is_kept(tmp_path: Path) -> None:
    ridge = Ridge(5)
    with pytest.raises(RetrainingError, match="a worker process died"):
        ridge.oracle(tmp_path, executor=Dying()).values(without_each(5))
    done, again = len(ridge.trained), Ridge(5)
    again.oracle(tmp_path).values(without_each(5))
    assert (done, len(again.trained)) == (2, 3)


def test_what_ended_before_the_pool_broke_is_kept(tmp_path: Path) -> None:
    """A broken pool takes no further task: what it had done by then is not lost."""

    class Refusing(Dying):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            if self.taken == 2:
                raise BrokenProcessPool("a process was terminated abruptly")
            return super().submit(fn, *args, **kwargs)

    with pytest.raises(RetrainingError, match="a worker process died"):
        Ridge(5).oracle(tmp_path, executor=Refusing()).values(without_each(5))
    again = Ridge(5)
    again.oracle(tmp_path).values(without_each(5))
    assert len(again.trained) == 3


def test_an_interrupt_among_workers_loses_nothing_that_had_ended(tmp_path: Path) -> None:
    class Interrupted(Dying):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            if self.taken == 2:
                raise KeyboardInterrupt
            return super().submit(fn, *args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        Ridge(5).oracle(tmp_path, executor=Interrupted()).values(without_each(5))
    again = Ridge(5)
    again.oracle(tmp_path).values(without_each(5))
    assert len(again.trained) == 3


def test_an_executor_that_is_shut_down_is_said() -> None:
    with ThreadPoolExecutor(1) as over:
        oracle = Ridge(5).oracle(executor=over)
    with pytest.raises(RetrainingError, match=r"the executor takes no tasks .*before it is shut down"):
        oracle.full()


def test_what_the_executor_cancels_is_a_failure_like_another() -> None:
    class Cancelling(Dying):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            future = super().submit(fn, *args, **kwargs)
            if self.taken == 2:
                future = Future()
                future.cancel()
                future.set_running_or_notify_cancel()
            return future

    found = Ridge(2).oracle(executor=Cancelling()).measurements(without_each(2))
    assert [failure.reason for failure in found.failures] == ["the executor cancelled it"]
    assert found.values[0].isfinite().all()


@pytest.mark.timeout(30)
def test_a_training_may_ask_an_oracle_itself() -> None:
    inner = Ridge(5).oracle()
    outer = SubsetOracle(lambda samples, seed: inner.full().sum(), itself, 3)
    assert outer.full() == inner.full().sum()


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    oracle = Ridge(5).oracle(tmp_path / "cache")
    (tmp_path / "cache" / "about.json").unlink()
    (tmp_path / "cache").rmdir()
    with pytest.raises(RetrainingError, match="cannot be written to the cache"):
        oracle.full()


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        (torch.tensor([0.0, float("nan")]), r"measure\(\) gave nan for query 1"),
        (torch.tensor([float("inf")]), r"measure\(\) gave inf for query 0"),
        (torch.zeros(2, 2), r"shape \(2, 2\)"),
        (torch.zeros(0), r"shape \(0,\)"),
        (None, r"measure\(\) gave a NoneType; it must give numbers"),
        ({"loss": 1.0}, r"measure\(\) gave a dict; it must give numbers"),
    ],
)
def test_measurements_that_make_no_sense(measured: Any, said: str) -> None:
    with pytest.raises(RetrainingError, match=said):
        SubsetOracle(lambda samples, seed: None, lambda model: measured, 3).full()


def test_as_many_measurements_from_every_model() -> None:
    oracle = SubsetOracle(lambda samples, seed: len(samples), torch.zeros, 3)
    with pytest.raises(RetrainingError, match=r"gave \[2, 3\] numbers"):
        oracle.values(torch.tensor([[True, True, True], [True, True, False]]))


def test_what_no_training_measures_can_be_told() -> None:
    ridge = Ridge()
    oracle = ridge.oracle(empty=-7.0)
    assert oracle.values(torch.zeros(1, 8, dtype=torch.bool)).tolist() == [[-7.0] * 4]
    assert () not in ridge.trained
    oracle = ridge.oracle(empty=torch.arange(4))
    assert oracle.values(torch.zeros(1, 8, dtype=torch.bool)).tolist() == [[0.0, 1.0, 2.0, 3.0]]
    for wrong, said in (
        (float("nan"), "empty gave nan"),
        (torch.zeros(1, 4), r"empty gave a tensor of shape \(1, 4\)"),
    ):
        with pytest.raises(RetrainingError, match=said):
            ridge.oracle(empty=wrong)


def test_what_fails_without_samples_says_what_to_give() -> None:
    oracle = SubsetOracle(lambda samples, seed: max(samples), float, 3)
    with pytest.raises(RetrainingError, match=r"training on 0 samples .*give the oracle empty="):
        oracle.values(torch.zeros(1, 3, dtype=torch.bool))


def test_a_cache_of_something_else_is_refused(tmp_path: Path) -> None:
    Ridge().oracle(tmp_path, name="ridge").full()
    with pytest.raises(RetrainingError, match="holds results of"):
        Ridge().oracle(tmp_path, name="another")
    with pytest.raises(RetrainingError, match="holds results of"):
        Ridge(9).oracle(tmp_path, name="ridge")
    with pytest.raises(RetrainingError, match="cannot be made"):
        Ridge().oracle(tmp_path / "about.json" / "below")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder that takes no files")
def test_a_cache_that_takes_no_files_is_said_at_once() -> None:
    with pytest.raises(RetrainingError, match=r"the cache /proc/self cannot be made"):
        Ridge().oracle(Path("/proc/self"))


def test_arguments_that_make_no_sense() -> None:
    with pytest.raises(RetrainingError, match=r"n is 2\.5; it must be a whole number"):
        SubsetOracle(sums, itself, 2.5)
    ridge = Ridge()
    with pytest.raises(RetrainingError, match="at least 2"):
        SubsetOracle(ridge.train, ridge.measure, 1)
    with pytest.raises(RetrainingError, match="at least once"):
        ridge.oracle(seeds=0)
    with pytest.raises(RetrainingError, match="concurrent\\.futures"):
        ridge.oracle(executor=4)
    for wrong in (torch.ones(1, 7, dtype=torch.bool), torch.ones(1, 8), [[0] * 8], "all"):
        with pytest.raises(RetrainingError, match=r"give bool masks of shape \(subsets, 8\)"):
            ridge.oracle().values(wrong)
    masks = without_each(8)
    for same in (masks.numpy(), masks.tolist()):
        assert torch.equal(ridge.oracle().values(same), ridge.oracle().values(masks))


def test_subsets_are_what_they_say() -> None:
    masks = random_subsets(20, 7, 50, torch.Generator().manual_seed(0))
    assert (masks.sum(1) == 7).all()
    assert len(masks.unique(dim=0)) == 50
    assert len(all_subsets(5).unique(dim=0)) == 32
    assert len({subset_name(mask) for mask in all_subsets(5)}) == 32
    with pytest.raises(RetrainingError, match="at most 12"):
        all_subsets(13)
    with pytest.raises(RetrainingError, match="subsets of 9"):
        random_subsets(8, 9, 1)
