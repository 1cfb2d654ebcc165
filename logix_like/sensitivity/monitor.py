"""Watching, while a model trains, how sensitive it is to its samples, and what its leave-one-out loss would be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from logix_like.curvature import fit_curvature
from logix_like.curvature.sweep import on_device
from logix_like.errors import ConfigError
from logix_like.estimators.along import as_ids
from logix_like.estimators.flat import FlatModel, batch_size, sliced
from logix_like.ids import as_data_ids
from logix_like.objective import Batch, Objective
from logix_like.sensitivity.forms import FORMS, Form, deviations, directional_shift, prediction_shift, sampled_shift
from logix_like.sensitivity.groups import GroupEffect, Labels, leave_groups_out
from logix_like.sensitivity.posterior import (
    KroneckerPosterior,
    Posterior,
    dense_laplace,
    diagonal_laplace,
    posterior_of,
)
from logix_like.sensitivity.result import Sensitivities
from logix_like.weights import differentiable, trained_parameters

Loss = Callable[[Tensor, Tensor], Tensor]
"""``loss(outputs [batch, ...], targets) -> [batch]``, with or without a derivative."""

Source = Literal["optimizer", "diagonal", "kronecker", "dense"]
SOURCES: tuple[Source, ...] = ("optimizer", "diagonal", "kronecker", "dense")

SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
"""Samplers after which a sample's place in the loader does not say which it is."""

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Snapshot:
    """One look at the training."""

    epoch: int
    """Number of the look, from 0, unless an epoch was told."""
    train_loss: float
    """Mean loss of the training samples."""
    loo_loss: float
    """Leave-one-out estimate from the training samples alone: it should follow the test loss."""
    validation_loss: float | None
    """Mean loss of the validation samples, if there were any."""


