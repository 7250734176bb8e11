"""Softmax and attention.

``p = softmax(a)`` has the Jacobian ``J = diag(p) - p p^T``, equal to its transpose: torch's fused kernel for ``J^T g``
computes ``dp = J da = p (da - <p, da>)``.

Letters: b examples and heads, l queries, s keys, e features, v features of the values. Queries are ``[b, l, e]``, keys
``[b, s, e]``, values ``[b, s, v]``; scores ``a`` and probabilities ``p`` are ``[b, l, s]``, results ``[b, l, v]``.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from guessopt.ops.base import Op, register
from guessopt.ops.cached import CachedCall

_jacobian = torch._softmax_backward_data

#: Scores held at a time, a number of entries. A CPU's fit into the cache of a core; a GPU's keep it busy.
_SCORES = {"cpu": 1 << 18, "cuda": 1 << 27}


def softmax(x: Tensor, dx: Tensor, dim: int, dtype: torch.dtype | None = None, **other: Any) -> Any:
    """``dp = p (dx - <p, dx>)`` along ``dim``."""
    if other or not isinstance(dim, int):
        return NotImplemented
    p = torch.softmax(x, dim, dtype=dtype)
    return p, _jacobian(dx.to(p.dtype), p, dim, p.dtype)


def functional_softmax(
    x: Tensor, dx: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    """``softmax`` as ``torch.nn.functional`` spells it."""
    return NotImplemented if dim is None else softmax(x, dx, dim, dtype)


def _probabilities_of(out: Tensor) -> list[Tensor] | None:
    """The probabilities, head by head, from the reverse graph of ``_Attention``; None from any other."""
    return getattr(out.grad_fn, "probabilities", None)


def attention(
    qkv: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    known: CachedCall | None = None,
) -> Any:
    """``p = softmax(c q k^T + mask)``, ``out = p v``; ``da = c (dq k^T + q dk^T)``, ``dout = dp v + p dv``.

    The scores are computed explicitly, a few examples and heads at a time: the tangent needs ``p``, which torch's
    fused kernel does not give."""
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

    if low is None and _is_plain(q, k, v, attn_mask) and all(t is not None for t in tangents):
        c = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        return _attend_by_head(qkv, tangents, is_causal, c, known)  # type: ignore[arg-type]
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


def _is_plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether heads can be taken one by one, as strided matrices that no product copies.

    This needs ``[n, heads, l, e]`` with equal ``n`` and heads, a CPU, and no mask but the causal one."""
    alike = q.dim() == k.dim() == v.dim() == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2]
    return alike and mask is None and not q.is_cuda and q.shape[0] * q.shape[-2] >= 512


def _scaled(a: Tensor, b: Tensor, c: float) -> Tensor:
    """``c a b`` in one kernel."""
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2]).baddbmm_(a, b, beta=0, alpha=c)


def _probabilities(q: Tensor, k: Tensor, is_causal: bool, c: float) -> Tensor:
    a = _scaled(q, k.mT, c)
    if is_causal:
        a = a.masked_fill_(torch.ones(a.shape[1:], dtype=torch.bool, device=a.device).triu_(1), -math.inf)
    return torch.softmax(a, -1)


def _attend_by_head(
    qkv: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor, Tensor, Tensor],
    is_causal: bool,
    c: float,
    known: CachedCall | None,
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv
    n, h, l_, e = *q.shape[:3], v.shape[-1]
    ps = None if known is None else known.more
    out, dout = (q.new_empty(n, l_, h, e).transpose(1, 2) for _ in range(2))
    if known is not None and ps is not None:
        out = known.out
    for head in range(h):
        q, k, v, dq, dk, dv = (t[:, head] for t in (*qkv, *tangents))
        p = _probabilities(q, k, is_causal, c) if ps is None else ps[head]
        da = _scaled(dq, k.mT, c).baddbmm_(q, dk.mT, alpha=c)
        dp = _jacobian(da, p, -1, p.dtype)
        if ps is None:
            out[:, head] = torch.bmm(p, v)
        dout[:, head] = torch.bmm(p, dv).baddbmm_(dp, v)
    return out, dout


class _Attention(torch.autograd.Function):
    """Attention with an explicit softmax, head by head: on a CPU and at moderate lengths its pull-back takes about
    half of the fused kernel's time."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, c: float) -> Tensor:
        ps = [_probabilities(q[:, head], k[:, head], is_causal, c) for head in range(q.shape[1])]
        out = v.new_empty(v.shape[0], q.shape[2], v.shape[1], v.shape[3]).transpose(1, 2)
        for head, p in enumerate(ps):
            out[:, head] = torch.bmm(p, v[:, head])
        ctx.save_for_backward(q, k, v)
        ctx.probabilities, ctx.c = ps, c
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (u,), (q, k, v) = gradients, ctx.saved_tensors
        if q.shape == k.shape == v.shape:  # side by side, as one projection gives them: see ``unbind``
            n, h, l_, e = q.shape
            packed = q.new_empty(n, l_, 3, h, e)
            gq, gk, gv = (packed.select(2, k_).transpose(1, 2) for k_ in range(3))
        else:
            gq, gk, gv = (torch.empty_like(t) for t in (q, k, v))
        for head, p in enumerate(ctx.probabilities):
            da = _jacobian(_scaled(u[:, head], v[:, head].mT, ctx.c), p, -1, p.dtype)
            gq[:, head] = torch.bmm(da, k[:, head])
            gk[:, head] = torch.bmm(da.mT, q[:, head])
            gv[:, head] = torch.bmm(p.mT, u[:, head])
        return gq, gk, gv, None, None


def draws(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of ``F.scaled_dot_product_attention`` has dropout."""
    return bool(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0))


