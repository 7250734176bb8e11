"""``LossCalls``: the calls of the loss, in reverse mode. They read leaves in place of the network's values at the cuts,
and the gradients of the leaves are the exact errors ``dL/dv``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from guessopt.engine.following import GraphMismatch
from guessopt.engine.jvp.base import JvpEngine
from guessopt.engine.op_call import OpCall
from guessopt.engine.replacements import put
from guessopt.graph import SiteGraph
from guessopt.tracing.functions import AS_IT_IS


class LossCalls:
    """The calls of one run.

    Attributes:
        leaves: by cut, the leaf.
        standins: by value, the tensor that the loss reads in place of the network's.
    """

    def __init__(self, graph: SiteGraph, engine: JvpEngine) -> None:
        self.graph, self.engine = graph, engine
        self.leaves: dict[int, Tensor] = {}
        self.standins: dict[int, Tensor] = {}

    def call(self, op: OpCall, no_grad: AbstractContextManager[Any]) -> Any:
        """Run an operation of the loss. ``no_grad``: the mode in which the network's values are handled."""
        graph, swapped = self.graph, dict[int, Tensor]()
        for t, value in zip(op.tensors, op.call.inputs, strict=True):
            if value in graph.cut_of and value not in self.standins:
                self.standins[value] = self._cut(graph.cut_of[value], t, op.index, no_grad)
            if value in self.standins:
                swapped[id(t)] = self.standins[value]
        if not swapped:
            return self.engine.without_tangent(op.fn, op.args, op.kwargs)
        target = op.tensors[0]
        written = op.call.in_place and id(target) in swapped
        out = self.engine.without_tangent(op.fn, *op.arguments(lambda t: swapped.get(id(t), t)))
        if written:
            self.standins[op.call.outputs[0]] = result = swapped[id(target)]
            self._write_back(target, result)
            out = put(out, result, target)  # the closure may go on to use its own tensor
        return out

    def end(self, loss: Tensor, no_grad: AbstractContextManager[Any]) -> Tensor:
        """The closure has returned ``loss``: the same as a function of the leaves."""
        returned = self.graph.returned
        if returned in self.graph.cut_of:
            loss = self._cut(self.graph.cut_of[returned], loss, len(self.graph.calls) - 1, no_grad)
        return self.engine.plain(self.standins.get(returned, loss))

    def gradients(
        self, loss: Tensor, params: Mapping[int, Tensor], keeps_graph: bool
    ) -> tuple[list[Tensor], dict[int, Tensor]]:
        """The exact error at each cut, and the gradients of the parameters that the loss reads itself, by position."""
        leaves = [self.leaves[number] for number in range(len(self.graph.cuts))]
        own = [p for p in sorted(self.graph.loss_params) if p in params]
        variables = [*leaves, *(params[p] for p in own)]
        found: list[Tensor | None] = []
        if variables:
            found = list(torch.autograd.grad(loss, variables, allow_unused=True, retain_graph=keeps_graph))
        errors = [torch.zeros_like(v) if e is None else e for v, e in zip(leaves, found, strict=False)]
        return errors, {p: e for p, e in zip(own, found[len(leaves) :], strict=True) if e is not None}

    def release(self) -> None:
        """Let go of the tensors, once the gradients are known."""
        self.leaves.clear()
        self.standins.clear()

    def _cut(self, number: int, t: Tensor, index: int, no_grad: AbstractContextManager[Any]) -> Tensor:
        """End the network at ``t``. Returns the tensor that the loss reads."""
        cut = self.graph.cuts[number]
        if t.shape != cut.shape:
            raise GraphMismatch(index, f"the loss reads shape {list(t.shape)} in place of {list(cut.shape)}")
        with AS_IT_IS if self.engine.reverses else no_grad:
            if cut.overwritten_later:
                t = self.engine.call(Tensor.clone, (t,), {}, writes=False)
            used, self.leaves[number] = self.engine.cut(number, t)
        return used.clone() if self.graph.loss_writes else used

    def _write_back(self, target: Tensor, result: Tensor) -> None:
        """The loss has written into a value of the network: write the result into the tensor that the user holds."""
        with torch.no_grad(), self.engine.outside():
            self.engine.primal(target).copy_(self.engine.primal(result))
