"""Arguments and options that several commands share, and how plain data is printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

import typer

StorePath = Annotated[
    str, typer.Argument(metavar="STORE", help="A store: its folder <root>/<project>, or its URL (s3://...).")
]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def one_of(known: Collection[str]) -> Callable[[str | None], str | None]:
    """A check for an option's value."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in known:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}")
        return value

    return check


def choice(what: str, known: Collection[str]) -> Any:
    """An option that takes one of some words, by default the one in the store's config."""
    return typer.Option(help=f"{what}: {', '.join(known)}.", callback=one_of(known), show_default="the store's config")


def as_json(content: Mapping[str, Any]) -> str:
    """What ``--json`` prints."""
    return json.dumps(content, indent=1)
