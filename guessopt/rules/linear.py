"""Linear layers: ``s = x W^T + b``, as ``F.linear``, ``x @ W`` or ``addmm``.

Letters: n everything but the last dimension, o output, i input, r rows in place of W.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from guessopt.rules.base import MatrixRule, register_rule
from guessopt.sites import Matrix, Shape


class _Linear(MatrixRule):
    def cotangent_shape(self, matrix: Matrix, rows: Tensor, x_shape: Shape) -> Shape:
        return (*x_shape[:-1], rows.shape[1])

    def transpose(self, matrix: Matrix, rows: Tensor, e: Tensor, x_shape: Shape) -> Tensor:
        return e @ rows[0]

    def apply(self, matrix: Matrix, rows: Tensor, x: Tensor) -> Tensor:
        return x @ rows[0].T

    def rank(self, matrix: Matrix) -> int:
        return min(sum(shape[0] for shape in matrix.weight_shapes), matrix.weight_shape[1])

    def geometry(self, call: Any) -> str:
        return "linear"


@register_rule(F.linear)
class LinearRule(_Linear):
    """``F.linear(x, W, b)``: ``dW = g^T x`` (Singhal eq. 3), ``db = sum g``."""

    def weight(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[1] if len(args) > 1 else kwargs["weight"]

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0] if args else kwargs["input"]

    def matrix(self, matrix: Matrix, weight: Tensor) -> Tensor:
        return weight[None]

    def gradients(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: int,
        wanted: list[int],
        g: Tensor,
    ) -> list[Tensor | None]:
        if kwargs or args[1].dim() != 2:
            return super().gradients(fn, args, kwargs, output, wanted, g)
        x = args[0]
        flat = rearrange(g, "... o -> (...) o")
        of: dict[int, Callable[[], Tensor]] = {
            0: lambda: g @ args[1],
            1: lambda: einsum(flat, rearrange(x, "... i -> (...) i"), "n o, n i -> o i"),
            2: lambda: flat.sum(0),
        }
        return [of[k]() for k in wanted]


@register_rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
class MatmulRule(_Linear):
    """``x @ W`` with a two-dimensional parameter on the right; any other product is served by the generic rule."""

    def weight(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None if kwargs else args[1]

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0] if args else None

    def matrix(self, matrix: Matrix, weight: Tensor) -> Tensor:
        return weight.T[None]

    def rank(self, matrix: Matrix) -> int:
        return min(sum(shape[1] for shape in matrix.weight_shapes), matrix.weight_shape[0])


@register_rule(torch.addmm)
class AddmmRule(_Linear):
    """``addmm(b, x, W)``: ``x @ W + b``."""

    def weight(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[2] if len(args) == 3 and not kwargs else None

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[1] if len(args) == 3 else None

    def matrix(self, matrix: Matrix, weight: Tensor) -> Tensor:
        return weight.T[None]

    def rank(self, matrix: Matrix) -> int:
        return min(sum(shape[1] for shape in matrix.weight_shapes), matrix.weight_shape[0])
