"""Results of one run of the closure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from guessopt.credit import Credit
from guessopt.sites import Call


@dataclass(slots=True)
class Guess:
    """What a run is told at a site. One of ``y``, ``directions`` and ``cotangents`` is given.

    Attributes:
        y: the guess for the site's output, of its shape; K guesses ``[K, *shape]``.
        corrected: with ``debias``, what takes the place of ``y`` in ``g^ = D y``.
        directions: guesses for the site's parameters, ``[N, *shape]`` each; K guesses ``[K, N, *shape]``.
        cotangents: in the second run of an estimator that learns: the cotangents known now, by site index.
    """

    y: Tensor | None = None
    corrected: Tensor | None = None
    directions: list[Tensor] | None = None
    cotangents: dict[int, Tensor | None] | None = None


@dataclass
class SavedCall:
    """A site's call in a run, kept for its parameter gradients.

    Attributes:
        call: as recorded.
        args, kwargs: its arguments, without tangents.
        wanted: positions of the trainable ones among their tensors.
        variables: these tensors.
        random: the random state before the call, if it draws.
        autocast: device type and dtype of the autocast in force; None without autocast.
        directions: guesses for the parameters themselves, ``[N, *shape]`` each; None where the output has the guess.
    """

    call: Call
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    wanted: list[int]
    variables: list[Tensor]
    random: Any = None
    autocast: tuple[str, torch.dtype] | None = None
    directions: list[Tensor] | None = None


class GraphInput(NamedTuple):
    """An input of a reverse graph, to which it may be pulled back. The tensor itself is not kept."""

    edge: GradientEdge
    shape: torch.Size
    dtype: torch.dtype

    @staticmethod
    def of(t: Tensor) -> GraphInput:
        return GraphInput(get_gradient_edge(t), t.shape, t.dtype)


@dataclass
class Graphs:
    """Reverse graphs of a residual chain's blocks, by value.

    Attributes:
        goals: their outputs: the states and the cuts.
        marks: inputs inside blocks.
        sources: their first inputs: the states as the next block reads them.
    """

    goals: dict[int, Tensor] = field(default_factory=dict)
    marks: dict[int, GraphInput] = field(default_factory=dict)
    sources: dict[int, GraphInput] = field(default_factory=dict)


@dataclass
class ForwardRecord:
    """Results of one forward-mode pass.

    A pass with K guesses puts K in front of the shapes of ``d``, ``tangents``, ``guesses``, ``params`` and the saved
    calls' ``directions``.

    Attributes:
        loss: scalar.
        d: ``D_n``, ``[N]``; their sum ``[1]`` where examples cannot be told apart.
        each: ``l'[n, t]``, ``[N, T]``: the derivative of each position's loss; None without positions.
        credit: ``D[n, t]`` for the sites with positions; None where every site takes ``D_n``.
        errors: the exact ``dL/dv`` of every cut.
        tangents: ``v'`` of every cut; None where no tangent arrives.
        guesses: ``y`` by site index.
        saved_calls: of the sites, in order.
        exact: gradients of the parameters that the loss reads itself, by position.
        params: the guesses made for parameters, by position.
        contexts: the surroundings of sites whose estimator forms the cotangent itself, by site index.
        values: the tensors that the graph watches, by value.
        states: tangents of the residual chain's states, by value.
        noise: where the guesses' stream of random numbers stood before the pass.
        learning_steps: of the estimators that learn.
        graphs: of the chain's blocks; None where they are not kept.
        block_calls: saved calls whose gradients come from the blocks' graphs, by call index.
        gradients: (variable, gradient) pairs that the blocks' graphs have given.
        random: the random states before calls of blocks that draw and that run once more, by call index.
    """

    loss: Tensor
    d: Tensor
    errors: list[Tensor]
    tangents: list[Tensor | None]
    guesses: dict[int, Tensor]
    saved_calls: list[SavedCall]
    exact: dict[int, Tensor]
    params: dict[int, Tensor]
    contexts: dict[int, Any] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)
    noise: Any = None
    learning_steps: dict[Any, Any] = field(default_factory=dict)
    graphs: Graphs | None = None
    block_calls: dict[int, SavedCall] = field(default_factory=dict)
    gradients: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    random: dict[int, Any] = field(default_factory=dict)
    each: Tensor | None = None
    credit: Credit | None = None

    @property
    def count(self) -> int:
        """K, the guesses that shared the pass."""
        return len(self.d) if self.d.dim() == 2 else 1
