"""A model and its objective as functions of one flat vector of parameters, for deriving with ``torch.func``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from logix_like.errors import ConfigError, QueryError
from logix_like.objective import Batch, Objective, bound
from logix_like.weights import Flattener

DataOf = Callable[[Sequence[Any]], Batch]
"""Gives the batch of the samples with these ids, in this order, as the training loop had it."""


def checked(data: DataOf) -> DataOf:
    """``data``, whose batches have as many samples as ids were given, lest scores stand at other samples' names."""

    def batch_of(ids: Sequence[Any]) -> Batch:
        batch = data(ids)
        if batch_size(batch) != len(ids):
            raise QueryError(
                f"data gave a batch of {batch_size(batch)} samples for {len(ids)} ids; it must give one sample for "
                "each id, in their order"
            )
        return batch

    return batch_of


def require_chunk(chunk: int) -> int:
    """``chunk``, if it is a number of samples.

    Raises:
        ConfigError: it is less than 1.
    """
    if chunk < 1:
        raise ConfigError(f"chunk is {chunk}; it is how many samples are taken together, 1 or more")
    return chunk


def require_queries(queries: Batch) -> Batch:
    """``queries``, if there is any.

    Raises:
        QueryError: the batch is empty.
    """
    if batch_size(queries) < 1:
        raise QueryError("the batch of queries is empty; give at least one sample")
    return queries


