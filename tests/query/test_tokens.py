"""Scores of single tokens: they add up to the sample's, and are those of gradients of single tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import logix_like as logix
from logix_like.errors import QueryError
from logix_like.run.asking import Query

EXACT = 1e-10
"""Float64 on both sides."""
WORDS, LENGTH = 11, 5


class Reader(nn.Module):
    """Reads tokens one by one; with a head that sees their mean only."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 6)
        self.up = nn.Linear(6, 8)
        self.out = nn.Linear(8, WORDS)
        self.head = nn.Linear(8, 2) if pooled else None

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(self.embed(tokens)))
        return self.out(hidden) if self.head is None else self.head(hidden.mean(1))


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean over the samples of a loss of each."""
    logits = model(tokens)
    if logits.ndim == 2:
        return logits.square().sum(1).mean()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum") / len(tokens)


Setting = tuple[logix.Run, Query, nn.Module]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Setting]:
    def logged(pooled: bool = False, init: str = "identity") -> Setting:
        torch.manual_seed(0)
        model = Reader(pooled).double()
        run = logix.init(
            "tokens",
            model,
            root=str(tmp_path),
            modules={"types": ["Linear", "Embedding"]},
            projection={"init": init, "rank": 3},
            store={"dtype": "float64"},
            verbose=False,
        )
        for start in range(0, 40, 10):
            model.zero_grad()
            with run(data_id=range(start, start + 10)):
                _loss(model, torch.randint(WORDS, (10, LENGTH))).backward()
        run.finalize()
        with run.query(data_id=["q0", "q1"]) as query:
            _loss(model, torch.randint(WORDS, (2, LENGTH))).backward()
        return run, query, model

    return logged


@pytest.mark.parametrize("init", ["identity", "orthogonal"])
@pytest.mark.parametrize("pooled", [False, True])
def test_tokens_add_up_to_the_samples_score(make: Callable[..., Setting], pooled: bool, init: str) -> None:
    run, query, model = make(pooled, init)
    tokens = torch.randint(WORDS, (3, LENGTH))
    with run.query(data_id=["a", "b", "c"]) as sample:
        _loss(model, tokens).backward()
    found = run.token_scores(query, tokens, _loss, data_id=["a", "b", "c"], preconditioner="covariance")
    inverse = run._asker.engine().preconditioner("covariance")
    expected = query.gradients.gradients @ inverse.apply(sample.gradients.gradients).T
    assert found.scores.shape == (2, 3, LENGTH)
    torch.testing.assert_close(found.scores.sum(2) + found.rest, expected, rtol=EXACT, atol=EXACT)
    assert bool(found.rest.abs().sum() > 0) == pooled


def test_a_token_scores_as_its_own_gradient(make: Callable[..., Setting]) -> None:
    """Without a path from one token to another, a token's share is the score of a sample of that token alone."""
    run, query, _ = make()
    tokens = torch.randint(WORDS, (1, LENGTH))
    found = run.token_scores(query, tokens, _loss, preconditioner="identity").scores[:, 0]
    for place in range(LENGTH):
        alone = run.token_scores(query, tokens[:, place : place + 1], _loss, preconditioner="identity")
        torch.testing.assert_close(alone.scores[:, 0, 0], found[:, place], rtol=EXACT, atol=EXACT)


def test_marks_pair_tokens_with_scores(make: Callable[..., Setting]) -> None:
    run, query, model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = run.token_scores(query, torch.randint(WORDS, (2, LENGTH)), _loss)
    assert found.data_id == (0, 1) and found.query_id == ("q0", "q1")
    marks = found.marks(1, 0, "abc")
    assert [token for token, _ in marks] == ["a", "b", "c"]
    assert [score for _, score in marks] == found.scores[1, 0, :3].tolist()
    with pytest.raises(QueryError, match="6 tokens were given for 5 positions"):
        found.marks(0, 0, "abcdef")
    with pytest.raises(QueryError, match="no tracked module was used at 7 positions"):
        run.token_scores(query, torch.randint(WORDS, (2, LENGTH)), _loss, mask=torch.ones(2, 7))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert len(run.store) == 40  # nothing was logged
