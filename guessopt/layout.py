"""Shapes, and where the N examples lie in a tensor.

Letters: N batch size, T the size of everything else that was flattened with the batch (tokens, positions).
"""

from __future__ import annotations

import enum
import math

import torch
from torch import Tensor

Shape = tuple[int, ...]


def is_differentiable(t: Tensor | torch.dtype) -> bool:
    """Whether a tensor (or one of this dtype) can carry a derivative: floating-point or complex.

    >>> is_differentiable(torch.complex64), is_differentiable(torch.ones(2)), is_differentiable(torch.int64)
    (True, True, False)
    """
    dtype = t if isinstance(t, torch.dtype) else t.dtype
    return dtype.is_floating_point or dtype.is_complex


def numel(shape: Shape) -> int:
    """Entries of a tensor of this shape."""
    return math.prod(shape)


class Layout(enum.Enum):
    """Where the N examples lie in a tensor. ``COUPLED``: they cannot be told apart, and the whole batch is one row.

    >>> Layout.FLAT_T.rows(torch.arange(6), 2)
    tensor([[0, 2, 4],
            [1, 3, 5]])
    >>> Layout.FLAT_T.unrows(Layout.FLAT_T.rows(torch.arange(6), 2), (6,))
    tensor([0, 1, 2, 3, 4, 5])
    """

    BATCH_FIRST = "[N, ...]"
    BATCH_SECOND = "[T, N, ...]"
    FLAT = "[N*T, ...]"
    FLAT_T = "[T*N, ...]"
    COUPLED = "coupled"

    def fits(self, shape: Shape, n: int) -> bool:
        """Whether a tensor of this shape can hold ``n`` examples in this layout."""
        if self is Layout.BATCH_FIRST:
            return len(shape) > 0 and shape[0] == n
        if self is Layout.BATCH_SECOND:
            return len(shape) > 1 and shape[1] == n
        if self is Layout.COUPLED:
            return True
        return len(shape) > 0 and shape[0] > n and shape[0] % n == 0

    def rows(self, t: Tensor, n: int, lead: int = 0) -> Tensor:
        """A view of ``t`` with the ``n`` examples in front, ``[N, ...]``; coupled: ``[1, ...]``.

        ``FLAT`` and ``FLAT_T`` give ``[N, T, ...]``.

        Args:
            lead: dimensions of ``t`` before those that the layout describes; they follow the examples.
        """
        if self is Layout.COUPLED:
            return t[None]
        dim = lead
        if self is Layout.BATCH_SECOND:
            dim += 1
        elif self is Layout.FLAT:
            t = t.unflatten(lead, (n, t.shape[lead] // n))
        elif self is Layout.FLAT_T:
            t = t.unflatten(lead, (t.shape[lead] // n, n))
            dim += 1
        return t.movedim(dim, 0) if dim else t

    def flat_rows(self, t: Tensor, n: int) -> Tensor:
        """Each example's entries, ``[N, d]``; coupled: ``[1, d]``."""
        rows = self.rows(t, n)
        return rows.reshape(len(rows), -1)

    def unrows(self, rows: Tensor, shape: Shape) -> Tensor:
        """The inverse of ``rows``: ``[N, ...]``, the rows in any shape, back to ``shape``."""
        if self in (Layout.BATCH_SECOND, Layout.FLAT_T):
            n = len(rows)
            rows = rows.reshape(n, *self.row_shape(shape, n)).transpose(0, 1)
        return rows.reshape(shape)

    def row_shape(self, shape: Shape, n: int) -> Shape:
        """The shape of one row of a tensor of this shape."""
        if self is Layout.COUPLED:
            return shape
        if self is Layout.BATCH_FIRST:
            return shape[1:]
        return (shape[0], *shape[2:]) if self is Layout.BATCH_SECOND else (shape[0] // n, *shape[1:])

    def sum_examples(self, t: Tensor, n: int) -> Tensor:
        """Each example's sum, ``[N]``; coupled: ``[1]``.

        >>> Layout.FLAT_T.sum_examples(torch.arange(6.0)[:, None], 2)
        tensor([6., 9.])
        """
        if self is Layout.COUPLED:
            return t.sum().reshape(1)
        if self is Layout.FLAT_T:  # without a copy
            return t.reshape(t.shape[0] // n, n, -1).sum((0, 2))
        return self.flat_rows(t, n).sum(1)

    def spread(self, d: Tensor, shape: Shape) -> Tensor:
        """One number an example, ``d`` ``[N]``, shaped to broadcast against ``shape``; coupled: their sum."""
        if self is Layout.COUPLED:
            return d.sum()
        if self is Layout.BATCH_SECOND:
            return d.reshape(1, -1, *(1,) * (len(shape) - 2))
        if self is Layout.FLAT:
            d = d.repeat_interleave(shape[0] // d.shape[0])
        elif self is Layout.FLAT_T:
            d = d.repeat(shape[0] // d.shape[0])
        return d.reshape(-1, *(1,) * (len(shape) - 1))

    def sum_positions(self, t: Tensor, n: int, dim: int) -> Tensor:
        """The sum at each position of each example, ``[N, T]``; coupled: ``[1, T]``.

        Args:
            dim: the dimension of a row (``row_shape``) that holds the T positions.

        >>> Layout.FLAT.sum_positions(torch.ones(6, 5), 2, 0)
        tensor([[5., 5., 5.],
                [5., 5., 5.]])
        """
        rows = self.rows(t, n).movedim(dim + 1, 1)
        return rows.reshape(*rows.shape[:2], -1).sum(2)

    def spread_positions(self, d: Tensor, shape: Shape, n: int, dim: int) -> Tensor:
        """One number for each position of each example, ``d`` ``[N, T]``, shaped to broadcast against ``shape``;
        coupled: their sum over the examples.

        Args:
            dim: the dimension of a row (``row_shape``) that holds the T positions.
        """
        if self is Layout.COUPLED:
            d, n = d.sum(0, keepdim=True), 1
        row = self.row_shape(shape, n)
        d = d.expand(n, -1).reshape(n, *(length if k == dim else 1 for k, length in enumerate(row)))
        if self is Layout.COUPLED:
            return d[0]
        if self is Layout.BATCH_FIRST:
            return d
        if self is Layout.BATCH_SECOND:
            return d.transpose(0, 1)
        d = d.expand(n, row[0], *d.shape[2:])
        return (d if self is Layout.FLAT else d.transpose(0, 1)).flatten(0, 1)

    def place(self, v: Tensor, shape: Shape) -> Tensor:
        """Per-example values ``[N, *p]`` (coupled: ``[1, *p]``), shaped to broadcast against ``shape``; ``p`` against
        its last dimensions."""
        if self in (Layout.FLAT, Layout.FLAT_T):
            times = shape[0] // v.shape[0]
            v = v.repeat_interleave(times, 0) if self is Layout.FLAT else v.repeat(times, *(1,) * (v.dim() - 1))
        inner = tuple(v.shape[1:])
        while len(inner) >= len(shape) and inner[0] == 1:
            inner = inner[1:]
        if self is Layout.COUPLED:
            return v.reshape(inner)
        lead = (1, v.shape[0]) if self is Layout.BATCH_SECOND else (v.shape[0],)
        return v.reshape(*lead, *(1,) * (len(shape) - len(lead) - len(inner)), *inner)

    @staticmethod
    def candidates(shape: Shape, n: int) -> tuple[Layout, ...]:
        """The layouts that a shape allows, likeliest first. The last is ``COUPLED``: always right, far noisier."""
        return tuple(layout for layout in Layout if layout.fits(shape, n))
