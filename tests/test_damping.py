"""The three ways of damping, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from logix_like.config import load_config
from logix_like.damping import LEAST, MOST, Damping, shrinkage_damping
from logix_like.errors import ConfigError, QueryError


def automatic(covariance: Tensor, samples: int) -> float:
    trace, squares = covariance.trace().item(), covariance.square().sum().item()
    return shrinkage_damping(len(covariance), trace, squares, samples)


def test_a_number_is_a_multiple_of_the_mean_and_absolute_is_itself() -> None:
    assert Damping.of(0.5).shift(3.0, shrinkage=7.0) == 1.5
    assert Damping.of({"absolute": 0.5}).shift(3.0, shrinkage=7.0) == 0.5
    assert Damping.of("auto").shift(3.0, shrinkage=7.0) == 21.0
    assert Damping.of("auto").shift(3.0) == Damping.of(LEAST).shift(3.0)


def test_auto_is_oracle_approximating_shrinkage() -> None:
    """The weight that Chen et al. derive by iterating to a fixed point: eq. 23 of their paper, here step by step."""
    values, rows = torch.arange(1, 41, dtype=torch.float64).pow(-1.5), 12
    size, trace, squares = len(values), values.sum().item(), values.square().sum().item()
    weight = 1.0
    for _ in range(200):  # rho_{j+1} from Sigma_j, in terms of traces with the sample covariance (eq. 19 to 22)
        shrunk_product = (1 - weight) * squares + weight * trace**2 / size
        weight = ((1 - 2 / size) * shrunk_product + trace**2) / (
            (rows + 1 - 2 / size) * shrunk_product + (1 - rows / size) * trace**2
        )
    closed = ((1 - 2 / size) * squares + trace**2) / ((rows + 1 - 2 / size) * (squares - trace**2 / size))
    assert weight == pytest.approx(min(1.0, closed), rel=1e-6)
    turned = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    covariance = turned * values @ turned.T
    assert automatic(covariance, rows) == pytest.approx(max(LEAST, weight / (1 - weight)), rel=1e-6)


def test_auto_falls_to_the_default_with_many_rows_and_is_bounded_with_few() -> None:
    covariance = torch.arange(1, 257).double().reciprocal().diag()
    found = [automatic(covariance, rows) for rows in (1, 4, 16, 64, 256, 10**6)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == LEAST and found[0] <= MOST * (1 + 1e-9)
    assert automatic(torch.eye(5), 3) == LEAST
    assert automatic(torch.zeros(5, 5), 3) == LEAST


@pytest.mark.parametrize("setting", [0.3, "auto", {"absolute": 2.0}])
def test_a_setting_comes_back_as_it_was_given(setting: object) -> None:
    assert Damping.of(setting).setting == setting
    assert Damping.parse(Damping.of(setting).typed) == Damping.of(setting)
    assert Damping.of(Damping.of(setting)) == Damping.of(setting)
    assert load_config(query={"damping": setting}).query.model_dump()["damping"] == setting


@pytest.mark.parametrize("setting", ["aut", -1, math.inf, math.nan, True, None, {"absolute": -1}, {"relative": 1}, {}])
def test_what_is_no_damping_is_refused(setting: object) -> None:
    with pytest.raises(QueryError, match=r"damping is .*; it must be a number of at least 0 .*'auto', or"):
        Damping.of(setting)
    if setting is not None and setting != {}:
        with pytest.raises(ConfigError, match=r"'query\.damping"):
            load_config(query={"damping": setting})
