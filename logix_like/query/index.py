"""FAISS: an index of rows that names candidates, which are then scored exactly from the store.

What is indexed is not the rows themselves. They are brought to the thousand directions in which they are largest in
the preconditioner's own geometry (a randomised singular value decomposition of a sample): rows as they are have a few
giant directions, which a preconditioner cancels and which quantisers, lists and graphs would follow. Inner products of
a row's and a preconditioned query's coordinates are those of the row's part in these directions.

faiss-cpu and faiss-gpu own the same module ``faiss``: install one of them, never both. The module is
imported on first use, after torch, since the order decides which OpenMP runtime the process gets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logix_like.errors import MissingDependencyError, QueryError
from logix_like.preconditioner import FittedPreconditioner
from logix_like.query.codes import Codes
from logix_like.query.fitting import Recent
from logix_like.query.modes import Mode
from logix_like.query.scan import Candidates

DIRECTIONS = 1024
"""Rows are brought to so many numbers before they are indexed."""
SAMPLED_ROWS = 8192
"""The directions are found, and an index is trained, on so many rows."""
ITERATIONS = 3
"""Of the search for the largest directions."""
SMALLEST_VALUE = 1e-10
"""Directions that count less than this, against the largest, are taken to count so much."""
SMALLEST_POOL = 100
"""Candidates for each side of a query, at least."""
POOL = 10
"""Candidates for each side of a query, at least so many times k."""
SCANNED = ("SQ8",)
"""Factory strings of indexes that many queries are asked of in one pass (:mod:`logix_like.query.codes`)."""


@dataclass(frozen=True, eq=False)
class Vectors:
    """The rows of a store, laid out so that a mode's scores are inner products."""

    candidates: Candidates
    mode: Mode
    lengths: Tensor
    """``[rows]``, squared lengths of the rows, times ``factor`` squared, float64."""
    factor: Tensor | None
    """``[rows]`` or None: what each row is multiplied by."""
    preconditioner: FittedPreconditioner
    progress: bool | None

    def of(self, rows: Tensor, positions: Tensor) -> Tensor:
        """``[n, d]`` float32."""
        scaled = rows if self.factor is None else rows * self.factor[positions, None]
        return self.mode.indexed(scaled, self.lengths[positions]).to(torch.float32)

    def stream(self) -> Iterator[Tensor]:
        """All of them, a bounded piece at a time."""
        for tile in self.candidates.tiles(self.progress, "index"):
            yield self.of(tile.values, tile.positions)

    def sample(self) -> Tensor:
        """Some, evenly spread."""
        positions = self.candidates.positions()
        chosen = positions[:: -(-len(positions) // SAMPLED_ROWS)]
        return self.of(self.candidates.fetch(chosen), chosen)

    @property
    def fingerprint(self) -> str:
        """Tells the rows from others, by their norms and number."""
        norms = np.asarray(self.candidates.rows.norm)[self.candidates.positions().numpy()]
        return hashlib.blake2b(np.ascontiguousarray(norms).tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True, eq=False)
class Reduction:
    """A change of rows and of preconditioned queries to few coordinates."""

    of_rows: Tensor
    """``[d, directions]``"""
    of_queries: Tensor
    """``[d, directions]``; times the transpose of ``of_rows`` it is a projection."""

    @classmethod
    def fit(cls, vectors: Vectors) -> tuple[Reduction, Tensor]:
        """Find the largest directions of the vectors' sample, in the preconditioner's geometry; also the sample.

        With a symmetric ``P`` and a basis ``X`` (orthonormal in it), a row ``g`` has the coordinates ``X^T P g`` and a
        preconditioned query ``p`` has ``X^T p``.
        """
        sample = vectors.sample()
        metric = partial(_in_geometry, vectors.preconditioner, sample)
        basis = _largest(sample, metric) if sample.shape[1] > DIRECTIONS else torch.eye(sample.shape[1])
        dual = metric(basis)
        gram = basis.double().T @ dual.double()
        values, turned = torch.linalg.eigh((gram + gram.T) / 2)
        floor = values.amax().clamp_min(torch.finfo(torch.float32).tiny) * SMALLEST_VALUE
        scaled = turned * values.clamp_min(floor).rsqrt()
        return cls((dual.double() @ scaled).float(), (basis.double() @ scaled).float()), sample

    @property
    def directions(self) -> int:
        """How many coordinates there are."""
        return self.of_rows.shape[1]

    def rows(self, vectors: Tensor) -> NDArray[np.float32]:
        """Coordinates of rows."""
        return np.ascontiguousarray((vectors @ self.of_rows).numpy())

    def queries(self, vectors: Tensor) -> NDArray[np.float32]:
        """Coordinates of preconditioned queries."""
        return np.ascontiguousarray((vectors @ self.of_queries).numpy())


def _in_geometry(preconditioner: FittedPreconditioner, sample: Tensor, columns: Tensor) -> Tensor:
    """``P columns [d, n]``; a number beyond the rows' own (their length) is taken at the size that it has in them."""
    width = preconditioner.layout.width
    size = sample[:, width:].double().square().mean(0).sqrt().clamp_min(torch.finfo(torch.float32).tiny).float()
    return torch.cat([preconditioner.apply(columns[:width].T.contiguous()).float().T, columns[width:] / size[:, None]])


def _largest(sample: Tensor, metric: Callable[[Tensor], Tensor]) -> Tensor:
    """``[d, directions]``, orthonormal: about the span of the largest directions of ``sample P`` (power iteration)."""
    sample = sample / sample.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    basis = torch.randn(sample.shape[1], DIRECTIONS, generator=torch.Generator().manual_seed(0))
    for _ in range(ITERATIONS):
        turned = metric(basis)
        turned = turned / turned.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        basis = torch.linalg.qr(sample.T @ (sample @ turned))[0]
    return basis


class RowIndex:
    """An index of all rows that can be ranked; names candidates."""

    def __init__(self, index: Any, reduction: Reduction, mode: Mode, positions: Tensor, factory: str) -> None:
        self.index = index
        self.reduction = reduction
        self.factory = factory
        self._mode = mode
        self._positions = positions
        self._searched = _on_gpus(index)
        self.measured: Recent[Any] = Recent(64)
        """By k, the choice of rows and the number of queries: what was measured."""

    @classmethod
    def build(cls, vectors: Vectors, factory: str) -> RowIndex:
        """Read the rows in a stream and index them.

        Raises :class:`QueryError` when FAISS does not know ``factory``, or has too few rows to train it.
        """
        reduction, sample = Reduction.fit(vectors)
        index = _empty_index(factory, reduction.directions)
        try:
            if not index.is_trained:
                index.train(reduction.rows(sample))
        except RuntimeError as error:
            raise _refused(factory, reduction.directions, f" from {len(sample):,} rows", error) from error
        found = cls(index, reduction, vectors.mode, vectors.candidates.positions(), factory)
        found.add(vectors.stream())
        return found

    def add(self, rows: Iterator[Tensor]) -> None:
        """Index further rows, which follow those before."""
        for vectors in rows:
            self.index.add(self.reduction.rows(vectors))
        self._searched = _on_gpus(self.index)

    def candidates(self, queries: Tensor, count: int, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
        """``count`` rows (or all) that may be highest and as many that may be lowest for preconditioned ``queries``.

        Only rows where ``wanted [rows]`` holds are looked at, all without it. Both results are positions
        ``[queries, c]`` among the store's rows, the most likely first; -1 stands for no row.
        """
        asked = self.reduction.queries(self._mode.asked(queries).to(torch.float32))
        inside = None if wanted is None else wanted[self._positions]
        count = min(count, len(self._positions) if inside is None else int(inside.sum()))
        codes = _plain_codes(self._searched)
        if codes is not None:
            top, bottom = codes.extremes(torch.from_numpy(asked), count, inside)
            return self._positions[top], self._positions[bottom]
        both = self._search(np.concatenate([asked, -asked]), count, inside)
        return both[: len(asked)], both[len(asked) :]

    def _search(self, asked: NDArray[np.float32], count: int, inside: Tensor | None) -> Tensor:
        parameters = None if inside is None else self._parameters(inside.nonzero().flatten().numpy())
        try:
            _, found = self._searched.search(asked, count, params=parameters)
        except (RuntimeError, TypeError) as error:
            raise QueryError(
                f"the FAISS index {self.factory!r} cannot be asked so ({str(error).splitlines()[-1].strip()}); ask for "
                "all samples, with another index=, or with engine='exact'"
            ) from error
        numbers = torch.from_numpy(np.asarray(found, dtype=np.int64))
        return torch.where(numbers < 0, -1, self._positions[numbers.clamp_min(0)])

    def _parameters(self, inside: NDArray[np.int64]) -> Any:
        faiss = load_faiss()
        selector = faiss.IDSelectorBatch(inside)
        kind = {"IndexIVF": faiss.SearchParametersIVF, "IndexHNSW": faiss.SearchParametersHNSW}
        name = next((name for name in kind if type(self.index).__name__.startswith(name)), None)
        return (faiss.SearchParameters if name is None else kind[name])(sel=selector)


def require_factory(factory: str, mode: Mode, width: int) -> None:
    """Raise :class:`QueryError` when FAISS does not know ``factory``, or not for rows of ``width`` numbers."""
    _empty_index(factory, min(DIRECTIONS, mode.asked(torch.empty(0, width)).shape[1]))


def _empty_index(factory: str, width: int) -> Any:
    faiss = load_faiss()
    try:
        return faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except (RuntimeError, TypeError) as error:
        raise _refused(factory, width, "", error) from error


def _refused(factory: str, width: int, rows: str, error: Exception) -> QueryError:
    return QueryError(
        f"FAISS cannot make an index {factory!r} of {width} numbers{rows} ({str(error).splitlines()[-1].strip()}); "
        "known are for example Flat, SQ8, HNSW32, 'IVF256,Flat'"
    )


def _on_gpus(index: Any) -> Any:
    """A copy on all GPUs, in shards, where this FAISS has any; else the index itself."""
    faiss = load_faiss()
    if not hasattr(faiss, "index_cpu_to_all_gpus") or not faiss.get_num_gpus():
        return index
    options = faiss.GpuMultipleClonerOptions()
    options.shard = True
    return faiss.index_cpu_to_all_gpus(index, co=options)


def _plain_codes(index: Any) -> Codes | None:
    """The codes of an index that is scanned whole and keeps 8 bits a number (``SQ8``); None of any other."""
    faiss = load_faiss()
    if not isinstance(index, faiss.IndexScalarQuantizer) or index.sq.qtype != faiss.ScalarQuantizer.QT_8bit:
        return None
    codes = faiss.rev_swig_ptr(index.codes.data(), index.ntotal * index.d)  # a view: good until rows are added
    least_and_span = faiss.vector_to_array(index.sq.trained)
    step = torch.from_numpy(least_and_span[index.d :]) / 255
    return Codes(torch.from_numpy(codes).view(index.ntotal, index.d), step)


def load_faiss() -> Any:
    """The module; :class:`MissingDependencyError` says what to install."""
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            "engine='faiss' needs faiss, which is not installed: pip install 'logix_like[faiss]' "
            "(or logix_like[gpu] for faiss-gpu; never both), or ask with engine='exact'"
        ) from error
    return faiss
