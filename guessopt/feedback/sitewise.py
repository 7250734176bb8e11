"""Learned feedback where every site has a ``B`` of its own: without a residual stream.

A site is served when it is reached or, where its prediction is made one matrix site ahead, when that one is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from guessopt.estimator import LearningStep, Noise
from guessopt.feedback.correction import Correction, Remainder, amplitude
from guessopt.feedback.fitting import Fitting
from guessopt.feedback.maps import Axes, FeedbackMap, Form, Output, SiteFeedback, apart, wide
from guessopt.feedback.updates import TINY, State, fits, moments, normalised, samples, shared_gain, stepped
from guessopt.graph import SiteGraph
from guessopt.layout import Layout
from guessopt.record import ForwardRecord
from guessopt.sites import Site
from guessopt.tracing.context import SiteContext

if TYPE_CHECKING:
    from guessopt.feedback.options import LearnedFeedback

#: Largest amplitude of a guess, in units of the smallest.
MAX_AMPLITUDE = 1e4

#: Most features of the output, each of which takes a pull-back at every site, for ``B`` to begin at the product of the
#: weights, and so to come from weights.
COLUMNS = 128

#: A site's number, its predicted cotangent (None: there is nothing to predict by) and its guess, if it has one.
Shown = tuple[int, "Tensor | None", "Tensor | None"]


@dataclass(frozen=True)
class SitewisePlan:
    """What does not change from step to step.

    ``ways``: of the sites whose examples can be told apart; ``closed``: the others. ``ahead``: by site, the one that
    has the cotangent of the next matrix site's output; ``exact``: the cut that has it. ``products``: the sites from
    which weights, one after another, lead to the output, from the last to the first, whose ``B`` begins at their
    product; ``by_weights``: each ``B`` follows the next one through these weights, and none learns from guesses;
    ``fitted``: the ways of those that do, which are those that predict for another site."""

    output: Output
    ways: dict[int, SiteFeedback]
    closed: frozenset[int]
    ahead: dict[int, int]
    exact: dict[int, int]
    products: list[int]
    by_weights: bool

    @cached_property
    def fitted(self) -> dict[int, FeedbackMap]:
        return {index: self.ways[index] for index in reversed(self.products)} if self.by_weights else {}

    @staticmethod
    def of(
        options: LearnedFeedback, sites: tuple[Site, ...], graph: SiteGraph, by_weights: bool | None = None
    ) -> SitewisePlan:
        """``by_weights``: where ``B`` has come from so far; None: nowhere yet."""
        key = options, tuple(site.index for site in sites), by_weights
        return graph.cached(key, lambda: SitewisePlan._made(options, sites, graph, by_weights))

    @staticmethod
    def _made(
        options: LearnedFeedback, sites: tuple[Site, ...], graph: SiteGraph, by_weights: bool | None
    ) -> SitewisePlan:
        output, form = Output.of_cuts(graph), options.form
        ways, ahead, exact = separable_sites(sites, output, form), dict[int, int](), dict[int, int]()
        closed = frozenset(site.index for site in sites if site.index not in ways)
        for index in ways:
            site = following(graph, graph.sites[index])
            if site is not None and site.index in ways:
                ahead[index] = site.index
            elif site is not None and site.index not in closed and site.cut is not None:
                exact[index] = site.cut
        products: list[int] = []
        if len(output.views) == 1 and output.features <= COLUMNS:
            for index in sorted(ways, reverse=True):
                leads = exact.get(index) in output.views or ahead.get(index) in products
                if leads and ways[index].rank is None:
                    products.append(index)
        whole = not closed and len(products) == len(ways)
        by_weights = options.takes_weights(graph, whole) if by_weights is None else by_weights and whole
        if by_weights and form.structure == "auto":
            ways = separable_sites(sites, output, Form("position", form.entries))
        if by_weights:
            products = [index for index in products if index in ahead.values()]
        return SitewisePlan(output, ways, closed, ahead, exact, products, by_weights)


def separable_sites(sites: Iterable[Site], output: Output, form: Form) -> dict[int, SiteFeedback]:
    """Of the sites whose examples can be told apart."""
    every = ((site.index, SiteFeedback(site, output, form)) for site in sites)
    return {index: way for index, way in every if way.is_open}


class Sitewise(LearningStep):
    """One step."""

    def __init__(
        self,
        options: LearnedFeedback,
        sites: tuple[Site, ...],
        graph: SiteGraph,
        states: dict[int, Any],
        noise: Noise,
    ) -> None:
        self.options, self.graph, self.noise = options, graph, noise
        own = next((state for state in states.values() if state is not None and "B" in state), None)
        self.chart = SitewisePlan.of(options, sites, graph, None if own is None else "power" not in own)
        graph.cached_results["by weights", options] = self.chart.by_weights
        self.before = {
            index: state if fits(state := states[index], way.b_shape, self.chart.by_weights) else None
            for index, way in self.chart.ways.items()
        }
        self.correction = Correction(options.gamma, graph, states, self.chart.closed)
        self.fitting = Fitting(options, self.chart.fitted, self.before)
        self.fresh: dict[int, State] = {}
        self.uninitialised = [k for k in self.chart.products if self._is_new(k)] if options.start == "weights" else []
        if options.start == "random" or (options.start == "weights" and not options.beta):
            self._draw()
        self.moments: dict[int, State] = {}
        self.samples: dict[int, int] = {}
        self.moved: dict[int, Tensor] = {}
        self.steps: dict[int, State] = {}
        self.q: Any = 0
        self.guessed = False
        self.unseen = deque[tuple[SiteContext, Tensor]]()
        self.open()

    # --- all at once ---

    def estimate(
        self, contexts: dict[int, SiteContext], record: ForwardRecord, consume: Callable[[dict[int, Tensor]], None]
    ) -> dict[int, Tensor]:
        for index in tuple(self.uninitialised):
            ahead = self.chart.ahead.get(index)
            self._initialise(contexts[index], None if ahead is None else contexts[ahead])
        guesses = {index: record.guesses[index] for index in contexts if index in record.guesses}
        for index, y in guesses.items():
            self._see(contexts[index], y, keep=True)
        self.close(record)
        if not self.subtracts:
            for index in guesses:
                del record.guesses[index]
            self._spend(contexts, guesses, consume)
            return {}
        known = [each for index, ctx in contexts.items() for each in self._predicted(ctx, guesses.get(index))]
        for each in known:
            self._subtract_explained(*each)
        for index in guesses:
            self._learn(contexts[index], guesses[index])
        found = ((index, self._corrected(index, c, y)) for index, c, y in known)
        return {index: c for index, c in found if c is not None}

    def _spend(
        self, contexts: dict[int, SiteContext], guesses: dict[int, Tensor], consume: Callable[[dict[int, Tensor]], None]
    ) -> None:
        """Serve each site and forget it; gradients add up in the order of the calls."""
        order, known = deque(contexts), dict[int, Tensor | None]()
        for index in tuple(contexts):
            known |= self.cotangents(contexts.pop(index), guesses.pop(index, None))
            while order and order[0] in known:
                c = known.pop(order[0])
                if c is not None:
                    consume({order[0]: c})
                order.popleft()

    # --- site by site ---

    def observe(self, ctx: SiteContext, y: Tensor) -> None:
        """Where the network's own draws lie ahead, at once when these have been made."""
        self.unseen.append((ctx.held() if self.unseen or ctx.awaits_draws else ctx, y))
        self._see_drawn()

    def _see_drawn(self) -> None:
        while self.unseen and not self.unseen[0][0].awaits_draws:
            self._see(*self.unseen.popleft(), keep=False)

    def _see(self, ctx: SiteContext, y: Tensor, keep: bool) -> None:
        """Add what the site's ``B`` foresees of its guess; look at the guess as its ``B`` does."""
        self.guessed, index = True, ctx.site.index
        way = self.chart.ways.get(index)
        if way is None or self.chart.by_weights or not self.options.beta:
            return
        state, r = self.before[index], way.push_forward(ctx, y)
        if state is not None:
            self.q = self.q + way.foreseen(r, state["B"])
        self.moments[index] = moments(state, r, amplitude(state))
        self.samples[index] = samples(r)
        if keep:
            self.moved[index] = r

    def close(self, record: ForwardRecord) -> None:
        for ctx, y in self.unseen:
            self._see(ctx, y, keep=False)
        self.unseen.clear()
        self.errors, self.remainder = record.errors, Remainder(record.d)
        self.e = self.chart.output.join(dict(enumerate(record.errors)))
        tangent = self.chart.output.join(dict(enumerate(record.tangents))) if self.moments else None
        if tangent is None:
            self.moments = {}
        else:
            self.d = tangent - self.q
            self.crowded = shared_gain([(new, self.samples[index]) for index, new in self.moments.items()])

    @property
    def subtracts(self) -> bool:
        return self.guessed and (self.options.gamma != 0 or bool(self.chart.closed))

    def open(self) -> None:
        self.waiting: dict[int, list[tuple[SiteContext, Tensor | None]]] = {}

    def subtract(self, ctx: SiteContext, y: Tensor | None) -> None:
        for each in self._predicted(ctx, y):
            self._subtract_explained(*each)

    def cotangents(self, ctx: SiteContext, y: Tensor | None) -> dict[int, Tensor | None]:
        if y is not None:
            self._learn(ctx, y)
        return {index: self._corrected(index, c, y) for index, c, y in self._predicted(ctx, y)}

    def _predicted(self, ctx: SiteContext, y: Tensor | None) -> list[Shown]:
        """The sites whose ``c_i`` are known now: those that have waited for this one, and itself, unless it waits."""
        index, chart = ctx.site.index, self.chart
        ahead, cut = (chart.ahead.get(index), chart.exact.get(index)) if self.options.ahead else (None, None)
        ahead = None if ahead is None or self.before[ahead] is None else ahead
        served, state, c = self.waiting.pop(index, ()), self.before.get(index), None
        found: list[Shown] = []
        if state is not None and (served or (ahead is None and cut is None)):
            assert self.e is not None
            c = chart.ways[index].pull_back(ctx, self.e, state["B"])  # M_i B_i e
            found += [(each.site.index, self._through_next(each, c), guess) for each, guess in served]
        if ahead is not None:
            self.waiting.setdefault(ahead, []).append((ctx.held(), y))
        elif cut is not None:
            found.append((index, self._through_next(ctx, self.errors[cut]), y))
        else:
            found.append((index, c, y))
        return found

    def _through_next(self, ctx: SiteContext, c: Tensor) -> Tensor:
        """``M_i W_{i+1}^T c_{i+1}``; what ``B_i`` follows lies on the way."""
        u, index = _before_next(ctx, c), ctx.site.index
        if index in self.chart.fitted and index not in self.fresh:
            assert self.e is not None
            self.fresh[index], _ = self.fitting.step(index, self.e, self.chart.ways[index].mean(u))
        return ctx.pull_back(u, spent=True)

    def _subtract_explained(self, index: int, c: Tensor | None, y: Tensor | None) -> None:
        if c is not None and y is not None:
            self.remainder.subtract_explained(c, y, self.graph.sites[index], self.graph.batch)

    def _corrected(self, index: int, c: Tensor | None, y: Tensor | None) -> Tensor | None:
        return c if y is None else self.correction.of(index, c, y, self.remainder.value)

    def _learn(self, ctx: SiteContext, y: Tensor) -> None:
        """A normalised least-mean-squares step of the site's ``B`` on ``d = v' - sum_i B_i^T M_i y_i``."""
        index, options = ctx.site.index, self.options
        if index not in self.moments or index in self.steps:
            return
        way, state, new = self.chart.ways[index], self.before[index], self.moments[index]
        r = self.moved.pop(index) if index in self.moved else way.push_forward(ctx, y)
        gradient = way.outer(r, self.d) / (self.samples[index] * amplitude(state) ** 2)
        gain = normalised(new, self.crowded, options.beta)
        self.steps[index] = new | stepped(state, new["steps"], gradient, gain, leak=options.leak, clip=options.clip)

    def learned(self) -> dict[int, Any]:
        reach = {index: new["B"].norm() * new["width"].sqrt() for index, new in self.steps.items()}
        furthest = torch.stack(list(reach.values())).max() if reach else None
        steps = {
            index: new | {"amplitude": (furthest / reach[index].clamp_min(TINY)).clamp(1, MAX_AMPLITUDE)}
            for index, new in self.steps.items()
        }
        return self.correction.together(dict(sorted((self.fresh | steps).items())))

    # --- how B begins ---

    @property
    def needs_init(self) -> bool:
        return bool(self.uninitialised)

    def begin(self, ctx: SiteContext, y: Tensor | None) -> None:
        """One matrix site further back in each pass: forwards, the last comes last."""
        index, ahead = ctx.site.index, self.chart.ahead.get(ctx.site.index)
        for each, _ in self.waiting.pop(index, ()):
            self._initialise(each, ctx)
        if index in self.uninitialised:
            if ahead is None:
                self._initialise(ctx, None)
            elif not self._is_new(ahead):
                self.waiting.setdefault(ahead, []).append((ctx.held(), None))

    def _initialise(self, ctx: SiteContext, ahead: SiteContext | None) -> None:
        self.uninitialised.remove(ctx.site.index)
        self._begin(ctx.site.index, self._product(ctx, ahead))

    def _is_new(self, index: int) -> bool:
        return self.before[index] is None

    def _begin(self, index: int, b: Tensor) -> None:
        state: State = {"B": b, "steps": round(1 / self.options.beta) if self.options.beta else 0}
        if not self.chart.by_weights:
            state |= {"power": b.new_zeros(()), "pairs": b.new_zeros(())}
        self.before[index] = self.fresh[index] = state

    def _draw(self) -> None:
        """At random; where weights are wanted and nothing will be learned, wherever no product leads."""
        for index in sorted(self.before, reverse=True):
            if self._is_new(index) and index not in self.uninitialised:
                shape = self.chart.ways[index].b_shape
                self._begin(index, wide(self.noise(self.graph.sites[index], shape)) / shape[0] ** 0.5)

    def _product(self, ctx: SiteContext, ahead: SiteContext | None) -> Tensor:
        """``W_{i+1}^T mean_n M_{i+1} B_{i+1}``, column by column; ``ahead``: site i + 1, None where it is the head."""
        way, n = self.chart.ways[ctx.site.index], self.chart.output.n
        view, columns = self._columns(ahead, wide(ctx.s))
        few = view.layout is way.view.layout is Layout.BATCH_FIRST
        found = []
        for some in columns.split(n):  # each in an example's place
            if few:
                c = view.of(len(some)).fold(some)
                u = _padded(_before_next(ctx, c, len(some)), n)
            else:
                u = _before_next(ctx, view.fold(_padded(some, n)))
            found.append(way.unfold(u)[: len(some)].mean(1))
        b = torch.cat(found).T
        return (b if way.matched else b * (way.cells / way.view.positions)).contiguous()

    def _columns(self, ahead: SiteContext | None, like: Tensor) -> tuple[Axes, Tensor]:
        """``mean_n M_{i+1} B_{i+1}`` as ``[c, p, f]``, and how site i + 1's output is seen so."""
        output = self.chart.output
        ((_, last),) = output.views.items()
        c = output.features
        if ahead is None:
            unit = torch.eye(c, dtype=like.dtype, device=like.device)
            return last, unit[:, None].expand(c, last.positions, c)
        state, way = self.before[ahead.site.index], self.chart.ways[ahead.site.index]
        assert state is not None
        b = state["B"]
        if ahead.is_elementwise and way.view.shape == tuple(ahead.s.shape):
            u, m = way.spread(b.T[:, None]), ahead.derivative()
            return way.view, u if m is None else u * way.view.unfold(m).to(u.dtype).mean(0)
        view = Axes(apart(ahead.site.layout, ahead.site.shape, output.n), ahead.site.shape, output.n, False)
        columns, ahead = [], ahead.held(several=True)
        for k in range(c):
            e = b.new_zeros(output.n, last.positions, c)
            e[..., k] = 1
            columns.append(view.unfold(wide(way.pull_back(ahead, e, b))).mean(0))
        return view, torch.stack(columns)


def _padded(t: Tensor, n: int) -> Tensor:
    """``n`` examples, the last ones zero."""
    return t if len(t) == n else torch.cat([t, t.new_zeros(n - len(t), *t.shape[1:])])


def following(graph: SiteGraph, site: Site) -> Site | None:
    """The site that has the cotangent of the next matrix site's output; None where several read its input, or where
    nothing trains there."""
    segment = site.segment
    if segment is None or len(segment.matrices) > 1 or len(segment.matrices[0].weights) > 1:
        return None
    found = next(iter(graph.sites_at.get(segment.matrices[0].call.index, ())), None)
    while found is not None and found.shares is not None:
        found = graph.sites[found.shares]
    return found


def _before_next(ctx: SiteContext, c: Tensor, n: int | None = None) -> Tensor:
    """``W_{i+1}^T c_{i+1}``: the cotangent of the next matrix site's input from that of its output (``n`` examples)."""
    m, w = ctx.weights()[0]
    return m.rule.transpose(m, w, c.to(w.dtype), m.x_shape if n is None else (n, *m.x_shape[1:]))
