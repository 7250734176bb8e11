"""K guesses in one pass: the primal is computed once, K tangents ride along.

Letters: K guesses, n example, N batch size, d everything else of a site's output.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar
from weakref import ref

import torch
import torch.autograd.forward_ad as fw
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch as functorch

from guessopt.engine.jvp.engines import FastEngine, JvpEngine, _pack, _unpack, check_tangent, is_foreign
from guessopt.graph import SiteGraph
from guessopt.layout import Layout, is_differentiable
from guessopt.ops.attention import stacked_attention
from guessopt.ops.base import is_in_place, tangent_for
from guessopt.ops.elementwise import ADDITION, RELU, UNARY, relu_pull_back
from guessopt.ops.linear import linear
from guessopt.record import ForwardRecord, SavedCall
from guessopt.rng import RandomState, draws
from guessopt.tree import map_tensors, tensors_in

T = TypeVar("T")


def _sum(ab: tuple[Any, Any], tangents: tuple[Any, Any], **other: Any) -> Any:
    """``d(a + b) = da + db``."""
    (a, b), (da, db) = ab, tangents
    if other or da is None or db is None or a.shape != b.shape:
        return NotImplemented
    return a + b, da + db


#: Rules that take tangents as ``[K, *shape]``, without ``vmap``; where they cannot, the registered one serves.
_STACKED: dict[Callable[..., Any], tuple[Callable[..., Any], int]] = {
    F.linear: (linear, 1),
    F.scaled_dot_product_attention: (stacked_attention, 3),
    **dict.fromkeys(ADDITION, (_sum, 2)),
}


class StackedEngine(FastEngine):
    """K tangents to a tensor, ``[K, *shape]``, in a table beside the tensors; these stay ordinary tensors.

    An operation's tangents come, in this order of preference, from a rule that takes the stack as it is; from the
    derivative, computed once, of an elementwise function; from ``FastEngine``'s rule or torch's own under ``vmap``,
    the primal unbatched; or, where ``vmap`` refuses, from this one operation K times over.

    Args:
        count: K.
        ways: by number of the operation, whether it has to go K times; kept from one pass to the next.
    """

    reuses = False

    def __init__(self, count: int, ways: dict[int, bool], *, frozen_statistics: bool = False) -> None:
        super().__init__(frozen_statistics=frozen_statistics)
        self.count, self._ways, self._number = count, ways, 0
        self._table: dict[int, tuple[ref[Tensor], Tensor]] = {}

    def run(self, body: Callable[[], T]) -> T:
        slow = functorch._is_vmap_fallback_enabled()  # type: ignore[attr-defined]
        functorch._set_vmap_fallback_enabled(False)  # type: ignore[attr-defined]  # goes K times as well, and warns
        try:
            return body()
        finally:
            functorch._set_vmap_fallback_enabled(slow)  # type: ignore[attr-defined]
            self._table.clear()
            self._fresh = None

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
        elif s is self._fresh:
            tangent.add_(y)
        else:
            self._attach(s, tangent + y)
        return s

    def substitute(self, p: Tensor, v: Tensor) -> Tensor:
        moved = p.detach()
        self._attach(moved, v)
        return moved

    def cut(self, number: int, v: Tensor) -> tuple[Tensor, Tensor]:
        self.tangents[number] = self.tangent(v)
        leaf = v.detach().requires_grad_()
        return leaf, leaf

    def each(self, f: Callable[[list[Any]], Tensor], tensors: Sequence[Any]) -> Tensor:
        return torch.stack([f([None if t is None else t[k] for t in tensors]) for k in range(self.count)])

    def through_backward(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        moving = {id(t): v for t in tensors_in(args, kwargs) if (v := self.tangent(t)) is not None}
        if not moving:
            return fn(*args, **kwargs)
        out, results = self._in_turn(fn, args, kwargs, moving, False)
        for t, tangent in results:
            self._attach(t, tangent)
        return out

    # --- one operation ------------------------------------------------------------------------------------------------

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, writes: bool) -> Any:
        if self.frozen_statistics and fn is F.batch_norm:
            args, kwargs, writes = self.with_frozen_statistics(*args, **kwargs), {}, False
        moving = {id(t): v for t in tensors_in(args, kwargs) if (v := self.tangent(t)) is not None}
        self._fresh = None
        if not moving:
            return JvpEngine.call(self, fn, args, kwargs, writes=writes)
        args, kwargs, flagged = _out_of_place(fn, args, kwargs)
        if not flagged and not is_in_place(fn):
            out, results = self._differentiate(fn, args, kwargs, moving, writes)
            for t, tangent in results:
                self._attach(t, tangent)
            return out
        target = args[0]
        if not flagged:
            old = moving.get(id(target))
            args = (target.clone(), *args[1:])
            moving[id(args[0])] = target.new_zeros(self.count, *target.shape) if old is None else old.clone()
        out, ((value, tangent), *_) = self._differentiate(fn, args, kwargs, moving, writes)
        target.copy_(value)
        self._attach(target, tangent)
        self._fresh = None
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
        for stacked, entry in ((True, _stacked_for(fn)), (False, tangent_for(fn))):
            if entry is None or len(args) < entry[1] or not real:
                continue
            rule, duals = entry
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
                self._fresh = out
                return out, [(out, tangent.to(out.dtype))]
        return self._by_jvp(fn, args, kwargs, moving)

    @staticmethod
    def _elementwise(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], moving: Moving) -> Found:
        """``phi'(x) dx``, with ``phi'`` computed once."""
        x, dx = args[0], moving[id(args[0])]
        if fn in RELU:
            out = fn(*args, **kwargs)
            return out, [(out, relu_pull_back(dx, out))]
        with fw.dual_level():
            out, slope = _unpack(fn(_pack(x, torch.ones_like(x)), *args[1:], **kwargs))
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
                made = _pack(t, functorch._add_batch_dim(v, 0, engine))
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
                primal, tangent = _unpack(t)
                primal = _unbatched(functorch._unwrap_for_grad(primal, inner))
                if tangent is not None:
                    tangent = self._stack_of(functorch._unwrap_for_grad(tangent, inner), engine).to(primal.dtype)
                found[id(t)] = primal, tangent
            return _swapped(out, found)

    def _in_turn(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], moving: Moving, writes: bool
    ) -> Found:
        """The operation K times over, each time from the same random state; it writes into what is not ours once."""
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
                return _pack(t.clone() if is_in_place(fn) else t, v[k].clone())

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
                pairs = [_unpack(t) for t in results]
                if not k:
                    first, primals = (out, results), [primal.detach() for primal, _ in pairs]
                stacks.append([tangent for _, tangent in pairs])
        self._fresh = None
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
#: What an operation returned, and its tensors (of an operation that returns None, what it wrote) with their tangents.
Found = tuple[Any, list[tuple[Tensor, Tensor]]]


class _Before:
    """Random states, and what an operation might write, as they are before it."""

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


def _stacked_for(fn: Callable[..., Any]) -> tuple[Callable[..., Any], int] | None:
    try:
        return _STACKED.get(fn)
    except TypeError:  # unhashable callables
        return None


def _is_unary(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        return fn in UNARY and len(tensors_in(args, kwargs)) == 1 and isinstance(args[0], Tensor)
    except TypeError:
        return False


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


# --- from K guesses to one estimate -----------------------------------------------------------------------------------


def stack(records: Sequence[ForwardRecord]) -> ForwardRecord:
    """Passes with one guess each, as one with K."""
    first = records[0]

    def together(parts: list[Mapping[int, Tensor]]) -> dict[int, Tensor]:
        return {key: torch.stack([part[key] for part in parts]) for key in parts[0]}

    saved_calls = [
        saved_calls[0]
        if saved_calls[0].directions is None
        else replace(
            saved_calls[0],
            directions=[torch.stack(vs) for vs in zip(*(_directions(v) for v in saved_calls), strict=True)],
        )
        for saved_calls in zip(*(record.saved_calls for record in records), strict=True)
    ]
    return replace(
        first,
        d=torch.stack([record.d for record in records]),
        guesses=together([record.guesses for record in records]),
        params=together([record.params for record in records]),
        saved_calls=saved_calls,
    )


def _directions(saved: SavedCall) -> list[Tensor]:
    assert saved.directions is not None
    return saved.directions


@dataclass(frozen=True)
class Weights:
    """What guesses are multiplied by: ``examples`` ``[K, N]``; ``batch`` ``[K]`` where these cannot be told apart."""

    examples: Tensor
    batch: Tensor

    def sum(self, layout: Layout, y: Tensor) -> Tensor:
        """``sum_k w_k y_k``: of a site's guesses ``[K, *shape]``, one estimate of its shape. Takes their memory."""
        shape = tuple(y.shape[1:])
        coupled = layout is Layout.COUPLED
        ws = [self.batch[k] if coupled else layout.spread(self.examples[k], shape) for k in range(y.shape[0])]
        found = y[0].mul_(ws[0].to(y.dtype))
        for part, w in zip(y[1:], ws[1:], strict=True):
            found.addcmul_(part, w.to(y.dtype))
        return found


