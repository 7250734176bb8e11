"""Batch norm in training mode: differentiated through its statistics, or with constant statistics."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import GuessGradOptimizer, GuessWarning, preflight
from guessopt.diagnostics import estimated_gradient

from .problems import Problem, labels, of


class Frozen(nn.BatchNorm1d):
    """The reference: statistics of the batch, detached."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x.detach(), 0, unbiased=False)
        return F.batch_norm(x, mean, variance, self.weight, self.bias, False, 0.0, self.eps)


def net(norm: type[nn.Module]) -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), norm(6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(8, 3, dtype=torch.float64)
    return of(model, lambda m: F.cross_entropy(m(x), labels(8, 2)))


@pytest.mark.parametrize("engine", ["fast", "dual", "func"])
def test_frozen_statistics_estimate_the_gradient_with_statistics_detached(engine: str) -> None:
    """The mean over draws, within 5 standard errors, along the reference gradient of each tensor."""
    problem, reference = net(nn.BatchNorm1d), net(Frozen)
    true = torch.autograd.grad(reference.closure(), reference.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GuessWarning)
        opt = GuessGradOptimizer(
            problem.named, torch.optim.SGD, "activation_perturbation", engine=engine, batch_norm="frozen_statistics",
            lr=0.1, seed=0,
        )  # fmt: skip
        draws = [estimated_gradient(opt, problem.closure) for _ in range(400)]
    for (name, _), g in zip(problem.named, true, strict=True):
        if g.abs().max() < 1e-12:  # the bias before a normalisation is of no account only with exact statistics
            continue
        each = torch.stack([(d[name] * g).sum() / g.square().sum() for d in draws])
        assert abs(float(each.mean()) - 1) < 5 * float(each.std()) / len(each) ** 0.5, name


def test_frozen_statistics_keep_the_examples_apart_and_say_what_it_costs() -> None:
    problem = net(nn.BatchNorm1d)
    exact = GuessGradOptimizer(problem.named, torch.optim.SGD, lr=0.1)
    frozen = GuessGradOptimizer(problem.named, torch.optim.SGD, lr=0.1, batch_norm="frozen_statistics")
    coupled, apart = preflight(exact, problem.closure), preflight(frozen, problem.closure)
    assert coupled.coupled == ("0.weight (linear)",) and any("interact" in note for note in coupled.notes)
    assert apart.coupled == () and any("bias" in note for note in apart.notes)


def test_running_statistics_move_as_in_a_plain_forward() -> None:
    plain, problem = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
    x = torch.randn(8, 3, dtype=torch.float64)
    opt = GuessGradOptimizer(problem.parameters(), torch.optim.SGD, lr=0.0, batch_norm="frozen_statistics")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GuessWarning)
        opt.step(lambda: problem(x).square().mean())
    plain(x)
    for name, value in plain.named_buffers():
        torch.testing.assert_close(dict(problem.named_buffers())[name], value)


def test_an_unknown_treatment_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_norm.*frozen_statistics"):
        GuessGradOptimizer([nn.Parameter(torch.zeros(1))], batch_norm="frozen")
