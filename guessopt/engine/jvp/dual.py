"""``DualEngine``: tangents attached to tensors (``torch.autograd.forward_ad``), derivatives by torch's own rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as fw
from torch import Tensor

from guessopt.engine.jvp.base import JvpEngine
from guessopt.engine.jvp.duals import in_dtype_of_primal, pack, unpack
from guessopt.engine.jvp.gaps import check_tangent

T = TypeVar("T")


class DualEngine(JvpEngine):
    """Dual tensors and torch's rules: the numbers of ``FuncEngine`` with less arithmetic."""

    name = "dual"
    #: The last output of one of this package's rules. No other tensor shares memory with its tangent.
    fresh: Tensor | None = None

    def run(self, body: Callable[[], T]) -> T:
        with fw.dual_level():
            return body()

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, writes: bool) -> Any:
        check_tangent(fn, args, kwargs)
        out = super().call(fn, args, kwargs, writes=writes)
        autocast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(_device_type(args))
        return in_dtype_of_primal(out) if autocast else out

    def tangent(self, t: Tensor) -> Tensor | None:
        return unpack(t)[1]

    def primal(self, t: Tensor) -> Tensor:
        return unpack(t)[0].detach()  # the unpacked primal is a view, which would keep the tangent alive

    def plain(self, t: Tensor) -> Tensor:
        with torch.enable_grad():
            return unpack(t)[0]

    def inject(self, s: Tensor, y: Tensor, in_place: bool) -> Tensor:
        primal, tangent = unpack(s)
        if in_place:
            s.add_(pack(torch.zeros_like(primal), y))
            return s
        if tangent is not None and s is self.fresh:
            tangent.add_(y)
            return s
        return pack(primal.detach(), y if tangent is None else tangent.to(y.dtype) + y)

    def substitute(self, p: Tensor, v: Tensor) -> Tensor:
        return pack(p.detach(), v)

    def note(self, value: int, t: Tensor, clone: bool) -> Tensor:
        tangent = unpack(t)[1]
        if tangent is not None:
            self.notes[value] = tangent.clone() if clone else tangent
        return t


def _device_type(args: tuple[Any, ...]) -> str:
    return next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
