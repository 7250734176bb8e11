"""W-perp: noise in the span of the top-k right singular vectors of W~ (Wang 3.1).

Letters: b block (convolution group), k basis vector, i input column, d entries of the site's output; n examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guessopt.estimators.base import Estimator, check_noise, check_refresh, register_estimator
from guessopt.estimators.transpose import moment_through, pull_back_noise
from guessopt.linalg import refined_right_basis, right_singular_basis
from guessopt.sites import Matrix, Site
from guessopt.tracing.local import Local

#: Basis vectors kept beyond k: subspace iteration converges with the ratio of singular values that far apart.
OVERSAMPLING = 10


@register_estimator("w_perp")
@dataclass(frozen=True)
class WPerp(Estimator):
    """``y = V_k z``, ``z ~ N(0, I_k)``: all singular values of W~ above the k-th mapped to 1, the rest to 0 (Wang
    eq. 8).

    Last site: ``N(0, I)``. For a convolution the filter bank is the matrix: k orthonormal filters take W's place.

    Args:
        k: dimension of the guess; clipped to the site's rank.
        basis: ``"shared"``: the SVD of ``W_{i+1}`` alone, cached, then pulled back: ``y = M V_k z``. ``"masked"``:
            ``M V_k (V_k^T M^2 V_k)^{-1/2}`` up to a rotation of z: orthonormal per example where ``M`` is 0/1.
            (The paper takes an SVD of ``W M_n`` per example: a departure, for speed.)
        select: ``"top"``, or ``"bottom"``: the smallest singular values (Wang Table 2's control).
        refresh: steps between SVDs.
        noise: kind of ``z``'s entries.

    Raises:
        ValueError: options out of range; ``k`` other than the default above the rank of every site.

    >>> WPerp(k=0)
    Traceback (most recent call last):
    ...
    ValueError: k: the guess needs at least one dimension, got 0
    """

    k: int = 10
    basis: str = "shared"
    select: str = "top"
    refresh: int = 50
    noise: str = "normal"
    prepares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k: the guess needs at least one dimension, got {self.k}")
        if self.basis not in ("shared", "masked"):
            raise ValueError(f"basis: {self.basis!r} is not one of shared, masked")
        if self.select not in ("top", "bottom"):
            raise ValueError(f"select: {self.select!r} is not one of top, bottom")
        check_refresh(self.refresh)
        check_noise(self.noise)

    def prepare(
        self, site: Site, weights: list[tuple[Matrix, Tensor]], previous: list[Tensor] | None = None
    ) -> list[Tensor]:
        """``V_k`` of each next matrix as rows, ``[b, k, i]``; a few rows more, unused, for the next refresh to start
        from."""
        if self.select == "bottom":
            return [right_singular_basis(w, self.k, smallest=True) for _, w in weights]
        if previous is None:
            return [right_singular_basis(w, self.k + OVERSAMPLING) for _, w in weights]
        return [refined_right_basis(w, rows) for (_, w), rows in zip(weights, previous, strict=True)]

    def sample(self, state: list[Tensor] | None, local: Local) -> Tensor:
        if local.site.is_last or state is None:
            return local.noise(local.s.shape, self.noise)
        if self._masks(local.site):
            return self._masked(state[0][0, : self.k], local)
        return pull_back_noise(local, self._rows(state, local), self.noise)

    def second_moment(self, state: list[Tensor] | None, local: Local, g: Tensor) -> Tensor | None:
        if self.noise == "uniform":
            return None
        if local.site.is_last or state is None:
            return g
        if not self._masks(local.site):
            return moment_through(local, self._rows(state, local), g)
        m, v = local.derivative(), state[0][0, : self.k]
        vt_m_g = (g if m is None else g * m) @ v.T
        factor = self._factor(v, m, local.s)
        u = torch.cholesky_solve(vt_m_g[..., None].to(factor.dtype), factor)[..., 0].to(v.dtype) @ v
        return u if m is None else u * m

    def note(self, site: Site) -> str | None:
        if self.basis == "masked" and site.segment is not None and not self._masks(site):
            return "shared basis: a masked one needs an elementwise path to a linear layer"
        return None

    def check(self, sites: tuple[Site, ...]) -> None:
        ranks = [site.rank for site in sites if not site.is_last]
        # The default serves every model, a two-class head included; a k that somebody chose is a mistake to report.
        if ranks and self.k > max(ranks) and self.k != type(self).k:
            raise ValueError(
                f"k: {self.k} exceeds the rank of every site (the largest is {max(ranks)}); choose k <= {max(ranks)}"
            )

    def _masks(self, site: Site) -> bool:
        segment = site.segment
        if self.basis != "masked" or segment is None or segment.elementwise is None or len(segment.matrices) != 1:
            return False
        m = segment.matrices[0]
        return m.rule.geometry(m.call) == "linear"

    def _rows(self, state: list[Tensor], local: Local) -> list[tuple[Matrix, Tensor]]:
        assert local.site.segment is not None
        return [(m, rows[:, : self.k]) for m, rows in zip(local.site.segment.matrices, state, strict=True)]

    @staticmethod
    def _factor(v: Tensor, m: Tensor | None, s: Tensor) -> Tensor:
        """Lower Cholesky factor of ``V^T M^2 V``, per example; ``[..., k, k]``."""
        k = v.shape[0]
        squares = s.new_ones(s.shape) if m is None else (m * m).to(v.dtype)
        pairs = (v[:, None, :] * v[None, :, :]).reshape(k * k, -1)
        gram = (squares @ pairs.T).reshape(*s.shape[:-1], k, k)
        # An example with fewer than k active units has a singular Gram matrix: a ridge far below any real eigenvalue.
        wide = gram if gram.dtype is torch.float64 else gram.float()
        ridge = 10 * torch.finfo(v.dtype).eps * torch.eye(k, dtype=wide.dtype, device=v.device)
        return torch.linalg.cholesky_ex(wide + ridge)[0]

    def _masked(self, v: Tensor, local: Local) -> Tensor:
        m = local.derivative()
        z = local.noise((*local.s.shape[:-1], v.shape[0]), self.noise)
        # L^-T z in place of (L L^T)^{-1/2} z: the two differ by a rotation of z, so y has the same distribution.
        factor = self._factor(v, m, local.s)
        z = torch.linalg.solve_triangular(factor.mT, z[..., None].to(factor.dtype), upper=True)[..., 0]
        y = z.to(v.dtype) @ v
        return y if m is None else y * m
