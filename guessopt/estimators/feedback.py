"""Learned feedback: predict each site's cotangent from the exact error at the output, guess only what is left.

Not in the papers; see docs/learned_feedback.md.

Letters: n example, g group (1, or the output's positions), f feature of a site, c feature of the output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from guessopt.estimators.base import Estimator, describe, make_estimator, register_estimator
from guessopt.estimators.moments import TINY, State, crowd, moments, samples, shrunken, stepped
from guessopt.estimators.places import STRUCTURES, Form, Output, Place, Way, apart, by_example, wide
from guessopt.estimators.stream import Course, stream_places
from guessopt.sites import ForwardRecord, Matrix, Site, SiteGraph, numel
from guessopt.tracing.local import Local

STARTS = ("zero", "random", "weights")

#: Largest amplitude of a guess, in units of the smallest.
LOUDEST = 1e4


@register_estimator("learned_feedback")
@dataclass(frozen=True)
class LearnedFeedback(Estimator):
    """``g^_i = c_i + gamma (e . d) y_i``: a predicted cotangent ``c_i``, and what the guess adds to it.

    ``e`` is the exact error at the network's output and ``d = v' - sum_i B_i^T M_i y_i`` the part of the output's
    tangent that the feedback matrices ``B_i`` did not foresee. After use each ``B_i`` takes a least-mean-squares step
    on ``d``, which needs neither loss nor label. A layer's ``B_{i+1} e`` predicts the cotangent after the *next* matrix
    site, which that site's own transpose takes back: ``c_i = M_i W_{i+1}^T M_{i+1} B_{i+1} e``. Where the way to the
    next matrix site is not elementwise, its pull-back takes the place of ``M_i``. Sites that the loss reads take their
    exact error.

    In a network with a residual stream, found by tracing it, the error is taken back through the head alone and then
    carried along the skips; every block is pulled back by itself. See docs/learned_feedback.md.

    Args:
        guess: any estimator of activation guesses: instance, name or ``{"name": ..., **options}``.
        gamma: 1: a control variate, unbiased where the guess is; 0: the guesses serve to learn ``B`` alone; ``"auto"``:
            per site, by the share of noise in the correction (James-Stein).
        every: a forward-mode pass on one step in so many; the others cost a plain forward pass and use ``c_i``.
        beta: gain of the least-mean-squares steps, as a fraction of a stable one; the first steps take more. 0: ``B``
            stays as it starts.
        structure: ``"position"``: a ``B`` that tells positions apart; ``"shared"``: one for all positions; ``"auto"``:
            in a feature map one for each cell of a 4x4 grid, elsewhere one for all. Where the output has as many
            positions as a site (a language model), each position's error serves that position.
        leak: fraction of ``B`` forgotten in every update.
        clip: largest update, in units of the usual one.
        ahead: how far a prediction is from the site that it serves. 0: none but the site's own activation lies between,
            ``c_i = M_i B_i e``. 1: the next matrix site, as above; in a stream, a block.
        residual: whether to look for a residual stream.
        start: ``"zero"``; ``"random"``: ``N(0, 1 / rows)``; ``"weights"``: the product of the weights as they
            stand, every activation's derivative at its mean. Deviations along a stream begin at zero.
        entries: most entries of a ``B``; a larger one tells fewer positions apart, then reads fixed random mixtures of
            the output's features. None: no bound.

    >>> LearnedFeedback(gamma=1).unbiased, LearnedFeedback(gamma=0).unbiased, LearnedFeedback("w_perp", 1).unbiased
    (True, False, False)
    """

    guess: Any = "activation_perturbation"
    gamma: float | str = "auto"
    every: int = 1
    beta: float = 0.1
    structure: str = "auto"
    leak: float = 1e-3
    clip: float = 5.0
    ahead: int = 1
    residual: bool = True
    start: str = "zero"
    entries: int | None = None

    exact_last: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    per_example_parameters: ClassVar[bool] = False

    def __post_init__(self) -> None:
        guess = make_estimator(self.guess)
        if guess.space != "activations" or guess.learns or guess.debias:
            raise ValueError(
                f"guess: {guess.name} cannot serve here; choose an estimator that guesses activations, without debias"
            )
        object.__setattr__(self, "guess", guess)
        if self.gamma != "auto" and not (isinstance(self.gamma, (int, float)) and 0 <= self.gamma <= 1):
            raise ValueError(f"gamma: the correction's weight must be 0 to 1 or 'auto', got {self.gamma!r}")
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every: steps between forward-mode passes must be at least 1, got {self.every}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta: the gain must be 0 to 1, got {self.beta}")
        if self.structure not in STRUCTURES:
            raise ValueError(f"structure: {self.structure!r} is not one of {', '.join(STRUCTURES)}")
        if not 0 <= self.leak < 1:
            raise ValueError(f"leak: the fraction forgotten must be at least 0 and below 1, got {self.leak}")
        if not self.clip >= 1:
            raise ValueError(f"clip: the largest update must be at least the usual one, 1, got {self.clip}")
        if self.ahead not in (0, 1):
            raise ValueError(
                f"ahead: the matrix sites between a prediction and its site must be 0 or 1, got {self.ahead}"
            )
        if self.start not in STARTS:
            raise ValueError(f"start: {self.start!r} is not one of {', '.join(STARTS)}")
        if self.entries is not None and (not isinstance(self.entries, int) or self.entries < 1):
            raise ValueError(f"entries: the most entries of a feedback matrix must be at least 1, got {self.entries}")

    # --- the guess is another estimator's -----------------------------------------------------------------------------

    @property
    def refresh(self) -> int:  # type: ignore[override]
        refresh: int = self.guess.refresh
        return refresh

    @property
    def prepares(self) -> bool:
        prepares: bool = self.guess.prepares
        return prepares

    @property
    def unbiased(self) -> bool:
        return self.gamma == 1 and self.every == 1 and bool(self.guess.unbiased)

    @property
    def streams(self) -> bool:  # type: ignore[override]
        return self.residual

    def prepare(self, site: Site, weights: list[tuple[Matrix, Tensor]], previous: Any = None) -> Any:
        return self.guess.prepare(site, weights, previous)

    def sample(self, state: Any, local: Local) -> Tensor:
        """The guess at the site's amplitude ``a_i``; ``state``: what was prepared, and what was learned."""
        prepared, learned = state
        y: Tensor = self.guess.sample(prepared, local)
        amplitude = _amplitude(learned)
        return y * amplitude.to(y.dtype) if isinstance(amplitude, Tensor) else y

    def second_moment(self, state: Any, local: Local, g: Tensor) -> Tensor | None:
        """In closed form where the estimate is unbiased; elsewhere it depends on what ``B`` has learned."""
        return g if self.unbiased else None

    def note(self, site: Site) -> str | None:
        note: str | None = self.guess.note(site)
        return note

    def check(self, sites: tuple[Site, ...]) -> None:
        self.guess.check(sites)

    def options(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**own, "guess": describe(self.guess)}

    # --- what preflight tells -----------------------------------------------------------------------------------------

    def forms(self, sites: tuple[Site, ...], graph: SiteGraph) -> dict[int, tuple[str, int]]:
        form = Form(self.structure, self.entries)
        found: dict[int, tuple[str, int]] = {}
        if graph.stream is not None and self.residual:
            places = stream_places({site.index for site in sites}, graph, form)
            kept = {keeper: place for keeper, place in places.values()}
            *blocks, head = graph.stream.blocks
            for number, block in enumerate([*blocks, head], 1):
                text = "exact error" if block is head else f"block {number} of {len(blocks)} by itself"
                for index in block.sites:
                    found[index] = (text + _b_of(kept.get(index)), _bytes(kept.get(index), graph.sites[index]))
            return {site.index: found[site.index] for site in sites if site.index in found}
        output = Output.of_cuts(graph)
        own = {site.index for site in sites}
        for site in sites:
            way = Way(site, output, form)
            following = _following(graph, site) if self.ahead else None
            if not way.is_open:
                found[site.index] = ("no examples: the correction alone", 0)
            elif following is not None and following.index not in own and following.cut is not None:
                found[site.index] = ("exact error through the head" + _b_of(way), _bytes(way, site))
            else:
                ahead = following is not None and following.index in own
                found[site.index] = (("one matrix site ahead" if ahead else "own") + _b_of(way), _bytes(way, site))
        return found

    def reversed_matrices(self, graph: SiteGraph) -> int:
        guess = self.guess.reversed_matrices(graph)
        if graph.stream is None or not self.residual:
            return guess
        return max(guess, *(block.matrices for block in graph.stream.blocks))

    # --- the estimate -------------------------------------------------------------------------------------------------

    def injects(self, step: int) -> bool:
        return step % self.every == 0 and not (self.gamma == self.beta == 0)

    def estimate(
        self, locals: dict[int, Local], record: ForwardRecord, graph: SiteGraph, states: dict[int, Any]
    ) -> tuple[dict[int, Tensor], dict[int, Any]]:
        """Predict, learn from what the prediction missed, correct by the guess."""
        guesses = {index: record.guesses[index] for index in locals if index in record.guesses}
        learned: dict[int, State] = {}
        exact: set[int] = set()
        closed: set[int] = set()
        if graph.stream is not None and self.residual:
            course = Course(set(locals), record, graph, states, Form(self.structure, self.entries), self.ahead)
            found, exact = course.predicted()
            if guesses and self.beta:
                learned = course.learn(beta=self.beta, leak=self.leak, clip=self.clip)
        else:
            plain = _Plain(self, locals, record, graph, states)
            found = plain.predicted()
            learned, closed = plain.fresh, locals.keys() - plain.ways.keys()
            if guesses and self.beta:
                learned = plain.learn(guesses)
        if guesses:
            open_ = {index: y for index, y in guesses.items() if index not in exact}
            self._correct(found, learned, closed, open_, graph, states, _rest(record, graph, found, guesses))
        return found, learned

    def _correct(
        self,
        found: dict[int, Tensor],
        learned: dict[int, State],
        closed: set[int],
        guesses: dict[int, Tensor],
        graph: SiteGraph,
        states: dict[int, Any],
        rest: Tensor,
    ) -> None:
        """Add ``gamma (e . d)_n y_i / a_i^2`` to the predictions. ``closed``: sites that can have none, and take it in
        full; ``rest``: ``(e . d)_n``."""
        n = graph.batch
        for index, y in guesses.items():
            state, layout = states[index], graph.sites[index].layout
            gamma: Any = 1.0 if index in closed else self.gamma
            if gamma == "auto":
                gamma = 1.0 if state is None or "gamma" not in state else state["gamma"]
            elif gamma == 0:
                found.setdefault(index, torch.zeros_like(y))
                continue
            rate = rest / _amplitude(state) ** 2
            correction = y.mul_(layout.spread(rate, tuple(y.shape)).to(y.dtype))
            if self.gamma == "auto" and index not in closed:
                new = learned.setdefault(index, dict(state or {}))
                new["looks"] = 1 if state is None else state.get("looks", 0) + 1
                new |= shrunken(state, by_example(correction, layout, n), new["looks"])
            correction = correction if isinstance(gamma, float) and gamma == 1 else correction.mul_(gamma)
            found[index] = found[index] + correction if index in found else correction