def differentiable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **other: Any,
) -> Tensor:
    """``F.scaled_dot_product_attention`` without dropout, by the route with the faster pull-back."""
    del dropout_p
    same = q.dtype == k.dtype == v.dtype and _autocast_dtype(q) is None
    if other.get("enable_gqa") or not same or not _is_plain(q, k, v, attn_mask) or k.shape[-2] > 512:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, 0.0, is_causal, scale=scale, **other)
    c = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out: Tensor = _Attention.apply(q, k, v, is_causal, c)  # type: ignore[no-untyped-call]
    return out


def _attend(
    qkv: tuple[Tensor, Tensor, Tensor],
    tangents: list[Tensor | None],
    mask: Tensor | None,
    c: float,
    out: Tensor,
    dout: Tensor,
) -> None:
    """Into ``out`` and ``dout`` ``[b, l, v]``; ``mask`` as ``_flat_mask`` gives it."""
    p = _masked_probabilities(qkv[0], qkv[1], mask, c)
    torch.bmm(p, qkv[2], out=out)
    _attend_tangent(qkv, p, tangents, c, dout)


def _masked_probabilities(q: Tensor, k: Tensor, mask: Tensor | None, c: float) -> Tensor:
    a = torch.bmm(q, k.mT).mul_(c)
    if mask is None:
        return torch.softmax(a, -1)
    a = a.masked_fill_(mask, -math.inf) if mask.dtype is torch.bool else a.add_(mask)
    return torch._safe_softmax(a, -1)


def _attend_tangent(
    qkv: tuple[Tensor, Tensor, Tensor], p: Tensor, tangents: list[Tensor | None], c: float, dout: Tensor
) -> None:
    (q, k, v), (dq, dk, dv) = qkv, tangents
    da: Tensor | None = None
    if dq is not None:
        da = torch.bmm(dq, k.mT)
    if dk is not None:
        da = torch.bmm(q, dk.mT) if da is None else da.baddbmm_(q, dk.mT)

    if dv is not None:
        torch.bmm(p, dv, out=dout)
    if da is not None:
        dp = _jacobian(da.mul_(c), p, -1, p.dtype)
        if dv is None:
            torch.bmm(dp, v, out=dout)
        else:
            dout.baddbmm_(dp, v)


def stacked_attention(
    qkv: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``attention`` for several tangents at once, ``[K, *shape]`` each: the probabilities are computed once."""
    q, k, v = qkv
    if dropout_p > 0 or (is_causal and attn_mask is not None) or enable_gqa or q.dim() < 2 or q.numel() == 0:
        return NotImplemented
    if _autocast_dtype(q) is not None or not q.dtype == k.dtype == v.dtype or k.numel() == 0:
        return NotImplemented
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (t.expand(*lead, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in qkv)
    count = next(t.shape[0] for t in tangents if t is not None)
    moving = [
        None if d is None else d.reshape(count, *(1,) * (len(lead) + 2 - t.dim()), *t.shape)
        .expand(count, *lead, *t.shape[-2:])
        .reshape(count, -1, *t.shape[-2:])
        for t, d in zip(qkv, tangents, strict=True)
    ]  # fmt: skip
    mask = _flat_mask(attn_mask, is_causal, lead, q, k)
    c = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out = q.new_empty(*lead, q.shape[-2], v.shape[-1])
    dout = q.new_empty(count, *out.shape)
    flat_out, flat_dout = out.view(-1, *out.shape[-2:]), dout.view(count, -1, *out.shape[-2:])
    size = max(1, _SCORES.get(q.device.type, _SCORES["cuda"]) // (q.shape[-2] * k.shape[-2]))
    for at in range(0, q.shape[0], size):
        b = slice(at, at + size)
        part = mask if mask is None or mask.dim() == 2 else mask[b]
        p = _masked_probabilities(q[b], k[b], part, c)
        torch.bmm(p, v[b], out=flat_out[b])
        for g in range(count):
            _attend_tangent((q[b], k[b], v[b]), p, [None if t is None else t[g, b] for t in moving], c, flat_dout[g, b])
    return out, dout


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


def _plain_formula() -> AbstractContextManager[Any]:
    context: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.MATH)
    return context


register(Op((torch.softmax, Tensor.softmax, torch.special.softmax), tangent=softmax))
register(Op((F.softmax,), tangent=functional_softmax))
register(
    Op(
        (F.scaled_dot_product_attention,),
        tangent=attention,
        duals=3,
        reuse=_probabilities_of,
        stacked_tangent=stacked_attention,
        context=_plain_formula,
        treatment="runs by the explicit formula: the fused kernels have no forward derivative",
        fuses=True,
        in_reverse=differentiable_attention,
        draws=draws,
    )
)
