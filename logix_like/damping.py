"""Damping: what is added to a curvature's eigenvalues before it is inverted.

Three ways to say it:

=========================== ================================================================================
setting                     lambda of one module
=========================== ================================================================================
``0.1`` (a number x)        x times the mean eigenvalue of the module's own block
``{"absolute": x}``         x itself, in every module
``"auto"``                  for a covariance r / (1 - r) times the mean eigenvalue, at least 0.1 times it, where r
                            is the weight that the oracle approximating shrinkage estimator (Chen, Wiesel, Eldar
                            and Hero 2010, eq. 23) gives the identity for a covariance of n samples with these
                            eigenvalues; for any other curvature 0.1 times it
=========================== ================================================================================

``auto`` is 0.1 as long as a covariance has samples enough, and grows where they are too few to tell its small
eigenvalues from noise. It counts samples, not their visits, which are much alike. Eigenvalues of Kronecker factors, and
those that EK-FAC corrects, are each a mean over all samples: few samples do not spread them, and they need no more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

from logix_like.errors import QueryError

LEAST = 0.1
"""The smallest multiple of the mean eigenvalue that ``auto`` chooses."""
MOST = 10.0
"""The largest."""

DampingSetting = float | str | Mapping[str, float]
"""A multiple of the mean eigenvalue, ``"auto"``, or ``{"absolute": x}``."""


@dataclass(frozen=True)
class Damping:
    """A checked setting; see :mod:`logix_like.damping`."""

    kind: str
    """``relative``, ``absolute`` or ``auto``."""
    value: float = 0.0
    """The number, where one is given."""

    @classmethod
    def of(cls, setting: object) -> Damping:
        """Check a setting; :class:`QueryError` when it is none."""
        if isinstance(setting, Damping):
            return setting
        if isinstance(setting, str) and setting == "auto":
            return cls("auto")
        kind, value = "relative", setting
        if isinstance(setting, Mapping) and list(setting) == ["absolute"]:
            kind, value = "absolute", setting["absolute"]
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
            raise QueryError(
                f"damping is {setting!r}; it must be a number of at least 0 (0.1 is the default: a tenth of each "
                "module's mean eigenvalue), 'auto', or {'absolute': number}"
            )
        return cls(kind, float(value))

    @classmethod
    def parse(cls, text: str) -> Damping:
        """The setting that a person types: ``0.1``, ``auto`` or ``absolute:1e-3``; :class:`QueryError` for others."""
        kind, colon, number = text.strip().rpartition(":")
        try:
            if text.strip() == "auto":
                return cls("auto")
            if kind == "absolute" or not colon:
                return cls.of({"absolute": float(number)} if colon else float(number))
        except (ValueError, QueryError):
            pass
        raise QueryError(
            f"damping is {text[:40]!r}; it must be a number of at least 0 (a multiple of the mean eigenvalue), "
            "auto, or absolute:NUMBER"
        )

    @property
    def typed(self) -> str:
        """What :meth:`parse` reads it from."""
        return {"relative": f"{self.value!r}", "absolute": f"absolute:{self.value!r}", "auto": "auto"}[self.kind]

    @property
    def setting(self) -> DampingSetting:
        """What it was made of, as plain data."""
        if self.kind == "auto":
            return "auto"
        return self.value if self.kind == "relative" else {"absolute": self.value}

    def __str__(self) -> str:
        return {"relative": f"{self.value:g}", "absolute": f"{self.value:g} (absolute)", "auto": "auto"}[self.kind]

    def shift(self, mean: float, shrinkage: float = LEAST) -> float:
        """The lambda for a block whose eigenvalues have this ``mean``; ``auto`` takes ``shrinkage`` times it."""
        if self.kind == "absolute":
            return self.value
        return mean * (self.value if self.kind == "relative" else shrinkage)


def require_amount(damping: object) -> float:
    """Lambda itself where there are no eigenvalues to measure it by: a number, or ``{"absolute": number}``.

    Raises:
        QueryError: it is anything else.
    """
    found = Damping.of(damping)
    if found.kind == "auto":
        raise QueryError(
            "damping is 'auto', and this estimator has no eigenvalues to choose by: give lambda itself, a number of at "
            "least 0 or {'absolute': number}"
        )
    return found.value


def shrinkage_damping(size: int, trace: float, squares: float, samples: int) -> float:
    """The multiple of its mean eigenvalue that ``auto`` stands for in a covariance ``[size, size]`` of so many samples.

    ``squares`` is the sum of its squared entries, or eigenvalues.
    """
    spread = squares - trace**2 / size
    if spread <= 0 or samples <= 0:  # all eigenvalues equal, or nothing known: any multiple gives the same order
        return LEAST
    weight = ((1 - 2 / size) * squares + trace**2) / ((samples + 1 - 2 / size) * spread)
    weight = min(weight, MOST / (1 + MOST))
    return max(LEAST, weight / (1 - weight))
