"""``OpCall``: one torch call of a running closure, beside the call of the graph that it follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from guessopt.graph import Kind
from guessopt.sites import Call
from guessopt.tree import map_tensors


@dataclass(slots=True)
class OpCall:
    """A torch call.

    Attributes:
        index: its number in the closure, from 0.
        call, kind: the graph's call of this number, and the part that it plays.
        fn, args, kwargs: the function and the arguments of this run.
        tensors: the tensors among the arguments, in order.
    """

    index: int
    call: Call
    kind: Kind
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[Tensor]

    def arguments(self, f: Callable[[Tensor], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``args`` and ``kwargs`` with ``f(t)`` in place of each tensor ``t``."""
        return map_tensors(self.args, f), map_tensors(self.kwargs, f) if self.kwargs else self.kwargs

    def replaced(self, f: Callable[[Tensor], Tensor]) -> OpCall:
        """This call on ``f(t)`` in place of each tensor ``t``."""
        args, kwargs = self.arguments(f)
        return OpCall(self.index, self.call, self.kind, self.fn, args, kwargs, [f(t) for t in self.tensors])
