"""Projection matrices: unbiased, the same everywhere, and ranks as they were asked for."""

import pytest
import torch

from logix_like.errors import ConfigError
from logix_like.projection import INITS, rank_for

RANDOM = ["gaussian", "orthogonal"]
DRAWS = 3000
STANDARD_ERRORS = 4.0
"""How far the mean over the draws may lie from the truth."""


@pytest.mark.parametrize("name", RANDOM)
def test_dot_products_of_projected_gradients_are_unbiased(name: str) -> None:
    """Identity F2: the mean of <P_out G P_in^T, P_out H P_in^T> over draws is <G, H>."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(12, 9, generator=generator)
    h = torch.randn(12, 9, generator=generator) + g / 2
    found = torch.empty(DRAWS)
    for draw in range(DRAWS):
        outward = INITS[name].matrix(f"{draw}/output", 4, 12, None)
        inward = INITS[name].matrix(f"{draw}/input", 3, 9, None)
        assert outward is not None
        assert inward is not None
        found[draw] = ((outward @ g @ inward.T) * (outward @ h @ inward.T)).sum()
    error = abs(float(found.mean() - (g * h).sum()))
    assert error < STANDARD_ERRORS * float(found.std()) / DRAWS**0.5


@pytest.mark.parametrize("name", RANDOM)
def test_a_matrix_comes_from_its_key_alone(name: str) -> None:
    first = INITS[name].matrix("0/layer/input", 3, 7, None)
    torch.rand(5)
    assert torch.equal(first, INITS[name].matrix("0/layer/input", 3, 7, None))
    assert not torch.equal(first, INITS[name].matrix("1/layer/input", 3, 7, None))


def test_at_full_rank_an_orthogonal_matrix_is_a_rotation() -> None:
    matrix = INITS["orthogonal"].matrix("key", 6, 6, None)
    assert torch.allclose(matrix @ matrix.T, torch.eye(6), atol=1e-6)


def test_pca_keeps_the_leading_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 3, generator=generator))[0]
    data = torch.randn(50, 3, generator=generator) @ basis.T
    matrix = INITS["pca"].matrix("key", 3, 8, data.T @ data)
    assert torch.allclose(data @ matrix.T @ matrix, data, atol=1e-5)


def test_ranks_by_glob_and_by_width() -> None:
    ranks = {"*.mlp.*": 32, "*": 8}
    assert rank_for("h.mlp.up", (64, 64), ranks) == 32
    assert rank_for("h.attention", (64, 64), ranks) == 8
    assert rank_for("any", (64, 511), "auto") == 16
    assert rank_for("any", (64, 512), "auto") == 32
    with pytest.raises(ConfigError, match="no pattern for module 'other'"):
        rank_for("other", (4, 4), {"h.*": 8})
