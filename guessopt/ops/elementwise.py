"""Elementwise operations: the steps that a path from one matrix site to the next may take without mixing entries.

The derivative of such a path at ``s`` is ``M = phi'(s)``: 0/1 for ReLU (Singhal 3.2; Wang eq. 4). Dropout passes as its
mean, the identity: its mask is drawn after the guess.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guessopt.ops.base import PULLED_BACK, CachedCall, no_more, register_tangent
from guessopt.sites import Call

UNARY: set[Callable[..., Any]] = {
    torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu, F.relu_,
    F.leaky_relu, F.leaky_relu_, F.elu, F.elu_, F.selu, F.celu, F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid,
    F.gelu, F.silu, F.mish, F.softplus, F.softsign, F.tanhshrink, F.logsigmoid, F.sigmoid, F.tanh,
    torch.sigmoid, Tensor.sigmoid, torch.tanh, Tensor.tanh, torch.sin, Tensor.sin, torch.cos, Tensor.cos,
    torch.exp, Tensor.exp, torch.square, Tensor.square, torch.abs, Tensor.abs, torch.neg, Tensor.neg, Tensor.__neg__,
    torch.pow, Tensor.pow, Tensor.__pow__, torch.clamp, Tensor.clamp,
}  # fmt: skip

_WITH_NUMBER: set[Callable[..., Any]] = {
    torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__,
    torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.div, Tensor.div, Tensor.__truediv__,
}  # fmt: skip

DROPOUT: set[Callable[..., Any]] = {
    F.dropout, torch.dropout, F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d,
    torch.feature_dropout,
}  # fmt: skip

IDENTITY: set[Callable[..., Any]] = {Tensor.contiguous, Tensor.clone, torch.clone}

ADDITION: set[Callable[..., Any]] = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}

RELU: set[Callable[..., Any]] = {torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu, F.relu_}


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    """In steps that can be differentiated twice."""
    return F.hardtanh(x + 3, 0, 6) / 6


PULLED_BACK[F.hardsigmoid] = _hardsigmoid


def is_elementwise(fn: Callable[..., Any]) -> bool:
    """Whether ``fn``, with one tensor among its arguments, acts on each entry alone and keeps the shape.

    >>> is_elementwise(torch.relu), is_elementwise(torch.softmax)
    (True, False)
    """
    return fn in UNARY or fn in _WITH_NUMBER or fn in DROPOUT or fn in IDENTITY


def fused_pull_back(calls: Sequence[Call]) -> Callable[[Tensor, Tensor, bool], Tensor] | None:
    """``(u, s, spent) -> M u`` in one kernel (in ``u``'s memory if it is spent), where a path of elementwise calls is
    one well-known activation, dropout aside."""
    active = [call for call in calls if call.fn not in DROPOUT and call.fn not in IDENTITY]
    if len(active) != 1:
        return None
    call = active[0]
    if call.fn in RELU:
        return relu_pull_back
    if call.fn is F.gelu:
        return partial(_backward, torch.ops.aten.gelu_backward, approximate=call.kwargs.get("approximate", "none"))
    return partial(_backward, torch.ops.aten.silu_backward) if call.fn is F.silu else None


def is_rectifier(calls: Sequence[Call]) -> bool:
    """Whether a path is a ReLU and no more: its derivative at what it makes is that at what it is made from."""
    return len(calls) == 1 and calls[0].fn in RELU


def _backward(kernel: Any, u: Tensor, s: Tensor, spent: bool = False, **options: Any) -> Tensor:
    """``M u``; in ``u``'s own memory if that is spent."""
    if spent and u.dtype is s.dtype and not u.requires_grad:
        return kernel.grad_input(u, s, grad_input=u, **options)
    return kernel(u, s, **options)


def lasting_derivative(calls: Sequence[Call], s: Tensor) -> tuple[Call, Tensor] | None:
    """The call and ``M``, where a path is one activation whose derivative is worth keeping until its tangent is due:
    it takes longer than a product with it."""
    if len(calls) != 1 or calls[0].fn is not F.gelu:
        return None
    return calls[0], torch.ops.aten.gelu_backward(s.new_ones(()).expand_as(s), s, **calls[0].kwargs)


def relu_pull_back(u: Tensor, s: Tensor, spent: bool = False) -> Tensor:
    """``M u`` for a ReLU at ``s``; ``u`` may have dimensions in front of those of ``s``."""
    return _backward(torch.ops.aten.threshold_backward, u, s, spent, threshold=0)


def pull_back(path: tuple[tuple[Callable[..., Any], Callable[[Tensor], Tensor]], ...], s: Tensor, u: Tensor) -> Tensor:
    """``M u`` for a path as in ``derivative``: reverse mode through the activations themselves."""
    active = [(fn, run) for fn, run in path if fn not in DROPOUT and fn not in IDENTITY]
    if not active:
        return u
    with torch.enable_grad():
        t = start = s.detach().requires_grad_()
        for _, run in active:
            t = run(t)
        return torch.autograd.grad(t, start, u)[0]


def derivative(path: tuple[tuple[Callable[..., Any], Callable[[Tensor], Tensor]], ...], s: Tensor) -> Tensor | None:
    """``M = phi'(s)``, shape of ``s`` (bool for a ReLU); None for the identity.

    Args:
        path: pairs of the torch function and the same function closed over its other arguments.
        s: the site's output, without tangent.
    """
    active = [(fn, run) for fn, run in path if fn not in DROPOUT and fn not in IDENTITY]
    if not active:
        return None
    if len(active) == 1 and active[0][0] in RELU:
        return s > 0

    with torch.enable_grad():
        t = start = s.detach().requires_grad_()
        for _, run in active:
            t = run(t)
        return torch.autograd.grad(t, start, torch.ones_like(t))[0]


# Tangents. Most activations have none here: torch's own rules for relu, sigmoid, tanh and the like are one fused kernel
# already. In arithmetic torch fills a tensor with zeros for an operand without tangent.

Pair = tuple[Any, Any]


@register_tangent(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, duals=2, known=no_more)
def add(ab: Pair, tangents: Pair, *, known: CachedCall | None = None, **other: Any) -> Any:
    """``d(a + b) = da`` where b is constant."""
    (a, b), (da, db) = ab, tangents
    if other or (known is None and da is not None and db is not None):
        return NotImplemented
    out = a + b if known is None else known.out
    if da is None or db is None:
        return out, _alone(da if db is None else db, out)
    return out, da + db


@register_tangent(torch.sub, Tensor.sub, Tensor.__sub__, duals=2)
def subtract(ab: Pair, tangents: Pair, **other: Any) -> Any:
    """``d(a - b) = da`` where b is constant, ``-db`` where a is."""
    (a, b), (da, db) = ab, tangents
    if other or (da is not None and db is not None):
        return NotImplemented
    out = a - b
    if db is None:
        return out, _alone(da, out)
    return out, -db if db.shape == out.shape else _alone(-db, out)


@register_tangent(
    torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__, duals=2, known=no_more
)
def multiply(ab: Pair, tangents: Pair, *, known: CachedCall | None = None, **other: Any) -> Any:
    """``d(a b) = da b + a db``."""
    (a, b), (da, db) = ab, tangents
    if other:
        return NotImplemented
    out = a * b if known is None else known.out
    if da is None or db is None:
        return out, da * b if db is None else a * db
    return out, (da * b).addcmul_(a, db)


@register_tangent(torch.neg, Tensor.neg, Tensor.__neg__, known=no_more)
def negative(x: Tensor, dx: Tensor, *, known: CachedCall | None = None) -> tuple[Tensor, Tensor]:
    """``d(-x) = -dx``."""
    return -x if known is None else known.out, -dx


@register_tangent(torch.rsqrt, Tensor.rsqrt, known=no_more)
def reciprocal_root(x: Tensor, dx: Tensor, *, known: CachedCall | None = None) -> tuple[Tensor, Tensor]:
    """``d(x^-1/2) = -1/2 x^-3/2 dx``."""
    out = torch.rsqrt(x) if known is None else known.out
    return out, dx * out.pow(3).mul_(-0.5)


@register_tangent(torch.mean, Tensor.mean, known=no_more)
def mean(x: Tensor, dx: Tensor, *dim: Any, known: CachedCall | None = None, **other: Any) -> Any:
    """The mean of the tangent."""
    if "out" in other:
        return NotImplemented
    return torch.mean(x, *dim, **other) if known is None else known.out, torch.mean(dx, *dim, **other)


@register_tangent(torch.cat, torch.concat, torch.concatenate, known=no_more)
def concatenate(xs: Any, dxs: Any, *dim: Any, known: CachedCall | None = None, **other: Any) -> Any:
    """The tangents side by side."""
    if "out" in other:
        return NotImplemented
    dxs = [torch.zeros_like(x) if dx is None else dx for x, dx in zip(xs, dxs, strict=True)]
    return torch.cat(xs, *dim, **other) if known is None else known.out, torch.cat(dxs, *dim, **other)


@register_tangent(F.gelu, known=no_more)
def gelu(x: Tensor, dx: Tensor, *, known: CachedCall | None = None, **kind: Any) -> tuple[Tensor, Tensor]:
    """``ds = gelu'(x) dx``; in the memory of ``known.more``, the derivative, where a pull-back has computed it."""
    out = F.gelu(x, **kind) if known is None or known.out is None else known.out
    if known is not None and known.more is not None:
        return out, known.more.mul_(dx)
    return out, torch.ops.aten.gelu_backward(dx, x, **kind)


@register_tangent(F.silu, known=no_more)
def silu(x: Tensor, dx: Tensor, inplace: bool = False, *, known: CachedCall | None = None) -> Any:
    """``ds = silu'(x) dx`` in one kernel."""
    if inplace:
        return NotImplemented
    return F.silu(x) if known is None else known.out, torch.ops.aten.silu_backward(dx, x)


@register_tangent(F.prelu, duals=2)
def prelu(xw: Pair, tangents: Pair) -> Any:
    """``ds = dx`` where ``x > 0``, else ``w dx + x dw``: at 0 as autograd has it (torch's tangent: ``dx``)."""
    (x, w), (dx, dw) = xw, tangents
    shape = () if w.numel() == 1 else (-1, *(1,) * (x.dim() - 2))
    ds = torch.zeros_like(x) if dx is None else torch.where(x > 0, dx, w.reshape(shape) * dx)
    return F.prelu(x, w), ds if dw is None else ds + torch.where(x > 0, 0, x) * dw.reshape(shape)


@register_tangent(
    torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.divide, Tensor.true_divide, Tensor.__truediv__,
    duals=2,
)  # fmt: skip
def divide(ab: Pair, tangents: Pair, **other: Any) -> Any:
    """``d(a / b) = da / b`` where b is constant."""
    (a, b), (da, db) = ab, tangents
    if other or db is not None:
        return NotImplemented
    return a / b, da / b


@register_tangent(torch.pow, Tensor.pow, Tensor.__pow__, known=no_more)
def power(x: Tensor, dx: Tensor, exponent: Any, *, known: CachedCall | None = None, **other: Any) -> Any:
    """``d(x^n) = n x^(n-1) dx`` for a number n."""
    if other or isinstance(exponent, (Tensor, complex)) or exponent == 0:
        return NotImplemented
    out = x**exponent if known is None else known.out
    if exponent == 2:
        return out, (x * dx).mul_(2)
    return out, dx * x.pow(exponent - 1).mul_(exponent)


@register_tangent(torch.square, Tensor.square)
def square(x: Tensor, dx: Tensor, **other: Any) -> Any:
    """``d(x^2) = 2 x dx``."""
    return power(x, dx, 2, **other)


@register_tangent(F.dropout, torch.dropout)
def dropout(x: Tensor, dx: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, **other: Any) -> Any:
    """``ds = mask / (1 - p) dx`` with the mask that torch draws from the same random state."""
    if inplace or other or not training or not 0 < p < 1:
        return NotImplemented
    if x.is_cuda:
        out, mask = torch.native_dropout(x, p, True)
        return out, (dx * mask).mul_(1 / (1 - p))
    mask = torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)
    return x * mask, dx * mask


def _alone(d: Tensor, out: Tensor) -> Tensor:
    """A tangent of ``out`` equal to ``d``, in memory of its own: something may yet be added to ``out`` in place."""
    return d.to(out.dtype, copy=True).expand(out.shape) if d.shape == out.shape else d.expand(out.shape).clone()
