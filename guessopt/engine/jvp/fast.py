"""``FastEngine``: ``DualEngine`` with this package's closed-form tangent rules where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guessopt.engine.jvp.dual import DualEngine
from guessopt.engine.jvp.duals import carries_tangent, pack, unpack, unpack_list
from guessopt.engine.jvp.gaps import may_fuse
from guessopt.ops.base import op_of
from guessopt.ops.cached import CachedCall


class FastEngine(DualEngine):
    """Dual tensors; tangents by the rules of ``guessopt.ops``, or torch's where these do not apply."""

    name = "fast"
    reuses = stacks = rests = True

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, writes: bool) -> Any:
        self.fresh = None
        if not (self.frozen_statistics and fn is F.batch_norm):
            out = self._by_rule(fn, args, kwargs)
            if out is not NotImplemented:
                return out
        return super().call(fn, args, kwargs, writes=writes)

    def reuse(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], known: CachedCall) -> Any:
        self.fresh = None
        return self._by_rule(fn, args, kwargs, known=known)

    def _by_rule(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], **known: CachedCall
    ) -> Any:
        op = op_of(fn)
        rule, duals = op.tangent, op.duals
        if rule is None or len(args) < duals:
            return NotImplemented
        pairs: list[tuple[Any, Any]] = []
        for t in args[:duals]:
            if not isinstance(t, Tensor):
                pairs.append(unpack_list(t))
            elif t.is_complex():
                return NotImplemented  # the rules are written for real numbers
            else:
                pairs.append((t, None) if type(t) is torch.nn.Parameter else unpack(t))
        if carries_tangent(args[duals:], kwargs):
            return NotImplemented
        if all(pair[1] is None for pair in pairs):
            return fn(*args, **kwargs) if may_fuse(fn, args, kwargs) else NotImplemented
        if duals == 1:
            result = rule(*pairs[0], *args[1:], **kwargs, **known)
        else:
            primals, tangents = zip(*pairs, strict=True)
            result = rule(primals, tangents, *args[duals:], **kwargs, **known)
        if result is NotImplemented:
            return result
        out, tangent = result
        self.fresh = pack(out, tangent if tangent.dtype is out.dtype else tangent.to(out.dtype))
        return self.fresh