class FlatModel:
    """Losses and gradients of a model at any value of some of its parameters.

    What is computed is that of the model in eval mode; the model itself is left as it is.

    Args:
        model: the model; its other parameters and its buffers count as constants.
        objective: what it is trained for.
        names: the parameters in the order of the vector; None for all that require a gradient.

    Raises:
        ConfigError: there is no parameter to derive by.
    """

    def __init__(self, model: nn.Module, objective: Objective, names: Sequence[str] | None = None) -> None:
        self.model = model
        self.objective = objective
        self._flattener = Flattener(model, names)
        self.names = self._flattener.names
        self.width = self._flattener.size
        """Numbers in the vector."""

    @property
    def theta(self) -> Tensor:
        """The model's present parameters, ``[parameters]``."""
        return self.flatten(dict(self.model.named_parameters()))

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One vector of the tensors by name, ``[parameters]``."""
        return self._flattener.join({name: tensor.detach() for name, tensor in tensors.items()})

    def tensors(self, theta: Tensor) -> dict[str, Tensor]:
        """The tensors of a vector, by name."""
        return self._flattener.split(theta)

    def outputs(self, theta: Tensor, batch: Batch) -> Tensor:
        """``[batch, ...]``: what the likelihood reads."""
        return self.objective.forward(bound(self.model, self.tensors(theta)), batch)

    def losses(self, theta: Tensor, batch: Batch) -> Tensor:
        """``[batch]``: each sample's loss."""
        return self.objective.losses(bound(self.model, self.tensors(theta)), batch)

    def gradient(self, theta: Tensor, batch: Batch) -> Tensor:
        """``[parameters]``: gradient of the sum of the batch's losses."""
        return cast(Tensor, torch.func.grad(lambda t: self.losses(t, batch).sum())(theta))

    def sample_gradients(self, theta: Tensor, batch: Batch) -> Tensor:
        """``[batch, parameters]``: each sample's own gradient."""
        single = torch.func.grad(lambda t, one: self.losses(t, _as_batch(one)).sum())
        return _by_sample(lambda one: single(theta, one), batch)

    def jacobians(self, theta: Tensor, batch: Batch) -> Tensor:
        """``[batch, outputs, parameters]``: derivatives of each sample's outputs, flattened."""

        def single(t: Tensor, one: Any) -> Tensor:
            return self.outputs(t, _as_batch(one)).reshape(-1)

        jacobian = torch.func.jacrev(single)
        return _by_sample(lambda one: jacobian(theta, one), batch)

    def gauss_newton(self, theta: Tensor, batch: Batch) -> Tensor:
        """``[parameters, parameters]``: the sum over the batch of ``J^T (loss's Hessian in the outputs) J``."""
        jacobians, products = self._weighed_jacobians(theta, batch)
        return jacobians.flatten(0, 1).T @ products.flatten(0, 1)

    def gauss_newton_diagonal(self, theta: Tensor, batch: Batch) -> Tensor:
        """``[parameters]``: the diagonal of :meth:`gauss_newton`."""
        jacobians, products = self._weighed_jacobians(theta, batch)
        return (jacobians * products).sum((0, 1))

    def outputs_along(self, theta: Tensor, batch: Batch, directions: Tensor) -> Tensor:
        """``[batch, ...]``: derivative of each sample's outputs along its own direction ``[batch, parameters]``."""

        def single(one: Any, direction: Tensor) -> Tensor:
            outputs, pull = torch.func.vjp(lambda t: self.outputs(t, _as_batch(one))[0], theta)[:2]
            # Backwards twice is forwards, for every operation that can be derived twice.
            return cast(Tensor, torch.func.vjp(pull, outputs)[1]((direction,))[0])

        return _by_sample(single, batch, directions)

    def _weighed_jacobians(self, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """``J`` and ``(loss's Hessian) J``, both ``[batch, outputs, parameters]``."""
        jacobians, outputs = self.jacobians(theta, batch), self.outputs(theta, batch)
        targets = self.objective.labels(batch)

        def weighed(column: Tensor) -> Tensor:
            vector = column.view(outputs.shape)
            return self.objective.likelihood.hessian_product(outputs, targets, vector).reshape(column.shape)

        products = torch.func.vmap(weighed, in_dims=2, out_dims=2)(jacobians)
        return jacobians, products

    def curvature_products(self, theta: Tensor, batches: Sequence[tuple[Batch, float]]) -> Callable[[Tensor], Tensor]:
        """``vectors [n, parameters] -> [n, parameters]``: the Hessian of the weighted sum of losses times each."""

        def total(t: Tensor) -> Tensor:
            return torch.stack([weight * self.losses(t, batch).sum() for batch, weight in batches]).sum()

        product = torch.func.vjp(torch.func.grad(total), theta)[1]
        return torch.func.vmap(lambda vector: product(vector)[0])

    def sample_curvature_products(self, theta: Tensor, batch: Batch, vector: Tensor) -> Tensor:
        """``[batch, parameters]``: each sample's own Hessian times ``vector [parameters]``."""

        def single(one: Any) -> Tensor:
            gradient = torch.func.grad(lambda t: self.losses(t, _as_batch(one)).sum())
            return cast(Tensor, torch.func.vjp(gradient, theta)[1](vector)[0])

        return _by_sample(single, batch)


def batch_size(batch: Batch) -> int:
    """How many samples a batch has."""
    tensors = [leaf for leaf in pytree.tree_leaves(_plain(batch)) if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors:
        raise ConfigError(f"a batch is a {type(batch).__name__} without tensors; give tensors with one row a sample")
    return len(tensors[0])


def _plain(batch: Batch) -> Any:
    """Mappings as dicts, which ``torch.func`` looks into."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def _by_sample(single: Callable[..., Tensor], batch: Batch, *rows: Tensor) -> Tensor:
    """``single(sample, row, ...)`` for each sample and its row of each of ``rows``, stacked.

    All at once where every operation of the model has a batching rule, else one after another.
    """
    plain = _plain(batch)
    dims = pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) and leaf.ndim else None, plain)
    try:
        together: Tensor = torch.func.vmap(single, in_dims=(dims, *(0 for _ in rows)))(plain, *rows)
        return together
    except RuntimeError:
        samples = [pytree.tree_map(_squeezed, sample) for sample in sliced(plain, 1)]
        return torch.stack([single(*arguments) for arguments in zip(samples, *rows, strict=True)])


def _squeezed(leaf: Any) -> Any:
    return leaf[0] if isinstance(leaf, Tensor) and leaf.ndim else leaf


def _as_batch(one: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf, one)


def sliced(batch: Batch, size: int) -> Iterator[Any]:
    """The batch in parts of up to ``size`` samples."""
    plain = _plain(batch)
    for start in range(0, batch_size(plain), size):
        yield pytree.tree_map(
            lambda leaf, at=start: leaf[at : at + size] if isinstance(leaf, Tensor) and leaf.ndim else leaf, plain
        )
