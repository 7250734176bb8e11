"""``StackedEngine``: K guesses in one run. Each primal is computed once, with K tangents beside it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar
from weakref import ref

import torch
import torch.autograd.forward_ad as fw
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch as functorch

from guessopt.engine.jvp.base import JvpEngine
from guessopt.engine.jvp.duals import pack, unpack
from guessopt.engine.jvp.fast import FastEngine
from guessopt.engine.jvp.gaps import check_tangent, is_foreign
from guessopt.layout import is_differentiable
from guessopt.ops.base import Entries, is_in_place, op_of
from guessopt.rng import RandomState, draws
from guessopt.tree import map_tensors, tensors_in

T = TypeVar("T")


class StackedEngine(FastEngine):
    """Tensors stay ordinary; their tangents ``[K, *shape]`` lie in a table beside them.

    An operation takes the first of these ways that serves:

    | way | serves |
    |---|---|
    | ``phi'(x) dx``, with ``phi'(x)`` computed once | elementwise functions of one real tensor |
    | a rule for stacks | operations with ``Op.stacked_tangent`` |
    | ``FastEngine``'s rule under ``vmap``, the primal unbatched | operations with such a rule |
    | torch's rule under ``vmap``, the primal unbatched | operations that ``vmap`` takes |
    | the operation K times | every operation |

    Args:
        count: K.
        ways: by number of the operation, whether it has to run K times; kept from one run of the closure to the next.
    """

    reuses = False

    def __init__(self, count: int, ways: dict[int, bool], *, frozen_statistics: bool = False) -> None:
        super().__init__(frozen_statistics=frozen_statistics)
        self.count, self._ways, self._number = count, ways, 0
        self._table: dict[int, tuple[ref[Tensor], Tensor]] = {}

    def run(self, body: Callable[[], T]) -> T:
        slow = functorch._is_vmap_fallback_enabled()  # type: ignore[attr-defined]
        functorch._set_vmap_fallback_enabled(False)  # type: ignore[attr-defined]  # runs K times too, and warns
        try:
            return body()
        finally:
            functorch._set_vmap_fallback_enabled(slow)  # type: ignore[attr-defined]
            self._table.clear()
            self.fresh = None

    def tangent(self, t: Tensor) -> Tensor | None:
        found = self._table.get(id(t))
        return None if found is None else found[1]

    def _attach(self, t: Tensor, tangent: Tensor) -> None:
        key, table = id(t), self._table

        def forget(dead: ref[Tensor]) -> None:
            if key in table and table[key][0] is dead:
                del table[key]

        table[key] = (ref(t, forget), tangent)

    def primal(self, t: Tensor) -> Tensor:
        return t.detach()  # another object, so that keeping it keeps no tangent

    def plain(self, t: Tensor) -> Tensor:
        return t

    def inject(self, s: Tensor, y: Tensor, in_place: bool) -> Tensor:
        tangent = self.tangent(s)
        if tangent is None:
            self._attach(s, y)
        elif s is self.fresh:
            tangent.add_(y)
        else:
            self._attach(s, tangent + y)
        return s

    def substitute(self, p: Tensor, v: Tensor) -> Tensor:
        moved = p.detach()
        self._attach(moved, v)
        return moved

    def each(self, f: Callable[[list[Any]], Tensor], tensors: Sequence[Any]) -> Tensor:
        return torch.stack([f([None if t is None else t[k] for t in tensors]) for k in range(self.count)])

    def through_backward(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        moving = self._moving(args, kwargs)
        if not moving:
            return fn(*args, **kwargs)
        return self._attached(self._in_turn(fn, args, kwargs, moving, False))

    def _moving(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Moving:
        """The tangents of the arguments."""
        return {id(t): v for t in tensors_in(args, kwargs) if (v := self.tangent(t)) is not None}

    def _attached(self, found: Found) -> Any:
        """An operation's result. The tangents of its tensors are noted."""
        out, results = found
        for t, tangent in results:
            self._attach(t, tangent)
        return out

    # --- one operation ------------------------------------------------------------------------------------------------

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, writes: bool) -> Any:
        if self.frozen_statistics and fn is F.batch_norm:
            args, kwargs, writes = self.with_frozen_statistics(*args, **kwargs), {}, False
        moving = self._moving(args, kwargs)
        self.fresh = None
        if not moving:
            return JvpEngine.call(self, fn, args, kwargs, writes=writes)
        args, kwargs, flagged = _out_of_place(fn, args, kwargs)
        if not flagged and not is_in_place(fn):
            return self._attached(self._differentiate(fn, args, kwargs, moving, writes))
        target = args[0]
        if not flagged:
            old = moving.get(id(target))
            args = (target.clone(), *args[1:])
            moving[id(args[0])] = target.new_zeros(self.count, *target.shape) if old is None else old.clone()
        out, ((value, tangent), *_) = self._differentiate(fn, args, kwargs, moving, writes)
        target.copy_(value)
        self._attach(target, tangent)
        self.fresh = None
        return None if out is None else target

    def _differentiate(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], moving: Moving, writes: bool
    ) -> Found:
        number = self._number
        self._number += 1
        if self._ways.get(number):
            return self._in_turn(fn, args, kwargs, moving, writes)
        repeats, tried = not writes and not draws(fn), number in self._ways
        before = None if repeats or tried else _Before(args, kwargs, moving)
        try:
            found = self._together(fn, args, kwargs, moving)
            self._ways[number] = False
            return found
        except Exception:
            if before is not None:
                before.restore()
            elif not repeats:
                raise
            self._ways[number] = True
            return self._in_turn(fn, args, kwargs, moving, writes)

    def _together(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], moving: Moving) -> Found:
        real = not any(t.is_complex() for t in tensors_in(args, kwargs))  # the rules are written for real numbers
        if real and _is_unary(fn, args, kwargs):
            return self._elementwise(fn, args, kwargs, moving)
        op = op_of(fn)
        duals = op.duals
        for stacked, rule in ((True, op.stacked_tangent), (False, op.tangent)):
            if rule is None or len(args) < duals or not real:
                continue
            tangents = [moving.get(id(t)) for t in args[:duals]]
            if all(v is None for v in tangents) or any(id(t) in moving for t in tensors_in(args[duals:], kwargs)):
                continue
            if stacked:
                result = _apply(rule, duals, args, tangents, kwargs)
            else:
                with _vmap(self.count) as engine:
                    batched = [None if v is None else functorch._add_batch_dim(v, 0, engine) for v in tangents]
                    result = _apply(rule, duals, args, batched, kwargs)
                    if result is not NotImplemented:
                        result = _unbatched(result[0]), self._stack_of(result[1], engine)
            if result is not NotImplemented:
                out, tangent = result
                self.fresh = out
                return out, [(out, tangent.to(out.dtype))]
        return self._by_jvp(fn, args, kwargs, moving)

    @staticmethod
    def _elementwise(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], moving: Moving) -> Found:
        """``phi'(x) dx``, with ``phi'`` computed once."""
        x, dx = args[0], moving[id(args[0])]
        op = op_of(fn)
        if op.rectifier and op.pull_back is not None:
            out = fn(*args, **kwargs)
            return out, [(out, op.pull_back(dx, out, False))]
        with fw.dual_level():
            out, slope = unpack(fn(pack(x, torch.ones_like(x)), *args[1:], **kwargs))
            out = out.detach()
        return out, [(out, torch.zeros_like(dx) if slope is None else (dx * slope).to(out.dtype))]

    def _by_jvp(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], moving: Moving) -> Found:
        """Torch's own rule: tangents batched by ``vmap``, the primal not."""
        check_tangent(fn, args, kwargs)
        duals: dict[int, Tensor] = {}
        with _vmap(self.count) as engine, _jvp() as inner:

            def dual(t: Tensor) -> Tensor:
                v = moving.get(id(t))
                if v is None:
                    return t
                made = pack(t, functorch._add_batch_dim(v, 0, engine))
                duals[id(made)] = made
                origins[id(made)] = t
                return made

            origins: dict[int, Tensor] = {}
            call_args, call_kwargs = map_tensors(args, dual), map_tensors(kwargs, dual)
            out = JvpEngine.call(self, fn, call_args, call_kwargs, writes=False)
            found: dict[int, tuple[Tensor, Tensor | None]] = {}
            for t in tensors_in((out if out is not None else call_args[0],)):
                if id(t) in duals and not is_in_place(fn):
                    found[id(t)] = origins[id(t)], moving[id(origins[id(t)])]  # the operation did nothing
                    continue
                primal, tangent = unpack(t)
                primal = _unbatched(functorch._unwrap_for_grad(primal, inner))
                if tangent is not None:
                    tangent = self._stack_of(functorch._unwrap_for_grad(tangent, inner), engine).to(primal.dtype)
                found[id(t)] = primal, tangent
            return _swapped(out, found)

    def _in_turn(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], moving: Moving, writes: bool
    ) -> Found:
        """The operation K times, each time from the same random state. Only the first time it writes into tensors that
        the closure has not made."""
        state = RandomState.before(args, kwargs) if draws(fn) else None
        first: Any = None
        primals: list[Tensor] = []
        stacks: list[list[Tensor | None]] = []
        for k in range(self.count):
            if state is not None:
                state.restore()

            def dual(t: Tensor, k: int = k) -> Tensor:
                v = moving.get(id(t))
                if v is None:
                    return t.clone() if k and writes else t
                return pack(t.clone() if is_in_place(fn) else t, v[k].clone())

            with fw.dual_level():
                call_args, call_kwargs = map_tensors(args, dual), map_tensors(kwargs, dual)
                try:
                    if is_foreign(fn):
                        raise NotImplementedError("forward AD passes it by")
                    out = FastEngine.call(self, fn, call_args, call_kwargs, writes=writes)
                except NotImplementedError:
                    if writes or is_in_place(fn):
                        raise
                    out = JvpEngine.through_backward(self, fn, call_args, call_kwargs)
                results = tensors_in((out if out is not None else call_args[0],))
                pairs = [unpack(t) for t in results]
                if not k:
                    first, primals = (out, results), [primal.detach() for primal, _ in pairs]
                stacks.append([tangent for _, tangent in pairs])
        self.fresh = None
        found: dict[int, tuple[Tensor, Tensor | None]] = {}
        for t, primal, tangents in zip(first[1], primals, zip(*stacks, strict=True), strict=True):
            moved = [torch.zeros_like(primal) if v is None else v.to(primal.dtype) for v in tangents]
            found[id(t)] = primal, torch.stack(moved) if any(v is not None for v in tangents) else None
        return _swapped(first[0], found)

    def _stack_of(self, tangent: Tensor, engine: int) -> Tensor:
        if functorch.is_batchedtensor(tangent):
            stack: Tensor = functorch._remove_batch_dim(tangent, engine, self.count, 0)
            return stack
        return tangent.expand(self.count, *tangent.shape).clone()


