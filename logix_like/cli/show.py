"""Commands that show results in a browser: ``report`` and ``serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from logix_like import load
from logix_like.cli.app import app, example
from logix_like.cli.ask import GradientsFile
from logix_like.cli.loading import call_function, load_object
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
    saved,
    writable,
)
from logix_like.query.gradients import QueryGradients
from logix_like.query.modes import MODES
from logix_like.query.parts import parts_of
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


@app.command(epilog=example("report logix/mnist --queries queries.npz --data mydata:text_of --output answer.html"))
def report(
    store: StorePath,
    queries: GradientsFile,
    output: Annotated[Path, typer.Option(metavar="FILE.html", callback=writable, help="The page's file.")] = Path(
        "report.html"
    ),
    k: Annotated[int, typer.Option("-k", min=1, help="Samples on each side of a query.")] = 10,
    data: DataOption = None,
    query_data: Annotated[
        str | None, typer.Option(metavar="MODULE:NAME", help="The same for the ids of the queries.")
    ] = None,
    preconditioner: Preconditioner = None,
    damping: DampingOption = None,
    mode: Mode = None,
    reduce: Reduce = None,
    engine: Engine = None,
    json: AsJson = False,
) -> None:
    """Write an answer as one self-contained HTML page: samples beside scores, distributions, what was computed."""
    contents, asked = load_object(data), load_object(query_data)
    options = given(damping, preconditioner=preconditioner, mode=mode, reduce=reduce, engine=engine)
    result = _answer(store, queries, k, options)
    file = result.report(output, k=k, data=contents, queries=asked, store=store)
    counts = {"bytes": file.stat().st_size, "queries": len(result.query_id), "samples": result.samples}
    saved(file, counts, as_json=json)


def _answer(path: str, queries: Path, k: int, options: dict[str, Any]) -> InfluenceResult:
    """All scores where memory allows, else the extremes alone."""
    run = load(path)
    store, asked = run.store, run.config.query
    gradients = QueryGradients.load(queries, store.modules)
    pairs, layers = len(gradients) * len(store), len(parts_of(store.modules, "layer").names)
    exact = options.get("engine", asked.engine) == "exact"
    if pairs > PAIRS_HELD or not exact:
        options["k"] = k
    if exact and pairs * layers <= PAIRS_HELD and MODES[options.get("mode", asked.mode)].proportional:
        options["per"] = "layer"
    return run.compute_influence_all(gradients, **options)


@app.command(epilog=example("serve logix/mnist --data mydata:text_of --model mymodel:trained"))
def serve(
    store: StorePath,
    data: DataOption = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="A function in one of your modules that returns (model, loss_fn); loss_fn(model, text) is the loss of "
            "a typed query.",
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; any but this machine's own shows the store to "
            "everybody there who has the token."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8799,
    json: AsJson = False,
) -> None:
    """Look into a store in a browser: its samples, what influenced what, how the run is doing. Ends with Ctrl-C."""
    from logix_like.explorer.server import serve as run_server
    from logix_like.explorer.state import Explorer

    def told(address: str) -> None:
        if json:
            answer("", {"address": address}, as_json=True)
        else:
            typer.echo(f"open {address}", err=True)

    explorer = Explorer(store, load_object(data), _model(model))
    try:
        run_server(explorer, host, port, told)
    finally:
        explorer.close()


def _model(name: str | None) -> Any:
    """The model and the loss of a text that the user's function returns."""
    if name is None:
        return None
    made = call_function(name)
    if not isinstance(made, tuple) or len(made) != 2 or not callable(made[1]):
        raise typer.BadParameter(f"{name} returned a {type(made).__name__}; it must return (model, loss_fn)")
    return made
