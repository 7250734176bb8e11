"""The blocks of a residual stream in one step: their reverse graphs, and the Jacobians of their skips."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from guessopt.chains import Block
from guessopt.graph import SiteGraph
from guessopt.ops.reverse import push
from guessopt.record import ForwardRecord
from guessopt.sites import Call
from guessopt.tracing.subgraph import Subgraph, evaluate


class BlockGraphs:
    """Runs blocks again, or takes over the graphs that the pass has kept. A block run again draws the pass's numbers.

    Args:
        served: indices of the sites whose cotangents are wanted.
        record: of the pass.
    """

    def __init__(self, graph: SiteGraph, record: ForwardRecord, served: set[int]) -> None:
        self.graph, self.record, self.served = graph, record, served
        self._dtype = next((saved.autocast for saved in record.saved_calls if saved.autocast), None)

    def outputs(self, block: Block) -> dict[int, int]:
        """The outputs of the block's sites whose cotangents are wanted, by site index."""
        sites, direct = self.graph.sites, self.record.block_calls
        return {i: sites[i].value for i in block.sites if i in self.served and sites[i].call.index not in direct}

    def parameters(self, block: Block) -> dict[int, Tensor]:
        """The parameters whose gradients the block's graph gives, by value."""
        saved_calls = (
            self.record.block_calls[call.index] for call in block.program if call.index in self.record.block_calls
        )
        return {
            saved.call.inputs[k]: variable
            for saved in saved_calls
            for k, variable in zip(saved.wanted, saved.variables, strict=True)
        }

    def subgraph(
        self, block: Block, inputs: list[int], outputs: dict[int, int], parameters: dict[int, Tensor]
    ) -> Subgraph:
        """The block with a reverse graph, which leads to the given values."""
        if self.record.graphs is not None:
            return Subgraph.kept(self.record.graphs, block, outputs.values(), parameters)
        return self._again(block.program, [*inputs, *outputs.values(), *parameters])

    def pull_back_skip(self, block: Block, run: Subgraph | None) -> Callable[[Tensor], Tensor]:
        """``c -> S^T c``; ``run``: the block's subgraph, if there is one."""
        if block.skip is None:
            assert block.source is not None
            zeros = torch.zeros_like(self.record.values[block.source])
            return lambda c: zeros
        if not block.skip:
            return lambda c: c
        assert block.origin is not None
        goals, origin = block.goals, block.origin
        if run is None or not block.ends_in_skip or origin not in run.inputs:
            run = self._again(block.skip, [origin])
        pull_back = run.pull_back
        return lambda c: pull_back(goals, [c], [origin])[0]

    def push_skip(self, block: Block, t: Tensor) -> Tensor:
        """``S t``."""
        if not block.skip:
            return t
        origin, calls, values, random = block.origin, block.skip, self.record.values, self.record.random
        assert origin is not None

        def run(h: Tensor) -> tuple[Tensor, ...]:
            return (evaluate(calls, {**values, origin: h}, random=random)[block.goals[0]],)

        with self._autocast():
            return push(run, [values[origin]], [t])[0]

    def _again(self, calls: tuple[Call, ...], ends: list[int]) -> Subgraph:
        with self._autocast():
            return Subgraph.again(calls, self.record.values, ends, self.record.random)

    def _autocast(self) -> AbstractContextManager[Any]:
        """The autocast of the pass."""
        return torch.autocast(*self._dtype) if self._dtype else nullcontext()
