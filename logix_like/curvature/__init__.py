"""Curvature at full size: fitted by passes over the training samples, applied by any function of its eigenvalues."""

from logix_like.curvature.curvature import Curvature, Fisher, damped_inverse_of
from logix_like.curvature.files import load_curvature, save_curvature, stored_curvature
from logix_like.curvature.fitting import default_selection, fit_curvature

__all__ = [
    "Curvature",
    "Fisher",
    "damped_inverse_of",
    "default_selection",
    "fit_curvature",
    "load_curvature",
    "save_curvature",
    "stored_curvature",
]
