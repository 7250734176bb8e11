"""The second run of ``memory="replay"`` and ``"stream"``: inputs and guesses are made again, used at once, forgotten.

The first run finds the directional derivatives ``D_n`` and keeps nothing. The second run starts from equal random
states. It makes each site's input ``x_i`` and guess ``y_i`` again, and turns ``D_n y_i[n]`` into parameter gradients at
once. ``"stream"`` hands each gradient to the base optimizer as soon as the gradient is whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from guessopt.credit import Credit
from guessopt.engine.forward import ForwardRun, GuessAt
from guessopt.engine.gradients import Gradients, scaled
from guessopt.engine.jvp.primal import PrimalRun
from guessopt.engine.transaction import Transaction
from guessopt.graph import Kind, SiteGraph
from guessopt.record import ForwardRecord, SavedCall
from guessopt.rng import RandomState
from guessopt.sites import Site

#: Takes whole gradients, by position.
Deliver = Callable[[dict[int, Tensor]], None]


@dataclass
class Journal:
    """All that ``GuessGradOptimizer.finish`` needs to complete a second run.

    Attributes:
        random: the random states before the step.
        records: one for each first run: ``D_n``, and the random state of the guesses before that run.
        done: positions of the parameters that are updated.
    """

    random: RandomState
    records: tuple[ForwardRecord, ...]
    done: set[int] = field(default_factory=set)


class Replay(ForwardRun):
    """A run without tangents. When it reaches a site, it forms the site's cotangent and, from the cotangent, gradients.

    Args:
        guesses: for each first run, the function that makes its guesses again; ``[K, ...]`` if K guesses shared it.
        records: for each first run, its record: ``d`` ``[N]`` or ``[K, N]``, and the exact errors if a site takes them.
        deliver: called with gradients by position, as soon as they are whole and the closure no longer reads their
            parameters. None: all gradients are returned at the end.
        done: positions of parameters whose gradients are not wanted.
    """

    def __init__(
        self,
        ids: Mapping[int, int],
        params: Mapping[int, Tensor],
        graph: SiteGraph,
        guesses: Sequence[GuessAt],
        records: Sequence[ForwardRecord],
        transaction: Transaction,
        *,
        frozen_statistics: bool,
        deliver: Deliver | None = None,
        done: Collection[int] = (),
    ) -> None:
        engine = PrimalRun(frozen_statistics=frozen_statistics)
        super().__init__(ids, graph, engine, guesses[0], records[0].params, transaction, keeps=False, repeats=True)
        self.share = 1 / sum(record.count for record in records)
        self.sources = [(guess, _rates(record, self.share)) for guess, record in zip(guesses, records, strict=True)]
        self.records = records
        self.deliver, self.done = deliver, frozenset(done)
        self.gradients = Gradients(graph, params, ids, records[0].params, self.positions if deliver else None)
        self.cotangents: dict[int, Tensor | None] = {}
        self.waiting: deque[SavedCall] = deque()
        self.due = due(graph, params) if deliver else {}
        self.whole: list[tuple[int, ...]] = []

    def replay(self, closure: Callable[[], object]) -> dict[int, Tensor]:
        """Run the closure. Returns the gradients that have not been delivered, by position.

        Raises:
            GraphMismatch: the closure made other calls.
        """
        self.check_end(self.run(closure))
        self.loss_calls.release()
        assert not self.waiting
        for record in self.records:
            self.gradients.close(record, self.share)
        rest = [p for p in self.gradients.params if p not in self.done]
        return self.gradients.take(rest)

    def call(self, index: int, *rest: Any) -> Any:
        out = super().call(index, *rest)
        self.whole += self.due.get(index, ())
        if self.whole:
            self._deliver()
        return out

    def _deliver(self) -> None:
        """Hand over the whole gradients, except those to which a call in ``waiting`` will add."""
        assert self.deliver is not None
        open_ = {p for saved in self.waiting for site in self.graph.sites_at[saved.call.index] for p in site.params}
        ready = [group for group in self.whole if open_.isdisjoint(group)]
        self.whole = [group for group in self.whole if not open_.isdisjoint(group)]
        positions = [p for group in ready for p in group if p not in self.done]
        if positions and (found := self.gradients.take(positions)):
            self.delivering = True  # stays True if ``deliver`` fails
            self.deliver(found)
            self.delivering = False

    def inject(self, site: Site, s: Tensor, in_place: bool) -> Tensor:
        """Form the site's cotangent. Nothing is injected: ``s`` is returned as it is."""
        primal = self.engine.primal(s)
        found: Tensor | None = None
        for guess, rates in self.sources:
            made = guess(site, primal, self.values)
            if made is None:
                continue
            if made.cotangents is not None:  # of this site or of earlier ones
                self.cotangents |= made.cotangents
                return s
            if made.directions is not None:
                self._add_directed(made.directions, [d for d, _ in rates])
                continue
            y = made.y if made.corrected is None else made.corrected
            assert y is not None
            for each, (d, credit) in zip(y if len(rates) > 1 else (y,), rates, strict=True):
                part = scaled(each, site, d, credit)
                found = part if found is None else found.add_(part)
        if found is None and site.cut is not None and site.shares is None:
            found = self._exact(site)
        if found is not None or site.shares is None:
            self.cotangents[site.index] = found
        return s

    def _exact(self, site: Site) -> Tensor | None:
        assert site.cut is not None
        errors = self.records[0].errors  # equal in every first run
        return errors[site.cut] if errors else None

    def _add_directed(self, directions: list[Tensor], rates: Sequence[Tensor]) -> None:
        """Add ``sum_n D_n v[n]`` to the gradients of parameters that were guessed example by example."""
        assert self.saved is not None
        for k, rate in enumerate(rates):
            self.saved.directions = [v[k] for v in directions] if len(rates) > 1 else directions
            self.gradients.direct(self.saved, rate)

    def leave(self, saved: SavedCall) -> None:
        """Add gradients in the order of the calls. A call that lacks a cotangent holds up the calls after it."""
        if saved.directions is not None:
            return
        self.waiting.append(saved)
        while self.waiting:
            sites = self.graph.sites_at[self.waiting[0].call.index]
            if not all(self._is_known(site) for site in sites):
                return
            known = {site.index: self.cotangents.pop(site.index) for site in sites}
            self.gradients.saved(self.waiting.popleft(), {k: g for k, g in known.items() if g is not None})
        self.cotangents.clear()

    def _is_known(self, site: Site) -> bool:
        if site.index not in self.cotangents:
            if site.shares is None or not self._is_known(self.graph.sites[site.shares]):
                return False
            found = self.cotangents[site.shares]
            self.cotangents[site.index] = found if found is not None or site.cut is None else self._exact(site)
        return True


