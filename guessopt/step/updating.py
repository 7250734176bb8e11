"""The updates: the base's step for all parameters at once, or for each parameter when its gradient is whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from guessopt.engine.transaction import Transaction
from guessopt.errors import PartialUpdateError
from guessopt.exclusive import hold_interrupts, leave_modes
from guessopt.hooks import accumulates, fire, hooked, is_made, lifted, mark
from guessopt.rng import RandomState
from guessopt.step.estimation import Estimation
from guessopt.step.learning import learn
from guessopt.step.modes import first_run, laid_out, second_run
from guessopt.step.plan import Plan
from guessopt.step.replay import Journal
from guessopt.step.runs import new_plan
from guessopt.update import base_step, only

Closure = Callable[[], Any]


def call_hooks(est: Estimation, hooks: Mapping[int, Callable[..., Any]]) -> None:
    """Call hooks of the base's ``register_step_pre_hook`` or ``register_step_post_hook``."""
    for hook in list(hooks.values()):
        hook(est.base, (), {})


def update(est: Estimation, arrived: Iterable[Tensor] = ()) -> None:
    """The base's step, without the closure, whole or not at all (see ``Updates``). The base's own hooks before a step
    are called. Torch's global hooks are not: they have been called for the ``GuessGradOptimizer``.

    Args:
        arrived: parameters whose hooks are called after their gradient has been written to ``.grad``.
    """
    call_hooks(est, est.base._optimizer_step_pre_hooks)
    with est.updates.whole(est.base, est.params, est.names):
        for p in arrived:
            fire(p)
        base_step(est.base)


def update_by(est: Estimation, gradients: Mapping[int, Tensor]) -> None:
    """Write gradients, by position, to ``.grad``, and update. A parameter without a gradient gets ``.grad = None``."""
    for position, p in enumerate(est.params):
        p.grad = gradients.get(position)
        if p.grad is not None:
            mark(p.grad)
    update(est, [est.params[k] for k in gradients if accumulates(est.params[k])])


def apply_gradients(est: Estimation, estimated: Collection[int]) -> None:
    """``step()`` without a closure: update from the gradients in ``.grad``.

    Args:
        estimated: the ``id`` of each parameter to which ``estimate`` has added.

    Raises:
        RuntimeError: ``.grad`` holds no gradient, or a gradient that ``estimate`` did not make.
    """
    est.refresh()
    found = [(k, p) for k, p in enumerate(est.params) if p.grad is not None]
    if not found:
        raise RuntimeError(
            "step() found no gradient: call estimate(closure) before it, or pass the closure: step(closure)"
        )
    if est.foreign_gradients == "refuse":
        for k, p in found:
            if not is_made(p, id(p) in estimated):
                raise RuntimeError(
                    f"step() found a gradient of {est.names[k]} that estimate(closure) did not make (backward(), "
                    "or .grad = ...): pass the closure, step(closure), or call estimate(closure) in place of "
                    "backward(); foreign_gradients='allow' applies such gradients"
                )
    random = RandomState.capture(est.devices)
    try:
        update(est)
    except BaseException:
        random.restore()
        raise
    for _, p in found:
        if p.grad is not None:
            mark(p.grad)


# --- memory="stream" --------------------------------------------------------------------------------------------------


def step_early(est: Estimation, closure: Closure, transaction: Transaction) -> Tensor:
    """A step that applies and frees each gradient as soon as the gradient is whole. Returns the loss, a scalar."""
    for p in est.params:
        p.grad = None
    plan, records = first_run(est, closure, transaction)
    if plan.uses == len(records):  # a plan's first step: try the second run before any update
        second_run(est, plan, records, closure, transaction, deliver=lambda gradients: None)
    update_early(est, plan, Journal(transaction.random, tuple(records)), closure, transaction)
    est.steps += 1
    return records[0].loss


def update_early(est: Estimation, plan: Plan, journal: Journal, closure: Closure, transaction: Transaction) -> None:
    """The second run. The base updates each parameter as soon as the parameter's gradient is whole.

    Raises:
        PartialUpdateError: the run failed after some parameters had been updated; the journal names them.
    """

    def deliver(gradients: dict[int, Tensor]) -> None:
        hold_interrupts()
        for position, g in gradients.items():
            _update_one(est, position, laid_out(g, est.params[position]), journal.done)
            transaction.forget(est.params[position])

    call_hooks(est, est.base._optimizer_step_pre_hooks)
    try:
        deliver(second_run(est, plan, journal.records, closure, transaction, deliver, frozenset(journal.done)))
        learn(est, plan, journal.records[0])
    except BaseException as error:
        if not journal.done or (isinstance(error, PartialUpdateError) and error.journal is None):
            raise
        raise PartialUpdateError(
            f"the step failed after {len(journal.done)} of {len(est.by_position)} parameters had been updated "
            f"({type(error).__name__}: {error}); opt.finish(error.journal, closure) updates the rest",
            journal,
        ) from error
    est.updates.passed(est.base)


def _update_one(est: Estimation, position: int, gradient: Tensor, done: set[int]) -> None:
    """The base's step for one parameter; its gradient is then freed. Its position enters ``done`` and stays there."""
    p, name = est.params[position], est.names[position]
    p.grad = hooked(gradient, p, est.hooks, name)
    try:
        with only(est.base, p, unfused=gradient.is_sparse), est.updates.single(est.base, p, name):
            fire(p)
            base_step(est.base)
            done.add(position)
    finally:
        p.grad = None


def finish_early(est: Estimation, journal: Journal, closure: Closure) -> None:
    """Make the updates that ``update_early`` did not reach; see ``GuessGradOptimizer.finish``."""
    transaction = Transaction(est.devices)
    now, transaction.random = transaction.random, journal.random
    est.refresh()
    transaction.watch(closure, est.plans)
    try:
        with lifted(est.params, est.hooks):
            plan = est.plans[0] if est.plans else new_plan(est, closure, transaction)
            update_early(est, plan, journal, closure, transaction)
        est.steps += 1
    except BaseException:
        hold_interrupts()
        leave_modes()
        transaction.random = now
        transaction.rewind()
        raise
