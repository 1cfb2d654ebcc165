"""Is the answer true? Scores held against what really happens when models are retrained.

Sign: what is measured grows as a model gets better (a margin, or minus a loss), so that scores that are right correlate
positively with it.
"""

from logix_like.evaluation.errors_found import LabelErrors, label_errors
from logix_like.evaluation.lds import LDS, lds, subset_truth
from logix_like.evaluation.leave_one_out import Correlation, leave_one_out_correlation
from logix_like.evaluation.removal import RemovalCurve, RemovalEffect, brittleness, query_loss_difference, removal_curve

__all__ = [
    "LDS",
    "Correlation",
    "LabelErrors",
    "RemovalCurve",
    "RemovalEffect",
    "brittleness",
    "label_errors",
    "lds",
    "leave_one_out_correlation",
    "query_loss_difference",
    "removal_curve",
    "subset_truth",
]
