"""The algorithm: closure -> plan -> guesses ``y_i`` -> one forward-mode run -> ``D_n`` -> cotangents -> gradients.

``store`` does all of this in one run. ``replay`` keeps nothing in its first run, and makes inputs and guesses again in
a second run. ``stream`` is ``replay`` that applies and frees each gradient as soon as the gradient is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from guessopt.engine.audit import AuditReport
from guessopt.engine.combine import combined, mean_weights, projection_weights
from guessopt.engine.following import GraphMismatch
from guessopt.engine.gradients import Gradients, estimated_cotangents, parameter_gradients
from guessopt.engine.transaction import Transaction
from guessopt.hooks import apart
from guessopt.ops.cached import CachedCall
from guessopt.record import ForwardRecord
from guessopt.step.checks import check_finite, unstable
from guessopt.step.estimation import Estimation
from guessopt.step.guessing import DrawContext, again, guesses_of
from guessopt.step.learning import learn, learned_cotangents, show_sites, shown
from guessopt.step.mode import MODES, Mode
from guessopt.step.plan import Plan
from guessopt.step.replay import Deliver, Replay
from guessopt.step.runs import forward, run_others

Closure = Callable[[], Any]

#: By position in the optimizer's order.
ByPosition = dict[int, Tensor]


def estimate(est: Estimation, closure: Closure, transaction: Transaction) -> tuple[Tensor, ByPosition]:
    """The loss, and the estimated gradients by position, each of its parameter's shape, dtype and layout."""
    loss, gradients = est.mode.run(est, closure, transaction)
    est.steps += 1
    return loss, apart({k: laid_out(g, est.params[k]) for k, g in gradients.items()})


def estimate_alone(est: Estimation, closure: Closure, started: Transaction | None = None) -> tuple[Tensor, ByPosition]:
    """``estimate`` in a new transaction, or in ``started``. Hooks on parameters are not called."""
    with est.transaction(closure, started) as transaction:
        return estimate(est, closure, transaction)


# --- one run ----------------------------------------------------------------------------------------------------------


def store(est: Estimation, closure: Closure, transaction: Transaction) -> tuple[Tensor, ByPosition]:
    """One run; or one run for each guess, if guesses cannot share a run."""
    loss, gradients, count = _store_once(est, closure, transaction, est.guesses)
    runs = est.guesses // count
    for index in range(1, runs):
        est.noise.guess_index = index
        transaction.rewind()
        for k, g in _store_once(est, closure, transaction, 1)[1].items():
            gradients[k] = gradients[k] + g if k in gradients else g
    return loss, gradients if runs == 1 else {k: g / runs for k, g in gradients.items()}


def _store_once(
    est: Estimation, closure: Closure, transaction: Transaction, guesses: int
) -> tuple[Tensor, ByPosition, int]:
    """The loss, the gradients by position, and the number of guesses in them: all, or 1 if they run in turn."""
    plan, record = forward(est, closure, transaction, guesses)  # e = dL/dv and D_n = <e[n], v'[n]>, at the cuts v
    if est.orthogonal and record.d.dim() == 1:
        record = run_others(est, plan, record, closure, transaction)
    if est.check_finite:
        check_finite(record.loss, record.d)
    if record.d.dim() == 2:
        return record.loss, _combined_gradients(est, plan, record), len(record.d)
    try:
        return record.loss, gradients_of(est, plan, record), 1
    except RuntimeError as error:
        if record.graphs is None or "inplace operation" not in str(error):
            raise
    _forgo_graphs(est, plan)
    transaction.rewind()
    return _store_once(est, closure, transaction, 1)


def gradients_of(est: Estimation, plan: Plan, record: ForwardRecord) -> ByPosition:
    """Gradients from a record with one guess or none. A site's cotangent is ``g^_i[n] = D_n y_i[n]``, or learned."""
    gradients = Gradients(plan.graph, est.by_position, est.ids, directed=record.params)
    learned = learned_cotangents(est, plan, record, partial(gradients.consume, record))
    cotangents = estimated_cotangents(plan.graph, record, learned)
    return parameter_gradients(plan.graph, record, cotangents, est.by_position, est.ids, gradients)


def _combined_gradients(est: Estimation, plan: Plan, record: ForwardRecord) -> ByPosition:
    """Gradients from a record of K guesses: their mean, or the projection on their span."""
    weights = projection_weights(record, plan.graph) if est.orthogonal else mean_weights(record)
    record, formed = combined(record, plan.graph, weights)
    cotangents = estimated_cotangents(plan.graph, record, formed)
    return parameter_gradients(plan.graph, record, cotangents, est.by_position, est.ids)


