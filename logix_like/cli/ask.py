"""Commands that ask: ``query``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from logix_like import load
from logix_like.cli.app import app, example
from logix_like.cli.options import (
    AsJson,
    DampingOption,
    Engine,
    Mode,
    Preconditioner,
    Reduce,
    StorePath,
    answer,
    given,
    writable,
)
from logix_like.query.gradients import QueryGradients
from logix_like.query.result import InfluenceResult, Ranking
from logix_like.query.table import influence_table

QUERY_HELP = """Name the samples that helped and those that harmed, for each of some queries.

The queries' gradients come from a Python process that has the model:

\b
    with run.query(data_id=ids) as query:
        loss_fn(model(x), y).backward()
    query.gradients.save("queries.npz")
"""

GradientsFile = Annotated[
    Path,
    typer.Option(
        metavar="FILE.npz",
        exists=True,
        dir_okay=False,
        help="Gradients to ask with, saved by query.gradients.save(...): data_id [Q] and gradients [Q, D].",
    ),
]

SHOWN = 10
"""Samples on each side of a query, unless told otherwise."""

OUTPUTS = (".json", ".npz", ".html")
"""Kinds of files that an answer is saved as."""


def _known_suffix(path: Path | None) -> Path | None:
    if path is not None and path.suffix not in OUTPUTS:
        raise typer.BadParameter(f"{path.name!r} ends in none of {', '.join(OUTPUTS)}")
    return writable(path)


@app.command(
    help=QUERY_HELP,
    epilog=example("query logix/mnist --queries queries.npz -k 5 --output answer.html"),
)
def query(
    store: StorePath,
    queries: GradientsFile,
    k: Annotated[
        int | None,
        typer.Option("-k", min=1, help="Samples on each side of a query.", show_default=f"{SHOWN}, or all of fewer"),
    ] = None,
    preconditioner: Preconditioner = None,
    damping: DampingOption = None,
    mode: Mode = None,
    reduce: Reduce = None,
    engine: Engine = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=_known_suffix, help=f"Save the answer: {', '.join(OUTPUTS)}."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Name the samples that helped and those that harmed, for each of some queries."""
    options = given(damping, preconditioner=preconditioner, mode=mode, reduce=reduce, engine=engine)
    result = _answer(store, queries, k, options)
    answer(influence_table(result, result.held), _plain(result), as_json=json)
    if output is not None:
        saved = result.report(output, k=result.held) if output.suffix == ".html" else result.save(output)
        typer.echo(f"saved to {saved}", err=True)


def _answer(path: str, queries: Path, k: int | None, options: Mapping[str, Any]) -> InfluenceResult:
    """The first of both sides; the engine shows its progress on stderr."""
    run = load(path)
    store = run.store
    gradients = QueryGradients.load(queries, store.modules)
    if k is None:
        k = max(1, min(SHOWN, len(set(store.data_id[store.valid].tolist()))))
    return run.compute_influence_all(gradients, k=k, **options)


def _plain(result: InfluenceResult) -> dict[str, Any]:
    """The answer as plain data, query by query."""
    top, bottom = result.proponents(), result.opponents()
    return {
        "note": result.note,
        "samples": result.samples,
        "queries": [
            {"query_id": name, "proponents": _line(top, number), "opponents": _line(bottom, number)}
            for number, name in enumerate(result.query_id)
        ],
    }


def _line(ranking: Ranking, query: int) -> list[dict[str, Any]]:
    steps = [{}] * ranking.k if ranking.step is None else [{"step": int(step)} for step in ranking.step[query]]
    pairs = zip(ranking.ids[query].tolist(), ranking.scores[query].tolist(), steps, strict=True)
    return [{"data_id": data_id, "score": score, **step} for data_id, score, step in pairs]
