"""W^T: noise at the next matrix site's output, pulled back to this site (Singhal 3.2, eq. 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from guessopt.estimator import Estimator, check_debias, check_noise, check_refresh, register_estimator
from guessopt.linalg import of_singular_values
from guessopt.sites import Matrix, Site
from guessopt.tracing.context import SiteContext, alike


def pull_back_noise(ctx: SiteContext, rows: list[tuple[Matrix, Tensor]], noise: str) -> Tensor:
    """``y = J^T sum_m rows_m^T e_m``: noise through matrices ``[b, r, i]`` and the segment before them."""
    u: Tensor | None = None
    for m, r in rows:
        e = ctx.noise(m.rule.cotangent_shape(m, r, m.x_shape), noise)
        v = m.rule.transpose(m, r, alike(e, r), m.x_shape)
        u = v if u is None else u + v
    assert u is not None
    return ctx.pull_back(u, spent=True)


def moment_through(ctx: SiteContext, rows: list[tuple[Matrix, Tensor]], g: Tensor) -> Tensor:
    """``J^T (sum_m rows_m^T rows_m) J g``: the second moment of ``pull_back_noise`` (Wang eq. 6)."""
    v = ctx.push_forward(g)
    u: Tensor | None = None
    for m, r in rows:
        w = m.rule.transpose(m, r, m.rule.apply(m, r, alike(v, r)), m.x_shape)
        u = w if u is None else u + w
    assert u is not None
    return ctx.pull_back(u)


@register_estimator("w_transpose")
@dataclass(frozen=True)
class WTranspose(Estimator):
    """``y = W~^T e``, ``e ~ N(0, I)``; ``M_i W_{i+1}^T e`` in a ReLU MLP. Last site: ``N(0, I)``.

    Biased: ``E[y y^T] = W~^T W~`` (Wang eq. 6).

    Args:
        noise: kind of ``e``'s entries.
        power: of the singular values of ``W_{i+1}`` (of the filter bank, for a convolution): ``W = U S^p V^T``, the
            manipulation with which Singhal 4.1 studies self-sharpening. 0.1 to 4.
        refresh: steps between SVDs; 1 as in the paper is slow. Power 1 takes none.
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

    def prepare(
        self, site: Site, weights: list[tuple[Matrix, Tensor]], previous: list[Tensor] | None = None
    ) -> list[Tensor]:
        """``U S^p V^T`` of each next matrix, ``[b, o, i]``."""
        return [of_singular_values(w, lambda s: s**self.power) for _, w in weights]

    def sample(self, state: list[Tensor] | None, ctx: SiteContext) -> Tensor:
        if ctx.site.is_last:
            return ctx.noise(ctx.s.shape, self.noise)
        return pull_back_noise(ctx, rows_of(state, ctx), self.noise)

    def second_moment(self, state: list[Tensor] | None, ctx: SiteContext, g: Tensor) -> Tensor | None:
        return g if ctx.site.is_last else moment_through(ctx, rows_of(state, ctx), g)


def rows_of(state: list[Tensor] | None, ctx: SiteContext) -> list[tuple[Matrix, Tensor]]:
    """The next matrices with what ``prepare`` made of them; with their weights where it made nothing."""
    if state is None:
        return ctx.weights()
    assert ctx.site.segment is not None
    return list(zip(ctx.site.segment.matrices, state, strict=True))
