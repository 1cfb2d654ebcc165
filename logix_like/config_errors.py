"""Saying what is wrong with a setting, in words: where it stands, what it is and what it may be."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from logix_like.config_source import KeyPath
from logix_like.errors import ConfigError

Place = Callable[[KeyPath], str]
"""Names the file and line (or the argument) that a setting comes from."""


def explain(error: ValidationError, model: type[BaseModel], settings: Mapping[str, Any], place: Place) -> ConfigError:
    """The error to raise for what is wrong with ``settings`` of ``model``: one line for each setting."""
    messages: dict[KeyPath, str] = {}
    for details in error.errors(include_url=False):
        path, owner, field = _locate(model, details)
        if field is None:
            messages.setdefault(path, f"{place(path)}: {_unknown(path, owner, model)}")
        else:
            wrong = _wrong_value(path, field, _value(settings, path), details)
            messages.setdefault(path, f"{place(path)}: {wrong}")
    return ConfigError("\n".join(messages.values()))


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section, None for a single setting."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _locate(model: type[BaseModel], details: ErrorDetails) -> tuple[KeyPath, type[BaseModel], FieldInfo | None]:
    """Path of the setting, the section it stands in and its field (None if there is no such setting)."""
    path: KeyPath = ()
    for part in map(str, details["loc"]):
        path = (*path, part)
        field = model.model_fields.get(part)
        section = section_of(field) if field else None
        # What follows a single setting in the location is an item of it or a branch of a union.
        if section is None or len(path) == len(details["loc"]):
            return path, model, field
        model = section
    return path, model, None


def _unknown(path: KeyPath, owner: type[BaseModel], root: type[BaseModel]) -> str:
    near = _nearest(path, owner, root)
    advice = f"did you mean {near!r}? " if near else ""
    where = f"settings of {'.'.join(path[:-1])!r}" if len(path) > 1 else "settings"
    return f"unknown setting {'.'.join(path)!r}; {advice}The {where} are: {', '.join(owner.model_fields)}"


def _nearest(path: KeyPath, owner: type[BaseModel], root: type[BaseModel]) -> str | None:
    """The known setting that is most likely meant, dotted."""
    leaves = {dotted: dotted.rpartition(".")[2] for dotted in _dotted(root)}
    same = [dotted for dotted, leaf in leaves.items() if leaf == path[-1]]
    siblings = get_close_matches(path[-1], owner.model_fields, n=1)
    alike = get_close_matches(path[-1], leaves.values(), n=1)
    elsewhere = [dotted for dotted, leaf in leaves.items() if leaf in alike]
    return next(iter([*same, *(".".join((*path[:-1], key)) for key in siblings), *elsewhere]), None)


def _dotted(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        section = section_of(field)
        yield prefix + name
        if section is not None:
            yield from _dotted(section, f"{prefix}{name}.")


def _value(settings: Mapping[str, Any], path: KeyPath) -> object:
    value: Any = settings
    for key in path:
        value = value[key]
    return value


def _wrong_value(path: KeyPath, field: FieldInfo, found: object, details: ErrorDetails) -> str:
    culprit = details["input"]
    near = get_close_matches(culprit, _choices(field.annotation), n=1) if isinstance(culprit, str) else []
    advice = f"; did you mean {near[0]!r}?" if near else ""
    return f"{'.'.join(path)!r} is {reprlib.repr(found)}; expected {_expected(field)}{advice}"


def _expected(field: FieldInfo) -> str:
    section = section_of(field)
    if section is not None:
        return f"a mapping of settings: {', '.join(section.model_fields)}"
    return field.description or f"one of {', '.join(_choices(field.annotation))}"


def _choices(annotation: Any) -> list[str]:
    """All words that an annotation allows literally."""
    if get_origin(annotation) is Literal:
        return [str(word) for word in get_args(annotation)]
    return [word for part in get_args(annotation) for word in _choices(part)]
