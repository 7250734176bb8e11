"""Linear layers: ``s = x W^T + b``, as ``F.linear``, ``x @ W`` or ``addmm``.

Letters: n everything but the last dimension, o output, i input, r rows in place of W.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guessopt.layout import Shape
from guessopt.ops.base import CachedCall, MatrixRule, no_more, register_rule, register_tangent
from guessopt.sites import Matrix


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
        flat = g.reshape(-1, g.shape[-1])
        of: dict[int, Callable[[], Tensor]] = {
            0: lambda: g @ args[1],
            1: lambda: flat.T @ x.reshape(-1, x.shape[-1]),  # n o, n i -> o i
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


@register_tangent(F.linear, known=no_more)
def linear(
    x: Tensor, dx: Tensor, weight: Tensor, bias: Tensor | None = None, *, known: CachedCall | None = None
) -> tuple[Tensor, Tensor]:
    """``ds = dx W^T``."""
    return F.linear(x, weight, bias) if known is None else known.out, F.linear(dx, weight)


@register_tangent(
    torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm,
    torch.sparse.mm, torch.spmm, duals=2,
)  # fmt: skip
def matmul(xw: tuple[Tensor, Tensor], tangents: tuple[Any, Any], **other: Any) -> Any:
    """``d(x w) = dx w`` or ``x dw``; torch's own where both move."""
    (x, w), (dx, dw) = xw, tangents
    if other or (dx is not None and dw is not None):
        return NotImplemented
    return x @ w, x @ dw if dx is None else dx @ w


@register_tangent(torch.addmm, Tensor.addmm, torch.sparse.addmm, duals=3)
def addmm(
    bxw: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    beta: float = 1,
    alpha: float = 1,
    **other: Any,
) -> Any:
    """``d(beta b + alpha x w) = alpha dx w``, or ``alpha x dw``; torch's own where b moves, or both x and w."""
    (b, x, w), (db, dx, dw) = bxw, tangents
    if db is not None or (dx is None) is (dw is None) or other:
        return NotImplemented
    dout = x @ dw if dx is None else dx @ w  # type: ignore[operator]
    return torch.addmm(b, x, w, beta=beta, alpha=alpha), dout if alpha == 1 else dout * alpha
