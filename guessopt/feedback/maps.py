"""Where feedback matrices act: tensors of the network as ``[n, p, f]``, and ``B`` between such a place and the output.

Letters: n example, g group (1, or the output's positions), p position, f feature of a place, c feature of the output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from guessopt.graph import SiteGraph
from guessopt.layout import Layout, Shape, numel
from guessopt.sites import Matrix, Site
from guessopt.tracing.context import SiteContext

STRUCTURES = ("auto", "position", "shared")


class Axes:
    """A tensor as ``[n, p, f]``, and back. ``maps``: features come before positions."""

    def __init__(self, layout: Layout, shape: Shape, n: int, maps: bool) -> None:
        self.layout, self.shape, self.n = layout, shape, n
        inner = layout.row_shape(shape, n)
        self.inner, self.maps = inner, maps and len(inner) > 1
        self.features = 1 if not inner else inner[0] if self.maps else inner[-1]
        self.positions = numel(inner) // max(self.features, 1)

    def of(self, n: int) -> Axes:
        """The same, of fewer examples, which come first."""
        return Axes(self.layout, (n, *self.shape[1:]), n, self.maps)

    def unfold(self, t: Tensor) -> Tensor:
        t = self.layout.rows(t, self.n)
        if self.maps:
            return t.reshape(self.n, self.features, self.positions).mT
        return t.reshape(self.n, self.positions, self.features)

    def fold(self, u: Tensor) -> Tensor:
        if self.maps:
            u = u.mT
        return self.layout.unrows(u, self.shape)


class Output:
    """The network's output as the feedback sees it: values that hold examples, side by side, ``[n, g, c]``.

    Args:
        values: name, layout and shape of each.
        n: the number of examples.
    """

    def __init__(self, values: list[tuple[int, Layout, Shape]], n: int) -> None:
        self.n = n
        self.views = {k: Axes(layout, shape, n, len(shape) > 3) for k, layout, shape in values}
        positions = {view.positions for view in self.views.values()}
        self.same = len(positions) == 1
        self.positions = next(iter(positions)) if self.same else 1
        self.features = sum(v.features if self.same else v.positions * v.features for v in self.views.values())

    @staticmethod
    def of_cuts(graph: SiteGraph) -> Output:
        """All cuts that hold examples, by number."""
        held = [(k, cut) for k, cut in enumerate(graph.cuts) if cut.layout is not Layout.COUPLED]
        return Output([(k, cut.layout, cut.shape) for k, cut in held], graph.batch)

    def join(self, values: dict[int, Tensor | None]) -> Tensor | None:
        """Errors or tangents, side by side; zero for one that is missing, None where all are."""
        there = next((v for v in values.values() if v is not None), None)
        if there is None or not self.views:
            return None
        parts = []
        for k, view in self.views.items():
            v = values.get(k)
            part = view.unfold(wide(there.new_zeros(view.shape) if v is None else v))
            parts.append(part if self.same else part.flatten(1)[:, None])
        return torch.cat(parts, -1)


#: Cells along each dimension of a feature map that ``structure="auto"`` tells apart.
GRID = 4


@dataclass(frozen=True)
class Form:
    """What ``B`` may be: see ``LearnedFeedback``'s ``structure`` and ``entries``."""

    structure: str
    entries: int | None


