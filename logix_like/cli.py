"""The command ``logix-like``: a demo, a look into a store, and questions to one."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from logix_like import __version__, load, open_store
from logix_like.errors import LogixError
from logix_like.preconditioner import PRECONDITIONERS
from logix_like.query.engine import ENGINES, REDUCTIONS
from logix_like.query.gradients import QueryGradients
from logix_like.query.modes import MODES
from logix_like.query.result import InfluenceResult, Ranking
from logix_like.query.table import influence_table

QUERY_HELP = """Name the samples that helped and those that harmed, for each of some queries.

The queries' gradients come from a Python process that has the model:

\b
    with run.query(data_id=ids) as query:
        loss_fn(model(x), y).backward()
    query.gradients.save("queries.npz")
"""

SHOWN = 10
"""Samples on each side of a query, unless told otherwise."""

OUTPUTS = (".json", ".npz", ".html")
"""Kinds of files that an answer is saved as."""


class OneLineErrors(TyperGroup):
    """Ends with one line on stderr and exit code 1 where the library or the disk refuses."""

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of our output has gone: an ordinary end, handled above us
        except (LogixError, OSError) as error:
            typer.echo("error: " + " ".join(str(error).splitlines()), err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"logix_like {__version__}")
        raise typer.Exit


@app.callback(epilog="Example: logix-like demo")
def every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Which training samples made the model do what it did."""


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


StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of a store: <root>/<project>.")]


@app.command(epilog="Example: logix-like info logix/mnist")
def info(
    store: StorePath,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what a store holds: modules, rows, statistics, writers, checkpoints, bytes."""
    from logix_like.report.summary import StoreSummary

    summary = StoreSummary.of(open_store(store))
    typer.echo(_as_json(summary.to_json()) if as_json else str(summary))


def _one_of(known: Collection[str]) -> Callable[[str | None], str | None]:
    """A check for an option's value."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in known:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}")
        return value

    return check


def _known_suffix(path: Path | None) -> Path | None:
    if path is not None and path.suffix not in OUTPUTS:
        raise typer.BadParameter(f"{path.name!r} ends in none of {', '.join(OUTPUTS)}")
    return path


def _choice(what: str, known: Collection[str]) -> Any:
    return typer.Option(help=f"{what}: {', '.join(known)}.", callback=_one_of(known), show_default="the store's config")


@app.command(
    help=QUERY_HELP,
    epilog="Example: logix-like query logix/mnist --queries queries.npz -k 5 --output answer.html",
)
def query(
    store: StorePath,
    queries: Annotated[
        Path,
        typer.Option(
            metavar="FILE.npz",
            exists=True,
            dir_okay=False,
            help="Gradients to ask with, saved by query.gradients.save(...): data_id [Q] and gradients [Q, D].",
        ),
    ],
    k: Annotated[
        int | None,
        typer.Option("-k", min=1, help="Samples on each side of a query.", show_default=f"{SHOWN}, or all of fewer"),
    ] = None,
    preconditioner: Annotated[str | None, _choice("Curvature to score in", PRECONDITIONERS)] = None,
    damping: Annotated[
        float | None,
        typer.Option(min=0, help="Damping, x the blocks' mean eigenvalue.", show_default="the store's config"),
    ] = None,
    mode: Annotated[str | None, _choice("How two gradients are compared", MODES)] = None,
    reduce: Annotated[str | None, _choice("How a sample's visits are combined", REDUCTIONS)] = None,
    engine: Annotated[str | None, _choice("What searches the rows", ENGINES)] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=_known_suffix, help=f"Save the answer: {', '.join(OUTPUTS)}."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Name the samples that helped and those that harmed, for each of some queries."""
    options = {
        "preconditioner": preconditioner,
        "damping": damping,
        "mode": mode,
        "reduce": reduce,
        "engine": engine,
    }
    result = _answer(store, queries, k, {name: value for name, value in options.items() if value is not None})
    typer.echo(_as_json(_plain(result)) if as_json else influence_table(result, result.held))
    if output is not None:
        saved = result.report(output, k=result.held) if output.suffix == ".html" else result.save(output)
        typer.echo(f"saved to {saved}", err=True)


def _answer(path: Path, queries: Path, k: int | None, options: Mapping[str, Any]) -> InfluenceResult:
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


def _as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1)