#: By ``id`` of a tensor, its tangents ``[K, *shape]``.
Moving = dict[int, Tensor]
#: An operation's result; and its tensors with their tangents (the tensor that it wrote, if it returned None).
Found = tuple[Any, list[tuple[Tensor, Tensor]]]


class _Before:
    """Random states and the tensors that an operation might write, as they are before it."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], moving: Moving) -> None:
        self.random = RandomState.before(args, kwargs)
        self.values = [(t, t.detach().clone()) for t in tensors_in(args, kwargs) if id(t) not in moving]

    def restore(self) -> None:
        self.random.restore()
        for t, value in self.values:
            t.detach().copy_(value)


def _apply(
    rule: Callable[..., Any], duals: int, args: tuple[Any, ...], tangents: list[Any], kwargs: dict[str, Any]
) -> Any:
    if duals == 1:
        return rule(args[0], tangents[0], *args[1:], **kwargs)
    return rule(args[:duals], tuple(tangents), *args[duals:], **kwargs)


def _is_unary(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    unary = op_of(fn).entries is Entries.UNARY
    return unary and len(tensors_in(args, kwargs)) == 1 and isinstance(args[0], Tensor)


@cache
def _place_of_flag(fn: Callable[..., Any]) -> int | None:
    """Where a function of ``torch.nn.functional`` takes ``inplace``."""
    try:
        return list(inspect.signature(fn).parameters).index("inplace")
    except (TypeError, ValueError):
        return None


def _out_of_place(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """The arguments without ``inplace=True``, and whether it was there."""
    if kwargs.get("inplace"):
        return args, {**kwargs, "inplace": False}, True
    if len(args) > 1 and args[-1] is True:
        place = _place_of_flag(fn)
        if place is not None and place < len(args) and args[place] is True:
            return (*args[:place], False, *args[place + 1 :]), kwargs, True
    return args, kwargs, False


@contextmanager
def _vmap(count: int) -> Iterator[int]:
    engine = functorch._vmap_increment_nesting(count, "same")
    try:
        yield engine
    finally:
        functorch._vmap_decrement_nesting()


@contextmanager
def _jvp() -> Iterator[int]:
    engine = functorch._jvp_increment_nesting()
    try:
        with fw.dual_level():
            yield engine
    finally:
        functorch._jvp_decrement_nesting()


def _unbatched(t: Tensor) -> Tensor:
    if functorch.is_batchedtensor(t):
        raise RuntimeError("the primal depends on the guess")
    return t


def _swapped(out: Any, found: dict[int, tuple[Tensor, Tensor | None]]) -> Found:
    """``out`` with ordinary tensors in place of those with tangents."""
    results = [(t, v) for t, v in found.values() if v is not None and is_differentiable(t)]
    return map_tensors(out, lambda t: found[id(t)][0]), results
