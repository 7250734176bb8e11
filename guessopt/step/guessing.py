"""The guesses of a run. Each guess is made when the run reaches its site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from guessopt.engine.forward import GuessAt
from guessopt.ops.cached import CachedCall
from guessopt.record import ForwardRecord, Guess
from guessopt.rng import NoiseSource
from guessopt.sites import ParallelSites, Site
from guessopt.step.estimation import Estimation
from guessopt.step.plan import Assignment, Plan
from guessopt.tracing.context import ParallelContext, SiteContext, centred, draw
from guessopt.tracing.functions import NoGrad
from guessopt.tracing.subgraph import Random


@dataclass
class DrawContext:
    """The guesses of one run: how many, and from which random stream.

    Attributes:
        count: K, guesses at each site.
        source: the random stream of the guesses.
        known: by call, results of calls evaluated early; None if the run cannot use them.
        joined: by site, guesses that were made together with the guess of an earlier parallel site.
        contexts: by site, its ``SiteContext``, for estimators that learn.
        random: by call, the random state before the network draws there, for estimators that learn.
    """

    count: int
    source: NoiseSource
    known: dict[int, CachedCall] | None = None
    joined: dict[int, Tensor] = field(default_factory=dict)
    contexts: dict[int, SiteContext] = field(default_factory=dict)
    random: Random = field(default_factory=dict)


def guesses_of(est: Estimation, plan: Plan, drawing: DrawContext) -> GuessAt:
    """The function that a run calls at each site; see ``guess_at``."""
    return lambda site, s, values: guess_at(est, plan, drawing, site, s, values)


def guess_at(
    est: Estimation, plan: Plan, drawing: DrawContext, site: Site, s: Tensor, values: dict[int, Tensor]
) -> Guess | None:
    """The guess for a site whose output is ``s`` (``[K, *shape]`` for K > 1); None if the site gets no guess.

    Args:
        values: by value, the tensors that the run has kept.
    """
    found = est.assignments(plan).get(site.index)
    if found is None:
        return None
    if site.index in drawing.joined:
        return Guess(drawing.joined.pop(site.index))
    estimator, several, joint = found.estimator, drawing.count > 1, plan.joints.get(site.index)
    ctx = _context(drawing, found, joint, site, s, values)
    if estimator.learns:
        ctx = lasting(ctx, values, drawing.source)
        drawing.contexts[site.index] = ctx.replaying(drawing.random) if drawing.random else ctx
        if not estimator.injects(est.steps, plan.graph):
            return None
    if 0 in site.shape:  # an expert that receives no token
        return Guess(s.new_zeros((drawing.count, *site.shape) if several else site.shape))
    if site.by_parameter and estimator.per_example_parameters:
        return Guess(directions=_directions_at(drawing, estimator.noise, site, ctx))
    with NoGrad():
        return _sampled(est, drawing, found, joint, site, ctx)


def _context(
    drawing: DrawContext,
    found: Assignment,
    joint: ParallelSites | None,
    site: Site,
    s: Tensor,
    values: dict[int, Tensor],
) -> SiteContext:
    known, several = None if found.estimator.learns else drawing.known, drawing.count > 1
    if joint is not None:
        return ParallelContext(joint, site, s, values, drawing.source, several=several, cached=known)
    return SiteContext(site, s, values, drawing.source, several=several, cached=known)


def _directions_at(drawing: DrawContext, noise: str, site: Site, ctx: SiteContext) -> list[Tensor]:
    """A direction for each parameter of the site: ``[N, *shape]``, or ``[K, N, *shape]`` for K > 1."""
    kind, count = centred(noise), drawing.count
    drawn = [[ctx.noise(shape, kind) for shape in site.direction_shapes] for _ in drawing.source.guess_indices(count)]
    return [stacked(each, count) for each in zip(*drawn, strict=True)]


def _sampled(
    est: Estimation,
    drawing: DrawContext,
    found: Assignment,
    joint: ParallelSites | None,
    site: Site,
    ctx: SiteContext,
) -> Guess:
    """K samples of the estimator, as one ``Guess``."""
    estimator, count = found.estimator, drawing.count
    state = est.prepared(site, estimator, ctx, found.prepared)
    if estimator.learns:
        state = (state, est.cache.peek(found.learned))
    made = (_typed(estimator.sample(state, ctx), ctx.s) for _ in drawing.source.guess_indices(count))
    if joint is not None:
        each_site = zip(joint.sites, *made, strict=True)
        drawing.joined |= {index: stacked(ys, count) for index, *ys in each_site}
        return Guess(drawing.joined.pop(site.index))
    ys = stacked(made if site.reach is None else map(site.reach.restrict, made), count)
    if not estimator.debias:
        return Guess(ys)
    each = ys if count > 1 else [ys]
    return Guess(ys, stacked((_typed(estimator.correct(state, ctx, y), ctx.s) for y in each), count))


def directions(est: Estimation, count: int, source: NoiseSource) -> dict[int, Tensor]:
    """Guesses for the parameters whose estimator guesses parameters, by position; ``[K, ...]`` for K > 1."""
    found: dict[int, Tensor] = {}
    for position, p in est.by_position.items():
        estimator = est.estimators[position]
        if estimator.space == "parameters":
            vs = (draw(source, estimator.noise, tuple(p.shape), p.dtype, p.device) for _ in source.guess_indices(count))
            amplitude = est.amplitudes[estimator]
            found[position] = stacked(vs, count) if amplitude == 1 else stacked(vs, count).mul_(amplitude)
    return found


# --- the guesses of an earlier run, once more -------------------------------------------------------------------------


def again(est: Estimation, noise: Any, count: int = 1, index: int = 0) -> tuple[NoiseSource, dict[int, Tensor]]:
    """Begin to make the guesses of an earlier run again.

    Args:
        noise: the random stream's state before the earlier run.
        count: K.
        index: the number of the earlier run's first guess.

    Returns:
        The random stream, ready for the first site; and the guesses for parameters, by position.
    """
    source = NoiseSource(est.noise.seed)
    source.restore(noise)
    source.guess_index = index
    return source, directions(est, count, source)


def guessed_again(
    est: Estimation, plan: Plan, record: ForwardRecord, before: Any, index: int
) -> tuple[GuessAt, Mapping[int, Tensor]]:
    """The guesses of a run once more: at the sites, and for parameters by position. Of K guesses, the first. Guesses
    that the record has kept are used; if some are missing, all are made again."""
    directed = {saved.call.index: saved.directions for saved in record.saved_calls if saved.directions is not None}
    covered = {s.index for c in directed for s in plan.graph.sites_at[c]} | record.guesses.keys()
    if covered >= est.assignments(plan).keys() and not any(e.debias for e in est.estimators):
        several = record.count > 1

        def kept(site: Site, s: Tensor, values: dict[int, Tensor]) -> Guess | None:
            y = record.guesses.get(site.index)
            if y is not None:
                return Guess(y[0] if several else y)
            vs = directed.get(site.call.index)
            return None if vs is None else Guess(directions=[v[0] if several else v for v in vs])

        return kept, {p: v[0] if several else v for p, v in record.params.items()}
    source, found = again(est, before, 1, index)
    drawing = DrawContext(1, source)
    return forgetting(guesses_of(est, plan, drawing), drawing), found


def white_noise(
    est: Estimation, plan: Plan, record: ForwardRecord, before: Any, index: int
) -> tuple[GuessAt, Mapping[int, Tensor]]:
    """White noise in place of a run's guesses. The noise is equal in every run: it does not depend on the network."""
    source, found = again(est, before, 1, index)
    guessed = est.assignments(plan).keys()

    def noise(site: Site, s: Tensor, values: dict[int, Tensor]) -> Guess | None:
        if site.index not in guessed or 0 in s.shape:
            return None
        y = draw(source, "normal", tuple(s.shape), s.dtype, s.device)
        return Guess(y if site.reach is None else site.reach.restrict(y))

    return noise, found


