"""Estimators over several sets of weights, and over models of which each batch uses a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from logix_like.errors import ConfigError
from logix_like.estimators import EKFAC, KFAC, TRAK

Data = list[tuple[Tensor, Tensor]]


class Routed(nn.Module):
    """Two heads, of which a batch uses one: by its first number, or by a buffer."""

    gate: Tensor

    def __init__(self, trunk: bool = False) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 4) if trunk else nn.Identity()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)
        self.register_buffer("gate", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        head = self.first if float(x[0, 0] + self.gate) < 0 else self.second
        found: Tensor = head(self.trunk(x))
        return found


def batches(*signs: float) -> Data:
    found = []
    for sign in signs:
        x = torch.randn(5, 4, dtype=torch.float64)
        x[:, 0] = sign * (x[:, 0].abs() + 0.1)
        found.append((x, torch.randint(3, (5,))))
    return found


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("estimator", [EKFAC, KFAC])
def test_samples_that_share_no_module_with_a_query_have_the_score_0(estimator: type[EKFAC], rank: int | None) -> None:
    model, data = Routed().double(), batches(-1, 1, -1)
    influence = estimator(model, data, rank=rank, progress=False)
    scores = influence.scores(data[0])
    assert scores.shape == (5, 15)
    assert not scores[:, 5:10].any() and bool((scores[:, :5].diagonal() > 0).all())
    parts = influence.module_scores(data[0])
    assert torch.equal(sum(parts.values(), torch.zeros(())), scores)
    assert not influence.group_influence(data[0], data[1]).any()
    if rank is None:
        assert torch.allclose(influence.group_influence(data[0], data[2], order=1), scores[:, 10:].sum(1))


def test_gradients_are_means_over_all_weights_also_of_modules_that_are_used_at_some() -> None:
    model, data = Routed(trunk=True).double(), batches(-1, -1)

    def at() -> Iterator[None]:
        for gate in (0.0, 10.0, 0.0):
            model.gate.fill_(gate)
            yield

    influence = EKFAC(model, data, at=at, progress=False)
    single = []
    for _ in at():
        single.append(EKFAC(model, data, curvature=influence.curvature, progress=False).gradients(data[0]))
    found = influence.gradients(data[0])
    assert set(found) == {"trunk", "first", "second"}
    for name, gradient in found.items():
        expected = sum((one[name] for one in single if name in one), torch.zeros(())) / 3
        assert torch.allclose(gradient, expected, rtol=1e-12)


class BrokenOffError(Exception):
    """What stops a pass."""


@pytest.mark.parametrize("asked", ["scores", "self_influence", "group_influence", "curvature"])
@pytest.mark.parametrize("estimator", [EKFAC, TRAK])
def test_a_pass_that_is_broken_off_leaves_the_weights_as_they_were(estimator: Any, asked: str) -> None:
    model, data = Routed().double(), batches(-1, 1)
    kept, broken = model.first.weight.detach().clone(), False

    def at() -> Iterator[None]:
        try:
            with torch.no_grad():
                model.first.weight.zero_()
            yield
        finally:
            with torch.no_grad():
                model.first.weight.copy_(kept)

    class Loader(list[tuple[Tensor, Tensor]]):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            yield self[0]
            if broken:
                raise BrokenOffError
            yield self[1]

    influence = estimator(model, Loader(data), at=at, progress=False)
    questions: dict[str, Callable[[], object]] = {
        "scores": lambda: influence.scores(data[0]),
        "self_influence": lambda: influence.self_influence(),
        "group_influence": lambda: influence.group_influence(data[0], data[1]),
        "curvature": lambda: influence.curvature,
    }
    if estimator is TRAK and asked in ("group_influence", "curvature"):
        return
    if asked not in ("curvature", "group_influence"):
        questions[asked]()  # what is fitted once is fitted now
    broken = True
    with pytest.raises(BrokenOffError) as kept_alive:  # as a notebook keeps the last traceback
        questions[asked]()
    assert kept_alive.value is not None
    assert torch.equal(model.first.weight, kept)


def test_what_gives_no_weights_is_refused() -> None:
    model, data = Routed().double(), batches(-1, 1)
    for estimator in (EKFAC, TRAK):
        with pytest.raises(ConfigError, match="at is a generator; it must be a function that begins anew"):
            estimator(model, data, at=(None for _ in range(2)), progress=False).scores(data[0])
        with pytest.raises(ConfigError, match="at yielded no set of weights"):
            estimator(model, data, at=list, progress=False).scores(data[0])
