"""Activations: a function ``phi`` of each entry.

The derivative of a path through ``phi`` alone is ``M = phi'(s)``: 0 or 1 for ReLU (Singhal 3.2; Wang eq. 4). Most
activations have no tangent here: torch's own rules for relu, sigmoid, tanh and the like are one fused kernel already.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guessopt.ops.base import Entries, Op, always, register
from guessopt.ops.cached import CachedCall, result_only


def relu_pull_back(u: Tensor, s: Tensor, spent: bool = False, **other: Any) -> Tensor:
    """``u`` where ``s > 0``, else 0. ``s`` may be the input of the ReLU or its output."""
    return _backward(torch.ops.aten.threshold_backward, u, s, spent, threshold=0)


def gelu_pull_back(u: Tensor, s: Tensor, spent: bool = False, *, approximate: str = "none", **other: Any) -> Tensor:
    """``gelu'(s) u``."""
    return _backward(torch.ops.aten.gelu_backward, u, s, spent, approximate=approximate)


def silu_pull_back(u: Tensor, s: Tensor, spent: bool = False, **other: Any) -> Tensor:
    """``silu'(s) u``."""
    return _backward(torch.ops.aten.silu_backward, u, s, spent)


def _backward(kernel: Any, u: Tensor, s: Tensor, spent: bool, **options: Any) -> Tensor:
    """``phi'(s) u``; in the memory of ``u`` if it is spent."""
    if spent and u.dtype is s.dtype and not u.requires_grad:
        result: Tensor = kernel.grad_input(u, s, grad_input=u, **options)
        return result
    result = kernel(u, s, **options)
    return result


def gelu(x: Tensor, dx: Tensor, *, known: CachedCall | None = None, **kind: Any) -> tuple[Tensor, Tensor]:
    """``ds = gelu'(x) dx``; in the memory of ``known.more``, the derivative, where a pull-back has computed it."""
    out = F.gelu(x, **kind) if known is None or known.out is None else known.out
    if known is not None and known.more is not None:
        return out, known.more.mul_(dx)
    return out, torch.ops.aten.gelu_backward(dx, x, **kind)


def silu(x: Tensor, dx: Tensor, inplace: bool = False, *, known: CachedCall | None = None) -> Any:
    """``ds = silu'(x) dx`` in one kernel."""
    if inplace:
        return NotImplemented
    return F.silu(x) if known is None else known.out, torch.ops.aten.silu_backward(dx, x)


def prelu(xw: tuple[Tensor, Tensor], tangents: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor, Tensor]:
    """``ds = dx`` where ``x > 0``, else ``w dx + x dw``: at 0 as autograd has it (torch's tangent: ``dx``)."""
    (x, w), (dx, dw) = xw, tangents
    shape = () if w.numel() == 1 else (-1, *(1,) * (x.dim() - 2))
    ds = torch.zeros_like(x) if dx is None else torch.where(x > 0, dx, w.reshape(shape) * dx)
    return F.prelu(x, w), ds if dw is None else ds + torch.where(x > 0, 0, x) * dw.reshape(shape)


def _twice_differentiable_hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    """Torch's own backward cannot be differentiated."""
    return F.hardtanh(x + 3, 0, 6) / 6


register(
    Op(
        (torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu),
        entries=Entries.UNARY,
        pull_back=relu_pull_back,
        rectifier=True,
    )
)
register(
    Op(
        (F.gelu,),
        tangent=gelu,
        reuse=result_only,
        entries=Entries.UNARY,
        pull_back=gelu_pull_back,
        keeps_derivative=True,
    )
)
register(Op((F.silu,), tangent=silu, reuse=result_only, entries=Entries.UNARY, pull_back=silu_pull_back))
register(Op((F.hardsigmoid,), in_reverse=_twice_differentiable_hardsigmoid, entries=Entries.UNARY))
register(
    Op(
        (
            *(F.leaky_relu, F.leaky_relu_, F.elu, F.elu_, F.selu, F.celu, F.relu6, F.hardtanh, F.hardswish, F.mish),
            *(F.softplus, F.softsign, F.tanhshrink, F.logsigmoid, F.sigmoid, torch.sigmoid, Tensor.sigmoid),
            *(F.tanh, torch.tanh, Tensor.tanh, torch.sin, Tensor.sin, torch.cos, Tensor.cos, torch.exp, Tensor.exp),
            *(torch.abs, Tensor.abs, torch.clamp, Tensor.clamp),
        ),
        entries=Entries.UNARY,
    )
)
register(Op((F.prelu,), tangent=prelu, duals=2, backward_only=always))
register(Op((Tensor.prelu,), backward_only=always))
