"""Convolutions in 1, 2 and 3 dimensions.

The filter bank is the matrix: one row per output channel, one column per entry of a patch, one block per group.
Letters: n example, c input channel, b group, o output channel of the group, i patch entry (input channel of the group x
kernel), r filters in place of W.
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
from guessopt.ops.base import Formulas, Op, TangentRule, register
from guessopt.ops.matrix import MatrixRule
from guessopt.ops.reverse import pull_back_by_vjp
from guessopt.sites import Matrix

_ByDims = dict[int, Callable[..., Tensor]]
_INPUT: _ByDims = {1: nn_grad.conv1d_input, 2: nn_grad.conv2d_input, 3: nn_grad.conv3d_input}
_WEIGHT: _ByDims = {
    1: nn_grad.conv1d_weight,
    2: nn_grad.conv2d_weight,
    3: nn_grad.conv3d_weight,
}
_GEOMETRY = ("stride", "padding", "dilation", "groups")
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    value = tuple(value)
    result: tuple[int, ...] = value * dims if len(value) == 1 else value
    return result


class ConvRule(MatrixRule):
    """``s = W * x + b``: ``x`` ``[n, c, ...]``, ``W`` ``[b o, c / b, kernel]``, ``b`` ``[b o]``.

    Gradients and pull-back are torch's own transposes of the convolution."""

    names = ("input", "weight", "bias", *_GEOMETRY)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        call = super().bind(args, kwargs)
        return call | {name: value for name, value in _DEFAULTS.items() if name not in call}

    def weight(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.bind(args, kwargs)["weight"]

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.bind(args, kwargs)["input"]

    def matrix(self, matrix: Matrix, weight: Tensor) -> Tensor:
        return rearrange(weight, "(b o) ... -> b o (...)", b=self._groups(matrix))

    def rank(self, matrix: Matrix) -> int:
        outputs = sum(shape[0] for shape in matrix.weight_shapes) // self._groups(matrix)
        return min(outputs, math.prod(matrix.weight_shape[1:]))

    def cotangent_shape(self, matrix: Matrix, rows: Tensor, x_shape: Shape) -> Shape:
        stride, padding, dilation, _ = self._geometry(matrix.call)
        kernel = matrix.weight_shape[2:]
        dims = len(kernel)
        channels = rows.shape[0] * rows.shape[1]
        batch, spatial = x_shape[: -dims - 1], x_shape[-dims:]
        if padding == "same":
            return (*batch, channels, *spatial)
        stride, dilation = _tuple(stride, dims), _tuple(dilation, dims)
        padding = (0,) * dims if padding == "valid" else _tuple(padding, dims)
        out = (
            math.floor((spatial[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) / stride[d]) + 1
            for d in range(dims)
        )
        return (*batch, channels, *out)

    def apply(self, matrix: Matrix, rows: Tensor, x: Tensor) -> Tensor:
        out: Tensor = matrix.call.fn(x, self._filters(matrix, rows), None, *self._geometry(matrix.call))
        return out

    def transpose(self, matrix: Matrix, rows: Tensor, e: Tensor, x_shape: Shape) -> Tensor:
        geometry, dims = self._geometry(matrix.call), len(matrix.weight_shape) - 2
        if isinstance(geometry[1], str) or len(x_shape) != dims + 2:
            return pull_back_by_vjp(lambda x: self.apply(matrix, rows, x), e.new_zeros(x_shape), e)
        filters = self._filters(matrix, rows).to(e.dtype)  # under autocast a weight keeps its own
        pulled: Tensor = _INPUT[dims](x_shape, filters, e, *geometry)
        return pulled

    def geometry(self, call: Any) -> str:
        return " ".join(map(str, (call.op, *self._geometry(call))))

    def formulas(self, call: dict[str, Any], g: Tensor) -> Formulas:
        x, w, geometry = call["input"], call["weight"], [call[name] for name in _GEOMETRY]
        if isinstance(call["padding"], str) or not isinstance(w, Tensor) or x.dim() != w.dim():
            return {}
        dims = w.dim() - 2
        x, w = x.to(g.dtype), w.to(g.dtype)  # under autocast they keep their own
        return {
            "input": lambda: _INPUT[dims](x.shape, w, g, *geometry),
            "weight": lambda: _WEIGHT[dims](x, w.shape, g, *geometry),
            "bias": lambda: g.sum([0, *range(2, g.dim())]),  # n o ... -> o
        }

    def _geometry(self, call: Any) -> tuple[Any, Any, Any, Any]:
        bound = self.bind(call.args, call.kwargs)
        return bound["stride"], bound["padding"], bound["dilation"], bound["groups"]

    def _groups(self, matrix: Matrix) -> int:
        return int(self._geometry(matrix.call)[3])

    def _filters(self, matrix: Matrix, rows: Tensor) -> Tensor:
        return rearrange(rows, "b r i -> (b r) i").reshape(-1, *matrix.weight_shape[1:])


def _tangent_of(fn: Callable[..., Tensor]) -> TangentRule:
    def convolution(
        x: Tensor, dx: Tensor, weight: Tensor, bias: Tensor | None = None, *geometry: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        """``ds = W * dx``."""
        return fn(x, weight, bias, *geometry, **named), fn(dx, weight, None, *geometry, **named)

    return convolution


_FORWARD: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Any, ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

for _fn in _FORWARD:
    register(Op((_fn,), tangent=_tangent_of(_fn), rule=ConvRule()))
for _fn in _TRANSPOSED:
    register(Op((_fn,), tangent=_tangent_of(_fn)))
