"""The pass: run the closure once in forward mode, guesses in, directional derivatives out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor

from guessopt.engine.jvp.engines import JvpEngine, inner, is_foreign
from guessopt.engine.transaction import Transaction
from guessopt.errors import ClosureError
from guessopt.graph import Kind, SiteGraph
from guessopt.ops.base import CachedCall, is_in_place, moves_statistics
from guessopt.record import ForwardRecord, SavedCall
from guessopt.rng import RandomState, draws, replayed
from guessopt.sites import Call, Site, Value, name_of
from guessopt.tracing.answers import CustomFunction
from guessopt.tracing.functions import AS_IT_IS, autocast_of, stops_gradient
from guessopt.tracing.interceptor import Interceptor
from guessopt.tracing.writes import BINDING, Memory, copied, generators_in
from guessopt.tree import compared, map_tensors, results_of, tensors_in

Guess = Callable[[Site, Tensor, dict[int, Tensor]], "Tensor | tuple[Tensor, Tensor] | list[Tensor] | None"]


class GraphMismatch(BaseException):
    """The closure departs from the graph. It is no ``Exception``, so that a closure cannot swallow it.

    Args:
        index: number of the call, from 0.
        what: the difference, in a few words.
    """

    def __init__(self, index: int = -1, what: str = "") -> None:
        super().__init__(index, what)
        self.index, self.what = index, what


class ForwardRun(Interceptor):
    """The closure's calls, each handled as the graph says.

    Every call is compared with the graph's: its function, its arguments that are no tensors, and which values its
    tensors are. Numbers among the arguments may differ (``changed`` then lists the call). Tensors that the
    closure does not make may differ too, but not their shapes and dtypes.

    Args:
        params: ``id`` of each trainable parameter to its position.
        graph: of an earlier run; a run that departs from it raises ``GraphMismatch``.
        level: where tangents live.
        guess: the tangent for a site, from its output without tangent and the values kept aside; None for no tangent; a
            list for one direction ``[N, *shape]`` per parameter that the site reads; a pair for a tangent and what
            takes its place in the estimate.
        directions: tangents for parameters, by position.
        transaction: saves each tensor that the closure is about to write and has not made.
        keeps: whether to keep what parameter gradients need: the sites' inputs and the guesses.
        left: called with every visit that is kept, after its call.
        direct: calls whose gradients come from a block's own reverse graph; their visits are kept without arguments.
        repeats: raise ``GraphMismatch`` if the run reads other numbers or tensors than the last run.

    Attributes:
        known: by call, the results that guesses have computed before the closure makes the call.
        met: the tensors that the closure has not made, by value, without the trainable parameters.
        changed: calls (``-1 - index``) whose numbers differ from the graph's; the graph has taken over the new ones.
        stale: whether a guess was made from numbers or tensors that the closure then did not use.
        guessing: whether a guess is being made: an error is then none of the closure's.
    """

    def __init__(
        self,
        params: Mapping[int, int],
        graph: SiteGraph,
        engine: JvpEngine,
        guess: Guess,
        directions: Mapping[int, Tensor],
        transaction: Transaction,
        *,
        keeps: bool = True,
        left: Callable[[SavedCall], None] | None = None,
        direct: Collection[int] = (),
        repeats: bool = False,
    ) -> None:
        super().__init__(params)
        self.graph, self.engine, self.guess, self.directions = graph, engine, guess, directions
        self.transaction = transaction
        self.keeps = self.keeps_guesses = keeps
        self.left, self.direct, self.repeats = left, direct, repeats
        self.keeps_graph = graph.keeps_graph
        self.known: dict[int, CachedCall] = {}
        self.values: dict[int, Tensor] = dict(graph.constants)
        self.guesses: dict[int, Tensor] = {}
        self.saved_calls: list[SavedCall] = []
        self.visited: dict[int, SavedCall] = {}
        self.saved: SavedCall | None = None
        self.leaves: dict[int, Tensor] = {}
        self.duals: dict[int, Tensor] = {}
        self.met: dict[int, Tensor] = {}
        self.changed: list[int] = []
        self.stale = self.guessing = False
        #: Calls may return their argument unchanged, and the closure may keep both names of it. id of the argument ->
        #: (the argument, the tensor that the closure was given as the result).
        self.replaced: dict[int, tuple[Tensor, Tensor]] = {}
        #: By value, the leaf that the loss reads in place of the network's value.
        self.standins: dict[int, Tensor] = {}
        self.random: dict[int, RandomState | None] = {}
        if graph.chain is not None:
            self.random = dict.fromkeys(graph.chain.redrawn if engine.reverses else graph.chain.drawing)
        self._answers = iter(graph.answers)
        self.handling = graph.handling
        self._seen: dict[int, tuple[ref[Tensor], int]] = dict(graph.parameters_seen)
        self._moved: dict[int, int] = {}

    def moves(self, t: Tensor) -> bool:
        return self._value(t) in self.graph.active

    def requires_grad(self, answer: bool) -> bool:
        return next(self._answers, answer)  # as in the trace: code may branch on it

    def call(
        self,
        index: int,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        outline: list[Any],
    ) -> Any:
        if index >= len(self.handling):
            raise GraphMismatch(index, f"{name_of(fn)} is called after the last call of the earlier run")
        call, expected, kind, mutations, entering, leaving, noted, release = self.handling[index]
        if expected is not fn and expected != fn:
            raise GraphMismatch(index, f"{name_of(fn)} is called in place of {call.op}")
        if (not torch.is_grad_enabled() or stops_gradient(fn)) != (kind is Kind.STOPPED):
            raise GraphMismatch(
                index, f"{name_of(fn)} is called {'with' if kind is Kind.STOPPED else 'without'} gradients"
            )
        self._check_tensors(call, tensors)
        if outline != call.outline:
            self._check_arguments(call, args, kwargs, outline)
        if self.replaced and any(id(t) in self.replaced for t in tensors):
            args, kwargs, tensors = self._newest(args), self._newest(kwargs), self._newest(tensors)
        if mutations is not None:
            self._save(mutations, tensors, args, kwargs)
        for k, value in entering:
            self._keep(value, tensors[k])

        if index in self.random:
            self.random[index] = RandomState.before(args, kwargs, fn)
        out = self._run(index, kind, fn, args, kwargs, tensors)

        results = results_of(out, tensors)
        if len(results) != call.result_count:
            raise GraphMismatch(index, f"{name_of(fn)} returned {len(results)} tensors in place of {call.result_count}")
        if call.target is None and tensors and any(t is tensors[0] for t in results):
            out, results = self._copied(call, kind, out, results, tensors[0])
        for k, value in leaving:
            self._keep(value, results[k])
            out = self._replace(out, results, k, tensors, self.engine.mark(value, results[k], False))
        for k, value in noted:
            after = self.engine.note(value, results[k], clone=self._is_overwritten_later(value))
            out = self._replace(out, results, k, tensors, after)
        self._register(call, results, tensors)
        if not self.keeps:
            for value in release:
                self.values.pop(value, None)
        return out

    # --- the closure does what the graph says -------------------------------------------------------------------------

    def _check_tensors(self, call: Call, tensors: list[Tensor]) -> None:
        """Raise ``GraphMismatch`` unless each tensor is the value that the trace found in its place."""
        reads = call.reads
        if len(tensors) != len(reads):
            raise GraphMismatch(call.index, f"{call.op} takes {len(tensors)} tensors in place of {len(call.reads)}")
        seen, moved = self._seen, self._moved
        for k, t in enumerate(tensors):
            entry, expected = seen.get(id(t)), reads[k]
            value = expected if expected >= 0 else ~expected
            if entry is not None and entry[1] == value and entry[0]() is t and value not in moved:
                continue
            found = self._value(t)
            if expected < 0 and found < 0:
                self._meet(call, ~expected, t)
            elif found != expected:
                raise GraphMismatch(call.index, f"{call.op} reads another tensor")

    def _value(self, t: Tensor) -> int:
        """The tensor's value; -1 if this run has not seen the tensor yet."""
        entry = self._seen.get(id(t))
        if entry is None or entry[0]() is not t:
            return -1
        value = entry[1]
        while value in self._moved:
            value = self._moved[value]
        return value

    def _meet(self, call: Call, value: int, t: Tensor) -> None:
        """Check and note a tensor that the closure has not made."""
        known, graph = self.graph.outside[value], self.graph
        if t.shape != known.shape or t.dtype != known.dtype:
            raise GraphMismatch(
                call.index,
                f"{call.op} reads {_described(t.shape, t.dtype)} in place of {_described(known.shape, known.dtype)}",
            )
        position = self.params.get(id(t))
        if position != known.parameter:
            raise GraphMismatch(call.index, f"{call.op} reads another parameter")
        self._seen[id(t)] = entry = ref(t), value
        if position is not None:
            graph.parameters_seen[id(t)] = entry
            return
        if (
            self.repeats
            and graph.first_pass_tensors.get(value, t) is not t
            and not _equal(graph.first_pass_tensors[value], t)
        ):
            raise GraphMismatch(call.index, f"{call.op} reads a tensor that holds other numbers than a moment ago")
        self.met[value] = t
        if value in graph.constant_values and (constant := graph.constants.get(value)) is not t:
            if constant is None or not _equal(constant, t):
                if known.fixed and constant is not None:
                    raise GraphMismatch(call.index, f"{call.op} reads another weight")
                self.stale = True
            graph.constants[value] = t

    def _check_arguments(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], outline: list[Any]) -> None:
        """Compare the arguments that are no tensors: numbers may differ, nothing else."""
        same = compared(outline, call.outline)
        if same:
            return
        if same is False or call.fn in _STRUCTURAL or self.repeats:
            raise GraphMismatch(call.index, f"{call.op} has other arguments")
        values = iter(call.inputs)

        def recorded(_: Any) -> Any:
            return Value(next(values))

        call.renew(map_tensors(args, recorded), map_tensors(kwargs, recorded), outline)
        self.changed.append(-1 - call.index)
        self.stale = self.stale or call.index in self.graph.ahead

    def _register(self, call: Call, results: list[Tensor], tensors: list[Tensor]) -> None:
        """Note the values of the tensors that the call has returned or written."""
        outputs, inputs, seen = call.outputs, call.inputs, self._seen
        for k, t in enumerate(results):
            value = outputs[k]
            if value in inputs and not self._is_argument(value, t, tensors):
                raise GraphMismatch(call.index, f"{call.op} returned another tensor than its argument")
            seen[id(t)] = ref(t), value
        if call.target is not None:
            self._seen[id(tensors[call.target])] = ref(tensors[call.target]), outputs[0]
        if call.moves:
            self._moved.update(call.moves)

    def _is_argument(self, value: int, t: Tensor, tensors: list[Tensor]) -> bool:
        """Whether a call that returned its argument untouched when traced has done so; a copy serves as well (another
        kernel may have laid the argument out differently), unless something will be written into it."""
        if any(t is argument for argument in tensors):
            return True
        if self.engine.same_objects and value in self.graph.overwritten:
            return False
        return any(t.dtype is argument.dtype and t.shape == argument.shape for argument in tensors)

    def _copied(
        self, call: Call, kind: Kind, out: Any, results: list[Tensor], argument: Tensor
    ) -> tuple[Any, list[Tensor]]:
        """A call that made a new tensor when traced and now hands back its argument (which another kernel has laid out
        as it should be): a copy, so that each of the two values has a tensor of its own."""
        for k, t in enumerate(results):
            if t is argument and call.outputs[k] not in call.inputs and kind is not Kind.EXPRESSION:
                with self._mode(call.index):
                    copy = self.engine.call(Tensor.clone, (t,), {}, writes=False)
                out, results[k] = _put(out, t, copy), copy
        return out, results

    def _replace(self, out: Any, results: list[Tensor], k: int, tensors: list[Tensor], after: Tensor) -> Any:
        """``out`` with ``after`` as its ``k``-th tensor. If the old tensor is an argument, note the replacement: the
        closure may read the argument again."""
        before = results[k]
        if after is before:
            return out
        if any(before is t for t in tensors):
            self.replaced[id(before)] = before, after
        results[k] = after
        return _put(out, before, after)

    def _newest(self, node: Any) -> Any:
        def newest(t: Tensor) -> Tensor:
            return self.replaced[id(t)][1] if id(t) in self.replaced else t

        return map_tensors(node, newest)

    def _keep(self, value: int, t: Tensor) -> None:
        if self.engine.needs is not None and value not in self.engine.needs:
            return
        primal = self.engine.primal(t)
        self.values[value] = primal.clone() if self._is_overwritten_later(value) else primal

    def _is_overwritten_later(self, value: int) -> bool:
        chain = self.graph.chain
        return chain is not None and value in chain.overwritten_later

    # --- one call -----------------------------------------------------------------------------------------------------

    def _run(
        self,
        index: int,
        kind: Kind,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
    ) -> Any:
        if kind is Kind.PLAIN:
            with self._mode(index):
                return self._call(index, fn, args, kwargs)
        mine = [tensors[k] for k in self.graph.mine[index]]
        if kind is Kind.SITE:
            with self._mode(index):
                return self._site(index, fn, args, kwargs, tensors, mine)
        if kind is Kind.LOSS:
            return self._loss(index, fn, args, kwargs, tensors)
        if kind is Kind.EXPRESSION:
            state = RandomState.before(args, kwargs, fn) if self.duals and draws(fn) else None
            apart = self.engine.wraps and all(self.plain(t) is t for t in tensors) and not self._is_written(index)
            with (
                self.engine.outside() if apart else AS_IT_IS
            ):  # a transform refuses some operations on parameters alone
                out = self.engine.without_tangent(fn, args, kwargs)
            results = results_of(out, tensors)
            self.express(results, mine)
            if self.duals and any(self.plain(t).requires_grad for t in results):
                with replayed(state):  # the same noise in both
                    self._express_duals(index, fn, args, kwargs, out)
            return out
        return self._apart(index, fn, args, kwargs, tensors)

    def _is_written(self, index: int) -> bool:
        """Whether a call writes in place, or a later one into what it makes."""
        call = self.graph.calls[index]
        return call.in_place or not self.graph.overwritten.isdisjoint(call.outputs)

    def _apart(
        self, index: int, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        """Make a call without derivatives, on the tensors' numbers. The tensors that it writes or returns are the
        closure's own, and keep their tangents."""
        moving = [tensors[k] for k in self.graph.moving[index]]
        if fn in BINDING:  # which must reach the tensor itself
            moving = [t for t in moving if t is not tensors[0]]
        writes = fn in BINDING or index in self.graph.mutations
        if not moving:
            return (self.engine.write if writes else self.engine.without_tangent)(fn, args, kwargs)
        plain = {id(t): self.engine.primal(t) for t in moving}

        def swap(t: Tensor) -> Tensor:
            return plain.get(id(t), t)

        with self.no_grad, self.engine.outside():
            out = fn(*map_tensors(args, swap), **map_tensors(kwargs, swap))
        for t in moving:
            out = _put(out, plain[id(t)], t)
        return out

    def _loss(
        self, index: int, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        """Make a call of the loss, in ordinary reverse mode. In place of a value of the network it reads a leaf, whose
        gradient is the exact error."""
        graph, call = self.graph, self.graph.calls[index]
        swapped: dict[int, Tensor] = {}
        for t, value in zip(tensors, call.inputs, strict=True):
            if value in graph.cut_of and value not in self.standins:
                self.standins[value] = self._leaf(graph.cut_of[value], t)
            if value in self.standins:
                swapped[id(t)] = self.standins[value]
        if not swapped:
            return self.engine.without_tangent(fn, args, kwargs)
        target = tensors[0]
        written = call.in_place and id(target) in swapped

        def swap(t: Tensor) -> Tensor:
            return swapped.get(id(t), t)

        out = self.engine.without_tangent(fn, map_tensors(args, swap), map_tensors(kwargs, swap))
        if written:
            self.standins[call.outputs[0]] = result = swapped[id(target)]
            self._write_back(target, result)
            out = _put(out, result, target)  # the closure's own tensor, which it may go on to know by its first name
        return out

    def _leaf(self, number: int, t: Tensor) -> Tensor:
        """End the network at ``t``."""
        cut = self.graph.cuts[number]
        if t.shape != cut.shape:
            raise GraphMismatch(self.count - 1, f"the loss reads shape {list(t.shape)} in place of {list(cut.shape)}")
        with AS_IT_IS if self.engine.reverses else self.no_grad:
            if cut.overwritten_later:
                t = self.engine.call(Tensor.clone, (t,), {}, writes=False)
            used, self.leaves[number] = self.engine.cut(number, t)
        return used.clone() if self.graph.loss_writes else used

    def _write_back(self, target: Tensor, result: Tensor) -> None:
        """The loss has written into a value of the network: write the result into the tensor that the user holds."""
        with torch.no_grad(), self.engine.outside():
            self.engine.primal(target).copy_(self.engine.primal(result))

    def _mode(self, index: int) -> AbstractContextManager[Any]:
        return AS_IT_IS if index in self.engine.reverses else self.no_grad

    def _call(self, index: int, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = self.known.pop(index, None) if self.known else None
        if known is not None and known.matches(args, kwargs):
            out = self.engine.reuse(fn, args, kwargs, known)
            if out is not NotImplemented:
                return out
        targets = self.graph.mutations.get(index, ())
        hidden = self.graph.hidden.get(index, ())
        before = None
        if hidden or (targets and fn is not F.batch_norm and not is_in_place(fn)):
            before = Memory()
            own = tensors_in(args, kwargs)
            with self.engine.outside():
                for t in (*hidden, *(own[k] for k in targets)):
                    before.save(t)
        try:
            if fn in self.graph.without_forward or is_foreign(fn):
                raise NotImplementedError("forward AD passes it by")
            return self.engine.call(fn, args, kwargs, writes=bool(targets))
        except NotImplementedError as error:
            if before is not None:
                with self.engine.outside():
                    before.restore()
            if not any(word in str(error) for word in ("forward AD", "forward mode AD", "jvp")):
                raise
            if not is_in_place(fn) and not kwargs.get("inplace"):
                self.graph.without_forward.add(fn)
                try:
                    return self.engine.through_backward(fn, args, kwargs)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as failed:  # is what a user may see of it
                    failed.__context__, error.__context__ = None, failed
            remedy = (
                "give it a jvp (a static method beside forward and backward), or make its backward differentiable"
                if isinstance(fn, CustomFunction)
                else "use another operation, or detach its input if no gradient should pass"
            )
            raise ClosureError(
                f"{getattr(fn, '__name__', fn)} has no derivative in forward mode, by which gradients are estimated "
                f"here; {remedy}"
            ) from error

    def _site(
        self,
        index: int,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        mine: list[Tensor],
    ) -> Any:
        sites = self.graph.sites_at[index]
        in_place = sites[0].call.in_place
        self.saved = self._visit(fn, args, kwargs, tensors, mine, sites[0])
        if self.duals:
            args, kwargs = self._substituted(args, kwargs)
        out = self._call(index, fn, args, kwargs)
        results = results_of(out, tensors)
        for where, k, value in self.graph.watch.get(index, ()) if len(results) > 1 else ():
            if where == "out":  # a guess for one output may need the others (an LSTM cell's two states)
                self._keep(value, results[k])
        for site in sites:
            s = results[site.output]
            other = s.dtype != site.dtype and site.call.autocast is None  # under autocast a kernel may choose
            if tuple(s.shape) != site.shape or other:
                made = f"{_described(s.shape, s.dtype)} in place of {_described(site.shape, site.dtype)}"
                raise GraphMismatch(index, f"{site.op} gave {made}")
            out = self._replace(out, results, site.output, tensors, self.inject(site, s, in_place))
        if self.saved is not None:
            self.leave(self.saved)
            self.saved = None
        return out

    def _visit(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        mine: list[Tensor],
        site: Site,
    ) -> SavedCall | None:
        """The call's record for its parameter gradients; None if no parameter needs one."""
        wanted = list(self.graph.mine[site.call.index])
        if self.directions:
            wanted = [k for k in wanted if not self._is_directed(tensors[k])]
        if not wanted:
            return None
        variables = [t if id(t) in self.params else self.plain(t) for t in (tensors[k] for k in wanted)]
        if site.call.index in self.direct:
            self.visited[site.call.index] = SavedCall(site.call, (), {}, wanted, variables)
            return None
        own, bare = {id(t) for t in mine}, self.engine.primal
        later = {id(tensors[k]) for k in self.graph.overwritten_later.get(site.call.index, ())}

        def primal(t: Tensor) -> Tensor:
            if id(t) in own:
                return t
            return bare(t).clone() if id(t) in later else bare(t)

        args, kwargs = map_tensors(args, primal), map_tensors(kwargs, primal) if kwargs else kwargs
        if site.call.writes and not moves_statistics(fn):  # the call may be made once more for the gradients
            args, kwargs = copied(args, kwargs, [k for k in site.call.writes if k not in wanted])
        if site.call.in_place:
            args = (args[0].clone(), *args[1:])
        state = RandomState.before(args, kwargs, fn) if draws(fn) else None
        return SavedCall(site.call, args, kwargs, wanted, variables, state, autocast_of(tensors[0]))

    def leave(self, saved: SavedCall) -> None:
        """A site's call is over, and its outputs have their guesses."""
        if self.keeps:
            self.saved_calls.append(saved)
            if self.left is not None:
                self.left(saved)

    def inject(self, site: Site, s: Tensor, in_place: bool) -> Tensor:
        """The site's output with its guess for tangent."""
        primal = self.engine.primal(s)
        with self.engine.outside():
            self.guessing = True
            y = self.guess(site, primal, self.values)
            self.guessing = False
            if isinstance(y, list):
                y = self._by_parameter(site, y)
        if y is None:
            return self.engine.mark(site.value, s, site.overwritten)
        y, kept = y if isinstance(y, tuple) else (y, y)
        if self.keeps_guesses and (self.saved is None or self.saved.directions is None):
            self.guesses[site.index] = kept
        return self.engine.inject(s, y.clone() if site.overwritten else y, in_place)

    def _by_parameter(self, site: Site, directions: list[Tensor]) -> Tensor:
        """The output's tangent as each example's own parameters move along ``directions``; these are kept."""
        saved = self.saved
        assert saved is not None
        saved.directions = directions

        def tangent(vs: list[Tensor]) -> Tensor:
            found = site.rule.parameter_tangent(
                saved.call.fn, saved.args, saved.kwargs, saved.wanted, vs, lambda v: site.layout.place(v, site.shape)
            )
            return found.expand(site.shape)  # a stack of smaller ones would not broadcast against the output's

        return self.engine.each(tangent, directions)

    def plain(self, t: Tensor) -> Tensor:
        return self.engine.plain(t)

    def _is_directed(self, t: Tensor) -> bool:
        return bool(self.directions) and self.positions(t) <= self.directions.keys()

    def _substituted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def swap(t: Tensor) -> Tensor:
            return self.duals.get(id(t), t)

        return map_tensors(args, swap), map_tensors(kwargs, swap)

    def _express_duals(
        self, index: int, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        """The same expression with tangents, for the sites; the loss reads the plain one."""
        args, kwargs = self._substituted(args, kwargs)
        with self.no_grad:
            duals = tensors_in((self._call(index, fn, args, kwargs),))
        for plain, dual in zip(tensors_in((out,)), duals, strict=True):
            self.duals[id(plain)] = dual

    def _save(
        self, targets: tuple[int, ...], tensors: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        with self.engine.outside():
            for k in targets:
                self.transaction.save(tensors[k])
            for generator in generators_in(args, kwargs):
                self.transaction.save(generator)

    def run(self, closure: Callable[[], Any]) -> Any:
        self.transaction.watch(closure)
        try:
            return super().run(closure)
        finally:
            self.transaction.raised = self.raised

    def execute(self, closure: Callable[[], Any], params: Mapping[int, Tensor]) -> ForwardRecord:
        """Run the closure; ``params`` by position. Raises ``GraphMismatch``, ``ClosureError``, or what the
        closure raises."""

        def body() -> Tensor:
            self.duals = {id(params[p]): self.engine.substitute(params[p], v) for p, v in self.directions.items()}
            loss = self.run(closure)
            self.check_end(loss)
            self.transaction.settle(self.engine)
            if self.graph.returned in self.graph.cut_of:
                loss = self._leaf(self.graph.cut_of[self.graph.returned], loss)
            return self.engine.plain(self.standins.get(self.graph.returned, loss))

        plain = self.engine.run(body)
        graph = self.graph
        leaves = [self.leaves[number] for number in range(len(graph.cuts))]
        own = [p for p in sorted(graph.loss_params) if p in params]
        self.total = total = plain if plain.dim() == 0 else plain.mean()
        found: list[Tensor | None] = []
        if leaves or own:
            variables = [*leaves, *(params[p] for p in own)]
            found = list(torch.autograd.grad(total, variables, allow_unused=True, retain_graph=self.keeps_graph))
        errors = [torch.zeros_like(v) if e is None else e for v, e in zip(leaves, found, strict=False)]
        exact = {p: e for p, e in zip(own, found[len(leaves) :], strict=True) if e is not None}
        tangents = [self.engine.tangents.get(number) for number in range(len(leaves))]
        d = self.engine.each(partial(directional_derivatives, graph, errors), tangents)
        return ForwardRecord(
            loss=total.detach(), d=d, errors=errors, tangents=tangents, guesses=self.guesses,
            saved_calls=self.saved_calls, exact=exact, params=dict(self.directions), values=self.values,
            states=self.engine.notes,
            graphs=self.engine.graphs, block_calls=self.visited, random=self.random,
        )  # fmt: skip

    def check_end(self, loss: Any) -> None:
        """Raise ``GraphMismatch`` unless the closure has made all calls and returned the graph's loss."""
        if self.count != len(self.graph.calls):
            raise GraphMismatch(self.count, f"the closure ended before it called {self.graph.calls[self.count].op}")
        if not isinstance(loss, Tensor) or self._value(loss) != self.graph.returned:
            raise GraphMismatch(self.count, "the closure returned another tensor")


def directional_derivatives(graph: SiteGraph, errors: list[Tensor], tangents: list[Tensor | None]) -> Tensor:
    """``D_n = Re <dL/dv[n], v'[n]>`` summed over the cuts ``v`` (Singhal eq. 13's scalar, per example):
    ``[N]``, or ``[1]`` where some cut's examples cannot be told apart. Equal to the derivative of each example's share
    of the loss."""
    parts = [
        cut.layout.sum_examples(inner(_wide(e), _wide(t)), graph.batch)
        for cut, e, t in zip(graph.cuts, errors, tangents, strict=True)
        if t is not None
    ]
    if not parts:
        return torch.zeros(1)
    if len({part.shape[0] for part in parts}) > 1:
        parts = [part.sum().reshape(1) for part in parts]
    d = parts[0]
    for part in parts[1:]:
        d = d + part
    return d


#: Calls whose numbers decide which entries meet: other numbers make another graph.
_STRUCTURAL = {torch.cat, torch.concat, torch.concatenate, F.conv1d, F.conv2d, F.conv3d, F.batch_norm, F.dropout}


def _described(shape: Any, dtype: torch.dtype) -> str:
    return f"a tensor {list(shape)} of {dtype}"


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    with torch.no_grad():
        return a.layout is b.layout and bool(torch.equal(a, b))


def _wide(t: Tensor) -> Tensor:
    if t.dtype is torch.complex32:
        return t.to(torch.complex64)
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _put(out: Any, old: Tensor, new: Tensor) -> Any:
    """``out`` with one tensor replaced."""
    if old is new or out is old:
        return new if out is old else out
    if isinstance(out, tuple):
        items = [_put(item, old, new) for item in out]
        return type(out)(*items) if hasattr(out, "_fields") else type(out)(items)
    if isinstance(out, list):
        return [_put(item, old, new) for item in out]
    return out
