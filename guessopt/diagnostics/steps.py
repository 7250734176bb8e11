"""The loss reduction of one step, and gradients with a given cosine to the true one (Singhal 4, Figures 1 and 4).

Letters: g the true gradient of all parameters as one vector, g^ an estimate of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guessopt.diagnostics.gradients import joined
from guessopt.diagnostics.plots import curve
from guessopt.diagnostics.reverse import Closure, ReversePass, Truth, draw, measuring, named
from guessopt.hooks import mark
from guessopt.optimizer import GuessGradOptimizer

STEP_SIZES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""The step sizes of Singhal 4."""


@dataclass(frozen=True)
class Effectiveness:
    """Loss reduction of one step ``-eta g^``, compared with one step ``-eta g``.

    Attributes:
        step_sizes: the grid of ``eta``.
        reduction: ``L(theta) - L(theta - eta g^)`` for each ``eta``.
        true_reduction: ``L(theta) - L(theta - eta g)`` for each ``eta``.
        ratio: ``max(reduction) / max(true_reduction)``; nan if g reduces the loss nowhere.
        per_parameter: by parameter name, the ratio if this parameter alone takes the step; empty unless asked for.
    """

    step_sizes: tuple[float, ...]
    reduction: tuple[float, ...]
    true_reduction: tuple[float, ...]
    ratio: float
    per_parameter: dict[str, float]

    def plot(self, ax: Any = None) -> Any:
        """Both reductions over the step size; returns the axes. Needs matplotlib."""
        lines = {"estimate": self.reduction, "backprop": self.true_reduction}
        ax = curve(self.step_sizes, lines, ax, "step size", "loss reduction")
        ax.set_xscale("log")
        return ax


def effectiveness(
    opt: GuessGradOptimizer, closure: Closure, step_sizes: Sequence[float] = STEP_SIZES, *, per_parameter: bool = False
) -> Effectiveness:
    """One-step effectiveness (Singhal 4, Figure 1's table): plain gradient steps from the current parameters, on one
    batch and from one random state. Estimate and true gradient each take their best step size of the grid.

    Args:
        step_sizes: the grid.
        per_parameter: also the ratio for each of the P parameters alone (2 x P x len(grid) more forward passes).

    >>> import torch, guessopt
    >>> net = torch.nn.Linear(2, 1)
    >>> opt = guessopt.GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, lr=0.1, exact_last=True)
    >>> x = torch.randn(8, 2)
    >>> round(effectiveness(opt, lambda: (net(x) - 1).square().mean()).ratio, 4)
    1.0
    """
    sizes = tuple(sorted(step_sizes))
    if not sizes or sizes[0] <= 0:
        raise ValueError(f"step_sizes: must be positive numbers, got {list(step_sizes)}")
    one, truth = draw(opt, closure, opt.guesses), Truth(opt, closure)
    start, estimate, true = truth.loss, one.gradients, truth.gradient
    del truth

    def reductions(gradients: dict[int, Tensor]) -> tuple[float, ...]:
        return tuple(float(start.double() - _loss_after(opt, closure, gradients, size).double()) for size in sizes)

    def ratio(ours: tuple[float, ...], theirs: tuple[float, ...]) -> float:
        return max(ours) / max(theirs) if max(theirs) > 0 else float("nan")

    ours, theirs = reductions(estimate), reductions(true)
    each = {}
    for position in true if per_parameter else ():
        if position in estimate:
            pair = (reductions({position: found[position]}) for found in (estimate, true))
            each[opt.estimation.names[position]] = ratio(*pair)
    return Effectiveness(sizes, ours, theirs, ratio(ours, theirs), each)


def _loss_after(opt: GuessGradOptimizer, closure: Closure, gradients: dict[int, Tensor], size: float) -> Tensor:
    """The loss with every parameter moved by ``-size`` times its gradient. Restores the parameters."""
    before = {k: opt.estimation.params[k].detach().clone() for k in gradients}
    try:
        with torch.no_grad():
            for k, g in gradients.items():
                opt.estimation.params[k].sub_(g.to(opt.estimation.params[k].dtype), alpha=size)
        with measuring(opt) as transaction:
            return ReversePass(opt, transaction).execute(closure, opt.estimation.by_position).loss
    finally:
        with torch.no_grad():
            for k, p in before.items():
                opt.estimation.params[k].copy_(p)


class CosineMatched:
    """Gradients for experiments: a random direction with a given cosine to the true gradient (Singhal 4 and A.2). It
    shows how a method with this cosine would train without bias. **It backpropagates**: it is not an estimator, and has
    no registered name.

    ``g^ = cos g_par + sin g_perp``. Both parts have norm 1: ``g_par`` is along g; ``g_perp`` is along ``v ~ N(0, I)``
    minus its part along g. g and v are vectors of all parameters.

    Args:
        cos: the cosine, -1 to 1.
        norm: norm of g^: ``"unit"`` (1, as in the paper) or ``"gradient"`` (the norm of g; it matters to SGD).
        seed: seed of the directions.

    >>> import torch, guessopt
    >>> net = torch.nn.Linear(4, 2)
    >>> opt = guessopt.GuessGradOptimizer(net.parameters(), torch.optim.AdamW, lr=1e-2)
    >>> x = torch.randn(8, 4)
    >>> source = CosineMatched(0.1, seed=0)
    >>> losses = [source.step(opt, lambda: net(x).square().mean()).item() for _ in range(100)]
    >>> losses[-1] < losses[0]
    True
    """

    def __init__(self, cos: float, *, norm: str = "unit", seed: int = 0) -> None:
        if not -1 <= cos <= 1:
            raise ValueError(f"cos: a cosine lies between -1 and 1, got {cos}")
        if norm not in ("unit", "gradient"):
            raise ValueError(f"norm: {norm!r} is not one of unit, gradient")
        self.cos, self.norm = cos, norm
        self._generator = torch.Generator().manual_seed(seed)

    def gradient(self, opt: GuessGradOptimizer, closure: Closure) -> dict[str, Tensor]:
        """Gradients by parameter name. Nothing changes but this object's random stream."""
        return self._gradient(opt, closure)[1]

    def step(self, opt: GuessGradOptimizer, closure: Closure) -> Tensor:
        """Write the gradients to ``.grad``, and update by the optimizer's base. Returns the loss before the update."""
        loss, gradients = self._gradient(opt, closure)
        for position, p in opt.estimation.by_position.items():
            p.grad = gradients[opt.estimation.names[position]]
            mark(p.grad)
        opt.step()
        return loss

    def _gradient(self, opt: GuessGradOptimizer, closure: Closure) -> tuple[Tensor, dict[str, Tensor]]:
        truth = Truth(opt, closure)
        true = named(opt, truth.gradient)
        g = joined(true)
        v = torch.randn(g.shape, dtype=g.dtype, generator=self._generator).to(g.device)
        size = g.norm()
        if size == 0:
            return truth.loss, true
        along = g / size
        across = v - (v @ along) * along
        if across.norm() > 0:
            across = across / across.norm()
        found = self.cos * along + (1 - self.cos**2) ** 0.5 * across
        if self.norm == "gradient":
            found = found * size
        parts = found.split([p.numel() * (2 if p.is_complex() else 1) for p in true.values()])
        return truth.loss, {name: _like(part, p) for (name, p), part in zip(true.items(), parts, strict=True)}


def _like(part: Tensor, p: Tensor) -> Tensor:
    """A part of the joined vector as a tensor of the shape and dtype of ``p``."""
    part = torch.view_as_complex(part.reshape(-1, 2)) if p.is_complex() else part
    return part.reshape(p.shape).to(p.dtype)
