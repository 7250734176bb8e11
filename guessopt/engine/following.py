"""``FollowingRun``: does the closure make the calls of the graph?

Call number k of the closure is compared with call number k of the graph.

| compared | may differ from the graph |
|---|---|
| function, gradients on or off, number of results | nothing |
| arguments that are no tensors | numbers, unless they decide which entries meet (``_STRUCTURAL``) |
| tensors that the closure makes | nothing: each must be the graph's value |
| tensors that the closure does not make | the tensor, not its shape or dtype |
| trainable parameters | nothing |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor

from guessopt.graph import Handling, Kind, SiteGraph
from guessopt.sites import Call, Value, name_of
from guessopt.tracing.functions import stops_gradient
from guessopt.tracing.interceptor import Interceptor
from guessopt.tree import compared, map_tensors

#: Calls whose number arguments decide which entries meet. Other numbers make another graph.
_STRUCTURAL = {torch.cat, torch.concat, torch.concatenate, F.conv1d, F.conv2d, F.conv3d, F.batch_norm, F.dropout}


class GraphMismatch(BaseException):
    """The closure departs from the graph. Not an ``Exception``, so that a closure cannot catch it by accident.

    Args:
        index: number of the call, from 0.
        what: the difference, in a few words.
    """

    def __init__(self, index: int = -1, what: str = "") -> None:
        super().__init__(index, what)
        self.index, self.what = index, what


class FollowingRun(Interceptor):
    """A run of the closure that raises ``GraphMismatch`` where it departs from the graph.

    Args:
        params: ``id`` of each trainable parameter to its position.
        graph: the graph of an earlier run.
        same_objects: whether an operation that returns its argument unchanged returns the same object.
        repeats: raise also if the run reads numbers or tensors other than those of the last run.

    Attributes:
        seen: ``id`` of each tensor that the run has met -> (a weak reference to it, its value).
        met: by value, the tensors that the closure reads and has not made, without the trainable parameters.
        changed: calls (``-1 - index``) whose number arguments differ from the graph's. The graph takes the new ones.
        stale: whether a result was computed early from numbers or tensors that the closure then did not use.
    """

    def __init__(
        self, params: Mapping[int, int], graph: SiteGraph, *, same_objects: bool = True, repeats: bool = False
    ) -> None:
        super().__init__(params)
        self.graph, self.same_objects, self.repeats = graph, same_objects, repeats
        self.seen: dict[int, tuple[ref[Tensor], int]] = dict(graph.parameters_seen)
        self.met: dict[int, Tensor] = {}
        self.changed: list[int] = []
        self.stale = False
        self.handling = graph.handling
        #: Values whose tensor has been overwritten: the value before the write -> the value after it.
        self._moved: dict[int, int] = {}
        self._answers = iter(graph.answers)

    def moves(self, t: Tensor) -> bool:
        return self.value_of(t) in self.graph.active

    def requires_grad(self, answer: bool) -> bool:
        return next(self._answers, answer)  # as in the trace: the closure may branch on it

    def value_of(self, t: Tensor) -> int:
        """The tensor's value; -1 if this run has not seen the tensor yet."""
        entry = self.seen.get(id(t))
        if entry is None or entry[0]() is not t:
            return -1
        value = entry[1]
        while value in self._moved:
            value = self._moved[value]
        return value

    # --- before a call ------------------------------------------------------------------------------------------------

    def check_function(self, index: int, fn: Callable[..., Any]) -> Handling:
        """The graph's entry for call number ``index``. The entry's function must be ``fn``."""
        if index >= len(self.handling):
            raise GraphMismatch(index, f"{name_of(fn)} is called after the last call of the earlier run")
        handling = self.handling[index]
        if handling.fn is not fn and handling.fn != fn:
            raise GraphMismatch(index, f"{name_of(fn)} is called in place of {handling.call.op}")
        stopped = handling.kind is Kind.STOPPED
        if (not torch.is_grad_enabled() or stops_gradient(fn)) != stopped:
            gradients = "with" if stopped else "without"
            raise GraphMismatch(index, f"{name_of(fn)} is called {gradients} gradients")
        return handling

    def check_tensors(self, call: Call, tensors: list[Tensor]) -> None:
        """Raise ``GraphMismatch`` unless each tensor has the value that the trace found at its position."""
        reads = call.reads
        if len(tensors) != len(reads):
            raise GraphMismatch(call.index, f"{call.op} takes {len(tensors)} tensors in place of {len(call.reads)}")
        seen, moved = self.seen, self._moved
        for k, t in enumerate(tensors):
            entry, expected = seen.get(id(t)), reads[k]
            value = expected if expected >= 0 else ~expected
            if entry is not None and entry[1] == value and entry[0]() is t and value not in moved:
                continue
            found = self.value_of(t)
            if expected < 0 and found < 0:
                self._meet(call, ~expected, t)
            elif found != expected:
                raise GraphMismatch(call.index, f"{call.op} reads another tensor")

    def _meet(self, call: Call, value: int, t: Tensor) -> None:
        """Check a tensor that the closure has not made, and add it to ``met``."""
        known, graph = self.graph.outside[value], self.graph
        if t.shape != known.shape or t.dtype != known.dtype:
            made = f"{described(t.shape, t.dtype)} in place of {described(known.shape, known.dtype)}"
            raise GraphMismatch(call.index, f"{call.op} reads {made}")
        position = self.params.get(id(t))
        if position != known.parameter:
            raise GraphMismatch(call.index, f"{call.op} reads another parameter")
        self.seen[id(t)] = entry = ref(t), value
        if position is not None:
            graph.parameters_seen[id(t)] = entry
            return
        first = graph.first_pass_tensors.get(value, t)
        if self.repeats and first is not t and not _equal(first, t):
            raise GraphMismatch(call.index, f"{call.op} reads a tensor that holds other numbers than a moment ago")
        self.met[value] = t
        if value in graph.constant_values and (constant := graph.constants.get(value)) is not t:
            if constant is None or not _equal(constant, t):
                if known.fixed and constant is not None:
                    raise GraphMismatch(call.index, f"{call.op} reads another weight")
                self.stale = True
            graph.constants[value] = t

    def check_arguments(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], outline: list[Any]) -> None:
        """Compare the arguments that are not tensors. Numbers may differ, nothing else."""
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

    # --- after a call -------------------------------------------------------------------------------------------------

    def check_results(self, call: Call, results: list[Tensor]) -> None:
        if len(results) != call.result_count:
            raise GraphMismatch(
                call.index, f"{call.op} returned {len(results)} tensors in place of {call.result_count}"
            )

    def register(self, call: Call, results: list[Tensor], tensors: list[Tensor]) -> None:
        """Note the values of the tensors that the call has returned or written."""
        outputs, inputs, seen = call.outputs, call.inputs, self.seen
        for k, t in enumerate(results):
            value = outputs[k]
            if value in inputs and not self._is_argument(value, t, tensors):
                raise GraphMismatch(call.index, f"{call.op} returned another tensor than its argument")
            seen[id(t)] = ref(t), value
        if call.target is not None:
            self.seen[id(tensors[call.target])] = ref(tensors[call.target]), outputs[0]
        if call.moves:
            self._moved.update(call.moves)

    def _is_argument(self, value: int, t: Tensor, tensors: list[Tensor]) -> bool:
        """Whether a call that returned its argument in the trace has returned it again. A copy is accepted too, since
        another kernel may give the argument another layout; but not if a later call writes into the value."""
        if any(t is argument for argument in tensors):
            return True
        if self.same_objects and value in self.graph.overwritten:
            return False
        return any(t.dtype is argument.dtype and t.shape == argument.shape for argument in tensors)

    def check_end(self, loss: Any) -> None:
        """Raise ``GraphMismatch`` unless the closure has made all calls and returned the graph's loss."""
        if self.count != len(self.graph.calls):
            raise GraphMismatch(self.count, f"the closure ended before it called {self.graph.calls[self.count].op}")
        if not isinstance(loss, Tensor) or self.value_of(loss) != self.graph.returned:
            raise GraphMismatch(self.count, "the closure returned another tensor")


def described(shape: Any, dtype: torch.dtype) -> str:
    """A tensor's shape and dtype in words."""
    return f"a tensor {list(shape)} of {dtype}"


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    with torch.no_grad():
        return a.layout is b.layout and bool(torch.equal(a, b))
