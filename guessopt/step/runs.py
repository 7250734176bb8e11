"""Runs of the closure: by a plan that fits, with all guesses or with one; repeated if a plan or a guess was stale."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from guessopt.credit import Credit
from guessopt.engine.combine import stack
from guessopt.engine.following import GraphMismatch
from guessopt.engine.forward import ForwardRun, GuessAt
from guessopt.engine.jvp import ENGINES
from guessopt.engine.jvp.base import JvpEngine
from guessopt.engine.jvp.stacked import StackedEngine
from guessopt.engine.transaction import Transaction
from guessopt.estimator import Estimator
from guessopt.learning import LearningStep
from guessopt.record import ForwardRecord
from guessopt.rng import RandomState
from guessopt.step import discount
from guessopt.step.auditing import audit_run, is_audited
from guessopt.step.checks import check_plan, check_repeats, unstable
from guessopt.step.estimation import Estimation
from guessopt.step.guessing import DrawContext, directions, forgetting, guesses_of
from guessopt.step.learning import (
    begin_learning,
    check_real,
    direct_calls,
    engine_without_guesses,
    find_draws,
    keep_rectified,
    makes_no_guess,
    plain_run,
    redrawn,
    show_sites,
    shown,
)
from guessopt.step.plan import MAX_PLANS, Plan, is_due_for_probe
from guessopt.step.trace import probe_again, trace

Closure = Callable[[], Any]


def forward(
    est: Estimation, closure: Closure, transaction: Transaction, guesses: int = 1, *, keeps: bool = True
) -> tuple[Plan, ForwardRecord]:
    """One run by the first plan that the closure follows; by a new plan if it follows none.

    Args:
        guesses: K. The run carries all K guesses if they can share a run, else one guess.
        keeps: whether the record keeps inputs and guesses until the directional derivatives are known.

    Raises:
        ClosureError: the closure does not repeat.
    """
    for plan in list(est.plans):
        noise = est.noise.snapshot()
        try:
            return plan, _run_by(est, plan, closure, transaction, guesses, keeps)
        except GraphMismatch:
            transaction.rewind()
            est.noise.restore(noise)
    for last in (False, True):  # a first run may have filled caches that later runs read
        plan = new_plan(est, closure, transaction)
        noise = est.noise.snapshot()
        try:
            return plan, _run_by(est, plan, closure, transaction, guesses, keeps)
        except GraphMismatch as mismatch:
            est.plans.remove(plan)
            if last:
                raise unstable(mismatch) from None
            transaction.rewind()
            est.noise.restore(noise)
    raise AssertionError


def new_plan(est: Estimation, closure: Closure, transaction: Transaction) -> Plan:
    """Trace the closure, and put the new plan first in ``est.plans``."""
    together = est.mode.keeps  # several tangents in one probe take memory
    plan = trace(est, closure, transaction, finite=est.check_finite, together=together)
    check_plan(est, plan)
    if est.plans:
        est.plans[0].graph.forget()
    est.plans.insert(0, plan)
    del est.plans[MAX_PLANS:]
    return plan


def _run_by(
    est: Estimation, plan: Plan, closure: Closure, transaction: Transaction, guesses: int, keeps: bool
) -> ForwardRecord:
    """A run. It is repeated for two reasons: a guess was made from tensors that the closure then did not read; or the
    tensors and numbers that the closure reads have changed so often that the layouts must be probed again."""
    probes = is_due_for_probe(plan)
    if probes:
        probe_again(est, plan, closure, transaction)
    if plan.volatile > 1 or plan.graph.constants.keys() != plan.graph.constant_values:
        look(est, plan, closure, transaction)
    if plan.graph.positions and discount.is_due(est):
        discount.measure(est, plan, closure, transaction)
    noise, cached = est.noise.snapshot(), est.cache.copy()
    for _ in range(3):
        record = _run_shared(est, plan, closure, transaction, guesses, keeps)
        due, plan.due = plan.due and not probes and plan.analysis is not None, False
        if not due and not plan.stale:
            return record
        transaction.rewind()
        est.noise.restore(noise)
        est.cache.restore(dict(cached))
        plan.volatile += plan.stale
        plan.uses -= not plan.stale
        if due:
            probe_again(est, plan, closure, transaction)
            probes = True
    raise GraphMismatch(what="it reads other tensors or numbers in every run")


def look(est: Estimation, plan: Plan, closure: Closure, transaction: Transaction) -> Tensor:
    """Run the closure to find the tensors that guesses need before the closure reads them. Returns the scalar loss."""
    run = plain_run(est, plan, transaction)
    loss = run.run(closure)
    run.check_end(loss)
    plan.observe(run)
    transaction.rewind()
    result: Tensor = loss.detach().mean()
    return result


# --- K guesses --------------------------------------------------------------------------------------------------------


def _run_shared(
    est: Estimation, plan: Plan, closure: Closure, transaction: Transaction, guesses: int, keeps: bool
) -> ForwardRecord:
    """A run with all guesses if they can share a run, else with one. A failed attempt is undone."""
    if guesses == 1 or not _may_share(est, plan):
        return run_once(est, plan, closure, transaction, keeps=keeps)
    noise, cached = est.noise.snapshot(), est.cache.copy()
    try:
        record = run_once(est, plan, closure, transaction, guesses, keeps)
        plan.stacks = True
        return record
    except Exception as error:
        short = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if transaction.raised or est.stack_guesses or (plan.stacks and not short):
            raise
        why = f"{type(error).__name__}: {error}"
    transaction.rewind()
    est.noise.restore(noise)
    est.cache.restore(cached)
    record = run_once(est, plan, closure, transaction, keeps=keeps)  # raises too where the closure is at fault
    plan.stacks = False
    plan.failures += 1
    est.warn(f"guesses do not share a pass but run in turn, which takes longer: {why.splitlines()[0]}")
    return record


def _may_share(est: Estimation, plan: Plan) -> bool:
    """Whether guesses may share a run, as far as is known.

    Raises:
        ValueError: guesses cannot share a run, and ``stack_guesses=True``.
    """
    if est.stack_guesses is False:
        return False
    if plan.stacks is None or (est.stack_guesses and not plan.stacks):
        shared = ", ".join(dict.fromkeys(plan.graph.shared_writes))
        reasons = {
            f"engine={est.engine!r} carries one tangent": not ENGINES[est.engine].stacks,
            "an estimator learns from one guess at a time": any(e.learns for e in est.estimators),
            f"the network writes into memory that other tensors share ({shared})": bool(shared),
            "an operation writes tensors that are not among its arguments": bool(plan.graph.hidden),
        }
        why = next((reason for reason, holds in reasons.items() if holds), None)
        if why is not None and est.stack_guesses:
            raise ValueError(f"stack_guesses: guesses cannot share a pass here: {why}; leave it at None")
        if why is not None:
            plan.stacks = False
            if shared:
                est.warn(f"guesses do not share a pass but run in turn, which takes longer: {why}")
    return plan.stacks is not False or plan.failures == 1  # a first failure may be temporary: try once more


def run_others(
    est: Estimation, plan: Plan, first: ForwardRecord, closure: Closure, transaction: Transaction
) -> ForwardRecord:
    """Make a run for each guess after the first. Returns one record, as if all guesses had shared a run."""
    records = [first]
    for index in range(1, est.guesses):
        est.noise.guess_index = index
        transaction.rewind()
        try:
            records.append(run_once(est, plan, closure, transaction))
        except GraphMismatch as mismatch:
            raise unstable(mismatch) from None
    return stack(records)


# --- one run ----------------------------------------------------------------------------------------------------------


def run_once(
    est: Estimation, plan: Plan, closure: Closure, transaction: Transaction, count: int = 1, keeps: bool = True
) -> ForwardRecord:
    """One run with ``count`` guesses at each site, and its record. Audits the run if an audit is due."""
    learning_steps = begin_learning(est, plan)
    keeps = keeps or plan.graph.chain is not None
    audited = is_audited(est, plan)
    before = None if keeps and not audited else est.noise.snapshot()
    random = dict[int, RandomState | None].fromkeys(redrawn(plan.graph)) if learning_steps else {}
    if not keeps:
        _initialise(est, plan, learning_steps, before, closure, transaction, random)
    engine = _engine_for(est, plan, count)
    drawing = DrawContext(count, est.noise, {} if engine.reuses else None, random=random)
    guess = _guesses_for(est, plan, learning_steps, drawing, keeps)
    run = ForwardRun(
        est.ids, plan.graph, engine, guess, directions(est, count, est.noise), transaction, keeps=keeps,
        left=partial(keep_rectified, plan.graph, drawing.contexts) if learning_steps and keeps else None,
        direct=direct_calls(est, plan, learning_steps),
    )  # fmt: skip
    run.known = {} if drawing.known is None else drawing.known
    if random:
        run.random = random
    run.keeps_guesses = keeps and all(step.keeps_guesses for step in learning_steps.values())
    record = _executed(est, plan, run, closure)
    _give_credit(est, plan, record)
    if learning_steps:
        check_real(record.errors)
    plan.observe(run)
    plan.stale = run.stale and any(e.looks_ahead for e in est.estimators)
    record.noise, record.learning_steps = before, learning_steps
    plan.graph.first_pass_tensors.clear()
    if keeps:
        record.contexts = drawing.contexts
    else:
        _let_go(est, plan, record)
        plan.graph.first_pass_tensors.update(run.met)
    if audited and not plan.stale:  # a stale run is made again
        audit_run(est, plan, record, before, closure, transaction, light=not keeps)
    _confirm(est, plan, record, closure, transaction)
    return record


def _initialise(
    est: Estimation,
    plan: Plan,
    learning_steps: dict[Estimator, LearningStep],
    noise: Any,
    closure: Closure,
    transaction: Transaction,
    random: dict[int, RandomState | None],
) -> None:
    """Extra runs for estimators that must see the sites before they can begin."""
    while any(step.needs_init for step in learning_steps.values()):
        if None in random.values():  # first find the random states before the network's draws
            find_draws(est, plan, closure, transaction, random)
        methods = {e: step.init for e, step in learning_steps.items()}
        show_sites(est, plan, learning_steps, methods, noise, closure, transaction, random)
        transaction.rewind()


def _engine_for(est: Estimation, plan: Plan, count: int) -> JvpEngine:
    engine = est.make_engine()
    if count > 1:
        return StackedEngine(count, plan.ways, frozen_statistics=engine.frozen_statistics)
    if engine.rests and makes_no_guess(est, plan):
        return engine_without_guesses(est, plan)
    return engine


def _guesses_for(
    est: Estimation, plan: Plan, learning_steps: dict[Estimator, LearningStep], drawing: DrawContext, keeps: bool
) -> GuessAt:
    if learning_steps and not keeps:
        observe = {e: step.observe for e, step in learning_steps.items() if e.injects(est.steps, plan.graph)}
        return shown(est, plan, learning_steps, observe, drawing, replaces=False)
    guess = guesses_of(est, plan, drawing)
    return guess if all(step.keeps_contexts for step in learning_steps.values()) else forgetting(guess, drawing)


def _executed(est: Estimation, plan: Plan, run: ForwardRun, closure: Closure) -> ForwardRecord:
    try:
        return run.execute(closure, est.by_position)
    except (RuntimeError, IndexError) as error:
        if not run.guessing or not plan.uses or isinstance(error, torch.OutOfMemoryError):
            raise
        raise GraphMismatch(what=f"the way to the next layer has other shapes ({error})") from error


def _give_credit(est: Estimation, plan: Plan, record: ForwardRecord) -> None:
    """Sum the positions' derivatives into ``record.credit``; see ``guessopt.credit``."""
    each, record.each = record.each, None
    if each is None or est.gamma is None:
        return
    graph = plan.graph
    rest = None if graph.is_by_position else record.d - each.sum(-1)
    record.credit = Credit.by(each, rest, est.gamma, batch=graph.batch, symmetric=graph.has_uncausal_sites)


def _let_go(est: Estimation, plan: Plan, record: ForwardRecord) -> None:
    """Drop from the record all that the second run does not need. It needs ``D_n``, and the exact errors if a site
    takes them."""
    with torch.no_grad():
        for learning_step in record.learning_steps.values():
            learning_step.close(record)
    record.tangents, record.params = [], {}
    assigned = est.assignments(plan)
    exact = any(site.cut is not None and site.index not in assigned for site in plan.graph.sites)
    if not record.learning_steps and not exact:
        record.errors = []


def _confirm(est: Estimation, plan: Plan, record: ForwardRecord, closure: Closure, transaction: Transaction) -> None:
    """After a run by the plan: check the plan's first loss against the trace's, count the run, put the plan first."""
    if plan.loss is not None:

        def again() -> Tensor:
            with transaction.ahead():
                transaction.rewind()
                return look(est, plan, closure, transaction)

        check_repeats(plan.loss, record.loss, plan.tolerance, again)
        plan.loss = None
    plan.uses += not plan.stale
    if plan is not est.plans[0]:
        est.plans.remove(plan)
        est.plans[0].graph.forget()
        est.plans.insert(0, plan)
