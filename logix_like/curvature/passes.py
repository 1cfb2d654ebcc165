"""Passes over the training samples: first both factors of every block, then EK-FAC's eigenvalues in their basis."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, get_args

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler
from tqdm import tqdm

from logix_like.curvature.curvature import Curvature, Fisher, Kind, Labels
from logix_like.curvature.gradients import SquareSums
from logix_like.curvature.moments import WIDEST, FactorSums, moments
from logix_like.curvature.partial import PartialFit
from logix_like.curvature.sums import MEMORY, Scratch
from logix_like.curvature.sweep import Losses, Sweep
from logix_like.errors import ConfigError, StatisticsError
from logix_like.layout import Layout
from logix_like.linalg.basis import Basis, eigenbasis, part_sizes
from logix_like.linalg.finite import require_finite
from logix_like.linalg.kronecker import product_eigenvalues
from logix_like.linalg.products import PRECISIONS, Precision
from logix_like.objective import Batch

RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)

At = Callable[[], Iterable[object]]
"""Each call yields once for each set of weights, after loading it into the model."""


def once() -> Iterable[object]:
    """The weights that the model has."""
    return (None,)


def sets_of_weights(at: At) -> Iterator[int]:
    """Numbers 1, 2, ... of the sets of weights, each while it is in the model.

    Raises:
        ConfigError: ``at`` is no function, or yields nothing.
    """
    if not callable(at):
        raise ConfigError(
            f"at is a {type(at).__name__}; it must be a function that begins anew at each call, as "
            "lambda: run.at_checkpoints('all') is"
        )
    number = 0
    for number, _ in enumerate(at(), start=1):
        yield number
    if not number:
        raise ConfigError("at yielded no set of weights; it must yield once for each, after loading it into the model")


@dataclass(frozen=True)
class Settings:
    """What is fitted; checked."""

    kind: Kind
    labels: Labels
    split: bool
    seed: int
    widest: int
    precision: Precision

    def __post_init__(self) -> None:
        for name, known in (("kind", sorted(get_args(Kind))), ("labels", get_args(Labels)), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        for name, least in (("widest", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number from {least} to {2**31 - 1}")

    def signature(self, layout: Layout, loader: Iterable[Batch], weights: str) -> dict[str, Any]:
        """What must be the same for an interrupted fit to go on."""
        blocks = json.dumps([(block.name, block.kind, block.shape) for block in layout])
        modules = f"{len(layout)} modules ({hashlib.blake2b(blocks.encode(), digest_size=6).hexdigest()})"
        batches = len(loader) if isinstance(loader, Sized) else None
        chosen = {name: value for name, value in asdict(self).items() if name not in ("kind", "precision")}
        return {**chosen, "weights": weights, "modules": modules, "batches": batches}


def shuffles(loader: Iterable[Batch]) -> bool:
    """Whether ``loader`` draws another order for each pass, as torch's random samplers do."""
    if not isinstance(loader, DataLoader):
        return False
    samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    return any(isinstance(sampler, RANDOM) for sampler in samplers)


def first_batch(loader: Iterable[Batch], sweep: Sweep) -> str:
    """Digest of the first batch as a fit sees it: its tensors, targets and mask, and how a target is scored.

    Empty where a look would take the batch away, or another pass sees another one.
    """
    if shuffles(loader) or isinstance(loader, Iterator):
        return ""
    likelihood = sweep.objective.likelihood
    settings = [value for value in vars(likelihood).values() if isinstance(value, int | float | str)]
    digest = hashlib.blake2b(f"{type(likelihood).__qualname__}{settings}".encode(), digest_size=6)
    for batch in islice(loader, 1):
        plain = dict(batch) if isinstance(batch, Mapping) else batch
        for leaf in tree_leaves((plain, sweep.objective.labels(batch), sweep.mask(batch))):
            if isinstance(leaf, Tensor):
                flat = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(f"{tuple(leaf.shape)}".encode() + flat.numpy().tobytes())
    return digest.hexdigest()


class Batches:
    """The batches of a pass, numbered; at each set of weights all of them again."""

    def __init__(self, loader: Iterable[Batch], at: At, bar: bool) -> None:
        self._loader = loader
        self._at = at
        self._bar = bar
        self.ordered = not shuffles(loader)
        """Whether the next pass will see them in the same order."""

    def numbered(self, description: str) -> Iterator[tuple[int, Batch]]:
        """Position and batch, under a bar."""
        total = len(self._loader) if isinstance(self._loader, Sized) else None
        position = 0
        for _ in sets_of_weights(self._at):
            with tqdm(total=total, desc=description, unit="batch", disable=not self._bar) as bar:
                for batch in self._loader:
                    yield position, batch
                    position += 1
                    bar.update()


