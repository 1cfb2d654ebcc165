"""Running extremes against sorting everything."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logix_like.query.ranking import RunningTop, stable_top
from tests.reference import dense_ranking


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.lists(st.integers(-3, 3), min_size=12, max_size=12), min_size=1, max_size=4),
    k=st.integers(1, 12),
    cuts=st.sets(st.integers(1, 11)),
)
def test_any_cutting_gives_the_first_of_equal_scores(values: list[list[int]], k: int, cuts: set[int]) -> None:
    scores, positions = torch.tensor(values, dtype=torch.float32), torch.arange(12) * 3
    for largest, sign in ((True, 1), (False, -1)):
        running = RunningTop(k, largest=largest)
        edges = [0, *sorted(cuts), 12]
        for start, stop in pairwise(edges):
            running.update(scores[:, start:stop], positions[start:stop])
        expected = torch.tensor(dense_ranking(sign * scores, k))
        found, places = running.result()
        assert torch.equal(places, expected * 3)
        assert torch.equal(found, scores.gather(1, expected))


def test_only_some_queries_change() -> None:
    running = RunningTop(2, largest=True)
    running.update(torch.tensor([[5.0, 4.0], [1.0, 2.0], [9.0, 8.0]]), torch.tensor([0, 1]))
    running.update(torch.tensor([[4.0], [3.0], [7.0]]), torch.tensor([2]))
    scores, positions = running.result()
    assert scores.tolist() == [[5, 4], [3, 2], [9, 8]]
    assert positions.tolist() == [[0, 1], [2, 1], [0, 1]]


def test_asking_for_more_than_there_is_gives_what_there_is() -> None:
    best, columns = stable_top(torch.tensor([[1.0, 3.0, 2.0]]), 5)
    assert (best.tolist(), columns.tolist()) == ([[3, 2, 1]], [[1, 2, 0]])
