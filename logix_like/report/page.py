"""One self-contained HTML page for an influence result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from logix_like.damping import Damping
from logix_like.errors import LogixError, QueryError
from logix_like.layout import DataId
from logix_like.query.files import replace_file
from logix_like.query.result import InfluenceResult, Provider, Ranking
from logix_like.query.table import side_names
from logix_like.report import figures, plots
from logix_like.report.columns import SampleColumns
from logix_like.report.concentration import share_of_first
from logix_like.report.content import Content, Contents, short_name, shown, visible
from logix_like.report.summary import StoreSummary
from logix_like.report.templates import render, script_hash, source
from logix_like.store import GradientStore, open_store

SIDES = {
    "proponents": ("for", "helped: training on them lowered the loss"),
    "opponents": ("against", "harmed: training on them raised it"),
    "highest scores": ("", "not all positive: training on the negative ones raised the loss"),
    "lowest scores": ("", "not all negative: training on the positive ones lowered the loss"),
}
"""By what the samples of a side are together: colour, and what it means."""


@dataclass(frozen=True)
class Shown:
    """A sample's content as a template takes it: pictures by number, so that each stands in the page once."""

    text: str
    length: int
    shortened: bool
    tokens: tuple[Any, ...]
    image: int
    """Number of the picture, 0 for none."""
    large: bool
    """Whether the picture is to be smoothed when it is enlarged."""
    alt: str


@dataclass
class Album:
    """The pictures of a page, each once, and whether it marks words."""

    numbers: dict[str, int] = field(default_factory=dict)
    tokens: bool = False
    """Whether a text on the page has scored tokens."""

    def shown(self, content: Content | None, name: str) -> Shown | None:
        """``content`` with its picture as a number."""
        if content is None:
            return None
        self.tokens |= bool(content.tokens)
        number = self.numbers.setdefault(content.image, len(self.numbers) + 1) if content.image else 0
        return Shown(
            content.text,
            content.length,
            content.shortened,
            content.tokens,
            number,
            content.image.startswith("data:image/webp"),
            f"picture of {name}",
        )

    @property
    def pictures(self) -> list[tuple[int, str]]:
        """Number and address of each."""
        return [(number, address) for address, number in self.numbers.items()]


class Columns(Protocol):
    """What a store knows of samples beside their gradients."""

    def of(self, data_id: DataId) -> Mapping[str, Any]:
        """What is known of one, by name."""
        ...


@dataclass(frozen=True)
class Sources:
    """Where a page takes from what it shows beside scores."""

    samples: Contents
    queries: Contents
    columns: Columns | None = None

    def facts(self, data_id: DataId, content: Content | None) -> dict[str, str]:
        """What is known of a sample: the store's columns, with what the user gave over them."""
        stored = {} if self.columns is None else self.columns.of(data_id)
        given = {} if content is None else content.facts
        return {name: shown(value) for name, value in stored.items()} | dict(given)


def write_report(
    result: InfluenceResult,
    path: Path,
    *,
    k: int = 10,
    data: Provider | None = None,
    queries: Provider | None = None,
    store: GradientStore | str | PathLike[str] | None = None,
    modules: Mapping[str, float] | None = None,
) -> Path:
    """Write a page with up to ``k`` proponents and opponents of each query; returns its path.

    The page loads nothing from elsewhere and runs no script but its own, which its security policy names by its
    digest. Ids and contents are escaped: one that looks like markup is shown as text. A file that is there is
    replaced at once or not at all.

    Args:
        result: What to show; with the scores of all samples (asked for without ``k=``) their distribution and
            concentration are drawn, too.
        path: The page's file.
        k: Samples on each side of a query.
        data: Mapping, list or function from a sample's id to its text, picture (PIL image, array, tensor,
            ``pathlib.Path``), list of ``(token, score)`` pairs, or a mapping with any of ``text``, ``image``,
            ``tokens`` and further facts such as ``label`` and ``loss``. It may lack some ids.
        queries: The same for the ids of the queries.
        store: The store that was asked (or its path), for visits, losses, columns and coverage; None: the one that
            the result names, if it is still there.
        modules: By module (or layer) its share of the scores, to be drawn; None: that of a result asked for with
            ``per=``.

    Raises:
        MissingDependencyError: jinja2 or matplotlib is not installed.
        QueryError: ``k`` is less than 1, or ``data`` or ``queries`` knows none of the ids.
    """
    if k < 1:
        raise QueryError(f"k is {k}; a report shows at least 1 sample on each side of a query")
    opened = _store_of(result, store)
    sources = Sources(Contents(data), Contents(queries, "queries"), None if opened is None else SampleColumns(opened))
    album = Album()
    blocks = query_blocks(result, k, sources, album)
    sources.samples.require_some()
    sources.queries.require_some()
    script = source("report.js.j2")
    page = render(
        "influence.html.j2",
        title=f"Influence of {_count(result.samples, 'sample')} on {_count(len(result.query_id), 'query')}",
        result=result,
        queries=blocks,
        warnings=_warnings(sources),
        tiles=_tiles(result),
        charts=_charts(result, _shares(result, k) if modules is None else modules),
        about=_about(result, opened),
        sortable=_sortable(blocks),
        pictures=album.pictures,
        tokens=album.tokens,
        script=script,
        script_hash=script_hash(script),
    )
    return replace_file(path, lambda file: file.write(page.encode("utf-8", "backslashreplace")))


