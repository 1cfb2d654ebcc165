"""The HTML page of a result."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import logix_like as logix
from logix_like.errors import QueryError
from logix_like.query.result import InfluenceResult
from logix_like.report.templates import script_hash

EVIL = "<script>alert('x')</script>"
EVIL_ATTRIBUTE = '"onerror="alert(1)'


class Page(HTMLParser):
    """Collects tags, their attributes and text; what a script or a style holds is no text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self._script = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._script = False

    def handle_data(self, data: str) -> None:
        (self.scripts if self._script else self.text).append(data)

    def of_class(self, name: str) -> int:
        return sum(name in (value or "").split() for key, value in self.attributes if key == "class")


def page_of(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def result(*, steps: bool = False, source: str = "") -> InfluenceResult:
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
        source=source,
    )


def extremes(full: InfluenceResult, k: int) -> InfluenceResult:
    fields = {name: getattr(full, name) for name in full.__dataclass_fields__}
    fields |= {"data_id": None, "scores": None, "top": full.proponents(k), "bottom": full.opponents(k)}
    return InfluenceResult(**fields)


def test_the_page_says_what_was_computed_and_what_the_sign_means(tmp_path: Path) -> None:
    page = page_of(result().report(tmp_path / "answer.html", k=2))
    text = " ".join(" ".join(page.text).split())
    assert "4 samples; dot score" in text
    assert "training on the sample lowered the query's loss (a proponent, helpful)" in text
    assert "it raised it (an opponent, harmful)" in text
    assert page.of_class("query") == 2
    assert page.of_class("sample") == 2 * 2 * 2
    assert "+2" in text and "-3" in text and "+3" in text
    assert [file.name for file in tmp_path.iterdir()] == ["answer.html"]


def test_a_side_that_holds_both_signs_is_named_by_its_place(tmp_path: Path) -> None:
    heads = {k: re.findall(r"<h3[^>]*>(\w[\w ]*) <small", _written(result(), tmp_path, k)) for k in (1, 4)}
    assert heads == {1: ["Proponents", "Opponents"] * 2, 4: ["Highest scores", "Lowest scores"] * 2}


def test_queries_of_which_no_id_fits_are_refused_as_data_are(tmp_path: Path) -> None:
    for unfit in (["the first", "the second"], {"q2": "another"}):
        with pytest.raises(QueryError, match=r"queries knows none of the 2 ids to show, e\.g\. .* \(a str\); it must"):
            result().report(tmp_path / "answer.html", queries=unfit)
    assert not list(tmp_path.iterdir())


def _written(answer: InfluenceResult, folder: Path, k: int) -> str:
    return answer.report(folder / f"{k}.html", k=k).read_text(encoding="utf-8")


def test_ids_are_text_and_the_page_loads_nothing(tmp_path: Path) -> None:
    data = {"a": EVIL, EVIL: {"text": EVIL_ATTRIBUTE, EVIL_ATTRIBUTE: EVIL_ATTRIBUTE}}
    source = result().report(tmp_path / "answer.html", data=data).read_text(encoding="utf-8")
    page = Page(source)
    assert page.tags.count("script") == 1
    assert any(EVIL in text for text in page.text)
    assert not re.search(r"@import|https?:|<link|<iframe|<object", source)
    assert not [
        name for name, _ in page.attributes if name.startswith("on") or (name in ("src", "href") and name != "href")
    ]
    assert [value for name, value in page.attributes if name == "href"] == ["#queries"]


def test_the_policy_allows_the_pages_own_script_alone(tmp_path: Path) -> None:
    page = page_of(result().report(tmp_path / "answer.html"))
    (policy,) = [v for v in (value or "" for _, value in page.attributes) if v.startswith("default-src")]
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{script_hash(''.join(page.scripts))}'" in policy


def test_visits_have_their_steps(tmp_path: Path) -> None:
    text = " ".join(page_of(result(steps=True).report(tmp_path / "a.html")).text)
    assert "step 40" in text and "visits" in text


def test_a_result_of_extremes_shows_what_it_holds(tmp_path: Path) -> None:
    full, short = (page_of(r.report(tmp_path / "a.html")) for r in (result(), extremes(result(), 3)))
    assert short.of_class("sample") == 2 * 2 * 3
    assert (full.of_class("strip"), short.of_class("strip")) == (2, 0)


