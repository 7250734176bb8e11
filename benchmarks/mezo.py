"""Zeroth-order training (MeZO) in 16 bits beside a forward-mode step, on one small language model.

MeZO (Malladi et al. 2023, algorithm 1) differences two losses that lie ``2 eps`` apart along a random direction of the
parameters. In 16 bits the two are often equal to the last digit, or differ by rounding alone, and the three in-place
perturbations of each step leave their rounding errors in the weights. A forward-mode derivative takes no difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.methods import METHODS
from benchmarks.problems import causal_lm
from benchmarks.training import Learner, fit

VOCABULARY, TOKENS, BATCH = 33, 12, 16


@dataclass(frozen=True)
class Outcome:
    """A run.

    Attributes:
        first, last: loss before and after, in float32; a last loss that is not finite is -1.
        reported: the last loss as a trainer shows it that leaves out losses that are not finite (0 if it is not).
        zeros: share of steps whose derivative was exactly zero.
        drift: relative change of the weights in as many steps with a learning rate of zero.
    """

    first: float
    last: float
    reported: float
    zeros: float
    drift: float


def problem(dtype: torch.dtype) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A language model of two blocks that learns to repeat its input, and its loss in the model's own precision."""
    model, x, y = _made(dtype)
    return model, partial(_loss, model, x, y)


def _made(dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = causal_lm(VOCABULARY, 32, 2, 2, tokens=TOKENS - 1).to(dtype)
    ids = torch.randint(VOCABULARY, (BATCH, TOKENS))
    ids[:, TOKENS // 2 :] = ids[:, : TOKENS // 2]
    return model, ids[:, :-1], ids[:, 1:]


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


class InPlace(Learner):
    """Algorithm 1 to the letter: each step moves the parameters in place four times, along a direction drawn from the
    step's number."""

    def __init__(self, model: nn.Module, lr: float, eps: float) -> None:
        super().__init__(model, None)
        self.lr, self.eps, self.seed, self.is_flat = lr, eps, 0, False

    def _move(self, scale: float) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        for p in self.model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale)

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor) -> None:
        self._move(self.eps)
        above = float(self.loss(x, y))
        self._move(-2 * self.eps)
        below = float(self.loss(x, y))
        self._move(self.eps)
        slope = (above - below) / (2 * self.eps)
        self.is_flat = slope == 0
        self._move(-self.lr * slope)
        self.seed += 1

    def cosine(self, x: Tensor, y: Tensor) -> float:
        raise NotImplementedError


def mezo(dtype: torch.dtype, *, eps: float, lr: float, steps: int) -> Outcome:
    """MeZO with SGD; the parameters are perturbed in place and restored from the seed."""

    def make(model: nn.Module, lr: float) -> InPlace:
        return InPlace(model, lr, eps)

    return _outcome(make, lambda own: own.is_flat, dtype, lr, steps)


def forward_mode(dtype: torch.dtype, estimator: str, *, lr: float, steps: int) -> Outcome:
    """This package's optimizer with SGD."""

    def make(model: nn.Module, lr: float) -> Learner:
        return METHODS[estimator].learner(model, lr, base=torch.optim.SGD, seed=0, check_finite=False)

    def is_flat(own: Learner) -> bool:
        return not any(bool(p.grad.any()) for p in own.model.parameters() if p.grad is not None)

    return _outcome(make, is_flat, dtype, lr, steps)


def _outcome(
    make: Callable[[nn.Module, float], Any], is_flat: Callable[[Any], bool], dtype: torch.dtype, lr: float, steps: int
) -> Outcome:
    """``is_flat`` says of a learner whether its last step found a derivative of zero."""

    def train(lr: float) -> tuple[float, float, float, float]:
        model, x, y = _made(dtype)
        loss, flat = partial(_loss, model, x, y), list[bool]()
        start, first = [p.detach().clone() for p in model.parameters()], _wide(model, loss)
        own = make(model, lr)
        fit(own, repeat((x, y)), steps, looks=range(1, steps + 1), look=lambda step: flat.append(is_flat(own)))
        return first, _wide(model, loss), sum(flat) / steps, _distance(list(model.parameters()), start)

    first, last, zeros, _ = train(lr)
    finite = math.isfinite(last)
    return Outcome(first, last if finite else -1.0, last if finite else 0.0, zeros, train(0.0)[3])


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
