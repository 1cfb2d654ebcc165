"""What is measured: a name and a function from a trained problem to scores. A new estimator is a line here."""

from __future__ import annotations

from collections.abc import Mapping

from logix_like.estimators import EKFAC, TRAK
from tests.bench.lds.bench import Row
from tests.bench.lds.path_rows import PATH, UNROLLED

MAIN: Mapping[str, Row] = {
    "default: rows of training, mean over visits": lambda b: b.training().scores(),
    "default, query averaged over checkpoints": lambda b: b.training().scores("all"),
    "rows of the last epoch": lambda b: b.training().scores(reduce="last"),
    "default, cosine": lambda b: b.training().scores(mode="cosine"),
    "default, RelatIF": lambda b: b.training().scores(mode="relatif"),
    "GradDot: default, no preconditioner": lambda b: b.training().scores(preconditioner="identity"),
    "TracIn-like: both averaged, no preconditioner": lambda b: b.training().scores("all", preconditioner="identity"),
    "LoGra, post-hoc": lambda b: b.posthoc().scores(),
    "LoGra, post-hoc, PCA": lambda b: b.posthoc(init="pca").scores(),
    "LoGra, post-hoc, K-FAC": lambda b: b.posthoc().scores(preconditioner="kfac"),
    "EK-FAC, full size, final weights": lambda b: b.estimated(EKFAC, mask=b.problem.mask),
    "EK-FAC, full size, all averaged over checkpoints": lambda b: b.estimated(EKFAC, mask=b.problem.mask, at=b.at_all),
    "TRAK, one model": lambda b: b.estimated(TRAK),
    "post-hoc GradDot": lambda b: b.posthoc().scores(preconditioner="identity"),
}
"""One line for each way of scoring, at the default rank."""

RANKS = (4, 8, 16, 32)
DAMPINGS = (1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 10.0)


def _rank(rank: int, init: str, where: str, checkpoints: str | None = None) -> Row:
    return lambda b: getattr(b, where)(rank=rank, init=init).scores(checkpoints)


def _preconditioned(name: str, damping: float, where: str, checkpoints: str | None = None) -> Row:
    statistics = ("covariance", "kronecker", "corrected_eigval", "variance")
    return lambda b: getattr(b, where)(statistics=statistics).scores(checkpoints, preconditioner=name, damping=damping)


def _stored(dtype: str, rank: int) -> Row:
    return lambda b: b.training(rank=rank, dtype=dtype).scores("all")


PROJECTION: Mapping[str, Row] = {
    f"{where}, {init}, rank {rank}{', queries averaged' if checkpoints else ''}": _rank(rank, init, where, checkpoints)
    for where, checkpoints in (("training", None), ("training", "all"), ("posthoc", None))
    for init in ("orthogonal", "gaussian", "pca")
    for rank in RANKS
}
"""Rank x kind of projection."""

CURVATURE: Mapping[str, Row] = {
    f"{where}, {name}, damping {damping:g}": _preconditioned(name, damping, where)
    for where in ("training", "posthoc")
    for name in ("diagonal", "covariance", "kfac", "ekfac")
    for damping in DAMPINGS
}
"""Preconditioner x damping."""

BYTES: Mapping[str, Row] = {
    f"{dtype}, rank {rank}": _stored(dtype, rank)
    for dtype in ("float32", "bfloat16", "int8", "int4", "sign")
    for rank in RANKS
}
"""Type of the stored numbers x rank."""

SETS: Mapping[str, Mapping[str, Row]] = {
    "main": MAIN,
    "projection": PROJECTION,
    "curvature": CURVATURE,
    "bytes": BYTES,
    "path": PATH,
    "unrolled": UNROLLED,
}
