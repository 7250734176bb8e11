"""Feedback from weights: each ``B`` fitted to what the next one's prediction became on its way back to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from guessopt.feedback.maps import FeedbackMap
from guessopt.feedback.updates import TINY, Products, State, stepped

if TYPE_CHECKING:
    from guessopt.feedback.options import LearnedFeedback

#: Gain in units of ``beta``: what is fitted is known for every example, where guesses tell it along one direction.
KNOWN = 4

#: Of the mean eigenvalue of ``errors``, what is added to all of them.
RIDGE = 1e-2

#: What a ``B`` reads of the output's error: whether position by position, and by how many mixtures.
Reader = tuple[bool, "int | None"]


class Errors(NamedTuple):
    """A batch's output errors ``e`` as some ``B`` read them, in a unit of their own, ``[N, c]``; their products
    ``e^T e``; the running second moment, ``errors``, to which every batch counts alike, and its inverse, made firm by a
    ridge."""

    e: Tensor
    unit: Tensor
    squares: Tensor
    errors: Tensor
    inverse: Tensor

    @staticmethod
    def of(old: State | None, e: Tensor, gain: float) -> Errors:
        unit = e.square().mean().sqrt()
        e = torch.where(torch.isfinite(unit) & (unit > 0), e / unit, 0)
        squares = e.mT @ e
        errors = squares / len(e)
        if old is not None and "errors" in old:
            errors = old["errors"].to(e.dtype)
            errors = errors + gain * (squares / len(e) - errors)
        mean = errors.diagonal().mean().clamp_min(TINY)
        firm = errors + RIDGE * mean * torch.eye(len(errors), dtype=e.dtype, device=e.device)
        return Errors(e, unit, squares, errors, torch.linalg.inv_ex(firm).inverse)


class Fitting:
    """One step of recursive least squares of every ``B`` on the output's error.

    Args:
        places: by the site that keeps the ``B``, from the first to the last.
        before: the states as they were.
    """

    def __init__(
        self, options: LearnedFeedback, places: dict[int, FeedbackMap], before: dict[int, State | None]
    ) -> None:
        self.options, self.places, self.before = options, places, before
        self.readers = readers(places)
        self.known: dict[Reader, Errors] = {}

    def step(self, index: int, e: Tensor, wanted: Tensor) -> tuple[State, Products | None]:
        """``B e`` towards ``wanted``, by rows of ``B``; and how it agreed with that before. All but one product is of
        ``B``'s size, not of the batch's."""
        place, old = self.places[index], self.before[index]
        steps, gain = self._pace(index)
        reader = place.matched, place.rank
        keeper = self.readers[reader]
        if reader not in self.known:
            read = place.read(e).flatten(0, 1)
            self.known[reader] = Errors.of(self.before[keeper], read, self._pace(keeper)[1])
        known, agreed = self.known[reader], None
        missed = wanted.to(known.e.dtype).flatten(0, 1).mT @ known.e
        if old is not None:
            b = old["B"].to(known.e.dtype) * known.unit
            own = b @ known.squares
            agreed = (b * missed).sum(), (b * own).sum()
            missed = missed - own
        gradient = missed @ known.inverse / (known.unit * len(known.e)).clamp_min(TINY)
        new = stepped(old, steps, gradient, gain, leak=0.0, clip=self.options.clip)
        return new | {"steps": steps} | ({"errors": known.errors} if keeper == index else {}), agreed

    def _pace(self, index: int) -> tuple[int, float]:
        """Steps, with this one, and its gain."""
        old = self.before[index]
        steps = 1 if old is None else old["steps"] + 1
        return steps, max(min(KNOWN * self.options.beta, 1.0), 1 / steps)


def readers(places: dict[int, FeedbackMap]) -> dict[Reader, int]:
    """The site that keeps what is known of the errors that a ``B`` reads: of those alike, the last."""
    return {(place.matched, place.rank): index for index, place in places.items()}
