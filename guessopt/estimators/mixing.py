"""Activation mixing: a guess in the subspace of the activations (Singhal 3.3, eq. 12; A.2).

Letters: n, m examples; j an entry of an example.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guessopt.estimator import Estimator
from guessopt.estimators.checks import check_debias, check_noise
from guessopt.layout import Layout
from guessopt.registry import register_estimator
from guessopt.tracing.context import SiteContext


def activation_mixing(a: Tensor, X: Tensor) -> Tensor:
    """``u[n] = sum_m a_nm X[m]`` (Singhal eq. 12): a random mixture of the batch's activations.

    Args:
        a: noise, ``[n, m]``.
        X: the input of the next matrix site, one row for each example, ``[m, j]``.
    """
    return a @ X


def normalised(y: Tensor, floor: Tensor) -> Tensor:
    """Each row of ``y`` ``[n, j]`` scaled to the norm ``sqrt(d)``, d its entries; zero where its norm is at most
    ``floor``. Singhal A.2 normalises "the overall guess"; the norm, that of isotropic noise, is our choice."""
    norm = y.norm(dim=1, keepdim=True)
    result: Tensor = y * (y.shape[1] ** 0.5 / norm).masked_fill(norm <= floor, 0.0)
    return result


@register_estimator("activation_mixing")
@dataclass(frozen=True)
class ActivationMixing(Estimator):
    """``y[n] = M (sum_m a_nm x_{i+1}[m])``, ``a ~ N(0, 1)``: a random mixture of the batch's activations takes the
    place of ``dL/dx_{i+1}``, which approximately lies in their span (Singhal eq. 12; A.2). Last site: ``N(0, I)``.

    ``x_{i+1}`` is the next matrix site's input. Where more than an activation lies between, the mixture is made there
    and pulled back to the site. An example is mixed as a whole: the same coefficients serve all its tokens or
    positions. Where examples are coupled, the first dimension is taken for the examples.

    Args:
        normalise: scale each example's guess to the norm ``sqrt(d)``, d its entries, as isotropic noise has it. Then
            the second moment has no closed form. Without ``normalise`` it is ``M X^T X M``, with the batch's
            activations as the rows of ``X``.
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
        layout, n = _layout_of(x, ctx), ctx.examples
        X = rows(x, layout, n)
        u = activation_mixing(ctx.noise((len(X), len(X)), self.noise).to(X.dtype), X)
        y = ctx.pull_back(layout.unrows(u, tuple(x.shape)))
        if not self.normalise:
            return y
        own = ctx.site.layout
        return own.unrows(normalised(rows(y, own, n), _rounding(u, ctx.s)), tuple(y.shape))

    def second_moment(self, state: Any, ctx: SiteContext, g: Tensor) -> Tensor | None:
        if ctx.site.is_last:
            return g
        if self.normalise:
            return None
        x = ctx.next_input()
        layout, n = _layout_of(x, ctx), ctx.examples
        X, v = rows(x, layout, n), rows(ctx.push_forward(g), layout, n)
        return ctx.pull_back(layout.unrows((v @ X.T) @ X, tuple(x.shape)))


def _rounding(u: Tensor, s: Tensor) -> Tensor:
    """Norm of an example's guess below which it is rounding: activations, or a mixture of them, have cancelled.

    Such a rest has no direction, and another value in every pass. In half precision a layer's scale may be as small, so
    the bound is zero there; in float32 it is close to the smallest scale."""
    share = {torch.float64: 1e-10, torch.float32: 5e-7}.get(u.dtype, 0.0)
    result: Tensor = torch.maximum(u.norm(), s.norm().to(u.dtype)) * (share / max(len(u), 1) ** 0.5)
    return result


def _layout_of(x: Tensor, ctx: SiteContext) -> Layout:
    """The layout of the next matrix site's input: that of the site, if the shape allows it."""
    layout, shape = ctx.site.layout, tuple(x.shape)
    if layout.fits(shape, ctx.examples):
        return layout
    return Layout.candidates(shape, ctx.examples)[0]


def rows(t: Tensor, layout: Layout, n: int) -> Tensor:
    """One row for each example, ``[n, j]``; coupled: one row for each index of the first dimension."""
    if layout in (Layout.COUPLED, Layout.BATCH_FIRST):
        return t.flatten(1) if t.dim() > 1 else t.reshape(1, -1)
    return layout.flat_rows(t, n)
