"""Learned feedback: predict each site's cotangent from the exact error at the output; guess only the rest.

Not in the papers; docs/learned_feedback.md is the guide, docs/learned_feedback_derivation.md derives the formulas.

Letters: n example, f feature of a site, c feature of the output.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from guessopt.chains import ResidualChain
from guessopt.estimator import Estimator
from guessopt.feedback.correction import amplitude
from guessopt.feedback.options import FeedbackOptions
from guessopt.feedback.report import sitewise_forms, stream_forms
from guessopt.feedback.residual import Streamwise, stream_rows
from guessopt.feedback.sitewise import Sitewise
from guessopt.feedback.sitewise_plan import MAX_ROW_STEPS_PER_SAMPLE, sitewise_rows
from guessopt.graph import SiteGraph
from guessopt.learning import LearningStep, Noise
from guessopt.registry import describe, register_estimator
from guessopt.sites import Matrix, Site
from guessopt.tracing.context import SiteContext

#: Steps between two forward-mode passes that ``every="auto"`` chooses from. It takes the longest interval for which
#: the rows of ``B`` for each sample, times the interval, are at most ``MAX_ROW_STEPS_PER_SAMPLE``.
INTERVALS = (1, 2, 4, 8, 16)


@register_estimator("learned_feedback")
@dataclass(frozen=True)
class LearnedFeedback(FeedbackOptions, Estimator):
    """``g^_i = c_i + gamma D'_n y_i``: a predicted cotangent ``c_i``, and the part that the guess adds to it.

    ``e_n`` is the exact error at the network's output. By default ``c_i = M_i W_{i+1}^T M_{i+1} B_{i+1} e_n``: the
    feedback matrix ``B_{i+1}`` predicts the cotangent after the next matrix site, and that site's own transposed weight
    takes it back. ``B`` learns after use: from the tangent that a forward-mode pass brings to the output, or from the
    weights. Neither needs a label. Sites that the loss reads take their exact error.

    In a network with a residual stream the error is pulled back through the head alone, and then carried along the
    skips; every block is pulled back through by itself. Tracing finds the stream. See docs/learned_feedback.md.

    Memory modes: ``"store"`` and ``"replay"`` serve every network, ``"stream"`` every network without a residual stream
    (or with ``residual=False``). Along a stream ``"replay"`` makes no second pass of the closure: it runs the recorded
    calls of one block after another, from the last to the first.

    Args:
        guess: any estimator of activation guesses: instance, name or ``{"name": ..., **options}``.
        gamma: weight of the correction. 1: a control variate, unbiased where the guess is. 0: the guesses only teach
            ``B``. ``"auto"``: for each site, by the share of noise in the correction (James-Stein).
        every: steps from one forward-mode pass to the next. A step between costs a plain forward pass, and uses ``c_i``
            alone. ``"auto"``: 1, 2, 4, 8 or 16; the more rows the ``B`` have for each sample of a batch, the fewer.
        beta: gain of the least-mean-squares steps, as a fraction of a stable one. The first steps have a larger gain,
            steps from weights four times as large a one. 0: ``B`` stays as it begins.
        structure: which positions ``B`` tells apart. ``"position"``: all. ``"shared"``: none. ``"auto"``: in a feature
            map the cells of a 4x4 grid, elsewhere none. Where the output has as many positions as a site (a language
            model), each position's error serves that position.
        leak: fraction of ``B`` that is forgotten in every update from guesses.
        clip: largest update, in units of the usual one.
        ahead: distance from a prediction to the site that uses it. 0: only the site's own activation lies between,
            ``c_i = M_i B_i e``. 1: the next matrix site, as above; along a stream a block.
        residual: whether to look for a residual stream.
        start: the first ``B``. ``"weights"``: the product of the weights as they stand, with every activation's
            derivative at its mean, where weights alone lead to an output of at most 128 features; elsewhere zero (with
            ``beta=0`` random). ``"random"``: ``N(0, 1 / rows)``. ``"zero"``. Along a stream ``B`` begins at zero.
        source: what ``B`` learns from. ``"guesses"``: least mean squares on forward-mode derivatives. ``"weights"``: in
            every step each ``B`` is fitted, by recursive least squares, to the next one's prediction, pulled back
            through the weight or the block between; a guess is needed only for the correction. ``"auto"``: weights
            along a stream, and where weights lead from every site to an output of at most 128 features and ``B`` has
            too many rows for the samples of a batch (``B`` then tells all positions apart); else guesses.
        entries: most entries of a ``B``. A larger one tells fewer positions apart; if that is not enough, it reads
            fixed random mixtures of the output's features. None: no bound.

    >>> LearnedFeedback(gamma=1).unbiased, LearnedFeedback(gamma=0).unbiased, LearnedFeedback("w_perp", 1).unbiased
    (True, False, False)
    """

    exact_last: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    per_example_parameters: ClassVar[bool] = False

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

    def prepare(self, site: Site, weights: list[tuple[Matrix, Tensor]], previous: Any = None) -> Any:
        return self.guess.prepare(site, weights, previous)

    def sample(self, state: Any, ctx: SiteContext) -> Tensor:
        """The guess at the site's amplitude ``a_i``; ``state``: the prepared and the learned state."""
        prepared, learned = state
        y: Tensor = self.guess.sample(prepared, ctx)
        a = amplitude(learned)
        return y * a.to(y.dtype) if isinstance(a, Tensor) else y

    def second_moment(self, state: Any, ctx: SiteContext, g: Tensor) -> Tensor | None:
        """Known where the estimate is unbiased; elsewhere it depends on what ``B`` has learned."""
        return g if self.unbiased else None

    # --- learning -----------------------------------------------------------------------------------------------------

    @property
    def streams(self) -> bool:  # type: ignore[override]
        return self.residual

    def period(self, graph: SiteGraph) -> int:
        if isinstance(self.every, int):
            return self.every
        rows = stream_rows(graph, self) if self._stream(graph) else sitewise_rows(self, graph)
        return max(k for k in INTERVALS if k == 1 or k * rows <= MAX_ROW_STEPS_PER_SAMPLE)

    def injects(self, step: int, graph: SiteGraph) -> bool:
        by_weights = self.fits_stream if self._stream(graph) else graph.cached_results.get(("by weights", self))
        return bool(self.gamma != 0 or (self.beta and not by_weights)) and super().injects(step, graph)

    def learning_step(
        self, sites: tuple[Site, ...], graph: SiteGraph, states: dict[int, Any], noise: Noise
    ) -> LearningStep:
        if self._stream(graph):
            return Streamwise(self, sites, graph, states)
        return Sitewise(self, sites, graph, states, noise)

    def refuses(self, memory: str, graph: SiteGraph | None) -> str | None:
        if memory == "stream" and self._stream(graph):
            return (
                "along a residual stream predictions go from its end back to its beginning, against the order of a "
                "second pass; use memory='replay', which runs each block once more, or residual=False, which serves "
                "each site by itself"
            )
        return None

    def _stream(self, graph: SiteGraph | None) -> ResidualChain | None:
        return graph.chain if graph is not None and self.residual else None

    # --- reporting ----------------------------------------------------------------------------------------------------

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

    def forms(self, sites: tuple[Site, ...], graph: SiteGraph) -> dict[int, tuple[str, int]]:
        stream = self._stream(graph)
        return sitewise_forms(self, sites, graph) if stream is None else stream_forms(self, sites, graph, stream)

    def reversed_matrices(self, graph: SiteGraph) -> int:
        most: int = self.guess.reversed_matrices(graph)
        stream = self._stream(graph)
        return most if stream is None else max(most, *(block.matrices for block in stream.blocks))

    def options(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**own, "guess": describe(self.guess)}
