"""One run of the closure, written down: calls and the tensors that pass between them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from guessopt.errors import ClosureError
from guessopt.rules.base import is_in_place
from guessopt.sites import Call, Kind, Shape, Value
from guessopt.tracing.interceptor import Interceptor, autocast_of, read_by, stops_gradient, tensors_in
from guessopt.tracing.writes import Writes


class Tape(Interceptor):
    """Runs the closure as it stands (no derivatives, nothing kept but outlines) and records every call.

    Args:
        params: as for ``Interceptor``.
        expressions: indices of calls to take as parameter expressions although another tensor takes part
            (``F.embedding(arange(T), W)``: no examples in it).
        save: called with what the closure has not made, before it is written or drawn from.
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
        self.writes = Writes(save)
        self.rewritten: frozenset[int] = frozenset()
        self.stopped: set[int] = set()
        self.answers: list[bool] = []
        self.compiled = False
        self.active: set[int] = set()
        self.overwritten: set[int] = set()
        self._memory: dict[int, set[int]] = {}
        self._values = WeakIdKeyDictionary()

    def call(
        self,
        index: int,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        mine: list[Tensor],
    ) -> Any:
        if torch._C._are_functorch_transforms_active() or isinstance(fn, HigherOrderOperator):
            self._check_plain(fn, tensors)
        known = len(self.shapes)
        self.compiled = self.compiled or (bool(mine) and _within_compiled_code())
        inputs = tuple(self.value(t) for t in tensors)
        for position, (t, v) in enumerate(zip(tensors, inputs, strict=True)):
            if v >= known and v not in self.first_use:
                self._check_seen(t, fn)
                self.first_use[v] = (index, position)
                self.outside[v] = t
            if isinstance(t, torch.nn.Parameter) or id(t) in self.expressions:
                self.weights.add(v)
        recorded_args, recorded_kwargs = tree_map_only(Tensor, lambda t: Value(self.value(t)), (args, kwargs))
        versions = [_version(t) for t in tensors]
        stopped = not torch.is_grad_enabled() or stops_gradient(fn)
        if stopped:
            kind = Kind.STOPPED
            self.stopped.update(*(self.positions(m) for m in mine))
        elif mine and (len(mine) == len(read_by(fn, tensors)) or index in self.as_expression):
            kind = Kind.EXPRESSION
        else:
            kind = Kind.SITE if mine else Kind.PLAIN
        self.writes.begin(index, fn, args, kwargs, tensors)
        if kind in (Kind.EXPRESSION, Kind.STOPPED):
            out = fn(*args, **kwargs)
        else:
            with self.no_grad:
                out = fn(*args, **kwargs)
        self.writes.end()
        if kind is Kind.EXPRESSION:
            self.express(out, mine)

        results = tensors_in((out,)) if out is not None else list(tensors[:1])
        # What returns its own argument untouched (``contiguous``, a dropout of 0) is no write.
        changed = [t for t, version in zip(tensors, versions, strict=True) if _version(t) != version]
        in_place = is_in_place(fn) or any(r is t for r in results for t in changed)
        extra = self._aliases(results, tensors) if in_place else []
        if in_place and tensors:
            self.overwritten |= self._memory.get(_memory(tensors[0]), set())
        outputs = tuple(
            self.value(t) if isinstance(t, torch.nn.Parameter) and not in_place else self._new(t, index)
            for t in [*results, *extra]
        )
        self._remember(results, outputs, tensors)
        if kind is Kind.SITE or (kind is Kind.PLAIN and any(v in self.active for v in inputs)):
            self._activate(results, outputs, {id(t) for t, v in zip(tensors, inputs, strict=True) if v in self.outside})
        for v in inputs:
            self.consumers.setdefault(v, []).append(index)
        autocast = autocast_of(tensors[0]) if tensors else None
        self.calls.append(
            Call(
                index,
                fn,
                recorded_args,
                recorded_kwargs,
                inputs,
                outputs,
                in_place,
                bool(extra),
                autocast,
                *self.writes.of(index),
            )
        )
        self.kinds.append(kind)
        self.mine.append(tuple(k for k, t in enumerate(tensors) if any(t is m for m in mine)))
        self.origins.append(frozenset().union(*(self.positions(m) for m in mine)))
        return out

    def run(self, closure: Callable[[], Any]) -> Any:
        with self.writes:
            loss = super().run(closure)
        if isinstance(loss, Tensor) and loss not in self._values:
            self._check_seen(loss, None)
        return loss

    def requires_grad(self, answer: bool) -> bool:
        self.answers.append(answer)
        return answer

    def _activate(self, results: list[Tensor], outputs: tuple[int, ...], outside: set[int]) -> None:
        """Derivatives reach these. They are made to require grad, so that a call which the mode cannot see leaves a
        trace of itself; the user's own tensors stay as they are."""
        for t, v in zip(results, outputs, strict=False):
            if t.is_floating_point():
                self.active.add(v)
                if id(t) not in outside:
                    t.requires_grad_()
        self.active.update(v for v in outputs[len(results) :] if self.dtypes[v].is_floating_point)

    def _check_plain(self, fn: Callable[..., Any], tensors: list[Tensor]) -> None:
        """Raise ``ClosureError`` if a call inside a transform, or a higher-order one, takes part in the derivative."""
        name = getattr(fn, "__name__", str(fn))
        for t in tensors:
            while torch._C._functorch.is_functorch_wrapped_tensor(t):
                t = torch._C._functorch.get_unwrapped(t)
            if id(t) in self.params or id(t) in self.expressions or self._values.get(t) in self.active:
                if isinstance(fn, HigherOrderOperator):
                    raise ClosureError(
                        f"{name} is a higher-order operation, which has no derivative in forward mode; use another one "
                        "(F.scaled_dot_product_attention in place of flex_attention)"
                    )
                raise ClosureError(
                    f"{name} is called inside a transform of torch.func (vmap, grad, ...); call the model outside it"
                )

    def _check_seen(self, t: Tensor, fn: Callable[..., Any] | None) -> None:
        """Raise ``ClosureError`` if a tensor that no seen call has made depends on what trains."""
        stack: list[Any] = [t.grad_fn] if t.grad_fn is not None and id(t) not in self.expressions else []
        seen: set[Any] = set()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and (id(leaf) in self.params or self._values.get(leaf) in self.active):
                where = "the closure returns" if fn is None else f"{getattr(fn, '__name__', fn)} reads"
                raise ClosureError(
                    f"{where} a tensor that depends on trainable parameters through an operation which cannot be seen "
                    f"({t.grad_fn.name()}): TorchScript (torch.jit) hides its operations, so use the original module; "  # type: ignore[union-attr]
                    "what was computed before the closure must be computed inside it, or detached"
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
        if producer is not None:
            self.producer[v] = producer
        return v

    def _aliases(self, results: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
        """Other live tensors that share memory with what was just written."""
        if not tensors or not tensors[0].numel():
            return []
        place = _memory(tensors[0])
        others = [t for t in list(self._values.keys()) if not isinstance(t, torch.nn.Parameter)]
        return [t for t in others if not any(t is r for r in results) and t.numel() and _memory(t) == place]

    def _remember(self, results: list[Tensor], outputs: tuple[int, ...], tensors: list[Tensor]) -> None:
        """Which values lie in which memory; memory that is in no input has been allocated anew."""
        old = {_memory(t) for t in tensors}
        for t, v in zip(results, outputs, strict=False):
            place = _memory(t)
            if place in old:
                self._memory.setdefault(place, set()).add(v)
            else:
                self._memory[place] = {v}


def _within_compiled_code() -> bool:
    """Whether a ``torch.compile``d function is being run (eagerly, as the interceptor sees to)."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        return False
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch._dynamo.eval_frame":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _memory(t: Tensor) -> int:
    hidden = (
        t.layout is not torch.strided
        or torch._C._functorch.is_functorch_wrapped_tensor(t)
        or is_traceable_wrapper_subclass(t)
    )
    return id(t) if hidden else t.untyped_storage().data_ptr()


def _version(t: Tensor) -> int:
    """How often ``t``'s memory has been written."""
    return 0 if t.is_inference() else t._version
