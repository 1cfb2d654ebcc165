"""The Memory-Perturbation Equation (Nickl et al. 2023, arXiv 2310.19273): what a model would be without a sample.

:class:`SensitivityMonitor` is what a training loop talks to.
"""

from logix_like.sensitivity.groups import GroupEffect
from logix_like.sensitivity.monitor import SensitivityMonitor, Snapshot
from logix_like.sensitivity.posterior import (
    DensePosterior,
    DiagonalPosterior,
    KroneckerPosterior,
    Posterior,
    posterior_of,
)
from logix_like.sensitivity.result import Sensitivities
from logix_like.sensitivity.strength import StrengthSweep, choose_strength

__all__ = [
    "DensePosterior",
    "DiagonalPosterior",
    "GroupEffect",
    "KroneckerPosterior",
    "Posterior",
    "Sensitivities",
    "SensitivityMonitor",
    "Snapshot",
    "StrengthSweep",
    "choose_strength",
    "posterior_of",
]
