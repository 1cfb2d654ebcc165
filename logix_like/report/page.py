"""One self-contained HTML page for an influence result."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from logix_like.errors import MissingDependencyError, QueryError
from logix_like.query.files import replace_file
from logix_like.query.result import InfluenceResult, Ranking
from logix_like.query.table import SIGN_CONVENTION

CAPTIONS = {
    "proponents": "Proponents (highest scores: training on these helped most)",
    "opponents": "Opponents (lowest scores: training on these hurt most)",
}


def write_report(result: InfluenceResult, path: Path, *, k: int = 10) -> Path:
    """Write a page with up to ``k`` proponents and opponents of each query; returns its path.

    The page loads nothing from elsewhere. Ids are escaped, so that one which looks like markup is shown as
    text. A file that is there is replaced at once or not at all.

    Raises:
        MissingDependencyError: jinja2 is not installed.
        QueryError: ``k`` is less than 1.
    """
    if k < 1:
        raise QueryError(f"k is {k}; a report shows at least 1 sample on each side of a query")
    page: str = _template().render(
        title=f"Influence of {result.samples:,} samples on {len(result.query_id):,} queries",
        result=result,
        sign=SIGN_CONVENTION,
        queries=_queries(result, k),
    )
    return replace_file(path, lambda file: file.write(page.encode("utf-8", "backslashreplace")))


def _queries(result: InfluenceResult, k: int) -> list[dict[str, Any]]:
    shown = min(k, result.held)
    rankings = {"proponents": result.proponents(shown), "opponents": result.opponents(shown)}
    return [
        {"id": query, "sides": [_side(CAPTIONS[name], ranking, q) for name, ranking in rankings.items()]}
        for q, query in enumerate(result.query_id)
    ]


def _side(caption: str, ranking: Ranking, query: int) -> dict[str, Any]:
    steps = ranking.step
    lines = [
        {"id": ranking.ids[query, place], "score": ranking.scores[query, place].item()}
        | ({} if steps is None else {"step": int(steps[query, place])})
        for place in range(ranking.k)
    ]
    return {"caption": caption, "lines": lines, "steps": steps is not None}


def _template() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError(
            "a report needs jinja2, which is not installed: pip install 'logix_like[report]'"
        ) from error
    source = files("logix_like.report").joinpath("influence.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(source)
