"""FAISS: an index of rows that names candidates, which are then scored exactly from the store.

What is indexed is not the rows themselves. Rows are brought to the few hundred directions in which they are largest (by
a randomised singular value decomposition of a sample) and to equal variance there: quantisers, lists and graphs would
else follow the few giant directions that a preconditioner cancels. A query carries the inverse of that scaling, so that
inner products stay those of the rows' part in these directions, whatever preconditioner and damping is asked with.

faiss-cpu and faiss-gpu own the same module ``faiss``: install one of them, never both. The module is
imported on first use, after torch, since the order decides which OpenMP runtime the process gets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logix_like.errors import MissingDependencyError, QueryError
from logix_like.query.fitting import Recent
from logix_like.query.modes import Mode
from logix_like.query.scan import Candidates

DIRECTIONS = 512
"""Rows are brought to so many numbers before they are indexed."""
SAMPLED_ROWS = 8192
"""The directions are found, and an index is trained, on so many rows."""
VARIANCE_FLOOR = 1e-3
"""Directions are scaled as if none had less than this share of the mean variance."""
SMALLEST_POOL = 200
"""Candidates for each side of a query, at least."""
POOL = 20
"""Candidates for each side of a query, at least so many times k."""


@dataclass(frozen=True, eq=False)
class Vectors:
    """The rows of a store, laid out so that a mode's scores are inner products."""

    candidates: Candidates
    mode: Mode
    lengths: Tensor
    """``[rows]``, squared lengths of the rows, times ``factor`` squared."""
    factor: Tensor | None
    """``[rows]`` or None: what each row is multiplied by."""
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
    """A change to few coordinates of like variance."""

    basis: Tensor | None
    """``[d, directions]``, orthonormal columns; None where there are few numbers anyway."""
    scale: Tensor
    """``[directions]``: what the coordinates are divided by."""

    @classmethod
    def fit(cls, sample: Tensor) -> Reduction:
        """Find the largest directions of ``sample [m, d]``."""
        basis, reduced = None, sample
        if sample.shape[1] > DIRECTIONS:
            with torch.random.fork_rng(devices=[]):  # svd_lowrank draws from torch's generator
                torch.manual_seed(0)
                basis = torch.svd_lowrank(sample, q=min(DIRECTIONS, len(sample)), niter=2)[2]
            reduced = sample @ basis
        variance = reduced.square().mean(0)
        floor = variance.mean() * VARIANCE_FLOOR + torch.finfo(torch.float32).tiny
        return cls(basis, (variance + floor).sqrt())

    def rows(self, vectors: Tensor) -> NDArray[np.float32]:
        """Coordinates of rows."""
        reduced = vectors if self.basis is None else vectors @ self.basis
        return np.ascontiguousarray((reduced / self.scale).numpy())

    def queries(self, vectors: Tensor) -> NDArray[np.float32]:
        """Coordinates of queries: inner products with :meth:`rows` are those of the vectors, as far as these reach."""
        reduced = vectors if self.basis is None else vectors @ self.basis
        return np.ascontiguousarray((reduced * self.scale).numpy())


class RowIndex:
    """An index of all rows that can be ranked; names candidates."""

    def __init__(self, index: Any, reduction: Reduction, mode: Mode, positions: Tensor, factory: str) -> None:
        self.index = index
        self.reduction = reduction
        self.factory = factory
        self._mode = mode
        self._positions = positions
        self._searched = _on_gpus(index)
        self.pool = POOL
        """How many times k candidates are named for each side of a query."""
        self.recall: Recent[float] = Recent(64)
        """By k and the way of asking: the recall that was measured."""

    @classmethod
    def build(cls, vectors: Vectors, factory: str) -> RowIndex:
        """Read the rows in a stream and index them.

        Raises :class:`QueryError` when FAISS does not know ``factory``, or has too few rows to train it.
        """
        sample = vectors.sample()
        reduction = Reduction.fit(sample)
        width = len(reduction.scale)
        faiss = load_faiss()
        try:
            index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
            if not index.is_trained:
                index.train(reduction.rows(sample))
        except (RuntimeError, TypeError) as error:
            raise QueryError(
                f"FAISS cannot make an index {factory!r} of {width} numbers from {len(sample):,} rows "
                f"({str(error).splitlines()[-1].strip()}); known are for example Flat, SQ8, HNSW32, 'IVF256,Flat'"
            ) from error
        found = cls(index, reduction, vectors.mode, vectors.candidates.positions(), factory)
        found.add(vectors.stream())
        return found

    def add(self, rows: Iterator[Tensor]) -> None:
        """Index further rows, which follow those before."""
        for vectors in rows:
            self.index.add(self.reduction.rows(vectors))
        self._searched = _on_gpus(self.index)

    def candidates(self, queries: Tensor, k: int, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows that may be among the ``k`` highest and ``k`` lowest of preconditioned ``queries``.

        Only rows where ``wanted [rows]`` holds are looked at, all without it. Both results are positions
        ``[queries, c]`` among the store's rows; -1 stands for no row.
        """
        asked = self.reduction.queries(self._mode.asked(queries).to(torch.float32))
        parameters, limit = None, len(self._positions)
        if wanted is not None:
            inside = wanted[self._positions].nonzero().flatten().numpy()
            parameters, limit = self._parameters(inside), len(inside)
        count = min(limit, max(self.pool * k, SMALLEST_POOL))
        highest, lowest = (self._search(side, count, parameters) for side in (asked, -asked))
        return highest, lowest

    def _search(self, asked: NDArray[np.float32], count: int, parameters: Any) -> Tensor:
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


def _on_gpus(index: Any) -> Any:
    """A copy on all GPUs, in shards, where this FAISS has any; else the index itself."""
    faiss = load_faiss()
    if not hasattr(faiss, "index_cpu_to_all_gpus") or not faiss.get_num_gpus():
        return index
    options = faiss.GpuMultipleClonerOptions()
    options.shard = True
    return faiss.index_cpu_to_all_gpus(index, co=options)


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
