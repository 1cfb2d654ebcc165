"""Every estimator of the influence literature behind one interface (:class:`Estimator`)."""

from logix_like.estimators.base import Estimator
from logix_like.estimators.kronecker import EKFAC, KFAC

__all__ = ["EKFAC", "KFAC", "Estimator"]
