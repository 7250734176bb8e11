"""From a tape to a ``SiteGraph``: where the network ends, which site feeds which, and what shares a cotangent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guessopt.chains import Stream
from guessopt.graph import Cut, Kind, Outside, SiteGraph
from guessopt.layout import Layout, Shape, numel
from guessopt.ops.base import Rule, op_of
from guessopt.ops.elementwise import fused_pull_back, is_elementwise, is_rectifier
from guessopt.ops.matrix import MatrixRule
from guessopt.sites import Call, DownstreamPath, Matrix, OutputSpan, ParallelSites, Segment, Site, Value
from guessopt.tracing.interceptor import CustomFunction, dense
from guessopt.tracing.residual import Chain
from guessopt.tracing.tape import Tape

#: Entries of an example's output to a parameter's, from which on the parameters themselves are guessed.
OUTNUMBERED = 4

#: Matrix sites that ``Segment.onward`` passes at most.
FURTHEST = 4


_INDEX = (torch.int64, torch.int32, torch.bool)
_ROUTING = ("getitem", "setitem", "index", "gather", "scatter", "take", "masked_select", "sort")


#: The rule for operations on complex numbers, by torch's own derivative. The other rules are written for real numbers.
_GENERIC = Rule()

_JOINS = (torch.cat, torch.concat, torch.concatenate)


class _SharedMemory(Exception):
    """A segment cannot be run by itself."""


@dataclass
class Analysis:
    """What the tape says about derivatives. ``returned`` is the loss's value."""

    tape: Tape
    returned: int

    def __post_init__(self) -> None:
        tape = self.tape
        self.active = tape.active
        self.blocked: dict[int, str] = {}
        self.without_forward: set[Callable[..., Any]] = set()
        self._next_inputs: dict[tuple[int, ...], int | None] = {}
        self._expressions: dict[tuple[tuple[int, ...], int], int] = {}
        self.useful = self._ancestors()
        self.loss = self._loss_calls()
        self.cut_values = self._cut_values()

    def _ancestors(self) -> set[int]:
        """Calls through which a derivative reaches the loss."""
        tape, found, stack, seen = self.tape, set(), [self.returned], set()
        while stack:
            v = stack.pop()
            if v in seen or v not in self.active:
                continue
            seen.add(v)
            call = tape.producer[v]
            found.add(call)
            stack += tape.calls[call].sources
        return found

    def _loss_calls(self) -> set[int]:
        """The calls after the network's end: neither matrix sites nor parameters, but for single numbers (a loss's
        weight, a temperature, an L2 term) or in a fused head, and read by nothing but the loss."""
        tape = self.tape
        loss: set[int] = set()
        stack = [self.returned]
        while stack:
            v = stack.pop()
            c = tape.producer.get(v)
            if c is None or c in loss or v not in self.active or not self._passable(c):
                continue
            loss.add(c)
            stack += tape.calls[c].inputs
        while True:
            drop = {
                c
                for c in loss
                if any(
                    user in self.useful and user not in loss
                    for v in tape.calls[c].outputs
                    for user in tape.consumers.get(v, ())
                )
            }
            if not drop:
                return loss
            loss -= drop

    def _passable(self, c: int) -> bool:
        tape = self.tape
        call = tape.calls[c]
        if tape.kinds[c] is Kind.STOPPED:
            return False
        if tape.kinds[c] is Kind.SITE:
            if call.in_place and call.aliases:
                return False
            fused = _is_loss_with_parameters(call.fn)
            return (fused or all(numel(tape.shapes[call.inputs[k]]) == 1 for k in tape.mine[c])) and any(
                v in self.active for v in call.inputs
            )
        return self.matrix_of(call) is None and not call.aliases

    def _cut_values(self) -> list[int]:
        tape, cuts = self.tape, []
        for c in sorted(self.loss):
            for v in tape.calls[c].inputs:
                if v in self.active and tape.producer[v] not in self.loss and v not in cuts:
                    cuts.append(v)
        if self.returned in self.active and tape.producer[self.returned] not in self.loss:
            cuts.append(self.returned)
        return cuts

    def matrix_of(self, call: Call) -> tuple[MatrixRule, int, int] | None:
        """The rule, the weight's and the input's value, if the call is a linear layer or convolution
        (frozen or not)."""
        rule = op_of(call.fn).rule
        if not isinstance(rule, MatrixRule):
            return None
        try:
            w, x = rule.weight(call.args, call.kwargs), rule.input(call.args, call.kwargs)
        except (IndexError, KeyError):
            return None
        if not isinstance(w, Value) or not isinstance(x, Value) or w.id in self.active:
            return None
        dims = len(self.tape.shapes[w.id])
        if rule.geometry(call) == "linear" and (dims != 2 or w.id not in self.tape.weights):
            return None
        return rule, w.id, x.id

    def weight_calls(self) -> frozenset[int]:
        """Calls on parameters and constants whose result serves as the weight or bias of a linear layer or convolution
        (a pruning mask, a spectral norm, a merged LoRA update): parameter expressions after all."""
        tape, found = self.tape, set()
        for c in self.useful:
            call = tape.calls[c]
            if call.fn not in _LAYERS:
                continue
            stack = [a.id for a in (*call.args[1:], *call.kwargs.values()) if isinstance(a, Value)]
            own: set[int] = set()
            while stack:
                producer = tape.producer.get(v) if (v := stack.pop()) in self.active else None
                if producer is None:
                    continue
                if tape.calls[producer].fn in _LAYERS:
                    break  # a network of its own makes the weight
                if tape.kinds[producer] is Kind.SITE and not self.active.intersection(tape.calls[producer].inputs):
                    own.add(producer)
                stack += tape.calls[producer].inputs
            else:
                found |= own
        return frozenset(found)

    def sites(self) -> list[Site]:
        """Every output, of a call that reads trainable parameters, from which a derivative reaches the loss."""
        tape = self.tape
        found: list[Site] = []
        for c in sorted(self.useful - self.loss):
            if tape.kinds[c] is not Kind.SITE:
                continue
            call = tape.calls[c]
            read = {v for v in call.outputs if v in self.cut_values or self._is_read(v)}
            for k, v in enumerate(call.outputs[: call.direct]):
                if v in self.active and (v in read or (call.in_place and read)):
                    found.append(
                        Site(
                            index=len(found), call=call, output=k, value=v,
                            rule=_GENERIC if self._is_complex(*call.inputs, *call.outputs) else op_of(call.fn).rule,
                            params=tuple(sorted(tape.origins[c])), shape=tape.shapes[v], dtype=tape.dtypes[v],
                            segment=self.segment(v), overwritten=v in tape.overwritten, reach=self._reach(call),
                            kept=self._kept(call, v),
                        )
                    )  # fmt: skip
        return [self._shared(site, found) for site in found]

    def _is_read(self, v: int) -> bool:
        """Whether a derivative goes on from the value towards the loss."""
        return any(u in self.useful for u in self.tape.consumers.get(v, ()))

    def _is_complex(self, *values: int) -> bool:
        """Whether one of the values is complex."""
        return any(self.tape.dtypes[v].is_complex for v in values)

    def _reach(self, call: Call) -> OutputSpan | None:
        """For tensors joined by ``cat``: the spans that hold parameters."""
        tape = self.tape
        if call.fn not in _JOINS or not call.args or not isinstance(call.args[0], (tuple, list)):
            return None
        dim = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", call.kwargs.get("axis", 0))
        spans, start = [], 0
        for k, v in enumerate(call.inputs):
            stop = start + tape.shapes[v][dim]
            if k in tape.mine[call.index]:
                spans.append((start, stop))
            start = stop
        return OutputSpan(dim, tuple(spans))

    def _kept(self, call: Call, output: int) -> int:
        """Bytes that a pass keeps for a site: its activations, and the guess (not the parameters)."""
        tape = self.tape
        values = {v for v in call.inputs if v not in tape.weights} | {output}
        return sum(numel(tape.shapes[v]) * tape.dtypes[v].itemsize for v in values)

    def cost(self) -> float:
        """Matrix products of a step in units of a forward pass: the forward, the tangents, the parameter gradients."""
        tape, forward, tangents, gradients = self.tape, 0.0, 0.0, 0.0
        for call, kind in zip(tape.calls, tape.kinds, strict=True):
            m = self.matrix_of(call)
            if m is None:
                continue
            rows = tape.shapes[m[1]]
            work = numel(tape.shapes[call.outputs[0]]) * numel(rows) / rows[0]
            forward += work
            tangents += work if m[2] in self.active else 0.0
            gradients += work if kind is Kind.SITE else 0.0
        return (forward + tangents + gradients) / forward if forward else 1.0

    def _shared(self, site: Site, sites: list[Site]) -> Site:
        """A bias added right after a site has the same cotangent: one guess, at the later of the two, serves both."""
        tape, share = self.tape, None
        users = [u for u in tape.consumers.get(site.value, ()) if u in self.useful]
        if len(users) == 1 and site.value not in self.cut_values:
            call = tape.calls[users[0]]
            follower = next((s for s in sites if s.call is call), None)
            plain_add = op_of(call.fn).is_addition and not call.kwargs and len(call.args) == 2 and not call.aliases
            if follower and plain_add and follower.shape == site.shape and not self._parts_differ(follower, site):
                share = follower.index
        end = site
        while share is not None and end.value not in self.cut_values:
            users = [u for u in tape.consumers.get(end.value, ()) if u in self.useful]
            end = next(s for s in sites if s.call is tape.calls[users[0]])
            if end.index == share:
                break
        cut = self.cut_values.index(end.value) if end.value in self.cut_values else None
        return replace(site, shares=share, cut=cut)

    @staticmethod
    def _parts_differ(a: Site, b: Site) -> bool:
        """Whether one is complex and the other real."""
        return a.dtype.is_complex is not b.dtype.is_complex

    def segment(self, source: int) -> Segment | None:
        """The way from a site's output to the next matrix site(s): the first one reached, and its parallels."""
        tape = self.tape
        x = self._next_input([source])
        if x is None:
            return None
        if self._is_complex(source, x, *(w for _, _, w in self._readers(x))):
            self.blocked[source] = "its output, or the next layer, is complex"
            return None
        found: dict[str, list[tuple[Call, MatrixRule, int]]] = {}
        for call, rule, w in self._readers(x):
            inner = tape.shapes[w][1:] if rule.geometry(call) != "linear" else ()
            found.setdefault(f"{rule.geometry(call)} {inner}", []).append((call, rule, w))
        matrices = tuple(
            Matrix(
                rule=calls[0][1], call=calls[0][0], weights=tuple(w for _, _, w in calls),
                weight_shapes=tuple(tape.shapes[w] for _, _, w in calls), x=x, x_shape=tape.shapes[x],
                key=";".join(self._weight_key(w) for _, _, w in calls),
            )
            for calls in found.values()
        )  # fmt: skip
        chain = self._chain(source, x)
        try:
            program = self._program(source, [x]) if chain is None else ()
            weights = self._program(source, [w for m in matrices for w in m.weights])
        except _SharedMemory as error:
            self.blocked[source] = str(error)
            return None
        fused = None if chain is None else fused_pull_back(chain)
        rectified = chain is not None and is_rectifier(chain)
        return Segment(source, matrices, chain, program, weights, fused, rectified, self._onward(source, x))

    def _next_input(self, values: list[int]) -> int | None:
        """The input of the first matrix site that these values reach; None where none follows."""
        tape, known = self.tape, tuple(values)
        if known in self._next_inputs:
            return self._next_inputs[known]
        reached, nearest, stack = set(values), None, list(values)
        while stack:
            v = stack.pop()
            for c in tape.consumers.get(v, ()):
                if c not in self.useful:
                    continue
                call = tape.calls[c]
                if (m := self.matrix_of(call)) is not None and m[2] == v:
                    nearest = c if nearest is None else min(nearest, c)
                    continue
                for o in call.outputs:
                    if o in self.active and o not in reached:
                        reached.add(o)
                        stack.append(o)
        first = self.matrix_of(tape.calls[nearest]) if nearest is not None else None
        self._next_inputs[known] = first[2] if first is not None else None
        return self._next_inputs[known]

    def leads_to(self, v: int, sites: Sequence[Site]) -> set[int]:
        """The outputs of the first sites after a value, and the cuts that it reaches past none."""
        ends = {site.value for site in sites} | set(self.cut_values)
        found: set[int] = set()
        stack, seen = [v], {v}
        while stack:
            for c in self.tape.consumers.get(stack.pop(), ()):
                for o in self.tape.calls[c].outputs if c in self.useful else ():
                    if o in ends:
                        found.add(o)
                    elif o in self.active and o not in seen:
                        seen.add(o)
                        stack.append(o)
        return found

    def _readers(self, x: int) -> list[tuple[Call, MatrixRule, int]]:
        """The matrix sites that read ``x``: call, rule and weight."""
        calls = [self.tape.calls[c] for c in sorted(set(self.tape.consumers[x])) if c in self.useful]
        found = ((call, self.matrix_of(call)) for call in calls)
        return [(call, m[0], m[1]) for call, m in found if m is not None and m[2] == x]

    def _onward(self, source: int, x: int) -> tuple[DownstreamPath, ...]:
        """The ways from a site's output through 1, 2, ... matrix sites (Singhal eq. 7); ``x``: the
        first one's input."""
        tape = self.tape
        found: list[DownstreamPath] = []
        following: int | None = x
        while following is not None and len(found) < FURTHEST:
            outputs = [o for call, _, _ in self._readers(following) for o in call.outputs]
            following = self._next_input(outputs)
            goals = outputs if following is None else [following]
            if self._is_complex(*goals):
                break
            try:
                program = self._program(source, goals)
            except _SharedMemory:
                break
            found.append(DownstreamPath(tuple(goals), tuple(tape.shapes[v] for v in goals), program))
        return tuple(found)

    def _weight_key(self, w: int) -> str:
        """Names a weight across traces: its parameter's position; the parameters of which it is an expression; else, of
        a weight that does not train, what it holds."""
        tape, shape = self.tape, list(self.tape.shapes[w])
        if w in tape.parameters:
            return f"param {tape.parameters[w]}"
        if w in tape.outside:
            return f"constant {shape} {_fingerprint(tape.outside[w])}"
        origin = sorted(tape.origins[tape.producer[w]])
        return (
            f"expression of {origin} {shape} {self._expressions.setdefault((tuple(origin), w), len(self._expressions))}"
        )

    def _chain(self, source: int, x: int) -> tuple[Call, ...] | None:
        tape, chain, v = self.tape, [], x
        while v != source:
            c = tape.producer.get(v)
            if c is None:
                return None
            call = tape.calls[c]
            if len(call.inputs) != 1 or call.aliases or call.held:
                return None
            if not is_elementwise(call.fn) or self._is_complex(v):
                return None
            if tape.shapes[call.inputs[0]] != tape.shapes[v]:
                return None
            chain.append(call)
            v = call.inputs[0]
        return tuple(reversed(chain))

    def _program(self, source: int, goals: list[int]) -> tuple[Call, ...]:
        """The calls, in order, that compute the goals from the source and from what is known when the source is."""
        tape, start, calls = self.tape, self.tape.producer[source], set()
        stack = list(goals)
        while stack:
            v = stack.pop()
            c = tape.producer.get(v)
            if v == source or c is None or c in calls or (c <= start and v not in tape.aliased):
                continue
            if tape.calls[c].aliases or v in tape.aliased:
                raise _SharedMemory(f"{tape.calls[c].op} writes into memory that other tensors share")
            calls.add(c)
            stack += tape.calls[c].inputs
        return tuple(tape.calls[c] for c in sorted(calls))

    def graph(
        self,
        sites: list[Site],
        layouts: dict[int, Layout],
        batch: int,
        *,
        segments: bool = True,
        stream: bool = False,
        ends: dict[int, Layout] | None = None,
    ) -> SiteGraph:
        """Freeze. ``layouts``, ``ends``: of each site's and each cut's value. ``segments``: whether guesses will need
        them; ``stream``: whether an estimator asks for the residual stream."""
        tape = self.tape
        calls_of_sites = {site.call.index for site in sites}
        kinds = [self._kind(c, calls_of_sites) for c in range(len(tape.calls))]
        cuts = tuple(self._cut(v, (ends or layouts).get(v, Layout.COUPLED)) for v in self.cut_values)
        final = tuple(
            replace(
                site,
                layout=layouts.get(site.value, Layout.COUPLED),
                cut=None if site.cut is None or cuts[site.cut].shared else site.cut,
                by_parameter=self._is_outnumbered(site, sites, layouts.get(site.value, Layout.COUPLED), batch),
                direction_shapes=self._direction_shapes(site, layouts.get(site.value, Layout.COUPLED), batch),
            )
            for site in sites
        )
        found = self._stream(final, batch) if stream and batch > 1 else None
        watch, release, constants = self._watch(final, found) if segments else ({}, {}, {})
        by_loss = self._loss_parameter_calls()
        return SiteGraph(
            calls=tuple(tape.calls), kinds=tuple(kinds), reads=tuple(tape.origins), mine=tuple(tape.mine),
            outside=self._outside(), active=frozenset(self.active),
            overwritten=frozenset(tape.overwritten), sites=final, cuts=cuts, batch=batch,
            mutations=dict(tape.writes.found), rewritten=tape.rewritten, hidden=tape.writes.hidden,
            watch=watch, release=release, constants=constants,
            ahead=self._ahead(final) if segments else frozenset(),
            returned=self.returned,
            loss_params=frozenset().union(*(tape.origins[c] for c in by_loss)),
            keeps_graph=any(tape.kinds[c] is Kind.EXPRESSION for c in by_loss),
            stopped_params=frozenset(tape.stopped),
            answers=tuple(tape.answers),
            cost=self.cost(),
            shared_writes=tuple(
                call.op for call in tape.calls
                if call.in_place and call.aliases and not self.loss & {call.index}
                and any(v in self.active for v in (*call.inputs, *call.outputs))
            ),
            blocked={site.index: self.blocked[site.value] for site in sites if site.value in self.blocked},
            stream=found,
            joints=self._joints(final) if segments else (),
            without_forward=self.without_forward,
        )  # fmt: skip

    def _kind(self, c: int, calls_of_sites: set[int]) -> Kind:
        kind = self.tape.kinds[c]
        if c in self.loss:
            return Kind.LOSS
        if kind not in (Kind.SITE, Kind.PLAIN) or c in calls_of_sites:
            return kind
        call = self.tape.calls[c]
        if returned := self.active.intersection(call.inputs, call.outputs):
            # It handed back its argument, and may hand back a copy next time: derivatives must pass.
            return Kind.LOSS if all(self.tape.producer[v] in self.loss for v in returned) else Kind.PLAIN
        reached = any(v in self.active for v in call.inputs)
        return Kind.IDLE if reached and c not in self.useful else Kind.PLAIN

    def _outside(self) -> dict[int, Outside]:
        tape = self.tape
        weights = {m[1] for call in tape.calls if (m := self.matrix_of(call)) is not None}
        return {
            v: Outside(
                tape.shapes[v], tape.dtypes[v], tape.parameters.get(v), v in weights and v not in tape.parameters
            )
            for v in tape.first_use
        }

    @staticmethod
    def _ahead(sites: tuple[Site, ...]) -> frozenset[int]:
        """The calls that segments make before the closure does."""
        segments = [site.segment for site in sites if site.segment is not None]
        return frozenset(
            call.index
            for segment in segments
            for program in (
                segment.elementwise or (), segment.program, segment.weight_program,
                *(way.program for way in segment.onward),
            )
            for call in program
        )  # fmt: skip

    def _joints(self, sites: tuple[Site, ...]) -> tuple[ParallelSites, ...]:
        """Sites of linear layers with one input, one layout and one next matrix site, on the way to which they meet."""
        groups: dict[tuple[Any, ...], list[Site]] = {}
        for site in sites:
            m, segment = self.matrix_of(site.call), site.segment
            if m is None or m[0].geometry(site.call) != "linear" or segment is None or site.shares is not None:
                continue
            alone = segment.elementwise is not None or site.overwritten or site.call.in_place
            if not (alone or site.by_parameter or any(other.shares == site.index for other in sites)):
                key = (m[2], segment.matrices[0].x, site.layout, site.shape[:-1], site.dtype)
                groups.setdefault(key, []).append(site)
        return tuple(self._joint(group) for group in groups.values() if len(group) > 1)

    def _joint(self, sites: list[Site]) -> ParallelSites:
        first, *rest = sites
        assert first.segment is not None
        others = self._program(first.value, [site.value for site in rest])
        done = {call.index for call in others}
        program = tuple(call for call in first.segment.program if call.index not in done)
        return ParallelSites(tuple(site.index for site in sites), tuple(site.value for site in sites), others, program)

    def _stream(self, sites: tuple[Site, ...], batch: int) -> Stream | None:
        tape, calls = self.tape, tuple(sorted(self.useful - self.loss))
        if self._is_complex(*self.cut_values, *(site.value for site in sites)):
            return None
        matrices = frozenset(
            c for c in calls if (m := self.matrix_of(tape.calls[c])) is not None and m[2] in self.active
        )
        found = Chain(tape, calls, tuple(self.cut_values), matrices).stream(sites)
        if found is None or self._is_complex(*found.shapes):
            return None
        if any(Layout.candidates(s, batch)[0] is Layout.COUPLED for s in found.shapes.values()):
            return None
        needed = {v for block in found.blocks for v in block.needs()}
        return replace(found, fragile=frozenset(needed & tape.overwritten))

    def _loss_parameter_calls(self) -> set[int]:
        """Expressions of parameters alone that the loss reads."""
        tape, found = self.tape, set(self.loss)
        stack = [self.returned, *(v for c in self.loss for v in tape.calls[c].inputs)]
        while stack:
            c = tape.producer.get(stack.pop())
            if c is not None and c not in found and tape.kinds[c] is Kind.EXPRESSION:
                found.add(c)
                stack += tape.calls[c].inputs
        return found

    def _direction_shapes(self, site: Site, layout: Layout, batch: int) -> tuple[Shape, ...]:
        examples = 1 if layout is Layout.COUPLED else batch
        c = site.call.index
        return tuple((examples, *self.tape.shapes[site.call.inputs[k]]) for k in self.tape.mine[c])

    def _is_outnumbered(self, site: Site, sites: list[Site], layout: Layout, batch: int) -> bool:
        """Whether an example's output has several times as many entries as the parameters that the site reads."""
        if not site.rule.has_parameter_tangent or site.shares is not None or any(s.shares == site.index for s in sites):
            return False
        shapes = [self.tape.shapes[site.call.inputs[k]] for k in self.tape.mine[site.call.index]]
        dims = len(site.shape) - (2 if layout is Layout.BATCH_SECOND else 1)
        if site.rule.channels_second:
            dims -= len(site.shape) - 2
        fits = all(len(shape) <= dims or (len(shape) <= dims + 1 and shape[:1] == (1,)) for shape in shapes)
        entries = numel(site.shape) // (1 if layout is Layout.COUPLED else batch)
        return fits and entries >= OUTNUMBERED * sum(numel(shape) for shape in shapes)

    def _cut(self, v: int, layout: Layout) -> Cut:
        shared = any(u in self.useful and u not in self.loss for u in self.tape.consumers.get(v, ()))
        return Cut(v, self.tape.shapes[v], layout, shared, v in self.tape.overwritten)

    def _watch(
        self, sites: tuple[Site, ...], stream: Stream | None
    ) -> tuple[dict[int, tuple[tuple[str, int, int], ...]], dict[int, tuple[int, ...]], dict[int, Tensor]]:
        """What a run must keep aside for the segments and the stream: where each value first appears, and after which
        call none needs it; and parameters for good."""
        tape = self.tape
        first: dict[int, int] = {}  # value -> calls of the first and the last site that need it
        last: dict[int, int] = {}
        for site in sites:
            if site.segment is None or site.shares is not None:
                continue
            onward = (call for way in site.segment.onward for call in way.program)
            calls = (*site.segment.program, *site.segment.weight_program, *onward)
            made = {site.value, *(o for call in calls for o in call.outputs)}
            needed = {v for call in calls for v in call.inputs if v not in made}
            needed.update(w for matrix in site.segment.matrices for w in matrix.weights if w not in made)
            last.update(dict.fromkeys(needed, site.call.index))
            first = dict.fromkeys(needed, site.call.index) | first
        if stream is not None:  # needed after the pass
            last.update(dict.fromkeys((*stream.shapes, *(v for block in stream.blocks for v in block.needs())), -1))
        watch: dict[int, list[tuple[str, int, int]]] = {}
        release: dict[int, list[int]] = {}
        constants: dict[int, Tensor] = {}
        for v in sorted(last):
            if v in tape.producer:
                call = tape.calls[tape.producer[v]]
                watch.setdefault(call.index, []).append(("out", call.outputs.index(v), v))
            else:
                call_index, position = tape.first_use[v]
                if v in tape.outside and (v in tape.weights or call_index > first.get(v, call_index)):
                    constants[v] = tape.outside[v]  # a later graph of the same tape takes over what an earlier one held
                if v in tape.weights:
                    continue
                watch.setdefault(call_index, []).append(("in", position, v))
            if last[v] >= 0:
                release.setdefault(last[v], []).append(v)
        return (
            {c: tuple(entries) for c, entries in watch.items()},
            {c: tuple(values) for c, values in release.items()},
            constants,
        )

    def routes_by_data(self) -> bool:
        """Whether the network picks rows by indices computed as it runs (sorting, gathers, experts): an order that may
        differ from step to step at the same shapes."""
        tape = self.tape
        for c in self.useful - self.loss:
            call = tape.calls[c]
            if tape.kinds[c] is Kind.PLAIN and any(v in self.active for v in call.inputs):
                indices = [v for v in call.inputs if tape.dtypes[v] in _INDEX and numel(tape.shapes[v]) > 1]
                if any(word in call.op for word in _ROUTING) and indices:
                    return True
        return False

    def coupled_by_batch_norm(self) -> set[int]:
        """Values of sites upstream of a batch norm in training mode: its statistics make the examples interact."""
        calls = (self.tape.calls[c] for c in self.useful - self.loss)
        return self.upstream(v for call in calls if _normalises_batch(call) for v in call.inputs)

    def upstream(self, values: Iterable[int]) -> set[int]:
        """Those of the values through which derivatives pass, and the values from which derivatives reach these."""
        tape, seen, stack = self.tape, set[int](), list(values)
        while stack:
            v = stack.pop()
            if v not in seen and v in self.active:
                seen.add(v)
                stack += tape.calls[tape.producer[v]].sources
        return seen


def _is_loss_with_parameters(fn: Callable[..., Any]) -> bool:
    """Whether ``fn`` is a loss with the network's last layer in it."""
    return op_of(fn.cls.__name__ if isinstance(fn, CustomFunction) else fn).is_loss


_LAYERS: set[Callable[..., Any]] = {F.linear, F.conv1d, F.conv2d, F.conv3d}


def _normalises_batch(call: Call) -> bool:
    if call.fn is torch.nn.functional.batch_norm:
        return bool(call.kwargs.get("training", call.args[5] if len(call.args) > 5 else False))
    return call.fn is torch.batch_norm and bool(call.args[5])


def _fingerprint(t: Tensor) -> str:
    """A name for the numbers of a weight: the sum of about a thousand entries."""
    with torch.no_grad():
        numbers = dense(t.detach()).flatten()
        return f"{float(numbers[:: max(numbers.numel() // 1024, 1)].double().sum()):.6g}"
