"""Guesses from ``W~ = W M_n``, one matrix for each example n: an elementwise path to one linear layer.

Letters: n example (every index before the last of ``s``), k basis vector, o output row, i input column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from guessopt.linalg import masked_right_basis, wide
from guessopt.sites import Site
from guessopt.tracing.context import SiteContext, alike


def w_perp_masked(z: Tensor, V: Tensor, M: Tensor) -> Tensor:
    """``y = M V (V^T M^2 V)^{-1/2} z``, up to a rotation of ``z``, with ``V`` stored as rows.

    ``L^-T z`` takes the place of ``(L L^T)^{-1/2} z`` for ``L L^T = V^T M^2 V``: a rotation of ``z`` does not change
    the distribution of ``y``. A departure from Wang 3.1, where ``V`` is a basis of ``W M_n``, not of ``W``.

    Args:
        z: noise, ``[..., k]``.
        V: the vectors that all examples share, ``[k, i]``.
        M: the diagonals, ``[..., i]``.
    """
    L = _factor(V, M)
    z = torch.linalg.solve_triangular(L.mT, z[..., None].to(L.dtype), upper=True)[..., 0]
    return (z.to(V.dtype) @ V) * M


def w_perp_masked_moment(g: Tensor, V: Tensor, M: Tensor) -> Tensor:
    """``E[y y^T] g`` of ``w_perp_masked``: the projection of ``g`` on the span of ``M V``."""
    L = _factor(V, M)
    z = torch.cholesky_solve((alike(g * M, V) @ V.T)[..., None].to(L.dtype), L)[..., 0]
    return (z.to(V.dtype) @ V) * M


def _factor(V: Tensor, M: Tensor) -> Tensor:
    """Lower Cholesky factor of ``V^T M^2 V``, for each example; ``[..., k, k]``, float32 at least."""
    k = V.shape[0]
    squares = (M * M).to(V.dtype)
    pairs = (V[:, None, :] * V[None, :, :]).reshape(k * k, -1)
    gram = (squares @ pairs.T).reshape(*M.shape[:-1], k, k)
    # An example with fewer than k active units has a singular Gram matrix: a ridge far below any real eigenvalue.
    gram = wide(gram)
    ridge = 10 * torch.finfo(V.dtype).eps * torch.eye(k, dtype=gram.dtype, device=V.device)
    result: Tensor = torch.linalg.cholesky_ex(gram + ridge)[0]
    return result


def top_of_examples(W: Tensor, M: Tensor, start: Tensor, k: int) -> Tensor:
    """The top k right singular vectors of ``W M_n`` as rows (Wang 3.1), ``[n, k, i]``; see ``masked_right_basis``."""
    return masked_right_basis(W, M.reshape(-1, M.shape[-1]), start, k)


def bottom_of_examples(W: Tensor, M: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
    """A basis of k vectors that ``W M_n`` maps to zero, or to as little as it can (the control of Wang Table 2).

    Returns:
        units: the first k units where ``M_n`` is 0, marked, ``[..., i]``; none for an example with fewer than k.
        rows: of the examples with fewer than k such units, the bottom k right singular vectors of ``W M_n``,
            ``[n, k, i]``, zero for the others; None if there is no such example.
    """
    zero = M == 0
    k = min(k, zero.shape[-1])
    units = zero & (zero.cumsum(-1) <= k)
    short = units.sum(-1) < k
    units = units & ~short[..., None]
    if not bool(short.any()):
        return units, None
    wm = wide(W * M[short][:, None])  # n o i
    rows = W.new_zeros((short.numel(), k, W.shape[-1]))
    rows[short.flatten()] = torch.linalg.eigh(wm.mT @ wm)[1][..., :k].mT.to(W.dtype)
    return units, rows


def span(z: Tensor, V: Tensor) -> Tensor:
    """``V_n^T z_n`` for rows ``V`` ``[n, k, i]``: ``[n, i]``."""
    return (alike(z, V)[:, None] @ V)[:, 0]


def project(g: Tensor, V: Tensor) -> Tensor:
    """``V_n^T V_n g_n`` for orthonormal rows ``V`` ``[n, k, i]``; shape of ``g``."""
    flat = alike(g, V).reshape(-1, g.shape[-1], 1)
    return (V.mT @ (V @ flat))[..., 0].reshape(g.shape)


class Masked:
    """The part of an estimator whose option ``basis`` may ask for one matrix for each example."""

    basis: str

    def is_masked(self, site: Site) -> bool:
        """Whether each example has its own matrix at this site. ``basis`` asks for it, and ``W~ = W M`` with a diagonal
        ``M``: an elementwise path leads to one linear layer, or to stacked ones."""
        if self.basis == "shared":
            return False
        segment = site.segment
        if segment is None or segment.elementwise is None or len(segment.matrices) != 1:
            return False
        m = segment.matrices[0]
        return m.rule.geometry(m.call) == "linear"

    def note(self, site: Site) -> str | None:
        if self.basis != "shared" and site.segment is not None and not self.is_masked(site):
            return f"shared basis: basis={self.basis!r} needs an elementwise path to a linear layer"
        return None


def mask_of(ctx: SiteContext) -> Tensor:
    """The diagonals of ``M``, shape and dtype of ``s``; ones for the identity."""
    m = ctx.derivative()
    return ctx.s.new_ones(ctx.s.shape) if m is None else m.to(ctx.s.dtype)


def linear_weight(ctx: SiteContext) -> Tensor:
    """``W`` of the next linear layer, ``[o, i]``."""
    return ctx.weights()[0][1][0]
