"""What a score is: how an inner product and both sides' own lengths make one number.

With ``<q, i> = g_q^T F^-1 g_i``, the preconditioned inner product, and ``s`` the squared length ``<i, i>``
in it (self-influence):

======== ============================== ==============================================================
mode     score                          meaning
======== ============================== ==============================================================
dot      <q, i>                         influence (Koh and Liang 2017)
cosine   <q, i> / sqrt(s_q s_i)         similarity of directions
relatif  <q, i> / sqrt(s_i)             influence at a bounded change of the model (Barshan et al. 2020)
l2       -(s_q - 2 <q, i> + s_i)        minus the squared distance: larger is closer
======== ============================== ==============================================================

A sample or query of length 0 has cosine and relatif 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor


class Mode(ABC):
    """One way of scoring, and how a store of vectors must be laid out to give it as a plain dot product."""

    uses_lengths: bool
    """Whether the rows' own squared lengths are needed."""
    proportional: bool = True
    """Whether a score is its product times a positive number."""

    @abstractmethod
    def scores(self, products: Tensor, query_lengths: Tensor, row_lengths: Tensor) -> Tensor:
        """Scores from products and the squared lengths of both sides, number by number.

        The lengths are float64, since the square of a small number is none in float32; scores have the products' dtype.
        Their shapes fit the products': ``[queries, 1]`` and ``[n]`` for ``[queries, n]``.
        """

    @abstractmethod
    def slope(self, query_lengths: Tensor, row_lengths: Tensor) -> Tensor:
        """How far a score moves when its product moves by 1; shapes as for :meth:`scores`."""

    @abstractmethod
    def indexed(self, rows: Tensor, row_lengths: Tensor) -> Tensor:
        """Vectors ``[n, d]`` whose dot products with :meth:`asked` rank like the scores."""

    @abstractmethod
    def asked(self, queries: Tensor) -> Tensor:
        """Vectors ``[queries, d]`` to ask an index with, from preconditioned queries ``[queries, width]``."""


class Dot(Mode):
    """The preconditioned inner product."""

    uses_lengths = False

    def scores(self, products: Tensor, query_lengths: Tensor, row_lengths: Tensor) -> Tensor:
        """Give the products themselves."""
        return products

    def slope(self, query_lengths: Tensor, row_lengths: Tensor) -> Tensor:
        """Give 1."""
        return torch.ones(())

    def indexed(self, rows: Tensor, row_lengths: Tensor) -> Tensor:
        """Give the rows themselves."""
        return rows

    def asked(self, queries: Tensor) -> Tensor:
        """Give the queries themselves."""
        return queries


class Relatif(Mode):
    """The inner product with the row at length 1."""

    uses_lengths = True

    def scores(self, products: Tensor, query_lengths: Tensor, row_lengths: Tensor) -> Tensor:
        """Divide by the rows' lengths."""
        return products * _inverse_root(row_lengths).to(products)

    def slope(self, query_lengths: Tensor, row_lengths: Tensor) -> Tensor:
        """Give what the products are multiplied by."""
        return _inverse_root(row_lengths)

    def indexed(self, rows: Tensor, row_lengths: Tensor) -> Tensor:
        """Give the rows at length 1."""
        return rows * _inverse_root(row_lengths)[:, None].to(rows)

    def asked(self, queries: Tensor) -> Tensor:
        """Give the queries themselves."""
        return queries


class Cosine(Mode):
    """The inner product with both at length 1."""

    uses_lengths = True

    def scores(self, products: Tensor, query_lengths: Tensor, row_lengths: Tensor) -> Tensor:
        """Divide by both lengths."""
        return products * _inverse_root(row_lengths).to(products) * _inverse_root(query_lengths).to(products)

    def slope(self, query_lengths: Tensor, row_lengths: Tensor) -> Tensor:
        """Give what the products are multiplied by."""
        return _inverse_root(row_lengths) * _inverse_root(query_lengths)

    def indexed(self, rows: Tensor, row_lengths: Tensor) -> Tensor:
        """Give the rows at length 1."""
        return rows * _inverse_root(row_lengths)[:, None].to(rows)

    def asked(self, queries: Tensor) -> Tensor:
        """Give the queries themselves: their length does not change the order."""
        return queries


class L2(Mode):
    """Minus the squared distance."""

    uses_lengths = True
    proportional = False

    def scores(self, products: Tensor, query_lengths: Tensor, row_lengths: Tensor) -> Tensor:
        """Expand the square."""
        return 2 * products - query_lengths.to(products) - row_lengths.to(products)

    def slope(self, query_lengths: Tensor, row_lengths: Tensor) -> Tensor:
        """Give 2."""
        return torch.full((), 2.0)

    def indexed(self, rows: Tensor, row_lengths: Tensor) -> Tensor:
        """Give the rows doubled, with minus their squared length as one more number."""
        return torch.cat([2 * rows, -row_lengths[:, None].to(rows)], dim=1)

    def asked(self, queries: Tensor) -> Tensor:
        """Give the queries with a 1 for the rows' length."""
        return torch.cat([queries, torch.ones_like(queries[:, :1])], dim=1)


MODES: Mapping[str, Mode] = MappingProxyType({"dot": Dot(), "cosine": Cosine(), "relatif": Relatif(), "l2": L2()})
"""Ways of scoring by name."""


def _inverse_root(lengths: Tensor) -> Tensor:
    """``1 / sqrt(lengths)``, and 0 where a length is 0."""
    return torch.where(lengths > 0, lengths.clamp_min(torch.finfo(lengths.dtype).tiny).rsqrt(), 0)
