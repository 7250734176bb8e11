"""The audit of a run: does the loss move as the run's tangents predict (see ``engine.audit``)?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from guessopt.engine.audit import Audit, AuditReport
from guessopt.engine.following import GraphMismatch
from guessopt.engine.forward import ForwardRun
from guessopt.engine.transaction import Transaction
from guessopt.record import ForwardRecord
from guessopt.step.checks import unstable
from guessopt.step.estimation import Estimation
from guessopt.step.guessing import guessed_again, white_noise
from guessopt.step.learning import makes_no_guess
from guessopt.step.plan import Plan


def is_audited(est: Estimation, plan: Plan) -> bool:
    """Whether the next run is audited: run 1, 2, 4, 8, ... of a plan, or any run if ``guessopt.audit`` waits."""
    uses = plan.uses + 1
    return est.asked is not None or (est.audit and uses & (uses - 1) == 0)


def audit_run(
    est: Estimation,
    plan: Plan,
    record: ForwardRecord,
    before: Any,
    closure: Callable[[], Any],
    transaction: Transaction,
    light: bool,
) -> None:
    """Audit a run. The audit leaves buffers and random states as the run has left them.

    Args:
        before: the state of the guesses' random stream before the run.
        light: the run kept none of its guesses: audit another run, with white noise for guesses.

    Raises:
        AuditError: the loss does not move as predicted, and ``guessopt.audit`` does not wait for a report.
    """
    if why := _why_not(est, plan, record):
        report = AuditReport(float(record.d.sum()), skipped=(why,))
    else:
        index = 0 if record.count > 1 else est.noise.guess_index
        guesses = partial(white_noise if light else guessed_again, est, plan, record, before, index)
        with transaction.ahead():
            try:
                if light:
                    transaction.rewind()
                    guess, directions = guesses()
                    engine = est.make_engine()
                    run = ForwardRun(est.ids, plan.graph, engine, guess, directions, transaction, keeps=False)
                    record = run.execute(closure, est.by_position)
                audit = Audit(
                    closure, plan.graph, guesses, est.ids, est.by_position, transaction, record,
                    plan.tolerance, light=light,
                )  # fmt: skip
                report = audit.report(calls=est.asked is not None)
            except GraphMismatch as mismatch:
                raise unstable(mismatch) from None
    if est.asked is not None:
        est.asked.append(report)
    else:
        report.check()


def _why_not(est: Estimation, plan: Plan, record: ForwardRecord) -> str | None:
    """Why a run is not audited; None if it is."""
    reasons = {
        "batch_norm='frozen_statistics' leaves a part of the derivative out by design": (
            est.frozen_statistics and plan.normalises_batch
        ),
        "no guess is made in this step": makes_no_guess(est, plan),
        "the guesses are replaced by their means": est.noise.means,
        "the loss or its derivative is not finite": not bool(torch.isfinite(record.loss + record.d.sum())),
    }
    return next((why for why, holds in reasons.items() if holds), None)