class SensitivityMonitor:
    """Per-sample sensitivities and a leave-one-out estimate of the test loss, while training goes on.

    ::

        monitor = SensitivityMonitor(model, optimizer, samples=len(train), posterior="diagonal", strength=5.0)
        for epoch in range(epochs):
            ...
            print(monitor.measure(loader, validation=test_loader))

    The training does not notice: weights, gradients, buffers, modes and torch's random state are as before.

    Args:
        model: the model in training.
        optimizer: its optimizer; None where ``posterior`` is one of Laplace's.
        objective: what it is trained for; a classifier unless told otherwise.
        samples: how many samples it is trained on.
        posterior: where the covariance comes from: ``optimizer``, its own state (:func:`posterior_of`), which costs
            nothing and is good for rankings; or, for estimates that are as large as the test loss, Laplace's
            approximation at each look: ``diagonal``, ``kronecker`` (EK-FAC of the linear maps) or ``dense`` (exact,
            for a few thousand parameters).
        strength: of the L2 penalty ``strength / 2 ||theta||^2`` on the *summed* loss; None: ``samples x weight_decay``.
        form: ``loo`` (without the sample, one Newton step), ``full`` or ``diagonal``; see
            :func:`~logix_like.sensitivity.forms.deviations`. Default: ``loo`` with the exact ``dense`` covariance,
            where it is best; else ``full``, since taking a sample out of an approximate covariance may leave a negative
            one.
        parameters: globs of the parameters that count as uncertain; the last layer alone is often enough, and cheap.
        loss: what the estimate is of, instead of the likelihood's loss. It needs no derivative (a rate of errors, say):
            the shift is then taken from ``draws`` samples of the posterior.
        draws: how many, each taken with both signs.
        memory_mib: of Jacobians at a time.

    Raises:
        ConfigError: an option is unknown, or no strength can be told.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        objective: Objective | None = None,
        *,
        samples: int,
        posterior: Source = "optimizer",
        strength: float | None = None,
        form: Form | None = None,
        parameters: Sequence[str] = ("*",),
        loss: Loss | None = None,
        draws: int = 64,
        memory_mib: float = 256.0,
    ) -> None:
        _require(posterior, SOURCES, "posterior")
        chosen: Form = form or ("loo" if posterior == "dense" else "full")
        _require(chosen, tuple(FORMS), "form")
        if samples < 1:
            raise ConfigError(f"samples is {samples}; it is the number of training samples, 1 or more")
        if draws < 1:
            raise ConfigError(f"draws is {draws}; it is how many samples of the posterior are taken, 1 or more")
        if strength is not None and not strength >= 0:
            raise ConfigError(f"strength is {strength}; the L2 penalty must be a number, 0 or more")
        if posterior == "optimizer" and optimizer is None:
            raise ConfigError("posterior 'optimizer' is read from the optimizer's state; give optimizer=...")
        self.model = model
        self.objective = objective or Objective()
        self.history: list[Snapshot] = []
        """A line for each look."""
        self.latest: Sensitivities | None = None
        """What the last look found."""
        self._optimizer = optimizer
        self._samples = samples
        self._source = posterior
        self._strength = strength if posterior == "optimizer" else _strength(strength, optimizer, samples)
        self._form = chosen
        self._names = trained_parameters(model, parameters)
        self._loss = loss
        self._draws = draws
        self._memory = memory_mib * MEBIBYTE

    def measure(
        self,
        loader: Iterable[Batch],
        *,
        data_id: Callable[[Batch], Any] | None = None,
        validation: Iterable[Batch] | None = None,
        epoch: int | None = None,
    ) -> Sensitivities:
        """Look at every training sample once, at the present weights.

        Args:
            loader: yields the training samples; read twice for Laplace's posteriors. Several times for EK-FAC.
            data_id: ids of a batch; by default samples are numbered in the order of the loader.
            validation: batches whose mean loss is put beside the estimate.
            epoch: what the look is called in :attr:`history`.

        Raises:
            ConfigError: the loader shuffles and no ids are given; or a Jacobian is too large.
        """
        if data_id is None and isinstance(getattr(loader, "sampler", None), SHUFFLING):
            raise ConfigError(
                "the loader shuffles, so that numbers would name other samples at each look; give data_id=..., or a "
                "loader over the same data with shuffle=False"
            )
        loader = _Moved(loader, self._device)
        with torch.random.fork_rng(devices=[]):  # a loader draws from it when it is iterated
            look = _Look(self._flat(), self.posterior(loader), self._form, self._memory, self._loss, self._draws)
            found = look.at(loader, data_id)
            checked = None if validation is None else look.mean_loss(_Moved(validation, self._device))
        number = len(self.history) if epoch is None else epoch
        self.history.append(Snapshot(number, found.train_loss, found.loo_loss, checked))
        self.latest = found
        return found

    def leave_out(self, loader: Iterable[Batch], groups: Labels | None = None) -> list[GroupEffect]:
        """What leaving each group out would do to its samples' loss; groups are the classes unless told otherwise.

        First order, and a whole class is far outside it: the order of the effects is of use, not their size.
        """
        of_batch = groups or (lambda batch: self.objective.labels(batch).tolist())
        loader = _Moved(loader, self._device)
        with torch.random.fork_rng(devices=[]):
            return leave_groups_out(self._flat(), self.posterior(loader), lambda: loader, of_batch)

    def posterior(self, loader: Iterable[Batch]) -> Posterior:
        """The covariance at the present weights."""
        flat = self._flat()
        if self._source == "optimizer":
            assert self._optimizer is not None
            return posterior_of(self._optimizer, flat, self._samples, self._strength)
        assert self._strength is not None
        if self._source == "diagonal":
            return diagonal_laplace(flat, self._parts(flat, loader), self._strength)
        if self._source == "dense":
            return dense_laplace(flat, self._parts(flat, loader), self._strength)
        curvature = fit_curvature(self.model, loader, self.objective, progress=False)
        return KroneckerPosterior(curvature, flat, self._samples, self._strength)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _flat(self) -> FlatModel:
        return FlatModel(self.model, self.objective, self._names)

    def _parts(self, flat: FlatModel, loader: Iterable[Batch]) -> Iterable[Batch]:
        for batch in loader:
            yield from sliced(batch, jacobians_at_once(flat, batch, self._memory) or 1)


class _Moved:
    """A loader whose batches come to the model's device; read as often as one likes."""

    def __init__(self, loader: Iterable[Batch], device: torch.device) -> None:
        self._loader = loader
        self._device = device

    def __iter__(self) -> Iterator[Batch]:
        return (on_device(batch, self._device) for batch in self._loader)


