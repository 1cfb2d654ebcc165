"""The public face: exactly these names, and each says what it is."""

from __future__ import annotations

import re

import logix_like

EXPORTED = [
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


def test_exactly_the_listed_names_are_exported() -> None:
    assert sorted(logix_like.__all__) == EXPORTED


def test_every_exported_name_exists_and_is_documented() -> None:
    for name in set(logix_like.__all__) - {"__version__"}:
        assert getattr(logix_like, name).__doc__, name


def test_version_is_a_release_number() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", logix_like.__version__)
