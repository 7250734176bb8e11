"""The first ``B`` of each site: the product of the weights as they stand, or random numbers.

    B_i = W_{i+1}^T mean_n M_{i+1} B_{i+1}

Letters: n example, p position, f feature of a tensor, c feature of the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from guessopt.feedback.maps import Axes, example_layout
from guessopt.feedback.options import FeedbackOptions
from guessopt.feedback.sitewise_plan import SitewisePlan
from guessopt.feedback.updates import State
from guessopt.graph import SiteGraph
from guessopt.layout import Layout
from guessopt.learning import Noise
from guessopt.linalg import wide
from guessopt.tracing.context import SiteContext


class Initialisation:
    """The first states of one step's sites.

    Random numbers are drawn at once. Products of weights go from the last site to the first: a site waits until the
    next one has its ``B``, one site further back in each pass.

    Args:
        before: the states, by site index; first states are put here.

    Attributes:
        uninitialised: the sites that have yet to begin at a product of weights, from the last to the first.
        states: the first states, by site index.
    """

    def __init__(
        self,
        options: FeedbackOptions,
        graph: SiteGraph,
        plan: SitewisePlan,
        before: dict[int, State | None],
        noise: Noise,
    ) -> None:
        self.options, self.plan, self.before = options, plan, before
        self.states: dict[int, State] = {}
        self.uninitialised = [k for k in plan.products if before[k] is None] if options.start == "weights" else []
        if options.start == "random" or (options.start == "weights" and not options.beta):
            self._draw(graph, noise)
        self.open()

    def open(self) -> None:
        """A pass begins."""
        self._waiting: dict[int, list[SiteContext]] = {}

    def tell(self, ctx: SiteContext) -> None:
        """A pass has reached a site."""
        index, ahead = ctx.site.index, self.plan.next_site.get(ctx.site.index)
        for waiting in self._waiting.pop(index, ()):
            self.at_product(waiting, ctx)
        if index in self.uninitialised:
            if ahead is None:
                self.at_product(ctx, None)
            elif self.before[ahead] is not None:
                self._waiting.setdefault(ahead, []).append(ctx.held())

    def at_product(self, ctx: SiteContext, ahead: SiteContext | None) -> None:
        """Begin at the product of weights; ``ahead``: the next site, None before the head."""
        self.uninitialised.remove(ctx.site.index)
        self._begin(ctx.site.index, self._product(ctx, ahead))

    def _begin(self, index: int, b: Tensor) -> None:
        state: State = {"B": b, "steps": round(1 / self.options.beta) if self.options.beta else 0}
        if not self.plan.by_weights:
            state |= {"power": b.new_zeros(()), "pairs": b.new_zeros(())}
        self.before[index] = self.states[index] = state

    def _draw(self, graph: SiteGraph, noise: Noise) -> None:
        """``N(0, 1 / rows)`` for every site without a state that does not begin at a product."""
        for index in sorted(self.before, reverse=True):
            if self.before[index] is None and index not in self.uninitialised:
                shape = self.plan.maps[index].b_shape
                self._begin(index, wide(noise(graph.sites[index], shape)) / shape[0] ** 0.5)

    def _product(self, ctx: SiteContext, ahead: SiteContext | None) -> Tensor:
        """``W_{i+1}^T mean_n M_{i+1} B_{i+1}``, column by column: each takes the place of an example."""
        map_, n = self.plan.maps[ctx.site.index], self.plan.output.n
        axes, columns = self._columns(ahead, wide(ctx.s))
        examples_first = axes.layout is map_.axes.layout is Layout.BATCH_FIRST
        found = []
        for some in columns.split(n):
            if examples_first:
                c = axes.for_examples(len(some)).fold(some)
                u = _padded(before_next(ctx, c, len(some)), n)
            else:
                u = before_next(ctx, axes.fold(_padded(some, n)))
            found.append(map_.unfold(u)[: len(some)].mean(1))
        b = torch.cat(found).T
        return (b if map_.matched else b * (map_.cells / map_.axes.positions)).contiguous()

    def _columns(self, ahead: SiteContext | None, like: Tensor) -> tuple[Axes, Tensor]:
        """``mean_n M_{i+1} B_{i+1}`` as ``[c, p, f]``, and the axes of site i + 1's output."""
        output = self.plan.output
        ((_, last),) = output.axes.items()
        c = output.features
        if ahead is None:
            unit = torch.eye(c, dtype=like.dtype, device=like.device)
            return last, unit[:, None].expand(c, last.positions, c)
        state, map_ = self.before[ahead.site.index], self.plan.maps[ahead.site.index]
        assert state is not None
        b = state["B"]
        if ahead.is_elementwise and map_.axes.shape == tuple(ahead.s.shape):
            u, m = map_.spread(b.T[:, None]), ahead.derivative()
            return map_.axes, u if m is None else u * map_.axes.unfold(m).to(u.dtype).mean(0)
        axes = Axes(example_layout(ahead.site.layout, ahead.site.shape, output.n), ahead.site.shape, output.n, False)
        columns, ahead = [], ahead.held(several=True)
        for k in range(c):
            e = b.new_zeros(output.n, last.positions, c)
            e[..., k] = 1
            columns.append(axes.unfold(wide(map_.pull_back(ahead, e, b))).mean(0))
        return axes, torch.stack(columns)


def _padded(t: Tensor, n: int) -> Tensor:
    """``n`` examples, the last ones zero."""
    return t if len(t) == n else torch.cat([t, t.new_zeros(n - len(t), *t.shape[1:])])


def before_next(ctx: SiteContext, c: Tensor, n: int | None = None) -> Tensor:
    """``W_{i+1}^T c``: from the cotangent of the next matrix site's output to that of its input.

    Args:
        n: the number of examples in ``c``; None: as many as in the batch.
    """
    m, w = ctx.weights()[0]
    return m.rule.transpose(m, w, c.to(w.dtype), m.x_shape if n is None else (n, *m.x_shape[1:]))
