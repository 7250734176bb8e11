"""Where derivatives flow on a tape: which calls lead to the loss, and where the network ends and the loss begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from guessopt.graph import Kind
from guessopt.layout import numel
from guessopt.sites import Site, Value
from guessopt.tracing.match import (
    LAYERS,
    MatrixCall,
    is_loss_with_parameters,
    matrix_call,
    normalises_batch,
    picks_rows,
)
from guessopt.tracing.tape import Tape


class Analysis:
    """What a tape says about derivatives.

    Args:
        tape: a recorded run.
        returned: the loss's value.

    Attributes:
        active: the values that derivatives reach.
        useful: the calls through which a derivative reaches the loss.
        loss: the useful calls after the network's end.
        cut_values: the values where the network ends and the loss begins, in order.
        blocked: by a site's value, why it has no segment.
        without_forward: functions found to have no forward derivative. All graphs of this analysis share the set.
        expression_numbers: a number for each parameter expression that serves as a weight, by its parameters' positions
            and its value.
    """

    def __init__(self, tape: Tape, returned: int) -> None:
        self.tape, self.returned = tape, returned
        self.active = tape.active
        self.blocked: dict[int, str] = {}
        self.without_forward: set[Callable[..., Any]] = set()
        self.expression_numbers: dict[tuple[tuple[int, ...], int], int] = {}
        self._next_inputs: dict[tuple[int, ...], int | None] = {}
        self.useful = {tape.producer[v] for v in self.upstream([returned])}
        self.loss = self._loss_calls()
        self.cut_values = self._cuts()

    # --- the loss and the network -------------------------------------------------------------------------------------

    def _loss_calls(self) -> set[int]:
        """The calls back from the loss up to the network, without those that the network reads too."""
        tape = self.tape
        loss: set[int] = set()
        stack = [self.returned]
        while stack:
            v = stack.pop()
            c = tape.producer.get(v)
            if c is None or c in loss or v not in self.active or not self._may_be_loss(c):
                continue
            loss.add(c)
            stack += tape.calls[c].inputs
        while True:
            network = self.useful - loss
            read_by_network = {
                c for c in loss if any(not network.isdisjoint(tape.consumers.get(v, ())) for v in tape.calls[c].outputs)
            }
            if not read_by_network:
                return loss
            loss -= read_by_network

    def _may_be_loss(self, c: int) -> bool:
        """Whether a call can belong to the loss. A matrix site cannot. A call that reads trainable parameters can if
        these are single numbers (a loss's weight, a temperature) or if the loss contains the last layer."""
        tape = self.tape
        call, kind = tape.calls[c], tape.kinds[c]
        if kind is Kind.STOPPED:
            return False
        if kind is Kind.SITE:
            if call.in_place and call.aliases:
                return False
            single = all(numel(tape.shapes[call.inputs[k]]) == 1 for k in tape.mine[c])
            return (single or is_loss_with_parameters(call.fn)) and not self.active.isdisjoint(call.inputs)
        return matrix_call(tape, call) is None and not call.aliases

    def _cuts(self) -> list[int]:
        tape, cuts = self.tape, []
        for c in sorted(self.loss):
            for v in tape.calls[c].inputs:
                if v in self.active and tape.producer[v] not in self.loss and v not in cuts:
                    cuts.append(v)
        if self.returned in self.active and tape.producer[self.returned] not in self.loss:
            cuts.append(self.returned)
        return cuts

    # --- from one value to others -------------------------------------------------------------------------------------

    def users(self, v: int) -> list[int]:
        """The calls that read a value and through which a derivative goes on to the loss."""
        return [u for u in self.tape.consumers.get(v, ()) if u in self.useful]

    def upstream(self, values: Iterable[int]) -> set[int]:
        """The active ones of the values, and all values from which derivatives reach these."""
        tape, seen, stack = self.tape, set[int](), list(values)
        while stack:
            v = stack.pop()
            if v not in seen and v in self.active:
                seen.add(v)
                stack += tape.calls[tape.producer[v]].sources
        return seen

    def leads_to(self, v: int, sites: Sequence[Site]) -> set[int]:
        """The outputs of the first sites after a value, and the cuts that it reaches past no site."""
        ends = {site.value for site in sites} | set(self.cut_values)
        found: set[int] = set()
        stack, seen = [v], {v}
        while stack:
            for c in self.users(stack.pop()):
                for o in self.tape.calls[c].outputs:
                    if o in ends:
                        found.add(o)
                    elif o in self.active and o not in seen:
                        seen.add(o)
                        stack.append(o)
        return found

    def next_input(self, values: Sequence[int]) -> int | None:
        """The input of the first matrix site that these values reach; None where none follows."""
        key = tuple(values)
        if key not in self._next_inputs:
            self._next_inputs[key] = self._search_next_input(key)
        return self._next_inputs[key]

    def _search_next_input(self, values: tuple[int, ...]) -> int | None:
        tape = self.tape
        nearest: MatrixCall | None = None
        reached, stack = set(values), list(values)
        while stack:
            v = stack.pop()
            for c in self.users(v):
                call = tape.calls[c]
                if (m := matrix_call(tape, call)) is not None and m.x == v:
                    nearest = m if nearest is None or c < nearest.call.index else nearest
                    continue
                for o in call.outputs:
                    if o in self.active and o not in reached:
                        reached.add(o)
                        stack.append(o)
        return None if nearest is None else nearest.x

    def readers(self, x: int) -> list[MatrixCall]:
        """The matrix sites that read ``x``, in order."""
        found = (matrix_call(self.tape, self.tape.calls[c]) for c in sorted(set(self.users(x))))
        return [m for m in found if m is not None and m.x == x]

    # --- questions about the whole network ----------------------------------------------------------------------------

    def weight_calls(self) -> frozenset[int]:
        """Calls on parameters and constants whose result serves as a weight or bias of one of ``LAYERS``. They are
        parameter expressions, although the tape has found another tensor among their arguments."""
        calls = [self.tape.calls[c] for c in self.useful]
        found = (
            self._calls_behind([a.id for a in (*call.args[1:], *call.kwargs.values()) if isinstance(a, Value)])
            for call in calls
            if call.fn in LAYERS
        )
        return frozenset().union(*found)

    def _calls_behind(self, values: list[int]) -> set[int]:
        """The sites' calls that make the values from parameters and constants; none if one of ``LAYERS`` takes part: a
        network of its own makes the weight."""
        tape, stack = self.tape, values
        found: set[int] = set()
        while stack:
            producer = tape.producer.get(v) if (v := stack.pop()) in self.active else None
            if producer is None:
                continue
            call = tape.calls[producer]
            if call.fn in LAYERS:
                return set()
            if tape.kinds[producer] is Kind.SITE and self.active.isdisjoint(call.inputs):
                found.add(producer)
            stack += call.inputs
        return found

    def routes_by_data(self) -> bool:
        """Whether the network picks rows by indices computed as it runs (sorting, gathers, experts). Their order may
        differ from step to step at the same shapes."""
        tape = self.tape
        plain = (tape.calls[c] for c in self.useful - self.loss if tape.kinds[c] is Kind.PLAIN)
        return any(picks_rows(tape, call) and not self.active.isdisjoint(call.inputs) for call in plain)

    def coupled_by_batch_norm(self) -> set[int]:
        """Values upstream of a batch norm in training mode: its statistics make the examples interact."""
        calls = (self.tape.calls[c] for c in self.useful - self.loss)
        return self.upstream(v for call in calls if normalises_batch(call) for v in call.inputs)

    def cost(self) -> float:
        """Matrix products of a step in units of a forward pass: the forward, the tangents, the parameter gradients."""
        tape, forward, tangents, gradients = self.tape, 0.0, 0.0, 0.0
        for call, kind in zip(tape.calls, tape.kinds, strict=True):
            if (m := matrix_call(tape, call)) is None:
                continue
            rows = tape.shapes[m.weight]
            work = numel(tape.shapes[call.outputs[0]]) * numel(rows) / rows[0]
            forward += work
            tangents += work if m.x in self.active else 0.0
            gradients += work if kind is Kind.SITE else 0.0
        return (forward + tangents + gradients) / forward if forward else 1.0
