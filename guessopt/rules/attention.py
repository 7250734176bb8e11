"""Softmax and attention.

``p = softmax(a)`` has the Jacobian ``J = diag(p) - p p^T``, equal to its transpose: torch's fused kernel for ``J^T g``
computes ``dp = J da = p (da - <p, da>)``.

Letters: b examples and heads, l queries, s keys, e features, v features of the values.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guessopt.rules.base import register_tangent

_jacobian = torch._softmax_backward_data

#: Scores held at a time: about what a core's cache takes; on a GPU, what keeps it busy without filling its memory.
_SCORES = {"cpu": 1 << 18, "cuda": 1 << 27}


@register_tangent(torch.softmax, Tensor.softmax, torch.special.softmax)
def softmax(x: Tensor, dx: Tensor, dim: int, dtype: torch.dtype | None = None, **other: Any) -> Any:
    """``dp = p (dx - <p, dx>)`` along ``dim``."""
    if other or not isinstance(dim, int):
        return NotImplemented
    p = torch.softmax(x, dim, dtype=dtype)
    return p, _jacobian(dx.to(p.dtype), p, dim, p.dtype)


@register_tangent(F.softmax)
def functional_softmax(
    x: Tensor, dx: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    """``softmax`` as ``torch.nn.functional`` spells it."""
    return NotImplemented if dim is None else softmax(x, dx, dim, dtype)


@register_tangent(F.scaled_dot_product_attention, duals=3)
def attention(
    qkv: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``p = softmax(c q k^T + mask)``, ``out = p v``; ``da = c (dq k^T + q dk^T)``, ``dout = dp v + p dv``.

    The scores are computed explicitly, a few examples and heads at a time: the tangent needs ``p``, which torch's fused
    kernel does not give.
    """
    q, k, v = qkv
    low = _autocast_dtype(q)
    if dropout_p > 0 or (is_causal and attn_mask is not None) or q.dim() < 2 or q.numel() == 0 or k.numel() == 0:
        return NotImplemented
    if low is None and not q.dtype == k.dtype == v.dtype:
        return NotImplemented

    heads = q.shape[-3] if enable_gqa and q.dim() > 2 else 0
    lead = torch.broadcast_shapes(q.shape[:-2], *(() if heads else (k.shape[:-2], v.shape[:-2])))

    def flat(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        t = t if low is None else t.to(low)
        if heads and t.shape[-3] != heads:
            t = t.repeat_interleave(heads // t.shape[-3], -3)
        return t.expand(*lead, *t.shape[-2:]).reshape(-1, *t.shape[-2:])

    with _without_autocast(q, low):
        q, k, v, dq, dk, dv = (flat(t) for t in (*qkv, *tangents))  # type: ignore[assignment]
        mask = _flat_mask(attn_mask, is_causal, lead, q, k)
        c = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        out, dout = (q.new_empty(*lead, q.shape[-2], v.shape[-1]) for _ in range(2))
        flat_out, flat_dout = out.view(-1, *out.shape[-2:]), dout.view(-1, *out.shape[-2:])
        count = max(1, _SCORES.get(q.device.type, _SCORES["cuda"]) // (q.shape[-2] * k.shape[-2]))
        for at in range(0, q.shape[0], count):
            b = slice(at, at + count)
            part = mask if mask is None or mask.dim() == 2 else mask[b]
            moving = [None if t is None else t[b] for t in (dq, dk, dv)]
            _attend((q[b], k[b], v[b]), moving, part, c, flat_out[b], flat_dout[b])
    return out, dout


def _attend(
    qkv: tuple[Tensor, Tensor, Tensor],
    tangents: list[Tensor | None],
    mask: Tensor | None,
    c: float,
    out: Tensor,
    dout: Tensor,
) -> None:
    """Into ``out`` and ``dout`` ``[b, l, v]``; ``mask`` as ``_flat_mask`` gives it."""
    (q, k, v), (dq, dk, dv) = qkv, tangents
    kt = k.mT
    a = torch.bmm(q, kt).mul_(c)
    if mask is None:
        p = torch.softmax(a, -1)
    else:
        a = a.masked_fill_(mask, -math.inf) if mask.dtype is torch.bool else a.add_(mask)
        p = torch._safe_softmax(a, -1)

    da: Tensor | None = None
    if dq is not None:
        da = torch.bmm(dq, kt)
    if dk is not None:
        da = torch.bmm(q, dk.mT) if da is None else da.baddbmm_(q, dk.mT)

    torch.bmm(p, v, out=out)
    if dv is not None:
        torch.bmm(p, dv, out=dout)
    if da is not None:
        dp = _jacobian(da.mul_(c), p, -1, p.dtype)
        if dv is None:
            torch.bmm(dp, v, out=dout)
        else:
            dout.baddbmm_(dp, v)


def _flat_mask(mask: Tensor | None, is_causal: bool, lead: torch.Size, q: Tensor, k: Tensor) -> Tensor | None:
    """``[l, s]`` or ``[b, l, s]``: True where a key is *not* seen (bool), or a number to add to the score."""
    shape = (q.shape[-2], k.shape[-2])
    if is_causal:
        return torch.ones(shape, dtype=torch.bool, device=q.device).triu_(1)
    if mask is None:
        return None
    mask = ~mask if mask.dtype is torch.bool else mask.to(q.dtype)
    if mask[..., :1, :1].numel() == 1:
        return mask.expand(*mask.shape[:-2], *shape).reshape(shape)
    return mask.expand(*lead, *shape).reshape(-1, *shape)


def _autocast_dtype(q: Tensor) -> torch.dtype | None:
    kind = q.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _without_autocast(q: Tensor, low: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if low is None else torch.autocast(q.device.type, enabled=False)
