"""Normalisations with an affine part: ``s = xhat * w + b``, so ``dw = sum g xhat`` and ``db = sum g``.

The normalised ``xhat`` comes from the operation itself without its affine part; running statistics are not touched.
Letters: n examples and positions, c the channels or features that the weight covers.

Tangents: ``xhat = (x - mean) r`` with ``r = 1 / std`` over a set of entries has, on that set, the Jacobian
``J = r (1 - 1 1^T / m - xhat xhat^T / m)`` (m entries; without ``1 1^T`` for RMS). It equals its transpose, so torch's
fused kernels for ``J^T g`` compute ``dxhat = J dx`` in one go; then ``ds = w dxhat``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guessopt.ops.base import CachedCall, FeedbackMap, Rule, register_rule, register_tangent

_NAMES: dict[Callable[..., Any], tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
}

#: Normalisations whose weight lies along dimension 1, whatever follows it.
CHANNELS_SECOND = (F.batch_norm, F.group_norm)


@register_rule(F.batch_norm, F.layer_norm, F.group_norm, F.rms_norm)
class NormRule(Rule):
    """Weight and bias of batch, layer, group and RMS normalisation."""

    has_parameter_tangent = True

    def parameter_tangent(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        wanted: list[int],
        vs: list[Tensor],
        place: FeedbackMap,
    ) -> Tensor:
        """``v_w xhat + v_b``, of each example's own weight and bias."""
        bound = dict(zip(_NAMES[fn], args, strict=False)) | kwargs
        tensors = [name for name, value in bound.items() if isinstance(value, Tensor)]
        inner = (1,) * (bound["input"].dim() - 2) if fn in CHANNELS_SECOND else ()
        placed = {tensors[k]: place(v.reshape(*v.shape, *inner)) for k, v in zip(wanted, vs, strict=True)}
        if "weight" not in placed:
            return placed["bias"]
        xhat = _normalised(fn, bound["input"], bound)
        return torch.addcmul(placed["bias"], xhat, placed["weight"]) if "bias" in placed else xhat * placed["weight"]

    def gradients(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: int,
        wanted: list[int],
        g: Tensor,
    ) -> list[Tensor | None]:
        bound = dict(zip(_NAMES[fn], args, strict=False)) | kwargs
        tensors = [name for name, value in bound.items() if isinstance(value, Tensor)]
        x = bound["input"]
        shape = bound["weight"].shape if isinstance(bound.get("weight"), Tensor) else bound["bias"].shape
        channel_first = fn in CHANNELS_SECOND
        dims = [d for d in range(g.dim()) if d != 1] if channel_first else list(range(g.dim() - len(shape)))
        gradients: list[Tensor | None] = []
        if fn is F.batch_norm and bound.get("training", False) and x.dtype is g.dtype:
            both = _batch_norm_gradients(x, g, bound.get("eps", 1e-5))
            if all(tensors[k] in both for k in wanted):
                return [both[tensors[k]] for k in wanted]
        for k in wanted:
            if tensors[k] == "weight":
                gradients.append((g * _normalised(fn, x, bound)).sum(dims))
            elif tensors[k] == "bias":
                gradients.append(g.sum(dims))
            else:
                return super().gradients(fn, args, kwargs, output, wanted, g)
        return gradients


def _batch_norm_gradients(x: Tensor, g: Tensor, eps: float) -> dict[str, Tensor]:
    """Of the scale and the shift, from one reading of ``x`` for its statistics and one of both."""
    _, mean, inverse = torch.native_batch_norm(x, None, None, None, None, True, 0.0, eps)
    backward = torch.ops.aten.native_batch_norm_backward.default
    _, weight, bias = backward(g, x, None, None, None, mean, inverse, True, eps, [False, True, True])
    return {"weight": weight, "bias": bias}


def _normalised(fn: Callable[..., Any], x: Tensor, bound: dict[str, Any]) -> Tensor:
    if fn is F.batch_norm:
        eps = bound.get("eps", 1e-5)
        if bound.get("training", False):
            return F.batch_norm(x, None, None, None, None, True, 0.1, eps)
        return F.batch_norm(x, bound["running_mean"], bound["running_var"], None, None, False, 0.1, eps)
    if fn is F.group_norm:
        return F.group_norm(x, bound["num_groups"], None, None, bound.get("eps", 1e-5))
    if fn is F.layer_norm:
        return F.layer_norm(x, bound["normalized_shape"], None, None, bound.get("eps", 1e-5))
    return F.rms_norm(x, bound["normalized_shape"], None, bound.get("eps"))


