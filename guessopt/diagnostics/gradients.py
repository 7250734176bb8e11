"""True, estimated and expected gradients, and the cosines between them.

Letters: g the true gradient or cotangent, g^ an estimate of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guessopt.diagnostics.plots import bars, curve
from guessopt.diagnostics.reverse import Closure, Truth, draw, measuring, named, real, unfused
from guessopt.engine.gradients import parameter_gradients
from guessopt.optimizer import GuessGradOptimizer
from guessopt.step.modes import estimate_alone
from guessopt.tracing.context import NOISES


@dataclass(frozen=True)
class Cosine:
    """Cosine similarity of an estimated gradient with the true gradient.

    Attributes:
        total: all parameters as one vector.
        per_parameter: by parameter name.
        per_site: cotangents by site name, all examples as one vector. Sites whose parameters are guessed themselves
            (directional descent) are absent.
    """

    total: float
    per_parameter: dict[str, float]
    per_site: dict[str, float]

    def plot(self, ax: Any = None) -> Any:
        """A bar for each site, and one for the total; returns the axes. Needs matplotlib."""
        return bars({**self.per_site, "all parameters": self.total}, ax, "cosine to the true gradient")


@dataclass(frozen=True)
class CosineByGuesses:
    """Cosine of the mean of ``guesses[j]`` independent estimates with the true gradient (all parameters)."""

    guesses: tuple[int, ...]
    cosine: tuple[float, ...]

    def plot(self, ax: Any = None) -> Any:
        """Singhal Figure 4, left; returns the axes. Needs matplotlib."""
        ax = curve(self.guesses, {"": self.cosine}, ax, "guesses", "cosine to the true gradient")
        ax.set_xscale("log", base=2)
        return ax


def true_gradient(opt: GuessGradOptimizer, closure: Closure) -> dict[str, Tensor]:
    """The gradient by backpropagation, by parameter name. Nothing is changed.

    >>> import torch, guessopt
    >>> net = torch.nn.Linear(2, 1)
    >>> opt = guessopt.GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, lr=0.1)
    >>> true_gradient(opt, lambda: net(torch.ones(3, 2)).mean())["bias"]
    tensor([1.])
    """
    return named(opt, Truth(opt, closure).gradient)


def estimated_gradient(opt: GuessGradOptimizer, closure: Closure) -> dict[str, Tensor]:
    """One estimate by the optimizer's engine, by parameter name. The stream of guesses moves on, so two calls give
    different estimates. Nothing else is changed.

    >>> import torch, guessopt
    >>> net = torch.nn.Linear(2, 1)
    >>> opt = guessopt.GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, lr=0.1)
    >>> estimated_gradient(opt, lambda: net(torch.ones(3, 2)).mean())["weight"].shape
    torch.Size([1, 2])
    """
    with measuring(opt) as transaction:
        return named(opt, estimate_alone(opt.estimation, closure, transaction)[1])


def true_cotangents(opt: GuessGradOptimizer, closure: Closure) -> dict[str, Tensor]:
    """``g_i = dL/ds_i`` by backpropagation, in the shape of the site's output. Keys are site names: the first parameter
    that the site reads.

    >>> import torch, guessopt
    >>> net = torch.nn.Linear(2, 1)
    >>> opt = guessopt.GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, lr=0.1)
    >>> true_cotangents(opt, lambda: net(torch.ones(4, 2)).mean())["weight"].T
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    truth = Truth(opt, closure)
    return {name: truth.g[site.index] for name, site, _ in truth.sites()}


def expected_gradient(opt: GuessGradOptimizer, closure: Closure) -> dict[str, Tensor]:
    """``E g^`` by parameter name. Each site's true cotangent is multiplied by its estimator's declared second moment
    (Singhal eq. 14); the sites' rules turn the products into gradients. Uniform noise has a mean ``mu_i``, which
    couples the sites: ``E g^_i = Cov(y_i) g_i + mu_i sum_j <mu_j, g_j>``. With a ``discount``, ``g_i`` is the sum of
    the discounted cotangents of the positions' losses.

    Raises:
        ValueError: an estimator declares no second moment.

    >>> import torch, guessopt
    >>> net = torch.nn.Linear(2, 1)
    >>> opt = guessopt.GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, lr=0.1)
    >>> expected_gradient(opt, lambda: net(torch.ones(3, 2)).mean())["bias"]
    tensor([1.])
    """
    truth = Truth(opt, closure)
    return expected_from(truth, expected_cotangents(truth))


def expected_from(truth: Truth, expected: dict[int, Tensor | None]) -> dict[str, Tensor]:
    """``expected_gradient`` from a finished reverse pass and its ``expected_cotangents``."""
    opt, cotangents = truth.opt, {}
    for index, moment in expected.items():
        if moment is None:
            name = opt.estimation.estimator_of(truth.graph.sites[index]).name
            raise ValueError(f"{name} declares no second moment with these options")
        cotangents[index] = moment
    gradients = parameter_gradients(
        truth.graph, truth.record, cotangents, opt.estimation.by_position, opt.estimation.ids
    )
    for position, estimator in enumerate(opt.estimation.estimators):
        if estimator.noise == "uniform" and position in truth.means[1]:
            gradients[position] = gradients[position] + truth.means[1][position]
    return named(opt, gradients)


