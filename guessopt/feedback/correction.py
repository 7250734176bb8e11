"""What the guess adds to a predicted cotangent: ``gamma (e . d)_n y_i / a_i^2``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from guessopt.feedback.maps import apart, by_example, wide
from guessopt.feedback.updates import State, shrunken
from guessopt.graph import SiteGraph
from guessopt.sites import Site

#: A remainder is rounding where it is below so many machine epsilons of the numbers that were subtracted.
ROUNDINGS = 64


class Correction:
    """Of one step.

    Args:
        gamma: as ``LearnedFeedback`` has it.
        states: what was learned, by site index.
        closed: sites that can have no prediction, and take the correction in full.

    Attributes:
        learned: by site index, the moments from which ``gamma="auto"`` finds its weight.
    """

    def __init__(self, gamma: float | str, graph: SiteGraph, states: dict[int, Any], closed: Collection[int]) -> None:
        self.gamma, self.graph, self.states, self.closed = gamma, graph, states, closed
        self.learned: dict[int, State] = {}

    def of(self, index: int, c: Tensor | None, y: Tensor, rest: Tensor) -> Tensor:
        """The prediction ``c`` (None: there is none), corrected. ``rest``: ``(e . d)_n``."""
        state, layout = self.states[index], self.graph.sites[index].layout
        gamma: Any = 1.0 if index in self.closed else self.gamma
        if gamma == "auto":
            gamma = 1.0 if state is None or "gamma" not in state else state["gamma"]
        elif gamma == 0:
            return torch.zeros_like(y) if c is None else c
        correction = y * layout.spread(rest / amplitude(state) ** 2, tuple(y.shape)).to(y.dtype)
        if self.gamma == "auto" and index not in self.closed and index not in self.learned:
            looks = 1 if state is None else state.get("looks", 0) + 1
            new = shrunken(state, by_example(correction, layout, self.graph.batch), looks)
            self.learned[index] = {"looks": looks} | new
        correction = correction if isinstance(gamma, float) and gamma == 1 else correction.mul_(gamma)
        return correction if c is None else c + correction

    def together(self, learned: dict[int, State]) -> dict[int, State]:
        """The states that the sites have learned, with these moments."""
        return learned | {
            index: (learned.get(index) or self.states[index] or {}) | new for index, new in self.learned.items()
        }


def amplitude(state: State | None) -> Any:
    """Of the guess at a site."""
    return 1.0 if state is None else state.get("amplitude", 1.0)


class Remainder:
    """``D_n - sum_i <c_i[n], y_i[n]>``: the part of the directional derivative that the predictions do not explain.

    The weight of ``gamma="auto"`` is learned from the corrections, that is, from their ratio to each other, however
    small they are. So a remainder that is nothing but rounding must be zero.

    Args:
        d: the directional derivatives, ``[N]``, or the sum over the batch, ``[1]``.
    """

    def __init__(self, d: Tensor) -> None:
        self.d, self.size = d, d.abs()
        self._value: Tensor | None = None

    def subtract_explained(self, c: Tensor, y: Tensor, site: Site, n: int) -> None:
        """Take away the part that a site's prediction ``c`` explains of its guess ``y``, both of the site's shape."""
        part = apart(site.layout, site.shape, n).sum_examples(wide(c) * wide(y), n)
        if part.shape != self.d.shape:
            part, self.d, self.size = part.sum(), self.d.sum().reshape(1), self.size.sum().reshape(1)
        self.d, self.size, self._value = self.d - part, self.size + part.abs(), None

    @property
    def value(self) -> Tensor:
        """``[N]`` or ``[1]``; zero where less than ``ROUNDINGS`` roundings are left."""
        if self._value is None:
            rounding = ROUNDINGS * torch.finfo(self.d.dtype).eps * self.size
            self._value = torch.where(self.d.abs() > rounding, self.d, 0)
        return self._value
