"""What an estimator may know at a site: its output, noise, and the way to the next matrix site(s).

Letters: s the site's output, x the next matrix site's input, u a cotangent of x, y a guess (a cotangent of s).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from guessopt.chains import Block
from guessopt.errors import refusal, refused
from guessopt.layout import Layout, Shape
from guessopt.ops.base import moves_statistics, op_of, without_side_effects
from guessopt.ops.cached import CachedCall
from guessopt.ops.drawing import draws_now
from guessopt.ops.elementwise import derivative, is_dropout, lasting_derivative, pull_back
from guessopt.ops.reverse import push
from guessopt.record import GraphInput, Graphs
from guessopt.rng import NoiseSource, RandomState, draws, replayed
from guessopt.sites import Call, DownstreamPath, Matrix, ParallelSites, Segment, Site, Value
from guessopt.tracing.interceptor import AS_IT_IS, autocast_of, dense, tensors_in
from guessopt.tracing.writes import copied, kept


class SiteContext:
    """A site in the middle of a run, as ``Estimator.sample`` sees it.

    Attributes:
        site: the site.
        s: its output, without tangent, ``[N, *, d_out]`` or as ``site.layout`` says.

    Args:
        several: whether more than one guess will be made here, so that their common work is kept.
        known: by call, results of calls that a pull-back makes before the closure does are put here; None: nowhere.
        random: by call, the random states before the segment's calls that draw (None: not known yet). With them the
            segment draws the numbers of the pass. Without them, dropout is replaced by its mean, and other calls draw
            new numbers.
    """

    def __init__(
        self,
        site: Site,
        s: Tensor,
        values: dict[int, Tensor],
        source: NoiseSource,
        *,
        several: bool = False,
        known: dict[int, CachedCall] | None = None,
        random: Random | None = None,
    ) -> None:
        self.site, self.s, self._values, self._source = site, s, values, source
        self._known = known
        self._random: Random = random or {}
        self._m: tuple[Tensor | None] | None = None
        self._several = several
        self._runs: dict[tuple[int, ...], tuple[Tensor, Any]] = {}

    def noise(self, shape: Shape, kind: str = "normal") -> Tensor:
        """Independent entries: ``"normal"``, ``"rademacher"``, ``"uniform_centred"`` (all of unit variance) or
        ``"uniform"`` (U[0, 1), Singhal A.2)."""
        return draw(self._source, kind, shape, self.s.dtype, self.s.device)

    def held(self, *, several: bool = False) -> SiteContext:
        """The same, with what the segment reads and no more, to outlast its place in the run; ``several``: for several
        pull-backs."""
        segment, values = self.site.segment, self._values
        needed = {} if segment is None else {v: values[v] for v in segment.needs if v in values}
        return SiteContext(self.site, self.s, needed, self._source, several=several, random=self._random)

    def replaying(self, random: Random) -> SiteContext:
        """A copy whose segment draws the numbers that the pass draws."""
        return SiteContext(self.site, self.s, self._values, self._source, several=self._several, random=random)

    @property
    def awaits_draws(self) -> bool:
        """Whether the closure has yet to make a call of the segment that draws."""
        return any(self._random[c] is None for c in self._draws)

    @property
    def _has_drawn(self) -> bool:
        """Whether the segment's draws are known."""
        return bool(self._random) and any(self._random[c] is not None for c in self._draws)

    @cached_property
    def _draws(self) -> tuple[int, ...]:
        """The segment's calls that draw, where ``random`` knows of them."""
        random, segment = self._random, self.site.segment
        return tuple(c.index for c in walked(segment) if c.index in random) if random and segment is not None else ()

    def weights(self) -> list[tuple[Matrix, Tensor]]:
        """The next matrix site(s), each with its weight (parallel ones stacked) as ``[b, o, i]``."""
        assert self.site.segment is not None
        values = self._values
        if self.site.segment.weight_program:
            values = evaluate(self.site.segment.weight_program, values, random=self._random)
        return [
            (m, m.rule.matrix(m, dense(values[m.weights[0]])) if len(m.weights) == 1 else self._stack(m, values))
            for m in self.site.segment.matrices
        ]

    @staticmethod
    def _stack(m: Matrix, values: dict[int, Tensor]) -> Tensor:
        return torch.cat([m.rule.matrix(m, dense(values[w])) for w in m.weights], dim=1)

    @property
    def is_elementwise(self) -> bool:
        """Nothing but elementwise operations lies between the site and the next matrix site."""
        return self.site.segment is not None and self.site.segment.elementwise is not None

    def derivative(self) -> Tensor | None:
        """``M = phi'(s)`` of an elementwise path, shape of ``s``; None for the identity."""
        if self._m is None and self._has_drawn:
            self._m = (self._pulled((), self._segment(), torch.ones_like(self.s)),)
        elif self._m is None:
            self._m = (derivative(self._path(), self.s),)
        return self._m[0]

    def _path(self) -> tuple[tuple[Callable[..., Any], Callable[[Tensor], Tensor]], ...]:
        assert self.site.segment is not None and self.site.segment.elementwise is not None
        return tuple((call.fn, _closed(call)) for call in self.site.segment.elementwise)

    def _masked(self, u: Tensor) -> Tensor:
        m = self.derivative()
        return u if m is None else u * m

    def pull_back(self, u: Tensor, *, spent: bool = False) -> Tensor:
        """``J^T u``: from the next matrix site's input back to ``s``, through that segment alone; into ``u``'s memory
        if it is ``spent``."""
        segment = self.site.segment
        if segment is not None and segment.fused is not None and not self._has_drawn:
            assert segment.elementwise is not None
            lasting = None if self._known is None else lasting_derivative(segment.elementwise, self.s)
            if lasting is None:
                return segment.fused(u, self.s, spent)
            call, m = lasting
            assert self._known is not None
            args = _fill(call.args, {segment.source: self.s})
            self._known[call.index] = CachedCall.of(args, call.kwargs, None, m)
            return u.mul_(m) if spent else u * m
        if self.is_elementwise:
            once = self._m is None and not self._several and not self._has_drawn
            return pull_back(self._path(), self.s, u) if once else self._masked(u)
        if self._known is not None:
            self._known.clear()
        return self._pulled((), self._segment(), u)

    def _pulled(self, goals: tuple[int, ...], run: Callable[[Tensor], Any], u: Any) -> Tensor:
        """``J^T u``; where several guesses are made, what lies on the way is run once for all."""
        with torch.enable_grad():
            found = self._runs.get(goals)
            if found is None:
                s = self.s.detach().requires_grad_()
                found = s, run(s)
                if self._several:
                    self._runs[goals] = found
            return torch.autograd.grad(found[1], found[0], u, retain_graph=self._several)[0]

    def push_forward(self, v: Tensor) -> Tensor:
        """``J v``: from ``s`` to the next matrix site's input."""
        if self.is_elementwise:
            return self._masked(v)
        return push(lambda s: (self._segment()(s),), [self.s], [v])[0]

    def next_input(self) -> Tensor:
        """``x_{i+1}``: the next matrix site's input, as this site's own output makes it."""
        if not self.is_elementwise:
            return self._segment()(self.s)
        x = self.s
        for fn, run in self._path():
            x = x if is_dropout(fn) else run(x)
        return x

    def onward(self, matrices: int) -> DownstreamPath | None:
        """The way through so many matrix sites, or as many as there are; None where it cannot be run by itself."""
        ways = self.site.segment.onward if self.site.segment is not None else ()
        return ways[min(matrices, len(ways)) - 1] if ways else None

    def pull_back_from(self, way: DownstreamPath, us: list[Tensor]) -> Tensor:
        """``J^T u``: from the way's goals back to ``s``."""
        return self._pulled(way.goals, self._onward(way), us)

    def push_forward_to(self, way: DownstreamPath, v: Tensor) -> list[Tensor]:
        """``J v``: from ``s`` to the way's goals."""
        return push(self._onward(way), [self.s], [v])

    def _onward(self, way: DownstreamPath) -> Callable[[Tensor], tuple[Tensor, ...]]:
        segment = self.site.segment
        assert segment is not None

        def run(s: Tensor) -> tuple[Tensor, ...]:
            values = evaluate(way.program, {**self._values, segment.source: s}, random=self._random)
            return tuple(values[goal] for goal in way.goals)

        return run

    @property
    def examples(self) -> int:
        """How many examples ``s`` holds; 1 where they are coupled."""
        layout = self.site.layout
        if layout is Layout.BATCH_FIRST:
            return self.s.shape[0]
        if layout is Layout.BATCH_SECOND:
            return self.s.shape[1]
        return self.site.direction_shapes[0][0] if self.site.direction_shapes else 1

    def _segment(self) -> Callable[[Tensor], Tensor]:
        segment = self.site.segment
        assert segment is not None
        x, calls = segment.matrices[0].x, segment.elementwise or segment.program

        def run(s: Tensor) -> Tensor:
            return evaluate(calls, {**self._values, segment.source: s}, known=self._known, random=self._random)[x]

        return run


