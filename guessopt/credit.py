"""Position credit: one derivative for each position of an example, in place of one for each example.

The loss of a language model is a sum over positions t. The exact error ``e[n, t]`` and the tangent ``v'[n, t]`` split
its derivative for free, ``l'[n, t] = <e[n, t], v'[n, t]>``. In a causal network a guess at position t moves the losses
at ``t' >= t`` alone. Earlier losses only add noise to ``D_n``. With a discount gamma:

| position t of a site influences | ``D[n, t]`` |
|---|---|
| position t alone (last layers) | ``l'[n, t]`` |
| positions ``t' >= t`` (causal networks) | ``sum_{t' >= t} gamma^(t' - t) l'[n, t']`` |
| all positions | ``sum_{t'} gamma^abs(t' - t) l'[n, t']`` |
| the site has no positions | ``D_n = sum_t l'[n, t]`` |

The first row adds no bias. The second adds none with gamma 1.

The idea is that of reward to go (gamma 1) and of generalised advantage estimation (Schulman et al. 2016, eq. 16).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from guessopt.sites import Influence, Site

#: Positions that one product discounts. Its matrix has this many rows and columns.
BLOCK = 256


@dataclass(frozen=True)
class Credit:
    """``D[n, t]`` of one run, ``[N, T]``; of K guesses ``[K, N, T]``.

    Attributes:
        batch: N.
        discount: gamma.
        by_influence: ``D[n, t]`` for the sites of each ``Influence``.
    """

    batch: int
    discount: float
    by_influence: dict[Influence, Tensor]

    @staticmethod
    def by(each: Tensor, rest: Tensor | None, discount: float, *, batch: int, symmetric: bool) -> Credit:
        """The credit of a run.

        Args:
            each: ``l'[n, t]``, ``[N, T]``, ``[1, T]`` or with K in front.
            rest: the derivatives of parts of the loss that have no positions, ``[N]``, ``[1]`` or with K in front.
                Every position takes the whole of them. None: there are none.
            symmetric: whether some sites' positions influence all positions.
        """
        sums = {Influence.OWN: each, Influence.LATER: discounted(each, discount)}
        if symmetric:
            sums[Influence.ALL] = discounted(each, discount, both=True)
        found = Credit(batch, discount, sums)
        return found if rest is None else found.map(lambda d: d + rest[..., None])

    def of(self, site: Site) -> Tensor | None:
        """The site's ``D[n, t]``; None for a site without positions, which takes ``D_n``."""
        return None if site.position_dim is None else self.by_influence[site.influence]

    def of_others(self, each: Tensor) -> Credit:
        """The credit of other derivatives ``each``, ``[N, T]``, with this discount."""
        symmetric = Influence.ALL in self.by_influence
        return Credit.by(each, None, self.discount, batch=self.batch, symmetric=symmetric)

    def map(self, f: Callable[..., Tensor], *others: Credit) -> Credit:
        """The results of ``f`` for each tensor, and the others' tensors beside it."""
        found = {key: f(d, *(other.by_influence[key] for other in others)) for key, d in self.by_influence.items()}
        return replace(self, by_influence=found)

    @staticmethod
    def stack(credits: Sequence[Credit | None]) -> Credit | None:
        """The credits of K runs with one guess each, as those of one run with K guesses."""
        first, *others = credits
        if first is None:
            return None
        return first.map(lambda *each: torch.stack(each), *(credit for credit in others if credit is not None))


@dataclass(frozen=True)
class DiscountChoice:
    """The choice of ``discount="auto"``, from running means of what ``step.discount`` measures.

    Attributes:
        signal, noise: ``A`` and ``B`` by discount, in the order of ``GRID``.
        measured_at: the step of the last measurement; -1 before the first.
    """

    GRID: ClassVar[tuple[float, ...]] = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
    SHARE: ClassVar[float] = 0.5
    """The weight of a new measurement in the running means."""

    signal: tuple[float, ...] = ()
    noise: tuple[float, ...] = ()
    measured_at: int = -1

    @property
    def discount(self) -> float:
        """The discount with the largest ``A / sqrt(B)``; 1 before the first measurement, and where nothing moves."""
        quality = [a / b**0.5 if b > 0 else 0.0 for a, b in zip(self.signal, self.noise, strict=True)]
        best = max(range(len(quality)), key=quality.__getitem__, default=None)
        return 1.0 if best is None or not quality[best] > 0 else self.GRID[best]

    def after(self, signal: Sequence[float], noise: Sequence[float], step: int) -> DiscountChoice:
        """The choice with another measurement."""

        def mean(old: tuple[float, ...], new: Sequence[float]) -> tuple[float, ...]:
            if not all(map(math.isfinite, new)):
                return old
            return tuple(new) if not old else tuple(a + self.SHARE * (b - a) for a, b in zip(old, new, strict=True))

        return DiscountChoice(mean(self.signal, signal), mean(self.noise, noise), step)


def rate(site: Site, d: Tensor, credit: Credit | None) -> Tensor:
    """The factor on a site's guess, shaped to broadcast against the site's output: ``D[n, t]``, or ``D_n``.

    Args:
        d: ``D_n``, ``[N]`` or ``[1]``.
    """
    each = None if credit is None else credit.of(site)
    if each is None or credit is None:
        return site.layout.spread(d, site.shape)
    assert site.position_dim is not None
    return site.layout.spread_positions(each, site.shape, credit.batch, site.position_dim)


def discounted(each: Tensor, discount: float, both: bool = False) -> Tensor:
    """``D[t] = sum_{t' >= t} gamma^(t' - t) each[t']`` along the last dimension.

    Args:
        both: sum over earlier positions too, ``gamma^abs(t' - t)``.

    >>> discounted(torch.tensor([1.0, 2.0, 4.0]), 0.5)
    tensor([3., 4., 4.])
    >>> discounted(torch.tensor([1.0, 2.0, 4.0]), 0.5, both=True)
    tensor([3.0000, 4.5000, 5.2500])
    """
    if discount == 0:
        return each
    if both:
        later = discounted(each, discount)
        return later + discounted(each.flip(-1), discount).flip(-1) - each
    if discount == 1:
        return each.flip(-1).cumsum(-1).flip(-1)
    found, after = torch.empty_like(each), None
    for start in reversed(range(0, each.shape[-1], BLOCK)):
        part = each[..., start : start + BLOCK]
        weights = _weights(part.shape[-1], discount, each.dtype, each.device)
        sums = part @ weights
        if after is not None:  # the first sum of the block behind, gamma^1, gamma^2, ... away
            sums = sums + after[..., None] * weights[-1] * discount
        found[..., start : start + BLOCK], after = sums, sums[..., 0]
    return found


@lru_cache(maxsize=8)
def _weights(count: int, discount: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[t', t]``: ``gamma^(t' - t)`` for ``t' >= t``, else 0."""
    t = torch.arange(count, device=device, dtype=dtype)
    return torch.where(t[:, None] >= t, discount ** (t[:, None] - t).clamp(min=0), 0.0)
