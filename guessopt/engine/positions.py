"""Finds by trials which dimension of each tensor holds the positions of the loss, and which positions a site moves.

The loss of a language model is a sum over T positions. A trial moves sites at the positions from a border on. If no
part of the network's output before the border moves, the chosen dimension is the right one, and position t of the site
influences the positions ``t' >= t`` alone: the site is causal. If also nothing moves from a border on when the sites
move before it, position t influences position t alone (the last layers of a transformer).

A site that is not causal may still have positions (attention without a mask). Then trials move one position each: the
output must move there much more than elsewhere. A site that fails these trials as well has no positions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from guessopt.engine.probe import MAX_LANES, Found, Push, Tangents, rounding_of
from guessopt.graph import Cut, Positions
from guessopt.layout import Layout
from guessopt.sites import Influence, Site

#: Without causality: the square of the output's movement at the position that moves, over that elsewhere, at least.
MIN_OWN_MOVEMENT = 3.0

#: Borders of trials at random positions, beside the first, the middle and the last.
RANDOM_BORDERS = 3

#: Borders of the trials that confirm an earlier result.
KNOWN_BORDERS = 2

#: The most positions that are moved one by one.
MAX_POSITIONS = 8

#: The most trials for sites that fail together and are tried one by one.
MAX_SINGLE_TRIALS = 64


def find_positions(
    sites: Sequence[Site],
    cuts: Sequence[Cut],
    found: Found,
    push: Push,
    seed: int = 0,
    known: Positions | None = None,
    lanes: int = MAX_LANES,
) -> Positions | None:
    """Search for T, the dimensions that hold the positions, and the influence of each site's positions. None if the
    loss has no positions.

    Args:
        found: where the examples lie.
        push: runs the closure.
        seed: of the choice of positions. A search with another seed may see a leak that this one misses.
        known: an earlier result. A trial or two confirm it, or the search begins anew.
        lanes: the most lanes of one run; the tangents of the output take memory.
    """
    search = _Search(sites, cuts, found, push, seed, lanes)
    if known is not None and search.holds(known):
        return known
    hypotheses = search.hypotheses()
    for hypothesis in hypotheses:
        if search.are_still([hypothesis])[0]:
            return search.with_own(replace(hypothesis, influence=dict.fromkeys(hypothesis.dims, Influence.LATER)))
    checked = [p for hypothesis in hypotheses if search.has_features(p := search.checked(hypothesis))]
    best = max(
        checked, key=lambda p: (len(p.dims), sum(i is Influence.LATER for i in p.influence.values())), default=None
    )
    return best and search.with_own(best)


class _Search:
    def __init__(
        self, sites: Sequence[Site], cuts: Sequence[Cut], found: Found, push: Push, seed: int, lanes: int
    ) -> None:
        self.sites, self.cuts, self.found, self.push, self.seed = sites, cuts, found, push, seed
        self.lanes = lanes
        self.pick = random.Random(seed)
        self.runs = 0
        self._borders: dict[int, list[int]] = {}

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
        """Whether an earlier result passes a trial at other, random borders."""
        self._borders[known.count] = [self.pick.randrange(1, known.count) for _ in range(KNOWN_BORDERS)]
        later = known.only(v for v, influence in known.influence.items() if influence is not Influence.ALL)
        own = known.only(v for v, influence in known.influence.items() if influence is Influence.OWN)
        held = self.are_still([later])[0] and self.are_still([own], earlier=True)[0]
        del self._borders[known.count]
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
            for group, passes in zip(pending, self.are_still(trials), strict=True):
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
            if self.are_still([found.only(later[middle:])], earlier=True)[0]:
                high = middle
            else:
                low = middle + 1
        return replace(found, influence=found.influence | dict.fromkeys(later[low:], Influence.OWN))

    # --- which positions move -----------------------------------------------------------------------------------------

    def borders(self, count: int) -> list[int]:
        """Positions at which trials divide the others: the last, the middle, the first, and random ones. An influence
        on earlier positions is seen if a border lies between cause and effect."""
        if count not in self._borders:
            chosen = [count - 1, max(count // 2, 1), 1, *(self.pick.randrange(1, count) for _ in range(RANDOM_BORDERS))]
            self._borders[count] = list(dict.fromkeys(chosen))
        return self._borders[count]

    def are_still(self, trials: Sequence[Positions], *, earlier: bool = False) -> list[bool]:
        """Whether, in each trial, nothing before a border moves when the sites move from the border on. ``earlier``:
        nothing from the border on moves when the sites move before it."""
        lanes = [(k, at) for k, trial in enumerate(trials) if trial.dims for at in self.borders(trial.count)]
        rows = [((torch.arange(trials[k].count) < at) == earlier).float() for k, at in lanes]
        clean = [True] * len(trials)
        for (k, at), moved in zip(lanes, self._moved([trials[k] for k, _ in lanes], rows), strict=True):
            for size, t in moved:
                clean[k] = clean[k] and _is_still(size[:, at:] if earlier else size[:, :at], size, t)
        return clean

    def are_local(self, trials: Sequence[Positions]) -> list[bool]:
        """Whether, in each trial, the output moves much more at the position that moves than elsewhere."""
        chosen = [self.pick.sample(range(trial.count), min(trial.count, MAX_POSITIONS)) for trial in trials]
        lanes = [(k, position) for k, positions in enumerate(chosen) for position in positions]
        rows = [(torch.arange(trials[k].count) == position).float() for k, position in lanes]
        energy: list[list[Tensor]] = [[] for _ in trials]
        for (k, _), moved in zip(lanes, self._moved([trials[k] for k, _ in lanes], rows), strict=True):
            squares = [size.square().sum(0)[chosen[k]] for size, _ in moved]
            energy[k].append(torch.stack(squares).sum(0) if squares else torch.zeros(len(chosen[k])))
        return [_is_diagonal(torch.stack(each)) for each in energy]

    def _moved(self, trials: Sequence[Positions], rows: Sequence[Tensor]) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """For each trial, whose sites move at the positions of ``rows``: of each cut with positions, the size of the
        movement, ``[N, T]``, and the movement itself."""
        for start in range(0, len(trials), self.lanes):
            part = list(zip(trials[start : start + self.lanes], rows[start : start + self.lanes], strict=True))
            tangents = self.push(self._tangents(part), len(part))
            for k, (trial, _) in enumerate(part):
                moved = []
                for cut, t in zip(self.cuts, tangents, strict=True):
                    if t is not None and cut.value in trial.ends:
                        layout, dim = self.found.ends[cut.value], trial.ends[cut.value]
                        size = t[k].abs().double().nan_to_num(0.0, 0.0, 0.0)
                        moved.append((layout.sum_positions(size, self.found.batch, dim).cpu(), t[k]))
                yield moved

    def _tangents(self, lanes: Sequence[tuple[Positions, Tensor]]) -> dict[int, Tangents]:
        """The tangents of one run. A site's are drawn from a seed of their own; see ``probe``."""
        self.runs += 1
        seed = hash((self.seed, self.runs, 1))
        batch, layouts = self.found.batch, self.found.layouts

        def tangents(site: Site) -> Tangents:
            def of(s: Tensor, wanted: Sequence[int]) -> Tensor:
                dtype = s.dtype if s.is_complex() else torch.float32
                generator = torch.Generator().manual_seed(hash((seed, site.index)))
                noise = torch.randn(s.shape, generator=generator, dtype=dtype).to(s)
                found = s.new_zeros(len(wanted), *s.shape)
                for k, lane in enumerate(wanted):
                    trial, row = lanes[lane]
                    if site.value in trial.dims:
                        each = row.to(s).expand(batch, -1)
                        layout = layouts[site.value]
                        if layout is Layout.COUPLED:
                            each = each / batch  # the layout adds up the examples
                        torch.mul(
                            noise,
                            layout.spread_positions(each, tuple(s.shape), batch, trial.dims[site.value]),
                            out=found[k],
                        )
                return found

            return of

        moving = {v for trial, _ in lanes for v in trial.dims}
        return {site.index: tangents(site) for site in self.sites if site.value in moving}


def _is_still(before: Tensor, size: Tensor, tangent: Tensor) -> bool:
    """Whether nothing has moved, up to rounding. ``size``: the movement by example and position; ``before``: the part
    of it that must be still."""
    if not size.numel():
        return True
    entries = tangent.numel() / size.shape[1]
    most: float = rounding_of(tangent) * float(tangent.abs().max().double()) * entries**0.5
    return float(before.sum()) <= most


def _is_diagonal(energy: Tensor) -> bool:
    """Whether a matrix ``[moving position, position]`` of squared movements has a large diagonal. Positions that move
    more, or that are moved more, than others in general do not count: rows and columns are scaled."""
    scale = energy.sum(1, keepdim=True) * energy.sum(0, keepdim=True)
    scaled = torch.where(scale > 0, energy / scale, 0.0)
    own = scaled.diagonal()
    other = (scaled.sum() - own.sum()) / (scaled.numel() - len(own))
    return float(own.mean()) > MIN_OWN_MOVEMENT * float(other)
