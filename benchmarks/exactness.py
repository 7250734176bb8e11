"""How far the engine is from the true gradient, measured without a sum over all one-hot guesses.

The sum of the estimates over all one-hot guesses is the gradient if and only if two things hold:

1. ``D_n = sum_i <y_i[n], g_i[n]>`` for every guess ``y``, where ``g_i`` is the true cotangent of site i;
2. the sites' own rules turn the ``g_i`` into autograd's gradients.

Both sides of (1) are linear in ``y``. A linear function that vanishes at a normal random ``y`` is zero with
probability one, and its mean square there is its squared norm: a few draws measure how far (1) is from holding.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.zoo import Subject
from guessopt import GuessGradOptimizer, GuessWarning
from guessopt.diagnostics.reverse import Truth, measuring
from guessopt.engine.gradients import parameter_gradients
from guessopt.engine.jvp.duals import inner
from guessopt.estimators import Estimator
from guessopt.graph import SiteGraph
from guessopt.layout import Layout
from guessopt.ops import Rule
from guessopt.record import ForwardRecord
from guessopt.step.runs import forward


class _Apart(Estimator):
    """Normal noise, but none at coupled sites. (A guess there would add to the ``D_n`` of all examples.)"""

    name: ClassVar[str] = "apart"
    per_example_parameters: ClassVar[bool] = False

    def sample(self, state: Any, local: Any) -> Tensor:
        coupled = local.site.layout is Layout.COUPLED
        y: Tensor = torch.zeros_like(local.s) if coupled else local.noise(local.s.shape)
        return y


@dataclass(frozen=True)
class Exactness:
    """Relative errors.

    Attributes:
        derivatives: root mean square of ``D_n - sum_i <y_i[n], g_i[n]>`` over that of ``||g[n]||``.
        gradients: the largest ``||G - G_autograd||`` of a parameter over ``||G_autograd||`` (its own, but at least a
            thousandth of all parameters' together).
    """

    derivatives: float
    gradients: float

    @property
    def error(self) -> float:
        return max(self.derivatives, self.gradients)


def exactness(subject: Subject, *, draws: int = 2, **options: Any) -> Exactness:
    """Measure one subject; nothing of it is changed.

    Args:
        draws: random guesses of each of two kinds: at all sites, with the sites' few parameters guessed themselves
            where a step would (``D`` summed over the batch where a site is coupled); and at all sites but the coupled
            (``D_n`` by example).
        options: for ``GuessGradOptimizer``.
    """
    named, closure = subject.named(), subject.closure
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GuessWarning)
        opt = GuessGradOptimizer(named, torch.optim.SGD, "activation_perturbation", seed=0, lr=0.0, **options)
        truth = Truth(opt, closure)
        errors, norms = 0.0, 0.0
        for estimator in (opt.estimation.estimators[0], _Apart()):
            opt.estimation.estimators = [estimator] * len(named)
            opt.estimation.plans[0].assignments = None
            for _ in range(draws):
                with measuring(opt) as transaction:
                    plan, record = forward(opt.estimation, closure, transaction)
                error, norm = _derivative_error(plan.graph, record, truth)
                errors, norms = errors + error, norms + norm
    found = parameter_gradients(truth.graph, truth.record, truth.g, opt.estimation.by_position, opt.estimation.ids)
    with measuring(opt):
        reference = torch.autograd.grad(closure(), [p for _, p in named], materialize_grads=True)
    least = 1e-3 * _norm(*reference)
    gradients = max(_norm(found[k] - g if k in found else g) / max(_norm(g), least) for k, g in enumerate(reference))
    return Exactness(math.sqrt(errors / norms), gradients)


def _norm(*tensors: Tensor) -> float:
    return math.sqrt(sum(float(inner(t, t).double().sum()) for t in tensors))


def _derivative_error(graph: SiteGraph, record: ForwardRecord, truth: Truth) -> tuple[float, float]:
    """Squared error of ``D``, by example where guesses are, and the cotangents' squared norm."""
    n, coupled = record.d.shape[0], Layout.COUPLED
    expected, norm = torch.zeros(n, dtype=torch.float64), 0.0
    whole = n == 1
    for index, y in record.guesses.items():
        layout, g = graph.sites[index].layout, truth.g[index]
        if layout is coupled and bool(y.any()):
            whole = True
        expected += layout.sum_examples(inner(g, y).double(), n).cpu() / (n if layout is coupled else 1)
        norm += float(inner(g, g).double().sum())
    for saved in record.saved_calls:
        if saved.directions is None:
            continue
        (site,) = graph.sites_at[saved.call.index]
        whole = whole or site.layout is coupled
        for k, v in enumerate(saved.directions):
            for example in range(v.shape[0]):
                one = torch.zeros(n, dtype=torch.float64)
                one[example if v.shape[0] == n else slice(None)] = 1
                mask = 1 if v.shape[0] < n else site.layout.spread(one, site.shape)
                g = truth.g[site.index] * mask
                own = Rule().gradients(
                    saved.call.fn, saved.args, saved.kwargs, site.output, [saved.wanted[k]], g.to(site.dtype)
                )[0]
                assert own is not None
                product = float(inner(own, v[example]).double().sum())
                expected += one * product / float(one.sum())
                norm += float(inner(own, own).double().sum())
    error = record.d.double().cpu() - expected
    return float(error.sum() ** 2 if whole else error.square().sum()), norm
