"""``FuncEngine``: ``torch.func.jvp``, the reference whose numbers every other engine must give."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._pytree import tree_map_only

from guessopt.engine.jvp.base import JvpEngine
from guessopt.engine.jvp.duals import unpack
from guessopt.engine.jvp.gaps import check_tangent
from guessopt.ops.base import moves_statistics, op_of, without_side_effects
from guessopt.tracing.writes import plain

T = TypeVar("T")


class FuncEngine(JvpEngine):
    """A guess enters as ``s + t y``, where ``t`` is a scalar with primal 0 and tangent 1."""

    name = "func"
    same_objects = False
    wraps = True

    def run(self, body: Callable[[], T]) -> T:
        results: list[T] = []
        self._cuts: dict[int, Tensor] = {}
        self._noted: dict[int, Tensor] = {}
        self._anchor = torch.zeros((), requires_grad=True)

        def f(t: Tensor) -> tuple[Tensor, ...]:
            self._t = t
            results.append(body())
            return (*self._cuts.values(), *self._noted.values(), t * 0)

        zero = torch.zeros(())
        tangents = torch.func.jvp(f, (zero,), (torch.ones_like(zero),))[1]
        self.tangents = dict(zip(self._cuts, tangents, strict=False))
        self.notes = dict(zip(self._noted, tangents[len(self._cuts) :], strict=False))
        return results[0]

    def note(self, value: int, t: Tensor, clone: bool) -> Tensor:
        self._noted[value] = t.clone() if clone else t
        return t

    def primal(self, t: Tensor) -> Tensor:
        return self.plain(t.detach())

    def outside(self) -> AbstractContextManager[Any]:
        outside: AbstractContextManager[Any] = temporarily_clear_interpreter_stack()
        return outside

    def plain(self, t: Tensor) -> Tensor:
        return plain(t)

    def pair(self, t: Tensor) -> tuple[Tensor, Tensor | None]:
        primal, tangent = unpack(t)
        return self.plain(primal), None if tangent is None else self.plain(tangent)

    def inject(self, s: Tensor, y: Tensor, in_place: bool) -> Tensor:
        ty = self._scalar(y) * y
        if not in_place:
            return s + ty
        if not torch._C._functorch.is_functorch_wrapped_tensor(s):
            raise RuntimeError(
                "engine='func' cannot add a guess to an operation that writes its input in place before any other "
                "site; use engine='dual', or write the operation out of place"
            )
        return s.add_(ty)

    def _scalar(self, like: Tensor) -> Tensor:
        return self._t.to(like.dtype) if like.is_floating_point() else self._t

    def substitute(self, p: Tensor, v: Tensor) -> Tensor:
        return p.detach() + self._scalar(v) * v

    def cut(self, number: int, v: Tensor) -> tuple[Tensor, Tensor]:
        self._cuts[number] = v
        with torch.enable_grad():
            # A transform refuses requires_grad_(). Adding a zero from outside that requires grad does the same.
            leaf = self.primal(v) + self._anchor.to(v.dtype)
            return leaf, self.plain(leaf)

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, writes: bool) -> Any:
        check_tangent(fn, args, kwargs)
        if not writes and op_of(fn).masks_by_shape:
            return self._in_order_of_memory(fn, *args, **kwargs)
        if not writes or (self.frozen_statistics and fn is F.batch_norm):
            return super().call(fn, args, kwargs, writes=writes)
        if moves_statistics(fn):
            self.write(fn, args, kwargs)
            return without_side_effects(fn)(*args, **kwargs)
        return self.write(fn, args, kwargs)

    def without_tangent(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._in_order_of_memory(fn, *args, **kwargs) if op_of(fn).masks_by_shape else fn(*args, **kwargs)

    def _in_order_of_memory(self, fn: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Dropout of ``input`` with its dimensions ordered by stride, which gives the mask of a plain run."""
        with self.outside():
            strides = torch.empty_like(self.plain(input)).stride()
        order = sorted(range(input.dim()), key=lambda d: -strides[d])
        if order == list(range(input.dim())):
            return fn(input, *args, **kwargs)
        back = sorted(range(input.dim()), key=lambda d: order[d])
        return fn(input.permute(order), *args, **kwargs).permute(back)

    def write(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A transform refuses writes into tensors that it captured: write outside of it, from values without tangents.
        args, kwargs = tree_map_only(Tensor, self.plain, (args, kwargs))
        with self.outside():
            return fn(*args, **kwargs)
