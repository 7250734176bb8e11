"""Finds by trials which dimension of each tensor holds the positions of the loss, and which sites are causal.

The loss of a language model is a sum over T positions. A trial moves a site at the positions from ``start`` on. If no
part of the network's output before ``start`` moves, the chosen dimension is the right one, and the site is causal. A
site that fails may still have positions (attention without a mask). Then a trial moves a random half of the positions:
the output must move there much more than elsewhere. A site that fails this trial as well has no positions.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from guessopt.engine.probe import MAX_LANES, Found, Push, Tangents, rounding_of
from guessopt.graph import Cut, Positions
from guessopt.layout import Layout
from guessopt.sites import Site

#: Without causality, the output's movement at a site's own positions over the movement elsewhere, at least.
MIN_OWN_MOVEMENT = 1.5

#: The most trials for sites that fail together and are tried one by one.
MAX_SINGLE_TRIALS = 64


def find_positions(
    sites: Sequence[Site], cuts: Sequence[Cut], found: Found, push: Push, seed: int = 0, known: Positions | None = None
) -> Positions | None:
    """Search for T, the dimensions that hold the positions, and the causal sites. None if the loss has no positions.

    Args:
        found: where the examples lie.
        push: runs the closure.
        seed: of the choice of positions. A search with another seed may see a leak that this one misses.
        known: an earlier result. One run confirms it, or the search begins anew.
    """
    search = _Search(sites, cuts, found, push, seed)
    if known is not None and known.dims.keys() == known.causal and search.are_causal([known])[0]:
        return known
    hypotheses = search.hypotheses()
    for hypothesis in hypotheses:
        if search.are_causal([hypothesis])[0]:
            return replace(hypothesis, causal=frozenset(hypothesis.dims))
    checked = [search.checked(hypothesis) for hypothesis in hypotheses]
    best = max(checked, key=lambda p: (len(p.causal), len(p.dims)), default=None)
    return best if best is not None and best.dims else None


class _Search:
    def __init__(self, sites: Sequence[Site], cuts: Sequence[Cut], found: Found, push: Push, seed: int) -> None:
        self.sites, self.cuts, self.found, self.push, self.seed = sites, cuts, found, push, seed
        self.pick = random.Random(seed)
        self.runs = 0

    # --- what to try --------------------------------------------------------------------------------------------------

    def hypotheses(self) -> list[Positions]:
        """Likely answers, likeliest first: the first or the last dimension of length T throughout. T is the length of a
        dimension of the output that most sites have as well; a feature map's channels come last."""
        found: list[Positions] = []
        for cut in self.cuts:
            row = self._row(cut, self.found.ends)
            for dim, count in enumerate(row):
                for last in (False, True):
                    if count < 2 or (last and row.count(count) > 1 and dim == row.index(count)):
                        continue
                    hypothesis = self._throughout(count, last, {cut.value: dim})
                    if hypothesis.dims and hypothesis not in found:
                        found.append(hypothesis)
        served = Counter({k: len(p.dims) for k, p in enumerate(found)})
        return [found[k] for k in sorted(served, key=lambda k: (-served[k], min(found[k].ends.values()), k))]

    def _throughout(self, count: int, last: bool, ends: dict[int, int]) -> Positions:
        """The first (or the last) dimension of length T everywhere. A site holds features at its positions: a row of
        one dimension is no site's row with positions, unless the network's output has no features either."""

        def dims(
            things: Sequence[Site | Cut], layouts: Mapping[int, Layout], features: bool
        ) -> Iterator[tuple[int, int]]:
            for thing in things:
                row = self._row(thing, layouts)
                if count in row and (len(row) > 1 or not features):
                    yield thing.value, len(row) - 1 - row[::-1].index(count) if last else row.index(count)

        others = [cut for cut in self.cuts if cut.value not in ends]
        ends = ends | dict(dims(others, self.found.ends, False))
        features = any(len(self._row(cut, self.found.ends)) > 1 for cut in self.cuts if cut.value in ends)
        on_cuts = {cut.value for cut in self.cuts if cut.value in ends}
        own = [site for site in self.sites if site.value not in on_cuts]
        found = dict(dims(own, self.found.layouts, True))
        if not features:
            found = {v: k for v, k in found.items() if v not in on_cuts}
        found |= {site.value: ends[site.value] for site in self.sites if site.value in on_cuts and found}
        return Positions(count, ends, found, frozenset())

    def _row(self, thing: Site | Cut, layouts: Mapping[int, Layout]) -> tuple[int, ...]:
        return layouts[thing.value].row_shape(thing.shape, self.found.batch)

    def checked(self, hypothesis: Positions) -> Positions:
        """The hypothesis without the sites that fail. Sites of one shape are tried together; those that fail together
        are halved until the failing sites are found."""
        groups: dict[object, list[int]] = {}
        for site in self.sites:
            if site.value in hypothesis.dims:
                groups.setdefault((site.shape, hypothesis.dims[site.value]), []).append(site.value)
        pending, causal, rest, budget = list(groups.values()), set[int](), list[int](), MAX_SINGLE_TRIALS
        while pending:
            trials = [replace(hypothesis, dims={v: hypothesis.dims[v] for v in group}) for group in pending]
            following: list[list[int]] = []
            for group, passes in zip(pending, self.are_causal(trials, 2), strict=True):
                if passes:
                    causal.update(group)
                elif len(group) == 1 or budget < 0:
                    rest += group
                else:
                    following += [group[: len(group) // 2], group[len(group) // 2 :]]
            pending, budget = following, budget - len(following)
        alone = [replace(hypothesis, dims={v: hypothesis.dims[v]}) for v in rest]
        kept = causal | {v for v, own in zip(rest, self.are_local(alone), strict=True) if own}
        dims = {v: k for v, k in hypothesis.dims.items() if v in kept}
        return replace(hypothesis, dims=dims, causal=frozenset(causal))

    # --- which positions move -----------------------------------------------------------------------------------------

    def starts(self, count: int, most: int) -> list[int]:
        """Positions from which on a site is moved: the last, the middle, and random ones."""
        chosen = [count - 1, max(count // 2, 1), 1, self.pick.randrange(1, count)]
        return list(dict.fromkeys(chosen))[:most]

    def are_causal(self, trials: Sequence[Positions], most: int = 3) -> list[bool]:
        """Whether, in each trial, nothing before ``start`` moves when the sites move from ``start`` on."""
        lanes = [(k, start) for k, trial in enumerate(trials) for start in self.starts(trial.count, most)]
        rows = [(torch.arange(trials[k].count) >= start).float() for k, start in lanes]
        clean = [True] * len(trials)
        for (k, start), moved in zip(lanes, self._moved([trials[k] for k, _ in lanes], rows), strict=True):
            clean[k] = clean[k] and all(_is_still(size[:, :start], size, t) for size, t in moved)
        return clean

    def are_local(self, trials: Sequence[Positions]) -> list[bool]:
        """Whether, in each trial, the output moves much more at a site's own positions than elsewhere."""
        rows = []
        for trial in trials:
            order = torch.tensor(self.pick.sample(range(trial.count), trial.count))
            rows.append((order < trial.count // 2).float())
        found = []
        for row, moved in zip(rows, self._moved(trials, rows), strict=True):
            own = sum(float(size.square().sum(0)[row == 1].mean()) for size, _ in moved)
            other = sum(float(size.square().sum(0)[row == 0].mean()) for size, _ in moved)
            found.append(own > MIN_OWN_MOVEMENT * other)
        return found

    def _moved(self, trials: Sequence[Positions], rows: Sequence[Tensor]) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """For each trial, whose sites move at the positions of ``rows``: of each cut with positions, the size of the
        movement, ``[N, T]``, and the movement itself."""
        for start in range(0, len(trials), MAX_LANES):
            part = list(zip(trials[start : start + MAX_LANES], rows[start : start + MAX_LANES], strict=True))
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
        seed = hash((self.seed, self.runs, "positions"))
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
