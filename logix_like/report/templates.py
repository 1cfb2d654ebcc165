"""The pages' templates: everything that is put into them is escaped unless a template says otherwise."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import Any

from logix_like.errors import MissingDependencyError


def render(name: str, /, **values: Any) -> str:
    """A template of this package with ``values`` in it.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "a report needs jinja2, which is not installed: pip install 'logix_like[report]'"
        ) from error
    return str(environment().get_template(name).render(**values))


@cache
def environment() -> Any:
    """Jinja2 with this package's templates; a name that is not given is an error."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def source(name: str) -> str:
    """The text of a template or script: ``name`` in this package, or ``package/name`` in one beside it."""
    package, _, file = name.rpartition("/")
    return files(f"logix_like.{package or 'report'}").joinpath(file).read_text(encoding="utf-8")


def script_hash(script: str) -> str:
    """What a content security policy calls an inline script by (SHA-256, base64)."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
