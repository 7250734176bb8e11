"""``ForwardRun``: run the closure once in forward mode, guesses in, directional derivatives out.

The graph gives each call of the closure a ``Kind``. The run handles the call by its kind:

| kind | handled |
|---|---|
| plain | with its derivative |
| site | with its derivative; its outputs then get their guesses as tangents, and its arguments are saved |
| expression of parameters | in reverse mode: it records an ordinary autograd graph |
| loss | in reverse mode, on leaves that replace the network's values: the leaves' gradients are the exact errors |
| stopped, idle | without derivatives |
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from guessopt.engine.directional import by_position, directional_derivatives
from guessopt.engine.following import FollowingRun, GraphMismatch, described
from guessopt.engine.jvp.base import JvpEngine
from guessopt.engine.loss import LossCalls
from guessopt.engine.op_call import OpCall
from guessopt.engine.operation import differentiate
from guessopt.engine.replacements import Replacements, put
from guessopt.engine.transaction import Transaction
from guessopt.graph import Kind, SiteGraph
from guessopt.layout import is_differentiable
from guessopt.ops.base import moves_statistics
from guessopt.ops.cached import CachedCall
from guessopt.record import ForwardRecord, Guess, SavedCall
from guessopt.rng import RandomState, draws, replayed
from guessopt.sites import Site
from guessopt.tracing.functions import AS_IT_IS, autocast_of
from guessopt.tracing.writes import BINDING, copied, generators_in
from guessopt.tree import results_of, tensors_in

GuessAt = Callable[[Site, Tensor, dict[int, Tensor]], "Guess | None"]


class ForwardRun(FollowingRun):
    """A run of the closure along ``graph``. Subclasses may redefine ``perform``, ``differentiate``, ``inject`` and
    ``leave``.

    Args:
        params: ``id`` of each trainable parameter to its position.
        graph: the graph of an earlier run. A run that departs from the graph raises ``GraphMismatch``.
        engine: computes the derivatives.
        guess: called as ``guess(site, s, values)`` at each site, with the site's output ``s`` without tangent and the
            kept tensors by value. Returns the site's ``Guess``; None: no tangent.
        directions: tangents for parameters, by position.
        transaction: saves each tensor that the closure has not made, before the closure writes the tensor.
        keeps: whether to keep the sites' arguments and the guesses, from which parameter gradients are formed.
        left: called with every ``SavedCall`` that is kept, after its call.
        direct: calls whose gradients come from a block's own reverse graph. Their arguments are not saved.
        repeats: raise ``GraphMismatch`` if the run reads other numbers or tensors than the last run.

    Attributes:
        known: by call, results of calls evaluated early.
        values: by value, the tensors without tangent that the graph asks the run to keep.
        guessing: whether the run is making a guess. An error is then not the closure's fault.
        duals: ``id`` of a parameter or an expression of parameters -> its copy with a tangent, for the sites.
        random: by call, the random state before the call.
    """

    def __init__(
        self,
        params: Mapping[int, int],
        graph: SiteGraph,
        engine: JvpEngine,
        guess: GuessAt,
        directions: Mapping[int, Tensor],
        transaction: Transaction,
        *,
        keeps: bool = True,
        left: Callable[[SavedCall], None] | None = None,
        direct: Collection[int] = (),
        repeats: bool = False,
    ) -> None:
        super().__init__(params, graph, same_objects=engine.same_objects, repeats=repeats)
        self.engine, self.guess, self.directions = engine, guess, directions
        self.transaction = transaction
        self.keeps = self.keeps_guesses = keeps
        self.left, self.direct = left, direct
        self.keeps_graph = graph.keeps_graph
        self.known: dict[int, CachedCall] = {}
        self.values: dict[int, Tensor] = dict(graph.constants)
        self.guesses: dict[int, Tensor] = {}
        self.saved_calls: list[SavedCall] = []
        self.visited: dict[int, SavedCall] = {}
        self.saved: SavedCall | None = None
        self.duals: dict[int, Tensor] = {}
        self.guessing = False
        self.replacements = Replacements()
        self.loss_calls = LossCalls(graph, engine)
        self.random: dict[int, RandomState | None] = {}
        if graph.chain is not None:
            self.random = dict.fromkeys(graph.chain.redrawn if engine.reverses else graph.chain.drawing)

    # --- the whole run ------------------------------------------------------------------------------------------------

    def execute(self, closure: Callable[[], Any], params: Mapping[int, Tensor]) -> ForwardRecord:
        """Run the closure, and return the record of the run.

        Args:
            params: the trainable parameters, by position.

        Raises:
            GraphMismatch: the closure departs from the graph.
            ClosureError: an operation has no derivative.
        """
        loss = self.engine.run(partial(self._loss_of, closure, params))
        self.total = total = loss if loss.dim() == 0 else loss.mean()
        errors, exact = self.loss_calls.gradients(total, params, self.keeps_graph)
        tangents = [self.engine.tangents.get(number) for number in range(len(errors))]
        d = self.engine.each(partial(directional_derivatives, self.graph, errors), tangents)
        each = self.engine.each(partial(by_position, self.graph, errors), tangents) if self.graph.positions else None
        self.loss_calls.release()
        self.engine.tangents = {}
        return ForwardRecord(
            loss=total.detach(), d=d, each=each, errors=errors, tangents=tangents, guesses=self.guesses,
            saved_calls=self.saved_calls, exact=exact, params=dict(self.directions), values=self.values,
            states=self.engine.notes, graphs=self.engine.graphs, block_calls=self.visited, random=self.random,
        )  # fmt: skip

    def run(self, closure: Callable[[], Any]) -> Any:
        self.transaction.watch(closure)
        try:
            return super().run(closure)
        finally:
            self.transaction.raised = self.raised

    def _loss_of(self, closure: Callable[[], Any], params: Mapping[int, Tensor]) -> Tensor:
        """The closure's loss, as a function of the leaves. Called inside ``engine.run``."""
        self.duals = {id(params[p]): self.engine.substitute(params[p], v) for p, v in self.directions.items()}
        loss = self.run(closure)
        self.check_end(loss)
        self.transaction.settle(self.engine)
        return self.loss_calls.end(loss, self.no_grad)

    # --- one call -----------------------------------------------------------------------------------------------------

    def call(
        self,
        index: int,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        outline: list[Any],
    ) -> Any:
        call, _, kind, mutations, entering, leaving, noted, release = self.check_function(index, fn)
        self.check_tensors(call, tensors)
        if outline != call.outline:
            self.check_arguments(call, args, kwargs, outline)
        op = OpCall(index, call, kind, fn, args, kwargs, tensors)
        if self.replacements and any(id(t) in self.replacements for t in tensors):
            op = op.replaced(self.replacements.newest)
            tensors = op.tensors
        if mutations is not None:
            self._save(mutations, op)
        for k, value in entering:
            self._keep(value, tensors[k])
        if index in self.random:
            self.random[index] = RandomState.before(op.args, op.kwargs, fn)

        out = self.perform(op)

        results = results_of(out, tensors)
        self.check_results(call, results)
        if call.target is None and tensors and any(t is tensors[0] for t in results):
            out = self._copied(op, out, results)
        for k, value in leaving:
            self._keep(value, results[k])
            after = self.engine.mark(value, results[k], False)
            out = self.replacements.replace(out, results, k, tensors, after)
        for k, value in noted:
            after = self.engine.note(value, results[k], clone=self._is_overwritten_later(value))
            out = self.replacements.replace(out, results, k, tensors, after)
        self.register(call, results, tensors)
        if not self.keeps:
            for value in release:
                self.values.pop(value, None)
        return out

    def perform(self, op: OpCall) -> Any:
        """Run the operation by its kind."""
        return self._BY_KIND[op.kind](self, op)

    def differentiate(self, op: OpCall) -> Any:
        """Run an operation with its derivative, or take its result from ``known``."""
        known = self.known.pop(op.index, None) if self.known else None
        if known is not None and known.matches(op.args, op.kwargs):
            out = self.engine.reuse(op.fn, op.args, op.kwargs, known)
            if out is not NotImplemented:
                return out
        return differentiate(self.engine, self.graph, op)

    def _plain(self, op: OpCall) -> Any:
        with self._mode(op.index):
            return self.differentiate(op)

    def _loss(self, op: OpCall) -> Any:
        return self.loss_calls.call(op, self.no_grad)

    def _apart(self, op: OpCall) -> Any:
        """Run an operation without derivatives, on tensors without tangents. If the operation writes or returns one of
        its arguments, the closure gets its own tensor back, with its tangent."""
        moving = [op.tensors[k] for k in self.graph.moving[op.index]]
        if op.fn in BINDING:  # the operation must reach the tensor itself
            moving = [t for t in moving if t is not op.tensors[0]]
        writes = op.fn in BINDING or op.index in self.graph.mutations
        if not moving:
            return (self.engine.write if writes else self.engine.without_tangent)(op.fn, op.args, op.kwargs)
        plain = {id(t): self.engine.primal(t) for t in moving}
        args, kwargs = op.arguments(lambda t: plain.get(id(t), t))
        with self.no_grad, self.engine.outside():
            out = op.fn(*args, **kwargs)
        for t in moving:
            out = put(out, plain[id(t)], t)
        return out

    # --- expressions of parameters ------------------------------------------------------------------------------------

    def _expression(self, op: OpCall) -> Any:
        state = RandomState.before(op.args, op.kwargs, op.fn) if self.duals and draws(op.fn) else None
        # A transform refuses some operations on parameters alone, and wraps the indices that the closure makes.
        bare = (self.plain(t) is t or not is_differentiable(t) for t in op.tensors)
        apart = self.engine.wraps and all(bare) and not self._is_written(op)
        args, kwargs = (
            op.arguments(lambda t: t if is_differentiable(t) else self.plain(t)) if apart else (op.args, op.kwargs)
        )
        with self.engine.outside() if apart else AS_IT_IS:
            out = self.engine.without_tangent(op.fn, args, kwargs)
        results = results_of(out, op.tensors)
        self.express(results, [op.tensors[k] for k in self.graph.mine[op.index]])
        if self.duals and any(self.plain(t).requires_grad for t in results):
            with replayed(state):  # equal noise in both evaluations
                self._express_duals(op, out)
        return out

    def _express_duals(self, op: OpCall, out: Any) -> None:
        """Evaluate the expression again, with tangents, for the sites. The loss reads ``out``, without tangents."""
        with self.no_grad:
            duals = tensors_in((self.differentiate(op.replaced(self._dual)),))
        for plain, dual in zip(tensors_in((out,)), duals, strict=True):
            self.duals[id(plain)] = dual

    def _dual(self, t: Tensor) -> Tensor:
        return self.duals.get(id(t), t)

    def _is_written(self, op: OpCall) -> bool:
        """Whether an operation writes in place, or a later operation writes into its results."""
        return op.call.in_place or not self.graph.overwritten.isdisjoint(op.call.outputs)

    # --- sites --------------------------------------------------------------------------------------------------------

    def _site(self, op: OpCall) -> Any:
        with self._mode(op.index):
            sites = self.graph.sites_at[op.index]
            self.saved = self._saved_call(op, sites[0])
            out = self.differentiate(op.replaced(self._dual) if self.duals else op)
            results = results_of(out, op.tensors)
            for where, k, value in self.graph.watch.get(op.index, ()) if len(results) > 1 else ():
                if where == "out":  # a guess for one output may need the others (an LSTM cell's two states)
                    self._keep(value, results[k])
            for site in sites:
                s = results[site.output]
                self._check_output(site, s)
                after = self.inject(site, s, sites[0].call.in_place)
                out = self.replacements.replace(out, results, site.output, op.tensors, after)
            if self.saved is not None:
                self.leave(self.saved)
                self.saved = None
            return out

    @staticmethod
    def _check_output(site: Site, s: Tensor) -> None:
        other = s.dtype != site.dtype and site.call.autocast is None  # under autocast a kernel may choose
        if tuple(s.shape) != site.shape or other:
            made = f"{described(s.shape, s.dtype)} in place of {described(site.shape, site.dtype)}"
            raise GraphMismatch(site.call.index, f"{site.op} gave {made}")

    def inject(self, site: Site, s: Tensor, in_place: bool) -> Tensor:
        """The site's output ``s``, with the site's guess as its tangent."""
        primal = self.engine.primal(s)
        with self.engine.outside():
            self.guessing = True
            guess = self.guess(site, primal, self.values)
            self.guessing = False
            if guess is None:
                return self.engine.mark(site.value, s, site.overwritten)
            y = guess.y if guess.directions is None else self._by_parameter(site, guess.directions)
        assert y is not None
        kept = y if guess.corrected is None else guess.corrected
        if self.keeps_guesses and (self.saved is None or self.saved.directions is None):
            self.guesses[site.index] = kept
        return self.engine.inject(s, y.clone() if site.overwritten else y, in_place)

    def _by_parameter(self, site: Site, directions: list[Tensor]) -> Tensor:
        """The output's tangent if each example's own parameters move along ``directions``, which are kept."""
        saved = self.saved
        assert saved is not None
        saved.directions = directions

        def tangent(vs: list[Tensor]) -> Tensor:
            found = site.rule.parameter_tangent(
                saved.call.fn, saved.args, saved.kwargs, saved.wanted, vs, lambda v: site.layout.place(v, site.shape)
            )
            return found.expand(site.shape)  # a stack of smaller tangents would not broadcast to the output

        return self.engine.each(tangent, directions)

    def leave(self, saved: SavedCall) -> None:
        """Called at the end of a site's call, after its outputs have their guesses."""
        if self.keeps:
            self.saved_calls.append(saved)
            if self.left is not None:
                self.left(saved)

    def _saved_call(self, op: OpCall, site: Site) -> SavedCall | None:
        """The ``SavedCall`` for the call's parameter gradients; None if no parameter needs it."""
        wanted = list(self.graph.mine[op.index])
        if self.directions:
            wanted = [k for k in wanted if not self._is_directed(op.tensors[k])]
        if not wanted:
            return None
        variables = [t if id(t) in self.params else self.plain(t) for t in (op.tensors[k] for k in wanted)]
        if op.index in self.direct:
            self.visited[op.index] = SavedCall(site.call, (), {}, wanted, variables)
            return None
        own, bare = {id(op.tensors[k]) for k in self.graph.mine[op.index]}, self.engine.primal
        later = {id(op.tensors[k]) for k in self.graph.overwritten_later.get(op.index, ())}

        def primal(t: Tensor) -> Tensor:
            if id(t) in own:
                return t
            return bare(t).clone() if id(t) in later else bare(t)

        args, kwargs = op.arguments(primal)
        if site.call.writes and not moves_statistics(op.fn):  # the rule may make the call again
            args, kwargs = copied(args, kwargs, [k for k in site.call.writes if k not in wanted])
        if site.call.in_place:
            args = (args[0].clone(), *args[1:])
        state = RandomState.before(args, kwargs, op.fn) if draws(op.fn) else None
        return SavedCall(site.call, args, kwargs, wanted, variables, state, autocast_of(op.tensors[0]))

    def _is_directed(self, t: Tensor) -> bool:
        return bool(self.directions) and self.positions(t) <= self.directions.keys()

    # --- helpers ------------------------------------------------------------------------------------------------------

    def plain(self, t: Tensor) -> Tensor:
        return self.engine.plain(t)

    def _mode(self, index: int) -> AbstractContextManager[Any]:
        return AS_IT_IS if index in self.engine.reverses else self.no_grad

    def _save(self, targets: tuple[int, ...], op: OpCall) -> None:
        """Save the tensors and generators that the operation is about to change."""
        with self.engine.outside():
            for k in targets:
                self.transaction.save(op.tensors[k])
            for generator in generators_in(op.args, op.kwargs):
                self.transaction.save(generator)

    def _keep(self, value: int, t: Tensor) -> None:
        if self.engine.needs is not None and value not in self.engine.needs:
            return
        primal = self.engine.primal(t)
        self.values[value] = primal.clone() if self._is_overwritten_later(value) else primal

    def _is_overwritten_later(self, value: int) -> bool:
        """Whether a later call writes into a state of the residual chain."""
        chain = self.graph.chain
        return chain is not None and value in chain.overwritten_later

    def _copied(self, op: OpCall, out: Any, results: list[Tensor]) -> Any:
        """``out`` with a copy of the first argument, if the operation has returned this argument but made a new tensor
        in the trace (another kernel may already have given the argument its layout). Two values need two tensors."""
        argument = op.tensors[0]
        for k, t in enumerate(results):
            if t is argument and op.call.outputs[k] not in op.call.inputs and op.kind is not Kind.EXPRESSION:
                with self._mode(op.index):
                    copy = self.engine.call(Tensor.clone, (t,), {}, writes=False)
                out, results[k] = put(out, t, copy), copy
        return out

    _BY_KIND: ClassVar[dict[Kind, Callable[[ForwardRun, OpCall], Any]]] = {
        Kind.PLAIN: _plain,
        Kind.SITE: _site,
        Kind.EXPRESSION: _expression,
        Kind.LOSS: _loss,
        Kind.STOPPED: _apart,
        Kind.IDLE: _apart,
    }
