"""Recurrent networks in one call: ``torch.lstm`` and the like.

OneDNN's fused recurrence has no forward derivative; torch's plain one has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from guessopt.ops.base import Op, register


def draws(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether there is dropout between the layers. Unclear calls count as drawing."""
    if len(args) != 9:
        return True
    packed = not isinstance(args[3], bool)  # (data, batch_sizes, ...) in place of (input, ...)
    return args[5 + packed] != 0 and bool(args[6 + packed])


@contextmanager
def without_mkldnn() -> Iterator[None]:
    """Within, torch does not use oneDNN."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


register(
    Op(
        (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu),
        context=without_mkldnn,
        treatment="runs unfused: oneDNN's fused recurrence has no forward derivative",
        draws=draws,
    )
)
