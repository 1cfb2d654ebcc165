"""Commands that show what there is: ``demo`` and ``info``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from logix_like import open_store
from logix_like.cli.app import app
from logix_like.cli.options import AsJson, StorePath, as_json


@app.command(epilog="Example: logix-like demo --root stores")
def demo(
    root: Annotated[
        Path | None, typer.Option(help="Folder to keep the demo's store in (default: a temporary one, removed).")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the store of an earlier demo in the same folder.")] = False,
) -> None:
    """Train a small network on images of digits, log it, and ask which images mattered."""
    from logix_like.examples.quickstart import main

    main(root, overwrite=overwrite)


@app.command(epilog="Example: logix-like info logix/mnist")
def info(store: StorePath, json: AsJson = False) -> None:
    """Tell what a store holds: modules, rows, statistics, writers, checkpoints, bytes."""
    from logix_like.report.summary import StoreSummary

    summary = StoreSummary.of(open_store(store))
    typer.echo(as_json(summary.to_json()) if json else str(summary))
