"""W-perp: noise in the span of the top-k right singular vectors of W~ (Wang 3.1).

Letters: b block (convolution group), k basis vector, o output row, i input column, n example.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guessopt.estimator import Estimator, check_debias, check_noise, check_refresh, register_estimator
from guessopt.estimators.transpose import moment_through, pull_back_noise
from guessopt.linalg import masked_right_basis, refined_right_basis, right_singular_basis
from guessopt.sites import Matrix, Site
from guessopt.tracing.context import SiteContext, alike

#: Basis vectors kept beyond k: subspace iteration converges with the ratio of singular values that far apart.
OVERSAMPLING = 10


@register_estimator("w_perp")
@dataclass(frozen=True)
class WPerp(Estimator):
    """``y = V_k z``, ``z ~ N(0, I_k)``: all singular values of W~ above the k-th mapped to 1, the rest
    to 0 (Wang eq. 8).

    Last site: ``N(0, I)``. For a convolution the filter bank is the matrix: k orthonormal filters take W's place.

    Args:
        k: dimension of the guess; clipped to the site's rank.
        basis: ``"shared"``: the SVD of ``W_{i+1}`` alone, cached, then pulled back: ``y = M V_k z`` (a departure, for
            speed). ``"masked"``: ``M V_k (V_k^T M^2 V_k)^{-1/2}`` up to a rotation of z: orthonormal per example where
            ``M`` is 0/1. ``"example"``: the paper's, the top k of ``W M_n`` for each example, from the weights as they
            are now; held to the captured energy ``||W M V||^2``, within 5e-3 of the exact one
        (``linalg.masked_right_basis``). select: ``"top"``, or ``"bottom"``: the smallest singular values (Wang Table
            2's control). With ``basis="example"`` these are units where ``M`` is 0, exactly in the null space; examples
            that have fewer than k of them take an eigendecomposition each, which is slow.
        refresh: steps between SVDs.
        noise: kind of ``z``'s entries.
        debias: see ``Estimator.correct``; changes nothing where the guess is orthonormal.

    Raises:
        ValueError: options out of range; ``k`` other than the default above the rank of every site.

    >>> WPerp(k=0)
    Traceback (most recent call last):
    ...
    ValueError: k: the guess needs at least one dimension, got 0
    """

    joins: ClassVar[bool] = True
    k: int = 10
    basis: str = "shared"
    select: str = "top"
    refresh: int = 50
    noise: str = "normal"
    debias: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k: the guess needs at least one dimension, got {self.k}")
        if self.basis not in ("shared", "masked", "example"):
            raise ValueError(f"basis: {self.basis!r} is not one of shared, masked, example")
        if self.select not in ("top", "bottom"):
            raise ValueError(f"select: {self.select!r} is not one of top, bottom")
        check_refresh(self.refresh)
        check_noise(self.noise)
        check_debias(self.debias, self.noise)

    @property
    def prepares(self) -> bool:
        return True

    def prepare(
        self, site: Site, weights: list[tuple[Matrix, Tensor]], previous: list[Tensor] | None = None
    ) -> list[Tensor]:
        """``V_k`` of each next matrix as rows, ``[b, k, i]``; a few rows more, unused, for the next
        refresh to start from."""
        if self.select == "bottom":
            return [right_singular_basis(w, self.k, smallest=True) for _, w in weights]
        if previous is None:
            return [right_singular_basis(w, self.k + OVERSAMPLING) for _, w in weights]
        return [refined_right_basis(w, rows) for (_, w), rows in zip(weights, previous, strict=True)]

    def sample(self, state: list[Tensor] | None, ctx: SiteContext) -> Tensor:
        if ctx.site.is_last or state is None:
            return ctx.noise(ctx.s.shape, self.noise)
        if self._masks(ctx.site):
            return (
                self._of_examples(state[0][0], ctx)
                if self.basis == "example"
                else masked(state[0][0, : self.k], ctx, self.noise)
            )
        return pull_back_noise(ctx, self._rows(state, ctx), self.noise)

    def second_moment(self, state: list[Tensor] | None, ctx: SiteContext, g: Tensor) -> Tensor | None:
        if ctx.site.is_last or state is None:
            return g
        if not self._masks(ctx.site):
            return moment_through(ctx, self._rows(state, ctx), g)
        if self.basis == "masked":
            return masked_moment(state[0][0, : self.k], ctx, g)
        if self.select == "bottom":
            chosen, rows = self._inactive(ctx)
            u = g * chosen
        else:
            u, rows = torch.zeros_like(g), self._top(state[0][0], ctx)
        if rows is not None:
            u = u + project(rows, g)
        return u

    def note(self, site: Site) -> str | None:
        if self.basis != "shared" and site.segment is not None and not self._masks(site):
            return f"shared basis: basis={self.basis!r} needs an elementwise path to a linear layer"
        return None

    def check(self, sites: tuple[Site, ...]) -> None:
        ranks = [site.rank for site in sites if not site.is_last]
        # The default serves every model, a two-class head included; a k that somebody chose is a mistake to report.
        if ranks and self.k > max(ranks) and self.k != type(self).k:
            raise ValueError(
                f"k: {self.k} exceeds the rank of every site (the largest is {max(ranks)}); choose k <= {max(ranks)}"
            )

    def _masks(self, site: Site) -> bool:
        return self.basis != "shared" and is_masked_linear(site)

    def _rows(self, state: list[Tensor], ctx: SiteContext) -> list[tuple[Matrix, Tensor]]:
        assert ctx.site.segment is not None
        return [(m, rows[:, : self.k]) for m, rows in zip(ctx.site.segment.matrices, state, strict=True)]

    def _of_examples(self, rows: Tensor, ctx: SiteContext) -> Tensor:
        if self.select == "bottom":
            chosen, few = self._inactive(ctx)
            y = ctx.noise(ctx.s.shape, self.noise) * chosen
        else:
            y, few = ctx.s.new_zeros(ctx.s.shape), self._top(rows, ctx)
        if few is None:
            return y
        z = ctx.noise((few.shape[0], few.shape[1]), self.noise)
        return y + (alike(z, few)[:, None] @ few)[:, 0].reshape(y.shape)  # n k, n k i -> n i

    def _top(self, rows: Tensor, ctx: SiteContext) -> Tensor:
        """``V_k`` of ``W M_n``, rows; ``[n, k, i]``, n every leading index of ``s``."""
        (_, w), m = ctx.weights()[0], ctx.derivative()
        mask = ctx.s.new_ones(ctx.s.shape) if m is None else m.to(ctx.s.dtype)
        return masked_right_basis(w[0], mask.reshape(-1, mask.shape[-1]), rows, self.k)

    def _inactive(self, ctx: SiteContext) -> tuple[Tensor, Tensor | None]:
        """The first k units of each example where ``M`` is 0, as a mask; and, where some have fewer, the bottom k right
        singular vectors of ``W M_n`` of those that do (zero for the others), ``[n, k, i]``."""
        m = ctx.derivative()
        zero = ctx.s.new_zeros(ctx.s.shape, dtype=torch.bool) if m is None else m == 0
        chosen = zero & (zero.cumsum(-1) <= self.k)
        short = chosen.sum(-1) < min(self.k, zero.shape[-1])
        chosen = chosen & ~short[..., None]
        if not bool(short.any()):
            return chosen, None
        (_, w), k = ctx.weights()[0], min(self.k, zero.shape[-1])
        mask = ctx.s.new_ones(ctx.s.shape) if m is None else m.to(ctx.s.dtype)
        wm = w * mask[short][:, None]  # n o i
        wm = wm if wm.dtype is torch.float64 else wm.float()
        rows = torch.linalg.eigh(wm.mT @ wm)[1][..., :k].mT.to(w.dtype)
        found = w.new_zeros((short.numel(), k, w.shape[-1]))
        found[short.flatten()] = rows
        return chosen, found


def is_masked_linear(site: Site) -> bool:
    """Whether ``W~ = W M`` with a diagonal ``M``: an elementwise path to one linear layer (or stacked ones)."""
    segment = site.segment
    if segment is None or segment.elementwise is None or len(segment.matrices) != 1:
        return False
    m = segment.matrices[0]
    return m.rule.geometry(m.call) == "linear"


def project(rows: Tensor, g: Tensor) -> Tensor:
    """``V V^T g`` for each index before the last; rows ``[n, k, i]``, orthonormal."""
    flat = alike(g, rows).reshape(-1, g.shape[-1], 1)
    return (rows.mT @ (rows @ flat))[..., 0].reshape(g.shape)


def masked(v: Tensor, ctx: SiteContext, noise: str) -> Tensor:
    """``M V^T (V M^2 V^T)^{-1/2} z`` for shared rows ``v`` ``[k, i]``: noise in the span of ``M V^T``."""
    m = ctx.derivative()
    z = ctx.noise((*ctx.s.shape[:-1], v.shape[0]), noise)
    # L^-T z in place of (L L^T)^{-1/2} z: the two differ by a rotation of z, so y has the same distribution.
    factor = _factor(v, m, ctx.s)
    z = torch.linalg.solve_triangular(factor.mT, z[..., None].to(factor.dtype), upper=True)[..., 0]
    y = z.to(v.dtype) @ v
    return y if m is None else y * m


def masked_moment(v: Tensor, ctx: SiteContext, g: Tensor) -> Tensor:
    """``E[y y^T] g`` of ``masked``: the projection on the span of ``M V^T``."""
    m = ctx.derivative()
    vt_m_g = alike(g if m is None else g * m, v) @ v.T
    factor = _factor(v, m, ctx.s)
    u = torch.cholesky_solve(vt_m_g[..., None].to(factor.dtype), factor)[..., 0].to(v.dtype) @ v
    return u if m is None else u * m


def _factor(v: Tensor, m: Tensor | None, s: Tensor) -> Tensor:
    """Lower Cholesky factor of ``V M^2 V^T``, per example; ``[..., k, k]``."""
    k = v.shape[0]
    squares = s.new_ones(s.shape) if m is None else (m * m).to(v.dtype)
    pairs = (v[:, None, :] * v[None, :, :]).reshape(k * k, -1)
    gram = (squares @ pairs.T).reshape(*s.shape[:-1], k, k)
    # An example with fewer than k active units has a singular Gram matrix: a ridge far below any real eigenvalue.
    wide = gram if gram.dtype is torch.float64 else gram.float()
    ridge = 10 * torch.finfo(v.dtype).eps * torch.eye(k, dtype=wide.dtype, device=v.device)
    return torch.linalg.cholesky_ex(wide + ridge)[0]
