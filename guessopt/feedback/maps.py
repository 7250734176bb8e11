"""Feedback matrices ``B``: which tensors they predict, in which shape they see them, and the products with them.

Letters: n example, g group (1, or the output's positions), p position, f feature of the predicted tensor, c feature of
the output, r row of ``B``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from guessopt.graph import SiteGraph
from guessopt.layout import Layout, Shape, numel
from guessopt.linalg import wide
from guessopt.sites import Matrix, Site
from guessopt.tracing.context import SiteContext

STRUCTURES = ("auto", "position", "shared")

#: Cells along each dimension of a feature map that ``structure="auto"`` tells apart.
MAX_GRID_CELLS = 4

#: How often a row of ``B`` counts that adds up positions: the differences between their Jacobians are noise to it.
SUMMED_ROW_WEIGHT = 16


class Axes:
    """A tensor as ``[n, p, f]``, and back.

    Args:
        layout: where its examples lie.
        shape: of the tensor.
        n: the number of examples.
        features_first: whether features come before positions, as in a feature map.
    """

    def __init__(self, layout: Layout, shape: Shape, n: int, features_first: bool) -> None:
        self.layout, self.shape, self.n = layout, shape, n
        inner = layout.row_shape(shape, n)
        self.inner, self.features_first = inner, features_first and len(inner) > 1
        self.features = 1 if not inner else inner[0] if self.features_first else inner[-1]
        self.positions = numel(inner) // max(self.features, 1)

    def for_examples(self, n: int) -> Axes:
        """The axes of the first ``n`` examples, of a tensor with examples first."""
        return Axes(self.layout, (n, *self.shape[1:]), n, self.features_first)

    def unfold(self, t: Tensor) -> Tensor:
        """The tensor as ``[n, p, f]``."""
        t = self.layout.rows(t, self.n)
        if self.features_first:
            return t.reshape(self.n, self.features, self.positions).mT
        return t.reshape(self.n, self.positions, self.features)

    def fold(self, u: Tensor) -> Tensor:
        """``[n, p, f]`` as a tensor of ``shape``."""
        if self.features_first:
            u = u.mT
        return self.layout.unrows(u, self.shape)


class Output:
    """The network's output as ``B`` sees it: the values that hold examples, side by side, ``[n, g, c]``.

    Values with equally many positions keep their positions; otherwise each value's positions become features.

    Args:
        values: name, layout and shape of each.
        n: the number of examples.
    """

    def __init__(self, values: list[tuple[int, Layout, Shape]], n: int) -> None:
        self.n = n
        self.axes = {k: Axes(layout, shape, n, len(shape) > 3) for k, layout, shape in values}
        positions = {axes.positions for axes in self.axes.values()}
        self.keeps_positions = len(positions) == 1
        self.positions = next(iter(positions)) if self.keeps_positions else 1
        self.features = sum(
            a.features if self.keeps_positions else a.positions * a.features for a in self.axes.values()
        )

    @staticmethod
    def of_cuts(graph: SiteGraph) -> Output:
        """All cuts that hold examples, by number."""
        held = [(k, cut) for k, cut in enumerate(graph.cuts) if cut.layout is not Layout.COUPLED]
        return Output([(k, cut.layout, cut.shape) for k, cut in held], graph.batch)

    def join(self, values: dict[int, Tensor | None]) -> Tensor | None:
        """Errors or tangents, side by side, ``[n, g, c]``. A missing one counts as zero; None if all are missing."""
        there = next((v for v in values.values() if v is not None), None)
        if there is None or not self.axes:
            return None
        parts = []
        for k, axes in self.axes.items():
            v = values.get(k)
            part = axes.unfold(wide(there.new_zeros(axes.shape) if v is None else v))
            parts.append(part if self.keeps_positions else part.flatten(1)[:, None])
        return torch.cat(parts, -1)


@dataclass(frozen=True)
class Form:
    """The shapes that a ``B`` may have: ``structure`` and ``entries`` of ``LearnedFeedback``."""

    structure: str
    entries: int | None


class FeedbackMap:
    """The ``B`` that predicts the cotangent of one tensor from the output's error.

    | the tensor's positions | ``B`` |
    |---|---|
    | as many as the output's | one for all positions; each position's error serves that position |
    | others | the output's errors are added up over positions; one ``B`` for each cell of the tensor's positions |

    A cell is one position, a part of a coarse grid, or all positions, by ``Form.structure``.

    Attributes:
        axes: the tensor as ``[n, p, f]``.
        matched: whether the tensor has the output's positions.
        samples: the number of samples that a batch gives to learn from.
        sums_positions: whether several positions of the tensor share a row of ``B`` through their sum.
        rank: the number of fixed random mixtures of the output's features that ``B`` reads where it would be too large;
            None if it reads the features.
        b_shape: ``(r, c)`` or ``(r, rank)``.
    """

    def __init__(self, layout: Layout, shape: Shape, features_first: bool, output: Output, form: Form) -> None:
        self.axes, self.output = Axes(layout, shape, output.n, features_first), output
        p, f, c = self.axes.positions, self.axes.features, output.features
        most = math.inf if form.entries is None else form.entries
        self.matched = p == output.positions > 1
        self.samples = output.n * (p if self.matched else 1)
        grid = self.axes.inner[1:] if self.axes.features_first else (p,)
        wanted = []
        if form.structure == "auto" and features_first:
            wanted = [tuple(min(MAX_GRID_CELLS, size) for size in grid)]
        elif form.structure == "position":
            wanted = [grid]
        fitting = [g for g in wanted if numel(g) * f * c <= most]
        self.grid, self.coarse = grid, fitting[0] if fitting and not self.matched else tuple(1 for _ in grid)
        self.cells = numel(self.coarse)
        self.sums_positions = not self.matched and self.cells < p
        rows = self.cells * f
        self.rank = max(1, int(most) // rows) if rows * c > most else None
        self.b_shape = (rows, c if self.rank is None else self.rank)

    def predict(self, e: Tensor, b: Tensor) -> Tensor:
        """``B e`` in the tensor's shape; ``e``: ``[n, g, c]``."""
        return self.axes.fold(self.spread(self.read(e.to(b.dtype)) @ b.T))  # n g c, r c -> n g r

    def read(self, e: Tensor) -> Tensor:
        """The output's error as ``B`` reads it, ``[n, g, c]`` or ``[n, g, rank]``."""
        if not self.matched and e.shape[1] > 1:
            e = e.sum(1, keepdim=True)
        return self._mixed(e)

    def spread(self, u: Tensor) -> Tensor:
        """Each cell's rows at every position of the cell: ``[n, g, r]`` to ``[n, p, f]``."""
        n, p, f = u.shape[0], self.axes.positions, self.axes.features
        if self.cells > 1:
            u = u.reshape(n, self.cells, f)
        if u.shape[1] == p:  # in the tensor's own order in memory: its pull-back runs fastest on that
            return u.mT.contiguous().mT if self.axes.features_first else u
        return u.expand(n, p, f) if self.cells == 1 else (u.mT @ self._cells(u).mT).mT

    def unfold(self, t: Tensor) -> Tensor:
        """A tangent of the tensor, added up in each cell: ``r`` of ``B^T r``, ``[n, g, r]``."""
        r = self.axes.unfold(wide(t))
        if self.matched:
            return r
        if self.cells == 1:
            return r.sum(1, keepdim=True) if r.shape[1] > 1 else r
        if self.cells != r.shape[1]:
            r = self._cells(r).mT @ r
        return r.flatten(1)[:, None]

    def cell_means(self, c: Tensor) -> Tensor:
        """A cotangent of the tensor, in the mean of each cell: the target of ``B e``, ``[n, g, r]``."""
        r = self.unfold(c)
        if self.matched or self.cells == self.axes.positions:
            return r
        result: Tensor = (r.unflatten(-1, (self.cells, -1)) / self._cells(r).sum(0)[:, None]).flatten(2)
        return result

    def predict_tangent(self, r: Tensor, b: Tensor) -> Tensor:
        """``B^T r``: the predicted tangent of the output, which broadcasts against ``[n, g, c]``."""
        out = r.to(b.dtype) @ b  # n g r, r c -> n g c
        return out if self.rank is None else out @ self._mixtures(out).T

    def outer(self, r: Tensor, d: Tensor) -> Tensor:
        """``sum_n r d^T``, in the shape of ``B``; ``d``: ``[n, g, c]``."""
        if not self.matched and d.shape[1] > 1:
            d = d.mean(1, keepdim=True)
        return r.to(d.dtype).flatten(0, 1).mT @ self._mixed(d).flatten(0, 1)  # (n g) r, (n g) c -> r c

    def _cells(self, like: Tensor) -> Tensor:
        return _cells(tuple(self.grid), tuple(self.coarse), like.dtype, like.device)

    def _mixed(self, e: Tensor) -> Tensor:
        return e if self.rank is None else e @ self._mixtures(e)

    def _mixtures(self, like: Tensor) -> Tensor:
        assert self.rank is not None
        return _mixtures(self.output.features, self.rank, like.dtype, like.device)


