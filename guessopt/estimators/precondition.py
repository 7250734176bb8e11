"""W-preconditioned: every direction that the next matrix site sees, all equally likely (Wang 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guessopt.estimator import Estimator, check_debias, check_noise, check_refresh, register_estimator
from guessopt.estimators.perp import is_masked_linear, masked, masked_moment
from guessopt.estimators.transpose import moment_through, pull_back_noise
from guessopt.linalg import of_singular_values
from guessopt.sites import Matrix, Site
from guessopt.tracing.context import SiteContext


@register_estimator("w_preconditioned")
@dataclass(frozen=True)
class WPreconditioned(Estimator):
    """``y = (W~_s^T W~_s)^{-1/2} W~_s^T e = V U^T e`` for ``W~_s = U (S^2 + sigma I)^{1/2} V^T`` (Wang eqs. 11 to 16).
    Last site: ``N(0, I)``.

    ``E[y y^T] = V V^T``: the identity where ``W~`` has at least as many rows as columns; before a narrower layer (a
    10-wide head) the projection on its row space. That holds the true cotangent ``W~^T g_{i+1}`` wherever the next
    matrix site is the only way on: unbiased on a chain of layers, not beside a residual branch.

    Neither an SVD nor ``sigma`` is needed for a linear layer behind an elementwise path: a square ``V`` has the same
    noise for every rotation, so ``y ~ N(0, I)`` where ``W~`` is tall or square, and the row space of ``W M_n`` is
    spanned by the few rows of a wide one. (Departure from the paper: where ``W M_n`` has fewer active units than
    rows, the paper
    completes ``V`` at random; here the completion is left out.)

    Args:
        sigma: makes the paper's inverse exist; it cancels, any positive value gives the same guess.
        basis: ``"example"``: the paper's, as above. ``"shared"``: ``y = M V U^T e`` from the SVD of ``W_{i+1}`` alone,
            cached; less noise, since inactive units get none, and no bias from that where ``M`` is 0/1. Convolutions
            and other paths have the shared form only.
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
        if self.basis not in ("shared", "example"):
            raise ValueError(f"basis: {self.basis!r} is not one of shared, example")
        check_refresh(self.refresh)
        check_noise(self.noise)
        check_debias(self.debias, self.noise)

    @property
    def prepares(self) -> bool:
        return True

    def prepare(
        self, site: Site, weights: list[tuple[Matrix, Tensor]], previous: list[Tensor] | None = None
    ) -> list[Tensor] | None:
        """``U V^T`` of each next matrix, ``[b, o, i]``; None where it is not needed."""
        if self._is_of_examples(site):
            return None
        return [of_singular_values(w, torch.ones_like) for _, w in weights]

    def sample(self, state: list[Tensor] | None, ctx: SiteContext) -> Tensor:
        if ctx.site.is_last or self._is_complete(ctx.site):
            return ctx.noise(ctx.s.shape, self.noise)
        if self._is_of_examples(ctx.site):
            return masked(self._rows(ctx), ctx, self.noise)
        return pull_back_noise(ctx, self._polar(state, ctx), self.noise)

    def second_moment(self, state: list[Tensor] | None, ctx: SiteContext, g: Tensor) -> Tensor | None:
        if ctx.site.is_last or self._is_complete(ctx.site):
            return g
        if self._is_of_examples(ctx.site):
            return masked_moment(self._rows(ctx), ctx, g)
        return moment_through(ctx, self._polar(state, ctx), g)

    def note(self, site: Site) -> str | None:
        if self.basis == "example" and site.segment is not None and not is_masked_linear(site):
            return "shared basis: basis='example' needs an elementwise path to a linear layer"
        return None

    def _is_of_examples(self, site: Site) -> bool:
        return self.basis == "example" and is_masked_linear(site)

    def _is_complete(self, site: Site) -> bool:
        """``V`` is square: the guess is isotropic."""
        if site.segment is None or not self._is_of_examples(site):
            return False
        m = site.segment.matrices[0]
        return m.rule.rank(m) == m.x_shape[-1]

    @staticmethod
    def _rows(ctx: SiteContext) -> Tensor:
        w = ctx.weights()[0][1][0]
        size = w.norm(dim=1).mean().clamp_min(torch.finfo(w.dtype).tiny)  # a weight of zeros has no size
        return w / size  # of the size of an orthonormal basis, for the ridge in the factor

    @staticmethod
    def _polar(state: list[Tensor] | None, ctx: SiteContext) -> list[tuple[Matrix, Tensor]]:
        assert ctx.site.segment is not None
        if state is None:
            state = [of_singular_values(w, torch.ones_like) for _, w in ctx.weights()]
        return list(zip(ctx.site.segment.matrices, state, strict=True))
