"""Objects that a user names on the command line as ``module:name``."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

import typer

from logix_like.errors import ConfigError, LogixError


def load_object(name: str | None) -> Any:
    """The object that ``module:name`` names; modules are also looked for in the present folder.

    This runs the user's own module. Raises ``typer.BadParameter`` where there is no such module or object,
    :class:`ConfigError` where the module itself fails.
    """
    if name is None:
        return None
    module, colon, attribute = name.partition(":")
    if not module or not colon or not attribute:
        raise typer.BadParameter(f"{name!r} is not of the form module:name, e.g. mydata:text_of")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise typer.BadParameter(f"{module!r} cannot be imported: {error}") from error
        raise typer.BadParameter(f"there is no module {module!r} here or among the installed ones") from error
    except Exception as error:  # the user's own code may raise anything
        raise _failed(f"{module!r} failed when it was imported", error) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise typer.BadParameter(f"{module!r} has no {attribute!r}; it must be a name in that module")
        found = getattr(found, part)
    return found


def call_function(name: str) -> Any:
    """What the function that ``module:name`` names returns.

    Raises ``typer.BadParameter`` where it is no function, :class:`ConfigError` where it fails.
    """
    found = load_object(name)
    if not callable(found):
        raise typer.BadParameter(f"{name} is a {type(found).__name__}; it must be a function")
    try:
        return found()
    except LogixError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise _failed(f"{name}() failed", error) from error


def _failed(what: str, error: Exception) -> ConfigError:
    """The user's own error in a line, with the place where it was raised (which a SyntaxError names itself)."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = "" if isinstance(error, SyntaxError) else f" (line {where.lineno} of {where.filename})"
    return ConfigError(f"{what}: {type(error).__name__}: {error}{place}")
