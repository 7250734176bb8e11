"""Finds by trials which dimension of each tensor holds the positions of the loss, and which positions a site moves.

The loss of a language model is a sum over T positions. A trial moves the sites at some positions, and looks at others:

| trial | sites move | must be still | what it shows |
|---|---|---|---|
| later | from a border on | the output before the border | position t influences positions from t on (causal) |
| own | at half of the positions | the output at the other half | position t influences position t alone (last layers) |
| local | at one position | nothing | the output moves much more there than elsewhere |

Each example has a border, or a half, of its own. So one run tests many. A trial in which nothing moves shows nothing.
A site that is not causal keeps its positions if it is local (attention without a mask), else it has none. An influence
that spans few positions, or comes with few batches, may be missed at first: later searches look elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from guessopt.engine.probe import MAX_LANES, Found, Push, Tangents
from guessopt.graph import Cut, Positions
from guessopt.layout import Layout
from guessopt.linalg import rounding_of, size_of
from guessopt.sites import Influence, Site

#: Borders, and halves, that the trials of a search test: at least, if ``MAX_LANES`` runs are enough for as many.
TESTED = 24

#: Lanes of the trials that confirm an earlier result.
KNOWN_LANES = 2

#: Without causality: the square of the output's movement at the position that moves, over that elsewhere, at least.
MIN_OWN_MOVEMENT = 3.0

#: The fewest positions at which a site can be local.
MIN_LOCAL = 4

#: The most positions that are moved one by one.
MAX_POSITIONS = 8

#: The most trials for sites that fail together and are tried one by one.
MAX_SINGLE_TRIALS = 64


def find_positions(
    sites: Sequence[Site], cuts: Sequence[Cut], found: Found, push: Push, seed: int = 0, known: Positions | None = None
) -> Positions | None:
    """Search for T, the dimensions that hold the positions, and the influence of each site's positions. None if the
    loss has no positions.

    Args:
        found: where the examples lie.
        push: runs the closure.
        seed: of the choice of positions. A search with another seed may see an influence that this one misses.
        known: an earlier result. A trial or two confirm it. If they fail, the search begins anew, and adds the
            influences that it finds to the known ones.
    """
    search = _Search(sites, cuts, found, push, seed)
    if known is not None and search.holds(known):
        return known
    result = search.result()
    return result if known is None or result is None else joined(known, result)


def joined(known: Positions, new: Positions) -> Positions:
    """The larger influence of both: one that came with an earlier batch may come again. A site without positions in one
    of them has none."""
    if known.count != new.count or known.ends != new.ends:
        return new
    both = [v for v, dim in new.dims.items() if known.dims.get(v) == dim]
    order = list(Influence)
    larger = {v: max(known.influence[v], new.influence[v], key=order.index) for v in both}
    return replace(new.only(both), influence=larger)


def _worth(found: Positions) -> tuple[int, int]:
    return len(found.dims), list(found.influence.values()).count(Influence.LATER)


class _Lane(NamedTuple):
    """The sites of ``trial`` move where ``moving`` ``[N, T]`` is 1."""

    trial: Positions
    moving: Tensor


class _Search:
    def __init__(self, sites: Sequence[Site], cuts: Sequence[Cut], found: Found, push: Push, seed: int) -> None:
        self.sites, self.cuts, self.found, self.push, self.seed = sites, cuts, found, push, seed
        self.pick = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.lanes = min(max(-(-TESTED // found.batch), KNOWN_LANES), MAX_LANES)
        self.runs = 0

    def result(self) -> Positions | None:
        hypotheses = self.hypotheses()
        for hypothesis in hypotheses:
            if self.are_later([hypothesis])[0]:
                return self.with_own(replace(hypothesis, influence=dict.fromkeys(hypothesis.dims, Influence.LATER)))
        checked = [p for hypothesis in hypotheses if self.has_features(p := self.checked(hypothesis))]
        best = max(
            checked, key=lambda p: (len(p.dims), list(p.influence.values()).count(Influence.LATER)), default=None
        )
        return best and self.with_own(best)

    # --- what to try --------------------------------------------------------------------------------------------------

    def hypotheses(self) -> list[Positions]:
        """Likely answers, likeliest first: the first or the last dimension of length T throughout. T is the length of a
        dimension of the output that most sites have as well."""
        found: list[Positions] = []
        for cut in self.cuts:
            for dim, count in enumerate(self._row(cut, self.found.ends)):
                for last in (False, True) if count > 1 else ():
                    hypothesis = self._throughout(count, last, {cut.value: dim})
                    if self.has_features(hypothesis) and hypothesis not in found:
                        found.append(hypothesis)
        return sorted(found, key=lambda p: (-len(p.dims), min(p.ends.values())))

    def _throughout(self, count: int, last: bool, ends: dict[int, int]) -> Positions:
        """The first (or the last) dimension of length T everywhere."""

        def dims(things: Sequence[Site | Cut], layouts: Mapping[int, Layout]) -> dict[int, int]:
            rows = {thing.value: self._row(thing, layouts) for thing in things}
            return {
                value: len(row) - 1 - row[::-1].index(count) if last else row.index(count)
                for value, row in rows.items()
                if count in row
            }

        ends = dims(self.cuts, self.found.ends) | ends
        found = dims(self.sites, self.found.layouts)
        found |= {site.value: ends[site.value] for site in self.sites if site.value in ends}
        return Positions(count, ends, found, {})

    def _row(self, thing: Site | Cut, layouts: Mapping[int, Layout]) -> tuple[int, ...]:
        return layouts[thing.value].row_shape(thing.shape, self.found.batch)

    def has_features(self, found: Positions) -> bool:
        """Whether some site before the output has features at its positions. If none has, the positions are the
        classes of a head."""
        before = [s for s in self.sites if s.value in found.dims and s.value not in found.ends]
        return any(len(self._row(site, self.found.layouts)) > 1 for site in before)

    def holds(self, known: Positions) -> bool:
        """Whether an earlier result passes trials with other borders and halves."""
        self.lanes, lanes = KNOWN_LANES, self.lanes
        later = known.only(v for v, influence in known.influence.items() if influence is not Influence.ALL)
        own = known.only(v for v, influence in known.influence.items() if influence is Influence.OWN)
        held = (not later.dims or self.are_later([later])[0]) and (not own.dims or self.are_own([own])[0])
        self.lanes = lanes
        return held

    def checked(self, hypothesis: Positions) -> Positions:
        """The hypothesis without the sites that fail. Sites of one shape are tried together; those that fail together
        are halved until the failing sites are found."""
        groups: dict[object, list[int]] = {}
        for site in self.sites:
            if site.value in hypothesis.dims:
                groups.setdefault((site.shape, hypothesis.dims[site.value]), []).append(site.value)
        pending, influence, rest, budget = list(groups.values()), dict[int, Influence](), list[int](), MAX_SINGLE_TRIALS
        while pending:
            following: list[list[int]] = []
            trials = [hypothesis.only(group) for group in pending]
            for group, passes in zip(pending, self.are_later(trials), strict=True):
                if passes:
                    influence |= dict.fromkeys(group, Influence.LATER)
                elif len(group) == 1 or budget < 0:
                    rest += group
                else:
                    following += [group[: len(group) // 2], group[len(group) // 2 :]]
            pending, budget = following, budget - len(following)
        local = self.are_local([hypothesis.only([v]) for v in rest])
        influence |= {v: Influence.ALL for v, passes in zip(rest, local, strict=True) if passes}
        return replace(hypothesis.only(influence), influence=influence)

    def with_own(self, found: Positions) -> Positions:
        """The sites near the loss whose positions influence no other position. The network's first site of this kind is
        found by bisection."""
        later = [site.value for site in self.sites if found.influence.get(site.value) is Influence.LATER]
        low, high = 0, len(later)
        while low < high:
            middle = (low + high) // 2
            if self.are_own([found.only(later[middle:])])[0]:
                high = middle
            else:
                low = middle + 1
        return replace(found, influence=found.influence | dict.fromkeys(later[low:], Influence.OWN))

    # --- trials -------------------------------------------------------------------------------------------------------

    def are_later(self, trials: Sequence[Positions]) -> list[bool]:
        """Whether, in each trial, nothing before an example's border moves when the sites move from the border on."""
        t = torch.arange(trials[0].count)
        return self._are_still(trials, [t >= b[:, None] for b in self._borders(trials[0])])

    def are_own(self, trials: Sequence[Positions]) -> list[bool]:
        """Whether, in each trial, nothing moves at one half of an example's positions when the sites move at the
        other half."""
        halves = torch.rand(self.lanes, self.found.batch, trials[0].count, generator=self.generator)
        halves = halves.argsort(-1) < trials[0].count / 2
        return self._are_still(
            trials, [half[:1].expand_as(half) if self._shared(trials[0]) else half for half in halves]
        )

    def _borders(self, trial: Positions) -> Tensor:
        """``[lanes, N]``: each border as often as any other. The first and the last are among them."""
        wanted = self.lanes * (1 if self._shared(trial) else self.found.batch)
        ends = torch.tensor([1, trial.count - 1])
        rounds = -(-wanted // (trial.count - 1))
        rest = torch.cat([torch.randperm(trial.count - 1, generator=self.generator) + 1 for _ in range(rounds)])
        chosen = torch.cat([ends, rest])[:wanted] if wanted > 1 else rest[:1]
        return chosen.view(self.lanes, -1).expand(self.lanes, self.found.batch)

    def _shared(self, trial: Positions) -> bool:
        """Whether all examples of a lane must have one border: some tensor does not hold them apart."""
        layouts = [self.found.layouts[v] for v in trial.dims] + [self.found.ends[v] for v in trial.ends]
        return Layout.COUPLED in layouts

    def _are_still(self, trials: Sequence[Positions], masks: Sequence[Tensor]) -> list[bool]:
        """Whether, in each trial and for each mask, the output moves only where the sites move, and moves at all."""
        lanes = [_Lane(trial, mask.double()) for trial in trials for mask in masks]
        sizes, clean = self._sizes(lanes), list[bool]()
        for _ in trials:
            still, moves = True, False
            for mask in masks:
                for size, rounding in next(sizes):
                    outside = float((size * ~mask[: len(size)]).sum())
                    still, moves = still and outside <= rounding, moves or outside < float(size.sum())
            clean.append(still and moves)
        return clean

    def are_local(self, trials: Sequence[Positions]) -> list[bool]:
        """Whether, in each trial, the output moves much more at the position that moves than elsewhere."""
        count = trials[0].count if trials else 0
        if count < MIN_LOCAL:
            return [False] * len(trials)
        chosen = self.pick.sample(range(count), min(count, MAX_POSITIONS))
        masks = [(torch.arange(count) == position).double().expand(self.found.batch, -1) for position in chosen]
        sizes, found = self._sizes([_Lane(trial, mask) for trial in trials for mask in masks]), list[bool]()
        for _ in trials:
            energy = torch.zeros(len(chosen), len(chosen), dtype=torch.float64)
            for k in range(len(chosen)):
                for size, _ in next(sizes):
                    energy[k] += size.square().sum(0)[chosen]
            found.append(_is_diagonal(energy))
        return found

    # --- movement -----------------------------------------------------------------------------------------------------

    def _sizes(self, lanes: Sequence[_Lane]) -> Iterator[list[tuple[Tensor, float]]]:
        """For each lane and each cut with positions: the size of the movement, ``[N, T]``, and of its rounding."""
        for start in range(0, len(lanes), MAX_LANES):
            part = lanes[start : start + MAX_LANES]
            moves = self.push(self._tangents(part), len(part))
            for lane in part:
                moved = next(moves)
                found = [
                    self._size(cut, t, lane.trial.ends[cut.value])
                    for cut, t in zip(self.cuts, moved, strict=True)
                    if t is not None and cut.value in lane.trial.ends and t.numel()
                ]
                del moved  # before the next run
                yield found

    def _size(self, cut: Cut, t: Tensor, dim: int) -> tuple[Tensor, float]:
        size = size_of(t)
        largest, each = float(size.max()), self.found.ends[cut.value].sum_positions(size, self.found.batch, dim)
        return each.double().cpu(), rounding_of(t) * largest * (t.numel() / each.shape[1]) ** 0.5

    def _tangents(self, lanes: Sequence[_Lane]) -> dict[int, Tangents]:
        """The tangents of one run. A site's are drawn from a seed of their own; see ``probe``."""
        self.runs += 1
        seed = hash((self.seed, self.runs, 1))

        def tangents(site: Site) -> Tangents:
            def of(s: Tensor, wanted: Sequence[int]) -> Tensor:
                dtype = s.dtype if s.is_complex() else torch.float32
                generator = torch.Generator().manual_seed(hash((seed, site.index)))
                noise = torch.randn(s.shape, generator=generator, dtype=dtype).to(s)
                found = s.new_zeros(len(wanted), *s.shape)
                for k, number in enumerate(wanted):
                    if site.value in lanes[number].trial.dims:
                        torch.mul(noise, self._mask(site, lanes[number]).to(s), out=found[k])
                return found

            return of

        moving = {v for lane in lanes for v in lane.trial.dims}
        return {site.index: tangents(site) for site in self.sites if site.value in moving}

    def _mask(self, site: Site, lane: _Lane) -> Tensor:
        layout, moving = self.found.layouts[site.value], lane.moving
        if layout is Layout.COUPLED:  # which adds up the examples
            moving = moving[:1]
        return layout.spread_positions(moving, site.shape, self.found.batch, lane.trial.dims[site.value])


def _is_diagonal(energy: Tensor) -> bool:
    """Whether a matrix ``[moving position, position]`` of squared movements has a large diagonal. Positions that move
    more, or that are moved more, than others in general do not count: rows and columns are scaled."""
    scale = energy.sum(1, keepdim=True) * energy.sum(0, keepdim=True)
    scaled = torch.where(scale > 0, energy / scale, 0.0)
    own = scaled.diagonal()
    other = (scaled.sum() - own.sum()) / (scaled.numel() - len(own))
    return float(own.mean()) > MIN_OWN_MOVEMENT * float(other)
