"""Finds by trials which dimension of each tensor holds the examples, and where examples interact.

In a trial some examples get a tangent, and the others must not move. A layout that passes is right for every later step
in which the same derivatives flow. A layout that fails is replaced by another. If none passes, the site is *coupled*:
it takes the scalar derivative of the whole batch, which is always valid but noisier.

A layout is a partition of a site's entries. It is right if each part moves the matching part of every cut and no other
part. The parts need not be the examples that the user has in mind.

A run may carry several tangents at each site. One of them, at all sites, is called a *lane*.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from guessopt.graph import Cut, Positions
from guessopt.layout import Layout, Shape
from guessopt.linalg import rounding_of, size_of
from guessopt.sites import Site

#: From a site's output and the numbers of some lanes: the site's tangents in these lanes, ``[lanes, *shape]``.
Tangents = Callable[[Tensor, Sequence[int]], Tensor]

#: Runs the closure with tangents, by the site's index, in so many lanes. Yields for each lane the cuts' tangents; None
#: for a cut that does not move.
Push = Callable[[Mapping[int, Tangents], int], Iterator[list["Tensor | None"]]]

#: The most lanes of one run.
MAX_LANES = 8

#: The most trials of parts of a group in the search for one N. The sites that are left then are coupled.
MAX_TRIALS = 128

#: The most candidates for N that are tried.
MAX_CANDIDATES = 6
#: The most candidates for N that are searched site by site.
MAX_SEARCHED = 2

#: By custom, the layouts that are tried after the others: the customs are batch-first and batch-major, one of the two
#: reversed, and both reversed.
_CUSTOMS: tuple[frozenset[Layout], ...] = (
    frozenset({Layout.BATCH_SECOND, Layout.FLAT_T}),
    frozenset({Layout.BATCH_SECOND, Layout.FLAT}),
    frozenset({Layout.BATCH_FIRST, Layout.FLAT}),
    frozenset({Layout.BATCH_FIRST, Layout.FLAT_T}),
)

Layouts = dict[int, Layout]


@dataclass(frozen=True)
class Found:
    """N, and where the examples lie.

    Attributes:
        batch: N.
        layouts: the layouts of the sites, by value.
        ends: the layouts of the cuts, by value.
        coupled: indices of the sites after which examples interact, or whose examples lie in no known order.
        asleep: calls through which no tangent has come yet (a gate at zero).
        unproven: indices of sites with such a call on their way to the loss: the part behind it is not checked yet.
        positions: where the positions of the loss lie; None if there are none, or if they were not searched for.
    """

    batch: int
    layouts: Layouts
    ends: Layouts
    coupled: tuple[int, ...] = ()
    asleep: frozenset[int] = frozenset()
    unproven: tuple[int, ...] = ()
    positions: Positions | None = None

    @property
    def places(self) -> tuple[Any, ...]:
        """All that a graph is built from."""
        return self.batch, self.layouts, self.ends, self.positions

    @property
    def alive(self) -> bool:
        """Whether the tangent of every site has been seen to arrive, on every way to the loss."""
        return not self.unproven


def batch_candidates(
    sites: Sequence[Site], cuts: Sequence[Cut], given: int | None, others: Sequence[Shape] = ()
) -> list[int]:
    """Possible N, likeliest first.

    The likeliest N fits most sites and cuts. Among equals it is the cuts' first dimension, then the first dimension of
    most values. N = 1 fits everything: it comes last, and only if the loss reads a single row.

    Args:
        given: the number of losses, if the closure returns several. It comes first.
        others: shapes of the network's other values.
    """
    shapes = [site.shape for site in sites] + [cut.shape for cut in cuts]
    leading = Counter(shape[0] for shape in (*shapes, *others) if shape)
    sizes = leading.keys() | {shape[1] for shape in (*shapes, *others) if len(shape) > 1}
    rows = cuts[0].shape[0] if cuts and cuts[0].shape else 0

    def likelihood(n: int) -> tuple[int, bool, int, int]:
        fits = sum(Layout.candidates(shape, n)[0] is not Layout.COUPLED for shape in shapes)
        return fits, n == rows, leading[n], n

    possible = [
        n for n in sizes if n > 1 and all(Layout.candidates(cut.shape, n)[0] is not Layout.COUPLED for cut in cuts)
    ]
    best = sorted(possible, key=lambda n: (n == given, *likelihood(n)), reverse=True)[:MAX_CANDIDATES]
    return [*best, 1] if rows == 1 or given == 1 else best


def find_layouts(
    sites: Sequence[Site],
    cuts: Sequence[Cut],
    push: Push,
    *,
    given: int | None = None,
    others: Sequence[Shape] = (),
    coupled: frozenset[int] = frozenset(),
    doubtful: frozenset[int] = frozenset(),
    seed: int = 0,
    known: Found | None = None,
) -> Found:
    """Search for N and the layouts; see the module's docstring.

    Args:
        push: runs the closure.
        given, others: see ``batch_candidates``.
        coupled: values of sites known to lie before a batch normalisation.
        doubtful: values of sites that may hold no examples (positions). They have no say in which N it is.
        seed: of the choice of examples. A search with another seed may see a leak that this one misses.
        known: an earlier result. One run confirms it, or the search begins anew.
    """
    search = _Search(sites, cuts, push, coupled, doubtful, seed)
    if known is not None and all(cut.value in known.ends for cut in cuts):
        trial = _Trial(known.batch, search.completed(known), known.ends)
        if search.keep_apart([trial], search.splits)[0]:
            return search.result(trial)
    candidates = batch_candidates(search.core, cuts, given, others)
    found: list[_Trial] = []
    for hypothesis in search.clean(trial for n in candidates for trial in search.hypotheses(n)):
        if hypothesis.batch not in {trial.batch for trial in found}:
            found.append(search.with_doubtful(hypothesis))
            if search.settles(hypothesis):
                return search.result(found[-1])
    for n in candidates[:MAX_SEARCHED]:
        found.append(search.choose(n))
        if search.settles(found[-1]):
            return search.result(found[-1])
    return search.result(min(found, key=search.noise, default=_Trial(1, {}, {})))


@dataclass(frozen=True)
class _Trial:
    """Layouts of sites and cuts, by value, to be tried."""

    batch: int
    layouts: Layouts
    ends: Layouts


class _Search:
    """One search.

    Attributes:
        free: the sites whose layouts are searched for.
        core: those of them that decide on N.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        cuts: Sequence[Cut],
        push: Push,
        coupled: frozenset[int],
        doubtful: frozenset[int],
        seed: int,
    ) -> None:
        self.sites, self.cuts, self.push = sites, cuts, push
        self.free = [site for site in sites if site.shares is None and site.value not in coupled]
        shapes = {site.shape for site in self.free if site.value not in doubtful}
        self.core = [s for s in self.free if s.value not in doubtful or s.shape in shapes] or self.free
        self.seed, self.runs = seed, 0
        self.generator = torch.Generator().manual_seed(seed)
        #: Values of sites that only the loss reads: such a site's tangent is the cut's, and so is its layout.
        self.last = {cut.value for cut in cuts if not cut.shared}

    # --- what to try --------------------------------------------------------------------------------------------------

    def hypotheses(self, n: int) -> list[_Trial]:
        """Layouts of every value by one custom throughout: batch before or after time, flattened either way."""
        found: list[_Trial] = []
        for late in _CUSTOMS:

            def likeliest(thing: Site | Cut, late: frozenset[Layout] = late) -> Layout:
                allowed = Layout.candidates(thing.shape, n)
                return min(allowed, key=lambda layout: (layout is Layout.COUPLED, layout in late))

            layouts = {site.value: likeliest(site) for site in self.core}
            trial = _Trial(n, layouts, {cut.value: likeliest(cut) for cut in self.cuts})
            if trial not in found:
                found.append(trial)
        return found

    def completed(self, known: Found) -> Layouts:
        """The known layouts, and the likeliest one for each site that has none."""
        new = {s.value: Layout.candidates(s.shape, known.batch)[0] for s in self.free if s.value not in known.layouts}
        return known.layouts | new

    def clean(self, trials: Iterator[_Trial]) -> Iterator[_Trial]:
        """The trials that pass, in order. The first mostly passes and is tried by itself. Of the others, one run with
        half of the examples moving shows which are worth a closer look."""
        first = next(trials, None)
        if first is None:
            return
        if self.keep_apart([first], self.splits)[0]:
            yield first
        others = list(trials)
        for trial, passes in zip(others, self.keep_apart(others, self.half), strict=True):
            if passes and self.keep_apart([trial], self.splits)[0]:
                yield trial

    def settles(self, trial: _Trial) -> bool:
        """Whether so few sites are coupled that no better answer is likely."""
        return 4 * sum(trial.layouts[site.value] is Layout.COUPLED for site in self.core) <= len(self.core)

    def noise(self, trial: _Trial) -> float:
        """The noise of the estimate, in units of a coupled site's: such a site has one derivative for all examples, the
        others one for each."""
        shared = [trial.layouts.get(site.value, Layout.COUPLED) is Layout.COUPLED for site in self.core]
        return sum(1.0 if each else 1 / trial.batch for each in shared)

    def with_doubtful(self, trial: _Trial) -> _Trial:
        """Layouts for the sites that had no say in N."""
        rest = [site for site in self.free if site.value not in trial.layouts]
        return self._completed(trial.batch, [trial.ends], trial.layouts, rest)

    def choose(self, n: int) -> _Trial:
        """Layouts of all sites. The cuts get those layouts that keep the examples of most sites apart."""
        ends: list[Layouts] = []
        for hypothesis in self.hypotheses(n):
            if hypothesis.ends not in ends:
                ends.append(hypothesis.ends)
        return self._completed(n, ends, {}, self.free)

    def _completed(self, n: int, ends: list[Layouts], layouts: Layouts, sites: Sequence[Site]) -> _Trial:
        """``layouts`` with those of more sites. Sites of one shape are tried together. If no layout serves them all,
        they are halved until the sites that leak are found."""
        known = layouts
        groups: dict[Shape, list[Site]] = {}
        for site in sites:
            if site.value not in self.last:
                groups.setdefault(site.shape, []).append(site)
        pending, budget, layouts = list(groups.values()), MAX_TRIALS, dict(known)
        while pending:
            trials = [
                (number, _Trial(n, {site.value: layout for site in group}, each))
                for each in ends
                for number, group in enumerate(pending)
                for layout in Layout.candidates(group[0].shape, n)[:-1]
            ]
            passing = self.keep_apart([trial for _, trial in trials], self.half)
            serving: list[dict[int, Layouts]] = [{} for _ in ends]
            for (number, trial), passes in zip(trials, passing, strict=True):
                if passes:
                    serving[ends.index(trial.ends)].setdefault(number, trial.layouts)
            best = max(range(len(ends)), key=lambda k: sum(len(pending[number]) for number in serving[k]))
            ends, following = [ends[best]], list[list[Site]]()
            for number, group in enumerate(pending):
                fits = Layout.candidates(group[0].shape, n)[0] is not Layout.COUPLED
                if number in serving[best]:
                    layouts |= serving[best][number]
                elif len(group) == 1 or budget < 0 or not fits:
                    layouts |= {site.value: Layout.COUPLED for site in group}
                else:
                    following += [group[: len(group) // 2], group[len(group) // 2 :]]
            pending = following
            budget -= sum(len(Layout.candidates(group[0].shape, n)) - 1 for group in pending)
        layouts |= {site.value: ends[0][site.value] for site in sites if site.value in self.last}
        found = _Trial(n, layouts, ends[0])
        if known and all(layouts[v] is Layout.COUPLED for v in layouts.keys() - known.keys()):
            return found
        return found if self.keep_apart([found], self.splits)[0] else self._without_leaks(found)

    def _without_leaks(self, trial: _Trial) -> _Trial:
        """Couple each site that leaks on a closer look; if leaks remain, every site but the last."""
        apart = [site for site in self.free if trial.layouts[site.value] is not Layout.COUPLED]
        alone = [_Trial(trial.batch, {site.value: trial.layouts[site.value]}, trial.ends) for site in apart]
        leaks = [s.value for s, passes in zip(apart, self.keep_apart(alone, self.splits), strict=True) if not passes]
        found = _Trial(trial.batch, trial.layouts | dict.fromkeys(leaks, Layout.COUPLED), trial.ends)
        if self.keep_apart([found], self.splits)[0]:
            return found
        return _Trial(
            trial.batch,
            {site.value: trial.ends[site.value] if site.value in self.last else Layout.COUPLED for site in self.free},
            trial.ends,
        )

    # --- which examples move ------------------------------------------------------------------------------------------

    def splits(self, n: int) -> Tensor:
        """``[lanes, N]``: which examples move in which lane. All examples move in equally many lanes. Two examples
        whose sets of lanes differ are told apart: each moves in a lane in which the other does not. Up to N = 6 all
        sets differ. For larger N about five in six pairs of examples have different sets."""
        lanes = range(min(n, 4))
        codes = torch.zeros(0, len(lanes))
        for on in combinations(lanes, 1 if n < 4 else 2):
            codes = torch.cat([codes, torch.zeros(1, len(lanes)).index_fill_(1, torch.tensor(on), 1.0)])
        return codes[torch.randperm(n, generator=self.generator) % len(codes)].T

    def half(self, n: int) -> Tensor:
        """``[1, N]``: one half of the examples. The first is among them and the last is not: where positions are taken
        for examples, causal attention passes on what the first does, and not what the last does."""
        half = torch.zeros(1, n)
        half[0, torch.randperm(n - 2, generator=self.generator)[: n // 2 - 1] + 1] = 1
        half[0, 0] = 1
        return half

    def keep_apart(self, trials: Sequence[_Trial], examples: Callable[[int], Tensor]) -> list[bool]:
        """Whether, in each trial, the examples without a tangent stay where they are. Trials that differ only in the
        cuts' layouts share their lanes."""
        same: dict[Any, list[int]] = {}
        for number, trial in enumerate(trials):
            if trial.batch > 1 and any(layout is not Layout.COUPLED for layout in trial.layouts.values()):
                same.setdefault((trial.batch, *trial.layouts.items()), []).append(number)
        lanes = [(numbers, row) for numbers in same.values() for row in examples(trials[numbers[0]].batch)]
        clean = [True] * len(trials)
        for start in range(0, len(lanes), MAX_LANES):
            carried = [lane for lane in lanes[start : start + MAX_LANES] if any(clean[number] for number in lane[0])]
            which = [(trials[numbers[0]].layouts, row) for numbers, row in carried]
            moves = self.push(self._tangents(which), len(carried)) if carried else iter(())
            for numbers, row in carried:
                moved = next(moves)
                for number in numbers:
                    ends = trials[number].ends
                    clean[number] = clean[number] and all(
                        _stays(t, row, ends[cut.value])
                        for cut, t in zip(self.cuts, moved, strict=True)
                        if t is not None
                    )
                del moved  # before the next run
        return clean

    def _tangents(self, lanes: Sequence[tuple[Layouts, Tensor]]) -> dict[int, Tangents]:
        """The tangents of one run. A site's are drawn from a seed of their own: they are the same whether the lanes
        share a pass or have one each, so that every memory mode finds the same layouts."""
        self.runs += 1
        seed = hash((self.seed, self.runs))

        def tangents(site: Site) -> Tangents:
            def of(s: Tensor, wanted: Sequence[int]) -> Tensor:
                dtype = s.dtype if s.is_complex() else torch.float32
                generator = torch.Generator().manual_seed(hash((seed, site.index)))
                noise = torch.randn(s.shape, generator=generator, dtype=dtype).to(s)
                found = s.new_zeros(len(wanted), *s.shape)
                for k, lane in enumerate(wanted):
                    layouts, row = lanes[lane]
                    layout = layouts.get(site.value, Layout.COUPLED)
                    if layout is not Layout.COUPLED:
                        torch.mul(noise, layout.spread(row.to(s), tuple(s.shape)), out=found[k])
                return found

            return of

        moving = {v for layouts, _ in lanes for v, layout in layouts.items() if layout is not Layout.COUPLED}
        return {site.index: tangents(site) for site in self.free if site.value in moving}

    # --- the answer ---------------------------------------------------------------------------------------------------

    def result(self, trial: _Trial) -> Found:
        """Layouts of all sites and cuts: one that shares a guess has its partner's layout, any other is coupled."""
        layouts = {site.value: trial.layouts.get(site.value, Layout.COUPLED) for site in self.free}
        for site in reversed(self.sites):
            partner = site if site.shares is None else self.sites[site.shares]
            layouts.setdefault(site.value, layouts.get(partner.value, Layout.COUPLED))
        ends = {cut.value: trial.ends.get(cut.value, Layout.COUPLED) for cut in self.cuts}
        coupled = tuple(site.index for site in self.sites if layouts[site.value] is Layout.COUPLED)
        return Found(trial.batch, layouts, ends, coupled)


def _stays(tangent: Tensor, moving: Tensor, layout: Layout) -> bool:
    """Whether the examples that must not move have no tangent, up to rounding. Entries that are not finite count as
    zero."""
    if layout is Layout.COUPLED or not tangent.numel():
        return True
    size = size_of(tangent)
    outside = layout.sum_examples(size, len(moving)).cpu()[moving == 0].sum()
    result: bool = float(outside) <= rounding_of(tangent) * float(size.max()) * (size.numel() / len(moving)) ** 0.5
    return result
