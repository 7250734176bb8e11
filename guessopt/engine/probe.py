"""Which dimension holds the examples, and where examples interact: found by trying, not by shape.

A tangent on a random half of the examples must move nothing that belongs to the other half. A layout that passes is
right for every later step with the same calls and shapes; one that fails is replaced by another, or the site is
*coupled* and takes the scalar derivative, which is always valid, only noisier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from guessopt.sites import Cut, Layout, Shape, Site

#: Runs the closure with a tangent for each site named, and gives the tangents of the cuts (None: not moved).
Push = Callable[[dict[int, Callable[[Tensor], Tensor]]], list["Tensor | None"]]

#: Splits of the batch that a layout must respect.
SPLITS = 2

#: Checks that the search may make before it calls what is left coupled.
BUDGET = 64

#: Layouts to prefer others to, by custom: batch-first and batch-major; either of these reversed; both.
_CUSTOMS: tuple[frozenset[Layout], ...] = (
    frozenset({Layout.BATCH_SECOND, Layout.FLAT_T}),
    frozenset({Layout.BATCH_SECOND, Layout.FLAT}),
    frozenset({Layout.BATCH_FIRST, Layout.FLAT}),
    frozenset({Layout.BATCH_FIRST, Layout.FLAT_T}),
)


@dataclass
class Found:
    """Layouts by value, and what the search saw. ``alive``: some tangent reached the loss."""

    batch: int
    layouts: dict[int, Layout]
    alive: bool
    coupled: tuple[int, ...] = field(default=())


def batch_candidates(sites: Sequence[Site], cuts: Sequence[Cut], given: int | None) -> list[int]:
    """Possible N, likeliest first: the one that fits most sites and cuts; among equals the cuts' first dimension. One
    example would fit anything: it comes last, and only where the loss reads a single row.

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
        n for n in sizes if n > 1 and all(Layout.candidates(cut.shape, n)[0] is not Layout.COUPLED for cut in cuts)
    ]
    best = sorted(possible, key=lambda n: (fits(n), n == rows, n), reverse=True)[:4]
    return [*best, 1] if rows == 1 else best


def find_layouts(
    sites: Sequence[Site],
    cuts: Sequence[Cut],
    push: Push,
    *,
    given: int | None = None,
    coupled: frozenset[int] = frozenset(),
    seed: int = 0,
    known: tuple[int, dict[int, Layout]] | None = None,
) -> Found:
    """Search; see the module's docstring.

    Args:
        push: runs one forward pass.
        coupled: values of sites known to lie before a batch normalisation.
        seed: of the splits; another one later sees what this one may have missed.
        known: N and layouts found earlier: one pass confirms them, or the search begins anew.
    """
    search = _Search([site for site in sites if site.shares is None], list(cuts), push, coupled, seed)
    if known is not None:
        clean, alive = search.still_holds(known[1], known[0])
        if clean:
            return search.result(known[0], dict(known[1]), alive, sites)
    candidates = batch_candidates(sites, cuts, given)
    found: list[Found] = []
    for n in candidates:
        for layouts in search.hypotheses(n):
            clean, alive = search.is_clean(search.free, layouts, n)
            if clean:
                found.append(search.result(n, layouts, alive, sites))
                if search.settles(layouts):
                    return found[-1]
                break
    for n in candidates[:2]:
        ends: list[list[Layout]] = []
        for layouts in search.hypotheses(n):
            end = [layouts[cut.value] for cut in cuts]
            if end not in ends:
                ends.append(end)
                search.choose(layouts, n)
                found.append(search.result(n, layouts, True, sites))
    # Each site guesses for n examples, or for one.
    return max(
        found, key=lambda f: (f.batch - 1) * (len(sites) - len(f.coupled)), default=search.result(1, {}, True, sites)
    )