def mean_weights(record: ForwardRecord) -> Weights:
    """``D / K``: the mean of the K estimates."""
    d = record.d / record.d.shape[0]
    return Weights(d, d.sum(1))


def projection_weights(record: ForwardRecord, graph: SiteGraph) -> Weights:
    """``c (Y^T Y)^{-1} D``: the estimate is the cotangent's projection on the span of the K guesses, times
    ``c = mean_k |y_k|^2 / K``. ``Y`` joins the guesses of all sites, per example; those of sites where examples are
    coupled, and of parameters, are joined over the whole batch. Isotropic normal guesses leave it unbiased, since a
    random subspace's direction and the guesses' lengths are independent."""
    d, count = record.d, record.d.shape[0]
    n = d.shape[1]
    wide = torch.float64 if d.dtype is torch.float64 else torch.float32
    gram, shared = d.new_zeros(n, count, count, dtype=wide), d.new_zeros(count, count, dtype=wide)

    def add(rows: Tensor) -> None:
        """``rows``: ``[n, K, *]``, or ``[1, K, *]`` of the whole batch."""
        rows = rows.to(wide)
        inner = rows @ rows.mT
        if rows.shape[0] == n:
            gram.add_(inner.to(gram.device))
        else:
            shared.add_(inner[0].to(gram.device))

    for index, y in record.guesses.items():
        y = _real(y)
        add(_by_example(graph.sites[index].layout, y, n))
    for saved in record.saved_calls:
        for v in saved.directions or ():
            add(_real(v).reshape(*v.shape[:2], -1).transpose(0, 1))
    for v in record.params.values():
        add(_real(v).reshape(1, count, -1))
    batch = _projected(shared + gram.sum(0), d.sum(1).to(wide))
    return Weights(batch[:, None] if n == 1 else _projected(gram, d.T.to(wide)).T, batch)


