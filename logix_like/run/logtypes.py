"""LogIX's words for what is gathered, and what they mean here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from logix_like.errors import ConfigError

_GRADIENT = {
    "log": (),
    "mean": ("mean",),
    "variance": ("variance",),
    "covariance": ("covariance",),
    "corrected_eigval": ("kronecker", "corrected_eigval"),
}
_LOG_TYPES = tuple(_GRADIENT)
_STREAMS = ("grad", "forward", "backward")


def statistics_from_setup(log_types: Mapping[str, Sequence[str]]) -> frozenset[str]:
    """The statistics that ``log_types`` asks for.

    Rows are stored whether ``log`` is named or not: statistics here belong to rows. The second moments of
    projected inputs (``forward``) and output gradients (``backward``) are the two Kronecker factors, which only
    make sense together; other statistics of them have no use in influence and are refused.

    Raises:
        ConfigError: an unknown stream or log type (lists the known), or one that has no meaning.
    """
    statistics: set[str] = set()
    for stream, names in log_types.items():
        if stream not in _STREAMS:
            raise ConfigError(f"setup: unknown stream {stream!r}; known are {', '.join(_STREAMS)}")
        if isinstance(names, str):
            names = [names]
        for name in names:
            if name not in _LOG_TYPES:
                raise ConfigError(f"setup: unknown log type {name!r} for {stream!r}; known are {', '.join(_LOG_TYPES)}")
            if stream == "grad":
                statistics.update(_GRADIENT[name])
            elif name == "covariance":
                statistics.add("kronecker")
            else:
                raise ConfigError(
                    f"setup: {name!r} of {stream!r} is not kept: activations and output gradients leave a block only "
                    "as 'covariance' (the Kronecker factors); use 'grad' for rows and their statistics"
                )
    return frozenset(statistics)
