"""``SiteGraph``: the result of a trace of the closure."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar
from weakref import ref

import torch
from torch import Tensor

from guessopt.chains import ResidualChain
from guessopt.layout import Layout, Shape
from guessopt.sites import Call, Influence, ParallelSites, Site, Value

T = TypeVar("T")


@dataclass(frozen=True)
class Cut:
    """A value where the network ends and the loss begins.

    Attributes:
        shared: whether the network reads the value too.
        overwritten_later: whether a later call writes into its memory.
        position_dim: the dimension of a row that holds the loss's positions; see ``Site.position_dim``.
    """

    value: int
    shape: Shape
    layout: Layout = Layout.COUPLED
    shared: bool = False
    overwritten_later: bool = False
    position_dim: int | None = None


@dataclass(frozen=True)
class Positions:
    """Where the positions of the loss lie.

    Attributes:
        count: T.
        ends: the dimension of a row that holds the positions, by the value of a cut.
        dims: the same by the value of a site.
        influence: by the value of a site, the positions of the loss that one of its positions moves.
    """

    count: int
    ends: dict[int, int]
    dims: dict[int, int]
    influence: dict[int, Influence]

    def only(self, values: Iterable[int]) -> Positions:
        """The same with some of the sites."""
        return replace(self, dims={v: self.dims[v] for v in values})


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
    """The part that a call of the closure plays.

    | kind | the call |
    |---|---|
    | PLAIN | belongs to the network and reads no trainable parameter |
    | EXPRESSION | computes with parameters alone |
    | SITE | reads trainable parameters and an activation |
    | LOSS | belongs to the loss |
    | STOPPED | is made without gradients |
    | IDLE | is reached by tangents that do not go on to the loss (an accuracy, a log) |
    """

    PLAIN = 0
    EXPRESSION = 1
    SITE = 2
    LOSS = 3
    STOPPED = 4
    IDLE = 5


class Watched(NamedTuple):
    """A value that a run keeps: the ``position``-th tensor that a call takes (``where`` = "in") or returns ("out")."""

    where: str
    position: int
    value: int


class Handling(NamedTuple):
    """All that a run does at one call.

    Attributes:
        call, fn, kind: the call, its function, its part.
        mutations: positions of the tensors to save before the call; None: it writes nothing of the user's.
        entering: (position, value) of tensors to keep before the call.
        leaving: (position, value) of results to keep after it.
        noted: (position, value) of results that are states of the residual chain.
        release: kept values that nothing needs after it.
    """

    call: Call
    fn: Callable[..., Any]
    kind: Kind
    mutations: tuple[int, ...] | None
    entering: list[tuple[int, int]]
    leaving: list[tuple[int, int]]
    noted: list[tuple[int, int]]
    release: tuple[int, ...]


@dataclass(frozen=True)
class SiteGraph:
    """The result of a trace: enough to run the closure again in one forward-mode pass.

    A run whose calls, arguments or dataflow differ is traced anew. Call number i is the closure's i-th torch call.

    Attributes:
        calls, kinds: the calls, and the kind of each.
        reads: by call, the positions (in the optimizer) of the parameters that it reads.
        mine: by call, the positions of these parameters among its tensors.
        outside: the tensors that the closure reads and does not make, by value.
        active: the values that derivatives reach.
        overwritten: the values into whose memory a later call writes.
        sites, cuts: in order.
        batch: N.
        positions: T, the positions of the loss; 0 if there are none, or if they were not searched for.
        mutations: by call, positions of the tensors that it writes and that the closure did not make.
        hidden: by call, such tensors that are not among its arguments.
        rewritten: positions of the trainable parameters that the closure writes itself.
        watch: by call, the values that a run keeps for segments.
        release: by call, the kept values that nothing needs after it.
        constants: values that a site needs before the closure reads them, with the tensors of the last run.
        constant_values: the values of ``constants``. ``forget`` takes tensors out of ``constants`` and leaves these.
        ahead: calls that segments make before the closure does.
        returned: the loss's value.
        loss_params: positions of the parameters that the loss itself reads.
        keeps_graph: whether the loss reads parameters through expressions (``W.t()``). Sites may read these too, so the
            loss's reverse pass must keep their graphs.
        stopped_params: positions of the parameters that calls without gradients read.
        blocked: by site, why it has no segment.
        answers: the answers to the closure's questions ``activation.requires_grad``, in order.
        cost: matrix products of a step, in units of a forward pass.
        shared_writes: operations of the network that write into memory which other tensors share.
        chain: the residual chain, if it was asked for and found.
        joints: groups of sites that may get one guess.
        without_forward: functions found to have no forward derivative here (another dtype may have one).
        parameters_seen: by ``id``, the parameters that runs have read: a weak reference, and the value.
        first_pass_tensors: by value, the tensors from outside that the first pass of a step has read. The second pass
            must read the same numbers.
        cached_results: results that others have computed from this graph; see ``cached``.
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
    positions: int = 0
    mutations: dict[int, tuple[int, ...]] = field(default_factory=dict)
    rewritten: frozenset[int] = frozenset()
    hidden: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    watch: dict[int, tuple[Watched, ...]] = field(default_factory=dict)
    release: dict[int, tuple[int, ...]] = field(default_factory=dict)
    constants: dict[int, Tensor] = field(default_factory=dict)
    constant_values: frozenset[int] = frozenset()
    ahead: frozenset[int] = frozenset()
    returned: int = -1
    loss_params: frozenset[int] = frozenset()
    keeps_graph: bool = False
    stopped_params: frozenset[int] = frozenset()
    blocked: dict[int, str] = field(default_factory=dict)
    answers: tuple[bool, ...] = ()
    cost: float = 0.0
    shared_writes: tuple[str, ...] = ()
    chain: ResidualChain | None = None
    joints: tuple[ParallelSites, ...] = ()
    without_forward: set[Callable[..., Any]] = field(default_factory=set, repr=False, compare=False)
    parameters_seen: dict[int, tuple[ref[Tensor], int]] = field(default_factory=dict, repr=False, compare=False)
    first_pass_tensors: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)
    cached_results: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def forget(self) -> None:
        """Let go of the last batch's tensors; the parameters stay."""
        kept = {v: t for v, t in self.constants.items() if isinstance(t, torch.nn.Parameter)}
        self.constants.clear()
        self.constants.update(kept)

    def cached(self, key: Any, make: Callable[[], T]) -> T:
        """The result of ``make``, computed once for a key and kept as long as the graph."""
        if key not in self.cached_results:
            self.cached_results[key] = make()
        found: T = self.cached_results[key]
        return found

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The functions that the closure calls, in order."""
        return tuple(call.fn for call in self.calls)

    @cached_property
    def handling(self) -> tuple[Handling, ...]:
        """By call, all that a run does there."""
        states = {} if self.chain is None else self.chain.shapes
        found = []
        for call, kind in zip(self.calls, self.kinds, strict=True):
            c, watch = call.index, self.watch.get(call.index, ())
            entering, leaving = ([w[1:] for w in watch if w.where == where] for where in ("in", "out"))
            noted = [w[1:] for w in watch if w.value in states]
            handling = Handling(
                call, call.fn, kind, self.mutations.get(c), entering, leaving, noted, self.release.get(c, ())
            )
            found.append(handling)
        return tuple(found)

    @cached_property
    def sites_at(self) -> dict[int, list[Site]]:
        """By call, its sites."""
        found: dict[int, list[Site]] = {}
        for site in self.sites:
            found.setdefault(site.call.index, []).append(site)
        return found

    @cached_property
    def shared_by(self) -> dict[int, tuple[int, ...]]:
        """By site index, the earlier sites that share its cotangent."""
        found: dict[int, tuple[int, ...]] = {}
        for site in reversed(self.sites):
            end = site
            while end.shares is not None:
                end = self.sites[end.shares]
                found[end.index] = (site.index, *found.get(end.index, ()))
        return found

    @cached_property
    def has_uncausal_sites(self) -> bool:
        """Whether some site's positions influence all positions."""
        return any(site.position_dim is not None and site.influence is Influence.ALL for site in self.sites)

    @cached_property
    def is_by_position(self) -> bool:
        """Whether the whole loss is a sum over positions."""
        return all(cut.position_dim is not None for cut in self.cuts)

    @cached_property
    def cut_of(self) -> dict[int, int]:
        """By value, the number of the cut."""
        return {cut.value: number for number, cut in enumerate(self.cuts)}

    @cached_property
    def moving(self) -> tuple[tuple[int, ...], ...]:
        """By call, the positions of its tensors that derivatives reach."""
        return tuple(tuple(k for k, v in enumerate(call.inputs) if v in self.active) for call in self.calls)

    @cached_property
    def overwritten_later(self) -> dict[int, tuple[int, ...]]:
        """By call of a site, positions of the inputs that the closure overwrites before gradients are formed."""
        found = {}
        for c in self.sites_at:
            call = self.calls[c]
            own = {*self.mine[c], *call.writes}
            positions = tuple(k for k, v in enumerate(call.inputs) if v in self.overwritten and k not in own)
            if positions:
                found[c] = positions
        return found

    @cached_property
    def loss_writes(self) -> bool:
        """Whether a call of the loss writes in place: into a value of the network, perhaps through a view of it."""
        return any(call.in_place for call, kind in zip(self.calls, self.kinds, strict=True) if kind is Kind.LOSS)

    @cached_property
    def rectified(self) -> dict[int, tuple[tuple[int, int], ...]]:
        """After ReLU, keep the output instead of the input: the mask is the same. By call that reads such an output:
        (index of the site before the ReLU, position of the output among the arguments)."""
        found: dict[int, tuple[tuple[int, int], ...]] = {}
        for site in self.sites:
            for m in site.segment.matrices if site.segment is not None and site.segment.rectified else ():
                if Value(m.x) in m.call.args:
                    entry = site.index, m.call.args.index(Value(m.x))
                    found[m.call.index] = (*found.get(m.call.index, ()), entry)
        return found

    @cached_property
    def block_calls(self) -> frozenset[int]:
        """The sites' calls inside the reverse graphs of the chain's blocks."""
        return frozenset() if self.chain is None else self.chain.reverses.intersection(self.sites_at)

    @cached_property
    def block_inputs(self) -> frozenset[int]:
        """Values inside blocks to which the blocks' reverse graphs may be pulled back: the skips' origins, and the
        outputs of sites outside of these graphs, which read the network's input alone."""
        entries = (site.value for site in self.sites if site.call.index not in self.block_calls)
        return frozenset() if self.chain is None else self.chain.origins.union(entries)
