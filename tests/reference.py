"""Slow truths about queries: dense matrices, one row at a time, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from logix_like.layout import Layout, ModuleBlock


def blocks_layout(*ranks: tuple[int, int], shared_input: bool = False) -> Layout:
    """A layout with a module for each ``(rank_out, rank_in)``; all may share the first one's input."""
    blocks, offset = [], 0
    for number, rank in enumerate(ranks):
        name = f"layer.{number}"
        group = "layer.0" if shared_input else name
        blocks.append(ModuleBlock(name, "linear", rank, rank, offset, group, parameters=rank[0] * rank[1]))
        offset += rank[0] * rank[1]
    return Layout(blocks)


def second_moment_matrix(rows: Tensor) -> Tensor:
    """``E[g g^T]`` of ``rows [n, k]``."""
    return torch.stack([torch.outer(row, row) for row in rows.double()]).mean(0)


def damped(matrix: Tensor, damping: float) -> Tensor:
    """``matrix`` plus ``damping`` times its mean eigenvalue on the diagonal."""
    return matrix + damping * matrix.trace() / len(matrix) * torch.eye(len(matrix), dtype=matrix.dtype)


def dense_inverse(layout: Layout, curvature: Callable[[ModuleBlock], Tensor], damping: float) -> Tensor:
    """The block-diagonal damped inverse ``[width, width]`` of the modules' curvatures ``[k, k]``."""
    inverses = [torch.linalg.inv(damped(curvature(block), damping)) for block in layout]
    return cast(Tensor, torch.block_diag(*inverses))


def dense_scores(queries: Tensor, rows: Tensor, inverse: Tensor, mode: str) -> Tensor:
    """Scores ``[queries, rows]``, pair by pair."""
    pairs = [[_pair_score(q, row, inverse, mode) for row in rows.double()] for q in queries.double()]
    return torch.tensor(pairs, dtype=torch.float64)


def _pair_score(query: Tensor, row: Tensor, inverse: Tensor, mode: str) -> float:
    dot, own_query, own_row = query @ inverse @ row, query @ inverse @ query, row @ inverse @ row
    difference = query - row
    return {
        "dot": dot,
        "cosine": dot / (own_query.sqrt() * own_row.sqrt()),
        "relatif": dot / own_row.sqrt(),
        "l2": -(difference @ inverse @ difference),
    }[mode].item()


def dense_ranking(scores: Tensor, k: int) -> list[list[int]]:
    """Columns of the ``k`` highest of each line of ``scores``, the first of equal ones first."""
    lines = scores.tolist()
    return [sorted(range(len(line)), key=lambda column: (-line[column], column))[:k] for line in lines]