_layer_norm_jacobian = torch.ops.aten.native_layer_norm_backward.default
_group_norm_jacobian = torch.ops.aten.native_group_norm_backward.default
_batch_norm_jacobian = torch.ops.aten.native_batch_norm_backward.default
_X_ONLY = [True, False, False]


def _per_channel(t: Tensor, like: Tensor) -> Tensor:
    return t.reshape(1, -1, *(1,) * (like.dim() - 2))


def _statistics(out: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and reciprocal deviation, from the graph of a layer norm."""
    node: Any = out.grad_fn
    found = [getattr(node, f"_saved_result{k}", None) for k in (1, 2)]
    return None if found[0] is None or found[1] is None else (found[0], found[1])


@register_tangent(F.layer_norm, torch.layer_norm, known=_statistics)
def layer_norm(
    x: Tensor,
    dx: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
    *,
    known: CachedCall | None = None,
) -> tuple[Tensor, Tensor]:
    """``ds = w r (dx - mean(dx) - xhat mean(xhat dx))`` over the normalised dimensions."""
    shape = list(normalized_shape)
    if known is not None and known.more is not None:
        out, (mean, r) = known.out, known.more
    else:
        out, mean, r = torch.native_layer_norm(x, shape, weight, bias, eps)
    if not x.is_cuda:  # the CPU kernel wants one dtype; statistics of bfloat16 may be float32
        x, dx = x.to(mean.dtype), dx.to(mean.dtype)
    dxhat = _layer_norm_jacobian(dx, x, shape, mean, r, None, None, _X_ONLY)[0]
    return out, dxhat if weight is None else dxhat.mul_(weight)


@register_tangent(F.rms_norm, torch.rms_norm)
def rms_norm(
    x: Tensor, dx: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """``ds = w r (dx - xhat mean(xhat dx))`` over the normalised dimensions, in float32 at least."""
    dims = list(range(-len(normalized_shape), 0))
    wide, dwide = (x.float(), dx.float()) if x.dtype in (torch.float16, torch.bfloat16) else (x, dx)
    r = torch.rsqrt((wide * wide).mean(dims, keepdim=True) + (torch.finfo(wide.dtype).eps if eps is None else eps))
    xhat = wide * r
    dxhat = torch.addcmul(dwide, xhat, (xhat * dwide).mean(dims, keepdim=True), value=-1).mul_(r)
    if weight is None:
        return xhat.to(x.dtype), dxhat.to(x.dtype)
    if weight.dtype is not x.dtype:  # the output's dtype depends on torch's version
        out = F.rms_norm(x, list(normalized_shape), weight, eps)
        return out, dxhat.mul_(weight).to(out.dtype)
    return (xhat * weight).to(x.dtype), dxhat.mul_(weight).to(x.dtype)


@register_tangent(F.group_norm)
def group_norm(
    x: Tensor,
    dx: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """``ds = w r (dx - mean(dx) - xhat mean(xhat dx))`` over each example's group of channels."""
    sizes = (x.shape[0], x.shape[1], math.prod(x.shape[2:]), num_groups)
    x = x.contiguous()
    out, mean, r = torch.native_group_norm(x, weight, bias, *sizes, eps)
    dxhat = _group_norm_jacobian(dx.contiguous(), x, mean, r, None, *sizes, _X_ONLY)[0]
    return out, dxhat if weight is None else dxhat.mul_(_per_channel(weight, x))


@register_tangent(F.batch_norm)
def batch_norm(
    x: Tensor,
    dx: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Training: ``ds = w r (dx - mean(dx) - xhat mean(xhat dx))`` over each channel. Evaluation: ``ds = w r dx``."""
    if training:
        if x.numel() <= x.shape[1]:  # torch's own check names the mistake
            return NotImplemented
        out, mean, r = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        dxhat = _batch_norm_jacobian(dx, x, None, None, None, mean, r, True, eps, _X_ONLY)[0]
        return out, dxhat if weight is None else dxhat.mul_(_per_channel(weight, x))
    if running_var is None:
        return NotImplemented
    out = F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    scale = torch.rsqrt(running_var + eps) if weight is None else weight * torch.rsqrt(running_var + eps)
    return out, dx * _per_channel(scale, x).to(dx.dtype)


@register_tangent(F.instance_norm)
def instance_norm(
    x: Tensor,
    dx: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """``group_norm`` with one channel a group; torch's own with running statistics."""
    if running_mean is not None or not use_input_stats or math.prod(x.shape[2:]) <= 1:
        return NotImplemented
    return group_norm(x, dx, x.shape[1], weight, bias, eps)
