"""Estimators that learn: their ``LearningStep``, their extra runs, and the states that they keep for the next step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from guessopt.engine.forward import ForwardRun, GuessAt
from guessopt.engine.jvp.base import JvpEngine
from guessopt.engine.jvp.primal import BlockVjpRun, LossGradRun, PrimalRun
from guessopt.engine.transaction import Transaction
from guessopt.errors import ClosureError
from guessopt.estimator import Estimator
from guessopt.feedback.updates import sound
from guessopt.graph import SiteGraph
from guessopt.layout import Shape
from guessopt.learning import LearningStep
from guessopt.ops.drawing import draws_now
from guessopt.record import ForwardRecord, Guess, SavedCall
from guessopt.rng import RandomState
from guessopt.sites import Site
from guessopt.step.estimation import Estimation
from guessopt.step.guessing import DrawContext, again, guesses_of
from guessopt.step.plan import Plan
from guessopt.tracing.context import SiteContext, draw
from guessopt.tracing.functions import without_autocast
from guessopt.tracing.subgraph import Random, walked

#: A method of a ``LearningStep`` that takes a site's context and guess (None: no guess).
Shown = Callable[[SiteContext, Any], Any]


def begin_learning(est: Estimation, plan: Plan) -> dict[Estimator, LearningStep]:
    """A ``LearningStep`` for each estimator that learns, with the states that the estimator has learned so far."""
    assigned = est.assignments(plan)
    sites: dict[Estimator, list[Site]] = {}
    for index, found in assigned.items():
        if found.estimator.learns:
            sites.setdefault(found.estimator, []).append(plan.graph.sites[index])

    def noise(site: Site, shape: Shape) -> Tensor:
        return draw(est.noise, "normal", shape, site.dtype, est.params[site.params[0]].device)

    return {
        estimator: estimator.learning_step(
            tuple(own), plan.graph, {site.index: est.cache.peek(assigned[site.index].learned) for site in own}, noise
        )
        for estimator, own in sites.items()
    }


def learn(est: Estimation, plan: Plan, record: ForwardRecord) -> None:
    """Store the states that the estimators have learned in this step. A batch with numbers that are not finite changes
    no state."""
    assigned = est.assignments(plan)
    finite = None if est.check_finite or not record.learning_steps else _all_finite(record)
    for learning_step in record.learning_steps.values():
        for index, state in learning_step.learned().items():
            key = assigned[index].learned
            if finite is not None:
                state = sound(state, est.cache.peek(key), finite)
            if state is not None:
                est.cache.put(key, est.steps, state)


def _all_finite(record: ForwardRecord) -> Tensor:
    """Whether the loss, the errors and the directional derivatives are finite: a boolean scalar tensor."""
    parts = (record.loss, record.d, *record.errors)
    return torch.isfinite(torch.stack([t.detach().sum().to(record.loss) for t in parts]).sum())


def learned_cotangents(
    est: Estimation, plan: Plan, record: ForwardRecord, consume: Callable[[dict[int, Tensor]], None] | None = None
) -> dict[int, Tensor]:
    """The cotangents that learning estimators form, by site index. The states learned here serve from the next step on.

    Args:
        consume: takes cotangents as soon as they are formed; the result is then without them. None: return all.
    """
    formed: dict[int, Tensor] = {}
    assigned = est.assignments(plan)
    for estimator, learning_step in record.learning_steps.items():
        own = [index for index in record.contexts if assigned[index].estimator == estimator]
        contexts = {index: record.contexts.pop(index) for index in own}
        with torch.no_grad(), without_autocast(record.errors[0]):
            formed |= learning_step.estimate(contexts, record, consume or formed.update)
    learn(est, plan, record)
    return formed


# --- showing sites, one by one ----------------------------------------------------------------------------------------


def shown(
    est: Estimation,
    plan: Plan,
    learning_steps: Mapping[Estimator, LearningStep],
    methods: Mapping[Estimator, Shown],
    drawing: DrawContext,
    *,
    replaces: bool,
) -> GuessAt:
    """The guesses of a run in which each learning estimator's method is called with a site's context and guess. The
    context is dropped after the call.

    Args:
        methods: by estimator. A learning estimator without a method makes no guess.
        replaces: whether the cotangents that the method returns replace the guess.
    """
    assigned, guess = est.assignments(plan), guesses_of(est, plan, drawing)
    for learning_step in learning_steps.values():
        learning_step.open()

    def show(site: Site, s: Tensor, values: dict[int, Tensor]) -> Guess | None:
        estimator = assigned[site.index].estimator if site.index in assigned else None
        if estimator is None or estimator not in learning_steps:
            return guess(site, s, values)
        if estimator not in methods:
            return None
        made = guess(site, s, values)
        with torch.no_grad(), without_autocast(s):
            found = methods[estimator](drawing.contexts.pop(site.index), None if made is None else made.y)
        if not replaces:
            return made
        return None if found is None else Guess(cotangents=found)

    return show


def show_sites(
    est: Estimation,
    plan: Plan,
    learning_steps: Mapping[Estimator, LearningStep],
    methods: Mapping[Estimator, Shown],
    noise: Any,
    closure: Callable[[], Any],
    transaction: Transaction,
    random: Random,
) -> None:
    """An extra run, for estimators that must see all sites before they can guess or predict at any of them."""
    source, found = again(est, noise)
    drawing = DrawContext(1, source, random=random)
    guess = shown(est, plan, learning_steps, methods, drawing, replaces=True)
    plain_run(est, plan, transaction, guess, found).run(closure)


def find_draws(
    est: Estimation,
    plan: Plan,
    closure: Callable[[], Any],
    transaction: Transaction,
    random: dict[int, RandomState | None],
) -> None:
    """An extra run that fills ``random``: by call, the random state before the network draws there."""
    run = plain_run(est, plan, transaction)
    run.random = random
    run.run(closure)
    transaction.rewind()


def plain_run(
    est: Estimation,
    plan: Plan,
    transaction: Transaction,
    guess: GuessAt = lambda *_: None,
    directions: Mapping[int, Tensor] | None = None,
) -> ForwardRun:
    """A run without tangents. It keeps no inputs and no guesses."""
    engine = PrimalRun(frozen_statistics=est.frozen_statistics)
    return ForwardRun(est.ids, plan.graph, engine, guess, directions or {}, transaction, keeps=False)


# --- steps without guesses --------------------------------------------------------------------------------------------


def makes_no_guess(est: Estimation, plan: Plan) -> bool:
    """Whether this step needs no guess: every estimator learns, and predicts without a guess in this step."""
    return all(e.learns and not e.injects(est.steps, plan.graph) for e in est.amplitudes)


def engine_without_guesses(est: Estimation, plan: Plan) -> JvpEngine:
    """The engine of a step without guesses. It finds the loss and the exact errors. Along a residual chain it also
    keeps a reverse graph for each block, unless the blocks are run once more later."""
    frozen, chain = est.frozen_statistics, plan.graph.chain
    lacks = not plan.keeps_graphs or any(cut.shared for cut in plan.graph.cuts)
    if chain is None or lacks or not est.mode.keeps:
        return LossGradRun(frozen_statistics=frozen)
    return BlockVjpRun(chain, plan.graph.block_inputs, frozen_statistics=frozen)


def direct_calls(est: Estimation, plan: Plan, learning_steps: Mapping[Estimator, LearningStep]) -> frozenset[int]:
    """Calls whose gradients come from the blocks' reverse graphs. Empty if guesses correct these in this step."""
    corrected = any(step.keeps_guesses and e.injects(est.steps, plan.graph) for e, step in learning_steps.items())
    return frozenset() if corrected else plan.graph.block_calls


# --- the network's own draws, memory ----------------------------------------------------------------------------------


def redrawn(graph: SiteGraph) -> frozenset[int]:
    """Calls that draw random numbers, and that a learning estimator runs once more."""

    def found() -> frozenset[int]:
        segments = [site.segment for site in graph.sites if site.segment is not None]
        return frozenset(call.index for segment in segments for call in walked(segment) if draws_now(call))

    return frozenset() if graph.chain is not None else graph.cached("redrawn", found)


def keep_rectified(graph: SiteGraph, contexts: dict[int, SiteContext], saved: SavedCall) -> None:
    """After ReLU, keep the output instead of the input: the mask is the same, and the input's memory is freed."""
    for index, position in graph.rectified.get(saved.call.index, ()):
        if index in contexts:
            contexts[index].s = saved.args[position]


def check_real(errors: Sequence[Tensor]) -> None:
    """Raise ``ClosureError`` if an estimator that learns would have to learn from complex errors."""
    shape = next((list(e.shape) for e in errors if e.is_complex()), None)
    if shape is not None:
        raise ClosureError(
            f"learned_feedback: the loss reads a complex tensor of shape {shape} from the network, and feedback maps "
            "are real; use another estimator, or let the network end in torch.view_as_real or abs"
        )
