"""Every estimator of the influence literature behind one interface (:class:`Estimator`)."""

from logix_like.estimators.base import Estimator

__all__ = ["Estimator"]
