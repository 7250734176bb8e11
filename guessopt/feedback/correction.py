"""What the guess adds to a predicted cotangent: ``gamma D'_n y_i / a_i^2``.

``D'_n = D_n - sum_i <c_i[n], y_i[n]>``, and ``a_i`` is the amplitude of the guess.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from guessopt.feedback.maps import example_layout
from guessopt.feedback.updates import State, correction_shrinkage
from guessopt.graph import SiteGraph
from guessopt.linalg import wide
from guessopt.sites import Site

#: A remainder is rounding if it is at most so many machine epsilons of the numbers that were subtracted.
MAX_ROUNDING_EPSILONS = 64


class Correction:
    """The correction in one step.

    Args:
        gamma: see ``LearnedFeedback``.
        states: what was learned, by site index.
        coupled: sites whose examples cannot be told apart. They have no prediction, and take the whole correction.

    Attributes:
        shrinkage: by site index, the moments from which ``gamma="auto"`` finds its weight.
    """

    def __init__(self, gamma: float | str, graph: SiteGraph, states: dict[int, Any], coupled: Collection[int]) -> None:
        self.gamma, self.graph, self.states, self.coupled = gamma, graph, states, coupled
        self.shrinkage: dict[int, State] = {}

    def apply(self, index: int, c: Tensor | None, y: Tensor, rest: Tensor) -> Tensor:
        """``c + gamma D' y / a^2``.

        Args:
            c: the prediction; None if there is none.
            y: the guess.
            rest: ``D'_n``, ``[N]`` or ``[1]``.
        """
        state, layout = self.states[index], self.graph.sites[index].layout
        gamma: Any = 1.0 if index in self.coupled else self.gamma
        if gamma == "auto":
            gamma = 1.0 if state is None or "gamma" not in state else state["gamma"]
        elif gamma == 0:
            return torch.zeros_like(y) if c is None else c
        correction = y * layout.spread(rest / amplitude(state) ** 2, tuple(y.shape)).to(y.dtype)
        if self.gamma == "auto" and index not in self.coupled and index not in self.shrinkage:
            looks = 1 if state is None else state.get("looks", 0) + 1
            new = correction_shrinkage(state, layout.flat_rows(wide(correction), self.graph.batch), looks)
            self.shrinkage[index] = {"looks": looks} | new
        correction = correction if isinstance(gamma, float) and gamma == 1 else correction.mul_(gamma)
        return correction if c is None else c + correction

    def merged(self, learned: dict[int, State]) -> dict[int, State]:
        """The states that the sites have learned, with ``shrinkage`` added."""
        return learned | {
            index: (learned.get(index) or self.states[index] or {}) | new for index, new in self.shrinkage.items()
        }


def amplitude(state: State | None) -> Any:
    """The factor on the guess at a site."""
    return 1.0 if state is None else state.get("amplitude", 1.0)


class Remainder:
    """``D'_n = D_n - sum_i <c_i[n], y_i[n]>``: the part of the directional derivative that no prediction explains.

    ``gamma="auto"`` compares corrections with each other, however small they are. So a remainder that is nothing but
    rounding must be zero.

    Args:
        d: the directional derivatives, ``[N]``, or their sum over the batch, ``[1]``.
    """

    def __init__(self, d: Tensor) -> None:
        self.d, self.size = d, d.abs()
        self._value: Tensor | None = None

    def subtract_explained(self, c: Tensor, y: Tensor, site: Site, n: int) -> None:
        """Subtract ``<c[n], y[n]>`` for a site's prediction ``c`` and its guess ``y``, both of the site's shape."""
        part = example_layout(site.layout, site.shape, n).sum_examples(wide(c) * wide(y), n)
        if part.shape != self.d.shape:
            part, self.d, self.size = part.sum(), self.d.sum().reshape(1), self.size.sum().reshape(1)
        self.d, self.size, self._value = self.d - part, self.size + part.abs(), None

    @property
    def value(self) -> Tensor:
        """``[N]`` or ``[1]``; zero where it is at most ``MAX_ROUNDING_EPSILONS`` of rounding."""
        if self._value is None:
            rounding = MAX_ROUNDING_EPSILONS * torch.finfo(self.d.dtype).eps * self.size
            self._value = torch.where(self.d.abs() > rounding, self.d, 0)
        return self._value
