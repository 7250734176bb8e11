"""An estimator for each site, chosen by what the trace finds there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from guessopt.estimator import Estimator
from guessopt.estimators.activation import ActivationPerturbation
from guessopt.estimators.downstream import Downstream
from guessopt.estimators.perp import WPerp
from guessopt.registry import register_estimator
from guessopt.sites import Site
from guessopt.tracing.context import SiteContext


@register_estimator("auto")
@dataclass(frozen=True)
class Auto(Estimator):
    """Picks an estimator for each site; ``preflight`` shows which.

    | the site | estimator |
    |---|---|
    | a linear layer or convolution of rank above 2k follows | ``WPerp(k)``, pulled back through the calls between |
    | one of lower rank follows (a narrow layer, the head) | ``Downstream()``: W-perp would leave out little |
    | the loss reads the output | the exact error, which is free; with ``exact_last=False`` isotropic noise |
    | a large output and few parameters (a norm's scale) | each example's parameters, as with any estimator |
    | any other, or the calls that follow cannot run by themselves | ``ActivationPerturbation()`` |

    In the second row it is ``WPerp(k)`` if the calls that ``Downstream`` would pass cannot run by themselves.

    Args:
        k: dimension of the W-perp guesses.

    >>> import torch, guessopt
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
    >>> opt = guessopt.GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, "auto", lr=0.1)
    >>> [site.guess for site in guessopt.preflight(opt, lambda: net(torch.ones(5, 3)).square().mean()).sites]
    ['auto: w_perp k=10', 'none: exact error']
    """

    k: int = WPerp.k
    exact_last: ClassVar[bool] = True

    def __post_init__(self) -> None:
        WPerp(k=self.k)

    def for_site(self, site: Site) -> Estimator:
        if site.segment is None:
            return ActivationPerturbation() if site.cut is None else self
        return WPerp(k=self.k) if site.rank > 2 * self.k or not site.segment.onward else Downstream()

    def sample(self, state: Any, ctx: SiteContext) -> Tensor:
        return ctx.noise(ctx.s.shape)

    def second_moment(self, state: Any, ctx: SiteContext, g: Tensor) -> Tensor:
        return g
