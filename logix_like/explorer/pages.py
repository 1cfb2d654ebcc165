"""What the explorer's pages show, as plain data for their templates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

import numpy as np

from logix_like.damping import Damping
from logix_like.errors import LogixError, QueryError
from logix_like.explorer.catalogue import SELF_INFLUENCE, SORTS, Catalogue, Wish
from logix_like.explorer.state import Explorer, Job, Options
from logix_like.layout import DataId
from logix_like.planning import size
from logix_like.preconditioner import PRECONDITIONERS
from logix_like.query.modes import MODES
from logix_like.report import figures, plots
from logix_like.report.content import Contents, short_name, shown
from logix_like.report.page import Album, Sources, query_blocks
from logix_like.report.summary import StoreSummary
from logix_like.store import VerifyReport

PAGE = 25
"""Samples on a page of the list."""
LARGEST = 2**53
"""No step or page lies beyond this."""
LINE_LIMIT = 100_000
"""Characters of a typed query that are taken."""


def key_of(data_id: DataId) -> str:
    """An id as text that tells a number from a text."""
    return f"i{data_id}" if isinstance(data_id, int) else f"s{data_id}"


def id_of(key: str) -> DataId:
    """The id that :func:`key_of` made a key of; :class:`QueryError` if it is none."""
    try:
        if key[:1] in ("i", "s"):
            return int(key[1:]) if key[0] == "i" else key[1:]
    except ValueError:
        pass
    raise QueryError(f"{key[:80]!r} is no key of a sample; choose one from the list of samples")


def wish_of(asked: Mapping[str, str]) -> Wish:
    """What somebody wants to see, from the fields of a form."""
    sort = asked.get("sort", "")
    return Wish(
        text=asked.get("find", "").strip(),
        where={name.removeprefix("is:"): value for name, value in asked.items() if name.startswith("is:") and value},
        first_step=_whole(asked.get("from", "")),
        last_step=_whole(asked.get("to", "")),
        sort=sort if sort in SORTS else "",
        ascending=asked.get("up") == "1",
    )


def options_of(asked: Mapping[str, str], defaults: Options) -> Options:
    """How to ask, from the fields of a form; :class:`QueryError` for what is no number."""
    given = asked.get("damping", "").strip()
    try:
        k = int(asked.get("k") or defaults.k)
    except ValueError as error:
        raise QueryError(f"the number of samples is {asked['k'][:20]!r}; it must be a whole number") from error
    return Options(
        k=max(1, min(100, k)),
        mode=asked.get("mode") or defaults.mode,
        preconditioner=asked.get("preconditioner") or defaults.preconditioner,
        damping=Damping.parse(given).setting if given else defaults.damping,
    )


def _whole(text: str) -> int | None:
    """A whole number that a column can hold; None for anything else."""
    try:
        return max(-LARGEST, min(LARGEST, int(text)))
    except ValueError:
        return None


def samples_page(explorer: Explorer, asked: Mapping[str, str]) -> dict[str, Any]:
    """The list of samples."""
    catalogue, wish = explorer.catalogue(), wish_of(asked)
    scored = catalogue.self_influence is not None
    if not wish.sort:
        wish = Wish(**{**wish.__dict__, "sort": SELF_INFLUENCE if scored else "gradient norm"})
    chosen = catalogue.chosen(wish)
    number = max(0, min(_whole(asked.get("page", "")) or 0, (len(chosen) - 1) // PAGE))
    album = Album()
    lines = [_line(explorer, catalogue, int(place), album) for place in chosen[number * PAGE : (number + 1) * PAGE]]
    scoring = explorer.scoring
    return {
        "lines": lines,
        "pictures": album.pictures,
        "wish": wish,
        "sorts": SORTS,
        "choices": catalogue.choices if catalogue.complete else {},
        "steps": catalogue.has_steps,
        "complete": catalogue.complete,
        "scored": scored,
        "scoring": scoring is not None and scoring.running,
        "scoring_error": "" if scoring is None else scoring.error,
        "found": f"{len(chosen):,}",
        "total": f"{len(catalogue):,}" if catalogue.complete else f"the first {len(catalogue):,}",
        "first": f"{number * PAGE + 1:,}" if len(chosen) else "0",
        "last": f"{min(len(chosen), (number + 1) * PAGE):,}",
        "before": _address("/", asked, page=number - 1) if number else "",
        "after": _address("/", asked, page=number + 1) if (number + 1) * PAGE < len(chosen) else "",
    }


def _address(path: str, asked: Mapping[str, str], **changes: object) -> str:
    return path + "?" + urlencode({**{name: value for name, value in asked.items() if value}, **changes})


def _line(explorer: Explorer, catalogue: Catalogue, place: int, album: Album) -> dict[str, Any]:
    data_id = catalogue.ids[place]
    content = explorer.contents.of(data_id)
    facts = {name: shown(value) for name, value in catalogue.facts(place).items()}
    score = None if catalogue.self_influence is None else float(catalogue.self_influence[place])
    return {
        "name": short_name(data_id),
        "address": ask_address(data_id),
        "content": album.shown(content, f"sample {short_name(data_id)}"),
        "missing": explorer.contents.given,
        "facts": facts | ({} if content is None else dict(content.facts)),
        "score": "" if score is None or np.isnan(score) else f"{score:.4g}",
    }


def ask_address(data_id: DataId) -> str:
    """Where a sample is asked about."""
    return "/ask?" + urlencode({"sample": key_of(data_id)}, errors="surrogatepass")


def ask_page(explorer: Explorer, asked: Mapping[str, str]) -> dict[str, Any]:
    """A question and its answer."""
    wish, catalogue = wish_of(asked), explorer.catalogue()
    try:
        options, wrong = options_of(asked, explorer.defaults), ""
    except QueryError as error:
        options, wrong = explorer.defaults, str(error)
    text, key = asked.get("text", "")[:LINE_LIMIT], asked.get("sample", "")
    page: dict[str, Any] = {
        "options": options,
        "damping": asked.get("damping") or Damping.of(options.damping).typed,
        "wish": wish,
        "modes": tuple(MODES),
        "preconditioners": tuple(PRECONDITIONERS),
        "choices": catalogue.choices if catalogue.complete else {},
        "steps": catalogue.has_steps,
        "ask_address": ask_address,
        "typing": explorer.loss_of_text is not None,
        "text": text,
        "sample": key,
        "query": None,
        "pictures": [],
        "error": wrong,
        "note": "",
    }
    if wrong:
        return page
    try:
        if text.strip():
            result = explorer.ask_text(text, options, wish)
        elif key:
            result = explorer.ask_sample(id_of(key), options, wish)
        else:
            return page
    except LogixError as error:
        return page | {"error": str(error)}
    album = Album()
    asking = Contents({result.query_id[0]: text}) if text.strip() else explorer.contents
    sources = Sources(explorer.contents, asking, catalogue)
    (block,) = query_blocks(result, options.k, sources, album)
    return page | {"query": block, "pictures": album.pictures, "note": result.note}


def health_page(explorer: Explorer) -> dict[str, Any]:
    """How the run is doing."""
    store = explorer.store
    summary = StoreSummary.of(store)
    timing = store.timing
    tiles = {
        "rows": f"{summary.rows:,}",
        "samples": f"{summary.samples:,}",
        "rows a second": f"{summary.rows / timing.seconds:,.0f}" if timing.seconds else "unknown",
        "training prolonged by": "unknown" if timing.overhead is None else f"{timing.overhead:.1%}",
        "on disk": size(sum(summary.bytes.values())),
        "rows in the statistics": f"{summary.statistics_rows / summary.rows:.0%}" if summary.rows else "none",
        "left out of scores": f"{summary.nonfinite + summary.superseded:,} rows",
    }
    return {
        "summary": summary,
        "created": summary.created.replace("T", " ")[:19] + " UTC",
        "tiles": tiles,
        "damages": list(store.damages),
        "verification": _verification(explorer.verification),
        "norms": _norms(explorer),
        "follow": follow(explorer),
    }


def follow(explorer: Explorer) -> dict[str, Any]:
    """What a page that follows a run is told."""
    rate = explorer.recent_rate
    job = explorer.verification
    return {
        "rows": len(explorer.store),
        "rate": None if rate is None else round(rate, 1),
        "writing": any(writer.state == "open" for writer in explorer.store.writers),
        "listed": explorer.catalogue(patience=0).complete,
        "scored": explorer.scoring is None or not explorer.scoring.running,
        "checking": None if job is None or not job.running else [job.done, job.total],
    }


def _verification(job: Job | None) -> dict[str, Any] | None:
    if job is None:
        return None
    report = job.result if isinstance(job.result, VerifyReport) else None
    found = [] if report is None else [f"{damage.file}: {damage.finding}" for damage in report.damages]
    return {
        "running": job.running,
        "progress": f"{job.done:,} of {job.total:,} parts read" if job.total else "beginning",
        "error": job.error,
        "damages": found,
        "files": "" if report is None else f"{report.files:,}",
    }


def _norms(explorer: Explorer) -> str:
    store = explorer.store
    if not len(store) or not (store.step >= 0).any() or not (store.norm > 0).any():
        return ""
    return figures.figure(
        lambda ax: plots.norms_by_step(store.step, store.norm, ax),
        4.8,
        2.1,
        "gradient norms over the steps",
    )
