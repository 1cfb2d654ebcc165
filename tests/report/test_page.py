"""The HTML page of a result."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from logix_like.errors import QueryError
from logix_like.query.result import InfluenceResult
from logix_like.query.table import SIGN_CONVENTION

EVIL = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Collects tags and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _result(*, steps: bool = False) -> InfluenceResult:
    ids = np.empty(4, dtype=object)
    ids[:] = ["a", EVIL, 3, "\ud800"]
    return InfluenceResult(
        query_id=(EVIL, "q1"),
        samples=4,
        mode="dot",
        preconditioner="auto",
        damping=0.1,
        reduce="none" if steps else "mean",
        engine="exact",
        note="4 samples; dot score",
        data_id=ids,
        scores=torch.tensor([[1.0, 2.0, -3.0, 0.0], [1.5, -2.0, 3.0, 0.5]]),
        step=np.array([10, 20, 30, 40]) if steps else None,
    )


def test_the_page_says_what_was_computed_and_what_the_sign_means(tmp_path: Path) -> None:
    path = _result().report(tmp_path / "answer.html", k=2)
    page = Page(path.read_text(encoding="utf-8"))
    text = " ".join(page.text)
    assert "4 samples; dot score" in text
    assert SIGN_CONVENTION in text
    assert page.tags.count("table") == 4
    assert page.tags.count("tr") == 4 * (1 + 2)
    assert "+2" in text and "-3" in text and "+3" in text
    assert [file.name for file in tmp_path.iterdir()] == ["answer.html"]


def test_ids_are_text_and_the_page_loads_nothing(tmp_path: Path) -> None:
    source = _result().report(tmp_path / "answer.html").read_text(encoding="utf-8")
    page = Page(source)
    assert "script" not in page.tags
    assert any(EVIL in text for text in page.text)
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?:", source)


def test_visits_have_their_steps(tmp_path: Path) -> None:
    text = " ".join(Page(_result(steps=True).report(tmp_path / "a.html").read_text(encoding="utf-8")).text)
    assert "step" in text and "40" in text


def test_a_result_of_extremes_shows_what_it_holds(tmp_path: Path) -> None:
    full = _result()
    fields = {name: getattr(full, name) for name in full.__dataclass_fields__}
    fields |= {"data_id": None, "scores": None, "top": full.proponents(3), "bottom": full.opponents(3)}
    page = Page(InfluenceResult(**fields).report(tmp_path / "a.html", k=10).read_text(encoding="utf-8"))
    assert page.tags.count("tr") == 4 * (1 + 3)


def test_no_line_makes_no_sense(tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="k is 0"):
        _result().report(tmp_path / "a.html", k=0)
