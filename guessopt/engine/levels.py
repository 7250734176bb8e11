"""Where tangents live: the primitives of forward-mode AD behind one small interface.

``FuncLevel`` is the reference, ``torch.func.jvp`` with ``s + t y`` (t a scalar with primal 0 and tangent 1).
``DualLevel`` attaches tangents to tensors directly (``torch.autograd.forward_ad``): the same numbers, less arithmetic.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, TypeVar

import torch
import torch.autograd.forward_ad as fw
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._pytree import tree_map_only

T = TypeVar("T")


class Level(ABC):
    """One forward-mode pass. ``tangents`` holds those of the cuts, by number, once ``run`` has returned."""

    name: ClassVar[str]

    def __init__(self) -> None:
        self.tangents: dict[int, Tensor | None] = {}

    @abstractmethod
    def run(self, body: Callable[[], T]) -> T:
        """``body()`` with tangents alive."""

    @abstractmethod
    def primal(self, t: Tensor) -> Tensor:
        """``t`` without its tangent, an ordinary tensor."""

    @abstractmethod
    def plain(self, t: Tensor) -> Tensor:
        """``t`` without tangent, still connected in reverse mode."""

    @abstractmethod
    def inject(self, s: Tensor, y: Tensor, in_place: bool) -> Tensor:
        """``s`` with ``y`` added to its tangent."""

    @abstractmethod
    def substitute(self, p: Tensor, v: Tensor) -> Tensor:
        """Parameter ``p`` with tangent ``v``."""

    @abstractmethod
    def cut(self, number: int, v: Tensor, *, shared: bool, clone: bool) -> tuple[Tensor, Tensor]:
        """End the network at ``v``: note its tangent; return what the closure goes on with, and the leaf whose gradient
        is the exact error. ``shared``: the network goes on as well. ``clone``: the loss writes into it."""

    def outside(self) -> AbstractContextManager[Any]:
        """Where ordinary tensors are worked on as if no pass were under way."""
        return nullcontext()

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, writes: bool) -> Any:
        """Run one operation; ``writes``: into tensors that the closure did not make (buffers)."""
        return fn(*args, **kwargs)


class DualLevel(Level):
    """Tangents attached to tensors by ``make_dual``."""

    name = "dual"

    def run(self, body: Callable[[], T]) -> T:
        with fw.dual_level():
            return body()

    def primal(self, t: Tensor) -> Tensor:
        return fw.unpack_dual(t).primal

    def plain(self, t: Tensor) -> Tensor:
        with torch.enable_grad():
            return fw.unpack_dual(t).primal

    def inject(self, s: Tensor, y: Tensor, in_place: bool) -> Tensor:
        primal, tangent = fw.unpack_dual(s)
        if in_place:
            s.add_(fw.make_dual(torch.zeros_like(primal), y))
            return s
        return fw.make_dual(primal, y if tangent is None else tangent.to(y.dtype) + y)

    def substitute(self, p: Tensor, v: Tensor) -> Tensor:
        return fw.make_dual(p.detach(), v)

    def cut(self, number: int, v: Tensor, *, shared: bool, clone: bool) -> tuple[Tensor, Tensor]:
        primal, tangent = fw.unpack_dual(v)
        self.tangents[number] = tangent
        leaf = primal.detach().requires_grad_()
        with torch.enable_grad():
            if shared and tangent is not None:
                return fw.make_dual(leaf, tangent), leaf
            return (leaf.clone() if clone else leaf), leaf


class FuncLevel(Level):
    """``torch.func.jvp``: the documented entry, and what every other level must equal."""

    name = "func"

    def run(self, body: Callable[[], T]) -> T:
        results: list[T] = []
        self._cuts: dict[int, Tensor] = {}
        self._anchor = torch.zeros((), requires_grad=True)

        def f(t: Tensor) -> tuple[Tensor, ...]:
            self._t = t
            results.append(body())
            return tuple(self._cuts.values()) or (t * 0,)

        zero = torch.zeros(())
        tangents = torch.func.jvp(f, (zero,), (torch.ones_like(zero),))[1]
        if self._cuts:
            self.tangents = dict(zip(self._cuts, tangents, strict=True))
        return results[0]

    def primal(self, t: Tensor) -> Tensor:
        return self.plain(t.detach())

    def outside(self) -> AbstractContextManager[Any]:
        outside: AbstractContextManager[Any] = temporarily_clear_interpreter_stack()
        return outside

    def plain(self, t: Tensor) -> Tensor:
        while torch._C._functorch.is_functorch_wrapped_tensor(t):
            t = torch._C._functorch.get_unwrapped(t)
        return t

    def inject(self, s: Tensor, y: Tensor, in_place: bool) -> Tensor:
        ty = self._scalar(y) * y
        if not in_place:
            return s + ty
        if not torch._C._functorch.is_functorch_wrapped_tensor(s):
            raise RuntimeError(
                "engine='func' cannot add a guess to an operation that writes its input in place before any "
                "other site; "
                "use engine='dual', or write the operation out of place"
            )
        return s.add_(ty)

    def _scalar(self, like: Tensor) -> Tensor:
        return self._t.to(like.dtype) if like.is_floating_point() else self._t

    def substitute(self, p: Tensor, v: Tensor) -> Tensor:
        return p.detach() + self._scalar(v) * v

    def cut(self, number: int, v: Tensor, *, shared: bool, clone: bool) -> tuple[Tensor, Tensor]:
        self._cuts[number] = v
        with torch.enable_grad():
            # requires_grad_() is refused inside a transform; adding an outside zero that requires grad serves as well.
            leaf = self.primal(v) + self._anchor.to(v.dtype)
            if shared:
                return leaf + (v - v.detach()), self.plain(leaf)
            return (leaf.clone() if clone else leaf), self.plain(leaf)

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, writes: bool) -> Any:
        if not writes:
            return fn(*args, **kwargs)
        if fn is F.batch_norm:
            self._write(fn, args, kwargs)
            names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
            bound = dict(zip(names, args, strict=False)) | kwargs
            return F.batch_norm(**(bound | {"running_mean": None, "running_var": None}))
        return self._write(fn, args, kwargs)

    def _write(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A transform refuses to write what it captured: write outside of it, from values without tangents.
        args, kwargs = tree_map_only(Tensor, self.primal, (args, kwargs))
        with self.outside():
            return fn(*args, **kwargs)


_LEVELS: dict[str, type[Level]] = {"dual": DualLevel, "func": FuncLevel}


def make_level(name: str) -> Level:
    """A fresh level by name.

    Raises:
        ValueError: unknown name.
    """
    if name not in _LEVELS:
        raise ValueError(f"engine: {name!r} is not one of {', '.join(_LEVELS)}")
    return _LEVELS[name]()
