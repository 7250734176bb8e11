"""Activation mixing: a guess in the subspace of the activations (Singhal 3.3, eq. 12; A.2).

Letters: n, m examples; x the next matrix site's input, one row an example.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guessopt.estimator import Estimator, check_debias, check_noise, register_estimator
from guessopt.layout import Layout, Shape
from guessopt.tracing.context import SiteContext


@register_estimator("activation_mixing")
@dataclass(frozen=True)
class ActivationMixing(Estimator):
    """``y[n] = M (sum_m a_nm x_{i+1}[m])``, ``a ~ N(0, 1)``: a random mixture of the batch's activations, in the
    place of ``dL/dx_{i+1}``, which approximately lies in their span (Singhal eq. 12; A.2). Last site: ``N(0, I)``.

    ``x_{i+1}`` is the next matrix site's input. Where more than an activation lies between, the mixture is made there
    and pulled back to the site. An example is mixed as a whole: all its tokens or positions by the same
    coefficients. Where examples are coupled, the first dimension is taken for theirs.

    Args:
        normalise: to norm ``sqrt(d)`` an example, d its entries: that of isotropic noise. (The paper: "we also
        normalize
            the overall guess"; the norm is our choice.) Without, ``E[y y^T] = M X^T X M`` for the batch's activations X
            as rows; with, there is no closed form.
        noise: kind of the coefficients.
        debias: see ``Estimator.correct``; needs ``normalise=False``.

    >>> ActivationMixing(debias=True)
    Traceback (most recent call last):
    ...
    ValueError: debias: a normalised mixture has no second moment in closed form; set normalise=False
    """

    normalise: bool = True
    noise: str = "normal"
    debias: bool = False

    def __post_init__(self) -> None:
        check_noise(self.noise)
        check_debias(self.debias, self.noise)
        if self.debias and self.normalise:
            raise ValueError("debias: a normalised mixture has no second moment in closed form; set normalise=False")

    def sample(self, state: Any, ctx: SiteContext) -> Tensor:
        if ctx.site.is_last:
            return ctx.noise(ctx.s.shape, self.noise)
        x = ctx.next_input()
        layout = _layout_of(x, ctx)
        rows = _rows(x, layout, ctx.examples)
        a = ctx.noise((rows.shape[0], rows.shape[0]), self.noise).to(rows.dtype)
        u = a @ rows  # n m, m j -> n j
        y = ctx.pull_back(_unrows(u, layout, tuple(x.shape)))
        if not self.normalise:
            return y
        each = _rows(y, ctx.site.layout, ctx.examples)
        norm = each.norm(dim=1, keepdim=True)
        scale = (each.shape[1] ** 0.5 / norm).masked_fill(norm <= _rounding(u, ctx.s), 0.0)
        return _unrows(each * scale, ctx.site.layout, tuple(y.shape))

    def second_moment(self, state: Any, ctx: SiteContext, g: Tensor) -> Tensor | None:
        if ctx.site.is_last:
            return g
        if self.normalise:
            return None
        x = ctx.next_input()
        layout = _layout_of(x, ctx)
        rows, v = (_rows(t, layout, ctx.examples) for t in (x, ctx.push_forward(g)))
        return ctx.pull_back(_unrows((v @ rows.T) @ rows, layout, tuple(x.shape)))


def _rounding(u: Tensor, s: Tensor) -> Tensor:
    """The size, an example, of what is left where activations or a mixture of them cancel (a mean of what has been
    normalised): no direction to be normalised, and another one in every pass. A layer's scale may be as small in half
    precision, and nearly so in float32."""
    share = {torch.float64: 1e-10, torch.float32: 5e-7}.get(u.dtype, 0.0)
    return torch.maximum(u.norm(), s.norm().to(u.dtype)) * (share / max(len(u), 1) ** 0.5)


def _layout_of(x: Tensor, ctx: SiteContext) -> Layout:
    """Where the examples lie in the next matrix site's input: as at the site, if the shape allows it."""
    layout, shape = ctx.site.layout, tuple(x.shape)
    if layout.fits(shape, ctx.examples):
        return layout
    return Layout.candidates(shape, ctx.examples)[0]


def _rows(t: Tensor, layout: Layout, n: int) -> Tensor:
    """One row an example, ``[N, *]``; coupled: a row for each index of the first dimension."""
    if layout is Layout.BATCH_SECOND:
        return t.transpose(0, 1).reshape(n, -1)
    if layout is Layout.FLAT:
        return t.reshape(n, -1)
    if layout is Layout.FLAT_T:
        return t.reshape(-1, n, *t.shape[1:]).transpose(0, 1).reshape(n, -1)
    return t.flatten(1) if t.dim() > 1 else t.reshape(1, -1)


def _unrows(rows: Tensor, layout: Layout, shape: Shape) -> Tensor:
    """Back to the shape that ``_rows`` was given."""
    n = rows.shape[0]
    if layout is Layout.BATCH_SECOND:
        return rows.reshape(n, shape[0], *shape[2:]).transpose(0, 1)
    if layout is Layout.FLAT_T:
        return rows.reshape(n, shape[0] // n, *shape[1:]).transpose(0, 1).reshape(shape)
    return rows.reshape(shape)
