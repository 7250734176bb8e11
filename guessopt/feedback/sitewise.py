"""One step of learned feedback where every site has a ``B`` of its own: without a residual stream.

| phase (see ``LearningStep``) | at a site | at its end |
|---|---|---|
| initialise | ``B`` begins at the product of the weights (``initial``) | |
| observe | ``q_n += B_i^T M_i y_i[n]``; moments of ``M_i y_i`` | ``e_n``, ``D_n``, ``d_n = v'[n] - q_n`` |
| subtract | ``D'_n -= <c_i[n], y_i[n]>`` | ``D'_n`` |
| predict | ``B_i`` learns from ``d_n``; ``g^_i = c_i + gamma D'_n y_i`` | |

``c_i = M_i B_i e_n``, or ``c_i = M_i W_{i+1}^T c_{i+1}`` with ``ahead=1``. The second form is known when the pass has
reached the next matrix site: until then site i waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guessopt.feedback.correction import Correction, Remainder, amplitude
from guessopt.feedback.fitting import Fitting
from guessopt.feedback.initial import Initialisation, before_next
from guessopt.feedback.options import FeedbackOptions
from guessopt.feedback.sitewise_plan import SitewisePlan
from guessopt.feedback.updates import TINY, State, has_shape, moments, normalised_gain, samples, shared_gain, stepped
from guessopt.graph import SiteGraph
from guessopt.learning import LearningStep, Noise
from guessopt.record import ForwardRecord
from guessopt.sites import Site
from guessopt.tracing.context import SiteContext

#: Largest amplitude of a guess; the smallest is 1.
MAX_AMPLITUDE = 1e4


class Prediction(NamedTuple):
    """A site's index, its predicted cotangent (None: there is no prediction) and its guess (None: there is none)."""

    site: int
    c: Tensor | None
    y: Tensor | None


