"""Questions as a user puts them: through the run, with the config's settings unless told otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import logix_like as logix
from logix_like.errors import ConfigError
from logix_like.run.asking import Query

COUNT = 40


@pytest.fixture
def run(tmp_path: Path) -> Iterator[logix.Run]:
    """Forty samples; number 30 is a copy of number 3."""
    model = nn.Linear(5, 3)
    inputs, labels = torch.randn(COUNT, 5), torch.randint(3, (COUNT,))
    inputs[30], labels[30] = inputs[3], labels[3]
    settings = {"damping": {"absolute": 0.02}, "preconditioner": "covariance"}
    with logix.init("questions", model, root=str(tmp_path), query=settings, verbose=False) as run:
        for start in range(0, COUNT, 10):
            part = slice(start, start + 10)
            with run(data_id=range(start, start + 10), metadata={"label": labels[part].tolist()}):
                nn.functional.cross_entropy(model(inputs[part]), labels[part]).backward()
        run.commit()
        run.labels = labels  # type: ignore[attr-defined]
        yield run


@pytest.fixture
def query(run: logix.Run) -> Query:
    model = run._logbook.tracker.model
    with run.query(data_id=["q0", "q1"]) as query:
        nn.functional.cross_entropy(model(torch.randn(2, 5)), torch.tensor([0, 1])).backward()
    return query


def test_samples_are_chosen_by_the_columns_that_were_logged(run: logix.Run, query: Query) -> None:
    some = run.compute_influence_all(query, where={"label": 1})
    expected = [i for i in range(COUNT) if run.labels[i] == 1]  # type: ignore[attr-defined]
    assert some.data_id.tolist() == expected
    assert some.damping == {"absolute": 0.02}
    split = run.compute_influence(query, expected[:2], k=1, per="module", normalize=True)
    assert len(split.part_names) == 1
    torch.testing.assert_close(split.top.parts.sum(2), split.top.scores)


def test_sets_follow_the_configs_damping(run: logix.Run, query: Query) -> None:
    every = run.compute_influence_all(query).scores
    first = run.compute_group_influence(query, {"a": [1, 2], "b": range(10)})
    torch.testing.assert_close(first.scores, torch.stack([every[:, 1:3].sum(1), every[:, :10].sum(1)], 1))
    second = run.compute_group_influence(query, [1, 2], order=2)
    assert not second.scores.equal(first.scores[:, :1]) and "0.02 (absolute)" in second.note
    other = run.compute_group_influence(query, [1, 2], damping=1.0)
    assert not other.scores.equal(first.scores[:, :1])
    with pytest.raises(ConfigError, match="unknown query option 'mode'"):
        run.compute_group_influence(query, [1], mode="cosine")


def test_a_copy_is_found(run: logix.Run) -> None:
    result = run.find_similar([3], k=4)
    assert result.proponents().ids[0, 0] == 30
    assert result.proponents().scores[0, 0].item() == pytest.approx(1, abs=1e-5)
    assert result.mode == "cosine" and result.preconditioner == "identity"
    assert run.find_similar([3], k=1, preconditioner="covariance", mode="l2").proponents().ids.tolist() == [[30]]


def test_leverages_of_a_run(run: logix.Run) -> None:
    assert run.compute_self_influence().leverage.max() < 1