def _b_of(place: Place | None) -> str:
    return "" if place is None else f", B {list(place.b_shape)}"


def _bytes(place: Place | None, site: Site) -> int:
    """Of ``B``, which is float32 at least."""
    return 0 if place is None else numel(place.b_shape) * max(site.dtype.itemsize, 4)


def _amplitude(state: State | None) -> Any:
    return 1.0 if state is None else state.get("amplitude", 1.0)


def _rest(record: ForwardRecord, graph: SiteGraph, predicted: dict[int, Tensor], guesses: dict[int, Tensor]) -> Tensor:
    """``(e . d)_n = D_n - sum_i <c_i[n], y_i[n]>``, ``[N]`` or their sum ``[1]``."""
    rest, n = record.d, graph.batch
    for index, c in predicted.items():
        if index in guesses:
            site = graph.sites[index]
            part = apart(site.layout, site.shape, n).sum_examples(wide(c) * wide(guesses[index]), n)
            rest = rest - part if part.shape == rest.shape else rest.sum().reshape(1) - part.sum()
    return rest


class _Plain:
    """One step without a residual stream: every site has a ``B`` of its own.

    Attributes:
        fresh: states that begin here.
    """

    def __init__(
        self,
        options: LearnedFeedback,
        locals: dict[int, Local],
        record: ForwardRecord,
        graph: SiteGraph,
        states: dict[int, Any],
    ) -> None:
        self.options, self.locals, self.record, self.graph, self.states = options, locals, record, graph, states
        self.output = Output.of_cuts(graph)
        form = Form(options.structure, options.entries)
        ways = {index: Way(local.site, self.output, form, local) for index, local in locals.items()}
        self.ways = {index: way for index, way in ways.items() if way.is_open}
        self.before = {index: _fitting(states[index], way) for index, way in self.ways.items()}
        self.fresh: dict[int, State] = {}
        if options.start != "zero":
            self._start()

    def predicted(self) -> dict[int, Tensor]:
        """``c_i``, where there is a ``B`` to predict by."""
        e = self.output.join(dict(enumerate(self.record.errors)))
        near: dict[int, Tensor] = {}
        for index, way in self.ways.items():
            state = self.before[index]
            if state is not None and e is not None:
                near[index] = way.pull_back(e, state["B"])  # M_i B_i e
        if not self.options.ahead:
            return near
        found = dict(near)
        for index, way in self.ways.items():
            x = self._through_next(way.local, lambda site: near.get(site.index, self._exact(site)))
            if x is not None:
                found[index] = way.local.pull_back(x)
        return found

    def _exact(self, site: Site) -> Tensor | None:
        return self.record.errors[site.cut] if site.cut is not None and site.index not in self.locals else None

    def _through_next(self, local: Local, cotangent: Callable[[Site], Tensor | None]) -> Tensor | None:
        """``W_{i+1}^T c_{i+1}``: a cotangent of the next matrix site's input; None where its output has none."""
        following = _following(self.graph, local.site)
        c = None if following is None else cotangent(following)
        if c is None:
            return None
        m, w = local.weights()[0]
        return m.rule.transpose(m, w, c.to(w.dtype), m.x_shape)

    def _start(self) -> None:
        """Matrices that begin as asked, from the last site to the first; random where no product leads on."""
        for index in sorted(self.ways, reverse=True):
            if self.before[index] is None:
                way, b = self.ways[index], None
                if self.options.start == "weights" and way.rank is None and len(self.output.views) == 1:
                    b = self._product(way)
                if b is None:
                    b = wide(way.local.noise(way.b_shape)) / way.b_shape[0] ** 0.5
                steps = round(1 / self.options.beta) if self.options.beta else 0
                self.before[index] = self.fresh[index] = {
                    "B": b, "steps": steps, "power": b.new_zeros(()), "pairs": b.new_zeros(())
                }  # fmt: skip
        self.fresh = dict(sorted(self.fresh.items()))

    def _product(self, way: Way) -> Tensor | None:
        """``mean_n W_{i+1}^T M_{i+1} B_{i+1}``, column by column; None where the next matrix site has no ``B``."""
        ((cut, view),) = self.output.views.items()
        columns = []
        for k in range(self.output.features):
            e = way.local.s.new_zeros(self.output.n, view.positions, view.features)
            e[..., k] = 1

            def unit(site: Site, e: Tensor = e) -> Tensor | None:
                if site.cut == cut and site.index not in self.locals:
                    return view.fold(e)
                state = self.before.get(site.index)
                return None if state is None else self.ways[site.index].pull_back(e, state["B"])

            x = self._through_next(way.local, unit)
            if x is None:
                return None
            column = way.see(x).mean((0, 1))
            columns.append(column if way.matched else column * (way.cells / way.view.positions))
        return torch.stack(columns, 1)

    def learn(self, guesses: dict[int, Tensor]) -> dict[int, State]:
        """A normalised least-mean-squares step of every ``B`` on ``d = v' - sum_i B_i^T M_i y_i``."""
        d = self.output.join(dict(enumerate(self.record.tangents)))
        if d is None:
            return self.fresh
        options = self.options
        moved = {index: way.push_forward(guesses[index]) for index, way in self.ways.items() if index in guesses}
        for index, r in moved.items():
            state = self.before[index]
            if state is not None:
                d = d - self.ways[index].foreseen(r, state["B"])
        loud = {index: _amplitude(self.before[index]) for index in moved}
        learned = {index: moments(self.before[index], r, loud[index]) for index, r in moved.items()}
        crowded = crowd([(new, moved[index]) for index, new in learned.items()])
        for index, r in moved.items():
            gradient = self.ways[index].outer(r, d) / (samples(r) * loud[index] ** 2)
            learned[index] |= stepped(
                self.before[index], learned[index], gradient, crowded,
                beta=options.beta, leak=options.leak, clip=options.clip,
            )  # fmt: skip
        reach = {index: new["B"].norm() * new["width"].sqrt() for index, new in learned.items()}
        furthest = torch.stack(list(reach.values())).max() if reach else None
        for index, new in learned.items():
            new["amplitude"] = (furthest / reach[index].clamp_min(TINY)).clamp(1, LOUDEST)
        return learned


def _following(graph: SiteGraph, site: Site) -> Site | None:
    """The site that has the cotangent of the next matrix site's output; None where several read its input, or where
    nothing trains there."""
    segment = site.segment
    if segment is None or len(segment.matrices) > 1 or len(segment.matrices[0].weights) > 1:
        return None
    found = next(iter(graph.sites_at.get(segment.matrices[0].call.index, ())), None)
    while found is not None and found.shares is not None:
        found = graph.sites[found.shares]
    return found


def _fitting(state: State | None, way: Way) -> State | None:
    """The state, unless it was learned at another size."""
    return state if state is not None and "B" in state and tuple(state["B"].shape) == way.b_shape else None
