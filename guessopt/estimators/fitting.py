"""Feedback from weights: each ``B`` fitted to what the next one's prediction became on its way back to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guessopt.estimators.moments import TINY, State, stepped
from guessopt.estimators.places import Place

if TYPE_CHECKING:
    from guessopt.estimators.feedback import LearnedFeedback

#: Gain in units of ``beta``: what is fitted is known for every example, where guesses tell it along one direction.
KNOWN = 4

#: Of the mean eigenvalue of ``errors``, what is added to all of them.
RIDGE = 1e-2

#: What a ``B`` reads of the output's error: whether position by position, and by how many mixtures.
Reader = tuple[bool, "int | None"]


class Fitting:
    """One step of recursive least squares of every ``B`` on the output's error.

    Args:
        places: by the site that keeps the ``B``, from the first to the last.
        before: the states as they were.
    """

    def __init__(self, options: LearnedFeedback, places: dict[int, Place], before: dict[int, State | None]) -> None:
        self.options, self.places, self.before = options, places, before
        self.readers = readers(places)
        self.known: dict[Reader, tuple[Tensor, Tensor]] = {}

    def step(self, index: int, e: Tensor, wanted: Tensor, own: Tensor | None) -> State:
        """``B e`` towards ``wanted``; ``own``: what it was before; both by rows of ``B``."""
        options, place, old = self.options, self.places[index], self.before[index]
        missed = (wanted if own is None else wanted - own).flatten(0, 1)
        steps, gain = self._pace(index)
        reader = place.matched, place.rank
        keeper = self.readers[reader]
        if reader not in self.known:
            read = place.read(e).flatten(0, 1)
            self.known[reader] = whitened(self.before[keeper], read, self._pace(keeper)[1])
        white, errors = self.known[reader]
        new = stepped(old, steps, missed.mT @ white, gain, leak=0.0, clip=options.clip)
        return new | {"steps": steps} | ({"errors": errors} if keeper == index else {})

    def _pace(self, index: int) -> tuple[int, float]:
        """Steps, with this one, and its gain."""
        old = self.before[index]
        steps = 1 if old is None else old["steps"] + 1
        return steps, max(min(KNOWN * self.options.beta, 1.0), 1 / steps)


def readers(places: dict[int, Place]) -> dict[Reader, int]:
    """The site that keeps what is known of the errors that a ``B`` reads: of those alike, the last."""
    return {(place.matched, place.rank): index for index, place in places.items()}


def whitened(old: State | None, e: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    """What residuals ``[N, f]`` are multiplied with for the gradient of recursive least squares on ``e``, ``[N, c]``;
    and the running second moment of ``e``, ``errors``, to which every batch counts alike."""
    scale = e.square().mean().sqrt()
    unit = torch.where(torch.isfinite(scale) & (scale > 0), e / scale, 0)
    errors = unit.mT @ unit / len(e)
    if old is not None and "errors" in old:
        errors = old["errors"] + gain * (errors - old["errors"])
    mean = errors.diagonal().mean().clamp_min(TINY)
    firm = errors + RIDGE * mean * torch.eye(len(errors), dtype=e.dtype, device=e.device)
    solved = torch.linalg.solve_ex(firm, unit.mT).result.mT
    return solved / (scale * len(e)).clamp_min(TINY), errors
