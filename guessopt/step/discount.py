"""``discount="auto"``: measure what each discount keeps of the gradient, and how noisy the estimate then is.

Letters: gamma the discount, ``D_gamma[n, t]`` the credit (see ``guessopt.credit``).

| measured | from | |
|---|---|---|
| signal ``A`` | runs in which one position s of each example has a guess | mean of ``D_gamma[n, s] D_1[n, s]``: the projection of the expected estimate on the gradient |
| noise ``B`` | a run in which all positions have guesses | mean of ``D_gamma[n, t]^2``: the square of the estimate's length |

The discount with the largest ``A / sqrt(B)`` points closest to the gradient. Without causality ``D_1`` is ``D_n``.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from guessopt.credit import discounted
from guessopt.engine.forward import ForwardRun, GuessAt
from guessopt.engine.transaction import Transaction
from guessopt.record import Guess
from guessopt.sites import Site
from guessopt.step.estimation import Estimation
from guessopt.step.guessing import DrawContext, again, forgetting, guesses_of
from guessopt.step.plan import Plan

#: Runs with one moving position in each example, in a measurement.
RUNS = 4


def is_due(est: Estimation) -> bool:
    """Whether to measure before this step: before the first, and before steps 1, 2, 4, 8, ..."""
    choice = est.choice
    return (
        est.discount == "auto"
        and choice.measured_at != est.steps
        and (choice.measured_at < 0 or est.steps & (est.steps - 1) == 0)
    )


def measure(est: Estimation, plan: Plan, closure: Callable[[], Any], transaction: Transaction) -> None:
    """Measure, and choose the discount. Afterwards everything but the choice is as before."""
    graph, cached = plan.graph, est.cache.copy()
    generator = torch.Generator().manual_seed(est.steps)
    source, directions = again(est, est.noise.snapshot())
    drawing = DrawContext(1, source)
    whole = forgetting(guesses_of(est, plan, drawing), drawing)

    def derivatives(guess: GuessAt, own: dict[int, Tensor]) -> Tensor:
        engine = est.make_engine()
        run = ForwardRun(est.ids, graph, engine, guess, own, transaction, keeps=False)
        try:
            each = run.execute(closure, est.by_position).each
        finally:
            transaction.rewind()
        assert each is not None
        return each.double().cpu()

    both = graph.has_uncausal_sites
    all_move = derivatives(whole, directions)
    noise = [float(discounted(all_move, gamma, both).square().mean()) for gamma in est.choice.GRID]
    signal = [0.0] * len(noise)
    for _ in range(RUNS):
        at = torch.randint(graph.positions, (graph.batch, 1), generator=generator)
        moving = torch.zeros(graph.batch, graph.positions).scatter_(1, at, 1.0)
        each = derivatives(_at_positions(whole, moving, graph.batch), {})
        at = at[: len(each)]
        total = discounted(each, 1.0, both).gather(1, at)
        for k, gamma in enumerate(est.choice.GRID):
            signal[k] += float((discounted(each, gamma, both).gather(1, at) * total).mean()) / RUNS
    est.cache.restore(cached)
    est.choice = est.choice.after(signal, noise, est.steps)


def _at_positions(guess: GuessAt, moving: Tensor, batch: int) -> GuessAt:
    """The guesses where ``moving`` ``[N, T]`` is 1, zero elsewhere; none at sites without positions."""

    def masked(site: Site, s: Tensor, values: dict[int, Tensor]) -> Guess | None:
        made = guess(site, s, values)
        if made is None or made.y is None or site.position_dim is None:
            return None
        return Guess(made.y * site.layout.spread_positions(moving.to(made.y), site.shape, batch, site.position_dim))

    return masked
