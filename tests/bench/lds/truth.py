"""The truth itself: what models retrained on random halves measured, shipped so that a bench takes minutes.

A shipped file holds for the data, the model before its training and the optimizer it was made with; where one of them
has changed since, the halves are trained anew (into the cache folder, which keeps what is done).
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from logix_like.evaluation import subset_truth
from logix_like.retraining import Measurements, SubsetOracle
from tests.bench.lds.problems import SHIPPED, Problem


def truth_of(problem: Problem, *, subsets: int, seeds: int, cache: Path, workers: int) -> Measurements:
    """``subsets`` halves, each trained with ``seeds`` seeds: the shipped ones, or trained now."""
    shipped = load_truth(problem)
    if shipped is not None and len(shipped.masks) >= subsets and shipped.values.shape[1] >= seeds:
        return Measurements(shipped.masks[:subsets], shipped.values[:subsets, :seeds])
    return retrained(problem, subsets=subsets, seeds=seeds, cache=cache, workers=workers)


def retrained(problem: Problem, *, subsets: int, seeds: int, cache: Path, workers: int) -> Measurements:
    """The same without what is shipped; from the cache as far as it is there."""
    problem.model()  # what is pretrained is made once, before the workers ask for it
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        oracle = SubsetOracle(
            problem.train,
            problem.measure,
            problem.samples,
            seeds=seeds,
            cache=cache / problem.name,
            name=problem.name,
            executor=pool,
        )
        return subset_truth(oracle, subsets=subsets)


def load_truth(problem: Problem) -> Measurements | None:
    """What is shipped for ``problem``; None where nothing is, or it was made for another data set or model."""
    file = path_of(problem)
    if not file.exists():
        return None
    with safe_open(file, "pt") as tensors:
        if tensors.metadata().get("fingerprint") != fingerprint(problem):
            return None
        bits = np.unpackbits(tensors.get_tensor("masks").numpy(), axis=1, count=problem.samples)
        return Measurements(torch.from_numpy(bits).bool(), tensors.get_tensor("values").double())


def save_truth(problem: Problem, truth: Measurements) -> Path:
    """Write the file to ship: masks as bits, and 7 digits of each measurement."""
    SHIPPED.mkdir(exist_ok=True)
    bits = torch.from_numpy(np.packbits(truth.masks.numpy(), axis=1))
    tensors = {"masks": bits, "values": truth.values.float()}
    save_file(tensors, path_of(problem), {"fingerprint": fingerprint(problem)})
    return path_of(problem)


def path_of(problem: Problem) -> Path:
    """The shipped file of a problem."""
    return SHIPPED / f"{problem.name}.safetensors"


def fingerprint(problem: Problem) -> str:
    """Of all that a retraining depends on but for the arithmetic of a step."""
    digest = hashlib.blake2b(problem.name.encode(), digest_size=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = problem.model()
    optimizer = problem.optimizer(model)
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    digest.update(f"{type(optimizer).__name__} {sorted(settings.items(), key=lambda item: item[0])}".encode())
    for values in (model.state_dict(), problem.training(range(problem.samples)), problem.asked()):
        for tensor in _tensors(values):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _tensors(batch: Any) -> list[Tensor]:
    return list(batch.values()) if hasattr(batch, "values") else list(batch)
