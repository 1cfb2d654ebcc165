"""Every estimator of the influence literature behind one interface (:class:`Estimator`)."""

from logix_like.estimators.base import Estimator
from logix_like.estimators.influence import InfluenceFunction
from logix_like.estimators.kronecker import EKFAC, KFAC
from logix_like.estimators.trak import TRAK

__all__ = ["EKFAC", "KFAC", "TRAK", "Estimator", "InfluenceFunction"]
