"""Results as a small piece of HTML, for notebooks."""

from __future__ import annotations

import html

from logix_like.errors import MissingDependencyError
from logix_like.query.result import InfluenceResult
from logix_like.query.table import SIGN_CONVENTION, side_names
from logix_like.report.content import short_name
from logix_like.report.templates import render

QUERIES = 5
SAMPLES = 8


def influence_html(result: InfluenceResult) -> str:
    """The first proponents and opponents of the first queries; plain text where jinja2 is not installed."""
    k = min(SAMPLES, result.held)
    sides = result.proponents(k), result.opponents(k)
    queries = [
        {
            "name": short_name(query),
            "heads": side_names(*(ranking.scores[q] for ranking in sides)),
            "lines": [
                [(short_name(ranking.ids[q, place]), float(ranking.scores[q, place])) for ranking in sides]
                for place in range(k)
            ],
        }
        for q, query in enumerate(result.query_id[:QUERIES])
    ]
    left = len(result.query_id) - len(queries)
    try:
        return render("notebook.html.j2", note=result.note, sign=SIGN_CONVENTION, queries=queries, left=left)
    except MissingDependencyError:
        return f"<pre>{html.escape(str(result))}</pre>"
