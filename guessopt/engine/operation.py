"""One operation with its derivative, also where torch's forward mode has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from guessopt.engine.jvp.base import JvpEngine
from guessopt.engine.jvp.gaps import is_foreign
from guessopt.engine.op_call import OpCall
from guessopt.errors import ClosureError
from guessopt.graph import SiteGraph
from guessopt.ops.base import is_in_place
from guessopt.sites import label
from guessopt.tracing.answers import CustomFunction
from guessopt.tracing.writes import Memory


def differentiate(engine: JvpEngine, graph: SiteGraph, op: OpCall) -> Any:
    """The operation's result, with tangents.

    The engine tries its forward derivative. If there is none, memory that the attempt may have written is put back, and
    the engine goes through the operation's backward. ``graph.without_forward`` remembers the function.

    Raises:
        ClosureError: the operation has neither a forward derivative nor a differentiable backward.
    """
    fn, args, kwargs = op.fn, op.args, op.kwargs
    targets, hidden = graph.mutations.get(op.index, ()), graph.hidden.get(op.index, ())
    before = None
    if hidden or (targets and fn is not F.batch_norm and not is_in_place(fn)):
        before = Memory()
        with engine.outside():
            for t in (*hidden, *(op.tensors[k] for k in targets)):
                before.save(t)
    try:
        if fn in graph.without_forward or is_foreign(fn):
            raise NotImplementedError("forward AD passes it by")
        return engine.call(fn, args, kwargs, writes=bool(targets))
    except NotImplementedError as error:
        if before is not None:
            with engine.outside():
                before.restore()
        if not any(word in str(error) for word in ("forward AD", "forward mode AD", "jvp")):
            raise
        if not is_in_place(fn) and not kwargs.get("inplace"):
            graph.without_forward.add(fn)
            try:
                return engine.through_backward(fn, args, kwargs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as failed:  # show the user this error as the cause
                failed.__context__, error.__context__ = None, failed
        raise ClosureError(
            f"{label(fn)} has no derivative in forward mode, by which gradients are estimated here; {_remedy(fn)}"
        ) from error


def _remedy(fn: Callable[..., Any]) -> str:
    if isinstance(fn, CustomFunction):
        return "give it a jvp (a static method beside forward and backward), or make its backward differentiable"
    return "use another operation, or detach its input if no gradient should pass"
