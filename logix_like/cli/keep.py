"""Commands that look after a store: ``verify``, ``repair``, ``compact`` and ``export``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from logix_like.cli.app import app, example
from logix_like.cli.options import AsJson, StorePath, answer, one_of, saved
from logix_like.store import (
    REDUCTIONS,
    Damage,
    MergeReport,
    RepairReport,
    VerifyReport,
    export_rows,
    merge_parts,
)
from logix_like.store import repair as repair_store
from logix_like.store import verify as verify_store

DAMAGED = 1
"""Exit code where something damaged is left."""


@app.command(epilog=example("verify logix/mnist"))
def verify(store: StorePath, json: AsJson = False) -> None:
    """Read every byte of a store; name each damaged file, its rows and data ids. Exit code 1 if there is one."""
    with _bar("verify", "files") as progress:
        report = verify_store(store, progress)
    answer(report, _verified(report), as_json=json)
    _end(report)


@app.command(epilog=example("repair logix/mnist"))
def repair(store: StorePath, json: AsJson = False) -> None:
    """Take what is damaged out of a store into its folder quarantine/; nothing is deleted.

    A damaged chunk takes its own commit with it and no other. Exit code 1 if damage is left that nothing in the
    store can replace. What is in quarantine/ is read no more: remove the folder yourself for the room it takes, or
    where samples that were forgotten must be gone from the disk.
    """
    with _bar("repair", "files") as progress:
        report = repair_store(store, progress)
    answer(report, _repaired(report), as_json=json)
    _end(report.after)


@app.command(epilog=example("compact logix/mnist"))
def compact(store: StorePath, json: AsJson = False) -> None:
    """Merge the parts of all writers and restarts into one; rows that were taken back are removed from the disk.

    The new part is written, read back and compared bit by bit before it takes the place of the old ones, in one
    step; killed at any instant, the store holds the same rows. Two places may still hold what was taken back: the
    store's folder quarantine/, if it was repaired, and other users' caches of it (sample views and indexes, below
    $LOGIX_LIKE_CACHE or the user's cache folder).
    """
    with _bar("compact", "rows") as progress:
        report = merge_parts(store, progress)
    answer(report, _merged(report), as_json=json)


@app.command(epilog=example("export logix/mnist rows.parquet --reduce mean"))
def export(
    store: StorePath,
    target: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write: .npz or .parquet.")],
    reduce: Annotated[
        str,
        typer.Option(help=f"How a sample's visits are combined: {', '.join(REDUCTIONS)}.", callback=one_of(REDUCTIONS)),
    ] = "none",
    json: AsJson = False,
) -> None:
    """Write all valid rows, with their ids and columns, to one file; a visit each unless combined."""
    with _bar("export", "rows") as progress:
        rows = export_rows(store, target, reduce=reduce, progress=progress)
    saved(target, {"rows": rows, "bytes": target.stat().st_size}, as_json=json)


@contextmanager
def _bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, where that is a terminal."""
    with tqdm(desc=what, unit=f" {unit}", file=sys.stderr, disable=None, leave=False) as bar:

        def told(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n if done > bar.n else 0)

        yield told


def _end(report: VerifyReport) -> None:
    if not report.ok:
        raise typer.Exit(DAMAGED)


def _damage(damage: Damage) -> dict[str, Any]:
    return {
        "file": str(damage.file),
        "finding": damage.finding,
        "rows": damage.rows,
        "data_id": damage.data_id,
    }


def _verified(report: VerifyReport) -> dict[str, Any]:
    return {
        "store": str(report.path),
        "ok": report.ok,
        "rows": report.rows,
        "files": report.files,
        "damages": [_damage(damage) for damage in report.damages],
    }


def _repaired(report: RepairReport) -> dict[str, Any]:
    return {
        "store": str(report.path),
        "found": [_damage(damage) for damage in report.found],
        "done": report.done,
        "rows": report.rows,
        "quarantine": None if report.quarantine is None else str(report.quarantine),
        "after": _verified(report.after),
    }


def _merged(report: MergeReport) -> dict[str, Any]:
    return {**asdict(report), "path": str(report.path)}
