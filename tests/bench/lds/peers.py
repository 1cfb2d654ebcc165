"""What other libraries answer for the same models, samples and queries; a row for each that is installed.

``pip install kronfluence traker`` into an environment of its own. (dattri 0.3.0's LoGra fails on inputs that are no
sequences; what it and LogIX compute are the rows "LoGra, post-hoc" of our own.)
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from logix_like.capture.selection import select_modules
from tests.bench.lds.bench import Bench
from tests.bench.lds.problems import Problem

BATCH, LARGE_BATCH = 50, 500


def rows() -> dict[str, Callable[[Bench], Tensor]]:
    """The rows of the libraries that are installed."""
    found: dict[str, Callable[[Bench], Tensor]] = {}
    if find_spec("kronfluence"):
        found["kronfluence: EK-FAC, final weights"] = kronfluence_ekfac
    if find_spec("trak"):
        found["traker: TRAK, one model"] = traker
    return found


class Parts(torch.utils.data.Dataset[int]):
    """Whole numbers that follow one another; batches are made of them by a collate function."""

    def __init__(self, count: int, start: int = 0) -> None:
        self._count, self._start = count, start

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> int:
        return self._start + number


def asked(problem: Problem, numbers: Sequence[int]) -> Any:
    """Some of the queries, as a batch."""
    batch, chosen = problem.asked(), torch.tensor(list(numbers))
    if isinstance(batch, Mapping):
        return {name: values[chosen] for name, values in batch.items()}
    return tuple(values[chosen] for values in batch)


@contextmanager
def hushed() -> Iterator[None]:
    """Without bars and warnings of others."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        yield


def kronfluence_ekfac(bench: Bench) -> Tensor:
    """kronfluence with its strategy ``ekfac`` (true Fisher) and its heuristic damping, .1 x the mean eigenvalue."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    problem = bench.problem
    tracked = modules_of(bench)

    class OfProblem(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            if sample:
                return problem.objective.backward_losses(model, batch, draw=True).sum()
            return problem.objective.losses(model, batch).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return problem.objective.losses(model, batch).sum()

        def get_influence_tracked_modules(self) -> list[str]:
            return tracked

        def get_attention_mask(self, batch: Any) -> Tensor | None:
            return problem.mask(batch)

    training, queries = Parts(problem.samples), Parts(problem.queries, problem.samples)
    with tempfile.TemporaryDirectory() as folder, hushed():
        torch.manual_seed(0)  # of the sampled labels
        model = prepare_model(copy.deepcopy(bench.model), OfProblem())
        analyzer = Analyzer("lds", model, OfProblem(), cpu=True, output_dir=folder, disable_tqdm=True)
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=Either(problem)))
        analyzer.fit_all_factors("ekfac", training, BATCH, factor_args=FactorArguments("ekfac"))
        settings = ScoreArguments(damping_factor=None)
        analyzer.compute_pairwise_scores(
            "scores", "ekfac", queries, training, problem.queries, BATCH, score_args=settings
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"].float()


class Either:
    """Batches of training samples or, by the numbers behind theirs, of queries."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def __call__(self, numbers: Sequence[int]) -> Any:
        if numbers[0] < self._problem.samples:
            return self._problem.training(list(numbers))
        return asked(self._problem, [number - self._problem.samples for number in numbers])


def traker(bench: Bench) -> Tensor:
    """TRAK's own library at one model: Rademacher projections of all parameters.

    As many numbers as a row of ours, but half as many as samples at most: its inverse has no damping, and with more
    numbers than samples its scores are noise (LDS .005 on the images).
    """
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, ProjectionType

    problem, model = bench.problem, copy.deepcopy(bench.model)
    numbers = min(bench.posthoc().run.store.modules.width, problem.samples // 2)

    def batch_of(parts: tuple[Tensor, ...]) -> Any:
        return {"inputs": parts[0], "targets": parts[1]} if isinstance(problem.asked(), Mapping) else parts

    class Margin(AbstractModelOutput):
        def __init__(self) -> None:  # the library's own is abstract
            super().__init__()

        def get_output(self, network: nn.Module, weights: Any, buffers: Any, *sample: Tensor) -> Tensor:
            def call(inputs: Tensor) -> Tensor:
                return torch.func.functional_call(network, (weights, buffers), (inputs,))

            return problem.objective.margins(call, batch_of(tuple(part[None] for part in sample))).sum()

        def get_out_to_loss_grad(self, network: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
            with torch.no_grad():
                return torch.sigmoid(-problem.objective.margins(network, batch_of(batch)))[:, None]

    width = sum(parameter.numel() for parameter in model.parameters())
    block = min(256, numbers // 2)  # in one block alone it would not be drawn anew for the queries
    projector = BasicProjector(width, numbers, 0, ProjectionType.rademacher, torch.device("cpu"), block_size=block)
    with tempfile.TemporaryDirectory() as folder, hushed():
        tool = TRAKer(
            model, Margin(), problem.samples, folder, device="cpu", projector=projector, use_half_precision=False
        )
        tool.load_checkpoint(model.state_dict(), 0)
        # In large batches, since a projection of this kind on a CPU is drawn anew for each.
        for part in torch.arange(problem.samples).split(LARGE_BATCH):
            tool.featurize(as_tuple(problem.training(part.tolist())), num_samples=len(part))
        tool.finalize_features()
        tool.start_scoring_checkpoint("queries", model.state_dict(), 0, problem.queries)
        tool.score(as_tuple(problem.asked()), num_samples=problem.queries)
        return torch.tensor(tool.finalize_scores("queries")).T.float()


def as_tuple(batch: Any) -> tuple[Tensor, ...]:
    return (batch["inputs"], batch["targets"]) if isinstance(batch, Mapping) else batch


def modules_of(bench: Bench) -> list[str]:
    """Names of the modules that our rows cover."""
    selection = select_modules(bench.model, types=("Linear", "Conv2d"), exclude=bench.problem.exclude)
    return [block.name for block in selection.blocks]