class ParallelContext(SiteContext):
    """Parallel sites as one layer: what ``SiteContext`` has as one tensor, the site's output, its
    cotangents and tangents, is here a tuple, in the order of ``joint.sites``.

    Args:
        s: the first one's output; the others' are computed here.
    """

    def __init__(
        self,
        joint: ParallelSites,
        site: Site,
        s: Tensor,
        values: dict[int, Tensor],
        source: NoiseSource,
        *,
        several: bool = False,
        known: dict[int, CachedCall] | None = None,
    ) -> None:
        super().__init__(site, s, values, source, several=several, known=known)
        if known is not None:
            known.clear()
        self._values = evaluate(joint.others, {**values, site.value: s}, known=known)
        self.joint = joint
        self._run: tuple[tuple[Tensor, ...], Tensor] | None = None
        self.outputs = tuple(self._values[v] for v in joint.values)

    def pull_back(self, u: Tensor, *, spent: bool = False) -> Any:
        """``J^T u``: a tensor for each site."""
        with torch.enable_grad():
            if self._run is None or not self._several:
                ss = tuple(s.detach().requires_grad_() for s in self.outputs)
                self._run = ss, self._meet(*ss, known=self._known)[0]
            return torch.autograd.grad(self._run[1], self._run[0], u, retain_graph=self._several)

    def push_forward(self, v: Any) -> Tensor:
        """``J v``: a tensor for each site, to the next matrix site's input."""
        return push(self._meet, self.outputs, v)[0]

    def _meet(self, *ss: Tensor, known: dict[int, CachedCall] | None = None) -> tuple[Tensor]:
        segment = self.site.segment
        assert segment is not None
        values = {**self._values, **dict(zip(self.joint.values, ss, strict=True))}
        return (evaluate(self.joint.program, values, known=known)[segment.matrices[0].x],)