class _Look:
    """One pass over the samples at one set of weights."""

    def __init__(
        self, flat: FlatModel, posterior: Posterior, form: Form, memory: float, loss: Loss | None, draws: int
    ) -> None:
        self._flat = flat
        self._posterior = posterior
        self._form: Form = form
        self._memory = memory
        self._loss = loss or flat.objective.likelihood.losses
        self._theta = flat.theta
        self._noise: Tensor | None = None
        if loss is not None:
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(draws, flat.width, generator=generator, dtype=torch.float64)
            self._noise = noise.to(self._theta)

    def at(self, loader: Iterable[Batch], data_id: Callable[[Batch], Any] | None) -> Sensitivities:
        ids: list[Any] = []
        parts: list[tuple[Tensor, ...]] = []
        with differentiable(self._flat.model):
            for batch in loader:
                count = batch_size(batch)
                ids += range(len(ids), len(ids) + count) if data_id is None else as_data_ids(data_id(batch))
                size = jacobians_at_once(self._flat, batch, self._memory)
                parts += [self._part(part, whole=size > 0) for part in sliced(batch, size or 1)]
        if not parts:
            raise ConfigError(
                "the loader yielded no batch; give the training samples, as something that can be read more than once "
                "(a generator cannot)"
            )
        columns = [torch.cat(column).cpu() for column in zip(*parts, strict=True)]
        if len(ids) != len(columns[0]):
            raise ConfigError(f"data_id gave {len(ids)} ids for {len(columns[0])} samples; one for each is needed")
        return Sensitivities(as_ids(tuple(ids)), *columns)

    def mean_loss(self, batches: Iterable[Batch]) -> float:
        with differentiable(self._flat.model):
            found = [self._losses(self._flat.outputs(self._theta, batch), batch) for batch in batches]
        if not found:
            raise ConfigError("validation yielded no batch; give at least one, or none at all (validation=None)")
        return float(torch.cat(found).mean())

    def _part(self, batch: Batch, *, whole: bool) -> tuple[Tensor, ...]:
        likelihood, targets = self._flat.objective.likelihood, self._flat.objective.labels(batch)
        outputs = self._flat.outputs(self._theta, batch)
        residual = likelihood.residual(outputs, targets)
        variance, shift = self._shift(batch, residual, whole=whole)
        shift = shift.view(outputs.shape)
        after = outputs + shift
        moved = prediction_shift(likelihood, outputs, targets, shift, self._form if self._noise is None else "loo")
        sizes = (residual.flatten(1).abs().sum(1), variance.sum(1), shift.flatten(1).abs().sum(1))
        losses = (self._losses(outputs, batch), self._losses(after, batch))
        return (*sizes, moved.flatten(1).abs().sum(1), *losses)

    def _shift(self, batch: Batch, residual: Tensor, *, whole: bool) -> tuple[Tensor, Tensor]:
        """Variance of the outputs and their shift, each ``[batch, outputs]``."""
        if not whole and self._form != "full":
            raise ConfigError(
                f"the Jacobian of one sample's {residual[0].numel():,} outputs by {self._flat.width:,} parameters "
                "exceeds memory_mib; use form='full', which needs none, name fewer parameters=, or raise memory_mib"
            )
        if not whole:
            shift = directional_shift(self._flat, self._posterior, self._theta, batch).flatten(1)
            return (shift * residual.flatten(1)).sum(1, keepdim=True), shift  # the variance along the residual
        found = deviations(self._flat, self._posterior, self._theta, batch, self._form)
        if self._noise is None:
            return found.variance, found.shift
        assert self._loss is not None
        return found.variance, sampled_shift(self._flat, self._posterior, self._theta, batch, self._loss, self._noise)

    def _losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self._loss(outputs, self._flat.objective.labels(batch)).to(outputs)


def jacobians_at_once(flat: FlatModel, batch: Batch, memory: float) -> int:
    """How many samples' Jacobians fit into ``memory`` bytes, three of each being held; 0 if not even one does."""
    outputs = flat.outputs(flat.theta, next(iter(sliced(batch, 1))))
    return int(memory // (3 * outputs.numel() * flat.width * outputs.element_size()))


def _strength(given: float | None, optimizer: Optimizer | None, samples: int) -> float:
    if given is not None:
        return given
    decays = set() if optimizer is None else {float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups}
    if len(decays) != 1:
        raise ConfigError(
            "Laplace's approximation needs the strength of the L2 penalty on the summed loss; give strength=..., or an "
            "optimizer with one weight_decay"
        )
    return samples * decays.pop()


def _require(value: object, known: Sequence[str], what: str) -> None:
    if value not in known:
        raise ConfigError(f"unknown {what} {value!r}; known: {', '.join(known)}")
