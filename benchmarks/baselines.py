"""What guessing is compared with in memory: checkpointing, the optimizer in the backward pass, two forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from benchmarks.speed import layers
from benchmarks.training import ESTIMATORS, Backprop, Guess, Learner
from guessopt import GuessGradOptimizer, LearnedFeedback
from guessopt.options import Memory
from guessopt.rng import RandomState


class Fused(Backprop):
    """Backpropagation with AdamW's fused update, which makes no temporary copies of a parameter."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__(model, lr)
        self.optimizer = AdamW(model.parameters(), lr=lr, fused=True)


class Checkpointed(Fused):
    """The same; what is inside each layer or block is forgotten and computed again in the backward pass."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        assert isinstance(self.model, nn.Sequential)
        for layer in layers(self.model):
            x = checkpoint(layer, x, use_reentrant=False)
        return F.cross_entropy(x, y)


class InBackward(Checkpointed):
    """Checkpointed, and each parameter updated as soon as its gradient is whole, which is then freed."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__(model, lr)
        self.optimizers = {p: AdamW([p], lr=lr, fused=True) for p in model.parameters()}
        for p in self.optimizers:
            p.register_post_accumulate_grad_hook(self._update)

    def _update(self, p: Tensor) -> None:
        self.optimizers[p].step()  # type: ignore[index]
        p.grad = None

    def step(self, x: Tensor, y: Tensor) -> None:
        self.loss(x, y).backward()


class MeZO(Optimizer):
    """Two forward passes, at the parameters moved by ``+eps z`` and by ``-eps z`` (Malladi et al. 2023, Algorithm 1).

    ``z`` is drawn anew from its seed each time, and parameters are moved in place: nothing their size is kept.
    """

    def __init__(self, params: Any, lr: float = 1e-6, eps: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """Returns the mean of the two losses. Both passes draw the same random numbers (dropout)."""
        seed = int(torch.randint(2**62, ()))
        loss, slope = self._slope(closure, seed)
        self._move(seed, lambda group: group["eps"] - group["lr"] * slope)
        return loss

    def _slope(self, closure: Callable[[], Tensor], seed: int) -> tuple[Tensor, float]:
        """The loss and its slope along ``z``; leaves the parameters at ``-eps z``."""
        state = RandomState.capture()
        self._move(seed, lambda group: group["eps"])
        above = closure()
        state.restore()
        self._move(seed, lambda group: -2 * group["eps"])
        below = closure()
        return (above + below) / 2, float(above - below) / (2 * self.defaults["eps"])

    def _move(self, seed: int, scale: Callable[[dict[str, Any]], float]) -> None:
        for group, p, z in self.directions(seed):
            p.add_(z, alpha=scale(group))

    def directions(self, seed: int) -> Iterable[tuple[dict[str, Any], Tensor, Tensor]]:
        """Group, parameter and ``z``, one parameter at a time."""
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    generator = generators.setdefault(p.device, torch.Generator(p.device).manual_seed(seed))
                    yield group, p, torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=generator)


class ZerothOrder(Learner):
    """Trains with MeZO."""

    optimizer: MeZO

    def __init__(self, model: nn.Module, lr: float, eps: float = 1e-3) -> None:
        super().__init__(model)
        self.optimizer = MeZO(model.parameters(), lr, eps)

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.step(lambda: self.loss(x, y))

    def cosine(self, x: Tensor, y: Tensor) -> float:
        own, seed = self.optimizer, int(torch.randint(2**62, ()))
        with torch.no_grad():
            _, slope = own._slope(lambda: self.loss(x, y), seed)
            own._move(seed, lambda group: group["eps"])
        true = torch.autograd.grad(self.loss(x, y), [p for _, p, _ in own.directions(seed)])
        guess = torch.cat([z.flatten() for *_, z in own.directions(seed)])
        return cosine_similarity(slope * guess, torch.cat([g.flatten() for g in true]), dim=0).item()


class Guessed(Guess):
    """A guess optimizer in one of its memory modes, on the same fused AdamW. Learned feedback predicts at the site
    itself, its least arithmetic; with ``"stream"``, which does not go along residual streams, it leaves these alone."""

    def __init__(self, model: nn.Module, lr: float, method: str, memory: Memory = "store") -> None:
        super().__init__(model, lr, method)
        estimator = ESTIMATORS[method]()
        if isinstance(estimator, LearnedFeedback):
            estimator = replace(estimator, ahead=0, residual=memory != "stream")
        self.every = getattr(estimator, "every", 1)  # steps between forward-mode passes
        self.optimizer = GuessGradOptimizer(model.parameters(), AdamW, estimator, memory=memory, lr=lr, fused=True)


LEARNERS: dict[str, tuple[str, Callable[[nn.Module, float], Learner]]] = {
    "backprop": ("backprop", Fused),
    "checkpointed": ("checkpointed backprop", Checkpointed),
    "in_backward": ("+ optimizer in the backward", InBackward),
    "mezo": ("MeZO", ZerothOrder),
    "directional_descent": ("forward gradient", lambda model, lr: Guessed(model, lr, "directional_descent")),
    "w_perp_store": ("W-perp, store", lambda model, lr: Guessed(model, lr, "w_perp")),
    "w_perp_replay": ("W-perp, replay", lambda model, lr: Guessed(model, lr, "w_perp", "replay")),
    "w_perp_stream": ("W-perp, stream", lambda model, lr: Guessed(model, lr, "w_perp", "stream")),
    "learned_feedback": ("learned feedback, store", lambda model, lr: Guessed(model, lr, "learned_feedback")),
    "learned_feedback_replay": (
        "learned feedback, replay",
        lambda model, lr: Guessed(model, lr, "learned_feedback", "replay"),
    ),
    "learned_feedback_stream": (
        "learned feedback, stream",
        lambda model, lr: Guessed(model, lr, "learned_feedback", "stream"),
    ),
}
"""By name, a label and what makes the learner from a model and a learning rate."""


def optimizers_of(learner: Learner) -> list[Optimizer]:
    """Every optimizer that holds state for the learner."""
    if isinstance(learner, InBackward):
        return list(learner.optimizers.values())
    own = learner.optimizer
    return [own.base if isinstance(own, GuessGradOptimizer) else own]


def state_bytes(learner: Learner) -> int:
    """Bytes of the optimizer's state."""
    states = [state for optimizer in optimizers_of(learner) for state in optimizer.state.values()]
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))
