"""Which dimension holds the examples, and where examples interact: found by trying, not by shape.

A tangent on a random half of the examples must move nothing that belongs to the other half. A layout that passes is
right
for every later step with the same calls and shapes; one that fails is replaced by another, or the site is *coupled* and
takes the scalar derivative, which is always valid, only noisier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from guessopt.sites import Cut, Layout, Site

#: Runs the closure with a tangent for each site named, and gives the tangents of the cuts (None: not moved).
Push = Callable[[dict[int, Callable[[Tensor], Tensor]]], list["Tensor | None"]]

#: Forward passes that the search may take before it calls what is left coupled.
BUDGET = 64


@dataclass
class Found:
    """Layouts by value, and what the search saw. ``alive``: some tangent reached the loss."""

    batch: int
    layouts: dict[int, Layout]
    alive: bool
    coupled: tuple[int, ...] = field(default=())


def batch_candidates(sites: Sequence[Site], cuts: Sequence[Cut], given: int | None) -> list[int]:
    """Possible N, likeliest first: the one that fits most sites and cuts; among equals the cuts' first dimension.

    ``given``: the number of per-example losses, where the closure returns them.
    """
    if given is not None:
        return [given]
    shapes = [site.shape for site in sites] + [cut.shape for cut in cuts]
    sizes = {size for shape in shapes for size in shape[:2]}
    rows = cuts[0].shape[0] if cuts and cuts[0].shape else 0

    def fits(n: int) -> int:
        return sum(Layout.candidates(shape, n)[0] is not Layout.COUPLED for shape in shapes)

    possible = [
        n for n in sizes if n > 0 and all(Layout.candidates(cut.shape, n)[0] is not Layout.COUPLED for cut in cuts)
    ]
    return sorted(possible, key=lambda n: (fits(n), n == rows, n), reverse=True)


def find_layouts(
    sites: Sequence[Site],
    cuts: Sequence[Cut],
    push: Push,
    *,
    given: int | None = None,
    coupled: frozenset[int] = frozenset(),
) -> Found:
    """Search; see the module's docstring.

    Args:
        push: runs one forward pass.
        coupled: values of sites known to lie before a batch normalisation.
    """
    search = _Search([site for site in sites if site.shares is None], list(cuts), push, coupled)
    candidates = batch_candidates(sites, cuts, given)
    for n in candidates[:4]:
        for transposed in (False, True):
            layouts = search.first_guess(n, transposed)
            if layouts is None:
                continue
            clean, alive = search.is_clean(search.free, layouts, n)
            if clean:
                return search.result(n, layouts, alive, sites)
    for n in candidates[:1]:
        layouts = search.first_guess(n, False)
        if layouts is not None:
            search.resolve(search.free, layouts, n)
            return search.result(n, layouts, True, sites)
    return search.result(1, {}, True, sites)


class _Search:
    def __init__(self, sites: list[Site], cuts: list[Cut], push: Push, coupled: frozenset[int]) -> None:
        self.cuts, self.push = cuts, push
        self.free = [site for site in sites if site.value not in coupled]
        self.passes = 0
        self.generator = torch.Generator().manual_seed(0)

    def first_guess(self, n: int, transposed: bool) -> dict[int, Layout] | None:
        """The likeliest layout of every value, flattened ones batch-major or (transposed) time-major; None if
        transposing changes nothing."""
        things: list[Site | Cut] = [*self.free, *self.cuts]
        layouts = {thing.value: Layout.candidates(thing.shape, n)[0] for thing in things}
        if not transposed:
            return layouts
        if Layout.FLAT not in layouts.values():
            return None
        return {v: Layout.FLAT_T if layout is Layout.FLAT else layout for v, layout in layouts.items()}

    def is_clean(self, sites: Sequence[Site], layouts: dict[int, Layout], n: int) -> tuple[bool, bool]:
        """Whether tangents on half of the examples at these sites leave the other half's outputs alone; and whether
        they moved anything."""
        self.passes += 1
        half = torch.zeros(n)
        half[torch.randperm(n, generator=self.generator)[: max(n // 2, 1)]] = 1

        def tangent(layout: Layout) -> Callable[[Tensor], Tensor]:
            def of(s: Tensor) -> Tensor:
                noise = torch.randn(s.shape, generator=self.generator).to(s)
                return noise * layout.spread(half.to(s), tuple(s.shape))

            return of

        chosen = {
            site.index: tangent(layouts[site.value]) for site in sites if layouts[site.value] is not Layout.COUPLED
        }
        if not chosen:
            return True, False
        clean, alive = True, False
        for cut, t in zip(self.cuts, self.push(chosen), strict=True):
            if t is None:
                continue
            size = t.abs().double().nan_to_num()
            largest = float(size.max()) if size.numel() else 0.0
            alive = alive or largest > 0
            layout = layouts[cut.value]
            if layout is Layout.COUPLED:
                continue
            moved = layout.sum_examples(size, n).cpu()
            clean = clean and float(moved[half == 0].sum()) <= 1e-5 * largest * (size.numel() / n) ** 0.5
        return clean, alive

    def resolve(self, sites: Sequence[Site], layouts: dict[int, Layout], n: int) -> None:
        """Halve the group until each leak has its site; there try the other layouts, else couple."""
        if self.passes >= BUDGET:
            layouts.update({site.value: Layout.COUPLED for site in sites})
            return
        if not sites or self.is_clean(sites, layouts, n)[0]:
            return
        if len(sites) > 1:
            middle = len(sites) // 2
            self.resolve(sites[middle:], layouts, n)
            self.resolve(sites[:middle], layouts, n)
            return
        for layout in Layout.candidates(sites[0].shape, n)[1:]:
            layouts[sites[0].value] = layout
            if self.is_clean(sites, layouts, n)[0]:
                return

    def result(self, n: int, layouts: dict[int, Layout], alive: bool, sites: Sequence[Site]) -> Found:
        for site in reversed(sites):
            if site.shares is not None:
                layouts[site.value] = layouts.get(sites[site.shares].value, Layout.COUPLED)
        things: list[Site | Cut] = [*sites, *self.cuts]
        for thing in things:
            layouts.setdefault(thing.value, Layout.COUPLED)
        coupled = tuple(site.index for site in sites if layouts[site.value] is Layout.COUPLED)
        return Found(n, layouts, alive, coupled)
