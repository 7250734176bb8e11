"""Normalisations with an affine part: ``s = xhat * w + b``, so ``dw = sum g xhat`` and ``db = sum g``.

``xhat`` comes from the operation itself without its affine part; running statistics stay as they are.
Letters: n example, c channel. The weight and the bias are ``[c]`` where channels lie along dimension 1 of
``x`` ``[n, c, ...]``; otherwise they are ``normalized_shape``, the last dimensions of ``x``.

Tangents: ``xhat = (x - mean) r`` with ``r = 1 / std`` over a set of entries has, on that set, the Jacobian
``J = r (1 - 1 1^T / m - xhat xhat^T / m)`` (m entries; without ``1 1^T`` for RMS). It equals its transpose, so torch's
fused kernels for ``J^T g`` compute ``dxhat = J dx`` in one go; then ``ds = w dxhat``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guessopt.ops.base import Formulas, NamedRule, Op, Placement, register
from guessopt.ops.cached import CachedCall

#: ``xhat``, shape of ``x``, from the arguments by name: the operation without its affine part.
Normalised = Callable[[dict[str, Any]], Tensor]


class NormRule(NamedRule):
    """``s = xhat w + b``, ``w`` and ``b`` broadcast: ``dw = sum g xhat`` and ``db = sum g``.

    Args:
        names: the operation's arguments, in order.
        normalised: computes ``xhat``.
        channels_second: whether ``w`` is ``[c]``, along dimension 1; otherwise it lies along the last dimensions.
    """

    def __init__(self, names: str, normalised: Normalised, *, channels_second: bool = False) -> None:
        self.names = tuple(names.split())
        self.normalised, self.channels_second = normalised, channels_second

    def formulas(self, call: dict[str, Any], g: Tensor) -> Formulas:
        affine = [call[name] for name in ("weight", "bias") if isinstance(call.get(name), Tensor)]
        if not affine:
            return {}
        if self.channels_second:
            summed = [d for d in range(g.dim()) if d != 1]  # n c ... -> c
        else:
            summed = list(range(g.dim() - affine[0].dim()))
        return {
            "weight": lambda: (g * self.normalised(call)).sum(summed),
            "bias": lambda: g.sum(summed),
        }

    def parameter_tangent(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        wanted: list[int],
        vs: list[Tensor],
        place: Placement,
    ) -> Tensor:
        """``v_w xhat + v_b``, of each example's own weight and bias."""
        call = self.bind(args, kwargs)
        tensors = [name for name, value in call.items() if isinstance(value, Tensor)]
        inner = (1,) * (call["input"].dim() - 2) if self.channels_second else ()
        placed = {tensors[k]: place(v.reshape(*v.shape, *inner)) for k, v in zip(wanted, vs, strict=True)}
        if "weight" not in placed:
            return placed["bias"]
        xhat = self.normalised(call)
        return torch.addcmul(placed["bias"], xhat, placed["weight"]) if "bias" in placed else xhat * placed["weight"]


class BatchNormRule(NormRule):
    """In training one kernel gives both gradients: it reads ``x`` once for its statistics and once for the sums."""

    def formulas(self, call: dict[str, Any], g: Tensor) -> Formulas:
        x = call["input"]
        if not call.get("training", False) or x.dtype is not g.dtype:
            return super().formulas(call, g)
        both = cache(lambda: _batch_norm_gradients(x, g, call.get("eps", 1e-5)))
        return {"weight": lambda: both()[0], "bias": lambda: both()[1]}


def _batch_norm_gradients(x: Tensor, g: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``dw`` and ``db``, ``[c]`` each; ``x`` and ``g`` are ``[n, c, ...]``."""
    _, mean, inverse = torch.native_batch_norm(x, None, None, None, None, True, 0.0, eps)
    _, dw, db = _batch_norm_jacobian(g, x, None, None, None, mean, inverse, True, eps, [False, True, True])
    return dw, db


def _batch_normalised(call: dict[str, Any]) -> Tensor:
    x, eps = call["input"], call.get("eps", 1e-5)
    if call.get("training", False):
        return F.batch_norm(x, None, None, None, None, True, 0.1, eps)
    return F.batch_norm(x, call["running_mean"], call["running_var"], None, None, False, 0.1, eps)


def _layer_normalised(call: dict[str, Any]) -> Tensor:
    return F.layer_norm(call["input"], call["normalized_shape"], None, None, call.get("eps", 1e-5))


def _group_normalised(call: dict[str, Any]) -> Tensor:
    return F.group_norm(call["input"], call["num_groups"], None, None, call.get("eps", 1e-5))


def _rms_normalised(call: dict[str, Any]) -> Tensor:
    return F.rms_norm(call["input"], call["normalized_shape"], None, call.get("eps"))


_layer_norm_jacobian = torch.ops.aten.native_layer_norm_backward.default
_group_norm_jacobian = torch.ops.aten.native_group_norm_backward.default
_batch_norm_jacobian = torch.ops.aten.native_batch_norm_backward.default
_X_ONLY = [True, False, False]


def _per_channel(t: Tensor, like: Tensor) -> Tensor:
    return t.reshape(1, -1, *(1,) * (like.dim() - 2))


def _statistics(out: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and reciprocal deviation ``[..., 1, 1]``, from the reverse graph of a layer norm; None without a graph."""
    node: Any = out.grad_fn
    found = [getattr(node, f"_saved_result{k}", None) for k in (1, 2)]
    return None if found[0] is None or found[1] is None else (found[0], found[1])


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


def _without_statistics(
    fn: Callable[..., Any], places: tuple[int, int], training: str, default: bool
) -> Callable[..., Any]:
    """``fn`` without running statistics where it would move them.

    Args:
        places: positions of the running statistics among the arguments of ``fn``.
        training: name of the sixth argument of ``fn``, which says whether the statistics move.
        default: default of the sixth argument.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        if args[5] if len(args) > 5 else kwargs.get(training, default):
            args = tuple(None if k in places else a for k, a in enumerate(args))  # ``fn`` would not read them
            kwargs = {k: None if k in ("running_mean", "running_var") else a for k, a in kwargs.items()}
        return fn(*args, **kwargs)

    return run


register(
    Op(
        (F.layer_norm, torch.layer_norm),
        tangent=layer_norm,
        reuse=_statistics,
        rule=NormRule("input normalized_shape weight bias eps cudnn_enable", _layer_normalised),
    )
)
register(
    Op(
        (F.rms_norm, torch.rms_norm),
        tangent=rms_norm,
        rule=NormRule("input normalized_shape weight eps", _rms_normalised),
    )
)
register(
    Op(
        (F.group_norm,),
        tangent=group_norm,
        rule=NormRule("input num_groups weight bias eps", _group_normalised, channels_second=True),
    )
)
register(
    Op(
        (F.batch_norm,),
        tangent=batch_norm,
        rule=BatchNormRule(
            "input running_mean running_var weight bias training momentum eps", _batch_normalised, channels_second=True
        ),
        without_statistics=_without_statistics(F.batch_norm, (1, 2), "training", False),
    )
)
register(
    Op(
        (F.instance_norm,),
        tangent=instance_norm,
        without_statistics=_without_statistics(F.instance_norm, (1, 2), "use_input_stats", True),
    )
)
register(Op((torch.batch_norm,), without_statistics=_without_statistics(torch.batch_norm, (3, 4), "training", False)))
register(
    Op(
        (torch.instance_norm,),
        without_statistics=_without_statistics(torch.instance_norm, (3, 4), "use_input_stats", False),
    )
)
