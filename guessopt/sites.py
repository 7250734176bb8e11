"""Plain data: the calls of a closure, and the places where parameters meet activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from guessopt.layout import Layout, Shape

if TYPE_CHECKING:
    from guessopt.ops.base import Rule
    from guessopt.ops.matrix import MatrixRule


def name_of(fn: Callable[..., Any]) -> str:
    """An operation's name, as a user would write it: ``mul`` of ``Tensor.__mul__``."""
    return str(getattr(fn, "__name__", fn)).strip("_")


@dataclass(frozen=True)
class Value:
    """A tensor of the closure, by the order in which it was first seen."""

    id: int


@dataclass(frozen=True)
class Call:
    """One torch call of the closure: ``args`` and ``kwargs`` hold ``Value`` in place of tensors.

    Values are numbers; a write to a tensor's memory gives the tensor a new one.

    Attributes:
        inputs: the values that the call reads, tensor by tensor.
        reads: ``inputs``, with ``~v`` for a value that no call of the closure has made and none has read before.
        outputs: the values of its ``direct`` results, then the new values of other tensors in whose memory it wrote.
        target: position of the tensor that it wrote and returned; None if there is none.
        aliases: whether it wrote into memory that other tensors share.
        moves: (old value, new value) of tensors that it changed and did not return.
        held: the pairs (old, new) of changed values whose derivative stays as it was (a write under ``no_grad``).
        sources: the values from which derivatives reach its results or the tensors that it changed.
        stopped: whether it was called without gradients.
        writes: positions of the tensors that it writes and that the closure did not make.
        hidden: tensors that it writes, that the closure did not make, and that are not among its arguments.
        autocast: device type and dtype of the autocast in force; None without autocast.
        outline: see ``tracing.interceptor.split``.
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
    direct: int = 1
    target: int | None = None
    moves: tuple[tuple[int, int], ...] = ()
    held: tuple[tuple[int, int], ...] = ()
    sources: tuple[int, ...] = ()
    stopped: bool = False
    writes: tuple[int, ...] = ()
    hidden: tuple[Tensor, ...] = ()

    def renew(self, args: tuple[Any, ...], kwargs: dict[str, Any], outline: list[Any]) -> None:
        """Replace the recorded arguments, of which some numbers have changed."""
        for name, new in (("args", args), ("kwargs", kwargs), ("outline", outline)):
            object.__setattr__(self, name, new)

    @property
    def op(self) -> str:
        """The operation's name, as a user would write it."""
        return name_of(self.fn)


@dataclass(frozen=True)
class Matrix:
    """A matrix site's side of W~: one or more parallel linear layers or convolutions that read the same input.

    ``weights`` are the values that hold the weights; ``call`` gives stride, padding and the like.
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
        """The first weight's own shape (stacked ones differ from it in the number of outputs only)."""
        return self.weight_shapes[0]


@dataclass(frozen=True)
class DownstreamPath:
    """From a site's output through the next ``l`` matrix sites, to the ``goals``: the input of the matrix site after
    them or, where none follows, their outputs. ``program`` lists the calls, in order."""

    goals: tuple[int, ...]
    shapes: tuple[Shape, ...]
    program: tuple[Call, ...]


@dataclass(frozen=True)
class Segment:
    """From a site's output to the input of the next matrix site(s).

    ``elementwise`` lists the unary calls of the path where it is nothing else; otherwise ``program`` lists, in order,
    the calls that lead from the site's output to the ``matrices``' inputs. ``weight_program`` computes the weights that
    are expressions of parameters. ``fused``: ``(u, s, spent) -> M u`` in one kernel, for a well-known
    activation (``spent``: in ``u``'s memory). ``rectified``: the path is a rectifier and no more, whose derivative can
    be told from what it made.
    ``onward`` leads further, through l = 1, 2, ... matrix sites; fewer where the network ends.
    """

    source: int
    matrices: tuple[Matrix, ...]
    elementwise: tuple[Call, ...] | None
    program: tuple[Call, ...]
    weight_program: tuple[Call, ...] = ()
    fused: Callable[[Tensor, Tensor, bool], Tensor] | None = None
    rectified: bool = False
    onward: tuple[DownstreamPath, ...] = ()

    @cached_property
    def needs(self) -> frozenset[int]:
        """Values that the programs and the matrices read and do not make."""
        calls = (*self.program, *self.weight_program)
        made = {self.source, *(v for call in calls for v in call.outputs)}
        read = {v for call in calls for v in call.inputs} | {w for matrix in self.matrices for w in matrix.weights}
        return frozenset(read - made)

    @property
    def key(self) -> str:
        """Names the next matrix site(s) across traces of the same model."""
        return " | ".join(matrix.key for matrix in self.matrices)


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
    """One output of one call that consumes trainable parameters.

    ``params``: positions, in the optimizer's order, of the parameters that the call reads (through views and casts).
    ``shares``: the index of the site whose cotangent this one shares (a bias added right after a matrix product).
    ``cut``: the loss reads this output (or that of the site sharing it) directly, so its error is known exactly.
    ``overwritten``: a later call writes into the output's memory, and so into its tangent's.
    ``reach``: the part of the output that the parameters reach, if not all of it. ``by_parameter``: so few
    parameters stand against so large an output that each example's own parameters are guessed
    instead (a norm's scale). ``kept``: bytes of inputs and guess that one pass keeps for it.
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

    @property
    def op(self) -> str:
        return self.call.op

    @property
    def is_last(self) -> bool:
        """No matrix site follows: nothing is known of the cotangent before the loss."""
        return self.segment is None

    @property
    def rank(self) -> int:
        """The largest useful ``k`` for a truncated basis at this site (0 for a last site)."""
        return 0 if self.segment is None else max(m.rule.rank(m) for m in self.segment.matrices)


@dataclass(frozen=True)
class ParallelSites:
    """Parallel linear layers that read one input and whose outputs meet before the same next matrix site(s): queries,
    keys and values, a gate and what it gates.

    ``sites``: their indices, in the order of the calls; ``values``: their outputs. ``others``: the calls that compute
    the outputs after the first; ``program``: those that lead from all of them to the next matrix site's input."""

    sites: tuple[int, ...]
    values: tuple[int, ...]
    others: tuple[Call, ...]
    program: tuple[Call, ...]
