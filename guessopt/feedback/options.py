"""The options of learned feedback; ``LearnedFeedback`` explains each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from guessopt.feedback.maps import STRUCTURES, Form
from guessopt.registry import make_estimator

STARTS = ("weights", "random", "zero")
SOURCES = ("auto", "guesses", "weights")


@dataclass(frozen=True)
class FeedbackOptions:
    """The options, checked. ``guess`` becomes an estimator.

    Raises:
        ValueError: an option is out of range, or two do not go together. The message begins with the option's name.
    """

    guess: Any = "activation_perturbation"
    gamma: float | str = "auto"
    every: int | str = 1
    beta: float = 0.1
    structure: str = "auto"
    leak: float = 1e-3
    clip: float = 5.0
    ahead: int = 1
    residual: bool = True
    start: str = "weights"
    source: str = "auto"
    entries: int | None = None

    def __post_init__(self) -> None:
        guess = make_estimator(self.guess)
        if guess.space != "activations" or guess.learns or guess.debias:
            raise ValueError(
                f"guess: {guess.name} cannot serve here; choose an estimator that guesses activations, without debias"
            )
        object.__setattr__(self, "guess", guess)
        if self.gamma != "auto" and not (isinstance(self.gamma, (int, float)) and 0 <= self.gamma <= 1):
            raise ValueError(f"gamma: the correction's weight must be 0 to 1 or 'auto', got {self.gamma!r}")
        if self.every != "auto" and not (isinstance(self.every, int) and self.every >= 1):
            raise ValueError(f"every: forward-mode passes are 1 or more steps apart, or 'auto'; got {self.every!r}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta: the gain must be 0 to 1, got {self.beta}")
        if self.structure not in STRUCTURES:
            raise ValueError(f"structure: {self.structure!r} is not one of {', '.join(STRUCTURES)}")
        if not 0 <= self.leak < 1:
            raise ValueError(f"leak: the fraction forgotten must be at least 0 and below 1, got {self.leak}")
        if not self.clip >= 1:
            raise ValueError(f"clip: the largest update must be at least the usual one, 1, got {self.clip}")
        if self.ahead not in (0, 1):
            raise ValueError(
                f"ahead: the matrix sites between a prediction and its site must be 0 or 1, got {self.ahead}"
            )
        if self.start not in STARTS:
            raise ValueError(f"start: {self.start!r} is not one of {', '.join(STARTS)}")
        if self.source not in SOURCES:
            raise ValueError(f"source: {self.source!r} is not one of {', '.join(SOURCES)}")
        if self.source == "weights" and not self.may_fit:
            raise ValueError("source: 'weights' goes with ahead=1, start='weights' and a beta above 0")
        if self.entries is not None and (not isinstance(self.entries, int) or self.entries < 1):
            raise ValueError(f"entries: the most entries of a feedback matrix must be at least 1, got {self.entries}")

    @cached_property
    def form(self) -> Form:
        """The shapes that a ``B`` may have."""
        return Form(self.structure, self.entries)

    @property
    def may_fit(self) -> bool:
        """Whether, without a stream, the options allow that every ``B`` is fitted to the next one's prediction."""
        return self.fits_stream and self.start == "weights"

    @property
    def fits_stream(self) -> bool:
        """Whether, along a stream, every ``B`` is fitted to what the next block makes of its prediction."""
        return bool(self.ahead and self.beta) and self.source != "guesses"