def _forgo_graphs(est: Estimation, plan: Plan) -> None:
    plan.keeps_graphs = False
    est.warn(
        "the network writes into memory that its own backward would read, so no block's graph can be kept: each "
        "block is run once more, which takes longer"
    )


# --- two runs ---------------------------------------------------------------------------------------------------------


def replay(est: Estimation, closure: Closure, transaction: Transaction) -> tuple[Tensor, ByPosition]:
    """Two runs: the first finds ``D_n`` and keeps nothing, the second forms the gradients. Along a residual chain the
    first run suffices: each block is run once more by itself."""
    plan, records = first_run(est, closure, transaction)
    if plan.graph.chain is not None:
        return records[0].loss, gradients_of(est, plan, records[0])
    gradients = second_run(est, plan, records, closure, transaction)
    learn(est, plan, records[0])
    return records[0].loss, gradients


def first_run(est: Estimation, closure: Closure, transaction: Transaction) -> tuple[Plan, list[ForwardRecord]]:
    """The first run, or a first run for each guess if guesses run in turn; one record for each run. A record holds
    ``D_n``, the loss, the random state of the guesses before the run, and the exact errors if a site takes them."""
    records: list[ForwardRecord] = []
    plan: Plan | None = None
    while sum(record.count for record in records) < est.guesses:
        if plan is not None:
            est.noise.guess_index = len(records)
            transaction.rewind()
        found, record = forward(est, closure, transaction, est.guesses if plan is None else 1, keeps=False)
        if plan is not None and found is not plan:
            raise unstable(GraphMismatch(what="a pass for another guess made other calls"))
        if est.check_finite:
            check_finite(record.loss, record.d)
        plan = found
        records.append(record)
        if any(step.subtracts for step in record.learning_steps.values()):
            transaction.rewind()
            _subtract(est, plan, record, closure, transaction)
    assert plan is not None
    return plan, records


def _subtract(est: Estimation, plan: Plan, record: ForwardRecord, closure: Closure, transaction: Transaction) -> None:
    """An extra run: subtract from ``D_n`` the part that the predictions explain."""
    methods = {e: step.subtract for e, step in record.learning_steps.items()}
    try:
        show_sites(est, plan, record.learning_steps, methods, record.noise, closure, transaction, record.random)
    except GraphMismatch as mismatch:
        raise unstable(mismatch) from None


def second_run(
    est: Estimation,
    plan: Plan,
    records: Sequence[ForwardRecord],
    closure: Closure,
    transaction: Transaction,
    deliver: Deliver | None = None,
    done: Collection[int] = (),
) -> ByPosition:
    """The second run. Returns the gradients by position, except those that ``deliver`` took or that ``done`` names."""
    transaction.rewind()
    guesses, known = [], dict[int, CachedCall]()
    for index, record in enumerate(records):
        source, record.params = again(est, record.noise, record.count, index)
        drawing = DrawContext(record.count, source, known, random=record.random)
        if record.learning_steps:
            methods = {e: step.cotangents for e, step in record.learning_steps.items()}
            guesses.append(shown(est, plan, record.learning_steps, methods, drawing, replaces=True))
        else:
            guesses.append(guesses_of(est, plan, drawing))
    run = Replay(
        est.ids, est.by_position, plan.graph, guesses, records, transaction,
        frozen_statistics=est.frozen_statistics, deliver=deliver, done=done,
    )  # fmt: skip
    run.known = known
    try:
        return run.replay(closure)
    except GraphMismatch as mismatch:
        raise unstable(mismatch) from None


MODES |= {
    "store": Mode(store, keeps=True),
    "replay": Mode(replay, keeps=False),
    "stream": Mode(replay, keeps=False, early=True),
}


# --- for guessopt.audit -----------------------------------------------------------------------------------------------


def audited(est: Estimation, closure: Closure) -> AuditReport:
    """The report for ``guessopt.audit``. Everything is then put back as it was before."""

    class Enough(Exception):
        pass

    found: list[AuditReport] = []
    est.asked = found
    try:
        with est.transaction(closure) as transaction:
            forward(est, closure, transaction, est.guesses, keeps=est.mode.keeps)
            raise Enough
    except Enough:
        return found[-1]
    finally:
        est.asked = None


def laid_out(g: Tensor, p: Tensor) -> Tensor:
    """The gradient in the parameter's dtype and memory layout; torch's fused updates rely on both."""
    if g.dtype is not p.dtype:
        g = g.to(p.dtype)
    if g.layout is not torch.strided or g.stride() == p.stride():
        return g
    return torch.empty_like(p, requires_grad=False).copy_(g)
