"""Learned feedback: predict each site's cotangent from the exact error at the output, guess only what is left.

Not in the papers; see docs/learned_feedback.md.

Letters: n example, g group (1, or the output's positions), f feature of a site, c feature of the output.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from guessopt.chains import ResidualChain
from guessopt.estimator import Estimator, LearningStep, Noise, describe, make_estimator, register_estimator
from guessopt.feedback.correction import amplitude
from guessopt.feedback.fitting import readers
from guessopt.feedback.maps import STRUCTURES, FeedbackMap, Form, Output
from guessopt.feedback.residual import Streamwise, stream_places
from guessopt.feedback.sitewise import Sitewise, SitewisePlan, separable_sites
from guessopt.graph import SiteGraph
from guessopt.sites import Matrix, Site
from guessopt.tracing.context import SiteContext

STARTS = ("weights", "random", "zero")
SOURCES = ("auto", "guesses", "weights")

#: Steps from one forward-mode pass to the next that ``every="auto"`` chooses from; the longest for which rows of ``B``
#: to a sample, times the interval, are no more than ``AMPLE``. Rows that add up positions count ``SUMMED`` times: what
#: sets the positions' Jacobians apart is noise to them.
INTERVALS = (1, 2, 4, 8, 16)
AMPLE = 32
SUMMED = 16


@register_estimator("learned_feedback")
@dataclass(frozen=True)
class LearnedFeedback(Estimator):
    """``g^_i = c_i + gamma (e . d) y_i``: a predicted cotangent ``c_i``, and what the guess adds to it.

    ``e`` is the exact error at the network's output and ``d = v' - sum_i B_i^T M_i y_i`` the part of the output's
    tangent that the feedback matrices ``B_i`` did not foresee. After use each ``B_i`` takes a least-mean-squares step
    on ``d``, which needs neither loss nor label. A layer's ``B_{i+1} e`` predicts the cotangent after the *next* matrix
    site, which that site's own transpose takes back: ``c_i = M_i W_{i+1}^T M_{i+1} B_{i+1} e``. Where the way to the
    next matrix site is not elementwise, its pull-back takes the place of ``M_i``. Sites that the loss reads take their
    exact error.

    In a network with a residual stream, found by tracing it, the error is taken back through the head alone and then
    carried along the skips; every block is pulled back by itself. See docs/learned_feedback.md.

    Args:
        guess: any estimator of activation guesses: instance, name or ``{"name": ..., **options}``.
        gamma: 1: a control variate, unbiased where the guess is; 0: the guesses serve to learn ``B`` alone; ``"auto"``:
            per site, by the share of noise in the correction (James-Stein).
        every: a forward-mode pass on one step in so many; the others cost a plain forward pass and use ``c_i``.
            ``"auto"``: 1, 2, 4, 8 or 16, the fewer the more rows the ``B`` have for each sample of a batch.
        beta: gain of the least-mean-squares steps, as a fraction of a stable one; the first steps take more, those from
            weights four times as much. 0: ``B`` stays as it starts.
        structure: ``"position"``: a ``B`` that tells positions apart; ``"shared"``: one for all positions; ``"auto"``:
            in a feature map one for each cell of a 4x4 grid, elsewhere one for all. Where the output has as many
            positions as a site (a language model), each position's error serves that position.
        leak: fraction of ``B`` forgotten in every update from guesses.
        clip: largest update, in units of the usual one.
        ahead: how far a prediction is from the site that it serves. 0: none but the site's own activation lies between,
            ``c_i = M_i B_i e``. 1: the next matrix site, as above; in a stream, a block.
        residual: whether to look for a residual stream; one that is found takes ``memory="store"``.
        start: where ``B`` begins. ``"weights"``: the product of the weights as they stand, every activation's
            derivative at its mean, wherever weights alone lead on to an output of at most 128 features; zero
            elsewhere (with ``beta=0``: random); ``"random"``: ``N(0, 1 / rows)``; ``"zero"``. Deviations along a stream
            begin at zero.
        source: where ``B`` comes from as training goes. ``"guesses"``: least mean squares on forward-mode derivatives;
            ``"weights"``: in every step each ``B`` is fitted, by recursive least squares on the error, to what the next
            one's prediction became on its way back through the weight or block between, and no guess is needed but for
            the correction; ``"auto"``: weights along a stream, and where they lead from every site to an output of at
            most 128 features and ``B`` has too many rows for the samples of a batch (and then tells all positions
            apart); else guesses.
        entries: most entries of a ``B``; a larger one tells fewer positions apart, then reads fixed random mixtures of
            the output's features. None: no bound.

    >>> LearnedFeedback(gamma=1).unbiased, LearnedFeedback(gamma=0).unbiased, LearnedFeedback("w_perp", 1).unbiased
    (True, False, False)
    """

    guess: Any = "activation_perturbation"
    gamma: float | str = "auto"
    every: int | str = 1
    beta: float = 0.1
    structure: str = "auto"
    leak: float = 1e-3
    clip: float = 5.0
    ahead: int = 1
    residual: bool = True
    start: str = "weights"
    source: str = "auto"
    entries: int | None = None

    exact_last: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    per_example_parameters: ClassVar[bool] = False

    def __post_init__(self) -> None:
        guess = make_estimator(self.guess)
        if guess.space != "activations" or guess.learns or guess.debias:
            raise ValueError(
                f"guess: {guess.name} cannot serve here; choose an estimator that guesses activations, without debias"
            )
        object.__setattr__(self, "guess", guess)
        if self.gamma != "auto" and not (isinstance(self.gamma, (int, float)) and 0 <= self.gamma <= 1):
            raise ValueError(f"gamma: the correction's weight must be 0 to 1 or 'auto', got {self.gamma!r}")
        if self.every != "auto" and not (isinstance(self.every, int) and self.every >= 1):
            raise ValueError(f"every: forward-mode passes are 1 or more steps apart, or 'auto'; got {self.every!r}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta: the gain must be 0 to 1, got {self.beta}")
        if self.structure not in STRUCTURES:
            raise ValueError(f"structure: {self.structure!r} is not one of {', '.join(STRUCTURES)}")
        if not 0 <= self.leak < 1:
            raise ValueError(f"leak: the fraction forgotten must be at least 0 and below 1, got {self.leak}")
        if not self.clip >= 1:
            raise ValueError(f"clip: the largest update must be at least the usual one, 1, got {self.clip}")
        if self.ahead not in (0, 1):
            raise ValueError(
                f"ahead: the matrix sites between a prediction and its site must be 0 or 1, got {self.ahead}"
            )
        if self.start not in STARTS:
            raise ValueError(f"start: {self.start!r} is not one of {', '.join(STARTS)}")
        if self.source not in SOURCES:
            raise ValueError(f"source: {self.source!r} is not one of {', '.join(SOURCES)}")
        if self.source == "weights" and not (self.ahead and self.beta and self.start == "weights"):
            raise ValueError("source: 'weights' goes with ahead=1, start='weights' and a beta above 0")
        if self.entries is not None and (not isinstance(self.entries, int) or self.entries < 1):
            raise ValueError(f"entries: the most entries of a feedback matrix must be at least 1, got {self.entries}")

    @cached_property
    def form(self) -> Form:
        """What each ``B`` may be."""
        return Form(self.structure, self.entries)

    # --- the guess is another estimator's -----------------------------------------------------------------------------

    @property
    def refresh(self) -> int:  # type: ignore[override]
        refresh: int = self.guess.refresh
        return refresh

    @property
    def prepares(self) -> bool:
        prepares: bool = self.guess.prepares
        return prepares

    @property
    def unbiased(self) -> bool:
        return self.gamma == 1 and self.every == 1 and bool(self.guess.unbiased)

    @property
    def streams(self) -> bool:  # type: ignore[override]
        return self.residual

    def prepare(self, site: Site, weights: list[tuple[Matrix, Tensor]], previous: Any = None) -> Any:
        return self.guess.prepare(site, weights, previous)

    def sample(self, state: Any, ctx: SiteContext) -> Tensor:
        """The guess at the site's amplitude ``a_i``; ``state``: what was prepared, and what was learned."""
        prepared, learned = state
        y: Tensor = self.guess.sample(prepared, ctx)
        loud = amplitude(learned)
        return y * loud.to(y.dtype) if isinstance(loud, Tensor) else y

    def second_moment(self, state: Any, ctx: SiteContext, g: Tensor) -> Tensor | None:
        """In closed form where the estimate is unbiased; elsewhere it depends on what ``B`` has learned."""
        return g if self.unbiased else None

    def note(self, site: Site) -> str | None:
        note: str | None = self.guess.note(site)
        return note

    def check(self, sites: tuple[Site, ...]) -> None:
        for site in sites:
            if site.dtype.is_complex:
                raise ValueError(
                    f"learned_feedback: {site.op} gives a complex output of shape {list(site.shape)}, and feedback "
                    "maps are real; give its parameters 'activation_perturbation' (estimator={pattern: name, ...})"
                )
        self.guess.check(sites)

    def options(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**own, "guess": describe(self.guess)}

    # --- what preflight tells -----------------------------------------------------------------------------------------

    def forms(self, sites: tuple[Site, ...], graph: SiteGraph) -> dict[int, tuple[str, int]]:
        found: dict[int, tuple[str, int]] = {}
        stream = self._stream(graph)
        if stream is not None:
            places = stream_places({site.index for site in sites}, graph, self)
            kept = dict(places.values())
            reading = set(readers(kept).values()) if self.along_weights else set()
            *blocks, head = stream.blocks
            for number, block in enumerate([*blocks, head], 1):
                text = "exact error" if block is head else f"block {number} of {len(blocks)} by itself"
                for index in block.sites:
                    place, site = kept.get(index), graph.sites[index]
                    found[index] = (text + _b_of(place, self.along_weights), _bytes(place, site, index in reading))
            return {site.index: found[site.index] for site in sites if site.index in found}
        chart = SitewisePlan.of(self, sites, graph)
        reading = set(readers(chart.fitted).values())
        for site in sites:
            way = chart.ways.get(site.index)
            if way is None:
                found[site.index] = ("no examples: the correction alone", 0)
                continue
            text = "own"
            if self.ahead and site.index in chart.exact:
                text = "exact error through the head"
            elif self.ahead and site.index in chart.ahead:
                text = "one matrix site ahead"
            place = chart.fitted.get(site.index) if chart.by_weights else way
            found[site.index] = (text + _b_of(place, chart.by_weights), _bytes(place, site, site.index in reading))
        return found

    def reversed_matrices(self, graph: SiteGraph) -> int:
        guess = self.guess.reversed_matrices(graph)
        stream = self._stream(graph)
        return guess if stream is None else max(guess, *(block.matrices for block in stream.blocks))

    # --- the estimate -------------------------------------------------------------------------------------------------

    def injects(self, step: int, graph: SiteGraph) -> bool:
        follows = self.along_weights if self._stream(graph) else graph.cached_results.get(("by weights", self))
        return bool(self.gamma != 0 or (self.beta and not follows)) and super().injects(step, graph)

    def period(self, graph: SiteGraph) -> int:
        if isinstance(self.every, int):
            return self.every
        rows = self._rows(graph)
        return max(k for k in INTERVALS if k == 1 or k * rows <= AMPLE)

    def _rows(self, graph: SiteGraph) -> float:
        """Of all ``B``, to a sample of a batch."""

        def rows() -> float:
            every = self._places(graph)
            return sum(place.b_shape[0] / place.samples * (SUMMED if place.sums else 1) for place in every)

        return graph.cached(("rows", self), rows)

    @property
    def along_weights(self) -> bool:
        """Whether along a stream every ``B`` is to follow the next block."""
        return bool(self.ahead and self.beta) and self.source != "guesses"

    def _stream(self, graph: SiteGraph | None) -> ResidualChain | None:
        return graph.chain if graph is not None and self.residual else None

    def takes_weights(self, graph: SiteGraph, whole: bool) -> bool:
        """Whether every ``B`` is to follow the next one; ``whole``: weights lead on from every site. The first batch
        decides; later ones may be smaller.

        Raises:
            ValueError: they do not, and ``source="weights"``."""
        if self.source == "weights" and not whole:
            raise ValueError(
                "source: 'weights' needs weights, one after another, from every site to one output of at most "
                "128 features; use 'auto' or 'guesses'"
            )
        able = whole and bool(self.ahead and self.beta and self.start == "weights") and self.source != "guesses"
        return able and (self.source == "weights" or 2 * self._rows(graph) > AMPLE)

    def _places(self, graph: SiteGraph) -> list[FeedbackMap]:
        """Wherever a ``B`` may be learned."""
        if self._stream(graph):
            every = {site.index for site in graph.sites}
            return [place for _, place in stream_places(every, graph, self).values()]
        inner = (site for site in graph.sites if site.shares is None and site.cut is None)
        return list(separable_sites(inner, Output.of_cuts(graph), self.form).values())

    def begin(self, sites: tuple[Site, ...], graph: SiteGraph, states: dict[int, Any], noise: Noise) -> LearningStep:
        if self._stream(graph):
            return Streamwise(self, sites, graph, states)
        return Sitewise(self, sites, graph, states, noise)

    def refuses(self, memory: str, graph: SiteGraph | None) -> str | None:
        if memory == "stream" and self._stream(graph):
            return (
                "along a residual stream predictions are made from its end back to its beginning, not as a second pass "
                "goes: memory='replay' runs each block once more in place of keeping what it computes, and "
                "residual=False serves each site by itself"
            )
        return None


def _b_of(place: FeedbackMap | None, by_weights: bool) -> str:
    return "" if place is None else f", B {list(place.b_shape)}" + (" from weights" if by_weights else "")


def _bytes(place: FeedbackMap | None, site: Site, reads: bool) -> int:
    """Of ``B``, and of the errors' second moment where it is kept; both are float32 at least."""
    if place is None:
        return 0
    rows, columns = place.b_shape
    return (rows * columns + reads * columns**2) * max(site.dtype.itemsize, 4)
