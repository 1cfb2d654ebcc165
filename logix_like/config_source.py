"""Reading settings: a YAML file, a preset or a mapping becomes plain data that remembers its lines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from logix_like.errors import ConfigError

KeyPath = tuple[str, ...]
"""Where a setting stands, from the outermost key inwards."""

DEEPEST = 3
"""No setting lies under more keys than this (``modules.batch_dim.<glob>``)."""


@dataclass(frozen=True)
class Source:
    """Settings as they were written, and where."""

    name: str
    """What messages call it: a file's path, a preset's name or the kind of the argument."""
    data: Mapping[str, Any]
    """The settings, not yet checked."""
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    """Line of each key (from 1); empty for settings that come from no file."""

    def place(self, path: KeyPath) -> str:
        """The source's name, and the line of ``path`` or else of the nearest key around it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return f"{self.name}, line {self.lines[path[:end]]}"
        return self.name


def read_source(source: str | Path | Mapping[str, Any] | None) -> Source:
    """Read a path to a YAML file, the name of a preset, or a mapping; None is an empty mapping.

    A bare word names a preset whatever the working folder holds; a file of that name is meant by
    ``./word`` or a :class:`~pathlib.Path`. Raises :class:`ConfigError`.
    """
    if source is None:
        return Source("the config", {})
    if isinstance(source, Mapping):
        return Source("the config mapping", _text_keys(source))
    if isinstance(source, str) and source in presets():
        return _parse(f"preset {source!r}", presets()[source].read_bytes())
    if isinstance(source, str | Path):
        return _parse(str(source), _file_bytes(Path(source)))
    raise ConfigError(
        f"config is of type {type(source).__name__}; expected the path of a YAML file, the name of a "
        f"preset ({', '.join(presets())}), a mapping or a Config"
    )


def presets() -> dict[str, Traversable]:
    """The YAML files that are installed with the library, by name."""
    files = (entry for entry in resources.files("logix_like.configs").iterdir())
    return {f.name.removesuffix(".yaml"): f for f in sorted(files, key=str) if f.name.endswith(".yaml")}


def _text_keys(data: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in data:
        if not isinstance(key, str):
            raise ConfigError(f"the config mapping has the key {key!r}; expected the name of a setting")
    return data


def _file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        near = get_close_matches(path.stem, presets(), n=1)
        advice = f"did you mean the preset {near[0]!r}? " if near else ""
        raise ConfigError(
            f"cannot read the config file '{path}' ({error.strerror or error}); {advice}"
            f"expected the path of a YAML file or the name of a preset: {', '.join(presets())}"
        ) from None


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``1e-3`` is a number and a date is text, as people expect.

    YAML 1.1, which the base class follows, asks for a dot and a signed exponent in such a number.
    """


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse(name: str, text: bytes) -> Source:
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        lines = dict(_key_lines(root, name))
        data = {} if root is None else loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = error.problem or error.context
        raise ConfigError(f"{name}{line}: this is not valid YAML: {problem}") from None
    except ConfigError:  # a ValueError too, and already in words
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: this is not valid YAML: {error}") from None
    if data is None:  # every line is a comment: nothing is set
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{name}: found a {type(data).__name__} at the top level; expected a mapping of settings "
            "such as 'project: mnist'"
        )
    return Source(name, data, lines)


def _key_lines(node: yaml.Node | None, name: str, path: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    """Lines of all keys of a mapping; a key that stands twice or is no text is refused."""
    # The depth bounds the walk where aliases would repeat a mapping endlessly.
    if not isinstance(node, yaml.MappingNode) or len(path) == DEEPEST:
        return
    known: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.tag != "tag:yaml.org,2002:str":
            raise ConfigError(f"{name}, line {line}: the key {_shown(key)} is not text; put it in quotes")
        here = (*path, str(key.value))
        if key.value in known:
            raise ConfigError(
                f"{name}, line {line}: {'.'.join(here)!r} stands here a second time, first on line "
                f"{known[key.value]}; keep one of the two"
            )
        known[key.value] = line
        yield here, line
        yield from _key_lines(value, name, here)


def _shown(key: yaml.Node) -> str:
    if isinstance(key, yaml.ScalarNode):
        return repr(key.value)
    return "(a list)" if isinstance(key, yaml.SequenceNode) else "(a mapping)"