@lru_cache(maxsize=64)
def _cells(grid: Shape, coarse: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The cell of each position, ``[p, cells]`` of 0 and 1: products with it are faster than indexing by it."""
    found = torch.zeros(1, dtype=torch.long)
    for size, parts in zip(grid, coarse, strict=True):
        found = (found[:, None] * parts + torch.arange(size) * parts // size).flatten()
    return torch.nn.functional.one_hot(found, numel(coarse)).to(device, dtype)


@lru_cache(maxsize=64)
def _mixtures(features: int, rank: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random signs over ``sqrt(features)``, ``[c, rank]``. The seed is fixed."""
    signs = torch.randint(0, 2, (features, rank), generator=torch.Generator().manual_seed(features))
    result: Tensor = (2 * signs - 1).to(device, dtype) / features**0.5
    return result


class SiteFeedback(FeedbackMap):
    """A site's ``B``, and the segment between the site and the tensor that ``B`` predicts.

    ``B`` predicts the cotangent of the next matrix site's input, or of the site's own output if no matrix site follows.
    """

    @staticmethod
    def of(site: Site, output: Output, form: Form) -> SiteFeedback | None:
        """None if examples cannot be told apart."""
        segment, n = site.segment, output.n
        shape = site.shape if segment is None else segment.matrices[0].x_shape
        own = example_layout(site.layout, site.shape, n)
        layout = own if own.fits(shape, n) else Layout.candidates(shape, n)[0]
        if not output.axes or n < 2 or Layout.COUPLED in (own, layout):
            return None
        features_first = _is_feature_map(segment.matrices[0]) if segment is not None else len(shape) > 3
        return SiteFeedback(layout, shape, features_first, output, form)

    def pull_back(self, ctx: SiteContext, e: Tensor, b: Tensor) -> Tensor:
        """``M B e``: the predicted cotangent of the site."""
        u = self.predict(e, b).to(ctx.s.dtype)
        alone = self.axes.positions == 1  # otherwise all positions may share one row in memory
        return u if ctx.site.segment is None else ctx.pull_back(u, spent=alone)

    def push_forward(self, ctx: SiteContext, y: Tensor) -> Tensor:
        """``r = M y`` for the guess ``y``, ``[n, g, r]``."""
        return self.unfold(y if ctx.site.segment is None else ctx.push_forward(y))


def rows_per_sample(maps: list[FeedbackMap]) -> float:
    """Rows of all ``B`` for each sample of a batch. A row that adds up positions counts ``SUMMED_ROW_WEIGHT`` times."""
    return sum(m.b_shape[0] / m.samples * (SUMMED_ROW_WEIGHT if m.sums_positions else 1) for m in maps)


def example_layout(layout: Layout, shape: Shape, n: int) -> Layout:
    """The layout. Where examples act on each other a little (batch statistics), the likeliest layout of the shape."""
    return Layout.candidates(shape, n)[0] if layout is Layout.COUPLED else layout


def _is_feature_map(matrix: Matrix) -> bool:
    return matrix.rule.geometry(matrix.call) != "linear"
