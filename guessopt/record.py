"""What one run of the closure leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from guessopt.sites import Call


@dataclass
class SavedCall:
    """A site's call in a run: its arguments without tangents, which of their tensors are trainable,
    and the random state before it if it draws."""

    call: Call
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    wanted: list[int]
    variables: list[Tensor]
    random: Any = None
    autocast: tuple[str, torch.dtype] | None = None
    directions: list[Tensor] | None = None


class GraphInput(NamedTuple):
    """Where a reverse graph may be pulled back to, without the tensor that was there."""

    edge: GradientEdge
    shape: torch.Size
    dtype: torch.dtype

    @staticmethod
    def of(t: Tensor) -> GraphInput:
        return GraphInput(get_gradient_edge(t), t.shape, t.dtype)


@dataclass
class Graphs:
    """Reverse graphs of a stream's blocks as a pass has left them, by value: from ``goals``, the states and the cuts,
    back to ``marks`` inside, and to ``sources``, the states as the next block reads them."""

    goals: dict[int, Tensor] = field(default_factory=dict)
    marks: dict[int, GraphInput] = field(default_factory=dict)
    sources: dict[int, GraphInput] = field(default_factory=dict)


@dataclass
class ForwardRecord:
    """What one forward-mode pass leaves behind.

    ``loss``: scalar. ``d``: ``D_n``, ``[N]``, or their sum ``[1]`` where examples cannot be told apart. ``errors``: the
    exact ``dL/dv`` of every cut. ``guesses``: ``y`` by site index. ``exact``: gradients of the parameters that the loss
    reads itself, by position. ``params``: the guesses made for parameters, by position. ``contexts``: by site, the
    surroundings of sites whose estimator forms the cotangent itself. ``noise``: where the guesses' stream stood before.
    ``values``: what the graph has kept aside; ``states``: tangents of the residual stream's states, by value.
    ``learning_steps``: of the estimators that learn. ``graphs``: of the stream's blocks, where they are kept.
    ``direct``: by call, the visits of those whose ``gradients`` (with the variables that they are of) the blocks'
    graphs give. ``random``: the random states before calls of blocks that draw, where these are to be run once more.
    A pass with K guesses puts K in front of the shapes of ``d``, ``tangents``, ``guesses``, ``params`` and the visits'
    ``directions``.
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
    direct: dict[int, SavedCall] = field(default_factory=dict)
    gradients: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    random: dict[int, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """K, the guesses that shared the pass."""
        return len(self.d) if self.d.dim() == 2 else 1
