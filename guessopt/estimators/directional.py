"""Directional descent: guess the parameters' gradient itself (Singhal A.2; Baydin 2022; Wang's weight perturbation)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from guessopt.estimator import Estimator
from guessopt.estimators.checks import check_noise
from guessopt.registry import register_estimator
from guessopt.tracing.context import SiteContext


@register_estimator("directional_descent")
@dataclass(frozen=True)
class DirectionalDescent(Estimator):
    """``v ~ N(0, I)`` on the parameters; ``grad = D v`` with ``D = sum_n D_n``. Unbiased; its variance grows with P.

    Args:
        scaled: divide ``v`` by ``sqrt(P)``, P the number of trainable entries, as Singhal A.2 does; the estimate then
            shrinks by P in expectation.
        noise: kind of ``v``'s entries.

    >>> DirectionalDescent().unbiased
    True
    """

    scaled: bool = False
    noise: str = "normal"
    space: ClassVar[str] = "parameters"
    guided: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_noise(self.noise)

    @property
    def looks_ahead(self) -> bool:
        return False

    @property
    def unbiased(self) -> bool:
        return not self.scaled and self.noise != "uniform"

    def amplitude(self, entries: int) -> float:
        return entries**-0.5 if self.scaled else 1.0

    def sample(self, state: Any, ctx: SiteContext) -> Tensor:
        raise TypeError("DirectionalDescent guesses parameters, not a site's cotangent")