def _rates(record: ForwardRecord, share: float) -> list[tuple[Tensor, Credit | None]]:
    """``D_n`` and the credit of each guess of a run, times ``share``."""
    d, credit = record.d, record.credit
    if share != 1:
        d, credit = d * share, credit and credit.map(lambda each: each * share)
    if d.dim() == 1:
        return [(d, credit)]
    return [(d[k], credit and credit.map(lambda each, k=k: each[k])) for k in range(len(d))]


def due(graph: SiteGraph, params: Collection[int]) -> dict[int, list[tuple[int, ...]]]:
    """By call index, the groups of parameters (positions) that are due after the call: their gradients are whole and
    their values are read no more, except by calls that wait.

    Parameters of one expression (a weight norm's two factors) form a group: the expression's reverse pass reads them
    all. Parameters that the closure reads without derivative, or in its loss, are never due: they stay to the end."""
    group: dict[int, set[int]] = {p: {p} for p in params}
    for reads, kind in zip(graph.reads, graph.kinds, strict=True):
        if kind is Kind.EXPRESSION:
            union = set().union(*(group[p] for p in reads if p in group))
            for p in union:
                group[p] = union
    last = {p: index for index, reads in enumerate(graph.reads) for p in reads}
    found: dict[int, list[tuple[int, ...]]] = {}
    for p in params:
        if p == min(group[p]) and group[p].isdisjoint(graph.loss_params | graph.stopped_params):
            read = [q for q in sorted(group[p]) if q in last]
            if read:
                found.setdefault(max(last[q] for q in read), []).append(tuple(read))
    return found
