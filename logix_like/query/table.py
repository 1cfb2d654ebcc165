"""Results as plain text for the terminal."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from logix_like.layout import DataId

if TYPE_CHECKING:
    from torch import Tensor

    from logix_like.query.result import InfluenceResult, Ranking, SelfInfluence

SIGN_CONVENTION = (
    "A positive score means that training on the sample lowered the query's loss (a proponent, helpful); "
    "negative, that it raised it (an opponent, harmful)."
)
"""What a score's sign means, in the words used everywhere."""

SELF_CONVENTION = (
    "Self-influence is how much training on a sample lowered that very sample's loss; it is large for "
    "mislabelled, rare and memorised samples."
)

SHOWN_QUERIES = 10
SHOWN_SAMPLES = 5
ID_WIDTH = 30


def influence_table(result: InfluenceResult, k: int = SHOWN_SAMPLES) -> str:
    """The ``k`` first proponents and opponents of each of the first queries, side by side."""
    k = min(k, result.held)
    top, bottom = result.proponents(k), result.opponents(k)
    samples = counted(result.samples, "sample", "samples")
    lines = [f"Influence of {samples} on {counted(len(result.query_id), 'query', 'queries')}"]
    lines += [result.note, SIGN_CONVENTION]
    for q, query in enumerate(result.query_id[:SHOWN_QUERIES]):
        lines += ["", f"query {shown_id(query, 60)}", *_side_by_side(top, bottom, q)]
    left = len(result.query_id) - SHOWN_QUERIES
    if left > 0:
        lines += ["", f"... and {counted(left, 'query', 'queries')} more"]
    return "\n".join(lines)


def self_influence_table(result: SelfInfluence, k: int = 2 * SHOWN_SAMPLES) -> str:
    """The ``k`` highest self-influences."""
    ranking = result.highest(min(k, len(result.data_id)))
    lines = [f"Self-influence of {counted(len(result.data_id), 'sample', 'samples')}"]
    lines += [result.note, SELF_CONVENTION, ""]
    lines += [f"  {'sample':<{ID_WIDTH}} {'score':>11}", *_column(ranking, 0)]
    return "\n".join(lines)


def side_names(highest: Tensor, lowest: Tensor) -> tuple[str, str]:
    """What the samples with these scores are together: of few samples the lowest scores may be positive, too."""
    return (
        "highest scores" if bool((highest < 0).any()) else "proponents",
        "lowest scores" if bool((lowest > 0).any()) else "opponents",
    )


def _side_by_side(top: Ranking, bottom: Ranking, query: int) -> list[str]:
    head = f"  {{:<{ID_WIDTH}}} {{:>11}}"
    names = side_names(top.scores[query], bottom.scores[query])
    heads = "  ".join(head.format(name, "score") for name in names)
    pairs = zip(_column(top, query), _column(bottom, query), strict=True)
    return [heads, *(f"{left}  {right}" for left, right in pairs)]


def _column(ranking: Ranking, query: int) -> list[str]:
    lines = []
    for place in range(ranking.k):
        name = shown_id(ranking.ids[query, place], ID_WIDTH)
        if ranking.step is not None:
            step = f" @{ranking.step[query, place]}"
            name = shown_id(ranking.ids[query, place], ID_WIDTH - len(step)) + step
        lines.append(f"  {_pad(name, ID_WIDTH)} {ranking.scores[query, place].item():>+11.4g}")
    return lines


def shown_id(data_id: DataId, width: int) -> str:
    """``data_id`` as printable text of at most ``width`` columns; control characters are escaped."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(data_id))
    if _width(text) <= width:
        return text
    kept = ""
    for character in text:
        if _width(kept + character) > width - 1:
            break
        kept += character
    return kept + "…"


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def _width(text: str) -> int:
    """Columns of a terminal that ``text`` takes: wide letters take two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(bool(unicodedata.combining(c)) for c in text)


def counted(number: int, one: str, many: str) -> str:
    """``number`` with the word for as many."""
    return f"{number:,} {one if number == 1 else many}"
