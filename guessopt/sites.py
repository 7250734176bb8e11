"""Plain data: where parameters meet activations, and how examples lie in a tensor.

Index letters: n example, N batch size, T everything else that was flattened with the batch (tokens, positions).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

if TYPE_CHECKING:
    from guessopt.rules.base import MatrixRule, Rule

Shape = tuple[int, ...]
T = TypeVar("T")


def name_of(fn: Callable[..., Any]) -> str:
    """An operation's name, as a user would write it: ``mul`` of ``Tensor.__mul__``."""
    return str(getattr(fn, "__name__", fn)).strip("_")


def is_differentiable(t: Tensor | torch.dtype) -> bool:
    """Whether a tensor (or one of this dtype) can carry a derivative: floating-point or complex.

    >>> is_differentiable(torch.complex64), is_differentiable(torch.ones(2)), is_differentiable(torch.int64)
    (True, True, False)
    """
    dtype = t if isinstance(t, torch.dtype) else t.dtype
    return dtype.is_floating_point or dtype.is_complex


class Layout(enum.Enum):
    """Where the N examples lie in a tensor.

    >>> Layout.FLAT_T.sum_examples(torch.arange(6.0)[:, None], 2)
    tensor([6., 9.])
    """

    BATCH_FIRST = "[N, ...]"
    BATCH_SECOND = "[T, N, ...]"
    FLAT = "[N*T, ...]"
    FLAT_T = "[T*N, ...]"
    COUPLED = "coupled"

    def fits(self, shape: Shape, n: int) -> bool:
        """Whether a tensor of this shape can hold ``n`` examples in this layout."""
        if self is Layout.BATCH_FIRST:
            return len(shape) > 0 and shape[0] == n
        if self is Layout.BATCH_SECOND:
            return len(shape) > 1 and shape[1] == n
        if self is Layout.COUPLED:
            return True
        return len(shape) > 0 and shape[0] > n and shape[0] % n == 0

    def sum_examples(self, t: Tensor, n: int) -> Tensor:
        """Sum everything but the examples: ``t`` (shape as laid out) to ``[N]``; coupled: to ``[1]``."""
        if self is Layout.BATCH_FIRST:
            return t.reshape(n, -1).sum(1)
        if self is Layout.BATCH_SECOND:
            return t.transpose(0, 1).reshape(n, -1).sum(1)
        if self is Layout.FLAT:
            return t.reshape(n, -1).sum(1)
        if self is Layout.FLAT_T:
            return t.reshape(t.shape[0] // n, n, -1).sum((0, 2))
        return t.sum().reshape(1)

    def spread(self, d: Tensor, shape: Shape) -> Tensor:
        """``d`` ``[N]``, one number an example, shaped to broadcast against ``shape``; coupled: their sum."""
        if self is Layout.COUPLED:
            return d.sum()
        if self is Layout.BATCH_SECOND:
            return d.reshape(1, -1, *(1,) * (len(shape) - 2))
        if self is Layout.FLAT:
            d = d.repeat_interleave(shape[0] // d.shape[0])
        elif self is Layout.FLAT_T:
            d = d.repeat(shape[0] // d.shape[0])
        return d.reshape(-1, *(1,) * (len(shape) - 1))

    def place(self, v: Tensor, shape: Shape) -> Tensor:
        """Per-example values ``[N, *p]`` laid out to broadcast against ``shape``, their ``p`` against its last
        dimensions; coupled: ``[1, *p]``."""
        if self in (Layout.FLAT, Layout.FLAT_T):
            times = shape[0] // v.shape[0]
            v = v.repeat_interleave(times, 0) if self is Layout.FLAT else v.repeat(times, *(1,) * (v.dim() - 1))
        inner = tuple(v.shape[1:])
        while len(inner) >= len(shape) and inner[0] == 1:
            inner = inner[1:]
        if self is Layout.COUPLED:
            return v.reshape(inner)
        lead = (1, v.shape[0]) if self is Layout.BATCH_SECOND else (v.shape[0],)
        return v.reshape(*lead, *(1,) * (len(shape) - len(lead) - len(inner)), *inner)

    @staticmethod
    def candidates(shape: Shape, n: int) -> tuple[Layout, ...]:
        """The layouts that a shape allows, likeliest first; ``COUPLED`` (always right, far noisier) is the last."""
        return tuple(layout for layout in Layout if layout.fits(shape, n))


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


@dataclass(frozen=True)
class Block:
    """A stretch of the network between two states of its residual stream.

    ``source``: the state before it (None: the network's input); ``goals``: the state after it, or the cuts;
    ``program``: the calls between; ``entries``: values made there from the input alone. ``skip``: the calls of a way
    through without a matrix site, or around others with one, from ``origin`` on (up to there it is the identity); None
    where there is no such way. ``matrices``: matrix sites on the longest way through. ``sites``: indices of the sites
    inside."""

    source: int | None
    goals: tuple[int, ...]
    program: tuple[Call, ...]
    entries: tuple[int, ...]
    skip: tuple[Call, ...] | None
    origin: int | None
    matrices: int
    sites: tuple[int, ...] = ()

    def needs(self) -> set[int]:
        """Values that the programs read and do not make."""
        found = {v for v in (self.source, self.origin, *self.entries) if v is not None}
        return found | _read(self.program) | _read(self.skip or ())

    @cached_property
    def ends_in_skip(self) -> bool:
        """Whether all that reads the skip's origin is the skip itself: what comes after an addition, say."""
        if not self.skip or self.origin == self.source:
            return False
        reached, calls = {self.origin}, {call.index for call in self.skip}
        for call in self.program:
            if reached.intersection(call.inputs):
                reached.update(call.outputs)
                if call.index not in calls:
                    return False
        return True


def _read(calls: tuple[Call, ...]) -> set[int]:
    """Values that the calls read and do not make."""
    made = {o for call in calls for o in call.outputs}
    return {v for call in calls for v in call.inputs if v not in made}


@dataclass(frozen=True)
class Stream:
    """A network as a chain of blocks, the head last; ``shapes``: of the states, by value; ``fragile``: values that
    later calls write into; ``drawing``: calls inside blocks that may draw random numbers."""

    blocks: tuple[Block, ...]
    shapes: dict[int, Shape]
    fragile: frozenset[int] = frozenset()
    drawing: frozenset[int] = frozenset()

    @cached_property
    def reverses(self) -> frozenset[int]:
        """The calls that the blocks' reverse graphs hold."""
        return frozenset(call.index for block in self.blocks for call in block.program)

    @cached_property
    def origins(self) -> frozenset[int]:
        """Where skips begin to which a block's graph can be pulled back, since nothing else reads these values."""
        return frozenset(block.origin for block in self.blocks if block.ends_in_skip and block.origin is not None)

    @cached_property
    def needs(self) -> frozenset[int]:
        """Values that are needed beside the blocks' graphs: the states, and what skips read that are run once more."""
        return frozenset(self.shapes).union(*map(_read, self._apart))

    @cached_property
    def redrawn(self) -> frozenset[int]:
        """Of the calls that draw, those that are run once more beside the blocks' graphs."""
        return self.drawing.intersection(call.index for skip in self._apart for call in skip)

    @property
    def _apart(self) -> list[tuple[Call, ...]]:
        """Skips to which no block's graph leads."""
        return [block.skip for block in self.blocks if block.skip and not block.ends_in_skip]


@dataclass(frozen=True)
class Cut:
    """A value where the network ends and the loss begins.

    Attributes:
        shared: whether the network reads the value too.
        fragile: whether a later call writes into its memory.
    """

    value: int
    shape: Shape
    layout: Layout = Layout.COUPLED
    shared: bool = False
    fragile: bool = False


@dataclass(frozen=True)
class Outside:
    """A tensor that the closure reads and does not make.

    Attributes:
        parameter: position of the trainable parameter that it is; None for other tensors.
        fixed: whether it is a layer's weight that does not train: another tensor in its place makes another network.
    """

    shape: Shape
    dtype: torch.dtype
    parameter: int | None = None
    fixed: bool = False


class Kind(enum.IntEnum):
    """The part that a call of the closure plays. ``IDLE``: tangents reach the call and do not go on to the loss (an
    accuracy, a log)."""

    PLAIN = 0
    EXPRESSION = 1
    SITE = 2
    LOSS = 3
    STOPPED = 4
    IDLE = 5


#: A call, its function, its kind, positions of the tensors to save before it; values (with their positions) to keep
#: before and after it, those of which the level takes note; values that are needed no longer after it.
Handling = tuple[
    Call,
    Callable[..., Any],
    Kind,
    "tuple[int, ...] | None",
    list[tuple[int, int]],
    list[tuple[int, int]],
    list[tuple[int, int]],
    tuple[int, ...],
]


@dataclass(frozen=True)
class SiteGraph:
    """All that a trace found: enough to run the closure again in one forward-mode pass.

    A run whose calls, arguments or dataflow differ is traced anew. Call number i is the closure's i-th torch call.

    Attributes:
        calls, kinds: the calls, and the kind of each.
        reads: by call, the positions (in the optimizer) of the parameters that it reads.
        mine: by call, the positions of these parameters among its tensors.
        outside: the tensors that the closure reads and does not make, by value.
        active: the values that derivatives reach.
        overwritten: the values into whose memory a later call writes.
        batch: N.
        watch: by call, the values that a run keeps for segments.
        release: by call, the kept values that nothing needs after it.
        constants: values that a site needs before the closure reads them, with the tensors of the last run.
        ahead: calls that segments make before the closure does.
        returned: the loss's value.
        loss_params: positions of the parameters that the loss itself reads.
        keeps_graph: whether the loss reads parameters through expressions (``W.t()``). Sites may read these too, so the
            loss's reverse pass must keep their graphs.
        blocked: by site, why it has no segment.
        answers: the answers to the closure's questions ``activation.requires_grad``, in order.
        shared_writes: operations of the network that write into memory which other tensors share.
        stream: the residual stream, if it was asked for and found.
        joints: groups of sites that may get one guess.
        mutations: by call, positions of the tensors that it writes and that the closure did not make.
        hidden: by call, such tensors that are not among its arguments.
        rewritten: positions of the trainable parameters that the closure writes itself.
    """

    calls: tuple[Call, ...]
    kinds: tuple[Kind, ...]
    reads: tuple[frozenset[int], ...]
    mine: tuple[tuple[int, ...], ...]
    outside: dict[int, Outside]
    active: frozenset[int]
    overwritten: frozenset[int]
    sites: tuple[Site, ...]
    cuts: tuple[Cut, ...]
    batch: int
    mutations: dict[int, tuple[int, ...]] = field(default_factory=dict)
    rewritten: frozenset[int] = frozenset()
    hidden: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    watch: dict[int, tuple[tuple[str, int, int], ...]] = field(default_factory=dict)
    release: dict[int, tuple[int, ...]] = field(default_factory=dict)
    constants: dict[int, Tensor] = field(default_factory=dict)
    ahead: frozenset[int] = frozenset()
    returned: int = -1
    loss_params: frozenset[int] = frozenset()
    keeps_graph: bool = False
    stopped_params: frozenset[int] = frozenset()
    blocked: dict[int, str] = field(default_factory=dict)
    answers: tuple[bool, ...] = ()
    cost: float = 0.0
    shared_writes: tuple[str, ...] = ()
    stream: Stream | None = None
    joints: tuple[ParallelSites, ...] = ()

    def __post_init__(self) -> None:
        at: dict[int, list[Site]] = {}
        for site in self.sites:
            at.setdefault(site.call.index, []).append(site)
        object.__setattr__(self, "sites_at", at)
        object.__setattr__(self, "early", frozenset(self.constants))
        object.__setattr__(self, "fragile", self._fragile(at))
        object.__setattr__(self, "cut_of", {cut.value: number for number, cut in enumerate(self.cuts)})
        object.__setattr__(
            self,
            "moving",
            tuple(tuple(k for k, v in enumerate(call.inputs) if v in self.active) for call in self.calls),
        )
        shared: dict[int, tuple[int, ...]] = {}
        for site in reversed(self.sites):
            end = site
            while end.shares is not None:
                end = self.sites[end.shares]
                shared[end.index] = (site.index, *shared.get(end.index, ()))
        object.__setattr__(self, "shared_by", shared)
        states = self.stream.shapes if self.stream is not None else {}
        noted = {c: tuple(e for e in entries if e[2] in states) for c, entries in self.watch.items()}
        object.__setattr__(self, "noted", {c: entries for c, entries in noted.items() if entries})

    def _fragile(self, calls: Iterable[int]) -> dict[int, tuple[int, ...]]:
        found = {}
        for c in calls:
            call = self.calls[c]
            own = {*self.mine[c], *call.writes}
            positions = tuple(k for k, v in enumerate(call.inputs) if v in self.overwritten and k not in own)
            if positions:
                found[c] = positions
        return found

    def forget(self) -> None:
        """Let go of the last batch's tensors; the parameters stay."""
        kept = {v: t for v, t in self.constants.items() if isinstance(t, torch.nn.Parameter)}
        self.constants.clear()
        self.constants.update(kept)

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The functions that the closure calls, in order."""
        return tuple(call.fn for call in self.calls)

    def derive(self, key: Any, make: Callable[[], T]) -> T:
        """What ``make`` works out from this graph, once for a key."""
        if key not in self.derived:
            self.derived[key] = make()
        found: T = self.derived[key]
        return found

    @cached_property
    def handling(self) -> tuple[Handling, ...]:
        """What every pass does at each call."""
        found = []
        for call, kind in zip(self.calls, self.kinds, strict=True):
            c = call.index
            entering, leaving = ([e[1:] for e in self.watch.get(c, ()) if e[0] == where] for where in ("in", "out"))
            noted = [entry[1:] for entry in self.noted.get(c, ())]
            found.append(
                (call, call.fn, kind, self.mutations.get(c), entering, leaving, noted, self.release.get(c, ()))
            )
        return tuple(found)

    @cached_property
    def direct(self) -> frozenset[int]:
        """The sites' calls that the reverse graphs of the stream's blocks hold."""
        return frozenset() if self.stream is None else self.stream.reverses.intersection(self.sites_at)

    @cached_property
    def marked(self) -> frozenset[int]:
        """Values to which these graphs may be pulled back inside a block: the skips' origins, and the outputs of the
        sites that no graph holds, since they read the network's input alone."""
        entries = (site.value for site in self.sites if site.call.index not in self.direct)
        return frozenset() if self.stream is None else self.stream.origins.union(entries)

    @cached_property
    def loss_writes(self) -> bool:
        """Whether a call of the loss writes in place: into a value of the network, perhaps through a view of it."""
        return any(call.in_place for call, kind in zip(self.calls, self.kinds, strict=True) if kind is Kind.LOSS)

    @cached_property
    def rectified(self) -> dict[int, tuple[tuple[int, int], ...]]:
        """By call: the sites of which it reads what a rectifier made, and as which of its arguments."""
        found: dict[int, tuple[tuple[int, int], ...]] = {}
        for site in self.sites:
            for m in site.segment.matrices if site.segment is not None and site.segment.rectified else ():
                if Value(m.x) in m.call.args:
                    entry = site.index, m.call.args.index(Value(m.x))
                    found[m.call.index] = (*found.get(m.call.index, ()), entry)
        return found

    #: The parameters that runs have met, by ``id``.
    known: dict[int, tuple[ref[Tensor], int]] = field(default_factory=dict, repr=False, compare=False)
    #: The tensors that the first pass of a step has met, for the second one.
    met: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)
    #: Functions found to have no forward derivative here; another dtype or other options may have one.
    without_forward: set[Callable[..., Any]] = field(default_factory=set, repr=False, compare=False)
    #: What others have worked out from this graph, to be kept as long as it is.
    derived: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    sites_at: dict[int, list[Site]] = field(init=False, repr=False, compare=False)
    #: The values of ``constants``, which are there until ``forget``.
    early: frozenset[int] = field(init=False, repr=False, compare=False)
    #: By call of a site, positions of the inputs into which the closure writes before the gradients are formed.
    fragile: dict[int, tuple[int, ...]] = field(init=False, repr=False, compare=False)
    cut_of: dict[int, int] = field(init=False, repr=False, compare=False)
    #: By call, which of its tensors derivatives reach.
    moving: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)
    shared_by: dict[int, tuple[int, ...]] = field(init=False, repr=False, compare=False)
    noted: dict[int, tuple[tuple[str, int, int], ...]] = field(init=False, repr=False, compare=False)


def numel(shape: Shape) -> int:
    """Entries of a tensor of this shape."""
    return math.prod(shape)


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
