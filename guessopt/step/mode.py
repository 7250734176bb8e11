"""A memory mode: its algorithm, and whether a step keeps inputs and guesses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: The memory modes by name; ``step.modes`` fills it.
MODES: dict[str, Mode] = {}


@dataclass(frozen=True)
class Mode:
    """One entry of ``MODES``.

    Attributes:
        run: ``run(estimation, closure, transaction)`` gives the loss (a detached scalar) and the gradients by position.
        keeps: whether one run keeps inputs and guesses until the directional derivatives are known. If not, the closure
            runs twice, and estimators that learn see their sites one by one.
        early: whether ``step(closure)`` updates each parameter as soon as its gradient is whole.
    """

    run: Callable[..., Any]
    keeps: bool
    early: bool = False
