"""One step of learned feedback along a residual stream: from its end back to its beginning, block by block.

Letters: h a state, l its number (L the last), S the Jacobian of a block's skip, F that of the rest of the block, t a
tangent, e the exact error at ``h_L``, p a cotangent predicted from skips and feedback alone, c the one that is used.

| phase of a step | formula |
|---|---|
| head | ``e = dL/dh_L``, pulled back through the head; ``p_L = c_L = e`` |
| block l, its sites | ``c_{l+1}``, pulled back through the block by itself |
| block l, its input | ``p_l = S^T p_{l+1} + a_l B_l e`` |
| | ``ahead=0``: ``c_l = p_l``; ``ahead=1``: ``c_l = S^T c_{l+1} + F^T p_{l+1}`` |
| learn from weights | ``B_l e`` is fitted to ``F^T p_{l+1}`` |
| learn from guesses | ``B_l`` is fitted to ``t_L - S t_l - (the later B)^T t``, after the last block |
| correct | ``g^_i = c_i + gamma D'_n y_i``; only in a step with guesses |

Nothing that comes from the loss passes more than one block before the block that uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from guessopt.feedback.blocks import BlockGraphs
from guessopt.feedback.correction import Correction, Remainder
from guessopt.feedback.fitting import Fitting
from guessopt.feedback.maps import FeedbackMap, Form, Output, example_layout, rows_per_sample
from guessopt.feedback.options import FeedbackOptions
from guessopt.feedback.updates import (
    State,
    has_shape,
    moments,
    normalised_gain,
    products,
    samples,
    shared_gain,
    stepped,
    stream_shrinkage,
)
from guessopt.graph import SiteGraph
from guessopt.layout import Layout
from guessopt.learning import LearningStep
from guessopt.record import ForwardRecord
from guessopt.sites import Site
from guessopt.tracing.context import SiteContext
from guessopt.tracing.subgraph import Subgraph


class Streamwise(LearningStep):
    """One step. All work is done by ``estimate``, after the pass, in every memory mode."""

    def __init__(
        self, options: FeedbackOptions, sites: tuple[Site, ...], graph: SiteGraph, states: dict[int, Any]
    ) -> None:
        self.options, self.graph, self.states = options, graph, states
        self.served = {site.index for site in sites}
        self.correction = Correction(options.gamma, graph, states, ())
        self.updated: dict[int, State] = {}

    keeps_contexts = False

    @property
    def keeps_guesses(self) -> bool:  # type: ignore[override]
        return self.options.gamma != 0

    def estimate(
        self, contexts: dict[int, SiteContext], record: ForwardRecord, consume: Callable[[dict[int, Tensor]], None]
    ) -> dict[int, Tensor]:
        found, guesses = dict[int, Tensor](), record.guesses
        sweep = BackwardSweep(self.options, self.served, record, self.graph, self.states)
        for cotangents in sweep.predictions():
            if guesses:
                found |= cotangents
            else:
                consume(cotangents)
        if self.options.beta and not sweep.by_weights:
            sweep.learn()
        self.updated, remainder = sweep.updated, Remainder(record.d, record.credit)
        for index, c in found.items():
            if index in guesses:
                remainder.subtract_explained(c, guesses[index], self.graph.sites[index], self.graph.batch)
        for index in guesses.keys() - sweep.exact:
            found[index] = self.correction.apply(index, found.get(index), guesses[index], remainder)
        return found

    def learned(self) -> dict[int, Any]:
        return self.correction.merged(self.updated)


class BackwardSweep:
    """The predictions of one step, and the updates of every ``B``.

    Args:
        served: indices of the sites whose cotangents are wanted.
        states: what was learned, by site index. The ``B`` of a state ``h_l`` is kept with the last site of the block
            before it.

    Attributes:
        maps: by the value of a state, the site that keeps its ``B``, and the ``B``.
        exact: the sites of the head.
        before: the states of the keepers as the step begins; None without one that fits.
        updated: the new states.
    """

    def __init__(
        self,
        options: FeedbackOptions,
        served: set[int],
        record: ForwardRecord,
        graph: SiteGraph,
        states: dict[int, Any],
    ) -> None:
        assert graph.chain is not None
        self.options, self.record, self.by_weights = options, record, options.fits_stream
        *self.blocks, self.head = graph.chain.blocks
        self.graphs = BlockGraphs(graph, record, served)
        assert self.head.source is not None
        self.last = self.head.source
        self.output = _output(graph)
        self.maps = graph.cached((options, frozenset(served)), lambda: stream_maps(served, graph, options))
        self.exact = served.intersection(self.head.sites)
        self.before: dict[int, State | None] = {}
        self.updated: dict[int, State] = {}
        for keeper, map_ in self.maps.values():
            state = states[keeper]
            self.before[keeper] = state if has_shape(state, map_.b_shape, self.by_weights) else None
        self.fitting = Fitting(options, dict(self.maps.values()), self.before)

    def predictions(self) -> Iterator[dict[int, Tensor]]:
        """Cotangents by site index, block by block, from the head on."""
        graphs, outputs, parameters = self.graphs, self.graphs.outputs(self.head), self.graphs.parameters(self.head)
        run: Subgraph | None = graphs.subgraph(self.head, [self.last], outputs, parameters)
        assert run is not None
        c, *found = run.pull_back(self.head.goals, self.record.errors, [self.last, *outputs.values(), *parameters])
        yield self._by_site(found, outputs, parameters)
        e, p = self.output.join({self.last: c}), c
        assert e is not None
        for block in reversed(self.blocks):
            outputs, parameters = graphs.outputs(block), graphs.parameters(block)
            own = [block.source] if self.options.ahead and block.source is not None else []
            run, back = None, list[Tensor]()
            if outputs or parameters or own:
                run = graphs.subgraph(block, own, outputs, parameters)
            if outputs or parameters:
                assert run is not None
                input_too = own if c is p else []  # then one pull-back serves sites and input
                found = run.pull_back(block.goals, [c], [*outputs.values(), *parameters, *input_too])
                back = found[len(outputs) + len(parameters) :]
                yield self._by_site(found, outputs, parameters)
                del found
            if block.source is None:
                break
            skip = graphs.pull_back_skip(block, run)
            skipped, through_rest = skip(p), None
            if own:
                assert run is not None
                (whole,) = back or run.pull_back(block.goals, [p], own)  # (S + F)^T p
                through_rest = whole - skipped  # F^T p
                c = whole if c is p else skip(c) + through_rest
            p = skipped + self._deviation(block.source, e, through_rest if self.by_weights else None)
            c = c if own else p
            if self.by_weights:
                del self.record.values[block.goals[0]]  # no earlier block reads it
            del run

    def _by_site(
        self, found: list[Tensor], outputs: dict[int, int], parameters: dict[int, Tensor]
    ) -> dict[int, Tensor]:
        """The sites' cotangents, by index. The parameters' gradients go into the record."""
        self.record.gradients += zip(parameters.values(), found[len(outputs) :], strict=False)
        return dict(zip(outputs, found, strict=False))

    def _deviation(self, v: int, e: Tensor, target: Tensor | None) -> Any:
        """``a B e`` at a state, with the share ``a`` of ``stream_shrinkage``; zero without a ``B``. ``B e`` is fitted
        to the target, if there is one."""
        keeper, map_ = self.maps.get(v, (None, None))
        if keeper is None or map_ is None:
            return 0
        state = self.before[keeper]
        if target is not None:
            new, agreed = self.fitting.step(keeper, e, map_.cell_means(target))
            self.updated[keeper] = new | stream_shrinkage(state, agreed, new["steps"], new["B"])
        return 0 if state is None else map_.predict(e, state["share"] * state["B"]).to(self.record.values[v].dtype)

    def learn(self) -> None:
        """A least-mean-squares step of every ``B_l`` on ``t_L - (what skips and every B predict of t_L from t_l)``."""
        options, t_last = self.options, self.output.join({self.last: self.record.states.get(self.last)})
        if t_last is None:
            return
        for number, block in enumerate(self.blocks):
            v = block.goals[0]
            t = self.record.states.get(v)
            if v not in self.maps or t is None:
                continue
            keeper, map_ = self.maps[v]
            old = self.before[keeper]
            r = map_.unfold(t)
            missed = t_last - self._predicted_tangent(number, t)
            own = None if old is None else map_.predict_tangent(r, old["B"])
            new = moments(old, r)
            new |= stream_shrinkage(old, None if own is None else products(missed, own), new["steps"], missed)
            gradient = map_.outer(r, missed if own is None else missed - own) / samples(r)
            gain = normalised_gain(new, shared_gain([(new, samples(r))]), options.beta)
            self.updated[keeper] = new | stepped(
                old, new["steps"], gradient, gain, leak=options.leak, clip=options.clip
            )

    def _predicted_tangent(self, number: int, t: Tensor) -> Tensor:
        """The tangent of ``h_L`` that skips and later ``B`` predict from a state's tangent ``t``."""
        total: Any = 0
        for block in self.blocks[number + 1 :]:
            if block.skip is None:
                result: Tensor = self._zeros(t) + total
                return result
            t = self.graphs.push_skip(block, t)
            v = block.goals[0]
            if v in self.maps:
                keeper, map_ = self.maps[v]
                state = self.before[keeper]
                if state is not None:
                    total = total + state["share"] * map_.predict_tangent(map_.unfold(t), state["B"])
        last = self.output.join({self.last: t})
        assert last is not None
        result = last + total
        return result

    def _zeros(self, t: Tensor) -> Tensor:
        axes = self.output.axes[self.last]
        return t.new_zeros(self.output.n, axes.positions, axes.features)


