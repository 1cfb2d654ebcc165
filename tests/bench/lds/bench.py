"""Runs of a problem whose scores are measured: logged while training, or by a pass behind it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import logix_like as logix
from logix_like.capture.selection import select_modules
from logix_like.estimators import Estimator
from logix_like.evaluation.scored import score_matrix
from tests.bench.lds.problems import Problem

Row = Callable[["Bench"], Tensor]
"""From a trained problem to scores ``[queries, samples]``."""


class Logged:
    """A run's store, and queries to it."""

    def __init__(self, problem: Problem, run: logix.Run, model: nn.Module) -> None:
        self.problem, self.run, self.model = problem, run, model

    def query(self, checkpoints: str | None = None) -> Any:
        """The problem's queries, at the final weights or averaged over checkpoints."""
        batch = self.problem.asked()
        ids = range(self.problem.queries)
        mask = self.problem.mask(batch)
        return self.run.query_fn(batch, self.problem.loss, data_id=ids, mask=mask, checkpoints=checkpoints)

    def scores(self, checkpoints: str | None = None, **options: Any) -> Tensor:
        """``[queries, samples]`` in the order of the truth."""
        result = self.run.compute_influence_all(self.query(checkpoints), progress=False, **options)
        return score_matrix(result, self.problem.samples, self.problem.queries)


class Bench:
    """One problem trained with one seed: the model, and its runs by config, each made when first asked for."""

    def __init__(self, problem: Problem, seed: int, root: Path) -> None:
        self.problem, self.seed, self.root = problem, seed, root
        self._runs: dict[str, Logged] = {}

    @cached_property
    def model(self) -> nn.Module:
        """Trained on all samples."""
        return self.problem.train(range(self.problem.samples), self.seed)

    def training(self, **settings: Any) -> Logged:
        """Logged while training, with a checkpoint after every epoch; ``settings`` as for :meth:`posthoc`."""
        return self._run("training", self._log_training, settings)

    def posthoc(self, **settings: Any) -> Logged:
        """Logged by one pass at the final weights; ``rank``, ``init``, ``dtype`` or a section of the config.

        What is not named is as in the problem's preset.
        """
        return self._run("posthoc", self._log_pass, settings)

    def estimated(self, kind: Callable[..., Estimator], **options: Any) -> Tensor:
        """Scores of an estimator made from a model, batches and an objective; ``at`` is :attr:`at_all` or nothing."""
        model = self.training().model if "at" in options else self.model
        if "curvature" not in options:  # which knows its modules
            options["selection"] = select_modules(model, types=("Linear", "Conv2d"), exclude=self.problem.exclude)
        batches = [batch for _, batch in self.batches()]
        estimator = kind(model, batches, self.problem.objective, progress=False, **options)
        return score_matrix(estimator, self.problem.samples, self.problem.queries, self.problem.asked())

    def at_all(self) -> Iterator[nn.Module]:
        """The logged training's model at each of its checkpoints."""
        return self.training().run.at_checkpoints("all")

    def batches(self, size: int = 50) -> list[tuple[range, Any]]:
        """Training samples in order: their numbers and the batch."""
        starts = range(0, self.problem.samples, size)
        parts = [range(start, min(start + size, self.problem.samples)) for start in starts]
        return [(part, self.problem.training(part)) for part in parts]

    def close(self) -> None:
        """Remove the stores."""
        self._runs.clear()
        shutil.rmtree(self.root, ignore_errors=True)

    def _run(
        self, kind: str, log: Callable[[str, Mapping[str, Any]], tuple[logix.Run, nn.Module]], given: Mapping[str, Any]
    ) -> Logged:
        name = f"{kind} {given}"
        if name not in self._runs:
            projection = {key: given[key] for key in ("rank", "init") if key in given}
            settings = {key: value for key, value in given.items() if key not in ("rank", "init", "dtype")}
            settings |= {"projection": projection} if projection else {}
            settings |= {"store": {"dtype": given["dtype"]}} if "dtype" in given else {}
            self._runs[name] = Logged(self.problem, *log(f"run-{len(self._runs)}", settings))
        return self._runs[name]

    def _init(self, name: str, model: nn.Module, settings: Mapping[str, Any], **options: Any) -> logix.Run:
        return logix.init(name, model, self.problem.preset, root=str(self.root), verbose=False, **settings, **options)

    def _log_training(self, name: str, settings: Mapping[str, Any]) -> tuple[logix.Run, nn.Module]:
        run: logix.Run | None = None

        def started(model: nn.Module) -> logix.Run:
            nonlocal run
            run = self._init(name, model, {"checkpoints": "every_epoch", **settings})
            return run

        model = self.problem.train(range(self.problem.samples), self.seed, started)
        assert run is not None
        run.finalize()
        return run, model

    def _log_pass(self, name: str, settings: Mapping[str, Any]) -> tuple[logix.Run, nn.Module]:
        run = self._init(name, self.model, settings)
        batches = self.batches()
        numbers = {id(batch): part for part, batch in batches}
        mask = None if self.problem.mask(batches[0][1]) is None else self.problem.mask
        run.extract(
            [batch for _, batch in batches],
            self.problem.loss,
            data_id=lambda batch: numbers[id(batch)],
            mask=mask,
            progress=False,
        )
        run.finalize()
        return run, self.model
