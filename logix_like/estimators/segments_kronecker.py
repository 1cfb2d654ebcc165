"""Curvature of a segment of training for SOURCE by Kronecker factors (EK-FAC), in the optimizer's own coordinates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from logix_like.curvature import Curvature, default_selection, fit_curvature
from logix_like.curvature.gradients import Gradients, InnerProducts, SquareSums
from logix_like.curvature.sweep import Sweep
from logix_like.estimators.movement import Movement
from logix_like.estimators.segments import At, Backend, Blocks, Function, Spectrum, inverse_root
from logix_like.layout import Layout
from logix_like.linalg.basis import Basis, eigenbasis
from logix_like.objective import Batch, Objective


class KroneckerBackend(Backend):
    """EK-FAC (George 2018) of all linear maps, by :mod:`logix_like.curvature`; other parameters take no part.

    ``R^1/2`` of a block ``[d_out, d_in]`` is taken as an outer product, as Adafactor (Shazeer and Stern 2018) takes
    second moments: with it ``M`` is Kronecker-factored as ``H`` is. For SGD it is one number, and nothing is lost.
    """

    def __init__(self, model: nn.Module, objective: Objective, parameters: Sequence[str]) -> None:
        self._model = model
        self._objective = objective
        self._selection = default_selection(model)
        self._sweep = Sweep(model, objective, self._selection)

    def fit(self, at: At, batches: Callable[[], Iterable[Batch]], movement: Movement) -> Spectrum:
        fitted = fit_curvature(
            self._model, _Again(batches), self._objective, kind="kfac", selection=self._selection, at=at, progress=False
        )
        scales = _scales(self._matrices(movement.distance), fitted.layout)
        bases = {name: _moved_bases(fitted, name, scales[name]) for name in fitted.layout.names}
        squares = self._squares(fitted.layout, {n: scales[n].times(*basis) for n, basis in bases.items()}, at, batches)
        eigenvalues = {}
        for name, decay in self._matrices(movement.decay).items():
            inward, outward = (_whole(basis).square() for basis in bases[name])
            eigenvalues[name] = squares[name] + outward.T @ decay.to(outward) @ inward
        return KroneckerSpectrum(Curvature("ekfac", fitted.layout, bases, eigenvalues, fitted.fisher), scales)

    def gradients(self, batch: Batch) -> Blocks:
        sink = Gradients()
        self._sweep.run(batch, self._objective.backward_losses, sink)
        return sink.blocks

    def products(self, vectors: Blocks, batch: Batch) -> Tensor:
        sink = InnerProducts(vectors)
        self._sweep.run(batch, self._objective.backward_losses, sink)
        return torch.stack(list(sink.modules.values())).sum(0)

    def _squares(
        self,
        layout: Layout,
        bases: Mapping[str, tuple[Basis, Basis]],
        at: At,
        batches: Callable[[], Iterable[Batch]],
    ) -> dict[str, Tensor]:
        """By block ``[d_out, d_in]``: mean squares of the samples' gradients, labels drawn from the model."""
        self._sweep.groups = {block.name: block.input_group for block in layout}
        sink, generator = SquareSums(bases, "highest"), torch.Generator(self._sweep.device).manual_seed(0)

        losses = partial(self._objective.backward_losses, draw=True, generator=generator)
        for _ in at():
            for batch in batches():
                self._sweep.run(batch, losses, sink)
        none = {block.name: torch.zeros(block.shape, dtype=torch.float64) for block in layout}
        sums = sink.sums.all()
        return {name: sums.get(f"squares/{name}", zero) / sums["samples"] for name, zero in none.items()}

    def _matrices(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By block ``[d_out, d_in]`` of what is told by parameter; 0 for parameters that were not trained."""
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}

        def told(parameter: nn.Parameter) -> Tensor:
            tensor = tensors.get(names[id(parameter)])
            return torch.zeros(parameter.shape, dtype=torch.float64) if tensor is None else tensor

        found = {tracked.name: tracked.matrix(told) for tracked in self._selection.modules}
        return {name: matrix for name, matrix in found.items() if matrix is not None}


@dataclass(frozen=True)
class Scale:
    """``R^1/2`` of a block as an outer product."""

    rows: Tensor
    """``[d_out]``."""
    columns: Tensor
    """``[d_in]``."""

    def times(self, inward: Basis, outward: Basis) -> tuple[Basis, Basis]:
        """Bases that scale what they rotate."""
        return _scaled(inward, self.columns), _scaled(outward, self.rows)

    def on(self, vectors: Tensor) -> Tensor:
        """``R^1/2 vectors``, for ``vectors [n, d_out, d_in]``."""
        return vectors * self.rows.to(vectors)[:, None] * self.columns.to(vectors)

    @property
    def inverse(self) -> Scale:
        """``R^-1/2``, with 0 where ``R`` is 0."""
        return Scale(inverse_root(self.rows), inverse_root(self.columns))


class KroneckerSpectrum(Spectrum):
    """EK-FAC in the coordinates in which the optimizer's steps are those of gradient descent."""

    def __init__(self, curvature: Curvature, scales: Mapping[str, Scale]) -> None:
        self._curvature = curvature
        self._scales = scales

    def moved(self, f: Function, vectors: Blocks) -> dict[str, Tensor]:
        return {name: self._scales[name].on(part) for name, part in self._between(f, vectors).items()}

    def kept(self, f: Function, vectors: Blocks) -> dict[str, Tensor]:
        changes = self._between(lambda s: f(s) - 1, vectors)
        return {name: vectors[name] + self._scales[name].inverse.on(part) for name, part in changes.items()}

    def _between(self, f: Function, vectors: Blocks) -> dict[str, Tensor]:
        scaled = {name: self._scales[name].on(vector) for name, vector in vectors.items()}
        return self._curvature.apply(lambda _, eigenvalues: f(eigenvalues), scaled)


def outer_root(distances: Tensor) -> tuple[Tensor, Tensor]:
    """``rows [m]`` and ``columns [n]`` whose products stand for the square roots of ``distances [m, n]``.

    Exact where distances are products. Else one over their squares (Adam's second moments) are summed to rows and
    columns, so that weights with large gradients count most. A row or column that never moved gets 0.
    """
    moments = torch.where(distances > 0, distances, torch.inf).double().pow(-2)
    rows, columns, total = moments.sum(1), moments.sum(0), moments.sum()
    if not total > 0:
        return torch.zeros_like(rows), torch.zeros_like(columns)
    return torch.where(rows > 0, rows, torch.inf) ** -0.25, torch.where(
        columns > 0, columns / total, torch.inf
    ) ** -0.25


def _scales(distances: Mapping[str, Tensor], layout: Layout) -> dict[str, Scale]:
    """Blocks that read one input share their columns, as they share its eigenvectors."""
    groups: dict[str, list[str]] = {}
    for block in layout:
        groups.setdefault(block.input_group, []).append(block.name)
    scales = {}
    for names in groups.values():
        rows, columns = outer_root(torch.cat([distances[name] for name in names]))
        for name, own in zip(names, rows.split([len(distances[name]) for name in names]), strict=True):
            scales[name] = Scale(own, columns)
    return scales


def _moved_bases(fitted: Curvature, name: str, scale: Scale) -> tuple[Basis, Basis]:
    """Eigenvectors of a block's scaled factors, from those of the factors themselves."""
    products = fitted.eigenvalues[name]
    inward, outward = fitted.bases[name]
    return _moved_basis(inward, products.sum(0), scale.columns), _moved_basis(outward, products.sum(1), scale.rows)


def _moved_basis(basis: Basis, eigenvalues: Tensor, scale: Tensor) -> Basis:
    if bool((scale == scale[0]).all()):
        return basis
    parts = zip(_scaled(basis, scale).parts, eigenvalues.split([len(part) for part in basis.parts]), strict=True)
    return eigenbasis([(part * values.to(part)) @ part.mT for part, values in parts])[1]


def _scaled(basis: Basis, scale: Tensor) -> Basis:
    pieces = scale.split([len(part) for part in basis.parts])
    return Basis(tuple(piece.to(part)[:, None] * part for part, piece in zip(basis.parts, pieces, strict=True)))


def _whole(basis: Basis) -> Tensor:
    whole: Tensor = torch.block_diag(*basis.parts)
    return whole


class _Again:
    """Batches that can be read again and again."""

    def __init__(self, read: Callable[[], Iterable[Batch]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._read())
