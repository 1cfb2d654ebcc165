"""TRAK (Park et al. 2023): projected gradients of margins, decorrelated, averaged over models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from logix_like.capture.projector import Projector
from logix_like.capture.selection import Selection
from logix_like.curvature.fitting import default_selection
from logix_like.curvature.gradients import Gradients
from logix_like.curvature.passes import At, once
from logix_like.curvature.sweep import Losses, Sweep
from logix_like.damping import Damping, DampingSetting, shrinkage_damping
from logix_like.errors import EmptyStoreError, QueryError
from logix_like.estimators.base import Estimator
from logix_like.estimators.samples import DataIds, Samples, require_samples
from logix_like.linalg.inverse import damped_inverse
from logix_like.objective import Batch, Objective
from logix_like.projection import INITS
from logix_like.query.result import Ids
from logix_like.weights import fingerprint


class TRAK(Estimator):
    """``phi_q^T (Phi^T Phi + lambda I)^-1 phi_i (1 - p_i)`` (equation 13 of arXiv 2303.14186, per model).

    ``phi`` is the gradient of the margin ``log(p / (1 - p))``, projected module by module (Kronecker products of
    random matrices), all modules side by side. With several sets of weights both parts are averaged over them, then
    multiplied (equation 17): retrained models are best, checkpoints of one training are cheap.

    Args:
        model: At the weights that are asked about; not changed.
        loader: Batches of training samples, always in the same order.
        objective: A classifier unless told otherwise; for sequences ``p`` is that of the whole sequence.
        rank: Of the projections, on each side: a number, ``{glob: number}`` or ``auto``.
        seed: Of the projections.
        damping: ``lambda`` as a multiple of the mean eigenvalue of ``Phi^T Phi``, ``"auto"`` or
            ``{"absolute": lambda}``; see :mod:`logix_like.damping`. The paper has 0, which is singular where features
            outnumber samples.
        data_id: Names of the samples, as in :class:`KroneckerInfluence`.
        selection: Tracked modules; all linear maps unless told otherwise.
        at: Each call yields once for each set of weights after loading it into the model.
        progress: Whether bars are shown.
    """

    name = "TRAK"

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Batch],
        objective: Objective | None = None,
        *,
        rank: int | Mapping[str, int] | Literal["auto"] = "auto",
        seed: int = 0,
        damping: DampingSetting = 0.1,
        data_id: DataIds = None,
        selection: Selection | None = None,
        at: At = once,
        progress: bool = True,
    ) -> None:
        self._objective = objective or Objective()
        selection = selection or default_selection(model)
        projector = Projector(selection.blocks, INITS["gaussian"], rank=rank, seed=seed)
        self._sweep = Sweep(model, self._objective, selection, projector=projector)
        self._samples = Samples(loader, self._objective, data_id=data_id, at=at, progress=progress)
        self._inverses: dict[int, tuple[str, Tensor]] = {}
        self._damping = Damping.of(damping)

    @property
    def data_id(self) -> Ids:
        """``[samples]``."""
        return self._samples.data_id

    @property
    def damping_setting(self) -> DampingSetting:
        """As it was given."""
        return self._damping.setting

    def scores(self, queries: Batch) -> Tensor:
        """``[queries, samples]`` for a batch of queries like those of the training."""
        require_samples(self._objective, queries)

        def of_model(number: int) -> Callable[[Tensor], Tensor]:
            features = self._features(queries)[0]
            if not bool(features.isfinite().all()):
                raise QueryError("a query's gradient is not finite: it cannot be scored")
            vectors = features @ self._inverse(number).to(features)
            return lambda found: vectors @ found.T

        return self._over_models("TRAK scores", of_model)

    def self_influence(self) -> Tensor:
        """``[samples]``: each sample's score for itself."""

        def of_model(number: int) -> Callable[[Tensor], Tensor]:
            inverse = self._inverse(number)
            return lambda found: ((found @ inverse.to(found)) * found).sum(1)[None]

        return self._over_models("self-influence", of_model)[0]

    def _over_models(self, what: str, of_model: Callable[[int], Callable[[Tensor], Tensor]]) -> Tensor:
        """``of_model(number)(features [n, width]) -> [m, n]``, averaged and weighted by the averages of ``1 - p``."""
        products: list[Tensor] = []
        wrongs: list[Tensor] = []
        for number in self._samples.weights():
            of_features = of_model(number)
            rows: list[Tensor] = []
            wrong: list[Tensor] = []
            for batch in self._samples.batches(what):
                features, margins = self._features(batch)
                rows.append(of_features(features).cpu())
                wrong.append(torch.sigmoid(-margins).cpu())  # 1 - p
            products.append(torch.cat(rows, 1))
            wrongs.append(torch.cat(wrong))
        return torch.stack(products).mean(0) * torch.stack(wrongs).mean(0)

    def _inverse(self, number: int) -> Tensor:
        """``(Phi^T Phi + lambda I)^-1`` of the model's present weights, found once for each set of them."""
        weights = fingerprint(self._sweep.model)
        known = self._inverses.get(number)
        if known is None or known[0] != weights:
            gram: Tensor | None = None
            for batch in self._samples.batches("TRAK features"):
                features = self._features(batch)[0].double()
                gram = features.T @ features if gram is None else gram + features.T @ features
            if gram is None:
                raise EmptyStoreError("there are no samples to score: the loader yielded no batch")
            size, trace = len(gram), gram.trace().item()
            chosen = shrinkage_damping(size, trace, gram.square().sum().item(), len(self.data_id))
            shift = self._damping.shift(trace / size, chosen)
            known = weights, damped_inverse(gram, shift, "all modules together")
            self._inverses[number] = known
        return known[1]

    def _features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """``[n, width]`` gradients of the margins and ``[n]`` margins."""
        sink = Gradients()
        margins: Losses = self._objective.margins
        values = self._sweep.run(batch, margins, sink)
        blocks = [
            sink.blocks[block.name].flatten(1)
            if block.name in sink.blocks
            else torch.zeros(len(values), block.size, dtype=values.dtype, device=values.device)
            for block in self._sweep.layout
        ]
        return torch.cat(blocks, 1), values