class Passes:
    """One pass after another over the same batches; with ``split`` each sees every other batch."""

    def __init__(
        self, sweep: Sweep, batches: Batches, settings: Settings, interrupted: PartialFit, scratch: Scratch
    ) -> None:
        self._sweep = sweep
        self._batches = batches
        self._settings = settings
        self._partial = interrupted
        self._scratch = scratch

    def factors(self, weights: str) -> Curvature:
        """Both factors of every block, and their eigenvectors."""
        sink = FactorSums(self._settings.widest, self._settings.precision, self._scratch)
        samples = self._run("factors", sink, 0)
        if not samples:
            raise StatisticsError("there are no samples to fit a curvature to: the loader yielded no batch")
        fisher = Fisher(self._settings.labels, samples, weights)
        return kronecker(sink.sums.all(), self._sweep.layout, fisher, self._scratch)

    def corrected(self, curvature: Curvature) -> Curvature:
        """The same with EK-FAC's eigenvalues."""
        self._sweep.groups = {block.name: block.input_group for block in curvature.layout}
        curvature.layout.require_same(self._sweep.layout)
        sink = SquareSums(curvature.bases, self._settings.precision, self._scratch)
        seen, first = self._run("eigenvalues", sink, 1), curvature.fisher.samples
        self._require_samples(first, seen)
        samples = first + seen if self._settings.split else first
        return with_squares(curvature, sink.sums.all(), replace(curvature.fisher, samples=samples), self._scratch)

    def _require_samples(self, first: int, second: int) -> None:
        if self._settings.split and not second:
            raise StatisticsError("split=True needs at least two batches: one for the factors, one for the eigenvalues")
        if not self._settings.split and first != second:
            raise StatisticsError(
                f"the first pass over the loader saw {first:,} samples and the second {second:,}: EK-FAC needs the "
                "same ones twice; give a list or a DataLoader (a generator is spent after one pass), or fit kind='kfac'"
            )

    def _run(self, name: str, sink: FactorSums | SquareSums, turn: int) -> int:
        """Go over all batches, with ``split`` over those of ``turn``; returns how many samples were seen."""
        # In another order the batches that are done cannot be told: a pass is then made whole or not at all.
        done = self._partial.restore(name, sink.sums, self._sweep) if self._batches.ordered else 0
        for position, batch in self._batches.numbered(f"curvature: {name}"):
            if position < done or (self._settings.split and position % 2 != turn):
                continue
            self._sweep.run(batch, self._losses(position), sink)
            if self._batches.ordered:
                self._partial.offer(name, position + 1, sink.sums, self._sweep)
        return sink.sums.samples

    def _losses(self, position: int) -> Losses:
        # Hashed into four bytes: the generator of the CPU ignores what is above them.
        seed = hashlib.blake2b(f"{self._settings.seed}/{position}".encode(), digest_size=4).digest()
        generator = Generator(self._sweep.device).manual_seed(int.from_bytes(seed, "little"))
        draw = self._settings.labels == "sampled"
        return partial(self._sweep.objective.backward_losses, draw=draw, generator=generator)


def kronecker(sums: Mapping[str, Tensor], layout: Layout, fisher: Fisher, scratch: Scratch) -> Curvature:
    """K-FAC from the sums of :class:`FactorSums`."""
    inputs = {
        name: _side(sums, "input", layout, name, scratch)
        for name in dict.fromkeys(block.input_group for block in layout)
    }
    bases: dict[str, tuple[Basis, Basis]] = {}
    eigenvalues: dict[str, Tensor] = {}
    for block in layout:
        inward, input_basis = inputs[block.input_group]
        outward, output_basis = _side(sums, "output", layout, block.name, scratch)
        bases[block.name] = input_basis, output_basis
        eigenvalues[block.name] = scratch.keep(product_eigenvalues(outward, inward))
    return Curvature("kfac", layout, bases, eigenvalues, fisher)


def with_squares(
    curvature: Curvature, sums: Mapping[str, Tensor], fisher: Fisher, scratch: Scratch = MEMORY
) -> Curvature:
    """EK-FAC: the basis of ``curvature`` with the eigenvalues of :class:`SquareSums`."""
    eigenvalues = {}
    for name, values in curvature.eigenvalues.items():
        total = sums.get(f"squares/{name}")
        mean = torch.zeros_like(values) if total is None else total / sums["samples"].to(total.device)
        eigenvalues[name] = scratch.keep(mean)
        require_finite(eigenvalues[name], name)
    return Curvature("ekfac", curvature.layout, curvature.bases, eigenvalues, fisher)


def _side(sums: Mapping[str, Tensor], side: str, layout: Layout, name: str, scratch: Scratch) -> tuple[Tensor, Basis]:
    found = moments(sums, side, name)
    for moment in found:
        require_finite(moment, name)
    if not found:  # never called: it takes no part
        width = layout[name].shape[1 if side == "input" else 0]
        parts = (torch.eye(part, dtype=torch.float64) for part in part_sizes(width, WIDEST))
        return torch.zeros(width, dtype=torch.float64), Basis(tuple(parts))
    values, basis = eigenbasis(found)
    return values, Basis(tuple(scratch.keep(part) for part in basis.parts))