class FeedbackMap:
    """A tensor whose cotangent ``B`` predicts from the output's error.

    Where it has as many positions as the output, each position's error serves that position; otherwise the output's
    positions are added up, and ``B`` tells cells of the place's own positions apart: all of them, those of a coarse
    grid, or a single one.

    Attributes:
        samples: how many a batch holds to learn from.
        sums: whether ``B`` sees no more of several positions than their sum.
        rank: where ``B`` would be too large, the number of fixed random mixtures of the output's features that it reads
            in place of the features; None elsewhere.
    """

    def __init__(self, layout: Layout, shape: Shape, maps: bool, output: Output, form: Form) -> None:
        self.view, self.output = Axes(layout, shape, output.n, maps), output
        p, f, c = self.view.positions, self.view.features, output.features
        most = math.inf if form.entries is None else form.entries
        self.matched = p == output.positions > 1
        self.samples = output.n * (p if self.matched else 1)
        grid = self.view.inner[1:] if self.view.maps else (p,)
        wanted = [tuple(min(GRID, size) for size in grid)] if form.structure == "auto" and maps else []
        wanted += [grid] if form.structure == "position" else []
        fitting = [g for g in wanted if numel(g) * f * c <= most]
        self.grid, self.coarse = grid, fitting[0] if fitting and not self.matched else tuple(1 for _ in grid)
        self.cells = numel(self.coarse)
        self.sums = not self.matched and self.cells < p
        rows = self.cells * f
        self.rank = max(1, int(most) // rows) if rows * c > most else None
        self.b_shape = (rows, c if self.rank is None else self.rank)

    def predict(self, e: Tensor, b: Tensor) -> Tensor:
        """``B e``, in the shape of the place."""
        return self.view.fold(self.spread(self.read(e.to(b.dtype)) @ b.T))  # n g c, f c -> n g f

    def read(self, e: Tensor) -> Tensor:
        """The output's error as ``B`` reads it, ``[n, g, c]``."""
        if not self.matched and e.shape[1] > 1:
            e = e.sum(1, keepdim=True)
        return self._mixed(e)

    def spread(self, u: Tensor) -> Tensor:
        """``[n, g, f]`` of every row of ``B`` at every position, ``[n, p, f]``."""
        n, p, f = u.shape[0], self.view.positions, self.view.features
        if self.cells > 1:
            u = u.reshape(n, self.cells, f)
        if u.shape[1] == p:  # in the place's own order in memory, which what pulls it back runs fastest on
            return u.mT.contiguous().mT if self.view.maps else u
        return u.expand(n, p, f) if self.cells == 1 else (u.mT @ self._cells(u).mT).mT

    def unfold(self, t: Tensor) -> Tensor:
        """A tangent of the place as ``B`` sees it, ``[n, g, f]``."""
        r = self.view.unfold(wide(t))
        if self.matched:
            return r
        if self.cells == 1:
            return r.sum(1, keepdim=True) if r.shape[1] > 1 else r
        if self.cells != r.shape[1]:
            r = self._cells(r).mT @ r
        return r.flatten(1)[:, None]

    def mean(self, c: Tensor) -> Tensor:
        """A cotangent of the place in the mean of each cell, ``[n, g, f]``: what ``B e`` is to be like."""
        r = self.unfold(c)
        if self.matched or self.cells == self.view.positions:
            return r
        return (r.unflatten(-1, (self.cells, -1)) / self._cells(r).sum(0)[:, None]).flatten(2)

    def _cells(self, like: Tensor) -> Tensor:
        return _cells(tuple(self.grid), tuple(self.coarse), like.dtype, like.device)

    def foreseen(self, r: Tensor, b: Tensor) -> Tensor:
        """``B^T r``: the output tangent expected of it; broadcasts over the output's positions."""
        out = r.to(b.dtype) @ b  # n g f, f c -> n g c
        return out if self.rank is None else out @ self._mixtures(out).T

    def outer(self, r: Tensor, d: Tensor) -> Tensor:
        """``sum_n r d^T``."""
        if not self.matched and d.shape[1] > 1:
            d = d.mean(1, keepdim=True)
        return r.to(d.dtype).flatten(0, 1).mT @ self._mixed(d).flatten(0, 1)  # (n g) f, (n g) c -> f c

    def _mixed(self, e: Tensor) -> Tensor:
        return e if self.rank is None else e @ self._mixtures(e)

    def _mixtures(self, like: Tensor) -> Tensor:
        assert self.rank is not None
        return _mixtures(self.output.features, self.rank, like.dtype, like.device)


@lru_cache(maxsize=64)
def _cells(grid: Shape, coarse: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Which position is in which cell, ``[p, cells]`` of 0 and 1: products with it are faster than indexing by it."""
    found = torch.zeros(1, dtype=torch.long)
    for size, parts in zip(grid, coarse, strict=True):
        found = (found[:, None] * parts + torch.arange(size) * parts // size).flatten()
    return torch.nn.functional.one_hot(found, numel(coarse)).to(device, dtype)


@lru_cache(maxsize=64)
def _mixtures(features: int, rank: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random signs over ``sqrt(features)``, ``[c, rank]``; always the same ones."""
    signs = torch.randint(0, 2, (features, rank), generator=torch.Generator().manual_seed(features))
    return (2 * signs - 1).to(device, dtype) / features**0.5


class SiteFeedback(FeedbackMap):
    """A site's way to the place where ``B`` predicts: the next matrix site's input, or its own output where none
    follows.

    Attributes:
        is_open: whether examples can be told apart at all.
    """

    def __init__(self, site: Site, output: Output, form: Form) -> None:
        segment, n = site.segment, output.n
        shape = site.shape if segment is None else segment.matrices[0].x_shape
        own = apart(site.layout, site.shape, n)
        layout = own if own.fits(shape, n) else Layout.candidates(shape, n)[0]
        self.is_open = bool(output.views) and n > 1 and Layout.COUPLED not in (own, layout)
        if self.is_open:
            maps = _maps(segment.matrices[0]) if segment is not None else len(shape) > 3
            super().__init__(layout, shape, maps, output, form)

    def pull_back(self, ctx: SiteContext, e: Tensor, b: Tensor) -> Tensor:
        """``M B e``: the predicted cotangent of the site that ``ctx`` is about."""
        u = self.predict(e, b).to(ctx.s.dtype)
        alone = self.view.positions == 1  # elsewhere it may be one row for all positions
        return u if ctx.site.segment is None else ctx.pull_back(u, spent=alone)

    def push_forward(self, ctx: SiteContext, y: Tensor) -> Tensor:
        """``M y`` as ``[n, g, f]``: what ``B`` sees of the guess."""
        return self.unfold(y if ctx.site.segment is None else ctx.push_forward(y))


def apart(layout: Layout, shape: Shape, n: int) -> Layout:
    """The layout; where examples act on each other a little (batch statistics), that of a tensor of this shape."""
    return Layout.candidates(shape, n)[0] if layout is Layout.COUPLED else layout


def by_example(t: Tensor, layout: Layout, n: int) -> Tensor:
    """``[n, -1]``; coupled: ``[1, -1]``."""
    rows = layout.rows(wide(t), n)
    return rows.reshape(len(rows), -1)


def _maps(matrix: Matrix) -> bool:
    return matrix.rule.geometry(matrix.call) != "linear"


def wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
