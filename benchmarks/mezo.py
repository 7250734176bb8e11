"""Zeroth-order training (MeZO) in 16 bits beside a forward-mode step, on one small language model.

MeZO (Malladi et al. 2023, algorithm 1) differences two losses that lie ``2 eps`` apart along a random direction of the
parameters. In 16 bits the two are often equal to the last digit, or differ by rounding alone, and the three in-place
perturbations of each step leave their rounding errors in the weights. A forward-mode derivative takes no difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.problems import causal_lm
from guessopt import GuessGradOptimizer

VOCABULARY, TOKENS, BATCH = 33, 12, 16


@dataclass(frozen=True)
class Outcome:
    """A run. ``first``, ``last``: losses before and after, in float32; ``reported``: the last one as a trainer shows it
    that leaves out what is not finite (0 if nothing is left). ``zeros``: share of steps whose derivative was exactly
    zero. ``drift``: relative change of the weights in as many steps with a learning rate of zero."""

    first: float
    last: float
    reported: float
    zeros: float
    drift: float


def problem(dtype: torch.dtype) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A language model of two blocks that is to repeat what it has read; the loss in the model's own precision."""
    torch.manual_seed(0)
    model = causal_lm(VOCABULARY, 32, 2, 2, tokens=TOKENS - 1).to(dtype)
    ids = torch.randint(VOCABULARY, (BATCH, TOKENS))
    ids[:, TOKENS // 2 :] = ids[:, : TOKENS // 2]
    return model, lambda: F.cross_entropy(model(ids[:, :-1]), ids[:, 1:])


def mezo(dtype: torch.dtype, *, eps: float, lr: float, steps: int) -> Outcome:
    """Algorithm 1, the parameters perturbed in place and restored from the seed."""

    def train(lr: float) -> tuple[Any, ...]:
        model, loss = problem(dtype)
        params, zeros = list(model.parameters()), 0

        def move(seed: int, scale: float) -> None:
            generator = torch.Generator().manual_seed(seed)
            for p in params:
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale)

        start, first = [p.detach().clone() for p in params], _wide(model, loss)
        with torch.no_grad():
            for seed in range(steps):
                move(seed, eps)
                above = float(loss())
                move(seed, -2 * eps)
                below = float(loss())
                move(seed, eps)
                slope = (above - below) / (2 * eps)
                zeros += slope == 0
                move(seed, -lr * slope)
        return first, _wide(model, loss), zeros / steps, _distance(params, start)

    first, last, zeros, _ = train(lr)
    return _outcome(first, last, zeros, train(0.0)[3])


def forward_mode(dtype: torch.dtype, estimator: str, *, lr: float, steps: int) -> Outcome:
    """The same by this package, with SGD."""

    def train(lr: float) -> tuple[Any, ...]:
        model, loss = problem(dtype)
        params, zeros = list(model.parameters()), 0
        start, first = [p.detach().clone() for p in params], _wide(model, loss)
        opt = GuessGradOptimizer(model.parameters(), torch.optim.SGD, estimator, lr=lr, seed=0, check_finite=False)
        for _ in range(steps):
            opt.step(loss)
            zeros += not any(bool(p.grad.any()) for p in params if p.grad is not None)
        return first, _wide(model, loss), zeros / steps, _distance(params, start)

    first, last, zeros, _ = train(lr)
    return _outcome(first, last, zeros, train(0.0)[3])


def _outcome(first: float, last: float, zeros: float, drift: float) -> Outcome:
    finite = math.isfinite(last)
    return Outcome(first, last if finite else -1.0, last if finite else 0.0, zeros, drift)


def _wide(model: nn.Module, loss: Callable[[], Tensor]) -> float:
    """The loss in float32 arithmetic, of the weights as they are."""
    dtype = next(model.parameters()).dtype
    model.float()
    with torch.no_grad():
        value = float(loss())
    model.to(dtype)
    return value


def _distance(params: list[nn.Parameter], start: list[Tensor]) -> float:
    def size(ts: list[Tensor]) -> float:
        return math.sqrt(sum(float(t.float().square().sum()) for t in ts))

    return size([p.detach() - s for p, s in zip(params, start, strict=True)]) / size(start)
