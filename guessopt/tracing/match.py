"""Matchers: the part that a single recorded call can play, from its function, arguments and shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from guessopt.layout import numel
from guessopt.ops.base import op_of
from guessopt.ops.matrix import MatrixRule
from guessopt.sites import Call, OutputSpan, Value
from guessopt.tracing.answers import CustomFunction
from guessopt.tracing.tape import Tape

#: Layers whose weight or bias may be computed from parameters (a pruning mask, a spectral norm, a merged LoRA update).
LAYERS: set[Callable[..., Any]] = {F.linear, F.conv1d, F.conv2d, F.conv3d}

_JOINS = (torch.cat, torch.concat, torch.concatenate)
_INDEX_DTYPES = (torch.int64, torch.int32, torch.bool)
_ROUTING = ("getitem", "setitem", "index", "gather", "scatter", "take", "masked_select", "sort")


class MatrixCall(NamedTuple):
    """A call that is a linear layer or a convolution. ``weight`` and ``x``: the values of its weight and its input."""

    call: Call
    rule: MatrixRule
    weight: int
    x: int

    @property
    def geometry(self) -> str:
        """Equal for calls whose weights may be stacked."""
        return self.rule.geometry(self.call)


def matrix_call(tape: Tape, call: Call) -> MatrixCall | None:
    """The call as a linear layer or convolution, frozen or not; None for any other call."""
    rule = op_of(call.fn).rule
    if not isinstance(rule, MatrixRule):
        return None
    try:
        w, x = rule.weight(call.args, call.kwargs), rule.input(call.args, call.kwargs)
    except (IndexError, KeyError):
        return None
    if not isinstance(w, Value) or not isinstance(x, Value) or w.id in tape.active:
        return None
    found = MatrixCall(call, rule, w.id, x.id)
    if found.geometry == "linear" and (len(tape.shapes[w.id]) != 2 or w.id not in tape.weights):
        return None
    return found


def is_loss_with_parameters(fn: Callable[..., Any]) -> bool:
    """Whether ``fn`` is a loss with the network's last layer in it: see ``ops.loss``."""
    return op_of(fn.cls.__name__ if isinstance(fn, CustomFunction) else fn).is_loss


def is_plain_addition(call: Call) -> bool:
    """Whether the call adds two tensors, and writes into no memory that others share."""
    return op_of(call.fn).is_addition and not call.kwargs and len(call.args) == 2 and not call.aliases


def normalises_batch(call: Call) -> bool:
    """Whether the call is a batch norm in training mode."""
    if call.fn is F.batch_norm:
        return bool(call.kwargs.get("training", call.args[5] if len(call.args) > 5 else False))
    return call.fn is torch.batch_norm and bool(call.args[5])


def picks_rows(tape: Tape, call: Call) -> bool:
    """Whether the call picks entries by an index tensor (sorting, gathers, experts)."""
    indices = [v for v in call.inputs if tape.dtypes[v] in _INDEX_DTYPES and numel(tape.shapes[v]) > 1]
    return bool(indices) and any(word in call.op for word in _ROUTING)


def joined_span(tape: Tape, call: Call) -> OutputSpan | None:
    """For tensors joined by ``cat``: the spans of the output that hold trainable parameters. None for other calls."""
    if call.fn not in _JOINS or not call.args or not isinstance(call.args[0], (tuple, list)):
        return None
    dim = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", call.kwargs.get("axis", 0))
    spans, start = [], 0
    for k, v in enumerate(call.inputs):
        stop = start + tape.shapes[v][dim]
        if k in tape.mine[call.index]:
            spans.append((start, stop))
        start = stop
    return OutputSpan(dim, tuple(spans))


def is_complex(tape: Tape, *values: int) -> bool:
    """Whether one of the values is complex."""
    return any(tape.dtypes[v].is_complex for v in values)
