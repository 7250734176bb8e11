"""Linear layers: ``s = x W^T + b``, written as ``F.linear``, ``x @ W`` or ``addmm``.

Letters: n everything but the last dimension, o output, i input, r rows in place of W.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guessopt.layout import Shape
from guessopt.ops.base import Formulas, Op, register
from guessopt.ops.cached import CachedCall, result_only
from guessopt.ops.matrix import MatrixRule
from guessopt.sites import Matrix


def weight_gradient(x: Tensor, g: Tensor) -> Tensor:
    """``dW[o, i] = sum_n g[n, o] x[n, i]`` (Singhal eq. 3).

    Args:
        x: the input, ``[..., i]``.
        g: the output's cotangent, ``[..., o]``.
    """
    return g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def bias_gradient(g: Tensor) -> Tensor:
    """``db[o] = sum_n g[n, o]``; ``g`` is ``[..., o]``."""
    return g.reshape(-1, g.shape[-1]).sum(0)


def input_gradient(w: Tensor, g: Tensor) -> Tensor:
    """``dx[n, i] = sum_o g[n, o] W[o, i]``; ``w`` is ``[o, i]``, ``g`` is ``[..., o]``."""
    return g @ w


class _Linear(MatrixRule):
    def cotangent_shape(self, matrix: Matrix, rows: Tensor, x_shape: Shape) -> Shape:
        return (*x_shape[:-1], rows.shape[1])

    def transpose(self, matrix: Matrix, rows: Tensor, e: Tensor, x_shape: Shape) -> Tensor:
        return input_gradient(rows[0], e)

    def apply(self, matrix: Matrix, rows: Tensor, x: Tensor) -> Tensor:
        return x @ rows[0].T

    def geometry(self, call: Any) -> str:
        return "linear"


class LinearRule(_Linear):
    """``F.linear(x, W, b)``: ``x`` ``[..., i]``, ``W`` ``[o, i]``, ``b`` ``[o]``."""

    names = ("input", "weight", "bias")

    def weight(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[1] if len(args) > 1 else kwargs["weight"]

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0] if args else kwargs["input"]

    def matrix(self, matrix: Matrix, weight: Tensor) -> Tensor:
        return weight[None]

    def rank(self, matrix: Matrix) -> int:
        return min(sum(shape[0] for shape in matrix.weight_shapes), matrix.weight_shape[1])

    def formulas(self, call: dict[str, Any], g: Tensor) -> Formulas:
        x, w = call["input"], call["weight"]
        if w.dim() != 2:
            return {}
        return {
            "input": lambda: input_gradient(w, g),
            "weight": lambda: weight_gradient(x, g),
            "bias": lambda: bias_gradient(g),
        }


class ProductRule(_Linear):
    """``x @ W``, and ``addmm(b, x, W)``: ``x`` ``[..., i]``, ``W`` ``[i, o]``. Any other product has no matrix.

    Args:
        at: position of ``x`` among the arguments; ``W`` follows it, and is the last.
    """

    def __init__(self, at: int) -> None:
        self.at = at

    def weight(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[-1] if len(args) == self.at + 2 and not kwargs else None

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[self.at] if len(args) == self.at + 2 else None

    def matrix(self, matrix: Matrix, weight: Tensor) -> Tensor:
        return weight.T[None]

    def rank(self, matrix: Matrix) -> int:
        return min(sum(shape[1] for shape in matrix.weight_shapes), matrix.weight_shape[0])


def linear(
    x: Tensor, dx: Tensor, weight: Tensor, bias: Tensor | None = None, *, known: CachedCall | None = None
) -> tuple[Tensor, Tensor]:
    """``ds = dx W^T``; ``dx`` ``[..., i]``, of one guess or of several."""
    return F.linear(x, weight, bias) if known is None else known.out, F.linear(dx, weight)


def matmul(xw: tuple[Tensor, Tensor], tangents: tuple[Any, Any], **other: Any) -> Any:
    """``d(x w) = dx w`` or ``x dw``; torch's own where both move."""
    (x, w), (dx, dw) = xw, tangents
    if other or (dx is not None and dw is not None):
        return NotImplemented
    return x @ w, x @ dw if dx is None else dx @ w


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


register(Op((F.linear,), tangent=linear, reuse=result_only, stacked_tangent=linear, rule=LinearRule()))
register(
    Op(
        (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm),
        tangent=matmul,
        duals=2,
        rule=ProductRule(0),
    )
)
register(Op((torch.bmm, Tensor.bmm, torch.sparse.mm), tangent=matmul, duals=2))
register(Op((torch.addmm, Tensor.addmm), tangent=addmm, duals=3, rule=ProductRule(1)))
register(Op((torch.sparse.addmm,), tangent=addmm, duals=3))
