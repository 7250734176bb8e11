"""Arithmetic: ``x + b``, ``x w`` and the like, an operand broadcast against the other.

Letters: n example, everything else as broadcasting has it.

Torch has tangents of its own for all of these; in arithmetic they fill a tensor with zeros for an operand without
tangent. The rules below do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from guessopt.ops.base import Entries, Formulas, NamedRule, Op, Placement, register
from guessopt.ops.cached import CachedCall, result_only

#: Two operands, or their tangents (None: no tangent).
Pair = tuple[Any, Any]


class _OperandRule(NamedRule):
    """One operand ``p`` is a parameter; its shape broadcasts to that of the output ``s``.

    The output moves by ``slope`` times the parameter's move. The gradient is thus ``g slope``, summed over the
    dimensions along which ``p`` is broadcast."""

    names = ("a", "b")

    def slope(self, other: Any) -> Tensor | None:
        """``ds / dp``, from the other operand; None: one."""
        raise NotImplementedError

    def formulas(self, call: dict[str, Any], g: Tensor) -> Formulas:
        if call.keys() != {"a", "b"} or not all(isinstance(operand, Tensor) for operand in call.values()):
            return {}
        return {"a": self._gradient(call["a"], call["b"], g), "b": self._gradient(call["b"], call["a"], g)}

    def _gradient(self, p: Tensor, other: Tensor, g: Tensor) -> Callable[[], Tensor]:
        slope = self.slope(other)
        return lambda: (g if slope is None else g * slope).sum_to_size(p.shape)

    def parameter_tangent(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        wanted: list[int],
        vs: list[Tensor],
        place: Placement,
    ) -> Tensor:
        slope = self.slope(args[1 - wanted[0]])
        return place(vs[0]) if slope is None else place(vs[0]) * slope


class ScaleRule(_OperandRule):
    """``s = x w``: ``dw = sum g x``."""

    def slope(self, other: Any) -> Any:
        return other


class BiasRule(_OperandRule):
    """``s = x + b``: ``db = sum g``."""

    def slope(self, other: Any) -> None:
        return None


def add(ab: Pair, tangents: Pair, *, known: CachedCall | None = None, **other: Any) -> Any:
    """``d(a + b) = da`` where b is constant."""
    (a, b), (da, db) = ab, tangents
    if other or (known is None and da is not None and db is not None):
        return NotImplemented
    out = a + b if known is None else known.out
    if da is None or db is None:
        return out, _alone(da if db is None else db, out)
    return out, da + db


def add_stacked(ab: Pair, tangents: Pair, **other: Any) -> Any:
    """``d(a + b) = da + db`` for operands of one shape."""
    (a, b), (da, db) = ab, tangents
    if other or da is None or db is None or a.shape != b.shape:
        return NotImplemented
    return a + b, da + db


def subtract(ab: Pair, tangents: Pair, **other: Any) -> Any:
    """``d(a - b) = da`` where b is constant, ``-db`` where a is."""
    (a, b), (da, db) = ab, tangents
    if other or (da is not None and db is not None):
        return NotImplemented
    out = a - b
    if db is None:
        return out, _alone(da, out)
    return out, -db if db.shape == out.shape else _alone(-db, out)


def multiply(ab: Pair, tangents: Pair, *, known: CachedCall | None = None, **other: Any) -> Any:
    """``d(a b) = da b + a db``."""
    (a, b), (da, db) = ab, tangents
    if other:
        return NotImplemented
    out = a * b if known is None else known.out
    if da is None or db is None:
        return out, da * b if db is None else a * db
    return out, (da * b).addcmul_(a, db)


def divide(ab: Pair, tangents: Pair, **other: Any) -> Any:
    """``d(a / b) = da / b`` where b is constant."""
    (a, b), (da, db) = ab, tangents
    if other or db is not None:
        return NotImplemented
    return a / b, da / b


def negative(x: Tensor, dx: Tensor, *, known: CachedCall | None = None) -> tuple[Tensor, Tensor]:
    """``d(-x) = -dx``."""
    return -x if known is None else known.out, -dx


def power(x: Tensor, dx: Tensor, exponent: Any, *, known: CachedCall | None = None, **other: Any) -> Any:
    """``d(x^n) = n x^(n-1) dx`` for a number n."""
    if other or isinstance(exponent, (Tensor, complex)) or exponent == 0:
        return NotImplemented
    out = x**exponent if known is None else known.out
    if exponent == 2:
        return out, (x * dx).mul_(2)
    return out, dx * x.pow(exponent - 1).mul_(exponent)


def square(x: Tensor, dx: Tensor, **other: Any) -> Any:
    """``d(x^2) = 2 x dx``."""
    return power(x, dx, 2, **other)


def reciprocal_root(x: Tensor, dx: Tensor, *, known: CachedCall | None = None) -> tuple[Tensor, Tensor]:
    """``d(x^-1/2) = -1/2 x^-3/2 dx``."""
    out = torch.rsqrt(x) if known is None else known.out
    return out, dx * out.pow(3).mul_(-0.5)


def _alone(d: Tensor, out: Tensor) -> Tensor:
    """A tangent of ``out`` equal to ``d``, in memory of its own: something may yet be added to ``out`` in place."""
    return d.to(out.dtype, copy=True).expand(out.shape) if d.shape == out.shape else d.expand(out.shape).clone()


register(
    Op(
        (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__),
        tangent=add,
        duals=2,
        reuse=result_only,
        stacked_tangent=add_stacked,
        rule=BiasRule(),
        entries=Entries.WITH_NUMBER,
        is_addition=True,
    )
)
register(Op((torch.sub, Tensor.sub, Tensor.__sub__), tangent=subtract, duals=2, entries=Entries.WITH_NUMBER))
register(Op((Tensor.__rsub__,), entries=Entries.WITH_NUMBER))
register(
    Op(
        (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__),
        tangent=multiply,
        duals=2,
        reuse=result_only,
        rule=ScaleRule(),
        entries=Entries.WITH_NUMBER,
    )
)
register(
    Op(
        (
            *(torch.div, torch.divide, torch.true_divide),
            *(Tensor.div, Tensor.divide, Tensor.true_divide, Tensor.__truediv__),
        ),
        tangent=divide,
        duals=2,
        entries=Entries.WITH_NUMBER,
    )
)
register(Op((torch.neg, Tensor.neg, Tensor.__neg__), tangent=negative, reuse=result_only, entries=Entries.UNARY))
register(Op((torch.pow, Tensor.pow, Tensor.__pow__), tangent=power, reuse=result_only, entries=Entries.UNARY))
register(Op((torch.square, Tensor.square), tangent=square, entries=Entries.UNARY))
register(Op((torch.rsqrt, Tensor.rsqrt), tangent=reciprocal_root, reuse=result_only))
