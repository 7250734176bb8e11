"""The base optimizer: its plain step, and where it may keep numbers."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

#: The most bytes of parameters and state that are copied.
MAX_COPIED_BYTES = 64 * 2**20


def base_step(base: Optimizer) -> None:
    """The base's own ``step``, without the hooks that torch has wrapped around it."""
    if "step" in vars(base):  # a scheduler's counter
        base.step()
        return
    step = type(base).step
    plain = getattr(step, "__wrapped__", step) if getattr(step, "hooked", None) else step
    with torch.no_grad():
        plain(base)


def holds_numbers(node: Any) -> bool:
    """Whether this object may keep numbers of a base in its attributes."""
    if isinstance(node, Optimizer):
        return True
    return hasattr(node, "__dict__") and not callable(node) and not isinstance(node, ModuleType)
