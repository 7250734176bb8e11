"""The pass: run the closure once in forward mode, guesses in, directional derivatives out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guessopt.engine.levels import WITHOUT_FORWARD, Level, is_foreign
from guessopt.engine.transaction import Transaction
from guessopt.errors import ClosureError
from guessopt.rng import RandomState, cuda_devices, draws
from guessopt.rules.base import Known, is_in_place
from guessopt.sites import ForwardRecord, Kind, Site, SiteGraph, Visit
from guessopt.tracing.interceptor import AS_IT_IS, CustomFunction, Interceptor, autocast_of, stops_gradient, tensors_in
from guessopt.tracing.writes import BINDING, Memory, copied, generators_in

Guess = Callable[[Site, Tensor, dict[int, Tensor]], "Tensor | tuple[Tensor, Tensor] | list[Tensor] | None"]


class Departure(BaseException):
    """The closure did something else than the graph says. Not an ``Exception``: a closure must not swallow it."""


class Pass(Interceptor):
    """The closure's calls, each handled as the graph says.

    Args:
        params: ``id`` of each trainable parameter to its position.
        graph: of an earlier run; a run that departs from it raises ``Departure``.
        level: where tangents live.
        guess: the tangent for a site, from its output without tangent and the values kept aside; None for no tangent; a
            list for one direction ``[N, *shape]`` per parameter that the site reads; a pair for a tangent and what
            takes its place in the estimate.
        directions: tangents for parameters, by position.
        transaction: is told what the closure will write that it has not made.
        keeps: whether what parameter gradients will need (the sites' inputs, the guesses) is kept.
        left: called with every visit that is kept, once it is over.
        direct: calls whose visits are kept apart and without arguments, since their gradients come from a block's own
            graph.

    Attributes:
        known: by call, what guesses have found of calls to come.
    """

    def __init__(
        self,
        params: Mapping[int, int],
        graph: SiteGraph,
        level: Level,
        guess: Guess,
        directions: Mapping[int, Tensor],
        transaction: Transaction,
        *,
        keeps: bool = True,
        left: Callable[[Visit], None] | None = None,
        direct: Collection[int] = (),
    ) -> None:
        super().__init__(params)
        self.graph, self.level, self.guess, self.directions = graph, level, guess, directions
        self.transaction = transaction
        self.keeps = self.keeps_guesses = keeps
        self.left, self.direct = left, direct
        self.keeps_graph = False
        self.known: dict[int, Known] = {}
        self.values: dict[int, Tensor] = dict(graph.constants)
        self.guesses: dict[int, Tensor] = {}
        self.visits: list[Visit] = []
        self.visited: dict[int, Visit] = {}
        self.visit: Visit | None = None
        self.leaves: dict[int, Tensor] = {}
        self.duals: dict[int, Tensor] = {}
        #: Tensors that a call has returned as it got them, and what the closure was handed in their place: it may know
        #: them by another name. By id.
        self.replaced: dict[int, tuple[Tensor, Tensor]] = {}
        self.result: Tensor | None = None
        self.random: dict[int, RandomState | None] = {}
        if graph.stream is not None:
            self.random = dict.fromkeys(graph.stream.redrawn if level.reverses else graph.stream.drawing)
        self._answers = iter(graph.answers)

    def requires_grad(self, answer: bool) -> bool:
        return next(self._answers, answer)  # as in the trace: code may branch on it

    def call(
        self,
        index: int,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        mine: list[Tensor],
    ) -> Any:
        if self.replaced and any(id(t) in self.replaced for t in tensors):
            args, kwargs, tensors = self._newest(args), self._newest(kwargs), self._newest(tensors)
        graph = self.graph
        if index >= len(graph.functions) or graph.functions[index] != fn:
            raise Departure
        kind = graph.kinds[index]
        if (not torch.is_grad_enabled() or stops_gradient(fn)) != (kind is Kind.STOPPED):
            raise Departure
        if mine or graph.reads[index]:
            self._check_parameters(index, mine)
        if index in graph.mutations:
            self._save(graph.mutations[index], tensors, args, kwargs)
        watch = graph.watch.get(index, ())
        for where, k, value in watch:
            if where == "in":
                self._keep(value, tensors[k])

        if index in self.random:
            self.random[index] = RandomState.capture(cuda_devices(tensors))
        out = self._run(index, kind, fn, args, kwargs, tensors, mine)

        cuts = graph.cuts_at.get(index)
        if watch or cuts or (graph.returned is not None and index == graph.returned[0]):
            results = tensors_in((out,)) if out is not None else tensors[:1]
            for where, k, value in watch:
                if where == "out":
                    self._keep(value, results[k])
                    self.level.mark(value, results[k], False)
            for _, k, value in graph.noted.get(index, ()):
                after = self.level.note(value, results[k], clone=self._is_fragile(value))
                if after is not results[k] and any(results[k] is t for t in tensors):
                    self.replaced[id(results[k])] = results[k], after
                out, results[k] = _put(out, results[k], after), after
            for number, cut in cuts or ():
                if tuple(results[cut.output].shape) != cut.shape:
                    raise Departure
                with self.no_grad:
                    after, leaf = self.level.cut(number, results[cut.output], shared=cut.shared, clone=cut.clone)
                self.leaves[number] = leaf
                out = _put(out, results[cut.output], after)
                results[cut.output] = after
            if graph.returned is not None and index == graph.returned[0]:
                self.result = results[graph.returned[1]]
        if not self.keeps:
            for value in graph.release.get(index, ()):
                self.values.pop(value, None)
        return out

    def _newest(self, node: Any) -> Any:
        def newest(t: Tensor) -> Tensor:
            return self.replaced[id(t)][1] if id(t) in self.replaced else t

        return _map(node, newest)

    def _keep(self, value: int, t: Tensor) -> None:
        if self.level.needs is not None and value not in self.level.needs:
            return
        primal = self.level.primal(t)
        self.values[value] = primal.clone() if self._is_fragile(value) else primal

    def _is_fragile(self, value: int) -> bool:
        return self.graph.stream is not None and value in self.graph.stream.fragile

    def _check_parameters(self, index: int, mine: list[Tensor]) -> None:
        """The call must read the parameters that it read when traced; those seen before are known by identity."""
        ids = [id(m) for m in mine]
        if self.graph.verified.get(index) == ids:
            return
        if frozenset().union(*(self.positions(m) for m in mine)) != self.graph.reads[index]:
            raise Departure
        if all(k in self.params for k in ids):
            self.graph.verified[index] = ids

    def _run(
        self,
        index: int,
        kind: Kind,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        mine: list[Tensor],
    ) -> Any:
        if kind is Kind.PLAIN:
            with self._mode(index):
                return self._call(index, fn, args, kwargs)
        if kind is Kind.SITE:
            with self._mode(index):
                return self._site(index, fn, args, kwargs, tensors, mine)
        if kind is Kind.EXPRESSION:
            out = fn(*args, **kwargs)
            self.express(out, mine)
            if self.duals:
                self._express_duals(fn, args, kwargs, out)
            return out
        if kind is Kind.STOPPED:
            # What the closure has not made is written itself, not through another name: it may be bound to new memory.
            own = [tensors[k] for k in self.graph.mutations.get(index, ())]
            own += tensors[:1] if fn in BINDING else []
            primal: Callable[[Tensor], Tensor] = self.level.primal
            args, kwargs = _map(args, primal, tensors, own), _map(kwargs, primal, tensors, own)
            if own:
                return self.level.write(fn, args, kwargs)
        return fn(*args, **kwargs)

    def _mode(self, index: int) -> AbstractContextManager[Any]:
        return AS_IT_IS if index in self.level.reverses else self.no_grad

    def _call(self, index: int, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = self.known.pop(index, None)
        if known is not None and known.serves(args, kwargs):
            out = self.level.resume(fn, args, kwargs, known)
            if out is not NotImplemented:
                return out
        targets = self.graph.mutations.get(index, ())
        hidden = self.graph.hidden.get(index, ())
        retried = hidden or (targets and fn is not F.batch_norm and not is_in_place(fn))
        before = Memory() if retried else None
        if before is not None:
            own = tensors_in(args, kwargs)
            with self.level.outside():
                for t in (*hidden, *(own[k] for k in targets)):
                    before.save(t)
        try:
            if fn in WITHOUT_FORWARD or is_foreign(fn):
                raise NotImplementedError("forward AD passes it by")
            return self.level.call(fn, args, kwargs, writes=bool(targets))
        except NotImplementedError as error:
            if before is not None:
                with self.level.outside():
                    before.restore()
            if not any(word in str(error) for word in ("forward AD", "forward mode AD", "jvp")):
                raise
            if not is_in_place(fn) and not kwargs.get("inplace"):
                WITHOUT_FORWARD.add(fn)
                with suppress(RuntimeError):
                    return self.level.through_backward(fn, args, kwargs)
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
        self.visit = self._visit(fn, args, kwargs, tensors, mine, sites[0])
        if self.duals:
            args, kwargs = self._substituted(args, kwargs)
        out = self._call(index, fn, args, kwargs)
        results = tensors_in((out,)) if out is not None else tensors[:1]
        for site in sites:
            s = results[site.output]
            if tuple(s.shape) != site.shape:
                raise Departure
            out = _put(out, s, self.inject(site, s, in_place))
        if self.visit is not None:
            self.leave(self.visit)
            self.visit = None
        return out

    def _visit(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        mine: list[Tensor],
        site: Site,
    ) -> Visit | None:
        """The call as its gradients will need it; None if none of its parameters needs any."""
        wanted = [k for k, t in enumerate(tensors) if any(t is m for m in mine) and not self._is_directed(t)]
        if not wanted:
            return None
        variables = [t if id(t) in self.params else self.plain(t) for t in (tensors[k] for k in wanted)]
        if site.call.index in self.direct:
            self.visited[site.call.index] = Visit(site.call, (), {}, wanted, variables)
            return None
        primal: Callable[[Tensor], Tensor] = self.level.primal
        args, kwargs = _map(args, primal, tensors, mine), _map(kwargs, primal, tensors, mine)
        if site.call.writes and fn is not F.batch_norm:  # whoever forms the gradients may make the call once more
            args, kwargs = copied(args, kwargs, [k for k in site.call.writes if k not in wanted])
        if site.call.in_place:
            args = (args[0].clone(), *args[1:])
        state = RandomState.capture(cuda_devices(tensors)) if draws(fn) else None
        return Visit(site.call, args, kwargs, wanted, variables, state, autocast_of(tensors[0]))

    def leave(self, visit: Visit) -> None:
        """A site's call is over, its outputs have had their guesses."""
        if self.keeps:
            self.visits.append(visit)
            if self.left is not None:
                self.left(visit)

    def inject(self, site: Site, s: Tensor, in_place: bool) -> Tensor:
        """The site's output with its guess for tangent."""
        primal = self.level.primal(s)
        with self.level.outside():
            y = self.guess(site, primal, self.values)
            if isinstance(y, list):
                y = self._by_parameter(site, y)
        if y is None:
            return self.level.mark(site.value, s, site.overwritten)
        y, kept = y if isinstance(y, tuple) else (y, y)
        if self.keeps_guesses and (self.visit is None or self.visit.directions is None):
            self.guesses[site.index] = kept
        return self.level.inject(s, y.clone() if site.overwritten else y, in_place)

    def _by_parameter(self, site: Site, directions: list[Tensor]) -> Tensor:
        """The output's tangent as each example's own parameters move along ``directions``; these are kept."""
        visit = self.visit
        assert visit is not None
        visit.directions = directions

        def tangent(vs: list[Tensor]) -> Tensor:
            return site.rule.parameter_tangent(
                visit.call.fn, visit.args, visit.kwargs, visit.wanted, vs, lambda v: site.layout.place(v, site.shape)
            )

        return self.level.each(tangent, directions)

    def plain(self, t: Tensor) -> Tensor:
        return self.level.plain(t)

    def _is_directed(self, t: Tensor) -> bool:
        return bool(self.directions) and self.positions(t) <= self.directions.keys()

    def _substituted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def swap(t: Tensor) -> Tensor:
            return self.duals.get(id(t), t)

        return _map(args, swap), _map(kwargs, swap)

    def _express_duals(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """The same expression with tangents, for the sites; the loss reads the plain one."""
        args, kwargs = self._substituted(args, kwargs)
        with self.no_grad:
            duals = tensors_in((self.level.call(fn, args, kwargs, writes=False),))
        for plain, dual in zip(tensors_in((out,)), duals, strict=True):
            self.duals[id(plain)] = dual

    def _save(
        self, targets: tuple[int, ...], tensors: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        with self.level.outside():
            for k in targets:
                self.transaction.save(tensors[k])
            for generator in generators_in(args, kwargs):
                self.transaction.save(generator)

    def run(self, closure: Callable[[], Any]) -> Any:
        self.transaction.watch(closure)
        return super().run(closure)

    def execute(self, closure: Callable[[], Any], params: Mapping[int, Tensor]) -> ForwardRecord:
        """Run the closure; ``params`` by position. Raises ``Departure``, ``ClosureError``, or what the
        closure raises."""

        def body() -> Tensor:
            self.duals = {id(params[p]): self.level.substitute(params[p], v) for p, v in self.directions.items()}
            loss = self.run(closure)
            if self.result is None or loss is not self.result:
                raise Departure
            self.transaction.settle(self.level)
            return self.level.plain(self.result)

        plain = self.level.run(body)
        graph = self.graph
        leaves = [self.leaves[number] for number in range(len(graph.cuts))]
        own = [p for p in sorted(graph.loss_params) if p in params]
        self.total = total = plain if plain.dim() == 0 else plain.mean()
        found: list[Tensor | None] = []
        if leaves or own:
            if not total.requires_grad:
                raise ClosureError(
                    "the loss lost its connection to the network's output inside the closure; a value written in place "
                    "is probably read under its old name: use what the operation returns"
                )
            variables = [*leaves, *(params[p] for p in own)]
            found = list(torch.autograd.grad(total, variables, allow_unused=True, retain_graph=self.keeps_graph))
        errors = [torch.zeros_like(v) if e is None else e for v, e in zip(leaves, found, strict=False)]
        exact = {p: e for p, e in zip(own, found[len(leaves) :], strict=True) if e is not None}
        tangents = [self.level.tangents.get(number) for number in range(len(leaves))]
        d = self.level.each(partial(directional_derivatives, graph, errors), tangents)
        return ForwardRecord(
            loss=total.detach(), d=d, errors=errors, tangents=tangents, guesses=self.guesses, visits=self.visits,
            exact=exact, params=dict(self.directions), values=self.values, states=self.level.notes,
            graphs=self.level.graphs, direct=self.visited, random=self.random,
        )  # fmt: skip


def directional_derivatives(graph: SiteGraph, errors: list[Tensor], tangents: list[Tensor | None]) -> Tensor:
    """``D_n = <dL/dv[n], v'[n]>`` summed over the cuts ``v`` (Singhal eq. 13's scalar, per example):
    ``[N]``, or ``[1]`` where some cut's examples cannot be told apart. Equal to the derivative of each example's share
    of the loss."""
    parts = [
        cut.layout.sum_examples(_wide(e) * _wide(t), graph.batch)
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


def _wide(t: Tensor) -> Tensor:
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


def _map(
    node: Any, f: Callable[[Tensor], Tensor], tensors: list[Tensor] | None = None, keep: list[Tensor] | None = None
) -> Any:
    """Apply to every tensor but those to keep."""
    if isinstance(node, Tensor):
        return node if keep is not None and any(node is k for k in keep) else f(node)
    if isinstance(node, (tuple, list)):
        items = [_map(item, f, tensors, keep) for item in node]
        return type(node)(*items) if hasattr(node, "_fields") else type(node)(items)
    if isinstance(node, dict):
        return {key: _map(item, f, tensors, keep) for key, item in node.items()}
    return node
