"""The examples about evaluation: small ones in every run, whole ones among the slow tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from logix_like.examples import backdoor, clean_labels, is_it_true

pytest.importorskip("sklearn")


@pytest.fixture
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of scikit-learn, which are read in no time."""
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)


@pytest.mark.usefixtures("small_images")
def test_wrong_labels_are_found_and_dropping_the_harmful_helps(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = clean_labels.main(clean_labels.Settings(training=400, validation=200, epochs=12, draws=2))
    assert outcome.errors.auroc > 0.75
    assert outcome.curation.after > outcome.curation.random.mean().item()
    assert "AUROC" in capsys.readouterr().out


@pytest.mark.usefixtures("small_images")
def test_a_small_truth_is_made_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = is_it_true.Settings(training=60, queries=10, epochs=2, subsets=8, seeds=1)
    first = is_it_true.main(["--cache", str(tmp_path)], settings)
    kept = len(list(tmp_path.iterdir()))
    again = is_it_true.main(["--cache", str(tmp_path)], settings)
    assert kept == len(list(tmp_path.iterdir())) == 9
    assert {name: one.value for name, one in first.items()} == {name: one.value for name, one in again.items()}
    assert capsys.readouterr().out.count("LDS") == 2 * len(first)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_backdoor_is_found(seed: int) -> None:
    pytest.importorskip("mlxtend")
    outcome = backdoor.main(backdoor.Settings(seed=seed))
    suspicious = outcome.found.suspicious
    assert outcome.attacked > 0.8
    assert suspicious[outcome.triggered].float().mean() > 0.8
    assert suspicious[~outcome.triggered].float().mean() < 0.05
    assert outcome.precision > 0.7


@pytest.mark.slow
def test_labels_of_the_larger_images() -> None:
    pytest.importorskip("mlxtend")
    outcome = clean_labels.main()
    assert outcome.errors.auroc > 0.9
    assert outcome.curation.after > outcome.curation.random.max().item()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_scores_foretell_retraining() -> None:
    pytest.importorskip("mlxtend")
    found = is_it_true.main([])
    assert found["rows of training, queries averaged over checkpoints"].value > 0.45
    assert all(one.ceiling > 0.8 for one in found.values())
