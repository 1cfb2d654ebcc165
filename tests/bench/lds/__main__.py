"""LDS of every estimator on one truth: ``python -m tests.bench.lds --problem images --rows main``.

The truth (models really retrained on random halves) is shipped; where it is not, or no longer holds, it is computed
once and kept in the cache folder. Prints a line for each estimator as soon as it is known, and all problems side by
side at the end: ``--rows compact`` is the README's table, ``--rows all`` all. Figures are kept too, so that what was
interrupted goes on where it was, as long as no line of the code has changed.
"""

from __future__ import annotations

import argparse
import fnmatch
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from logix_like.evaluation import lds
from logix_like.evaluation.lds import noise_ceiling
from logix_like.retraining import Measurements
from tests.bench.lds.bench import Bench, Row
from tests.bench.lds.figures import Figure, Figures
from tests.bench.lds.problems import PROBLEMS, SHOWN, Problem
from tests.bench.lds.rows import SETS, rows_of
from tests.bench.lds.truth import retrained, save_truth, truth_of


@contextmanager
def benches(problem: Problem, runs: int) -> Iterator[list[Bench]]:
    """The problem trained with several seeds."""
    with tempfile.TemporaryDirectory(prefix="lds-", ignore_cleanup_errors=True) as root:
        yield [Bench(problem, seed, Path(root) / str(seed)) for seed in range(runs)]


CEILING = "noise ceiling"
say = partial(print, flush=True)


def measured(row: Row, trained: list[Bench], truth: Measurements) -> Figure:
    """LDS with each training's scores."""
    start = time.perf_counter()
    found = [lds(row(bench), truth) for bench in trained]
    low, high = (sum(ends) / len(found) for ends in zip(*(one.interval for one in found), strict=True))
    return Figure(tuple(one.value for one in found), low, high, time.perf_counter() - start)


def line(name: str, found: Figure) -> str:
    return f"| {name:<58} | {found.value:6.3f} | {found.low:6.3f} to {found.high:6.3f} | {found.seconds:6.1f} |"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.lds", description=__doc__)
    parser.add_argument("--problem", choices=PROBLEMS, action="append", help="default: those of the README")
    parser.add_argument("--rows", choices=[*SETS, "all"], nargs="+", default=["main"], help="default: main")
    parser.add_argument("--only", default="*", help="glob on the rows' names")
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2, help="retrainings of each subset")
    parser.add_argument("--runs", type=int, default=1, help="trainings that are logged and scored; the mean is shown")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "lds-cache")
    parser.add_argument("--ship", action="store_true", help="write the truth to the repository, and measure nothing")
    return parser.parse_args()


def figures_of(problem: Problem, truth: Measurements, options: argparse.Namespace) -> dict[str, float]:
    """LDS of every row that is asked for, each printed as soon as it is known."""
    rows = {name: row for name, row in rows_of(problem, options.rows).items() if fnmatch.fnmatch(name, options.only)}
    kept = Figures(options.cache / "figures.jsonl", problem.name, options.runs)
    figures = {}
    say(f"\n{problem.name}: {len(truth.masks)} halves x {truth.values.shape[1]} seeds; {options.runs} logged trainings")
    say(f"| {'scores':<58} | LDS    | 95 % interval    | s      |")
    say(f"|{'-' * 60}|--------|------------------|--------|")
    with benches(problem, options.runs) as trained:
        for name, row in rows.items():
            try:
                found = kept.get(name) or kept.keep(name, measured(row, trained, truth))
            except Exception as error:  # whatever it is, also another library's: the other rows are still wanted
                say(f"| {name:<58} | {type(error).__name__}: {error}")
                continue
            say(line(name, found))
            figures[name] = found.value
    figures[CEILING] = noise_ceiling(truth)
    say(f"{CEILING} {figures[CEILING]:.3f}")
    return figures


def summary(figures: dict[str, dict[str, float]]) -> str:
    """All problems side by side, a column each."""
    lines = [f"| scores | {' | '.join(figures)} |", f"|---|{'---|' * len(figures)}"]
    for row in dict.fromkeys(name for one in figures.values() for name in one):
        cells = (f"{one[row]:.3f}".removeprefix("0") if row in one else "-" for one in figures.values())
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    options = parsed()
    torch.set_num_threads(1)
    found = {}
    for name in options.problem or SHOWN:
        problem = PROBLEMS[name]
        make = retrained if options.ship else truth_of
        truth = make(
            problem, subsets=options.subsets, seeds=options.seeds, cache=options.cache, workers=options.workers
        )
        if options.ship:
            say(f"wrote {save_truth(problem, truth)}")
        else:
            found[name] = figures_of(problem, truth, options)
    if len(found) > 1:
        say("\n" + summary(found))


if __name__ == "__main__":
    main()
