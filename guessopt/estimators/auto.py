"""The choice of a guess left to what the trace finds at each site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from guessopt.estimator import Estimator, register_estimator
from guessopt.estimators.activation import ActivationPerturbation
from guessopt.estimators.downstream import Downstream
from guessopt.estimators.perp import WPerp
from guessopt.sites import Site
from guessopt.tracing.context import SiteContext


@register_estimator("auto")
@dataclass(frozen=True)
class Auto(Estimator):
    """Picks an estimator for each site; ``preflight`` shows which.

    - A linear layer or convolution of rank above 2k follows, behind whatever operations: ``WPerp(k)``, pulled back
      through these.
    - One of lower rank (a narrow layer, the head), of which W-perp would leave out little: ``Downstream()``.
    - The loss reads the output: the exact error, which is free (isotropic noise with ``exact_last=False``).
    - None of these, or what follows cannot be run by itself: ``ActivationPerturbation``.
    - Few parameters against a large output (a norm's scale): each example's parameters, as with any estimator.

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