class _Search:
    def __init__(self, sites: list[Site], cuts: list[Cut], push: Push, coupled: frozenset[int], seed: int) -> None:
        self.cuts, self.push = cuts, push
        self.free = [site for site in sites if site.value not in coupled]
        self.passes = 0
        self.generator = torch.Generator().manual_seed(seed)

    def hypotheses(self, n: int) -> Iterator[dict[int, Layout]]:
        """Layouts of every value by one custom throughout: batch before or after time, flattened either way."""
        things: list[Site | Cut] = [*self.free, *self.cuts]
        options = {thing.value: Layout.candidates(thing.shape, n) for thing in things}
        seen: list[dict[int, Layout]] = []
        for late in _CUSTOMS:
            layouts = {
                v: min(
                    allowed,
                    key=lambda layout: (layout in late or layout is Layout.COUPLED) + (layout is Layout.COUPLED),
                )
                for v, allowed in options.items()
            }
            if layouts not in seen:
                seen.append(layouts)
                yield dict(layouts)

    def settles(self, layouts: dict[int, Layout]) -> bool:
        """Whether so few sites are left coupled (positions, which hold no examples) that no better answer is likely."""
        return 4 * sum(layouts[site.value] is Layout.COUPLED for site in self.free) <= len(self.free)

    def choose(self, layouts: dict[int, Layout], n: int) -> None:
        """Layouts of the sites, shape by shape, given those of the cuts; where no one layout serves a
        shape, by site."""
        shapes: dict[Shape, list[Site]] = {}
        ends = {cut.value for cut in self.cuts}
        for site in self.free:
            if site.value in ends:
                continue
            shapes.setdefault(site.shape, []).append(site)
        budget = self.passes + BUDGET
        for shape, group in reversed(shapes.items()):
            for layout in Layout.candidates(shape, n):
                layouts.update({site.value: layout for site in group})
                if self.is_clean(group, layouts, n)[0]:
                    break
            if layout is Layout.COUPLED and len(group) > 1:
                layouts.update({site.value: Layout.candidates(shape, n)[0] for site in group})
                self.resolve(group, layouts, n, budget)

    def is_clean(self, sites: Sequence[Site], layouts: dict[int, Layout], n: int) -> tuple[bool, bool]:
        """Whether tangents on half of the examples at these sites leave the other half's outputs alone; and whether
        they moved anything. Each half is tried, and then the halves of another split: one row that belongs to another
        example than it seems shows only where a split tells the two apart."""
        self.passes += 1
        alive = False
        for _ in range(SPLITS):
            half = torch.zeros(n)
            half[torch.randperm(n, generator=self.generator)[: max(n // 2, 1)]] = 1
            for examples in (half, 1 - half) if n > 1 else (half,):
                clean, moved = self._keeps_apart(sites, layouts, n, examples)
                alive = alive or moved
                if not clean:
                    return False, alive
        return True, alive

    def still_holds(self, layouts: dict[int, Layout], n: int) -> tuple[bool, bool]:
        """``is_clean`` of all sites at once, on one half."""
        half = torch.zeros(n)
        half[torch.randperm(n, generator=self.generator)[: max(n // 2, 1)]] = 1
        return self._keeps_apart(self.free, layouts, n, half)

    def _keeps_apart(
        self, sites: Sequence[Site], layouts: dict[int, Layout], n: int, half: Tensor
    ) -> tuple[bool, bool]:
        def tangent(layout: Layout) -> Callable[[Tensor], Tensor]:
            def of(s: Tensor) -> Tensor:
                noise = torch.randn(*s.shape, 1 + s.is_complex(), generator=self.generator)
                noise = (torch.view_as_complex(noise) if s.is_complex() else noise[..., 0]).to(s)
                return noise.mul_(layout.spread(half.to(s), tuple(s.shape)))

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

    def resolve(self, sites: Sequence[Site], layouts: dict[int, Layout], n: int, budget: int) -> None:
        """Halve the group until each leak has its site; there try the other layouts, else couple."""
        if self.passes >= budget:
            layouts.update({site.value: Layout.COUPLED for site in sites})
            return
        if not sites or self.is_clean(sites, layouts, n)[0]:
            return
        if len(sites) > 1:
            middle = len(sites) // 2
            self.resolve(sites[middle:], layouts, n, budget)
            self.resolve(sites[:middle], layouts, n, budget)
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
