"""Commands that show what there is: ``demo`` and ``info``."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from logix_like import open_store
from logix_like.cli.app import app, example
from logix_like.cli.options import AsJson, StorePath, answer


@app.command(epilog=example("demo --root stores"))
def demo(
    root: Annotated[
        Path | None, typer.Option(help="Folder to keep the demo's store in (default: a temporary one, removed).")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the store of an earlier demo in the same folder.")] = False,
    json: AsJson = False,
) -> None:
    """Train a small network on images of digits, log it, and ask which images mattered."""
    from logix_like.examples.quickstart import main

    with redirect_stdout(sys.stderr) if json else nullcontext():
        found = main(root, overwrite=overwrite)
    if json:
        answer("", asdict(found), as_json=True)


@app.command(epilog=example("info logix/mnist"))
def info(store: StorePath, json: AsJson = False) -> None:
    """Tell what a store holds: modules, rows, statistics, writers, checkpoints, bytes."""
    from logix_like.report.summary import StoreSummary

    summary = StoreSummary.of(open_store(store))
    answer(summary, summary.to_json(), as_json=json)
