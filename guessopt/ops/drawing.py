"""Whether a recorded call draws random numbers: its function may, and its arguments do not switch it off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from guessopt.ops.attention import drops_out
from guessopt.rng import draws
from guessopt.sites import Call

#: Each takes a probability and a flag for training.
_DROPOUT: set[Callable[..., Any]] = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
}  # fmt: skip

RECURRENT: set[Callable[..., Any]] = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


def draws_now(call: Call) -> bool:
    """Whether the call draws, with the arguments that it was recorded with.

    >>> dropout = Call(0, F.dropout, (None, 0.5, False), {}, (), ())
    >>> draws_now(dropout)
    False
    """
    args, kwargs = call.args, call.kwargs
    if call.fn is F.scaled_dot_product_attention:
        return drops_out(args, kwargs)
    if call.fn in _DROPOUT:
        p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
        return p != 0 and bool(args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True)))
    if call.fn in RECURRENT and len(args) == 9:
        packed = not isinstance(args[3], bool)  # (data, batch_sizes, ...) in place of (input, ...)
        return args[5 + packed] != 0 and bool(args[6 + packed])
    return draws(call.fn)
