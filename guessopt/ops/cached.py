"""Results of calls that have run before the closure makes them.

A guess may pull a cotangent back through calls that the closure has yet to make. It runs them for that. When the
closure makes such a call with the same numbers, the result is there already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NUMBERS = (bool, int, float, complex, str)


@dataclass
class CachedCall:
    """The result of a call that the closure has yet to make.

    Attributes:
        args, kwargs: the call's arguments.
        versions: how often each tensor among them had been written to; -1 where writes are not counted.
        out: the result; None where only ``more`` is known.
        more: found by ``Op.reuse`` in the result, for the tangent rule.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]
    out: Any
    more: Any = None

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor | None, more: Any = None) -> CachedCall:
        """The record of a call that has just run."""
        versions: list[int] = []

        def plain(node: Any) -> Any:
            if isinstance(node, Tensor):
                plain_memory = type(node) in (Tensor, torch.nn.Parameter) and node.layout is torch.strided
                versions.append(node._version if plain_memory and not node.is_inference() else -1)
                return node.detach()
            return [plain(item) for item in node] if isinstance(node, (tuple, list)) else node

        args, kwargs = tuple(plain(a) for a in args), {k: plain(a) for k, a in kwargs.items()}
        return CachedCall(args, kwargs, versions, None if out is None else out.detach(), more)

    def matches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call with these arguments reads the same memory, and nothing has been written there since."""
        versions = iter(self.versions)

        def same(known: Any, given: Any) -> bool:
            if isinstance(known, Tensor):
                version = next(versions)
                if not isinstance(given, Tensor) or version < 0 or given.is_inference():
                    return False
                if not known.numel():
                    return known.shape == given.shape and known.dtype is given.dtype
                return given._version == version and known.is_set_to(given)
            if isinstance(known, list):
                listed = isinstance(given, (tuple, list)) and len(given) == len(known)
                return listed and all(map(same, known, given))
            return known is given or (type(known) is type(given) and type(known) in _NUMBERS and known == given)

        return (
            len(args) == len(self.args)
            and kwargs.keys() == self.kwargs.keys()
            and all(map(same, self.args, args))
            and all(same(known, kwargs[name]) for name, known in self.kwargs.items())
        )


def result_only(out: Tensor) -> None:
    """``Op.reuse`` of an operation whose tangent needs nothing but the result."""