class Sitewise(LearningStep):
    """One step.

    Attributes:
        before: the states as the step begins, by site index; None without one that fits.
        regressors: ``r = M y`` of each site, kept by ``estimate`` alone.
        tangent: ``q_n``, the tangent of the output that the ``B`` predict.
    """

    def __init__(
        self,
        options: FeedbackOptions,
        sites: tuple[Site, ...],
        graph: SiteGraph,
        states: dict[int, Any],
        noise: Noise,
    ) -> None:
        self.options, self.graph = options, graph
        own = next((state for state in states.values() if state is not None and "B" in state), None)
        self.plan = SitewisePlan.of(options, sites, graph, None if own is None else "power" not in own)
        graph.cached_results["by weights", options] = self.plan.by_weights
        self.before = {
            index: state if has_shape(state := states[index], map_.b_shape, self.plan.by_weights) else None
            for index, map_ in self.plan.maps.items()
        }
        self.correction = Correction(options.gamma, graph, states, self.plan.coupled)
        self.fitting = Fitting(options, self.plan.fitted, self.before)
        self.initial = Initialisation(options, graph, self.plan, self.before, noise)
        self.fitted: dict[int, State] = {}
        self.moments: dict[int, State] = {}
        self.samples: dict[int, int] = {}
        self.regressors: dict[int, Tensor] = {}
        self.updated: dict[int, State] = {}
        self.tangent: Any = 0
        self.has_guesses = False
        self._pending = deque[tuple[SiteContext, Tensor]]()
        self.open()

    # --- all at once --------------------------------------------------------------------------------------------------

    def estimate(
        self, contexts: dict[int, SiteContext], record: ForwardRecord, consume: Callable[[dict[int, Tensor]], None]
    ) -> dict[int, Tensor]:
        for index in tuple(self.initial.uninitialised):
            ahead = self.plan.next_site.get(index)
            self.initial.at_product(contexts[index], None if ahead is None else contexts[ahead])
        guesses = {index: record.guesses[index] for index in contexts if index in record.guesses}
        for index, y in guesses.items():
            self._observe(contexts[index], y, keep=True)
        self.close(record)
        if not self.subtracts:
            for index in guesses:
                del record.guesses[index]
            self._consume(contexts, guesses, consume)
            return {}
        predictions = [p for index, ctx in contexts.items() for p in self._predictions(ctx, guesses.get(index))]
        for prediction in predictions:
            self._subtract_explained(prediction)
        for index in guesses:
            self._learn(contexts[index], guesses[index])
        found = ((p.site, self._corrected(p)) for p in predictions)
        return {index: c for index, c in found if c is not None}

    def _consume(
        self, contexts: dict[int, SiteContext], guesses: dict[int, Tensor], consume: Callable[[dict[int, Tensor]], None]
    ) -> None:
        """Consume each cotangent as soon as it is known, in the order of the calls: so gradients add up in one order in
        every memory mode."""
        order, known = deque(contexts), dict[int, Tensor | None]()
        for index in tuple(contexts):
            known |= self.cotangents(contexts.pop(index), guesses.pop(index, None))
            while order and order[0] in known:
                c = known.pop(order[0])
                if c is not None:
                    consume({order[0]: c})
                order.popleft()

    # --- site by site -------------------------------------------------------------------------------------------------

    @property
    def needs_init(self) -> bool:
        return bool(self.initial.uninitialised)

    def init(self, ctx: SiteContext, y: Tensor | None) -> None:
        self.initial.tell(ctx)

    def observe(self, ctx: SiteContext, y: Tensor) -> None:
        """A site whose segment draws random numbers waits until the closure has drawn them."""
        self._pending.append((ctx.held() if self._pending or ctx.awaits_draws else ctx, y))
        while self._pending and not self._pending[0][0].awaits_draws:
            self._observe(*self._pending.popleft(), keep=False)

    def _observe(self, ctx: SiteContext, y: Tensor, keep: bool) -> None:
        """``q += B^T r`` and the moments of ``r = M y``."""
        self.has_guesses, index = True, ctx.site.index
        map_ = self.plan.maps.get(index)
        if map_ is None or self.plan.by_weights or not self.options.beta:
            return
        state, r = self.before[index], map_.push_forward(ctx, y)
        if state is not None:
            self.tangent = self.tangent + map_.predict_tangent(r, state["B"])
        self.moments[index] = moments(state, r, amplitude(state))
        self.samples[index] = samples(r)
        if keep:
            self.regressors[index] = r

    def close(self, record: ForwardRecord) -> None:
        for ctx, y in self._pending:
            self._observe(ctx, y, keep=False)
        self._pending.clear()
        self.errors, self.remainder = record.errors, Remainder(record.d, record.credit)
        self.e = self.plan.output.join(dict(enumerate(record.errors)))
        measured = self.plan.output.join(dict(enumerate(record.tangents))) if self.moments else None
        if measured is None:
            self.moments = {}
        else:
            self.d = measured - self.tangent
            self.shared_gain = shared_gain([(new, self.samples[index]) for index, new in self.moments.items()])

    @property
    def subtracts(self) -> bool:
        return self.has_guesses and (self.options.gamma != 0 or bool(self.plan.coupled))

    def open(self) -> None:
        self._waiting: dict[int, list[tuple[SiteContext, Tensor | None]]] = {}
        self.initial.open()

    def subtract(self, ctx: SiteContext, y: Tensor | None) -> None:
        for prediction in self._predictions(ctx, y):
            self._subtract_explained(prediction)

    def cotangents(self, ctx: SiteContext, y: Tensor | None) -> dict[int, Tensor | None]:
        if y is not None:
            self._learn(ctx, y)
        return {p.site: self._corrected(p) for p in self._predictions(ctx, y)}

    # --- predictions --------------------------------------------------------------------------------------------------

    def _predictions(self, ctx: SiteContext, y: Tensor | None) -> list[Prediction]:
        """The predictions that are known now: of the sites that have waited for this one, and of this one unless it
        waits for the next."""
        index, plan = ctx.site.index, self.plan
        ahead, cut = (plan.next_site.get(index), plan.next_cut.get(index)) if self.options.ahead else (None, None)
        ahead = None if ahead is None or self.before[ahead] is None else ahead
        waiting, state, c = self._waiting.pop(index, ()), self.before.get(index), None
        found: list[Prediction] = []
        if state is not None and (waiting or (ahead is None and cut is None)):
            assert self.e is not None
            c = plan.maps[index].pull_back(ctx, self.e, state["B"])  # M_i B_i e
            found += [Prediction(each.site.index, self._through_next(each, c), guess) for each, guess in waiting]
        if ahead is not None:
            self._waiting.setdefault(ahead, []).append((ctx.held(), y))
        elif cut is not None:
            found.append(Prediction(index, self._through_next(ctx, self.errors[cut]), y))
        else:
            found.append(Prediction(index, c, y))
        return found

    def _through_next(self, ctx: SiteContext, c: Tensor) -> Tensor:
        """``M_i u`` with ``u = W_{i+1}^T c_{i+1}``. ``B_i e`` is fitted to ``u``, unless ``B_i`` is new."""
        u, index = before_next(ctx, c), ctx.site.index
        if index in self.plan.fitted and index not in self.initial.states and index not in self.fitted:
            assert self.e is not None
            self.fitted[index], _ = self.fitting.step(index, self.e, self.plan.maps[index].cell_means(u))
        return ctx.pull_back(u, spent=True)

    def _subtract_explained(self, p: Prediction) -> None:
        if p.c is not None and p.y is not None:
            self.remainder.subtract_explained(p.c, p.y, self.graph.sites[p.site], self.graph.batch)

    def _corrected(self, p: Prediction) -> Tensor | None:
        return p.c if p.y is None else self.correction.apply(p.site, p.c, p.y, self.remainder)

    # --- learning -----------------------------------------------------------------------------------------------------

    def _learn(self, ctx: SiteContext, y: Tensor) -> None:
        """A normalised least-mean-squares step: ``B_i += gain mean_n r_n d_n^T / a_i^2``."""
        index, options = ctx.site.index, self.options
        if index not in self.moments or index in self.updated:
            return
        map_, state, new = self.plan.maps[index], self.before[index], self.moments[index]
        r = self.regressors.pop(index) if index in self.regressors else map_.push_forward(ctx, y)
        gradient = map_.outer(r, self.d) / (self.samples[index] * amplitude(state) ** 2)
        gain = normalised_gain(new, self.shared_gain, options.beta)
        self.updated[index] = new | stepped(state, new["steps"], gradient, gain, leak=options.leak, clip=options.clip)

    def learned(self) -> dict[int, Any]:
        """The new states. The amplitude of a guess is inverse to the reach ``|B| sqrt(width)`` of its site."""
        reach = {index: new["B"].norm() * new["width"].sqrt() for index, new in self.updated.items()}
        furthest = torch.stack(list(reach.values())).max() if reach else None
        updated = {
            index: new | {"amplitude": (furthest / reach[index].clamp_min(TINY)).clamp(1, MAX_AMPLITUDE)}
            for index, new in self.updated.items()
        }
        return self.correction.merged(dict(sorted((self.initial.states | self.fitted | updated).items())))
