"""What the memory experiments measure: problems, settings, and the methods in their memory modes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.baselines import InBackward
from benchmarks.methods import METHODS as TABLE
from benchmarks.methods import Method
from benchmarks.problems import Problem, images, mlp, vit
from benchmarks.training import Learner
from guessopt import GuessGradOptimizer, LearnedFeedback


@dataclass(frozen=True)
class Case:
    """A problem. ``--quick`` has a smaller one under the same name."""

    title: str
    make: Callable[[], Problem]


FULL = {
    "mlp12": Case("MLP 12x1024", lambda: mlp(1024, 12, 512)),
    "mlp24": Case("MLP 24x1024", lambda: mlp(1024, 24, 512)),
    "vit6": Case("ViT depth 6", lambda: images(vit(depth=6), 64)),
    "mlp48": Case("MLP 48x1024", lambda: mlp(1024, 48, 512)),
    "vit12": Case("ViT depth 12", lambda: images(vit(depth=12), 64)),
}
QUICK = {
    "mlp12": Case("MLP 4x64", lambda: mlp(64, 4, 256)),
    "mlp24": Case("MLP 8x64", lambda: mlp(64, 8, 256)),
    "vit12": Case("ViT depth 2", lambda: images(vit(48, 2, patch=8), 4)),
}
TIMED = {
    False: {"mlp": Case("MLP 6x1024", lambda: mlp(1024, 6, 512)), "vit": FULL["vit6"]},
    True: {"mlp": QUICK["mlp12"], "vit": QUICK["vit12"]},
}


def _fused(name: str, mode: str = "", **options: Any) -> Method:
    method = TABLE[name]
    if not mode:
        return method.variant(fused=True)
    return method.variant(f"{method.label}, {mode}", fused=True, memory=mode, **options)


def _learned(mode: str) -> Method:
    """Predicts at the layer itself (``ahead=0``), which costs the least arithmetic. In mode "stream" learned feedback
    cannot go along residual streams."""
    estimator = partial(LearnedFeedback, gamma=0, every=4, ahead=0, residual=mode != "stream")
    return _fused("learned_feedback", mode, estimator=estimator)


METHODS: dict[str, Method] = {
    **{name: _fused(name) for name in ("backprop", "checkpointed", "in_backward")},
    "mezo": TABLE["mezo"],
    "directional_descent": _fused("directional_descent"),
    **{f"w_perp_{mode}": _fused("w_perp", mode) for mode in ("store", "replay", "stream")},
    "learned_feedback": _learned("store"),
    **{f"learned_feedback_{mode}": _learned(mode) for mode in ("replay", "stream")},
}
"""All but MeZO use AdamW's fused update, which makes no temporary copies of a parameter."""

EVERY = {name: 4 for name in METHODS if name.startswith("learned_feedback")}
"""Steps between two forward-mode passes, for methods that do not make one on every step."""
LR = 1e-4
RACERS = (
    "backprop", "checkpointed", "in_backward", "w_perp_store", "w_perp_replay", "w_perp_stream",
    "learned_feedback", "learned_feedback_replay", "learned_feedback_stream",
)  # fmt: skip
WITH_JVP = " on a step with a forward-mode pass"
LIMITED = ("backprop", "checkpointed", "in_backward", "w_perp_stream")
"""The methods that are tried under a memory limit."""


@dataclass(frozen=True)
class Settings:
    """Settings of the memory experiment.

    Attributes:
        steps: steps over which a peak is measured; ``long``: of the long run in mode "stream".
        rounds: rounds of timed steps for the table; ``race``: for the comparison of the memory modes.
        width, depth, batch: of the network under a limit; ``budget``: that limit in bytes.
    """

    quick: bool
    device: str
    steps: int
    long: int
    rounds: int
    race: int
    width: int
    depth: int
    batch: int
    budget: int

    def case(self, name: str) -> Problem:
        return (QUICK if self.quick else FULL)[name].make().to(self.device)


def settings_of(args: argparse.Namespace) -> Settings:
    if args.quick:
        return Settings(True, args.device, 2, 4, 1, 2, width=192, depth=40, batch=512, budget=10 * 2**20)
    return Settings(False, args.device, 3, 52, 3, 9, width=1024, depth=40, batch=1024, budget=64 * 2**20)


def optimizers_of(learner: Learner) -> list[Any]:
    """Every optimizer that holds state for the learner."""
    if isinstance(learner, InBackward):
        return list(learner.optimizers.values())
    own = learner.optimizer
    return [own.base if isinstance(own, GuessGradOptimizer) else own]


def state_bytes(learner: Learner) -> int:
    """Bytes of the optimizer's state."""
    states = [state for optimizer in optimizers_of(learner) for state in optimizer.state.values()]
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))
