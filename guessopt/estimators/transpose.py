"""W^T: noise at the next matrix site's output, pulled back to this site (Singhal 3.2, eq. 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from guessopt.estimators.base import Estimator, check_noise, register_estimator
from guessopt.sites import Matrix
from guessopt.tracing.local import Local


def pull_back_noise(local: Local, rows: list[tuple[Matrix, Tensor]], noise: str) -> Tensor:
    """``y = J^T sum_m rows_m^T e_m``: noise through matrices ``[b, r, i]`` and the segment before them."""
    u: Tensor | None = None
    for m, r in rows:
        e = local.noise(m.rule.cotangent_shape(m, r, m.x_shape), noise)
        v = m.rule.transpose(m, r, e, m.x_shape)
        u = v if u is None else u + v
    assert u is not None
    return local.pull_back(u)


def moment_through(local: Local, rows: list[tuple[Matrix, Tensor]], g: Tensor) -> Tensor:
    """``J^T (sum_m rows_m^T rows_m) J g``: the second moment of ``pull_back_noise`` (Wang eq. 6)."""
    v = local.push_forward(g)
    u: Tensor | None = None
    for m, r in rows:
        w = m.rule.transpose(m, r, m.rule.apply(m, r, v), m.x_shape)
        u = w if u is None else u + w
    assert u is not None
    return local.pull_back(u)


@register_estimator("w_transpose")
@dataclass(frozen=True)
class WTranspose(Estimator):
    """``y = W~^T e``, ``e ~ N(0, I)``; ``M_i W_{i+1}^T e`` in a ReLU MLP. Last site: ``N(0, I)``.

    Biased: ``E[y y^T] = W~^T W~`` (Wang eq. 6).

    >>> WTranspose().unbiased
    False
    """

    noise: str = "normal"

    def __post_init__(self) -> None:
        check_noise(self.noise)

    def sample(self, state: Any, local: Local) -> Tensor:
        if local.site.is_last:
            return local.noise(local.s.shape, self.noise)
        return pull_back_noise(local, local.weights(), self.noise)

    def second_moment(self, state: Any, local: Local, g: Tensor) -> Tensor | None:
        if self.noise == "uniform":
            return None
        return g if local.site.is_last else moment_through(local, local.weights(), g)
