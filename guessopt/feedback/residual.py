"""Learned feedback along a residual stream: the identity path, the deviation from it, and each block by itself.

Letters: h a state, l its number (L the last), S the way of a skip, F that of the rest of a block, t a tangent, e the
exact error at ``h_L``, p a cotangent predicted from skips and feedback alone, c the one that serves. Nothing that comes
from the loss passes more than one block before the block that it serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from guessopt.chains import Block
from guessopt.estimator import LearningStep
from guessopt.feedback.correction import Correction, Remainder
from guessopt.feedback.fitting import Fitting
from guessopt.feedback.maps import FeedbackMap, Form, Output, apart
from guessopt.feedback.updates import (
    State,
    agreement,
    fits,
    moments,
    normalised,
    proven,
    samples,
    shared_gain,
    stepped,
)
from guessopt.graph import SiteGraph
from guessopt.layout import Layout
from guessopt.ops.base import push
from guessopt.record import ForwardRecord
from guessopt.sites import Call, Site
from guessopt.tracing.context import SiteContext
from guessopt.tracing.subgraph import Subgraph, evaluate

if TYPE_CHECKING:
    from guessopt.feedback.options import LearnedFeedback


class Streamwise(LearningStep):
    """One step along the stream: after the pass, from its end back to its beginning."""

    def __init__(
        self, options: LearnedFeedback, sites: tuple[Site, ...], graph: SiteGraph, states: dict[int, Any]
    ) -> None:
        self.options, self.graph, self.states = options, graph, states
        self.served = {site.index for site in sites}
        self.correction = Correction(options.gamma, graph, states, ())
        self.steps: dict[int, State] = {}

    @property
    def keeps(self) -> tuple[bool, bool]:  # type: ignore[override]
        return False, self.options.gamma != 0

    def estimate(
        self, contexts: dict[int, SiteContext], record: ForwardRecord, consume: Callable[[dict[int, Tensor]], None]
    ) -> dict[int, Tensor]:
        found, guesses = dict[int, Tensor](), record.guesses
        course = BackwardSweep(self.options, self.served, record, self.graph, self.states)
        for piece in course.predicted():
            if guesses:
                found |= piece
            else:
                consume(piece)
        if self.options.beta and not course.by_weights:
            course.learn()
        self.steps, remainder = course.steps, Remainder(record.d)
        for index, c in found.items():
            if index in guesses:
                remainder.subtract_explained(c, guesses[index], self.graph.sites[index], self.graph.batch)
        rest = remainder.value
        for index in guesses.keys() - course.exact:
            found[index] = self.correction.of(index, found.get(index), guesses[index], rest)
        return found

    def learned(self) -> dict[int, Any]:
        return self.correction.together(self.steps)


class BackwardSweep:
    """One step along the stream of ``graph``.

    ``p_l = S^T p_{l+1} + B_l e``. ``ahead=0``: ``c_l = p_l``. ``ahead=1``: ``c_l = S^T c_{l+1} + F^T p_{l+1}``, which
    takes along what each later block by itself does to the prediction of its output's cotangent; ``by_weights``:
    ``B_l e`` is fitted to that.

    Args:
        served: indices of the sites whose cotangents are asked for.
        states: what was learned, by site index; a state's deviation is kept with the last site of the block before it.
    """

    def __init__(
        self,
        options: LearnedFeedback,
        served: set[int],
        record: ForwardRecord,
        graph: SiteGraph,
        states: dict[int, Any],
    ) -> None:
        assert graph.chain is not None
        self.options, self.record, self.graph, self.by_weights = options, record, graph, options.along_weights
        *self.blocks, self.head = graph.chain.blocks
        self.served = served
        assert self.head.source is not None
        self.last = self.head.source
        self.autocast = next((saved.autocast for saved in record.saved_calls if saved.autocast), None)
        self.output = _output(graph)
        self.places = graph.cached((options, frozenset(served)), lambda: stream_places(served, graph, options))
        self.exact = self.served.intersection(self.head.sites)
        self.before: dict[int, State | None] = {}
        self.steps: dict[int, State] = {}
        for keeper, place in self.places.values():
            state = states[keeper]
            self.before[keeper] = state if fits(state, place.b_shape, self.by_weights) else None
        self.fitting = Fitting(options, dict(self.places.values()), self.before)

    def predicted(self) -> Iterator[dict[int, Tensor]]:
        """Cotangents by site index, block by block, from the head on."""
        inside, variables = self._inside(self.head), self._variables(self.head)
        run: Subgraph | None = self._stretch(self.head, [self.last], inside, variables)
        assert run is not None
        c, *found = run.pull_back(self.head.goals, self.record.errors, [self.last, *inside.values(), *variables])
        yield self._sorted(found, inside, variables)
        e, p = self.output.join({self.last: c}), c
        assert e is not None
        for block in reversed(self.blocks):
            inside, variables = self._inside(block), self._variables(block)
            own = [block.source] if self.options.ahead and block.source is not None else []
            run, moved = None, list[Tensor]()
            if inside or variables or own:
                run = self._stretch(block, own, inside, variables)
            if inside or variables:
                assert run is not None
                both = own if c is p else []  # one way back is enough
                found = run.pull_back(block.goals, [c], [*inside.values(), *variables, *both])
                moved = found[len(inside) + len(variables) :]
                yield self._sorted(found, inside, variables)
                del found
            if block.source is None:
                break
            skip = self._skip(block, run)
            skipped, wanted = skip(p), None
            if own:
                assert run is not None
                (back,) = moved or run.pull_back(block.goals, [p], own)  # (S + F)^T p
                wanted = back - skipped  # F^T p
                c = back if c is p else skip(c) + wanted
            p = skipped + self._deviation(block.source, e, wanted if self.by_weights else None)
            c = c if own else p
            if self.by_weights:
                del self.record.values[block.goals[0]]  # no earlier block reads it
            del run

    def _sorted(self, found: list[Tensor], inside: dict[int, int], variables: dict[int, Tensor]) -> dict[int, Tensor]:
        """The sites' cotangents, by index; the variables' gradients go into the record."""
        self.record.gradients += zip(variables.values(), found[len(inside) :], strict=False)
        return dict(zip(inside, found, strict=False))

    def _stretch(self, block: Block, own: list[int], inside: dict[int, int], variables: dict[int, Tensor]) -> Subgraph:
        """The block with a graph: as the pass has left it, or run once more."""
        if self.record.graphs is not None:
            return Subgraph.kept(self.record.graphs, block, inside.values(), variables)
        return self._again(block.program, [*own, *inside.values(), *variables])

    def _again(self, calls: tuple[Call, ...], ends: list[int]) -> Subgraph:
        """The calls run once more, under the autocast that they ran under."""
        with torch.autocast(*self.autocast) if self.autocast else nullcontext():
            return Subgraph.again(calls, self.record.values, ends, self.record.random)

    def _inside(self, block: Block) -> dict[int, int]:
        """Values of the block's sites whose cotangents are wanted, by index."""
        sites, direct = self.graph.sites, self.record.block_calls
        return {i: sites[i].value for i in block.sites if i in self.served and sites[i].call.index not in direct}

    def _variables(self, block: Block) -> dict[int, Tensor]:
        """The tensors whose gradients the block's graph gives, by value."""
        saved_calls = (
            self.record.block_calls[call.index] for call in block.program if call.index in self.record.block_calls
        )
        return {
            saved.call.inputs[k]: variable
            for saved in saved_calls
            for k, variable in zip(saved.wanted, saved.variables, strict=True)
        }

    def _deviation(self, v: int, e: Tensor, wanted: Tensor | None) -> Any:
        """``B e`` at a state, by the share that has proved itself; ``wanted``: what ``B`` is to make of the error."""
        keeper, place = self.places.get(v, (None, None))
        if keeper is None or place is None:
            return 0
        state = self.before[keeper]
        if wanted is not None:
            new, agreed = self.fitting.step(keeper, e, place.mean(wanted))
            self.steps[keeper] = new | proven(state, agreed, new["steps"], new["B"])
        return 0 if state is None else place.predict(e, state["share"] * state["B"]).to(self.record.values[v].dtype)

    def _skip(self, block: Block, run: Subgraph | None) -> Callable[[Tensor], Tensor]:
        """``S^T``; ``run``: the block's."""
        if block.skip is None:
            assert block.source is not None
            zeros = torch.zeros_like(self.record.values[block.source])
            return lambda c: zeros
        if not block.skip:
            return lambda c: c
        assert block.origin is not None
        goals, origin = block.goals, block.origin
        if run is None or not block.ends_in_skip or origin not in run.inputs:
            run = self._again(block.skip, [origin])
        pull_back = run.pull_back
        return lambda c: pull_back(goals, [c], [origin])[0]

    def _forth(self, block: Block, t: Tensor) -> Tensor:
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
        """A step of every deviation on what the output's tangent has beyond the foreseen: ``t_L - S t_l - B^T t_l``."""
        options, t_last = self.options, self.output.join({self.last: self.record.states.get(self.last)})
        if t_last is None:
            return
        for number, block in enumerate(self.blocks):
            v = block.goals[0]
            t = self.record.states.get(v)
            if v not in self.places or t is None:
                continue
            keeper, place = self.places[v]
            old = self.before[keeper]
            r = place.unfold(t)
            missed = t_last - self._foreseen(number, t)
            own = None if old is None else place.foreseen(r, old["B"])
            new = moments(old, r)
            new |= proven(old, None if own is None else agreement(missed, own), new["steps"], missed)
            gradient = place.outer(r, missed if own is None else missed - own) / samples(r)
            gain = normalised(new, shared_gain([(new, samples(r))]), options.beta)
            self.steps[keeper] = new | stepped(old, new["steps"], gradient, gain, leak=options.leak, clip=options.clip)

    def _foreseen(self, number: int, t: Tensor) -> Tensor:
        """What skips and later deviations make of a state's tangent, as the output sees it; not its own deviation."""
        total: Any = 0
        for block in self.blocks[number + 1 :]:
            if block.skip is None:
                return self._zero(t) + total
            t = self._forth(block, t)
            v = block.goals[0]
            if v in self.places:
                keeper, place = self.places[v]
                state = self.before[keeper]
                if state is not None:
                    total = total + state["share"] * place.foreseen(place.unfold(t), state["B"])
        last = self.output.join({self.last: t})
        assert last is not None
        return last + total

    def _zero(self, t: Tensor) -> Tensor:
        view = self.output.views[self.last]
        return t.new_zeros(self.output.n, view.positions, view.features)


def _output(graph: SiteGraph) -> Output:
    """``h_L`` in the output's place."""
    assert graph.chain is not None
    last = graph.chain.blocks[-1].source
    assert last is not None
    shape, n = graph.chain.shapes[last], graph.batch
    return Output([(last, apart(Layout.COUPLED, shape, n), shape)], n)


def stream_places(served: set[int], graph: SiteGraph, options: LearnedFeedback) -> dict[int, tuple[int, FeedbackMap]]:
    """By state, where a ``B`` is learned, and the site that keeps it: the last one served of the block before."""
    assert graph.chain is not None
    output, found, form = _output(graph), {}, options.form
    if form.structure == "auto" and not options.along_weights:
        form = Form("shared", form.entries)
    for block in graph.chain.blocks[:-2]:
        v, keeper = block.goals[0], max(served.intersection(block.sites), default=None)
        if keeper is not None:
            shape = graph.chain.shapes[v]
            layout = apart(Layout.COUPLED, shape, graph.batch)
            found[v] = (keeper, FeedbackMap(layout, shape, len(shape) > 3, output, form))
    return found
