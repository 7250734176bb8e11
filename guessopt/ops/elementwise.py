"""Paths of elementwise calls: the steps from one matrix site to the next that mix no entries.

The derivative of such a path at ``s``, the site's output, is ``M = phi'(s)``, shape of ``s``. Dropout passes as its
mean, the identity: its mask is drawn after the guess.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from guessopt.ops.base import UNKNOWN, Entries, op_of
from guessopt.sites import Call

#: Pairs of the torch function and the function of one tensor that remains when the other arguments are filled in.
Path = tuple[tuple[Callable[..., Any], Callable[[Tensor], Tensor]], ...]


def is_elementwise(fn: Callable[..., Any]) -> bool:
    """Whether ``fn``, with one tensor among its arguments, acts on each entry alone and keeps the shape.

    >>> is_elementwise(torch.relu), is_elementwise(torch.softmax)
    (True, False)
    """
    return op_of(fn).entries is not Entries.OTHER


def is_dropout(fn: Callable[..., Any]) -> bool:
    """Whether ``fn`` passes as the identity until its mask is drawn."""
    return op_of(fn).entries is Entries.DROPOUT


def is_rectifier(calls: Sequence[Call]) -> bool:
    """Whether a path is a ReLU and no more: its output tells its derivative."""
    return len(calls) == 1 and op_of(calls[0].fn).rectifier


def fused_pull_back(calls: Sequence[Call]) -> Callable[[Tensor, Tensor, bool], Tensor] | None:
    """``(u, s, spent) -> M u`` in one kernel (in ``u``'s memory if it is spent), where a path of elementwise calls is
    one well-known activation, dropout aside; else None."""
    active = [call for call in calls if _is_active(call.fn)]
    kernel = op_of(active[0].fn).pull_back if len(active) == 1 else None
    return None if kernel is None else partial(kernel, **active[0].kwargs)


def lasting_derivative(calls: Sequence[Call], s: Tensor) -> tuple[Call, Tensor] | None:
    """The call and ``M``, where a path is one activation whose derivative is worth keeping until its tangent is due."""
    op = op_of(calls[0].fn) if len(calls) == 1 else UNKNOWN
    if op.pull_back is None or not op.keeps_derivative:
        return None
    return calls[0], op.pull_back(s.new_ones(()).expand_as(s), s, **calls[0].kwargs)


def pull_back(path: Path, s: Tensor, u: Tensor) -> Tensor:
    """``M u``: reverse mode through the activations themselves; ``u`` has the shape of ``s``."""
    active = [run for fn, run in path if _is_active(fn)]
    return _through(active, s, u) if active else u


def derivative(path: Path, s: Tensor) -> Tensor | None:
    """``M = phi'(s)``, shape of ``s`` (bool for a ReLU); None for the identity."""
    active = [(fn, run) for fn, run in path if _is_active(fn)]
    if not active:
        return None
    if len(active) == 1 and op_of(active[0][0]).rectifier:
        return s > 0
    return _through([run for _, run in active], s, None)


def _is_active(fn: Callable[..., Any]) -> bool:
    return op_of(fn).entries not in (Entries.DROPOUT, Entries.IDENTITY)


def _through(path: list[Callable[[Tensor], Tensor]], s: Tensor, u: Tensor | None) -> Tensor:
    """``M u``; ``M`` itself where ``u`` is None."""
    with torch.enable_grad():
        t = start = s.detach().requires_grad_()
        for run in path:
            t = run(t)
        return torch.autograd.grad(t, start, torch.ones_like(t) if u is None else u)[0]
