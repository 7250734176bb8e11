"""A step has the process to itself: other threads' steps and Ctrl-C wait, and torch's modes are put back after it."""

from guessopt.exclusive.interrupts import Interrupts
from guessopt.exclusive.turn import (
    exclusive,
    hold_interrupts,
    interrupts_now,
    leave_modes,
    refuse_in_closure,
    running,
    unscaled,
)

__all__ = [
    "Interrupts", "exclusive", "hold_interrupts", "interrupts_now", "leave_modes", "refuse_in_closure", "running",
    "unscaled",
]  # fmt: skip
