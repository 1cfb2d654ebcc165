"""A headless browser, a server in a thread, axe-core: each skipped with its reason where it is not to be had."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.explorer import stores
from tests.explorer.fixtures import pictures, texts

__all__ = ["pictures", "texts"]

SCREENSHOTS = "LOGIX_LIKE_SCREENSHOTS"
"""Environment variable: a folder to keep the screenshots in (default: pytest's own temporary one)."""


class Browser:
    """What the tests do with Chromium."""

    def __init__(self, driver: Any, screenshots: Path) -> None:
        self.driver = driver
        self._screenshots = screenshots

    def open(self, address: str, *, dark: bool = False, width: int = 1280, height: int = 900) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(address)

    def __call__(self, script: str, *arguments: object) -> Any:
        """Run a script in the page."""
        return self.driver.execute_script(script, *arguments)

    def texts(self, selector: str) -> list[str]:
        """The visible elements' texts."""
        visible = "[...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility())"
        found: list[str] = self(f"return {visible}.map(e => e.innerText)", selector)
        return found

    def choose(self, selector: str, value: str) -> None:
        """Choose an entry of a select element, as a person would."""
        change = "e.value = arguments[1]; e.dispatchEvent(new Event('change', {bubbles: true}))"
        self(f"const e = document.querySelector(arguments[0]); {change}", selector, value)

    def until(self, script: str, *arguments: object, seconds: float = 20) -> Any:
        """Wait until a script returns something true."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds).until(lambda driver: driver.execute_script(script, *arguments))

    def keep(self, name: str) -> Path:
        """Take a screenshot."""
        path = self._screenshots / f"{name}.png"
        assert self.driver.save_screenshot(str(path))
        return path

    def require_calm(self) -> None:
        """Nothing was complained of in the console, and nothing sticks out of the page sideways."""
        assert [entry["message"] for entry in self.driver.get_log("browser")] == []
        assert self("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")


@pytest.fixture(scope="package")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="browser tests need selenium (the extra 'test')")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("browser tests need Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    folder = Path(os.environ.get(SCREENSHOTS) or tmp_path_factory.mktemp("screenshots", numbered=False))
    folder.mkdir(parents=True, exist_ok=True)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    driver.set_script_timeout(180)  # the check of a large page takes a while on a busy machine
    try:
        yield Browser(driver, folder)
    finally:
        driver.quit()


@pytest.fixture(scope="package")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, from the npm client."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("the check of accessibility needs the npm client, to fetch axe-core")
    folder = tmp_path_factory.mktemp("axe")
    packed = subprocess.run(
        [npm, "pack", "axe-core@4", "--silent"], cwd=folder, capture_output=True, text=True, timeout=90
    )
    archives = list(folder.glob("*.tgz"))
    if packed.returncode or not archives:
        pytest.skip(f"npm could not fetch axe-core: {packed.stderr.strip()[:200]}")
    with tarfile.open(archives[0]) as archive:
        member = archive.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()


@pytest.fixture
def accessible(browser: Browser, axe: str) -> Callable[[], None]:
    """Checks the page that is open."""

    def check() -> None:
        browser(axe)
        found = browser.driver.execute_async_script(
            "const done = arguments[arguments.length - 1]; axe.run({resultTypes: ['violations']}).then(r => done("
            "r.violations.map(v => `${v.id} (${v.impact}): ${v.help}: ${v.nodes.map(n => n.html).slice(0, 3)}`)))"
        )
        assert found == []

    return check


@contextmanager
def served(explorer: Any) -> Iterator[str]:
    """An explorer on a free port, in a thread; gives the address with its token."""
    import uvicorn

    from logix_like.explorer.app import make_app
    from logix_like.explorer.server import SETTINGS, listen

    with listen("127.0.0.1", 0) as listening:
        config = uvicorn.Config(make_app(explorer, "a-token"), **SETTINGS)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="Dummy-server")
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/?token=a-token"
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture(scope="package")
def text_explorer(texts: tuple[Path, nn.Module]) -> Iterator[str]:
    pytest.importorskip("starlette")
    from logix_like.explorer.state import Explorer

    explorer = Explorer(texts[0], stores.TEXTS, (texts[1], stores.loss_of_text))
    explorer.catalogue(patience=60)
    assert explorer.scoring is not None
    explorer.scoring.wait(60)
    with served(explorer) as address:
        yield address
    explorer.close()


@pytest.fixture(scope="package")
def picture_explorer(pictures: tuple[Path, nn.Module]) -> Iterator[str]:
    pytest.importorskip("starlette")
    from logix_like.explorer.state import Explorer

    explorer = Explorer(pictures[0], stores.picture_of)
    explorer.catalogue(patience=60)
    with served(explorer) as address:
        yield address
    explorer.close()
