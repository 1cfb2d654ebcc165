"""Commands that show results in a browser: ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from logix_like import load
from logix_like.cli.app import app
from logix_like.cli.ask import GradientsFile
from logix_like.cli.loading import load_object
from logix_like.cli.options import StorePath
from logix_like.query.gradients import QueryGradients
from logix_like.query.result import InfluenceResult

PAIRS_HELD = 50_000_000
"""With up to so many pairs of a query and a sample all scores are held, so that their distribution is drawn."""

DataOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:NAME",
        help="A mapping, list or function in one of your modules that gives the text, picture or facts for an id.",
    ),
]


@app.command(
    epilog="Example: logix-like report logix/mnist --queries queries.npz --data mydata:text_of --output answer.html"
)
def report(
    store: StorePath,
    queries: GradientsFile,
    output: Annotated[Path, typer.Option(metavar="FILE.html", help="The page's file.")] = Path("report.html"),
    k: Annotated[int, typer.Option("-k", min=1, help="Samples on each side of a query.")] = 10,
    data: DataOption = None,
    query_data: Annotated[
        str | None, typer.Option(metavar="MODULE:NAME", help="The same for the ids of the queries.")
    ] = None,
) -> None:
    """Write an answer as one self-contained HTML page: samples beside scores, distributions, what was computed."""
    contents, asked = load_object(data), load_object(query_data)
    result = _answer(store, QueryGradients.load(queries, load(store).store.modules), k)
    saved = result.report(output, k=k, data=contents, queries=asked, store=store)
    typer.echo(f"saved to {saved}", err=True)


def _answer(path: str, gradients: QueryGradients, k: int) -> InfluenceResult:
    """All scores where memory allows, else the extremes alone."""
    run = load(path)
    held = len(gradients) * len(run.store) <= PAIRS_HELD
    options: dict[str, Any] = {} if held else {"k": k}
    return run.compute_influence_all(gradients, **options)
