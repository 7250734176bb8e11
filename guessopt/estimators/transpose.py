"""W^T: noise at the next matrix site's output, pulled back to this site (Singhal 3.2, eq. 6; Wang 2, eq. 4).

Letters: b block (convolution group), o output row, i input column, r row of a matrix in place of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import Any, ClassVar

from torch import Tensor

from guessopt.estimator import Estimator
from guessopt.estimators.checks import check_debias, check_noise, check_refresh
from guessopt.linalg import of_singular_values
from guessopt.registry import register_estimator
from guessopt.sites import Matrix, Site
from guessopt.tracing.context import SiteContext, alike

#: The next matrix sites, each with a matrix in place of its weight, ``[b, r, i]``.
Matrices = list[tuple[Matrix, Tensor]]

#: A Jacobian, or its transpose, as a function of a tensor. For parallel sites the site's side is a tuple of tensors.
Jacobian = Callable[[Any], Any]


def w_transpose(z: Sequence[Tensor], W: Matrices, M: Jacobian) -> Any:
    """``y = M sum_m W_m^T z_m`` (Singhal 3.2, eq. 6; Wang eq. 4).

    Args:
        z: noise at the output of each matrix site.
        W: the matrices.
        M: transposed Jacobian of the calls between the site and the matrix sites; in a ReLU MLP ``u -> M u``.
    """
    parts = (m.rule.transpose(m, w, alike(e, w), m.x_shape) for (m, w), e in zip(W, z, strict=True))
    return M(reduce(add, parts))


def w_transpose_moment(g: Any, W: Matrices, J: Jacobian, M: Jacobian) -> Any:
    """``E[y y^T] g = M (sum_m W_m^T W_m) J g`` (Wang eq. 6) with ``J`` the transpose of ``M``."""
    v = J(g)
    return w_transpose([m.rule.apply(m, w, alike(v, w)) for m, w in W], W, M)


def noise_at(W: Matrices, ctx: SiteContext, kind: str = "normal") -> list[Tensor]:
    """Noise ``z`` at the output of each matrix site, one entry for each row of its matrix and each position."""
    return [ctx.noise(m.rule.cotangent_shape(m, w, m.x_shape), kind) for m, w in W]


def pull_back_noise(ctx: SiteContext, W: Matrices, kind: str = "normal") -> Any:
    """``w_transpose`` of new noise."""
    return w_transpose(noise_at(W, ctx, kind), W, partial(ctx.pull_back, spent=True))


def moment_through(ctx: SiteContext, W: Matrices, g: Any) -> Any:
    """The second moment of ``pull_back_noise``, applied to ``g``."""
    return w_transpose_moment(g, W, ctx.push_forward, ctx.pull_back)


def matrices(state: Sequence[Tensor] | None, ctx: SiteContext) -> Matrices:
    """The next matrix sites with the matrices that ``prepare`` made, or with their weights if it made none."""
    if state is None:
        return ctx.weights()
    assert ctx.site.segment is not None
    return list(zip(ctx.site.segment.matrices, state, strict=True))


@register_estimator("w_transpose")
@dataclass(frozen=True)
class WTranspose(Estimator):
    """``y = W~^T e``, ``e ~ N(0, I)``; ``M_i W_{i+1}^T e`` in a ReLU MLP. Last site: ``N(0, I)``.

    Biased: ``E[y y^T] = W~^T W~`` (Wang eq. 6).

    Args:
        noise: kind of ``e``'s entries.
        power: of the singular values of ``W_{i+1}`` (of the filter bank, for a convolution): ``W = U S^p V^T``, the
            manipulation with which Singhal 4.1 studies self-sharpening. 0.1 to 4.
        refresh: steps between SVDs; the paper takes 1, which is slow. Power 1 needs no SVD.
        debias: see ``Estimator.correct``.

    >>> WTranspose().unbiased, WTranspose(power=2).prepares
    (False, True)
    """

    joins: ClassVar[bool] = True
    noise: str = "normal"
    power: float = 1.0
    refresh: int = 50
    debias: bool = False

    def __post_init__(self) -> None:
        check_noise(self.noise)
        check_debias(self.debias, self.noise)
        check_refresh(self.refresh)
        if not 0.1 <= self.power <= 4:
            raise ValueError(f"power: of the singular values must be 0.1 to 4, got {self.power}")

    @property
    def prepares(self) -> bool:
        return self.power != 1

    def prepare(self, site: Site, weights: Matrices, previous: list[Tensor] | None = None) -> list[Tensor]:
        """``U S^p V^T`` of each next matrix, ``[b, o, i]``."""
        return [of_singular_values(w, lambda s: s**self.power) for _, w in weights]

    def sample(self, state: list[Tensor] | None, ctx: SiteContext) -> Any:
        if ctx.site.is_last:
            return ctx.noise(ctx.s.shape, self.noise)
        return pull_back_noise(ctx, matrices(state, ctx), self.noise)

    def second_moment(self, state: list[Tensor] | None, ctx: SiteContext, g: Any) -> Any:
        return g if ctx.site.is_last else moment_through(ctx, matrices(state, ctx), g)