def _output(graph: SiteGraph) -> Output:
    """The last state ``h_L`` takes the place of the network's output."""
    assert graph.chain is not None
    last = graph.chain.blocks[-1].source
    assert last is not None
    shape, n = graph.chain.shapes[last], graph.batch
    return Output([(last, example_layout(Layout.COUPLED, shape, n), shape)], n)


def stream_maps(served: set[int], graph: SiteGraph, options: FeedbackOptions) -> dict[int, tuple[int, FeedbackMap]]:
    """The ``B`` of every state, by the state's value, each with the site that keeps it: the last served site of the
    block before the state."""
    assert graph.chain is not None
    output, found, form = _output(graph), {}, options.form
    if form.structure == "auto" and not options.fits_stream:
        form = Form("shared", form.entries)
    for block in graph.chain.blocks[:-2]:
        v, keeper = block.goals[0], max(served.intersection(block.sites), default=None)
        if keeper is not None:
            shape = graph.chain.shapes[v]
            layout = example_layout(Layout.COUPLED, shape, graph.batch)
            found[v] = (keeper, FeedbackMap(layout, shape, len(shape) > 3, output, form))
    return found


def stream_rows(graph: SiteGraph, options: FeedbackOptions) -> float:
    """``rows_per_sample`` of every ``B`` along the stream."""
    every = {site.index for site in graph.sites}
    return graph.cached(
        ("stream rows", options),
        lambda: rows_per_sample([map_ for _, map_ in stream_maps(every, graph, options).values()]),
    )
