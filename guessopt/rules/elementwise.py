"""Elementwise operations: the steps that a path from one matrix site to the next may take without mixing entries.

The derivative of such a path at ``s`` is ``M = phi'(s)``: 0/1 for ReLU (Singhal 3.2; Wang eq. 4). Dropout passes as its
mean, the identity: its mask is drawn after the guess.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_UNARY: set[Callable[..., Any]] = {
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

_RELU: set[Callable[..., Any]] = {torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu, F.relu_}


def is_elementwise(fn: Callable[..., Any]) -> bool:
    """Whether ``fn``, with one tensor among its arguments, acts on each entry alone and keeps the shape.

    >>> is_elementwise(torch.relu), is_elementwise(torch.softmax)
    (True, False)
    """
    return fn in _UNARY or fn in _WITH_NUMBER or fn in DROPOUT or fn in IDENTITY


def derivative(path: tuple[tuple[Callable[..., Any], Callable[[Tensor], Tensor]], ...], s: Tensor) -> Tensor | None:
    """``M = phi'(s)``, shape of ``s`` (bool for a ReLU); None for the identity.

    Args:
        path: pairs of the torch function and the same function closed over its other arguments.
        s: the site's output, without tangent.
    """
    active = [(fn, run) for fn, run in path if fn not in DROPOUT and fn not in IDENTITY]
    if not active:
        return None
    if len(active) == 1 and active[0][0] in _RELU:
        return s > 0

    with torch.enable_grad():
        t = start = s.detach().requires_grad_()
        for _, run in active:
            t = run(t)
        return torch.autograd.grad(t, start, torch.ones_like(t))[0]
