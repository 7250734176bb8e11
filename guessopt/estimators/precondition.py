"""W-preconditioned: every direction that the next matrix site sees, all equally likely (Wang 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from guessopt.estimator import Estimator
from guessopt.estimators.checks import check_choice, check_debias, check_noise, check_refresh
from guessopt.estimators.masked import Masked, linear_weight, mask_of, w_perp_masked, w_perp_masked_moment
from guessopt.estimators.transpose import Matrices, matrices, moment_through, pull_back_noise
from guessopt.linalg import of_singular_values
from guessopt.registry import register_estimator
from guessopt.sites import Site
from guessopt.tracing.context import SiteContext


def w_preconditioned(W: Tensor) -> Tensor:
    """``U V^T`` of ``W = U S V^T``, so that ``y = V U^T e`` (Wang 3.3, eqs. 11 to 16); ``[b, o, i]``.

    The paper's ``(W_s^T W_s)^{-1/2} W_s^T`` with ``W_s = U (S^2 + sigma I)^{1/2} V^T`` equals ``V U^T`` for any
    ``sigma``.
    """
    return of_singular_values(W, torch.ones_like)


@register_estimator("w_preconditioned")
@dataclass(frozen=True)
class WPreconditioned(Masked, Estimator):
    """``y = (W~_s^T W~_s)^{-1/2} W~_s^T e = V U^T e`` for ``W~_s = U (S^2 + sigma I)^{1/2} V^T`` (Wang eqs. 11 to 16).
    Last site: ``N(0, I)``.

    ``E[y y^T] = V V^T``. This is the identity where ``W~`` has at least as many rows as columns. Before a narrower
    layer (a 10-wide head) it is the projection on the row space of ``W~``. That space holds the true cotangent
    ``W~^T g_{i+1}`` if the next matrix site is the only way on: the estimate is unbiased on a chain of layers, not
    beside a residual branch.

    A linear layer behind an elementwise path needs no SVD. For a square ``V`` the noise ``V U^T e`` is ``N(0, I)``. The
    row space of a wide ``W M_n`` is spanned by its few rows. Departure from the paper: where ``W M_n`` has fewer active
    units than rows, the paper completes ``V`` at random, and this class does not.

    Args:
        sigma: makes the paper's inverse exist. It cancels: any positive value gives the same guess.
        basis: ``"example"``: the paper's, as above. ``"shared"``: ``y = M V U^T e`` from the SVD of ``W_{i+1}`` alone,
            cached. It has less noise, since inactive units get none, and where ``M`` is 0 or 1 that adds no bias.
            Convolutions and other paths have the shared form only.
        refresh: steps between SVDs (shared form).
        noise: kind of ``e``'s entries.
        debias: see ``Estimator.correct``.

    >>> WPreconditioned(sigma=0)
    Traceback (most recent call last):
    ...
    ValueError: sigma: must be positive, got 0
    """

    joins: ClassVar[bool] = True
    sigma: float = 1e-5
    basis: str = "example"
    refresh: int = 50
    noise: str = "normal"
    debias: bool = False

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(f"sigma: must be positive, got {self.sigma}")
        check_choice("basis", self.basis, "shared", "example")
        check_refresh(self.refresh)
        check_noise(self.noise)
        check_debias(self.debias, self.noise)

    @property
    def prepares(self) -> bool:
        return True

    def prepare(self, site: Site, weights: Matrices, previous: list[Tensor] | None = None) -> list[Tensor] | None:
        """``U V^T`` of each next matrix, ``[b, o, i]``; None where the guess does not need it."""
        return None if self.is_masked(site) else [w_preconditioned(w) for _, w in weights]

    def sample(self, state: list[Tensor] | None, ctx: SiteContext) -> Any:
        if ctx.site.is_last or self._is_isotropic(ctx.site):
            return ctx.noise(ctx.s.shape, self.noise)
        if not self.is_masked(ctx.site):
            return pull_back_noise(ctx, self._polar(state, ctx), self.noise)
        M, V = mask_of(ctx), _unit_rows(linear_weight(ctx))
        return w_perp_masked(ctx.noise((*M.shape[:-1], len(V)), self.noise), V, M)

    def second_moment(self, state: list[Tensor] | None, ctx: SiteContext, g: Any) -> Any:
        if ctx.site.is_last or self._is_isotropic(ctx.site):
            return g
        if not self.is_masked(ctx.site):
            return moment_through(ctx, self._polar(state, ctx), g)
        return w_perp_masked_moment(g, _unit_rows(linear_weight(ctx)), mask_of(ctx))

    def _is_isotropic(self, site: Site) -> bool:
        """Whether ``V`` is square."""
        if site.segment is None or not self.is_masked(site):
            return False
        m = site.segment.matrices[0]
        return m.rule.rank(m) == m.x_shape[-1]

    @staticmethod
    def _polar(state: list[Tensor] | None, ctx: SiteContext) -> Matrices:
        return matrices([w_preconditioned(w) for _, w in ctx.weights()] if state is None else state, ctx)


def _unit_rows(W: Tensor) -> Tensor:
    """``W`` with rows of mean length 1, as those of an orthonormal basis, so that the ridge in the factor fits."""
    size = W.norm(dim=1).mean().clamp_min(torch.finfo(W.dtype).tiny)  # a weight of zeros has no size
    result: Tensor = W / size
    return result
