"""Which training samples made a model do what it did: log gradients while training, ask afterwards.

Start with :func:`init`, go on with :class:`Run`; :func:`load` opens a finished store for queries and
:func:`open_store` reads one without a model.
"""

from logix_like.config import Config
from logix_like.errors import LogixError
from logix_like.objective import Objective
from logix_like.query.gradients import QueryGradients
from logix_like.query.result import InfluenceResult
from logix_like.run.run import Run
from logix_like.run.starting import init, load
from logix_like.store import GradientStore, open_store

__version__ = "0.1.0"

__all__ = [
    "Config",
    "GradientStore",
    "InfluenceResult",
    "LogixError",
    "Objective",
    "QueryGradients",
    "Run",
    "__version__",
    "init",
    "load",
    "open_store",
]
