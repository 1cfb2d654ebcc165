"""Arguments and options that several commands share, and how plain data is printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from logix_like.damping import Damping
from logix_like.errors import QueryError
from logix_like.preconditioner import PRECONDITIONERS
from logix_like.query.modes import MODES
from logix_like.query.question import ENGINES, REDUCTIONS

StorePath = Annotated[
    str, typer.Argument(metavar="STORE", help="A store: its folder <root>/<project>, or its URL (s3://...).")
]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


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


def _damping(value: str) -> str:
    """Refuse what is no damping."""
    try:
        return Damping.parse(value).typed
    except QueryError as error:
        raise typer.BadParameter(str(error)) from error


Preconditioner = Annotated[str | None, choice("Curvature to score in", PRECONDITIONERS)]
DampingOption = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBER|auto|absolute:NUMBER",
        parser=_damping,
        help="Damping, x the blocks' mean eigenvalue; auto chooses it; absolute:1e-3 is the same for all blocks.",
        show_default="the store's config",
    ),
]
Mode = Annotated[str | None, choice("How two gradients are compared", MODES)]
Reduce = Annotated[str | None, choice("How a sample's visits are combined", REDUCTIONS)]
Engine = Annotated[str | None, choice("What searches the rows", [one for one in ENGINES if one != "dask"])]
"""Dask needs a client, which only a Python process can give."""


def given(damping: str | None, **options: str | None) -> dict[str, Any]:
    """The options that were given, as ``compute_influence_all`` takes them."""
    setting = None if damping is None else Damping.parse(damping).setting
    return {name: value for name, value in (options | {"damping": setting}).items() if value is not None}


def writable(path: Path | None) -> Path | None:
    """A check for a file to be written, before anything is computed: its folder is there."""
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"{path}: there is no folder {path.parent}; create it first")
    return path


def answer(text: object, plain: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what a command found on stdout: as text, or with ``--json`` as plain data."""
    typer.echo(json.dumps(plain, indent=1) if as_json else str(text))


def saved(path: Path, plain: Mapping[str, Any], *, as_json: bool) -> None:
    """Say where a command's file is: on stderr, or with ``--json`` on stdout, with what else is to be known."""
    if as_json:
        answer("", {"file": str(path), **plain}, as_json=True)
    else:
        typer.echo(f"saved to {path}", err=True)
