"""Operations that return their argument unchanged: the closure may hold both the argument and the result.

The run hands the closure another tensor than the operation returned: one with a guess for its tangent, or a copy. If
the operation returned its argument, and the closure reads the argument again, it must read that other tensor too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from guessopt.tree import map_tensors


class Replacements(dict[int, tuple[Tensor, Tensor]]):
    """``id`` of an argument that was returned unchanged -> (the argument, the result that the closure was handed)."""

    def newest(self, t: Tensor) -> Tensor:
        """The tensor that the closure was handed in place of ``t``; ``t`` itself if it was not replaced."""
        return self[id(t)][1] if id(t) in self else t

    def replace(self, out: Any, results: list[Tensor], k: int, tensors: list[Tensor], after: Tensor) -> Any:
        """``out`` with ``after`` as its ``k``-th tensor; the same in ``results``.

        Args:
            out: an operation's result; results: the tensors in it.
            tensors: the operation's arguments.
        """
        before = results[k]
        if after is before:
            return out
        if any(before is t for t in tensors):
            self[id(before)] = before, after
        results[k] = after
        return put(out, before, after)


def put(out: Any, old: Tensor, new: Tensor) -> Any:
    """``out``, a call's result, with ``new`` in place of ``old``."""
    if out is old:
        return new
    return out if old is new else map_tensors(out, lambda t: new if t is old else t)