def expected_cotangents(truth: Truth) -> dict[int, Tensor | None]:
    """``E g^_i = E[y_i y_i^T] g_i`` (Singhal eq. 14) by site index, corrected by ``debias``, plus the part due to the
    guess's mean. None for a site whose estimator declares no second moment."""
    opt, graph = truth.opt, truth.graph
    found = _joint_cotangents(truth)
    for site in reversed(graph.sites):
        if site.index in found:
            continue
        estimator = opt.estimation.estimator_of(site)
        g = truth.credited[site.index]
        if opt.estimation.is_served(graph, site):
            assert site.shares is not None
            found[site.index] = found[site.shares]
            continue
        moment: Tensor | None = g
        if estimator.space == "parameters":
            moment = g * (opt.estimation.amplitudes[estimator] ** 2 * NOISES[estimator.noise][1])
        elif site.by_parameter and estimator.per_example_parameters:
            moment = g
        elif not opt.estimation.is_exact(site, estimator):
            ctx = truth.contexts[site.index]
            g = g if site.reach is None else site.reach.restrict(g)
            with torch.no_grad(), unfused():
                state = opt.estimation.prepared(site, estimator, ctx)
                moment = estimator.second_moment(state, ctx, g)
                if moment is not None and estimator.debias:
                    moment = estimator.correct(state, ctx, moment)
            if moment is not None and site.reach is not None:
                moment = site.reach.restrict(moment)
            if moment is not None and estimator.noise == "uniform":
                moment = moment * NOISES["uniform"][1] + truth.means[0][site.index]
        found[site.index] = moment
    return found


def _joint_cotangents(truth: Truth) -> dict[int, Tensor | None]:
    """``E g^_i`` of parallel sites. Their second moment is that of all their guesses side by side."""
    opt, found = truth.opt, dict[int, Tensor | None]()
    for joint in truth.joints:
        first = truth.graph.sites[joint.sites[0]]
        estimator, ctx = opt.estimation.estimator_of(first), truth.joint_local(joint)
        with torch.no_grad(), unfused():
            state = opt.estimation.prepared(first, estimator, ctx)
            moments: Any = estimator.second_moment(state, ctx, tuple(truth.credited[k] for k in joint.sites))  # type: ignore[arg-type]
        if moments is not None and estimator.noise == "uniform":
            means = (truth.means[0][k] for k in joint.sites)
            moments = [m * NOISES["uniform"][1] + mean for m, mean in zip(moments, means, strict=True)]
        found |= dict(zip(joint.sites, moments or [None] * len(joint.sites), strict=True))
    return found


def cosine(opt: GuessGradOptimizer, closure: Closure) -> Cosine:
    """Cosine similarity of one estimate with the true gradient (Singhal Figure 1). The estimate has as many guesses as
    a step of the optimizer.

    >>> import torch, guessopt
    >>> net = torch.nn.Linear(2, 1)
    >>> opt = guessopt.GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, lr=0.1, exact_last=True)
    >>> round(cosine(opt, lambda: net(torch.ones(3, 2)).mean()).total, 4)
    1.0
    """
    one, truth = draw(opt, closure, opt.guesses), Truth(opt, closure)
    estimate, true = named(opt, one.gradients), named(opt, truth.gradient)
    sites = {
        name: similarity(one.cotangents[site.index], truth.g[site.index])
        for name, site, _ in truth.estimated()
        if site.index in one.cotangents
    }
    each = {name: similarity(estimate[name], g) for name, g in true.items()}
    return Cosine(similarity(joined(estimate), joined(true)), each, sites)


def cosine_by_guesses(
    opt: GuessGradOptimizer, closure: Closure, counts: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
) -> CosineByGuesses:
    """Cosine of the running mean of independent estimates with the true gradient (Singhal Figure 4, left, there for a
    single example). It rises towards 1 for an unbiased estimator, and towards ``cos(E g^, g)`` for a biased one.

    Args:
        counts: numbers of guesses. The largest is the number of runs.

    >>> import torch, guessopt
    >>> net = torch.nn.Linear(2, 1)
    >>> opt = guessopt.GuessGradOptimizer(net.parameters(), torch.optim.SGD, "activation_perturbation", lr=0.1, seed=0)
    >>> found = cosine_by_guesses(opt, lambda: net(torch.randn(3, 2)).square().mean(), (1, 256))
    >>> found.guesses, found.cosine[1] > 0.9
    ((1, 256), True)
    """
    counts = sorted(set(counts))
    if not counts or counts[0] < 1:
        raise ValueError(f"counts: numbers of guesses must be at least 1, got {counts}")
    true = joined(true_gradient(opt, closure))
    total, found = torch.zeros_like(true), []
    for number in range(1, counts[-1] + 1):
        total += joined(named(opt, draw(opt, closure).gradients))
        if number in counts:
            found.append(similarity(total, true))
    return CosineByGuesses(tuple(counts), tuple(found))


def similarity(a: Tensor, b: Tensor) -> float:
    """Cosine of two tensors as vectors, in float64; 0 if one of them is 0."""
    return float(torch.cosine_similarity(real(a.flatten()).double(), real(b.flatten()).double(), dim=0))


def joined(gradients: dict[str, Tensor]) -> Tensor:
    """All gradients as one float64 vector. A complex entry gives two numbers."""
    return torch.cat([real(g.detach().flatten()).double() for g in gradients.values()])