def forgetting(guess: GuessAt, drawing: DrawContext) -> GuessAt:
    """``guess``, followed by clearing the contexts that it leaves in ``drawing.contexts``."""

    def forgetting(site: Site, s: Tensor, values: dict[int, Tensor]) -> Guess | None:
        made = guess(site, s, values)
        drawing.contexts.clear()
        return made

    return forgetting


# --- tensors ----------------------------------------------------------------------------------------------------------


def lasting(ctx: SiteContext, values: dict[int, Tensor], source: NoiseSource) -> SiteContext:
    """A site's context, with copies of the tensors that the closure may later write in place."""
    site, segment = ctx.site, ctx.site.segment
    if segment is not None and any(call.in_place for call in segment.program):
        needed = {v for call in segment.program for v in call.inputs if v in values}
        values = {**values, **{v: values[v].clone() for v in needed}}
    elif not site.overwritten:
        return ctx
    return SiteContext(site, ctx.s.clone(), values, source)


def _typed(y: Any, s: Tensor) -> Any:
    """The guess in the dtype of the site's output. (The next weight may have another dtype.)"""
    return y.to(s.dtype) if isinstance(y, Tensor) and y.dtype is not s.dtype else y


def stacked(guesses: Iterable[Tensor], count: int) -> Tensor:
    """A single guess as it is; K guesses as one tensor ``[K, ...]``."""
    if count == 1:
        (only,) = guesses
        return only
    stack: Tensor | None = None
    for k, guess in enumerate(guesses):
        stack = guess.new_empty(count, *guess.shape) if stack is None else stack
        stack[k].copy_(guess)
    assert stack is not None
    return stack
