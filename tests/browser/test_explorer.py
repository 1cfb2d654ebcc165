"""The explorer as a browser shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import logix_like as logix
from tests.browser.conftest import Browser, served
from tests.explorer.stores import HOSTILE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_samples_are_shown_searched_filtered_and_sorted(browser: Browser, text_explorer: str) -> None:
    browser.open(text_explorer)
    assert "token" not in browser.driver.current_url
    assert len(browser.texts(".list li")) == 25
    scores = [float(score) for score in browser.texts(".list .score span")]
    assert scores == sorted(scores, reverse=True)
    browser.keep("explorer-texts")
    browser.choose('[name="is:class"]', "kitchen")
    browser.until("return location.search.includes('kitchen') && document.readyState === 'complete'")
    assert all("class kitchen" in text for text in browser.texts(".list .who"))
    browser.driver.find_element("name", "find").send_keys("text-1\n")
    browser.until("return location.search.includes('find') && document.readyState === 'complete'")
    assert all(name.startswith("text-1") for name in browser.texts(".list .id"))
    browser.require_calm()


def test_hostile_texts_do_nothing(browser: Browser, text_explorer: str) -> None:
    browser.open(text_explorer)
    address = browser("return location.origin")
    for name in HOSTILE:
        browser.open(f"{address}/?find={name}")
        assert browser("return document.title") == "Samples · texts"
        assert len(browser.texts(".list li")) == 1
        browser.require_calm()
    browser.open(f'{address}/?find=<script>document.title=1</script>&sort=<b>&is:class="onerror="x')
    assert browser("return document.title") == "Samples · texts"
    browser.require_calm()


def test_a_sample_is_picked_and_its_answer_updates(browser: Browser, text_explorer: str) -> None:
    browser.open(text_explorer)
    name = browser.texts(".list .id")[0]
    browser.driver.find_element("css selector", ".list .id").click()
    browser.until("return document.querySelector('.query')")
    assert browser.texts("h1") == [f"What influenced the sample {name}"]
    assert len(browser.texts(".sample")) == 20
    before = browser.texts(".score")
    browser.choose("[name=mode]", "cosine")
    browser.until("return location.search.includes('cosine') && document.querySelector('.query')")
    assert browser.texts(".score") != before
    browser.keep("explorer-answer")
    browser.driver.find_element("css selector", ".sample a.id").click()
    browser.until("return document.querySelector('.query')")
    browser.require_calm()


def test_a_query_is_typed(browser: Browser, text_explorer: str) -> None:
    browser.open(text_explorer)
    browser.driver.find_element("link text", "Ask").click()
    browser.until("return document.getElementById('text')")
    browser.driver.find_element("id", "text").send_keys("the cat <b>and</b> a dog")
    browser.driver.find_element("css selector", "button.main").click()
    browser.until("return document.querySelector('.query')")
    assert "the cat <b>and</b> a dog" in browser.texts("h1")[0]
    browser.require_calm()


def test_health_is_told_and_checked(browser: Browser, text_explorer: str) -> None:
    browser.open(text_explorer)
    browser.driver.find_element("link text", "Health").click()
    browser.until("return document.querySelector('[action=\"/verify\"] button')")
    browser.driver.find_element("css selector", '[action="/verify"] button').click()
    browser.until("return document.body.innerText.includes('none is damaged')")
    browser.keep("explorer-health")
    browser.require_calm()


@pytest.mark.parametrize("address", ["/", "/ask?sample=stext-3", "/health"])
@pytest.mark.parametrize(("dark", "width"), [(False, 1280), (True, 390)])
def test_every_page_is_accessible(
    browser: Browser, text_explorer: str, accessible: Callable[[], None], address: str, dark: bool, width: int
) -> None:
    browser.open(text_explorer)
    browser.open(browser("return location.origin") + address, dark=dark, width=width)
    name = address.strip("/").partition("?")[0] or "samples"
    browser.keep(f"explorer-{name}-{'dark' if dark else 'light'}-{width}")
    accessible()
    browser.require_calm()


def test_pictures_are_shown(browser: Browser, picture_explorer: str, accessible: Callable[[], None]) -> None:
    browser.open(picture_explorer)
    browser.until("return document.querySelectorAll('.list .picture').length === 25")
    browser.keep("explorer-pictures")
    accessible()
    browser.open(browser("return location.origin") + "/ask?sample=i7")
    assert len(browser.texts(".picture")) == 1 + 20
    browser.keep("explorer-answer-pictures")
    browser.require_calm()


def test_a_run_is_followed(browser: Browser, tmp_path: Path) -> None:
    from logix_like.explorer.state import Explorer

    model = nn.Linear(4, 2)
    run = logix.init("live", model, root=tmp_path, verbose=False)

    def log(first: int) -> None:
        with run(data_id=range(first, first + 5)):
            model(torch.randn(5, 4)).square().sum().backward()
        run.commit()

    log(0)
    explorer = Explorer(run.path)
    with served(explorer) as address:
        browser.open(address)
        browser.until("return document.querySelectorAll('.list li').length === 5")
        browser.driver.find_element("id", "follow").click()
        log(5)
        browser.until("return document.querySelectorAll('.list li').length === 10")
        browser("localStorage.clear()")
        browser.require_calm()
        browser.open("about:blank")
    explorer.close()
    run.finalize()


def test_another_name_is_refused(browser: Browser, text_explorer: str) -> None:
    """A name that another site has pointed at this machine, as in DNS rebinding."""
    import http.client
    from urllib.parse import urlsplit

    port = urlsplit(text_explorer).port
    connection = http.client.HTTPConnection("127.0.0.1", port or 0, timeout=20)
    connection.request("GET", "/?token=a-token", headers={"Host": f"evil.example:{port}"})
    assert connection.getresponse().status == 400
    connection.close()


def test_the_address_may_be_opened_from_another_site(browser: Browser, text_explorer: str, tmp_path: Path) -> None:
    link = tmp_path / "chat.html"
    link.write_text(f'<a href="{text_explorer}">open</a>', encoding="utf-8")
    browser.open(link.as_uri())
    browser("document.querySelector('a').click()")
    browser.until("return document.title.startsWith('Samples')")


def test_a_long_text_is_taken(browser: Browser, text_explorer: str) -> None:
    browser.open(text_explorer)
    address = text_explorer.split("?")[0] + "ask"
    browser.open(address)
    browser("document.getElementById('text').value = 'cat dog '.repeat(12000); document.forms[0].requestSubmit()")
    browser.until("return document.querySelector('.query') !== null")
