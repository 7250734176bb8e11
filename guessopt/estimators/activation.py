"""Activation perturbation: an isotropic guess at each site (Ren 2022; Singhal 3.2; Wang 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from guessopt.estimator import Estimator
from guessopt.estimators.checks import check_noise
from guessopt.registry import register_estimator
from guessopt.sites import Site
from guessopt.tracing.context import SiteContext


@register_estimator("activation_perturbation")
@dataclass(frozen=True)
class ActivationPerturbation(Estimator):
    """``y ~ N(0, I)`` of the site's shape; unbiased.

    Args:
        masked: multiply by ``M_i``, the derivative of the activation that follows (Singhal 3.2, second insight). For
            ReLU this halves the dimension and adds no bias, since the cotangent carries the same mask.
        noise: kind of the entries.

    >>> ActivationPerturbation(masked=True).unbiased
    False
    """

    masked: bool = False
    noise: str = "normal"

    def __post_init__(self) -> None:
        check_noise(self.noise)

    @property
    def looks_ahead(self) -> bool:
        return self.masked

    @property
    def unbiased(self) -> bool:
        return not self.masked and self.noise != "uniform"

    @property
    def guided(self) -> bool:  # type: ignore[override]
        return self.masked

    def sample(self, state: Any, ctx: SiteContext) -> Tensor:
        y, m = ctx.noise(ctx.s.shape, self.noise), self._mask(ctx)
        return y if m is None else y * m

    def second_moment(self, state: Any, ctx: SiteContext, g: Tensor) -> Tensor | None:
        m = self._mask(ctx)
        return g if m is None else g * m * m

    def _mask(self, ctx: SiteContext) -> Tensor | None:
        return ctx.derivative() if self.masked and ctx.is_elementwise else None

    def note(self, site: Site) -> str | None:
        if self.masked and site.segment is not None and site.segment.elementwise is None:
            return "not masked: the path to the next matrix site is not elementwise"
        return None
