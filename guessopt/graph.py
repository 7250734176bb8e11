"""``SiteGraph``: what a trace of the closure found."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor

from guessopt.chains import Stream
from guessopt.layout import Layout, Shape
from guessopt.sites import Call, ParallelSites, Site, Value

T = TypeVar("T")


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
