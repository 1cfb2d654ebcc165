"""Every estimator of the influence literature behind one interface (:class:`Estimator`).

====================================== ======================================================= =======================
by                                     estimators                                              they need
====================================== ======================================================= =======================
one set of weights, or several         EKFAC, KFAC, InfluenceFunction, TRAK, RepresenterPoints model, data
a store's rows                         StoredInfluence, TracInRP                               a logged run
the training's path                    TracIn, InRunShapley, TracInCP, TracInLastLayer, Hydra, ``record: path``, data
                                       Source, ExactUnrolling
retraining                             LeaveOneOut, Downsampling, Shapley, ExactShapley,       a ``SubsetOracle``
                                       Banzhaf
no training at all                     KNNShapley                                              features
====================================== ======================================================= =======================
"""

from logix_like.estimators.banzhaf import Banzhaf
from logix_like.estimators.base import Estimator
from logix_like.estimators.checkpointed import TracInCP, TracInLastLayer
from logix_like.estimators.downsampling import Downsampling
from logix_like.estimators.hydra import Hydra
from logix_like.estimators.influence import InfluenceFunction
from logix_like.estimators.knn_shapley import KNNShapley
from logix_like.estimators.kronecker import EKFAC, KFAC
from logix_like.estimators.leave_one_out import LeaveOneOut
from logix_like.estimators.representer import RepresenterPoints
from logix_like.estimators.shapley import ExactShapley, Shapley
from logix_like.estimators.source import Source
from logix_like.estimators.stored import StoredInfluence
from logix_like.estimators.tracin import InRunShapley, TracIn
from logix_like.estimators.tracin_rows import TracInRP
from logix_like.estimators.trak import TRAK
from logix_like.estimators.unrolling import ExactUnrolling

__all__ = [
    "EKFAC",
    "KFAC",
    "TRAK",
    "Banzhaf",
    "Downsampling",
    "Estimator",
    "ExactShapley",
    "ExactUnrolling",
    "Hydra",
    "InRunShapley",
    "InfluenceFunction",
    "KNNShapley",
    "LeaveOneOut",
    "RepresenterPoints",
    "Shapley",
    "Source",
    "StoredInfluence",
    "TracIn",
    "TracInCP",
    "TracInLastLayer",
    "TracInRP",
]
