"""Plain data: the calls of a closure, and the sites, where parameters meet activations."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from guessopt.layout import Layout, Shape

#: Matrix sites that ``Segment.onward`` passes at most.
MAX_DOWNSTREAM_SITES = 4


def label(fn: Any) -> str:
    """A function's name as Python has it: ``__mul__``."""
    return str(getattr(fn, "__name__", fn))


def name_of(fn: Callable[..., Any]) -> str:
    """An operation's name, as a user would write it: ``mul`` of ``Tensor.__mul__``."""
    return label(fn).strip("_")


@dataclass(frozen=True)
class Value:
    """A tensor of the closure, by the order in which it was first seen."""

    id: int


@dataclass
class Call:
    """One torch call of the closure.

    Values are numbers. A write to a tensor's memory gives the tensor a new value.

    Attributes:
        index: the call's number in the closure, from 0.
        fn, args, kwargs: the call, with a ``Value`` in place of each tensor.
        inputs: the values that the call reads, tensor by tensor.
        reads: ``inputs``, with ``~v`` for a value that no call of the closure has made and none has read before.
        outputs: the values of its results, then the new values of other tensors in whose memory it wrote.
        result_count: how many tensors it returned.
        in_place: whether it wrote into one of its tensors.
        target: position of the tensor that it wrote and returned; None if there is none.
        aliases: whether it wrote into memory that other tensors share.
        moves: (old value, new value) of tensors that it changed and did not return.
        held: (old value, new value) of changed tensors whose derivative stays as it was (a write under ``no_grad``).
        sources: the values from which derivatives reach its results or the tensors that it changed.
        stopped: whether it was called without gradients.
        writes: positions of the tensors that it writes and that the closure did not make.
        hidden: tensors that it writes, that the closure did not make, and that are not among its arguments.
        autocast: device type and dtype of the autocast in force; None without autocast.
        outline: of the arguments; see ``tree.split``.
    """

    index: int
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    in_place: bool = False
    aliases: bool = False
    autocast: tuple[str, torch.dtype] | None = None
    reads: tuple[int, ...] = ()
    outline: list[Any] = field(default_factory=list)
    result_count: int = 1
    target: int | None = None
    moves: tuple[tuple[int, int], ...] = ()
    held: tuple[tuple[int, int], ...] = ()
    sources: tuple[int, ...] = ()
    stopped: bool = False
    writes: tuple[int, ...] = ()
    hidden: tuple[Tensor, ...] = ()

    def renew(self, args: tuple[Any, ...], kwargs: dict[str, Any], outline: list[Any]) -> None:
        """Replace the recorded arguments, of which some numbers have changed."""
        self.args, self.kwargs, self.outline = args, kwargs, outline

    @property
    def op(self) -> str:
        """The operation's name, as a user would write it."""
        return name_of(self.fn)