def alike(t: Tensor, w: Tensor) -> Tensor:
    """``t`` in the dtype of ``w``, for a product of the two; unchanged if autocast gives both one dtype."""
    if t.dtype is w.dtype or (w.dtype is not torch.float64 and autocast_of(t)):
        return t
    return t.to(w.dtype)


def draw(source: NoiseSource, kind: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Noise of a kind; see ``SiteContext.noise``. With ``source.means`` its mean. In a complex dtype both parts are
    noise: then ``E[Re(conj(g) y) y] = g`` for torch's gradient ``g``, as for real numbers."""
    if dtype.is_complex:
        return torch.view_as_complex(draw(source, kind, (*shape, 2), dtype.to_real(), device))
    if source.means:
        return torch.full(shape, NOISES[kind][0], dtype=dtype, device=device)
    if kind == "normal":
        return source.normal(shape, dtype, device)
    u = source.uniform(shape, dtype, device)
    if kind == "rademacher":
        return (u < 0.5).to(dtype).mul_(2).sub_(1)
    if kind == "uniform_centred":
        return u.sub_(0.5).mul_(12**0.5)
    return u


#: Kinds of noise: the mean and the variance of an entry.
NOISES = {"normal": (0.0, 1.0), "rademacher": (0.0, 1.0), "uniform": (0.5, 1 / 12), "uniform_centred": (0.0, 1.0)}


def centred(kind: str) -> str:
    """The same noise with mean zero and unit variance."""
    return "uniform_centred" if kind == "uniform" else kind


def evaluate(
    calls: tuple[Call, ...],
    values: dict[int, Tensor],
    variables: frozenset[int] = frozenset(),
    known: dict[int, CachedCall] | None = None,
    random: Random | None = None,
) -> dict[int, Tensor]:
    """Run recorded calls on values, functionally: in-place writes go to a copy, global random states are left alone.

    Args:
        variables: values made here that are to require grad.
        known: where to leave, by call, what the closure may take over.
        random: the states from which calls are to draw; of the others dropout passes as its mean.
    """
    values, random = dict(values), random or {}
    anew = [c for c in calls if draws(c.fn) and not is_dropout(c.fn) and random.get(c.index) is None and draws_now(c)]
    state = (
        RandomState.before([*values.values(), *((c.args, c.kwargs) for c in anew)], {}, *(c.fn for c in anew))
        if anew
        else None
    )
    with replayed(state):
        _run(calls, values, variables, known, random)
    return values


#: Random states before calls, by the call's index; None: not known yet.
Random = Mapping[int, "RandomState | None"]


def walked(segment: Segment) -> tuple[Call, ...]:
    """The calls on the way to the next matrix site(s), and those that compute their weights."""
    return (*(segment.elementwise or segment.program), *segment.weight_program)


class Subgraph:
    """A stretch of the network with a reverse graph of its own, to be pulled back through as often as asked.

    ``values``: by number, the goals among them; ``ends``: where ``pull_back`` may lead.
    """

    def __init__(self, values: dict[int, Tensor], ends: dict[int, GraphInput]) -> None:
        self.values, self.ends = values, ends

    @staticmethod
    def again(calls: tuple[Call, ...], values: dict[int, Tensor], ends: list[int], random: Random) -> Subgraph:
        """Recorded calls run once more.

        Args:
            calls: in order.
            values: what they read; taken without any graph that these may have.
            ends: given values, or made by the calls.
            random: the states from which calls have drawn.
        """
        variables = frozenset(ends)
        needed = {v for call in calls for v in call.inputs} | variables
        own = {v: values[v].detach() for v in needed if v in values}
        for v in variables & own.keys():
            own[v].requires_grad_()
        with torch.enable_grad():
            own = evaluate(calls, own, variables, random=random)
        return Subgraph(own, {v: GraphInput.of(own[v]) for v in ends})

    @staticmethod
    def kept(graphs: Graphs, block: Block, outputs: Iterable[int], variables: Mapping[int, Tensor]) -> Subgraph:
        """As the closure's own calls have left it, taken over; ``outputs``: of sites."""
        ends = {v: graphs.marks.pop(v) for v in outputs} | {v: GraphInput.of(t) for v, t in variables.items()}
        if block.ends_in_skip and block.origin is not None:
            ends[block.origin] = graphs.marks.pop(block.origin)
        if block.source is not None:
            ends[block.source] = graphs.sources.pop(block.source)
        return Subgraph({v: graphs.goals.pop(v) for v in block.goals}, ends)

    def pull_back(self, goals: tuple[int, ...], us: list[Tensor], variables: list[int]) -> list[Tensor]:
        """``J^T u``: from the goals to each of the variables."""
        ends = [self.ends[v] for v in variables]
        pairs = [(self.values[goal], u) for goal, u in zip(goals, us, strict=True)]
        pairs = [(out, u.to(out.dtype)) for out, u in pairs if out.requires_grad]  # others depend on nothing here
        found: Sequence[Tensor | None] = [None] * len(ends)
        if pairs:
            outs, given = zip(*pairs, strict=True)
            found = torch.autograd.grad(outs, [end.edge for end in ends], given, allow_unused=True, retain_graph=True)
        return [
            us[0].new_zeros(end.shape, dtype=end.dtype) if g is None else g for g, end in zip(found, ends, strict=True)
        ]


def _run(
    calls: tuple[Call, ...],
    values: dict[int, Tensor],
    variables: frozenset[int],
    known: dict[int, CachedCall] | None,
    random: Random,
) -> None:
    for call in calls:
        fn, state = call.fn, random.get(call.index)
        if state is None and is_dropout(fn):
            values[call.outputs[0]] = values[call.inputs[0]]
            continue
        if call.held:
            _hold(call, values)
            continue
        args, kwargs = _fill(call.args, values), _fill(call.kwargs, values)
        if call.in_place:
            args = (args[0].clone(), *args[1:])
        elif call.writes and not moves_statistics(fn):
            args, kwargs = copied(args, kwargs, call.writes)
        op = op_of(fn)
        run = op.in_reverse if state is None else None
        try:
            with _around(call, values, state):
                out = (run or without_side_effects(fn))(*args, **kwargs)
        except RuntimeError as error:
            if (why := refusal(error)) is None:
                raise
            raise refused(fn, why) from error
        if isinstance(out, Tensor):
            values[call.outputs[0]] = out
            if known is not None and op.reuse is not None and not (call.in_place or call.writes or call.hidden):
                known[call.index] = CachedCall.of(args, kwargs, out, op.reuse(out))
        else:
            results = tensors_in((out,)) if out is not None else [args[0]]
            values.update(zip(call.outputs[: call.direct], results, strict=True))
        for v in variables.intersection(call.outputs) if variables else ():
            if not values[v].requires_grad:
                values[v] = values[v].detach().requires_grad_()
            elif len(call.outputs) > 1:  # a cell's h is made from its c: what reaches c by way of h is not c's own
                values[v] = values[v].clone()


def _hold(call: Call, values: dict[int, Tensor]) -> None:
    """A write without gradient: the value gets other numbers and keeps its derivative."""
    with torch.no_grad():
        plain = {v: values[v].detach() for v in call.inputs}
        first = plain[call.inputs[0]] = plain[call.inputs[0]].clone()
        call.fn(*_fill(call.args, plain), **_fill(call.kwargs, plain))
    old, new = call.held[0]
    values[new] = values[old] + (first - values[old].detach())


def _around(call: Call, values: dict[int, Tensor], state: RandomState | None) -> AbstractContextManager[Any]:
    """A call's surroundings, as the closure made it: gradients, autocast, random state; what it hides is put back."""
    autocast = _autocasting(call, values)
    if autocast is AS_IT_IS and state is None and not call.hidden and not call.stopped:
        return AS_IT_IS
    stack = ExitStack()
    for context in (
        torch.no_grad() if call.stopped else AS_IT_IS,
        autocast,
        AS_IT_IS if state is None else replayed(state),
        kept(call.hidden) if call.hidden else AS_IT_IS,
    ):
        stack.enter_context(context)
    return stack


def _autocasting(call: Call, values: dict[int, Tensor]) -> AbstractContextManager[Any]:
    """The autocast under which the closure made the call."""
    now = autocast_of(values[call.inputs[0]]) if call.inputs else None
    if now == call.autocast or not call.inputs:
        return AS_IT_IS
    return torch.autocast(*call.autocast) if call.autocast else torch.autocast(now[0], enabled=False)  # type: ignore[index]


def _fill(node: Any, values: dict[int, Tensor]) -> Any:
    kind = type(node)
    if kind is Value:
        return values[node.id]
    if kind is tuple or kind is list:
        return kind([values[item.id] if type(item) is Value else _fill(item, values) for item in node])
    if kind is dict:
        return {key: _fill(item, values) for key, item in node.items()} if node else {}
    return node


def _closed(call: Call) -> Callable[[Tensor], Tensor]:
    def run(t: Tensor) -> Tensor:
        source = t.clone() if call.in_place else t
        args = tuple(source if isinstance(a, Value) else a for a in call.args)
        kwargs = {k: source if isinstance(a, Value) else a for k, a in call.kwargs.items()}
        with _autocasting(call, {call.inputs[0]: t}):
            out: Tensor = (op_of(call.fn).in_reverse or call.fn)(*args, **kwargs)
        return out

    return run
