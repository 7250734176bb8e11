"""Runs without tangents, behind the engines' interface.

| run | what it gives |
|---|---|
| ``PrimalRun`` | the closure's values once more |
| ``LossGradRun`` | the exact errors at the cuts, ``dL/dv`` |
| ``BlockVjpRun`` | the exact errors, and a reverse graph of every block of a residual chain |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from guessopt.chains import ResidualChain
from guessopt.engine.jvp.base import JvpEngine
from guessopt.engine.jvp.gaps import may_fuse
from guessopt.ops.base import op_of
from guessopt.ops.cached import CachedCall
from guessopt.record import GraphInput, Graphs

T = TypeVar("T")


class WithoutTangents(JvpEngine):
    """An engine that drops the guesses."""

    def run(self, body: Callable[[], T]) -> T:
        return body()

    def primal(self, t: Tensor) -> Tensor:
        return t.detach()

    def plain(self, t: Tensor) -> Tensor:
        return t

    def inject(self, s: Tensor, y: Tensor, in_place: bool) -> Tensor:
        return s

    def substitute(self, p: Tensor, v: Tensor) -> Tensor:
        return p


class LossGradRun(WithoutTangents):
    """No tangents, but the exact errors: for a step whose estimators learn and make no guess."""

    name = "plain"
    reuses = True

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, writes: bool) -> Any:
        if may_fuse(fn, args, kwargs):
            return fn(*args, **kwargs)
        return super().call(fn, args, kwargs, writes=writes)

    def reuse(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], known: CachedCall) -> Any:
        draws = op_of(fn).draws
        return NotImplemented if known.out is None or (draws is not None and draws(args, kwargs)) else known.out

    def through_backward(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.call(fn, args, kwargs, writes=False)


class PrimalRun(LossGradRun):
    """No tangents: guesses are dropped, and no error is computed."""

    def cut(self, number: int, v: Tensor) -> tuple[Tensor, Tensor]:
        return v, v


class BlockVjpRun(LossGradRun):
    """``LossGradRun`` that also keeps a reverse graph of every block of a residual chain, each from its block's input.

    Args:
        marked: values to which the graphs will be pulled back, beside their inputs and parameters.
    """

    graphs: Graphs

    def __init__(self, chain: ResidualChain, marked: frozenset[int], *, frozen_statistics: bool = False) -> None:
        super().__init__(frozen_statistics=frozen_statistics)
        self.reverses, self.needs, self.goals = chain.reverses, chain.needs, chain.blocks[-1].goals
        self.marked, self.graphs = marked, Graphs()

    def note(self, value: int, t: Tensor, clone: bool) -> Tensor:
        self.graphs.goals[value] = t
        leaf, t = _new_leaf(t, clone)
        self.graphs.sources[value] = GraphInput.of(leaf)
        return t

    def mark(self, value: int, t: Tensor, clone: bool) -> Tensor:
        if value not in self.marked:
            return t
        before, t = (t, t) if t.requires_grad else _new_leaf(t, clone)
        self.graphs.marks[value] = GraphInput.of(before)
        return t

    def cut(self, number: int, v: Tensor) -> tuple[Tensor, Tensor]:
        self.graphs.goals[self.goals[number]] = v
        return super().cut(number, v)


def _new_leaf(t: Tensor, clone: bool) -> tuple[Tensor, Tensor]:
    """The leaf at which a new reverse graph begins, and the tensor that the closure goes on with: a copy of the leaf if
    a later call writes into it."""
    with torch.enable_grad():
        leaf = t.detach().requires_grad_()
        return leaf, leaf.clone() if clone else leaf
