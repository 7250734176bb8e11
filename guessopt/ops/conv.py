"""Convolutions in 1, 2 and 3 dimensions.

The filter bank is the matrix: one row per output channel, one column per entry of a patch; one block per group.
Letters: b group, o output channel of the group, i patch entry (input channel x kernel), r filters in place of W.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn import grad as nn_grad

from guessopt.layout import Shape
from guessopt.ops.base import MatrixRule, TangentRule, pull_back_by_vjp, register_rule, register_tangent
from guessopt.sites import Matrix

_DIMS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_INPUT = {1: nn_grad.conv1d_input, 2: nn_grad.conv2d_input, 3: nn_grad.conv3d_input}
_WEIGHT = {1: nn_grad.conv1d_weight, 2: nn_grad.conv2d_weight, 3: nn_grad.conv3d_weight}
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def _bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return _DEFAULTS | dict(zip(_NAMES, args, strict=False)) | kwargs


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    value = tuple(value)
    return value * dims if len(value) == 1 else value


@register_rule(F.conv1d, F.conv2d, F.conv3d)
class ConvRule(MatrixRule):
    """``s = W * x + b``; gradients and pull-back are the operation's own transposes."""

    def weight(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _bind(args, kwargs)["weight"]

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _bind(args, kwargs)["input"]

    def matrix(self, matrix: Matrix, weight: Tensor) -> Tensor:
        return rearrange(weight, "(b o) ... -> b o (...)", b=self._groups(matrix))

    def rank(self, matrix: Matrix) -> int:
        return min(
            sum(shape[0] for shape in matrix.weight_shapes) // self._groups(matrix), math.prod(matrix.weight_shape[1:])
        )

    def cotangent_shape(self, matrix: Matrix, rows: Tensor, x_shape: Shape) -> Shape:
        call = _bind(matrix.call.args, matrix.call.kwargs)
        kernel = matrix.weight_shape[2:]
        dims = len(kernel)
        channels = rows.shape[0] * rows.shape[1]
        batch, spatial = x_shape[: -dims - 1], x_shape[-dims:]
        stride, dilation = _tuple(call["stride"], dims), _tuple(call["dilation"], dims)
        if call["padding"] == "same":
            return (*batch, channels, *spatial)
        padding = (0,) * dims if call["padding"] == "valid" else _tuple(call["padding"], dims)
        out = (
            math.floor((spatial[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) / stride[d]) + 1
            for d in range(dims)
        )
        return (*batch, channels, *out)

    def _filters(self, matrix: Matrix, rows: Tensor) -> Tensor:
        return rearrange(rows, "b r i -> (b r) i").reshape(-1, *matrix.weight_shape[1:])

    def _groups(self, matrix: Matrix) -> int:
        return int(_bind(matrix.call.args, matrix.call.kwargs)["groups"])

    def apply(self, matrix: Matrix, rows: Tensor, x: Tensor) -> Tensor:
        call = _bind(matrix.call.args, matrix.call.kwargs)
        out: Tensor = matrix.call.fn(
            x, self._filters(matrix, rows), None, call["stride"], call["padding"], call["dilation"], call["groups"]
        )
        return out

    def transpose(self, matrix: Matrix, rows: Tensor, e: Tensor, x_shape: Shape) -> Tensor:
        call = _bind(matrix.call.args, matrix.call.kwargs)
        dims = _DIMS[matrix.call.fn]
        if isinstance(call["padding"], str) or len(x_shape) != dims + 2:
            return pull_back_by_vjp(lambda x: self.apply(matrix, rows, x), e.new_zeros(x_shape), e)
        filters = self._filters(matrix, rows).to(e.dtype)  # under autocast a weight keeps its own
        pulled: Tensor = _INPUT[dims](
            x_shape, filters, e, call["stride"], call["padding"], call["dilation"], call["groups"]
        )
        return pulled

    def geometry(self, call: Any) -> str:
        c = _bind(call.args, call.kwargs)
        return f"{call.op} {c['stride']} {c['padding']} {c['dilation']} {c['groups']}"

    def gradients(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: int,
        wanted: list[int],
        g: Tensor,
    ) -> list[Tensor | None]:
        call, dims = _bind(args, kwargs), _DIMS[fn]
        x, w = call["input"], call["weight"]
        if kwargs or isinstance(call["padding"], str) or x.dim() != dims + 2 or not isinstance(w, Tensor):
            return super().gradients(fn, args, kwargs, output, wanted, g)
        geometry = (call["stride"], call["padding"], call["dilation"], call["groups"])
        x, w = x.to(g.dtype), w.to(g.dtype)  # under autocast they keep their own
        of: dict[int, Callable[[], Tensor]] = {
            0: lambda: _INPUT[dims](x.shape, w, g, *geometry),
            1: lambda: _WEIGHT[dims](x, w.shape, g, *geometry),
            2: lambda: g.sum([0, *range(2, g.dim())]),
        }
        return [of[k]() for k in wanted]


def _tangent_of(fn: Callable[..., Tensor]) -> TangentRule:
    def convolution(
        x: Tensor, dx: Tensor, weight: Tensor, bias: Tensor | None = None, *geometry: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        """``ds = W * dx``."""
        return fn(x, weight, bias, *geometry, **named), fn(dx, weight, None, *geometry, **named)

    return convolution


for _fn in (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d):
    register_tangent(_fn)(_tangent_of(_fn))
