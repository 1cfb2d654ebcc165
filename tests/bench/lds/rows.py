"""What is measured: a name and a function from a trained problem to scores. A new estimator is a line here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from logix_like.estimators import EKFAC, TRAK
from tests.bench.lds import peers
from tests.bench.lds.bench import Bench, Row
from tests.bench.lds.path_rows import PATH, UNROLLED
from tests.bench.lds.problems import Problem

BARE = {"init": "orthogonal", "rank": "auto", "dtype": "bfloat16", "statistics": ["covariance", "kronecker"]}
"""What no preset keeps: 256 random numbers a module, 1,024 where a layer is 512 wide."""
LOGRA = {"init": "orthogonal", "rank": 16, "dtype": "bfloat16", "statistics": ["covariance", "kronecker"]}
"""What LoGra keeps: 256 numbers a module, 512 bytes, in a random basis."""
LOGRA_PCA = {**LOGRA, "init": "pca"}
LOGRA_EIGEN = {**LOGRA, "init": "eigen"}
NIBBLES = {"init": "pca", "rank": 32, "dtype": "int4", "statistics": ["kronecker", "corrected_eigval"]}
"""1,024 numbers of 4 bits: 512 bytes too."""
SIGNS = {**NIBBLES, "rank": 64, "dtype": "sign"}
"""4,096 numbers a module as signs: 512 bytes too, and the preset ``language_model``."""

IN_TRAINING = {"statistics": ["curvature"]}
"""Curvature at full size is gathered beside the rows."""
FULL_ROWS = {"init": "identity", "dtype": "bfloat16", "statistics": ["kronecker", "corrected_eigval"]}


def _ekfac(curvature: bool, averaged: bool) -> Row:
    """EK-FAC at full size, with the ``curvature`` that the training gave or one fitted to the weights asked about."""

    def row(bench: Bench) -> Tensor:
        options: dict[str, Any] = {"at": bench.at_all} if averaged else {}
        if curvature:
            options["curvature"] = bench.training(**IN_TRAINING).run.curvature("training")
        return bench.estimated(EKFAC, mask=bench.problem.mask, **options)

    return row


FULL: Mapping[str, Row] = {
    "EK-FAC, full size, final weights": _ekfac(False, False),
    "EK-FAC, full size, averaged over checkpoints": _ekfac(False, True),
    "EK-FAC, final weights, curvature of the training": _ekfac(True, False),
    "EK-FAC, averaged, curvature of the training": _ekfac(True, True),
    "full gradients of training, EK-FAC": lambda b: b.training(**FULL_ROWS).scores(),
    "full gradients of training, EK-FAC, query averaged": lambda b: b.training(**FULL_ROWS).scores("all"),
}
"""Full size: where the curvature is from, and whether samples count as they were in training."""

COMPACT: Mapping[str, Row] = {
    "preset: rows of training": lambda b: b.training().scores(),
    "preset, query averaged over checkpoints": lambda b: b.training().scores("all"),
    "no preset: rows of training": lambda b: b.training(**BARE).scores(),
    "no preset, query averaged over checkpoints": lambda b: b.training(**BARE).scores("all"),
    "256 numbers a module, random": lambda b: b.training(**LOGRA).scores(),
    "256 numbers a module, PCA": lambda b: b.training(**LOGRA_PCA).scores(),
    "256 numbers a module, eigen": lambda b: b.training(**LOGRA_EIGEN).scores(),
    "256 numbers a module, eigen, query averaged": lambda b: b.training(**LOGRA_EIGEN).scores("all"),
    "1,024 numbers of 4 bits a module, PCA": lambda b: b.training(**NIBBLES).scores(),
    "4,096 signs a module, PCA": lambda b: b.training(**SIGNS).scores(),
    "LoGra, post-hoc, random": lambda b: b.posthoc(**LOGRA).scores(preconditioner="covariance"),
    "LoGra, post-hoc, PCA": lambda b: b.posthoc(**LOGRA_PCA).scores(preconditioner="covariance"),
    "post-hoc, random, K-FAC": lambda b: b.posthoc(**LOGRA).scores(preconditioner="kfac"),
    "post-hoc GradDot": lambda b: b.posthoc(**LOGRA).scores(preconditioner="identity"),
    **{
        name: FULL[name]
        for name in ("EK-FAC, full size, final weights", "EK-FAC, full size, averaged over checkpoints")
    },
    "TRAK, one model": lambda b: b.estimated(TRAK),
    **peers.rows(),
}
"""What the README shows, and the libraries that are installed beside it."""

MAIN: Mapping[str, Row] = {
    **COMPACT,
    "preset, rows of the last epoch": lambda b: b.training().scores(reduce="last"),
    "preset, cosine": lambda b: b.training().scores(mode="cosine"),
    "preset, RelatIF": lambda b: b.training().scores(mode="relatif"),
    "preset, damping auto": lambda b: b.training().scores(damping="auto"),
    "preset, damping 1 / (rate x steps)": lambda b: b.training().scores(damping={"absolute": 1 / b.problem.time}),
    "GradDot: preset, no preconditioner": lambda b: b.training().scores(preconditioner="identity"),
    "TracIn-like: both averaged, no preconditioner": lambda b: b.training().scores("all", preconditioner="identity"),
}
"""One line for each way of scoring."""

RANKS = (4, 8, 16, 32)
DAMPINGS = (1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 10.0, "auto")


def _rank(rank: int, init: str, where: str, checkpoints: str | None = None) -> Row:
    return lambda b: getattr(b, where)(rank=rank, init=init, dtype="float32").scores(checkpoints)


def _preconditioned(name: str, damping: float | str, where: str, checkpoints: str | None = None) -> Row:
    statistics = ("covariance", "kronecker", "corrected_eigval", "variance")
    logged = {"rank": 16, "init": "orthogonal", "dtype": "float32", "statistics": statistics}
    return lambda b: getattr(b, where)(**logged).scores(checkpoints, preconditioner=name, damping=damping)


def _stored(dtype: str, init: str, rank: Any) -> Row:
    return lambda b: b.training(rank=rank, init=init, dtype=dtype).scores("all")


PROJECTION: Mapping[str, Row] = {
    f"{where}, {init}, rank {rank}{', queries averaged' if checkpoints else ''}": _rank(rank, init, where, checkpoints)
    for where, checkpoints in (("training", None), ("training", "all"), ("posthoc", None))
    for init in ("orthogonal", "gaussian", "pca", "eigen")
    for rank in RANKS
}
"""Rank x kind of projection."""

CURVATURE: Mapping[str, Row] = {
    f"{where}, {name}, damping {damping}": _preconditioned(name, damping, where)
    for where in ("training", "posthoc")
    for name in ("diagonal", "covariance", "kfac", "ekfac")
    for damping in DAMPINGS
}
"""Preconditioner x damping."""

BYTES: Mapping[str, Row] = {
    f"{dtype}, {init}, rank {rank}": _stored(dtype, init, rank)
    for init in ("orthogonal", "pca", "eigen")
    for dtype in ("float32", "bfloat16", "int8", "int4", "sign")
    for rank in (*RANKS, 64)
}
"""Type of the stored numbers x basis x rank."""


def _by_module(chosen: str, rank: int, others: int) -> Row:
    return lambda b: _stored("bfloat16", "pca", {**dict.fromkeys(getattr(b.problem, chosen), rank), "*": others})(b)


PER_MODULE: Mapping[str, Row] = {
    "rank 16 for all layers": _stored("bfloat16", "pca", 16),
    **{
        f"rank {rank} for the {chosen} layers, {others} for others": _by_module(chosen, rank, others)
        for chosen, rank, others in (("wide", 32, 8), ("wide", 8, 32), ("first", 32, 8))
    },
}
"""Much or little rank for the wide layers, or for the first; and the same for all."""

SETS: Mapping[str, Mapping[str, Row]] = {
    "compact": COMPACT,
    "main": MAIN,
    "projection": PROJECTION,
    "curvature": CURVATURE,
    "full": FULL,
    "bytes": BYTES,
    "path": PATH,
    "unrolled": UNROLLED,
    "ranks": PER_MODULE,
}


def rows_of(problem: Problem, kinds: Sequence[str]) -> Mapping[str, Row]:
    """The rows of some sets; ``all`` stands for every one that ``problem`` is not too large for."""
    chosen = [kind for kind in SETS if kind != "unrolled" or problem.small] if "all" in kinds else kinds
    return {name: row for kind in chosen for name, row in SETS[kind].items()}
