"""Feedback from weights: each ``B`` is fitted to the next one's prediction, pulled back through what lies between.

    B_i <- B_i + gain mean_n (u_n - B_i e_n) e_n^T C^-1

``e_n`` is the output's error, ``u_n`` the pulled-back prediction, and ``C`` the running second moment of ``e``. This is
recursive least squares.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from guessopt.feedback.maps import FeedbackMap
from guessopt.feedback.options import FeedbackOptions
from guessopt.feedback.updates import TINY, Products, State, stepped

#: Gain in units of ``beta``. It is larger than for guesses: ``u_n`` is known in every direction, not along one only.
FIT_GAIN = 4

#: Added to every eigenvalue of ``C``, in units of their mean.
RIDGE = 1e-2

#: How a ``B`` reads the output's error: whether position by position, and the number of mixtures (None: all features).
Reader = tuple[bool, "int | None"]


class Errors(NamedTuple):
    """A batch's output errors as some ``B`` read them.

    Attributes:
        e: ``[N, c]``, divided by ``unit``, their root mean square.
        squares: ``e^T e``.
        second_moment: running mean of ``e^T e / N``. Every batch counts alike, whatever the size of its errors.
        inverse: of ``second_moment`` with a ridge.
    """

    e: Tensor
    unit: Tensor
    squares: Tensor
    second_moment: Tensor
    inverse: Tensor

    @staticmethod
    def of(old: State | None, e: Tensor, gain: float) -> Errors:
        unit = e.square().mean().sqrt()
        e = torch.where(torch.isfinite(unit) & (unit > 0), e / unit, 0)
        squares = e.mT @ e
        moment = squares / len(e)
        if old is not None and "errors" in old:
            moment = old["errors"].to(e.dtype)
            moment = moment + gain * (squares / len(e) - moment)
        mean = moment.diagonal().mean().clamp_min(TINY)
        firm = moment + RIDGE * mean * torch.eye(len(moment), dtype=e.dtype, device=e.device)
        return Errors(e, unit, squares, moment, torch.linalg.inv_ex(firm).inverse)


class Fitting:
    """One step of recursive least squares for every ``B``.

    Args:
        maps: by the site that keeps the ``B``, from the first to the last.
        before: the states before this step.
    """

    def __init__(self, options: FeedbackOptions, maps: dict[int, FeedbackMap], before: dict[int, State | None]) -> None:
        self.options, self.maps, self.before = options, maps, before
        self.keepers = keepers(maps)
        self._errors: dict[Reader, Errors] = {}

    def step(self, index: int, e: Tensor, target: Tensor) -> tuple[State, Products | None]:
        """A step of ``B e`` towards ``target``. All products but one have the size of ``B``, not of the batch.

        Args:
            e: the output's error, ``[n, g, c]``.
            target: ``[n, g, rows of B]``.

        Returns:
            The new state, and how well ``B`` has predicted the target before the step (see ``updates.products``).
        """
        map_, old = self.maps[index], self.before[index]
        steps, gain = self._pace(index)
        reader = map_.matched, map_.rank
        keeper = self.keepers[reader]
        if reader not in self._errors:
            read = map_.read(e).flatten(0, 1)
            self._errors[reader] = Errors.of(self.before[keeper], read, self._pace(keeper)[1])
        errors, agreed = self._errors[reader], None
        missed = target.to(errors.e.dtype).flatten(0, 1).mT @ errors.e
        if old is not None:
            b = old["B"].to(errors.e.dtype) * errors.unit
            own = b @ errors.squares
            agreed = (b * missed).sum(), (b * own).sum()
            missed = missed - own
        gradient = missed @ errors.inverse / (errors.unit * len(errors.e)).clamp_min(TINY)
        new = stepped(old, steps, gradient, gain, leak=0.0, clip=self.options.clip)
        return new | {"steps": steps} | ({"errors": errors.second_moment} if keeper == index else {}), agreed

    def _pace(self, index: int) -> tuple[int, float]:
        """The number of steps, this one included, and the gain."""
        old = self.before[index]
        steps = 1 if old is None else old["steps"] + 1
        return steps, max(min(FIT_GAIN * self.options.beta, 1.0), 1 / steps)


def keepers(maps: dict[int, FeedbackMap]) -> dict[Reader, int]:
    """The site that keeps the second moment of the errors: the last of the sites whose ``B`` read them alike."""
    return {(map_.matched, map_.rank): index for index, map_ in maps.items()}