def query_blocks(result: InfluenceResult, k: int, sources: Sources, album: Album) -> list[dict[str, Any]]:
    """What the template shows of each query."""
    k = min(k, result.held)
    rankings = result.proponents(k), result.opponents(k)
    strips = _strips(result, k) if result.scores is not None else [None] * len(result.query_id)
    blocks = []
    for q, query in enumerate(result.query_id):
        content, name = sources.queries.of(query), short_name(query)
        largest = max((float(r.scores[q].abs().max()) for r in rankings), default=0.0)
        names = side_names(*(ranking.scores[q] for ranking in rankings))
        blocks.append(
            {
                "number": q,
                "name": name,
                "facts": {} if content is None else content.facts,
                "content": album.shown(content, f"query {name}"),
                "strip": strips[q],
                "sides": [
                    _side(result, s, r, q, largest, sources, album) for s, r in zip(names, rankings, strict=True)
                ],
            }
        )
    return blocks


def _side(
    result: InfluenceResult, name: str, ranking: Ranking, query: int, largest: float, sources: Sources, album: Album
) -> dict[str, Any]:
    sign, meaning = SIDES[name]
    lines = []
    scores = ranking.scores[query].tolist()
    for place, (data_id, score) in enumerate(zip(ranking.ids[query].tolist(), scores, strict=True)):
        content = sources.samples.of(data_id)
        facts = sources.facts(data_id, content)
        if ranking.step is not None:
            facts = {"step": shown(int(ranking.step[query, place]))} | facts
        if ranking.parts is not None:
            facts |= {"most from": _strongest(result, ranking.parts[query, place])}
        lines.append(
            {
                "place": place + 1,
                "id": data_id,
                "name": short_name(data_id),
                "score": score,
                "width": round(100 * abs(score) / largest) if largest > 0 and np.isfinite(score) else 0,
                "facts": facts,
                "content": album.shown(content, f"sample {short_name(data_id)}"),
                "missing": sources.samples.given,
                "sortable": {"place": place + 1}
                | {key: facts[key].replace(",", "") for key in ("label", "loss", "visits", "step") if key in facts},
            }
        )
    return {"name": name.capitalize(), "sign": sign, "meaning": meaning, "lines": lines}


def _strongest(result: InfluenceResult, parts: Tensor) -> str:
    """The part of the model that adds most to one score, and its share of what all add."""
    strength = parts.double().abs()
    most = int(strength.argmax())
    return f"{visible(result.part_names[most])} ({float(strength[most] / strength.sum().clamp_min(1e-300)):.0%})"


def _strips(result: InfluenceResult, k: int) -> list[dict[str, Any]]:
    scores = plots.all_scores(result)
    drawn, zeros = figures.distributions(result, k), figures.zero_places(result)
    return [
        {
            "svg": svg,
            "low": f"{row.min():+.3g}",
            "high": f"{row.max():+.3g}",
            "zero": None if np.isnan(zero) else round(100 * zero, 1),
            "show_zero": 0.15 < zero < 0.85,
            "samples": f"{result.samples:,}",
            "share": f"{share_of_first(row):.0%}",
        }
        for row, svg, zero in zip(scores, drawn, zeros, strict=True)
    ]


