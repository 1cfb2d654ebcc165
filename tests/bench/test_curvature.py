"""Bar B14: EK-FAC at full size on W1; ``python -m pytest tests/bench/test_curvature.py -s`` prints the table.

Every pass is timed over the same batches as a plain epoch, in one process, in turn. The eigenvectors, which cost the
same whatever the number of samples, are timed once and counted against an epoch of 64 batches. kronfluence is fitted
and asked the same on the same batches where it is installed; its own eigenvectors are counted in the same way.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from logix_like.capture.selection import Selection, select_modules
from logix_like.curvature import Curvature, damped_inverse_of, fit_curvature, stream
from logix_like.curvature.gradients import InnerProducts, SquareSums
from logix_like.curvature.moments import FactorSums
from logix_like.curvature.stream import CurvatureStream
from logix_like.curvature.sweep import Sweep
from logix_like.estimators import EKFAC
from logix_like.linalg.basis import eigenbasis
from logix_like.linalg.lowrank import low_rank
from logix_like.objective import Objective
from logix_like.weights import frozen
from tests.bench import w1

TIMED, EPOCH, QUERIES, RANK = 9, 64, 8, 8
Batch = dict[str, Tensor]
Act = Callable[[Batch], object]


def seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def timed(acts: Mapping[str, Act], batches: list[Batch]) -> dict[str, list[float]]:
    """Seconds of every act on every batch, in turn; the first batch warms up."""
    found: dict[str, list[float]] = {name: [] for name in acts}
    for batch in batches:
        for name, act in acts.items():
            found[name].append(seconds(partial(act, batch)))
    return {name: times[1:] for name, times in found.items()}


def passes(network: nn.Module, selection: Selection, curvature: Curvature, queries: Batch) -> dict[str, Act]:
    """Ours, batch by batch."""
    objective = Objective.language_model()
    sweep, generator = Sweep(network, objective, selection), torch.Generator().manual_seed(0)
    factors, squares = FactorSums(8192, "highest"), SquareSums(curvature.bases, "highest")

    def drawn(model: Any, batch: Batch) -> Tensor:
        return objective.backward_losses(model, batch, draw=True, generator=generator)

    ekfac = EKFAC(network, [], objective, curvature=curvature, selection=selection, progress=False)
    vectors = curvature.apply(damped_inverse_of(0.1), ekfac.gradients(queries))
    inner = InnerProducts(vectors)
    narrow = InnerProducts({name: low_rank(vector, RANK) for name, vector in vectors.items()})

    def plain(batch: Batch) -> None:
        network.zero_grad()
        w1.loss(network, batch["input_ids"]).backward()

    followed = CurvatureStream(selection, Path("kept in memory"))

    def watched(batch: Batch) -> None:
        look = followed.look(w1.BATCH)
        assert look is not None
        with look:
            plain(batch)
        followed.take(look, w1.BATCH)

    def bare(batch: Batch) -> None:
        with frozen(network):
            embedded = network.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
            network(inputs_embeds=embedded, labels=batch["input_ids"], use_cache=False).loss.backward()

    return {
        "plain": plain,
        "frozen weights, nothing read": bare,
        "a block of training that is looked at": watched,
        "factors": lambda batch: sweep.run(batch, drawn, factors),
        "eigenvalues": lambda batch: sweep.run(batch, drawn, squares),
        **products(curvature),
        f"{QUERIES} queries": lambda batch: sweep.run(batch, objective.backward_losses, inner),
        f"{QUERIES} queries, rank {RANK}": lambda batch: sweep.run(batch, objective.backward_losses, narrow),
    }


def products(curvature: Curvature) -> dict[str, Act]:
    """The matrix products of either pass alone, on matrices of their sizes that lie ready: what no code goes below."""
    positions = w1.BATCH * w1.LENGTH
    groups = {block.input_group: torch.randn(positions, block.shape[1]) for block in curvature.layout}
    outputs = {block.name: torch.randn(positions, block.shape[0]) for block in curvature.layout}
    bases = {len(part): part.float() for pair in curvature.bases.values() for basis in pair for part in basis.parts}

    def factors(batch: Batch) -> None:
        for matrix in (*groups.values(), *outputs.values()):
            matrix.T @ matrix

    def eigenvalues(batch: Batch) -> None:
        inputs = {name: (x @ bases[x.shape[1]]).view(w1.BATCH, w1.LENGTH, -1) for name, x in groups.items()}
        for block in curvature.layout:
            rotated = (outputs[block.name] @ bases[block.shape[0]]).view(w1.BATCH, w1.LENGTH, -1)
            (rotated.mT @ inputs[block.input_group]).square_().sum(0)

    return {"products of the factors": factors, "products of the eigenvalues": eigenvalues}


@pytest.mark.timeout(900)
def test_b14_fit_and_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "EVERY", 1)
    network = w1.model()
    selection = select_modules(network, include=["model.layers.*"], types=["Linear"])
    batches: list[Batch] = [{"input_ids": tokens} for tokens in w1.batches()[: TIMED + 1]]
    curvature = fit_curvature(network, batches[:1], Objective.language_model(), selection=selection, progress=False)
    found = timed(passes(network, selection, curvature, batches[0]), batches)
    ratios = {
        name: w1.ratio_of(f"B14 {name} / plain", times, found["plain"])
        for name, times in found.items()
        if name != "plain"
    }
    sys.stdout.write("".join(f"\n{ratio}" for ratio in ratios.values()))
    share = eigenvectors(curvature) / (EPOCH * statistics.median(found["plain"]))
    median = {name: ratio.quartiles[1] for name, ratio in ratios.items()}
    factors, eigenvalues = median["factors"], median["eigenvalues"]
    sys.stdout.write(f"\nB14 eigenvectors {share:.3f} of an epoch of {EPOCH} batches")
    fit = factors + eigenvalues + share
    sys.stdout.write(f"\nB14 fit / plain epoch: two passes {fit:.2f} (bar 2.0)")
    bare = 2 * median["frozen weights, nothing read"] + median["products of the factors"]
    bare += median["products of the eigenvalues"] + share
    sys.stdout.write(f"\nB14 floor of the two passes: 2 frozen passes, bare products, eigenvectors {bare:.2f}")
    sys.stdout.write(f"\nB14 split {(factors + eigenvalues) / 2 + share:.2f} (aim 1.6)\n")
    assert fit <= 2.0
    assert median[f"{QUERIES} queries"] <= 0.85


def eigenvectors(curvature: Curvature) -> float:
    """Seconds for those of matrices as large as every factor of ``curvature``."""
    parts = {id(part): len(part) for bases in curvature.bases.values() for basis in bases for part in basis.parts}
    moments = [torch.randn(width, 2 * width, dtype=torch.float64) for width in parts.values()]
    return seconds(lambda: [eigenbasis([moment @ moment.T]) for moment in moments])


@pytest.mark.timeout(900)
def test_b14_kronfluence_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("kronfluence")
    network, tokens = w1.model(), torch.cat(w1.batches()[:TIMED])
    plain = passes_of_plain(network, tokens)
    analyzer = prepared(network, tmp_path)
    data, queries = TensorDataset(tokens), TensorDataset(tokens[:QUERIES])
    size = {"per_device_batch_size": w1.BATCH}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        covariance = seconds(lambda: analyzer.fit_covariance_matrices("f", data, **size))
        eigen = seconds(lambda: analyzer.perform_eigendecomposition("f"))
        values = seconds(lambda: analyzer.fit_lambda_matrices("f", data, **size))
        sizes = {"per_device_query_batch_size": QUERIES, "per_device_train_batch_size": w1.BATCH}
        scores = seconds(lambda: analyzer.compute_pairwise_scores("s", "f", queries, data, **sizes))
    share = eigen / (EPOCH / TIMED * plain)
    sys.stdout.write(
        f"\nB14 kronfluence / plain: factors {covariance / plain:.2f}, eigenvalues {values / plain:.2f}, eigenvectors "
        f"{share:.2f}, fit {(covariance + values) / plain + share:.2f}, {QUERIES} queries {scores / plain:.2f}\n"
    )


def passes_of_plain(network: nn.Module, tokens: Tensor) -> float:
    """Seconds of a plain pass over ``tokens``; the first batch warms up."""

    def act() -> None:
        for batch in tokens.split(w1.BATCH):
            network.zero_grad()
            w1.loss(network, batch).backward()

    act()
    return seconds(act)


def prepared(network: nn.Module, folder: Path) -> Any:
    """kronfluence's analyzer of the same modules; it wraps them, so the network is its own from now on."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.task import Task

    class NextToken(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            tokens = batch[0]
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
            labels = tokens[:, 1:].flatten()
            if sample:
                labels = torch.multinomial(logits.detach().softmax(-1), 1).squeeze(1)
            return nn.functional.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return [
                name for name, module in network.named_modules() if ".layers." in name and type(module) is nn.Linear
            ]

    task = NextToken()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Analyzer("w1", prepare_model(network, task), task, cpu=True, output_dir=str(folder), disable_tqdm=True)