def _real(y: Tensor) -> Tensor:
    """A complex tensor as a real one; the two parts are the last dimension."""
    return torch.view_as_real(y) if y.is_complex() else y


def _projected(gram: Tensor, d: Tensor) -> Tensor:
    """``c G^{-1} d``; ``gram`` ``[*, K, K]``, ``d`` ``[*, K]``. A ridge far below any real eigenvalue makes it the
    pseudo-inverse where guesses depend on each other or vanish."""
    count = gram.shape[-1]
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = 10 * torch.finfo(gram.dtype).eps * mean + torch.finfo(gram.dtype).tiny
    eye = torch.eye(count, dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky_ex(gram + ridge[..., None, None] * eye)[0]
    return torch.cholesky_solve(d[..., None], factor)[..., 0] * (mean / count)[..., None]


def _by_example(layout: Layout, y: Tensor, n: int) -> Tensor:
    """``[K, *shape]`` to ``[N, K, *]``; ``[1, K, *]`` where coupled."""
    rows = (layout if n > 1 else Layout.COUPLED).rows(y, n, lead=1)
    return rows.reshape(len(rows), len(y), -1)


def combined(record: ForwardRecord, graph: SiteGraph, weights: Weights) -> tuple[ForwardRecord, dict[int, Tensor]]:
    """The K estimates as one: a record in which every guess has been weighted, and the cotangents by site."""
    ones = record.d.new_ones(1)
    cotangents = {index: weights.sum(graph.sites[index].layout, y) for index, y in record.guesses.items()}
    saved_calls = [
        saved
        if saved.directions is None
        else replace(saved, directions=[_contracted(v, weights) for v in saved.directions])
        for saved in record.saved_calls
    ]
    params = {p: torch.tensordot(weights.batch.to(v.dtype), v, 1) for p, v in record.params.items()}
    return replace(record, d=ones, guesses={}, saved_calls=saved_calls, params=params), cotangents


def _contracted(v: Tensor, weights: Weights) -> Tensor:
    """``sum_k sum_n w_k[n] v_k[n]``, as one direction ``[1, *shape]``; ``v`` ``[K, N, *shape]``, N maybe 1."""
    w = weights.examples if v.shape[1] == weights.examples.shape[1] else weights.batch[:, None].expand(v.shape[:2])
    return torch.tensordot(w.to(v.dtype), v, 2)[None]
