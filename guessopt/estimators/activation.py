"""Activation perturbation: an isotropic guess at each site (Ren 2022; Singhal 3.2; Wang 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from guessopt.estimator import Estimator, check_noise, register_estimator
from guessopt.sites import Site
from guessopt.tracing.context import SiteContext


@register_estimator("activation_perturbation")
@dataclass(frozen=True)
class ActivationPerturbation(Estimator):
    """``y ~ N(0, I)`` of the site's shape; unbiased.

    Args:
        masked: multiply by ``M_i``, the derivative of the activation that follows (Singhal 3.2, second insight). For
            ReLU this changes no expectation, since the cotangent carries the same mask, and halves the dimension.
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
        y = ctx.noise(ctx.s.shape, self.noise)
        m = ctx.derivative() if self.masked and ctx.is_elementwise else None
        return y if m is None else y * m

    def second_moment(self, state: Any, ctx: SiteContext, g: Tensor) -> Tensor | None:
        m = ctx.derivative() if self.masked and ctx.is_elementwise else None
        return g if m is None else g * m * m

    def note(self, site: Site) -> str | None:
        if self.masked and site.segment is not None and site.segment.elementwise is None:
            return "not masked: the path to the next matrix site is not elementwise"
        return None
