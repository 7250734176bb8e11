"""Bias, variance and second moment of the estimates, per site (Wang 4.1; Singhal eqs. 14 and 15).

Letters: n example, N examples, J draws, d entries of one example's output at a site, g the true cotangent, g^ its
estimate, C = E[y y^T] the second moment of the guess (its covariance, where its mean is zero; ``covariance_norm``
takes the covariance everywhere).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guessopt.diagnostics.gradients import expected_cotangents, expected_from, joined
from guessopt.diagnostics.plots import bars
from guessopt.diagnostics.reverse import Closure, Draw, Truth, double, draw, named, real, unfused
from guessopt.optimizer import GuessGradOptimizer
from guessopt.sites import Site
from guessopt.tracing.context import NOISES, SiteContext


@dataclass(frozen=True)
class Bias:
    """Bias of the estimate.

    Attributes:
        per_site: ``|| 1/N sum_n (C_n - I) g[n] ||`` (Wang eq. 17), for the loss as the closure returns it: a mean over
            the batch puts 1/N into ``g[n]`` as well.
        relative: ``per_site`` divided by ``|| 1/N sum_n g[n] ||``: 1 where the guess misses the gradient.
        total: ``||E g^ - g|| / ||g||`` of all parameters.
        declared: by site, whether ``C`` is the estimator's declared second moment. If not, the mean of ``draws``
            estimates replaces ``E g^``, and the bias is corrected for the variance of this mean.
    """

    per_site: dict[str, float]
    relative: dict[str, float]
    total: float
    declared: dict[str, bool]
    draws: int

    def plot(self, ax: Any = None) -> Any:
        """A bar per site; returns the axes. Needs matplotlib."""
        return bars(self.per_site, ax, "bias (Wang eq. 17)", log=True)


@dataclass(frozen=True)
class Variance:
    """Variance of the estimate of one guess.

    Attributes:
        per_site: ``1/N sum_n E ||g^[n] - E g^[n]||^2``: Wang eq. 18 with the element-wise square of the paper's text.
        of_mean: ``E || 1/N sum_n (g^[n] - E g^[n]) ||^2``: Wang eq. 18 as printed, with the square outside the mean.
        total: ``E ||g^ - E g^||^2 / ||g||^2`` of all parameters.
        errors, mean_errors, total_error: standard errors of ``per_site``, ``of_mean`` and ``total`` over the draws.
    """

    per_site: dict[str, float]
    of_mean: dict[str, float]
    total: float
    errors: dict[str, float]
    mean_errors: dict[str, float]
    total_error: float
    draws: int

    def plot(self, ax: Any = None) -> Any:
        """A bar per site; returns the axes. Needs matplotlib."""
        return bars(self.per_site, ax, "variance (Wang eq. 18)", log=True)


@dataclass(frozen=True)
class CovarianceNorm:
    """``||C_n - I||_F / d``, mean over the examples n (Wang 4.1, Table 2's last column); ``entries`` is d."""

    per_site: dict[str, float]
    entries: dict[str, int]

    def plot(self, ax: Any = None) -> Any:
        """A bar per site; returns the axes. Needs matplotlib."""
        return bars(self.per_site, ax, "||Cov - I||_F / d")


def bias(opt: GuessGradOptimizer, closure: Closure, draws: int = 100) -> Bias:
    """How far the expected estimate is from the truth (Wang eq. 17; Singhal eq. 15).

    Args:
        draws: number of forward-mode runs for estimators that declare no second moment. Other estimators need none.

    >>> import torch, guessopt
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> params, x = list(net.named_parameters()), torch.randn(6, 3)
    >>> closure = lambda: net(x).square().mean()
    >>> bias(guessopt.GuessGradOptimizer(params, torch.optim.SGD, "activation_perturbation"), closure).total
    0.0
    >>> bias(guessopt.GuessGradOptimizer(params, torch.optim.SGD, "w_transpose"), closure).per_site["0.weight"] > 0
    True
    """
    truth = Truth(opt, closure)
    expected = expected_cotangents(truth)
    declared = {name: expected[site.index] is not None for name, site, _ in truth.estimated()}
    complete = all(m is not None for m in expected.values())
    sample = None if complete else _sample(opt, closure, truth, expected, draws, None)
    per_site, relative = {}, {}
    for name, site, _ in truth.estimated():
        g = truth.rows(site, truth.g[site.index]).double().mean(0)
        moment = expected[site.index]
        if moment is not None:
            off = float((truth.rows(site, moment).double().mean(0) - g).norm())
        else:
            assert sample is not None
            squares = float((truth.rows(site, sample.mean[name]).mean(0) - g).square().sum())
            off = max(0.0, squares - float(sample.of_mean[name].mean()) / draws) ** 0.5
        per_site[name], relative[name] = off, off / max(float(g.norm()), 1e-300)
    true = joined(named(opt, truth.gradient))
    if complete:
        total = float((joined(expected_from(truth, expected)) - true).norm() / true.norm())
    else:
        assert sample is not None
        squares = float((sample.parameters - true).square().sum() - sample.total.mean() / draws)
        total = max(0.0, squares) ** 0.5 / float(true.norm())
    return Bias(per_site, relative, total, declared, 0 if complete else draws)


def variance(opt: GuessGradOptimizer, closure: Closure, draws: int = 100) -> Variance:
    """How far an estimate is from its expectation (Wang eq. 18), from ``draws`` forward-mode runs.

    Deviations are from the declared expectation. If none is declared, they are from the mean of the J draws, and the
    variance is divided by J - 1.

    >>> import torch, guessopt
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> opt = guessopt.GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, "activation_perturbation", seed=0)
    >>> x = torch.randn(6, 3)
    >>> found = variance(opt, lambda: net(x).square().mean(), draws=20)
    >>> sorted(found.per_site), found.per_site["0.weight"] > found.of_mean["0.weight"] > 0
    (['0.weight', '2.weight'], True)
    """
    if draws < 2:
        raise ValueError(f"draws: a variance needs at least 2, got {draws}")
    truth = Truth(opt, closure)
    expected = expected_cotangents(truth)
    complete = all(m is not None for m in expected.values())
    centre = joined(expected_from(truth, expected)) if complete else None
    sample = _sample(opt, closure, truth, expected, draws, centre)

    def error(t: Tensor) -> float:
        result: float = float(t.std()) / draws**0.5
        return result

    squared = float(joined(named(opt, truth.gradient)).square().sum())
    return Variance(
        {name: float(t.mean()) for name, t in sample.of_examples.items()},
        {name: float(t.mean()) for name, t in sample.of_mean.items()},
        float(sample.total.mean()) / squared,
        {name: error(t) for name, t in sample.of_examples.items()},
        {name: error(t) for name, t in sample.of_mean.items()},
        error(sample.total) / squared,
        draws,
    )


def covariance_norm(
    opt: GuessGradOptimizer, closure: Closure, examples: int | None = None, probes: int | None = None
) -> CovarianceNorm:
    """How far the guess is from isotropic: ``||C - I||_F / d`` (Wang 4.1). It does not depend on the gradient.

    Sites whose error is exact, whose parameters are guessed themselves, or that declare no second moment are absent.

    Args:
        examples: number of examples to average over (None: all).
        probes: number of products with random signs z, instead of all d columns of C: ``||A||_F^2 = E ||A z||^2``.

    >>> import torch, guessopt
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Identity(), torch.nn.Linear(8, 4))
    >>> opt = guessopt.GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, guessopt.WPerp(k=2), lr=0.1)
    >>> x = torch.randn(6, 3)
    >>> found = covariance_norm(opt, lambda: net(x).square().mean())  # 6 of the 8 eigenvalues of I - C are 1
    >>> round(found.per_site["0.weight"], 4) == round(6**0.5 / 8, 4)
    True
    """
    truth = Truth(opt, closure)
    per_site, entries = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, site, ctx in truth.estimated():
        apply = _covariance(truth, site, ctx)
        if apply is None:
            continue
        n = ctx.examples
        d = ctx.s.numel() // n * (2 if ctx.s.is_complex() else 1)
        squares = torch.zeros(n, dtype=torch.float64)
        for column in range(d if probes is None else probes):
            if probes is None:
                r = torch.zeros(n, d)
                r[:, column] = 1
            else:
                r = torch.randint(2, (n, d), generator=generator) * 2.0 - 1
            r = torch.view_as_complex(r.double().unflatten(1, (-1, 2))) if ctx.s.is_complex() else r
            v = site.layout.unrows(r.to(ctx.s.dtype).to(ctx.s.device), tuple(ctx.s.shape))
            with torch.no_grad(), unfused():
                moment = apply(v)
            if moment is None:
                break
            squares += real(site.layout.flat_rows(double(moment - v), n)).square().sum(1).cpu() / (probes or 1)
        else:
            per_site[name] = float(squares[:examples].sqrt().mean()) / d
            entries[name] = d
    return CovarianceNorm(per_site, entries)


def _covariance(truth: Truth, site: Site, ctx: SiteContext) -> Callable[[Tensor], Tensor | None] | None:
    """``v -> C v``, with C the covariance of the site's guess; None if the site's error is exact or learned."""
    opt = truth.opt
    estimator = opt.estimation.estimator_of(site)
    if estimator.learns or opt.estimation.is_exact(site, estimator):
        return None
    state = opt.estimation.prepared(site, estimator, ctx)

    def apply(v: Tensor) -> Tensor | None:
        v = v if site.reach is None else site.reach.restrict(v)
        moment = estimator.second_moment(state, ctx, v)
        moment = moment if moment is None or site.reach is None else site.reach.restrict(moment)
        return moment if moment is None or estimator.noise != "uniform" else moment * NOISES["uniform"][1]

    return apply


@dataclass
class _Sample:
    """Squared deviations, tensors ``[J]``, and the means of the estimates.

    Attributes:
        of_examples: by site name, the squared deviation averaged over examples.
        of_mean: by site name, the squared deviation of the mean over examples.
        total: of the parameter gradients as one vector.
        mean, parameters: means of the estimates: cotangents by site name; parameter gradients as one vector.
    """

    of_examples: dict[str, Tensor]
    of_mean: dict[str, Tensor]
    total: Tensor
    mean: dict[str, Tensor]
    parameters: Tensor


def _sample(
    opt: GuessGradOptimizer,
    closure: Closure,
    truth: Truth,
    expected: dict[int, Tensor | None],
    draws: int,
    centre: Tensor | None,
) -> _Sample:
    """Deviations of ``draws`` estimates from their declared expectations.

    Args:
        expected: see ``expected_cotangents``.
        centre: the expected parameter gradients as one vector. None: some expectation is not declared. Then the draws
            are made twice from equal random states: first to find their mean, then their deviations from the mean.
    """
    sites = [(name, site) for name, site, _ in truth.estimated()]
    noise = opt.estimation.noise.snapshot()

    def cotangent(one: Draw, site: Site) -> Tensor:
        found = one.cotangents.get(site.index)
        return double(torch.zeros_like(truth.g[site.index]) if found is None else found)

    means: dict[str, Tensor] = {name: double(torch.zeros_like(truth.g[site.index])) for name, site in sites}
    parameters = torch.zeros_like(joined(named(opt, {})))
    correction, lost = dict.fromkeys(means, 1.0), draws / max(draws - 1, 1)  # lost: to the fit of the mean
    if centre is None:
        for _ in range(draws):
            one = draw(opt, closure)
            for name, site in sites:
                means[name] += cotangent(one, site) / draws
            parameters += joined(named(opt, one.gradients)) / draws
        opt.estimation.noise.restore(noise)
        correction = {name: lost if expected[site.index] is None else 1.0 for name, site in sites}
    middle: dict[str, Tensor] = {}
    for name, site in sites:
        moment = expected[site.index]
        middle[name] = means[name] if moment is None else double(moment)
    of_examples: dict[str, list[Tensor]] = {name: [] for name, _ in sites}
    of_mean: dict[str, list[Tensor]] = {name: [] for name, _ in sites}
    total = []
    for _ in range(draws):
        one = draw(opt, closure)
        for name, site in sites:
            off = truth.rows(site, cotangent(one, site) - middle[name])
            of_examples[name].append(off.square().sum(1).mean().cpu() * correction[name])
            of_mean[name].append(off.mean(0).square().sum().cpu() * correction[name])
        away = joined(named(opt, one.gradients)) - (parameters if centre is None else centre)
        total.append(away.square().sum().cpu() * (lost if centre is None else 1.0))
    return _Sample(
        {name: torch.stack(each) for name, each in of_examples.items()},
        {name: torch.stack(each) for name, each in of_mean.items()},
        torch.stack(total),
        means,
        parameters,
    )