class Rule(Protocol):
    """What a site needs of its operation. See ``ops.base.Rule`` for the arguments."""

    @property
    def channels_second(self) -> bool:
        """Whether the weight lies along dimension 1 of the output."""

    @property
    def has_parameter_tangent(self) -> bool:
        """Whether ``parameter_tangent`` is there."""

    def gradients(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: int,
        wanted: list[int],
        g: Tensor,
    ) -> list[Tensor | None]:
        """Gradients of ``<output, g>`` with respect to some of the operation's tensors."""

    def parameter_tangent(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        wanted: list[int],
        vs: list[Tensor],
        place: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The output's tangent when each example's own copy of the parameters moves along ``vs``."""


class MatrixRule(Protocol):
    """What a ``Matrix`` needs of its operation, a linear layer or a convolution. ``b`` block, ``o`` output row, ``i``
    input column, ``r`` rows in place of W."""

    def matrix(self, matrix: Matrix, weight: Tensor) -> Tensor:
        """The weight as ``[b, o, i]``."""

    def cotangent_shape(self, matrix: Matrix, rows: Tensor, x_shape: Shape) -> Shape:
        """The shape of the output that ``rows`` ``[b, r, i]`` in place of W would give."""

    def transpose(self, matrix: Matrix, rows: Tensor, e: Tensor, x_shape: Shape) -> Tensor:
        """``rows^T e``, of shape ``x_shape``."""

    def apply(self, matrix: Matrix, rows: Tensor, x: Tensor) -> Tensor:
        """``rows x``: the operation with ``rows`` in place of W, without bias."""

    def rank(self, matrix: Matrix) -> int:
        """The smaller side of the (stacked) weight."""

    def geometry(self, call: Any) -> str:
        """Equal for calls whose weights may be stacked."""


def values_needed(calls: Iterable[Call], goals: Iterable[int] = ()) -> set[int]:
    """The values that the calls read, and the goals, without the values that the calls make."""
    calls = tuple(calls)
    return {v for call in calls for v in call.inputs}.union(goals) - {o for call in calls for o in call.outputs}


@dataclass(frozen=True)
class Matrix:
    """The next matrix site of a segment: linear layers or convolutions that read one input and whose weights can be
    stacked.

    Attributes:
        rule: of the operation.
        call: the first of the calls; stride, padding and the like are the same in all.
        weights: the values that hold the weights.
        weight_shapes: their shapes.
        x, x_shape: the value and the shape of the input.
        key: names the weights across traces of one model.
    """

    rule: MatrixRule
    call: Call
    weights: tuple[int, ...]
    weight_shapes: tuple[Shape, ...]
    x: int
    x_shape: Shape
    key: str

    @property
    def weight_shape(self) -> Shape:
        """The first weight's shape. Stacked weights differ from it in the number of outputs only."""
        return self.weight_shapes[0]


@dataclass(frozen=True)
class DownstreamPath:
    """The way from a site's output through the next ``l`` matrix sites.

    Attributes:
        goals: the input of the matrix site that follows; the outputs of the last matrix site(s) where none follows.
        shapes: of the goals.
        program: the calls, in order.
    """

    goals: tuple[int, ...]
    shapes: tuple[Shape, ...]
    program: tuple[Call, ...]


@dataclass(frozen=True)
class Segment:
    """The way from a site's output to the input of the next matrix site(s).

    Attributes:
        source: the site's value.
        matrices: the next matrix site(s).
        elementwise: the calls of the way if all are unary and elementwise; None otherwise.
        program: the calls of any other way, in order.
        weight_program: the calls that compute weights which are expressions of parameters.
        fused: ``(u, s, spent) -> M u`` in one kernel, for a well-known activation; in ``u``'s memory if ``spent``.
        rectified: whether the way is a ReLU and no more. Its output tells its derivative.
        onward: the ways through l = 1, 2, ... matrix sites; fewer where the network ends.
    """

    source: int
    matrices: tuple[Matrix, ...]
    elementwise: tuple[Call, ...] | None
    program: tuple[Call, ...]
    weight_program: tuple[Call, ...] = ()
    fused: Callable[[Tensor, Tensor, bool], Tensor] | None = None
    rectified: bool = False
    onward: tuple[DownstreamPath, ...] = ()

    @property
    def weights(self) -> tuple[int, ...]:
        """The values that hold the weights of the next matrix site(s)."""
        return tuple(w for matrix in self.matrices for w in matrix.weights)

    @cached_property
    def needs(self) -> frozenset[int]:
        """Values that the programs and the matrices read and do not make."""
        return frozenset(values_needed((*self.program, *self.weight_program), self.weights) - {self.source})

    @property
    def key(self) -> str:
        """Names the next matrix site(s) across traces of one model."""
        return " | ".join(matrix.key for matrix in self.matrices)


class Influence(enum.Enum):
    """Which positions of the loss position t of a site moves."""

    OWN = "position t"
    LATER = "positions from t on"
    ALL = "all positions"


@dataclass(frozen=True)
class OutputSpan:
    """The part of an output that parameters reach: spans along one dimension (a prompt joined to the tokens).

    >>> OutputSpan(0, ((1, 2),)).restrict(torch.ones(3))
    tensor([0., 1., 0.])
    """

    dim: int
    spans: tuple[tuple[int, int], ...]

    def restrict(self, y: Tensor) -> Tensor:
        """``y`` within the spans, zero elsewhere."""
        kept = torch.zeros_like(y)
        for start, stop in self.spans:
            kept.narrow(self.dim, start, stop - start).copy_(y.narrow(self.dim, start, stop - start))
        return kept


@dataclass(frozen=True)
class Site:
    """One output of one call that reads trainable parameters.

    Attributes:
        index: the site's number, in the order of the calls.
        call, output, value: the call, the position of the output among its results, and the output's value.
        rule: of the operation.
        params: positions, in the optimizer's order, of the parameters that the call reads (through views and casts).
        shape, dtype, layout: of the output.
        segment: the way to the next matrix site(s); None where none follows or the way cannot be run by itself.
        shares: index of the site whose cotangent this one shares (a bias added right after a matrix product).
        cut: number of the cut that this output is (or the output of the site that it shares with). The loss reads it
            directly, so its error is known exactly.
        overwritten: whether a later call writes into the output's memory, and so into its tangent's.
        kept: bytes of inputs and guess that one run keeps for the site.
        by_parameter: whether each example's own parameters are guessed instead of the output, which is far larger (a
            norm's scale).
        reach: the part of the output that the parameters reach; None: all of it.
        direction_shapes: shapes ``[N, *shape]`` of such guesses, one for each parameter.
        position_dim: the dimension of a row (``Layout.row_shape``) that holds the loss's T positions; None if no
            dimension does, or if positions were not searched for.
        influence: the positions of the loss that one position of the output moves.
    """

    index: int
    call: Call
    output: int
    value: int
    rule: Rule
    params: tuple[int, ...]
    shape: Shape
    dtype: torch.dtype
    layout: Layout = Layout.COUPLED
    segment: Segment | None = None
    shares: int | None = None
    cut: int | None = None
    overwritten: bool = False
    kept: int = 0
    by_parameter: bool = False
    reach: OutputSpan | None = None
    direction_shapes: tuple[Shape, ...] = ()
    position_dim: int | None = None
    influence: Influence = Influence.ALL

    @property
    def op(self) -> str:
        return self.call.op

    @property
    def is_last(self) -> bool:
        """Whether no segment leads on: before the loss, nothing is known of the cotangent."""
        return self.segment is None

    @property
    def rank(self) -> int:
        """The largest useful ``k`` for a truncated basis at this site (0 for a last site)."""
        return 0 if self.segment is None else max(m.rule.rank(m) for m in self.segment.matrices)


@dataclass(frozen=True)
class ParallelSites:
    """Parallel linear layers that read one input and whose outputs meet before one next matrix site: queries, keys and
    values; a gate and the layer that it gates.

    Attributes:
        sites: their indices, in the order of the calls.
        values: their outputs.
        others: the calls that compute the outputs after the first.
        program: the calls from all outputs to the next matrix site's input.
    """

    sites: tuple[int, ...]
    values: tuple[int, ...]
    others: tuple[Call, ...]
    program: tuple[Call, ...]
