"""One operation's linear approximation, by torch's own derivative of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fw
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_unflatten

from guessopt.engine.audit.memo import NotAuditable
from guessopt.engine.jvp.dual import DualEngine
from guessopt.engine.jvp.gaps import is_foreign
from guessopt.layout import is_differentiable
from guessopt.sites import label
from guessopt.tracing.answers import CustomFunction
from guessopt.tree import map_tensors


def linearised(
    fn: Callable[..., Any],
    base: tuple[tuple[Any, ...], dict[str, Any]],
    given: tuple[tuple[Any, ...], dict[str, Any]],
) -> Any:
    """``fn`` at the base arguments plus its derivative along the way from there to the given ones; ``NotImplemented``
    for an operation of torch that has no forward derivative."""
    (bases, spec), (there, _) = tree_flatten(base), tree_flatten(given)
    engine = DualEngine()

    def body() -> Any:
        packed = [
            fw.make_dual(b, (t.detach() - b).to(b.dtype))
            if isinstance(b, Tensor) and is_differentiable(b) and not is_traceable_wrapper_subclass(b)
            else b
            for b, t in zip(bases, there, strict=True)
        ]
        dual_args, dual_kwargs = tree_unflatten(packed, spec)
        try:
            if is_foreign(fn):
                raise NotImplementedError
            out = engine.call(fn, dual_args, dual_kwargs, writes=False)
        except NotImplementedError:
            try:
                out = engine.through_backward(fn, dual_args, dual_kwargs)
            except (RuntimeError, NotImplementedError):
                if isinstance(fn, CustomFunction) or is_foreign(fn):
                    raise NotAuditable(f"{label(fn)} has no derivative of its own to compare with") from None
                return NotImplemented
        if out is NotImplemented:
            return out
        leaves, outs = flat(out)
        for k, t in enumerate(leaves):
            if isinstance(t, Tensor) and is_differentiable(t):
                primal, tangent = fw.unpack_dual(t)
                leaves[k] = primal.detach() if tangent is None else primal.detach() + tangent
        return tree_unflatten(leaves, outs)

    with torch.no_grad():
        return engine.run(body)


def copied(node: Any) -> Any:
    return map_tensors(node, lambda t: t if is_traceable_wrapper_subclass(t) else t.detach().clone())


def flat(out: Any) -> Any:
    """``tree_flatten`` that leaves a size a size: ``t.new(size)`` takes a tuple for data."""
    return tree_flatten(out, is_leaf=lambda node: isinstance(node, torch.Size))
