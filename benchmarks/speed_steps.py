"""Steps of every kind on copies of one problem, for timing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import internals
from benchmarks.measure import Step
from benchmarks.methods import METHODS
from benchmarks.problems import Problem, cnn, images, mlp, relu_mlp, text, vit
from guessopt import GuessGradOptimizer
from guessopt.options import Engine

ENGINES: tuple[str, ...] = get_args(Engine)
DEFAULT_ENGINE: str = inspect.signature(GuessGradOptimizer).parameters["engine"].default
UNFUSED_ATTENTION = "unfused attention with engine {}, which has no forward-mode rule for the fused one"


@dataclass(frozen=True)
class Entry:
    """A problem that is made for a batch size; ``quick``: the batch size of ``--quick``."""

    title: str
    make: Callable[[int], Problem]
    batch: int
    quick: int


PROBLEMS = {
    "mlp6x1024": Entry("MLP 6x1024", lambda n: mlp(1024, 6, n), batch=512, quick=32),
    "mlp12x32": Entry("MLP 12x32", lambda n: mlp(32, 12, n), batch=64, quick=64),
    "cnn": Entry("CNN", lambda n: images(cnn(), n), batch=64, quick=4),
    "vit": Entry("ViT", lambda n: images(vit(), n), batch=64, quick=2),
    "lm": Entry("causal LM", text, batch=16, quick=2),
}
GUESS_PROBLEMS = {
    "mlp6x1024": PROBLEMS["mlp6x1024"],
    "mlp3x128": Entry(
        "MNIST-1D MLP 3x128",
        lambda n: Problem(relu_mlp(128, 3), torch.randn(n, 40), torch.randint(10, (n,))),
        batch=512,
        quick=64,
    ),
}
"""The problems on which the cost of several guesses is measured."""


class Bench:
    """Makes steps, each on a copy of the problem of its own and each warmed up.

    Attributes:
        notes: what some steps do differently from the others.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.notes: list[str] = []

    def forward(self) -> Step:
        """The closure alone."""
        return warm(torch.no_grad()(self.problem.loss))

    def step(self, method: str, **options: Any) -> Step:
        """A step of a method; ``options``: beside those of the table of methods."""
        own = self.problem.copy()
        learner = METHODS[method].learner(own.model, **options)
        return self._with_attention(partial(learner.step, own.x, own.y), options.get("engine"))

    def empty_pass(self, engine: str) -> Step:
        """A guess step without guesses: it shows the cost of intercepting the closure's calls."""
        own = self.problem.copy()
        opt = METHODS["activation_perturbation"].learner(own.model, engine=engine).optimizer

        def step() -> None:
            with internals.without_guesses():
                opt.estimate(own.loss)

        return self._with_attention(step, engine)

    def _with_attention(self, step: Step, engine: str | None) -> Step:
        """The step, with unfused attention if the engine has no rule for the fused one."""
        try:
            return warm(step)
        except NotImplementedError as error:
            if "scaled_dot_product" not in str(error):
                raise

        def unfused() -> None:
            with sdpa_kernel(SDPBackend.MATH):
                step()

        if (note := UNFUSED_ATTENTION.format(engine)) not in self.notes:
            self.notes.append(note)
        return warm(unfused)


def warm(step: Step) -> Step:
    """The step after five calls: tracing, probes and allocations of the first steps are over."""
    for _ in range(5):
        step()
    return step