def test_no_line_makes_no_sense(tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="k is 0"):
        result().report(tmp_path / "a.html", k=0)


def test_contents_stand_beside_their_scores(tmp_path: Path) -> None:
    data = {"a": {"text": "first words", "label": "sport", "loss": 0.25}, 3: [("good", 2.0), (" bad", -1.0)]}
    page = page_of(result().report(tmp_path / "a.html", k=4, data=data, queries={"q1": "what was asked"}))
    text = " ".join(page.text)
    assert "first words" in text and "label sport" in text and "loss 0.25" in text and "what was asked" in text
    assert (
        page.tags.count("mark") == 2 * 2 * 2 + 2
    )  # two tokens of one sample, on both sides of two queries; two that explain
    assert page.of_class("p9") == page.of_class("n4") == 4
    assert "lacks 2 samples" in text and "no data for this id" in text


def test_a_picture_stands_in_the_page_once(tmp_path: Path) -> None:
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)
    source = result().report(tmp_path / "a.html", data=lambda data_id: {"image": image}).read_text(encoding="utf-8")
    assert source.count("data:image/png;base64,") == 1
    assert Page(source).of_class("i1") == 2 * 2 * 4


def test_a_provider_without_any_of_the_ids_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QueryError, match=r"data knows none of the 4 ids to show, e\.g\. .* \(a str\); it must"):
        result().report(tmp_path / "a.html", data={"3": "x"})
    assert not (tmp_path / "a.html").exists()


def test_a_provider_that_fails_is_named(tmp_path: Path) -> None:
    def broken(data_id: object) -> str:
        raise ZeroDivisionError("no")

    with pytest.raises(QueryError, match=r"data failed for the id .*ZeroDivisionError: no"):
        result().report(tmp_path / "a.html", data=broken)


def test_shares_of_modules_are_drawn(tmp_path: Path) -> None:
    source = result().report(tmp_path / "a.html", modules={"layer.0": 0.75, "layer.1": 0.25}).read_text()
    assert "Where in the model" in source and "layer.0" in source


def test_parts_of_the_model_are_told(tmp_path: Path) -> None:
    full = result()
    assert full.scores is not None
    parts = torch.stack([0.75 * full.scores, 0.25 * full.scores], dim=2)
    split = replace(full, part_names=("layer.0", "<b>1</b>"), parts=parts)
    text = " ".join(page_of(split.report(tmp_path / "a.html")).text)
    assert "Where in the model" in text and "most from layer.0 (75%)" in text and "<b>1</b>" in text


def test_any_damping_is_told(tmp_path: Path) -> None:
    for damping, words in ((0.2, "0.2 times the mean"), ("auto", "auto"), ({"absolute": 3.0}, "3 (absolute)")):
        assert words in " ".join(page_of(replace(result(), damping=damping).report(tmp_path / "a.html")).text)


def test_the_store_adds_losses_visits_and_columns(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    run = logix.init("store", model, root=tmp_path, verbose=False)
    for _ in range(2):
        with run(data_id=["a", EVIL, 3], loss=torch.tensor([0.5, 0.25, 2.0]), metadata={"colour": ["red", EVIL, "x"]}):
            model(torch.eye(3)).square().sum().backward()
    run.finalize()
    answer = run.compute_influence_all(run.get_log())
    assert answer.source == str(run.path)
    for given in (answer, InfluenceResult.load(answer.save(tmp_path / "answer.json"))):
        text = " ".join(" ".join(page_of(given.report(tmp_path / "a.html")).text).split())
        for words in ("visits 2", "loss 0.25", "colour red", "6 rows of 3 samples", "over 6 of 6 rows"):
            assert words in text


def test_a_store_that_is_gone_is_done_without(tmp_path: Path) -> None:
    assert "logged" not in " ".join(page_of(result(source=str(tmp_path / "gone")).report(tmp_path / "a.html")).text)
    with pytest.raises(logix.LogixError, match="holds no store"):
        result().report(tmp_path / "b.html", store=tmp_path / "gone")


def test_a_notebook_shows_the_first(tmp_path: Path) -> None:
    piece = result()._repr_html_()
    assert EVIL not in piece and "&lt;script&gt;" in piece
    assert "+2" in piece and "a proponent, helpful" in piece
