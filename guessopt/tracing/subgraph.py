"""Recorded calls run again, and parts of the network with a reverse graph of their own.

Recorded arguments hold ``Value`` in place of tensors. ``evaluate`` fills in tensors and makes the calls, without side
effects. A ``Subgraph`` keeps the reverse graph of such a run, to be pulled back through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor

from guessopt.chains import Block
from guessopt.errors import refusal, refused
from guessopt.ops.base import moves_statistics, op_of, without_side_effects
from guessopt.ops.cached import CachedCall
from guessopt.ops.drawing import draws_now
from guessopt.ops.elementwise import is_dropout
from guessopt.record import GraphInput, Graphs
from guessopt.rng import RandomState, draws, replayed
from guessopt.sites import Call, Segment, Value
from guessopt.tracing.functions import AS_IT_IS, autocast_of
from guessopt.tracing.writes import copied, kept
from guessopt.tree import map_leaves, results_of

#: Random states before calls, by the call's index; None: not known yet.
Random = Mapping[int, "RandomState | None"]


class Subgraph:
    """A part of the network with a reverse graph of its own, which ``pull_back`` may use several times.

    Args:
        values: the goals' tensors, by value; others may be among them.
        inputs: where ``pull_back`` may lead, by value.
    """

    def __init__(self, values: dict[int, Tensor], inputs: dict[int, GraphInput]) -> None:
        self.values, self.inputs = values, inputs

    @staticmethod
    def again(calls: tuple[Call, ...], values: dict[int, Tensor], inputs: list[int], random: Random) -> Subgraph:
        """Run recorded calls once more.

        Args:
            calls: in order.
            values: the tensors that the calls read. Graphs that these may have are left out.
            inputs: values that are given, or made by the calls.
            random: the states from which calls have drawn.
        """
        variables = frozenset(inputs)
        needed = {v for call in calls for v in call.inputs} | variables
        own = {v: values[v].detach() for v in needed if v in values}
        for v in variables & own.keys():
            own[v].requires_grad_()
        with torch.enable_grad():
            own = evaluate(calls, own, variables, random=random)
        return Subgraph(own, {v: GraphInput.of(own[v]) for v in inputs})

    @staticmethod
    def kept(graphs: Graphs, block: Block, outputs: Iterable[int], variables: Mapping[int, Tensor]) -> Subgraph:
        """Take over the graph that the closure's own calls have left for a block.

        Args:
            graphs: of the forward run. The block's entries are taken out.
            outputs: values of the sites inside the block.
            variables: further tensors to which the graph may be pulled back, by value.
        """
        inputs = {v: graphs.marks.pop(v) for v in outputs} | {v: GraphInput.of(t) for v, t in variables.items()}
        if block.ends_in_skip and block.origin is not None:
            inputs[block.origin] = graphs.marks.pop(block.origin)
        if block.source is not None:
            inputs[block.source] = graphs.sources.pop(block.source)
        return Subgraph({v: graphs.goals.pop(v) for v in block.goals}, inputs)

    def pull_back(self, goals: tuple[int, ...], us: list[Tensor], variables: list[int]) -> list[Tensor]:
        """``J^T u``: from the goals to each of the variables, zeros where nothing leads there. Goals that the calls
        neither make nor read (a table of parameters that the loss reads itself) depend on nothing here."""
        inputs = [self.inputs[v] for v in variables]
        pairs = [(self.values[goal], u) for goal, u in zip(goals, us, strict=True) if goal in self.values]
        pairs = [(out, u.to(out.dtype)) for out, u in pairs if out.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if pairs:
            outs, given = zip(*pairs, strict=True)
            found = torch.autograd.grad(outs, [i.edge for i in inputs], given, allow_unused=True, retain_graph=True)
        return [us[0].new_zeros(i.shape, dtype=i.dtype) if g is None else g for g, i in zip(found, inputs, strict=True)]


def walked(segment: Segment) -> tuple[Call, ...]:
    """The calls from a site's output to the next matrix site(s), and the calls that compute their weights."""
    return (*(segment.elementwise or segment.program), *segment.weight_program)


def filled(node: Any, values: Mapping[int, Tensor]) -> Any:
    """Recorded arguments with tensors in place of ``Value``s."""
    return map_leaves(node, Value, lambda value: values[value.id])


def unary(call: Call) -> Callable[[Tensor], Tensor]:
    """A recorded call of one tensor as a function of this tensor."""

    def run(t: Tensor) -> Tensor:
        source = t.clone() if call.in_place else t
        args = tuple(source if isinstance(a, Value) else a for a in call.args)
        kwargs = {k: source if isinstance(a, Value) else a for k, a in call.kwargs.items()}
        with _autocasting(call, {call.inputs[0]: t}):
            out: Tensor = (op_of(call.fn).in_reverse or call.fn)(*args, **kwargs)
        return out

    return run


