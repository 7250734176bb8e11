"""What the guess adds to a predicted cotangent: ``gamma D'_n y_i / a_i^2``.

``D'_n = D_n - sum_i <c_i[n], y_i[n]>``, and ``a_i`` is the amplitude of the guess. With position credit
(``guessopt.credit``) a site with positions takes ``D'[n, t]``: the discounted sum of ``l'[n, t] - p[n, t]`` with
``p[n, t] = sum_i <c_i[n, t], y_i[n, t]>``, over the sites with positions.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from guessopt.credit import Credit, rate
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

    def apply(self, index: int, c: Tensor | None, y: Tensor, rest: Remainder) -> Tensor:
        """``c + gamma D' y / a^2``.

        Args:
            c: the prediction; None if there is none.
            y: the guess.
            rest: ``D'``, after all predictions are subtracted.
        """
        state, site = self.states[index], self.graph.sites[index]
        gamma: Any = 1.0 if index in self.coupled else self.gamma
        if gamma == "auto":
            gamma = 1.0 if state is None or "gamma" not in state else state["gamma"]
        elif gamma == 0:
            return torch.zeros_like(y) if c is None else c
        correction: Tensor = y * (rest.rate(site) / amplitude(state) ** 2).to(y.dtype)
        if self.gamma == "auto" and index not in self.coupled and index not in self.shrinkage:
            looks = 1 if state is None else state.get("looks", 0) + 1
            new = correction_shrinkage(state, site.layout.flat_rows(wide(correction), self.graph.batch), looks)
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
        credit: the same by position; None without position credit.

    Attributes:
        size: sums of the absolute values of all that was added up in ``d``.
        explained: ``p[n, t]`` and the sum of its terms' absolute values; None if nothing is explained by position.
    """

    def __init__(self, d: Tensor, credit: Credit | None = None) -> None:
        self.d, self.size, self.credit = d, d.abs(), credit
        self.explained: tuple[Tensor, Tensor] | None = None
        self._value: tuple[Tensor, Credit | None] | None = None

    def subtract_explained(self, c: Tensor, y: Tensor, site: Site, n: int) -> None:
        """Subtract ``<c[n], y[n]>`` for a site's prediction ``c`` and its guess ``y``, both of the site's shape."""
        product = wide(c) * wide(y)
        part = example_layout(site.layout, site.shape, n).sum_examples(product, n)
        self.d, self.size, self._value = _plus(self.d, -part), _plus(self.size, part.abs()), None
        if self.credit is not None and site.position_dim is not None:
            own = site.layout.sum_positions(product, n, site.position_dim)
            total, size = self.explained or (torch.zeros_like(own), torch.zeros_like(own))
            self.explained = _plus(total, own), _plus(size, own.abs())

    def rate(self, site: Site) -> Tensor:
        """``D'_n`` or ``D'[n, t]``, shaped to broadcast against the site's output; zero where it is at most
        ``MAX_ROUNDING_EPSILONS`` of rounding."""
        if self._value is None:
            self._value = _without_rounding(self.d, self.size), self._by_position()
        return rate(site, *self._value)

    def _by_position(self) -> Credit | None:
        if self.credit is None or self.explained is None:
            return self.credit
        explained, size = (self.credit.of_others(each) for each in self.explained)
        size = self.credit.map(lambda d, part: _plus(d.abs(), part), size)
        return self.credit.map(lambda d, part, size: _without_rounding(_plus(d, -part), size), explained, size)


def _plus(total: Tensor, part: Tensor) -> Tensor:
    """The sum; over the batch, if one of them is a sum over the batch."""
    if len(total) != len(part):
        total, part = total.sum(0, keepdim=True), part.sum(0, keepdim=True)
    return total + part


def _without_rounding(d: Tensor, size: Tensor) -> Tensor:
    rounding = MAX_ROUNDING_EPSILONS * torch.finfo(d.dtype).eps * size
    return torch.where(d.abs() > rounding, d, 0)
