"""Scales and biases written out: ``x * w`` and ``x + b``, the parameter broadcast against the activation.

Letters: n example, everything else as broadcasting has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from guessopt.ops.base import FeedbackMap, Rule, register_rule
from guessopt.ops.elementwise import ADDITION

_PRODUCT: set[Callable[..., Any]] = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply}


class _Affine(Rule):
    has_parameter_tangent = True

    def _slope(self, args: tuple[Any, ...], which: int) -> Tensor | None:
        """What the output's derivative with respect to argument ``which`` is (None: one)."""
        raise NotImplementedError

    def _is_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return not kwargs and len(args) == 2 and all(isinstance(a, Tensor) for a in args)

    def gradients(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: int,
        wanted: list[int],
        g: Tensor,
    ) -> list[Tensor | None]:
        if not self._is_plain(args, kwargs):
            return super().gradients(fn, args, kwargs, output, wanted, g)
        found: list[Tensor | None] = []
        for k in wanted:
            slope = self._slope(args, k)
            found.append((g if slope is None else g * slope).sum_to_size(args[k].shape))
        return found

    def parameter_tangent(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        wanted: list[int],
        vs: list[Tensor],
        place: FeedbackMap,
    ) -> Tensor:
        slope = self._slope(args, wanted[0])
        return place(vs[0]) if slope is None else place(vs[0]) * slope


@register_rule(*_PRODUCT)
class ScaleRule(_Affine):
    """``s = x w``: ``dw = sum g x``."""

    def _slope(self, args: tuple[Any, ...], which: int) -> Tensor | None:
        other: Tensor = args[1 - which]
        return other


@register_rule(*ADDITION)
class BiasRule(_Affine):
    """``s = x + b``: ``db = sum g``."""

    def _slope(self, args: tuple[Any, ...], which: int) -> Tensor | None:
        return None
