"""W-perp: noise in the span of the top-k right singular vectors of W~ (Wang 3.1).

Letters: b block (convolution group), k basis vector, o output row, i input column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from guessopt.estimator import Estimator
from guessopt.estimators.checks import (
    check_choice,
    check_debias,
    check_dimension,
    check_noise,
    check_rank,
    check_refresh,
)
from guessopt.estimators.masked import (
    Masked,
    bottom_of_examples,
    linear_weight,
    mask_of,
    project,
    span,
    top_of_examples,
    w_perp_masked,
    w_perp_masked_moment,
)
from guessopt.estimators.transpose import Jacobian, Matrices, matrices, moment_through, noise_at, w_transpose
from guessopt.linalg import refined_right_basis, right_singular_basis
from guessopt.registry import register_estimator
from guessopt.sites import Site
from guessopt.tracing.context import SiteContext

#: Basis vectors kept beyond k. The ratio of singular values k + 11 and k sets how fast subspace iteration converges.
OVERSAMPLING = 10


def w_perp(z: Sequence[Tensor], V: Matrices, M: Jacobian) -> Any:
    """``y = M V_k z`` (Wang 3.1, eq. 8): ``W^T`` with its k largest singular values set to 1 and the others to 0.

    The paper draws ``e ~ N(0, I_o)`` and forms ``V_k U_k^T e``. Here ``z = U_k^T e``, which is ``N(0, I_k)``.

    Args:
        z: noise for each next matrix site, k entries at each position.
        V: the singular vectors of each next matrix as rows, ``[b, k, i]``.
        M: as in ``w_transpose``.
    """
    return w_transpose(z, V, M)


@register_estimator("w_perp")
@dataclass(frozen=True)
class WPerp(Masked, Estimator):
    """``y = V_k z``, ``z ~ N(0, I_k)``: the k largest singular values of W~ are set to 1, the others to 0 (Wang eq. 8).

    Last site: ``N(0, I)``. For a convolution the filter bank is the matrix: k orthonormal filters take W's place.

    Args:
        k: dimension of the guess; clipped to the site's rank.
        basis: the matrix whose singular vectors are taken. ``M`` is the derivative of the activation after the site.

            - ``"shared"``: ``W_{i+1}`` alone. Its vectors are cached, then pulled back: ``y = M V_k z`` (a departure
              from the paper, for speed).
            - ``"masked"``: ``y = M V_k (V_k^T M^2 V_k)^{-1/2} z``: orthonormal for each example where ``M`` is 0 or 1.
            - ``"example"``: ``W M_n`` for each example n, as in the paper, from the current weights. The captured
              energy ``||W M V||^2`` is within 5e-3 of the exact one (``linalg.masked_right_basis``).
        select: ``"top"``, or ``"bottom"`` for the smallest singular values (the control of Wang Table 2). With
            ``basis="example"`` these are units where ``M`` is 0, exactly in the null space. An example with fewer than
            k such units needs an eigendecomposition, which is slow.
        refresh: steps between updates of the cached basis. The first update is an eigendecomposition; later updates
            are subspace iterations that start from the last basis.
        noise: distribution of ``z``'s entries.
        debias: see ``Estimator.correct``. It changes nothing if the guess is orthonormal.

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
        check_dimension(self.k)
        check_choice("basis", self.basis, "shared", "masked", "example")
        check_choice("select", self.select, "top", "bottom")
        check_refresh(self.refresh)
        check_noise(self.noise)
        check_debias(self.debias, self.noise)

    @property
    def prepares(self) -> bool:
        return True

    def prepare(self, site: Site, weights: Matrices, previous: list[Tensor] | None = None) -> list[Tensor]:
        """``V_k`` of each next matrix as rows ``[b, k, i]``, and ``OVERSAMPLING`` more rows for the next refresh."""
        if self.select == "bottom":
            return [right_singular_basis(w, self.k, smallest=True) for _, w in weights]
        if previous is None:
            return [right_singular_basis(w, self.k + OVERSAMPLING) for _, w in weights]
        return [refined_right_basis(w, rows) for (_, w), rows in zip(weights, previous, strict=True)]

    def sample(self, state: list[Tensor] | None, ctx: SiteContext) -> Any:
        if ctx.site.is_last or state is None:
            return ctx.noise(ctx.s.shape, self.noise)
        if not self.is_masked(ctx.site):
            V = self._rows(state, ctx)
            return w_perp(noise_at(V, ctx, self.noise), V, lambda u: ctx.pull_back(u, spent=True))
        if self.basis == "masked":
            M, v = mask_of(ctx), state[0][0, : self.k]
            return w_perp_masked(ctx.noise((*M.shape[:-1], len(v)), self.noise), v, M)
        units, rows = self._basis_of_examples(state, ctx)
        y: Any = 0 if units is None else ctx.noise(ctx.s.shape, self.noise) * units
        if rows is not None:
            y = y + span(ctx.noise(tuple(rows.shape[:2]), self.noise), rows).reshape(ctx.s.shape)
        return y

    def second_moment(self, state: list[Tensor] | None, ctx: SiteContext, g: Any) -> Any:
        if ctx.site.is_last or state is None:
            return g
        if not self.is_masked(ctx.site):
            return moment_through(ctx, self._rows(state, ctx), g)
        if self.basis == "masked":
            return w_perp_masked_moment(g, state[0][0, : self.k], mask_of(ctx))
        units, rows = self._basis_of_examples(state, ctx)
        u = 0 if units is None else g * units
        return u if rows is None else u + project(g, rows)

    def _rows(self, state: list[Tensor], ctx: SiteContext) -> Matrices:
        return matrices([rows[:, : self.k] for rows in state], ctx)

    def _basis_of_examples(self, state: list[Tensor], ctx: SiteContext) -> tuple[Tensor | None, Tensor | None]:
        """A mask of units, and rows ``[n, k, i]``. Both together are an orthonormal basis for each example."""
        W, M = linear_weight(ctx), mask_of(ctx)
        if self.select == "bottom":
            return bottom_of_examples(W, M, self.k)
        return None, top_of_examples(W, M, state[0][0], self.k)

    # --- reporting ----------------------------------------------------------------------------------------------------

    def check(self, sites: tuple[Site, ...]) -> None:
        check_rank(self.k, type(self).k, sites)
