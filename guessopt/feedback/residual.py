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
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from guessopt.chains import Block
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
from guessopt.ops.base import push
from guessopt.record import ForwardRecord
from guessopt.sites import Call, Site
from guessopt.tracing.context import SiteContext, Subgraph, evaluate


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
        self.updated, remainder = sweep.updated, Remainder(record.d)
        for index, c in found.items():
            if index in guesses:
                remainder.subtract_explained(c, guesses[index], self.graph.sites[index], self.graph.batch)
        rest = remainder.value
        for index in guesses.keys() - sweep.exact:
            found[index] = self.correction.apply(index, found.get(index), guesses[index], rest)
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
        assert graph.stream is not None
        self.options, self.record, self.graph, self.by_weights = options, record, graph, options.fits_stream
        *self.blocks, self.head = graph.stream.blocks
        self.served = served
        assert self.head.source is not None
        self.last = self.head.source
        self.autocast = next((saved.autocast for saved in record.saved_calls if saved.autocast), None)
        self.output = _output(graph)
        self.maps = graph.derive((options, frozenset(served)), lambda: stream_maps(served, graph, options))
        self.exact = self.served.intersection(self.head.sites)
        self.before: dict[int, State | None] = {}
        self.updated: dict[int, State] = {}
        for keeper, map_ in self.maps.values():
            state = states[keeper]
            self.before[keeper] = state if has_shape(state, map_.b_shape, self.by_weights) else None
        self.fitting = Fitting(options, dict(self.maps.values()), self.before)

    def predictions(self) -> Iterator[dict[int, Tensor]]:
        """Cotangents by site index, block by block, from the head on."""
        inside, variables = self._inside(self.head), self._variables(self.head)
        run: Subgraph | None = self._subgraph(self.head, [self.last], inside, variables)
        assert run is not None
        c, *found = run.pull_back(self.head.goals, self.record.errors, [self.last, *inside.values(), *variables])
        yield self._by_site(found, inside, variables)
        e, p = self.output.join({self.last: c}), c
        assert e is not None
        for block in reversed(self.blocks):
            inside, variables = self._inside(block), self._variables(block)
            own = [block.source] if self.options.ahead and block.source is not None else []
            run, back = None, list[Tensor]()
            if inside or variables or own:
                run = self._subgraph(block, own, inside, variables)
            if inside or variables:
                assert run is not None
                input_too = own if c is p else []  # then one pull-back serves sites and input
                found = run.pull_back(block.goals, [c], [*inside.values(), *variables, *input_too])
                back = found[len(inside) + len(variables) :]
                yield self._by_site(found, inside, variables)
                del found
            if block.source is None:
                break
            skip = self._skip(block, run)
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

    def _by_site(self, found: list[Tensor], inside: dict[int, int], variables: dict[int, Tensor]) -> dict[int, Tensor]:
        """The sites' cotangents, by index. The variables' gradients go into the record."""
        self.record.gradients += zip(variables.values(), found[len(inside) :], strict=False)
        return dict(zip(inside, found, strict=False))

    def _subgraph(self, block: Block, own: list[int], inside: dict[int, int], variables: dict[int, Tensor]) -> Subgraph:
        """The block with a reverse graph: the one that the pass has kept, or a new one from running the block again."""
        if self.record.graphs is not None:
            return Subgraph.kept(self.record.graphs, block, inside.values(), variables)
        return self._again(block.program, [*own, *inside.values(), *variables])

    def _again(self, calls: tuple[Call, ...], ends: list[int]) -> Subgraph:
        """The calls, run again under the autocast of the pass."""
        with torch.autocast(*self.autocast) if self.autocast else nullcontext():
            return Subgraph.again(calls, self.record.values, ends, self.record.random)

    def _inside(self, block: Block) -> dict[int, int]:
        """The outputs of the block's sites whose cotangents are wanted, by site index."""
        sites, direct = self.graph.sites, self.record.direct
        return {i: sites[i].value for i in block.sites if i in self.served and sites[i].call.index not in direct}

    def _variables(self, block: Block) -> dict[int, Tensor]:
        """The parameters whose gradients the block's graph gives, by value."""
        saved_calls = (self.record.direct[call.index] for call in block.program if call.index in self.record.direct)
        return {
            saved.call.inputs[k]: variable
            for saved in saved_calls
            for k, variable in zip(saved.wanted, saved.variables, strict=True)
        }

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

    def _skip(self, block: Block, run: Subgraph | None) -> Callable[[Tensor], Tensor]:
        """``S^T`` of a block; ``run``: the block's subgraph, if there is one."""
        if block.skip is None:
            assert block.source is not None
            zeros = torch.zeros_like(self.record.values[block.source])
            return lambda c: zeros
        if not block.skip:
            return lambda c: c
        assert block.origin is not None
        goals, origin = block.goals, block.origin
        if run is None or not block.ends_in_skip or origin not in run.ends:
            run = self._again(block.skip, [origin])
        pull_back = run.pull_back
        return lambda c: pull_back(goals, [c], [origin])[0]

    def _push_skip(self, block: Block, t: Tensor) -> Tensor:
        """``S t``."""
        if not block.skip:
            return t
        origin, calls, values, random = block.origin, block.skip, self.record.values, self.record.random
        assert origin is not None

        def run(h: Tensor) -> tuple[Tensor, ...]:
            return (evaluate(calls, {**values, origin: h}, random=random)[block.goals[0]],)

        with torch.autocast(*self.autocast) if self.autocast else nullcontext():
            return push(run, [values[origin]], [t])[0]

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
                return self._zero(t) + total
            t = self._push_skip(block, t)
            v = block.goals[0]
            if v in self.maps:
                keeper, map_ = self.maps[v]
                state = self.before[keeper]
                if state is not None:
                    total = total + state["share"] * map_.predict_tangent(map_.unfold(t), state["B"])
        last = self.output.join({self.last: t})
        assert last is not None
        return last + total

    def _zero(self, t: Tensor) -> Tensor:
        axes = self.output.axes[self.last]
        return t.new_zeros(self.output.n, axes.positions, axes.features)


def _output(graph: SiteGraph) -> Output:
    """The last state ``h_L`` takes the place of the network's output."""
    assert graph.stream is not None
    last = graph.stream.blocks[-1].source
    assert last is not None
    shape, n = graph.stream.shapes[last], graph.batch
    return Output([(last, example_layout(Layout.COUPLED, shape, n), shape)], n)


def stream_maps(served: set[int], graph: SiteGraph, options: FeedbackOptions) -> dict[int, tuple[int, FeedbackMap]]:
    """The ``B`` of every state, by the state's value, each with the site that keeps it: the last served site of the
    block before the state."""
    assert graph.stream is not None
    output, found, form = _output(graph), {}, options.form
    if form.structure == "auto" and not options.fits_stream:
        form = Form("shared", form.entries)
    for block in graph.stream.blocks[:-2]:
        v, keeper = block.goals[0], max(served.intersection(block.sites), default=None)
        if keeper is not None:
            shape = graph.stream.shapes[v]
            layout = example_layout(Layout.COUPLED, shape, graph.batch)
            found[v] = (keeper, FeedbackMap(layout, shape, len(shape) > 3, output, form))
    return found


def stream_rows(graph: SiteGraph, options: FeedbackOptions) -> float:
    """``rows_per_sample`` of every ``B`` along the stream."""
    every = {site.index for site in graph.sites}
    return graph.derive(
        ("stream rows", options),
        lambda: rows_per_sample([map_ for _, map_ in stream_maps(every, graph, options).values()]),
    )
