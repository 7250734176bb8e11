"""Whether a recorded call draws random numbers: its function may, and its arguments do not switch it off."""

from __future__ import annotations

from guessopt.ops.base import op_of
from guessopt.rng import draws
from guessopt.sites import Call


def draws_now(call: Call) -> bool:
    """Whether the call draws, with the arguments that it was recorded with.

    >>> import torch
    >>> draws_now(Call(0, torch.nn.functional.dropout, (None, 0.5, False), {}, (), ()))
    False
    """
    op = op_of(call.fn)
    return draws(call.fn) if op.draws is None else op.draws(call.args, call.kwargs)
