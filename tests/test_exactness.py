"""The engine is exact: summed over all one-hot guesses, ``D_n y`` is the gradient that autograd computes."""

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from guessopt import GuessGradOptimizer
from guessopt.diagnostics import true_gradient
from guessopt.estimators import Estimator
from guessopt.layout import Layout, numel
from guessopt.step.modes import estimate_alone

from .problems import PROBLEMS, Problem, build


class OneHot(Estimator):
    """A guess that is 1 at one entry of one site, in every example, and 0 elsewhere."""

    name: ClassVar[str] = "one_hot"
    per_example_parameters: ClassVar[bool] = False
    at: tuple[int, int] = (-1, 0)
    batch: int

    def sample(self, state: Any, local: Any) -> Tensor:
        site, entry = self.at
        y = torch.zeros(local.s.shape, dtype=local.s.dtype)
        if site != local.site.index:
            return y
        layout, batch = local.site.layout, self.batch
        if layout is Layout.COUPLED:
            y.view(-1)[entry] = 1
        elif layout is Layout.BATCH_FIRST:
            y.view(batch, -1)[:, entry] = 1
        elif layout is Layout.BATCH_SECOND:
            y.transpose(0, 1).reshape(batch, -1)  # a view only if contiguous: index instead
            inner = numel(tuple(y.shape[2:]))
            y.view(y.shape[0], batch, inner)[entry // inner, :, entry % inner] = 1
        elif layout is Layout.FLAT:
            y.view(batch, -1)[:, entry] = 1
        else:
            inner = numel(tuple(y.shape[1:]))
            y.view(-1, batch, inner)[entry // inner, :, entry % inner] = 1
        return y

    def options(self) -> dict[str, Any]:
        return {}


def one_hots(opt: GuessGradOptimizer) -> Iterator[tuple[int, int]]:
    graph = opt.estimation.plans[0].graph
    for site in graph.sites:
        if site.shares is None:
            entries = numel(site.shape) if site.layout is Layout.COUPLED else numel(site.shape) // graph.batch
            yield from ((site.index, entry) for entry in range(entries))


class Summing:
    """One optimizer; ``gradient()`` sums its gradients over all one-hot guesses along the current plan."""

    def __init__(self, problem: Problem, **options: Any) -> None:
        self.problem, self.estimator = problem, OneHot()
        self.opt = GuessGradOptimizer(
            problem.named, torch.optim.SGD, "activation_perturbation", lr=0.1, seed=0, **options
        )
        self.opt.estimation.estimators = [self.estimator] * len(problem.named)
        self.estimate((-1, 0), batch=1)

    def estimate(self, at: tuple[int, int], batch: int) -> dict[int, Tensor]:
        self.estimator.at, self.estimator.batch = at, batch
        return estimate_alone(self.opt.estimation, self.problem.closure)[1]

    def gradient(self) -> dict[str, Tensor]:
        self.estimate((-1, 0), 1)
        graph = self.opt.estimation.plans[0].graph
        runs, total = list(one_hots(self.opt)), dict[int, Tensor]()
        for at in runs:
            for k, g in self.estimate(at, graph.batch).items():
                total[k] = total[k] + g if k in total else g
        for k in graph.loss_params:  # exact in every run, not summed up over runs
            own = self.estimate((-1, 0), graph.batch).get(k)
            if own is not None:
                total[k] = total[k] - (len(runs) - 1) * own if k in total else own
        named = self.opt.estimation.by_position.items()
        return {self.opt.estimation.names[k]: total.get(k, torch.zeros_like(p)) for k, p in named}


def sum_over_one_hots(problem: Problem, engine: str) -> tuple[dict[str, Tensor], GuessGradOptimizer]:
    summing = Summing(problem, engine=engine)
    return summing.gradient(), summing.opt


#: The quick tests compare these engines with "fast" on every network; see test_contracts.py.
SLOW_ENGINES = [pytest.param(engine, marks=pytest.mark.slow) for engine in ("dual", "func")]


@pytest.mark.parametrize("engine", ["fast", *SLOW_ENGINES])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_sum_over_one_hot_guesses_is_the_gradient(name: str, engine: str) -> None:
    problem = build(name)
    total, opt = sum_over_one_hots(problem, engine)
    reference = torch.autograd.grad(problem.closure(), problem.parameters())
    assert opt.estimation.plans[0].graph.batch == problem.batch
    for (parameter, _), g in zip(problem.named, reference, strict=True):
        torch.testing.assert_close(total[parameter], g, rtol=1e-9, atol=1e-9 * float(g.abs().max()), msg=parameter)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_diagnostic_gradient_is_the_gradient(name: str) -> None:
    problem = build(name)
    opt = GuessGradOptimizer(problem.named, torch.optim.SGD, "activation_perturbation", lr=0.1)
    found = true_gradient(opt, problem.closure)
    reference = torch.autograd.grad(problem.closure(), problem.parameters())
    for (parameter, _), g in zip(problem.named, reference, strict=True):
        torch.testing.assert_close(found[parameter], g, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", ["w_perp", "w_transpose", "activation_perturbation", "directional_descent"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_engines_agree(name: str, estimator: str) -> None:
    """Own rules, and torch's on dual tensors, against ``torch.func.jvp``: the same guesses, the same gradients."""
    found = []
    for engine in ("func", "dual", "fast"):
        problem = build(name)
        opt = GuessGradOptimizer(problem.named, torch.optim.SGD, estimator, engine=engine, lr=0.1, seed=3)
        opt.estimate(problem.closure)
        found.append([p.grad for p in problem.parameters()])
    for func, *others in zip(*found, strict=True):
        assert func is not None
        for other in others:
            torch.testing.assert_close(other, func, rtol=1e-12, atol=1e-12 * float(func.abs().max()))
