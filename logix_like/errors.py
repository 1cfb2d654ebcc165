"""Every error that this library raises on purpose.

    LogixError
    ├── ConfigError              a setting is unknown, misspelt or out of range
    ├── CaptureError             a block of training code could not be turned into rows
    │   └── UnsupportedModuleError   a tracked module has no rule
    ├── StoreError               the store cannot do what was asked
    │   ├── StoreExistsError     the path already holds a run
    │   ├── StoreNotFoundError   the path holds none
    │   ├── StoreVersionError    the store was written by a newer library
    │   ├── StoreDamagedError    bytes on disk are not the bytes that were committed
    │   ├── StoreWriteError      the background writer failed
    │   └── EmptyStoreError      the store holds no row to answer from
    ├── ModelMismatchError       the model is not the one that was logged
    ├── StatisticsError          a statistic that is needed was not gathered, or cannot be inverted
    ├── QueryError               a query or one of its options makes no sense
    ├── RetrainingError          a model could not be retrained or measured
    ├── EvaluationError          scores cannot be held against what was measured
    └── MissingDependencyError   an optional package is not installed

Each message states what was found, what was expected and what to do.
"""


class LogixError(Exception):
    """Base of all errors raised by this library."""


class ConfigError(LogixError, ValueError):
    """A setting is unknown, misspelt or out of range."""


class CaptureError(LogixError, RuntimeError):
    """A block of training code could not be turned into rows."""


class UnsupportedModuleError(CaptureError):
    """A module that is to be tracked has no rule."""


class StoreError(LogixError, RuntimeError):
    """The store cannot do what was asked."""


class StoreExistsError(StoreError):
    """The path already holds a run."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """The path holds no store."""


class StoreVersionError(StoreError):
    """The store was written in a format that this library does not know."""


class StoreDamagedError(StoreError):
    """Bytes on disk are not the bytes that were committed."""


class StoreWriteError(StoreError):
    """The storage takes nothing more; rows committed before are safe."""


class EmptyStoreError(StoreError):
    """The store holds no row to answer from."""


class ModelMismatchError(LogixError, ValueError):
    """The model is not the one that was logged."""


class StatisticsError(LogixError, RuntimeError):
    """A statistic that is needed was not gathered, or cannot be inverted."""


class QueryError(LogixError, ValueError):
    """A query or one of its options makes no sense."""


class RetrainingError(LogixError, RuntimeError):
    """A model could not be retrained on a subset, or measured afterwards."""


class EvaluationError(LogixError, ValueError):
    """Scores cannot be held against what was measured, or an evaluation's option makes no sense."""


class MissingDependencyError(LogixError, ImportError):
    """An optional package is not installed."""
