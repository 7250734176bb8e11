"""The problem of a fine-tuning task, its settings, and the methods with their costs in passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.methods import METHODS as TABLE
from benchmarks.methods import Method
from benchmarks.training import Learner

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    """Settings of one task.

    Attributes:
        passes: budget of each method, in passes through the network.
        train, validation, test: numbers of examples.
        looks: evaluations during a run.
        grid: lowest and highest level of the learning rates (see ``runs.rate``).
    """

    passes: int
    batch: int
    train: int
    validation: int
    test: int
    looks: int = 6
    grid: tuple[int, int] = (-16, 0)


@dataclass(frozen=True)
class Problem:
    """A pretrained model and data. The parameters to be tuned require gradients, all others do not.

    Attributes:
        blocks: the modules of a model that checkpointing recomputes.
        note: model and data in words, for the table.
        head: name of the last layer; None: it is not tuned.
    """

    model: nn.Module
    blocks: Callable[[Any], Iterable[nn.Module]]
    train: Pair
    validation: Pair
    test: Pair
    note: str
    head: str | None = None

    @property
    def tuned(self) -> float:
        """The share of the parameters that is tuned."""
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        return sum(n for n, wanted in sizes if wanted) / sum(n for n, _ in sizes)

    def to(self, device: str) -> Problem:
        def moved(pair: Pair) -> Pair:
            return pair[0].to(device), pair[1].to(device)

        train, validation, test = (moved(pair) for pair in (self.train, self.validation, self.test))
        return replace(self, model=self.model.to(device), train=train, validation=validation, test=test)


def split(x: Tensor, y: Tensor, settings: Settings) -> tuple[Pair, Pair, Pair]:
    """Training, validation and test set. The last examples are for the test; a random order divides the others."""
    known = len(x) - settings.test
    order = torch.randperm(known, generator=torch.Generator().manual_seed(0))
    train, validation = order[: settings.train], order[settings.train : settings.train + settings.validation]
    return (x[train], y[train]), (x[validation], y[validation]), (x[known:], y[known:])


@dataclass(frozen=True)
class Priced:
    """A method, and the cost of its steps.

    Attributes:
        passes: cost of a step in passes; ``tuned`` times the share of the weights that is tuned comes on top.
        follows: the method that has the same gradients, and therefore the same runs.
    """

    method: Method
    passes: float
    tuned: float = 0.0
    follows: str | None = None

    @property
    def label(self) -> str:
        return self.method.label

    def steps(self, settings: Settings, problem: Problem) -> int:
        return int(settings.passes / (self.passes + self.tuned * problem.tuned))

    def learner(self, problem: Problem, model: nn.Module, lr: float) -> Learner:
        options: dict[str, Any] = {}
        if self.method is TABLE["checkpointed"]:
            options["blocks"] = problem.blocks(model)
        if self.method is TABLE["head"]:
            options["head"] = problem.head
        return self.method.learner(model, lr, **options)


METHODS = {
    "backprop": Priced(TABLE["backprop"], 2, 1),
    "checkpointed": Priced(TABLE["checkpointed"], 3, 1, follows="backprop"),
    "head": Priced(TABLE["head"], 1),
    "mezo": Priced(TABLE["mezo"], 2),
    "directional_descent": Priced(TABLE["directional_descent"], 2),
    "w_perp": Priced(TABLE["w_perp"].variant(exact_last=True), 2, 1),
    "w_perp_stream": Priced(
        TABLE["w_perp"].variant("W-perp, stream", exact_last=True, memory="stream"), 3, 1, follows="w_perp"
    ),
    "learned_feedback": Priced(TABLE["learned_feedback"].variant(memory="replay"), 4, 1),
}
"""A pass is one evaluation of the network, or one way of tangents or gradients through it.

Gradients of parameters cost another pass times the share of the weights that is tuned. All these models have a residual
stream, along which learned feedback carries no tangents: it runs each block once more, so that it keeps one block at a
time, and carries gradients through the block twice.
"""
