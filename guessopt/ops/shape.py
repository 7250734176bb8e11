"""Entries joined, taken apart, averaged or scattered: operations that are linear, or pick entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from guessopt.ops.base import Entries, Op, always, register
from guessopt.ops.cached import CachedCall, result_only


def mean(x: Tensor, dx: Tensor, *dim: Any, known: CachedCall | None = None, **other: Any) -> Any:
    """The mean of the tangent."""
    if "out" in other:
        return NotImplemented
    return torch.mean(x, *dim, **other) if known is None else known.out, torch.mean(dx, *dim, **other)


def concatenate(xs: Any, dxs: Any, *dim: Any, known: CachedCall | None = None, **other: Any) -> Any:
    """The tangents side by side."""
    if "out" in other:
        return NotImplemented
    dxs = [torch.zeros_like(x) if dx is None else dx for x, dx in zip(xs, dxs, strict=True)]
    return torch.cat(xs, *dim, **other) if known is None else known.out, torch.cat(dxs, *dim, **other)


class _Unbind(torch.autograd.Function):
    """``torch.unbind`` whose pull-back copies nothing where the gradients already lie side by side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> tuple[Tensor, ...]:
        ctx.dim = dim % x.dim()
        return x.unbind(dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        first, dim = gradients[0], ctx.dim
        step = int(gradients[1].storage_offset() - first.storage_offset()) if len(gradients) > 1 else 0
        beside = step > 0 and all(
            g.stride() == first.stride()
            and g.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and g.storage_offset() == first.storage_offset() + k * step
            for k, g in enumerate(gradients)
        )
        if not beside or torch.is_grad_enabled():
            return torch.stack(gradients, dim), None
        shape, stride = list(first.shape), list(first.stride())
        shape.insert(dim, len(gradients))
        stride.insert(dim, step)
        return first.as_strided(shape, stride), None


def unbind(x: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    """``torch.unbind``, for a pull-back through a projection that makes queries, keys and values in one."""
    out: tuple[Tensor, ...] = _Unbind.apply(x, dim)  # type: ignore[no-untyped-call]
    return out


def _multiplies(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a ``scatter_reduce`` multiplies: torch's tangent is then 0 where a factor is 0."""
    return any(type(a) is str and a == "prod" for a in (*args, *kwargs.values()))


register(Op((torch.mean, Tensor.mean), tangent=mean, reuse=result_only))
register(Op((torch.cat, torch.concat, torch.concatenate), tangent=concatenate, reuse=result_only))
register(Op((torch.unbind, Tensor.unbind), in_reverse=unbind))
register(Op((Tensor.contiguous, Tensor.clone, torch.clone), entries=Entries.IDENTITY))
register(Op((torch.fmax, Tensor.fmax), backward_only=always))
register(Op((torch.scatter_reduce, Tensor.scatter_reduce, Tensor.scatter_reduce_), backward_only=_multiplies))
