"""Records one run of the closure: its calls, and the values that pass between them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

from guessopt.errors import ClosureError
from guessopt.graph import Kind
from guessopt.layout import Shape, is_differentiable
from guessopt.ops.base import is_in_place
from guessopt.sites import Call, Value, label
from guessopt.tracing.functions import AS_IT_IS, autocast_of, read_by, stops_gradient
from guessopt.tracing.interceptor import Interceptor
from guessopt.tracing.writes import Writes, plain
from guessopt.tree import map_tensors, results_of


class Tape(Interceptor):
    """Runs the closure without derivatives and records every call.

    A *value* is the content of a tensor between two writes to its memory. A write gives a new value to every live
    tensor that shares the memory. A call that returns its argument untouched (``.to()`` of the same dtype) makes no
    value.

    Args:
        params: as for ``Interceptor``.
        as_expression: indices of calls that are taken as parameter expressions although they read another tensor
            (``F.embedding(arange(T), W)``, which holds no examples).
        save: called with each tensor or generator that the closure has not made, before it is written or drawn from.

    Attributes:
        calls, kinds: the calls, and the kind of each.
        mine: by call, the positions of trainable parameters and their expressions among its tensors.
        origins: by call, the parameters (positions in the optimizer) that these are or are computed from.
        shapes, dtypes: by value.
        producer: by value, the call that makes it.
        consumers: by value, the calls that derivatives reach from it.
        first_use: by value from outside, (call, position) of the first reading.
        outside: by value, the tensors that the closure reads and does not make.
        weights: values of parameters (trainable or not) and parameter expressions.
        parameters: by value, the position of the trainable parameter that it is.
        writes: writes into memory that the closure did not allocate.
        rewritten: positions of the trainable parameters that the closure writes.
        stopped: positions of the parameters that calls without gradients read.
        answers: the answers to ``activation.requires_grad``, in order.
        compiled: whether a parameter was read inside compiled code.
        active: the values that derivatives reach.
        overwritten: the values into whose memory a later call writes.
        aliased: values of tensors that a call changed and did not return.
    """

    def __init__(
        self,
        params: Mapping[int, int],
        as_expression: frozenset[int] = frozenset(),
        save: Callable[[Any], None] = lambda t: None,
    ) -> None:
        super().__init__(params)
        self.as_expression = as_expression
        self.calls: list[Call] = []
        self.kinds: list[Kind] = []
        self.mine: list[tuple[int, ...]] = []
        self.origins: list[frozenset[int]] = []
        self.shapes: list[Shape] = []
        self.dtypes: list[torch.dtype] = []
        self.producer: dict[int, int] = {}
        self.consumers: dict[int, list[int]] = {}
        self.first_use: dict[int, tuple[int, int]] = {}
        self.outside: dict[int, Tensor] = {}
        self.weights: set[int] = set()
        self.parameters: dict[int, int] = {}
        self.writes = Writes(save)
        self.rewritten: frozenset[int] = frozenset()
        self.stopped: set[int] = set()
        self.answers: list[bool] = []
        self.compiled = False
        self.active: set[int] = set()
        self.overwritten: set[int] = set()
        self.aliased: set[int] = set()
        self._memory: dict[int, set[int]] = {}
        self._views: dict[int, int] = {}
        self._values = WeakIdKeyDictionary()

    def call(
        self,
        index: int,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        outline: list[Any],
    ) -> Any:
        if torch._C._are_functorch_transforms_active() or isinstance(fn, HigherOrderOperator):
            self._check_plain(fn, tensors)
        read = read_by(fn, tensors)
        mine = [t for t in read if id(t) in self.params or id(t) in self.expressions]
        self.compiled = self.compiled or (bool(mine) and _within_compiled_code())
        reads = tuple(self._read(t, index, position, fn) for position, t in enumerate(tensors))
        inputs = tuple(v if v >= 0 else ~v for v in reads)
        recorded_args, recorded_kwargs = map_tensors((args, kwargs), lambda t: Value(self.value(t)))
        moving = not self.active.isdisjoint(inputs)
        if kwargs.get("out") is not None and (mine or moving):
            raise ClosureError(f"{label(fn)}(out=...) has no derivative; leave out= away and use what it returns")
        origins = frozenset().union(*(self.positions(m) for m in mine))
        versions = [version_of(t) for t in tensors]
        stopped = not torch.is_grad_enabled() or stops_gradient(fn)
        if stopped:
            self.stopped |= origins
        kind = self._kind(index, stopped, len(mine), len(read))
        in_place = is_in_place(fn)
        if kind is Kind.SITE and in_place and id(tensors[0]) in self.params:
            raise ClosureError(
                f"{label(fn)} writes into a trainable parameter of shape {list(tensors[0].shape)} with gradients "
                "enabled, which autograd refuses as well; write under torch.no_grad()"
            )
        self.writes.begin(index, fn, args, kwargs, tensors)
        with AS_IT_IS if kind in (Kind.EXPRESSION, Kind.STOPPED) else self.no_grad:
            out = fn(*args, **kwargs)
        self.writes.end()
        outside_writes, hidden = self.writes.of(index)
        written = [k for k, t in enumerate(tensors) if version_of(t) != versions[k] or (not k and in_place)]
        results = results_of(out, tensors)
        in_place = in_place or any(r is tensors[k] for r in results for k in written)
        if kind is Kind.EXPRESSION:
            self.express(results, mine)
        moves: tuple[tuple[int, int], ...] = ()
        held: tuple[tuple[int, int], ...] = ()
        flows = kind is Kind.SITE or (kind is Kind.PLAIN and moving)
        if written:
            outputs, moves, held = self._write(index, kind, flows, [tensors[k] for k in written], results)
        else:
            outputs = self._made(index, kind, flows, results, tensors)
        self.calls.append(
            Call(
                index, fn, recorded_args, recorded_kwargs, inputs, outputs, in_place,
                aliases=(in_place and (len(outputs) > 1 or written != [0])) or any(v in self.active for _, v in moves),
                autocast=autocast_of(tensors[0]) if tensors else None,
                reads=reads, outline=outline, result_count=len(results),
                target=next((k for k in written if results and tensors[k] is results[0]), None), moves=moves, held=held,
                sources=(*inputs, *(old for old, new in (*moves, *held) if new in self.active)), stopped=stopped,
                writes=outside_writes, hidden=hidden,
            )
        )  # fmt: skip
        for v in self.calls[-1].sources:
            self.consumers.setdefault(v, []).append(index)
        self.kinds.append(kind)
        self.mine.append(tuple(k for k, t in enumerate(tensors) if any(t is m for m in mine)))
        self.origins.append(origins)
        return out

    def _kind(self, index: int, stopped: bool, mine: int, read: int) -> Kind:
        """The call's kind; ``mine`` of the ``read`` tensors that matter are parameters or their expressions."""
        if stopped:
            return Kind.STOPPED
        if not mine:
            return Kind.PLAIN
        return Kind.EXPRESSION if mine == read or index in self.as_expression else Kind.SITE

    def _read(self, t: Tensor, index: int, position: int, fn: Callable[..., Any]) -> int:
        """The tensor's value ``v``; ``~v`` if no call has made or read it before."""
        v = self.value(t)
        if isinstance(t, torch.nn.Parameter) or id(t) in self.expressions:
            self.weights.add(v)
            if id(t) in self.params:
                self.parameters[v] = self.params[id(t)]
        if v in self.producer or v in self.first_use:
            return v
        self._check_seen(t, fn)
        self.first_use[v] = (index, position)
        self.outside[v] = t
        if t.numel() and not isinstance(t, torch.nn.Parameter):
            self._memory.setdefault(memory_of(t), set()).add(v)
        return ~v

    def _made(
        self, index: int, kind: Kind, flows: bool, results: list[Tensor], tensors: list[Tensor]
    ) -> tuple[int, ...]:
        """New values for the results of a call that wrote nothing."""
        places = {memory_of(t): self._views[self.value(t)] for t in reversed(tensors) if t.numel()}
        outputs: list[int] = []
        for t in results:
            if any(t is argument for argument in tensors):
                outputs.append(self.value(t))
                continue
            v, place = self._new(t, index), memory_of(t)
            outputs.append(v)
            if place in places:
                self._memory.setdefault(place, set()).add(v)
                if kind is not Kind.STOPPED:
                    self._views[v] = places[place]
            else:
                self._memory[place] = {v}
            if flows:
                self._activate(t, v)
        return tuple(outputs)

    def _write(
        self, index: int, kind: Kind, flows: bool, targets: list[Tensor], results: list[Tensor]
    ) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
        """New values for all tensors that share memory with the tensors that a call has written.

        As in autograd, the derivative of a write reaches its target and the target's differentiable views. A write
        through ``detach()``, ``.data`` or under ``no_grad`` changes the numbers alone.

        Returns:
            The values of the results, then of the other tensors; the pairs (old, new) of the other tensors; the pairs
            of those whose derivative stays as it was.
        """
        places = {memory_of(t) for t in targets}
        views = {self._views[self.value(t)] for t in targets}
        touched = [t for t in list(self._values.keys()) if any(t is s for s in targets) or self._lies_in(t, places)]
        # A parameter keeps its value: every run reads it anew.
        extra = [t for t in touched if not any(t is r for r in results) and not isinstance(t, torch.nn.Parameter)]
        outputs: list[int] = []
        moves: list[tuple[int, int]] = []
        held: list[tuple[int, int]] = []
        for place in places:
            self.overwritten |= self._memory.get(place, set())
        for t in [*results, *extra]:
            if not any(t is other for other in touched):  # a result in new memory
                outputs.append(v := self._new(t, index))
                self._memory[memory_of(t)] = {v}
                if flows:
                    self._activate(t, v)
                continue
            old = self.value(t)
            if isinstance(t, torch.nn.Parameter):
                outputs.append(old)
                continue
            outputs.append(v := self._new(t, index))
            self._views[v] = self._views[old]
            self._memory.setdefault(memory_of(t), set()).add(v)
            if not any(t is r for r in results):
                moves.append((old, v))
                self.aliased.add(v)
            if kind is not Kind.STOPPED and self._views[old] in views:
                if flows:
                    self._activate(t, v, mark=old not in self.outside)
                if kind is not Kind.EXPRESSION:
                    self.expressions.pop(id(t), None)
            elif old in self.active:
                self.active.add(v)
                held.append((old, v))
        return tuple(outputs), tuple(moves), tuple(held)

    def _lies_in(self, t: Tensor, places: set[int]) -> bool:
        return t.numel() > 0 and memory_of(t) in places

    def run(self, closure: Callable[[], Any]) -> Any:
        with self.writes:
            loss = super().run(closure)
        if isinstance(loss, Tensor) and loss not in self._values:
            self._check_seen(loss, None)
        return loss

    def moves(self, t: Tensor) -> bool:
        return self._values.get(t) in self.active

    def requires_grad(self, answer: bool) -> bool:
        self.answers.append(answer)
        return answer

    def _activate(self, t: Tensor, v: int, *, mark: bool = True) -> None:
        """Note that derivatives reach the value.

        ``mark``: make the tensor require grad (not a tensor of the user's). A call that the mode cannot see then leaves
        a ``grad_fn``, by which ``_check_seen`` finds it.
        """
        if is_differentiable(t):
            self.active.add(v)
            if mark and not t.requires_grad:
                t.requires_grad_()

    def _check_plain(self, fn: Callable[..., Any], tensors: list[Tensor]) -> None:
        """Raise ``ClosureError`` if derivatives pass through a call inside a transform, or a higher-order operation."""
        name = label(fn)
        for t in tensors:
            t = plain(t)
            if id(t) in self.params or id(t) in self.expressions or self._values.get(t) in self.active:
                if isinstance(fn, HigherOrderOperator):
                    raise ClosureError(
                        f"{name} is a higher-order operation, which has no derivative in forward mode; use another one "
                        "(F.scaled_dot_product_attention in place of flex_attention)"
                    )
                raise ClosureError(
                    f"{name} is called inside a transform of torch.func (vmap, grad, jvp, ...), which hides how values "
                    "depend on each other; call the model outside the transform"
                )

    def _check_seen(self, t: Tensor, fn: Callable[..., Any] | None) -> None:
        """Raise ``ClosureError`` if the tensor depends on trainable parameters through a call that was not seen."""
        stack: list[Any] = [t.grad_fn] if t.grad_fn is not None and id(t) not in self.expressions else []
        seen: set[Any] = set()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and (id(leaf) in self.params or self._values.get(leaf) in self.active):
                where = "the closure returns" if fn is None else f"{label(fn)} reads"
                raise ClosureError(
                    f"{where} a tensor that depends on trainable parameters through an operation which cannot be seen "
                    f"({t.grad_fn.name()}): TorchScript (torch.jit) hides its operations, so use the original module; "  # type: ignore[union-attr]
                    "if the tensor was computed before the closure, compute it inside, or detach it"
                )
            stack += [parent for parent, _ in node.next_functions]

    def value(self, t: Tensor) -> int:
        found = self._values.get(t)
        return found if found is not None else self._new(t, None)

    def _new(self, t: Tensor, producer: int | None) -> int:
        if t.is_nested:
            raise ClosureError("the closure uses a nested tensor; pad it, or run the examples in groups of one length")
        v = len(self.shapes)
        self.shapes.append(tuple(t.shape))
        self.dtypes.append(t.dtype)
        self._values[t] = v
        self._views[v] = v
        if producer is not None:
            self.producer[v] = producer
        return v


def _within_compiled_code() -> bool:
    """Whether a ``torch.compile``d function is running (the interceptor makes it run eagerly)."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        return False
    frame = sys._getframe()
    while frame is not None:
        # The other user of that module is ``torch._disable_dynamo``, by which torch wraps functions of its own.
        if (
            frame.f_globals.get("__name__") == "torch._dynamo.eval_frame"
            and type(frame.f_locals.get("self")).__name__ != "DisableContext"
        ):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def memory_of(t: Tensor) -> int:
    """A number for the memory that ``t`` lies in; its own where it has none that can be seen."""
    hidden = (
        t.layout is not torch.strided
        or torch._C._functorch.is_functorch_wrapped_tensor(t)
        or is_traceable_wrapper_subclass(t)
    )
    return id(t) if hidden else t.untyped_storage().data_ptr() or id(t)


def version_of(t: Tensor) -> int:
    """The number of writes to the memory of ``t``."""
    return 0 if t.is_inference() else t._version