def evaluate(
    calls: tuple[Call, ...],
    values: dict[int, Tensor],
    variables: frozenset[int] = frozenset(),
    cached: dict[int, CachedCall] | None = None,
    random: Random | None = None,
) -> dict[int, Tensor]:
    """Run recorded calls. In-place writes go to copies, and global random states stay as they are.

    Args:
        calls: in order.
        values: the tensors that they read, by value.
        variables: values made here that are to require grad.
        cached: takes results that the closure may reuse, by call.
        random: the states from which calls are to draw. Without a state, dropout passes its input on (its mean), and
            any other call draws new numbers.

    Returns:
        ``values`` and the results, by value.
    """
    values, random = dict(values), random or {}
    anew = [c for c in calls if draws(c.fn) and not is_dropout(c.fn) and random.get(c.index) is None and draws_now(c)]
    state = (
        RandomState.before([*values.values(), *((c.args, c.kwargs) for c in anew)], {}, *(c.fn for c in anew))
        if anew
        else None
    )
    with replayed(state):
        for call in calls:
            _evaluate_one(call, values, cached, random.get(call.index))
            if variables:
                _require_grad(variables.intersection(call.outputs), values, several=len(call.outputs) > 1)
    return values


def _evaluate_one(
    call: Call, values: dict[int, Tensor], cached: dict[int, CachedCall] | None, state: RandomState | None
) -> None:
    """Make one call and put its results into ``values``."""
    fn = call.fn
    if state is None and is_dropout(fn):
        values[call.outputs[0]] = values[call.inputs[0]]
        return
    if call.held:
        _write_numbers(call, values)
        return
    args, kwargs = filled(call.args, values), filled(call.kwargs, values) if call.kwargs else {}
    if call.in_place:
        args = (args[0].clone(), *args[1:])
    elif call.writes and not moves_statistics(fn):
        args, kwargs = copied(args, kwargs, call.writes)
    op = op_of(fn)
    run = op.in_reverse if state is None else None
    try:
        with _as_recorded(call, values, state):
            out = (run or without_side_effects(fn))(*args, **kwargs)
    except RuntimeError as error:
        if (why := refusal(error)) is None:
            raise
        raise refused(fn, why) from error
    if isinstance(out, Tensor):
        values[call.outputs[0]] = out
        if cached is not None and op.reuse is not None and not (call.in_place or call.writes or call.hidden):
            cached[call.index] = CachedCall.of(args, kwargs, out, op.reuse(out))
    else:
        results = results_of(out, list(args[:1]))
        values.update(zip(call.outputs[: call.result_count], results, strict=True))


def _require_grad(made: frozenset[int], values: dict[int, Tensor], *, several: bool) -> None:
    """Make these values require grad; ``several``: whether their call has made others too."""
    for v in made:
        if not values[v].requires_grad:
            values[v] = values[v].detach().requires_grad_()
        elif several:  # an LSTM cell's h is made from its c: the derivative by way of h does not belong to c
            values[v] = values[v].clone()


def _write_numbers(call: Call, values: dict[int, Tensor]) -> None:
    """A write without gradient: the value gets other numbers and keeps its derivative."""
    with torch.no_grad():
        plain = {v: values[v].detach() for v in call.inputs}
        first = plain[call.inputs[0]] = plain[call.inputs[0]].clone()
        call.fn(*filled(call.args, plain), **filled(call.kwargs, plain))
    old, new = call.held[0]
    values[new] = values[old] + (first - values[old].detach())


def _as_recorded(call: Call, values: dict[int, Tensor], state: RandomState | None) -> AbstractContextManager[Any]:
    """The modes in which the closure made the call: gradients, autocast, random state. Hidden writes are undone."""
    autocast = _autocasting(call, values)
    if autocast is AS_IT_IS and state is None and not call.hidden and not call.stopped:
        return AS_IT_IS
    stack = ExitStack()
    for context in (
        torch.no_grad() if call.stopped else AS_IT_IS,
        autocast,
        AS_IT_IS if state is None else replayed(state),
        kept(call.hidden) if call.hidden else AS_IT_IS,
    ):
        stack.enter_context(context)
    return stack


def _autocasting(call: Call, values: Mapping[int, Tensor]) -> AbstractContextManager[Any]:
    """The autocast under which the closure made the call."""
    now = autocast_of(values[call.inputs[0]]) if call.inputs else None
    if now == call.autocast or not call.inputs:
        return AS_IT_IS
    return torch.autocast(*call.autocast) if call.autocast else torch.autocast(now[0], enabled=False)  # type: ignore[index]