def _tiles(result: InfluenceResult) -> dict[str, str]:
    visits = result.reduce == "none"
    tiles = {"queries": f"{len(result.query_id):,}", "visits" if visits else "samples": f"{result.samples:,}"}
    if result.scores is not None:
        scores = plots.all_scores(result)
        tiles["held by the strongest 1 %"] = f"{np.median([share_of_first(row) for row in scores]):.0%}"
        tiles["positive scores"] = f"{(scores > 0).mean():.0%}"
    return tiles | {"mode": result.mode, "damping": str(Damping.of(result.damping))}


def _charts(result: InfluenceResult, modules: Mapping[str, float] | None) -> list[dict[str, str]]:
    charts = []
    if result.scores is not None:
        charts.append(
            {
                "title": "How concentrated influence is",
                "svg": figures.figure(
                    lambda ax: plots.concentration(result, ax),
                    4.4,
                    2.1,
                    "share of influence of the strongest samples",
                ),
                "caption": "One line for each query, the median in bold. On the dotted line influence would be spread "
                "evenly over all samples.",
            }
        )
    if modules:
        charts.append(
            {
                "title": "Where in the model",
                "svg": figures.figure(
                    lambda ax: plots.module_shares(modules, ax),
                    4.4,
                    max(1.2, 0.5 + 0.18 * len(modules)),
                    "share of each module in the scores",
                ),
                "caption": "What each part of the model adds to the scores of the proponents that are shown.",
            }
        )
    return charts


def _shares(result: InfluenceResult, k: int) -> dict[str, float]:
    """What each part of the model adds to the scores of the proponents that are shown; nothing without ``per=``."""
    parts = result.proponents(min(k, result.held)).parts
    if parts is None:
        return {}
    added = parts.double().sum((0, 1))
    total = float(added.abs().sum()) or 1.0
    return dict(zip(result.part_names, (added / total).tolist(), strict=True))


def _about(result: InfluenceResult, store: GradientStore | None) -> dict[str, str]:
    about = {
        "scores": f"{result.mode}, in the curvature "
        + ("that “auto” chose, named at the top" if result.preconditioner == "auto" else f"“{result.preconditioner}”"),
        "damping": _damping(result),
        "visits of a sample": result.reduce,
        "engine": result.engine,
    }
    if store is None:
        return about
    summary = StoreSummary.of(store)
    gathered = ", ".join(summary.statistics) or "none"
    covered = f"{summary.statistics_rows:,} of {summary.rows:,} rows"
    return about | {
        "store": summary.path,
        "logged": f"{summary.rows:,} rows of {summary.samples:,} samples, {summary.numbers:,} numbers each "
        f"({summary.dtype}), from {len(summary.modules)} modules",
        "statistics": f"{gathered}, over {covered}",
        "checkpoints": str(len(summary.checkpoints)),
        "created": f"{summary.created[:19].replace('T', ' ')} UTC by logix_like {summary.library}",
    }


def _damping(result: InfluenceResult) -> str:
    damping = Damping.of(result.damping)
    return f"{damping}" + (" times the mean eigenvalue of each module's block" if damping.kind == "relative" else "")


def _warnings(sources: Sources) -> list[str]:
    missing = sources.samples.missing if sources.samples.given else []
    if not missing:
        return []
    named = ", ".join(short_name(data_id) for data_id in missing[:5]) + (" …" if len(missing) > 5 else "")
    return [f"The data given for this page lacks {_count(len(missing), 'sample')} shown below: {named}."]


def _sortable(blocks: list[dict[str, Any]]) -> list[str]:
    present = {key for block in blocks for side in block["sides"] for line in side["lines"] for key in line["sortable"]}
    return [name for name in ("label", "loss", "visits", "step") if name in present]


def _store_of(result: InfluenceResult, given: GradientStore | str | PathLike[str] | None) -> GradientStore | None:
    if isinstance(given, GradientStore):
        return given
    if given is not None:
        return open_store(given)
    if not result.source:
        return None
    try:
        return open_store(result.source)
    except (LogixError, OSError):  # moved or removed since; the page does without it
        return None


def _count(number: int, one: str) -> str:
    many = {"query": "queries"}.get(one, f"{one}s")
    return f"{number:,} {one if number == 1 else many}"
