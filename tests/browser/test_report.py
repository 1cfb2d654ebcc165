"""The report as a browser shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import logix_like as logix
from tests.browser.conftest import Browser
from tests.explorer import stores

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def text_report(texts: tuple[Path, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three queries, 67 samples, every hostile text among them; one sample has scored tokens."""
    path, model = texts
    run = logix.load(path, model)
    asked = {"a cat": "the cat and the dog", "<i>q</i>": stores.HOSTILE["script"], "rain": "rain and storm"}
    with run.query(data_id=list(asked)) as query:
        words = torch.stack([stores.words_of(text) for text in asked.values()])
        F.cross_entropy(model(words), torch.tensor([0, 0, 2])).backward()
    data: dict[Any, Any] = dict(stores.TEXTS)
    data["text-3"] = {"tokens": [("small ", 0.2), ("goat ", 1.0), ("new ", -0.1), ("cat", -0.8)], "label": "animals"}
    folder = tmp_path_factory.mktemp("report")
    shares = {"0": 0.7, "2": 0.3}
    return run.compute_influence_all(query).report(folder / "a.html", k=67, data=data, queries=asked, modules=shares)


@pytest.fixture(scope="module")
def picture_report(pictures: tuple[Path, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, model = pictures
    run = logix.load(path, model)
    x, y = stores.pictures()
    with run.query(data_id=[3, 7]) as query:
        F.cross_entropy(model(x[[3, 7]].flatten(1)), y[[3, 7]]).backward()
    result = run.compute_influence_all(query)
    folder = tmp_path_factory.mktemp("report")
    return result.report(folder / "p.html", data=stores.picture_of, queries=stores.picture_of)


def test_texts_are_shown_and_hostile_ones_do_nothing(browser: Browser, text_report: Path) -> None:
    browser.open(text_report.as_uri())
    assert browser("return document.title") == "Influence of 67 samples on 3 queries"
    assert len(browser.texts(".query")) == 3 and len(browser.texts(".sample")) == 3 * 2 * 67
    shown = "\n".join(browser("return [...document.querySelectorAll('.sample')].map(s => s.textContent)"))
    for name in ("script", "attribute", "template"):
        assert stores.HOSTILE[name] in shown
    assert "before␀after␛[31m" in shown and "\\u202egnp.exe" in shown and "(1,000,000 characters)" in shown
    assert "{{ 7 * 7 }}" in shown
    assert browser("return document.scripts.length") == 1
    assert browser("return document.querySelectorAll('main script, main b, main i, img, iframe').length") == 0
    browser.require_calm()
    browser.keep("report-texts")


def test_an_injected_script_would_not_run(browser: Browser, text_report: Path) -> None:
    """Even where escaping had failed, the page's policy lets no script run but its own."""
    browser.open(text_report.as_uri())
    browser("document.body.insertAdjacentHTML('beforeend', '<img src=\"data:,\" onerror=\"document.title=1\">')")
    browser("const s = document.createElement('script'); s.textContent = 'document.title = 2'; document.body.append(s)")
    assert browser("return document.title") == "Influence of 67 samples on 3 queries"
    assert any("Content Security Policy" in entry["message"] for entry in browser.driver.get_log("browser"))


def test_samples_are_found_and_sorted(browser: Browser, text_report: Path) -> None:
    browser.open(text_report.as_uri())
    find = browser.driver.find_element("id", "find")
    find.send_keys("TEXT-12")
    browser.until("return document.getElementById('status').textContent.startsWith('6 of')")
    assert set(browser.texts(".sample .id")) == {"text-12"}
    find.send_keys("nothing like it")
    browser.until("return document.getElementById('status').textContent.startsWith('0 of')")
    assert browser.texts(".query") == []
    find.clear()
    find.send_keys(" ")
    browser.until("return document.getElementById('status').textContent === ''")
    side = "return [...document.querySelector('.samples').children].map(s => s.dataset[arguments[0]])"
    for name, change in (("loss", float), ("place", int)):
        browser.choose("#sort", name)
        values = [change(value) for value in browser(side, name)]
        assert values == sorted(values) and len(values) == 67
    browser.require_calm()


def test_the_page_is_used_by_keyboard(browser: Browser, text_report: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(text_report.as_uri())
    body = browser.driver.find_element("tag name", "body")
    body.send_keys(Keys.TAB)
    assert browser("return document.activeElement.textContent") == "Skip to the queries"
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    browser.until("return document.activeElement.id === 'queries'")


def test_tokens_are_marked(browser: Browser, text_report: Path) -> None:
    browser.open(text_report.as_uri())
    marks = browser(
        "return [...document.querySelector('.sample mark').parentElement.children]"
        ".map(mark => [mark.textContent, mark.className])"
    )
    assert marks == [["small ", "p2"], ["goat ", "p9"], ["new ", "n1"], ["cat", "n7"]]


@pytest.mark.parametrize(("dark", "width"), [(False, 1280), (True, 1280), (False, 390), (True, 390)])
def test_the_report_is_accessible_in_every_shape(
    browser: Browser, text_report: Path, accessible: Callable[[], None], dark: bool, width: int
) -> None:
    browser.open(text_report.as_uri(), dark=dark, width=width)
    browser.keep(f"report-texts-{'dark' if dark else 'light'}-{width}")
    accessible()
    browser.require_calm()


def test_pictures_are_shown(browser: Browser, picture_report: Path, accessible: Callable[[], None]) -> None:
    browser.open(picture_report.as_uri())
    assert len(browser.texts(".picture")) == 2 * (1 + 2 * 10)
    image = browser("return getComputedStyle(document.querySelector('.picture')).backgroundImage")
    assert image.startswith('url("data:image/png;base64,')
    browser("document.querySelector('.query').scrollIntoView()")
    browser.keep("report-pictures")
    accessible()
    browser.require_calm()


def test_the_theme_can_be_chosen(browser: Browser, picture_report: Path) -> None:
    browser.open(picture_report.as_uri(), dark=False)
    colour = "return getComputedStyle(document.body).backgroundColor"
    light = browser(colour)
    browser.driver.find_element("id", "theme").click()
    assert browser(colour) != light
    browser.driver.find_element("id", "theme").click()
    assert browser(colour) == light
