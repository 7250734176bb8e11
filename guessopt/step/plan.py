"""Closure to plan: trace, find the examples, and keep the result for the runs that follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor

from guessopt.engine.following import GraphMismatch
from guessopt.engine.forward import ForwardRun
from guessopt.engine.jvp.base import JvpEngine
from guessopt.engine.jvp.fast import FastEngine
from guessopt.engine.jvp.stacked import StackedEngine
from guessopt.engine.probe import Found, Tangents, find_layouts
from guessopt.engine.transaction import Transaction
from guessopt.engine.witness import Mixing, WatchedRun, Witness
from guessopt.errors import ClosureError
from guessopt.graph import SiteGraph
from guessopt.layout import Layout, is_differentiable
from guessopt.sites import ParallelSites, Site
from guessopt.tracing.graph import Analysis
from guessopt.tracing.tape import Tape


@dataclass
class Plan:
    """A graph in use.

    Attributes:
        loss: the loss of the trace, until a pass has confirmed it within ``tolerance``; then None.
        uses: passes so far.
        changes: value of a tensor that the closure reads, or ``-1 - index`` of a call with numbers -> how often it has
            changed from one pass to the next.
        due: whether such a change asks for a probe.
        stale: whether the last pass made a guess from tensors or numbers that the closure then did not use.
        volatile: how many passes were stale.
        stacks: whether K guesses share a pass (None: not known yet).
        failures: how many attempts to share a pass failed.
        ways: see ``StackedEngine``.
        joints: sites that get one guess: index of the first site -> ``ParallelSites``.
        keeps_graphs: whether a pass may keep the reverse graphs of a stream's blocks.
        found: where the examples lie, and through which calls no tangent has come yet.
        mixing: the operation after which examples interact; "" if none.
        together: whether probes may carry several tangents in one run.
        modules, elsewhere: modules and tensors that a ``Transaction`` must watch beside those that it finds itself.
    """

    graph: SiteGraph
    analysis: Analysis | None
    sites: tuple[Site, ...]
    given: int | None
    loss: Tensor | None
    uses: int = 0
    changes: dict[int, int] = field(default_factory=dict)
    last: dict[int, tuple[ref[Tensor], int]] = field(default_factory=dict)
    due: bool = False
    volatile: int = 0
    stale: bool = False
    tolerance: float = 0.0
    guesses: dict[int, Any] | None = None
    normalises_batch: bool = False
    found: Found | None = None
    mixing: str = ""
    routes: bool = False
    compiled: bool = False
    stacks: bool | None = None
    failures: int = 0
    ways: dict[int, bool] = field(default_factory=dict)
    stream: bool = False
    together: bool = True
    keeps_graphs: bool = True
    joints: dict[int, ParallelSites] = field(default_factory=dict)
    modules: tuple[torch.nn.Module, ...] = ()
    elsewhere: tuple[Tensor, ...] = ()

    @property
    def alive(self) -> bool:
        """Whether each site's tangent has been seen to arrive, on every way to the loss."""
        return self.found is None or self.found.alive

    def observe(self, run: ForwardRun) -> None:
        """Compare the tensors and numbers that a run has read with those of the last run. The first, second, fourth,
        eighth, ... change of a tensor or a number asks for a probe."""
        changed = list(run.changed)
        for value, t in run.met.items():
            version = -1 if t.is_inference() else t._version
            before = self.last.get(value)
            if before is None or before[0]() is not t or before[1] != version:
                if before is not None:
                    changed.append(value)
                self.last[value] = ref(t), version
        for leaf in changed:
            count = self.changes[leaf] = self.changes.get(leaf, 0) + 1
            self.due = self.due or count & (count - 1) == 0


def trace(
    closure: Callable[[], Any],
    params: Mapping[int, Tensor],
    ids: Mapping[int, int],
    names: Sequence[str],
    make_engine: Callable[[], JvpEngine],
    transaction: Transaction,
    *,
    finite: bool,
    stream: bool = False,
    together: bool = True,
) -> Plan:
    """Make a plan: run the closure once to record it, and again to probe it. Everything is as before, afterwards.

    Args:
        stream: whether an estimator asks for the residual stream.
        together: whether probes may carry several tangents in one run, for the memory that they take.

    Raises:
        ClosureError: the closure returns no loss, or no parameter has a part in the loss.
    """
    as_expression: frozenset[int] = frozenset()
    found: Found | None = None
    departed = False
    transaction.watch(closure)
    changing: dict[int, torch.nn.Module] = {}
    while True:
        tape = Tape(ids, as_expression, transaction.save)
        with transaction.finding() as modules:
            loss = tape.run(closure)
        # F.embedding scales the rows that it reads to max_norm. To scale them again changes nothing: no rewriting.
        tape.rewritten = frozenset(p for p, t in params.items() if tape.writes.written(t) - {F.embedding})
        changing |= {id(module): module for module in modules}
        check_loss(loss)
        analysis = Analysis(tape, tape.value(loss))
        if not (weights := analysis.weight_calls()) <= as_expression:
            as_expression |= weights
            transaction.rewind()
            continue
        sites = analysis.sites()
        if finite:
            check_finite(loss)
        check_examples(sites, analysis)
        transaction.rewind()
        given = int(loss.shape[0]) if loss.dim() == 1 else None
        try:
            found = layouts_of(
                closure, analysis, sites, params, ids, make_engine, transaction, given, known=found, together=together
            )
        except GraphMismatch as departure:
            if departed:
                raise unstable(departure) from None
            # A first run may have filled caches that later runs read: trace once more.
            as_expression, departed, found = frozenset(), True, None
            continue
        constant = constant_calls(analysis, sites, found)
        if constant <= as_expression:
            break
        as_expression |= constant
    graph = analysis.graph(sites, found.layouts, found.batch, stream=stream, ends=found.ends)
    if not graph.sites and not graph.loss_params:
        raise ClosureError(independent(names, graph))
    plan = Plan(graph, None, tuple(sites), given, loss.detach().mean())
    plan.tolerance = precision(analysis)
    plan.modules, plan.elsewhere = tuple(changing.values()), tuple(tape.writes.elsewhere)
    plan.found, plan.stream, plan.together = found, stream, together
    plan.mixing = mixing_of(closure, analysis, graph, found, params, ids, make_engine, transaction)
    plan.compiled = tape.compiled
    plan.routes = analysis.routes_by_data()
    plan.normalises_batch = bool(analysis.coupled_by_batch_norm())
    plan.analysis = analysis if found.batch > 1 else None
    _forget_tensors(tape)
    return plan


def layouts_of(
    closure: Callable[[], Any],
    analysis: Analysis,
    sites: Sequence[Site],
    params: Mapping[int, Tensor],
    ids: Mapping[int, int],
    make_engine: Callable[[], JvpEngine],
    transaction: Transaction,
    given: int | None,
    seed: int = 0,
    known: Found | None = None,
    together: bool = True,
) -> Found:
    """Probe the closure for where its examples lie. ``known``: see ``find_layouts``."""
    graph = analysis.graph(list(sites), {}, 1, segments=False)
    frozen, witness = make_engine().frozen_statistics, Witness(analysis)
    together = together and not graph.shared_writes

    def prepared(tangents: Mapping[int, Tangents], engine: JvpEngine, lanes: Sequence[int]) -> WatchedRun:
        def guess(site: Site, s: Tensor, values: dict[int, Tensor]) -> Tensor | None:
            if site.index not in tangents:
                return None
            made = tangents[site.index](s, lanes)
            return made if isinstance(engine, StackedEngine) else made[0]

        watched = WatchedRun(ids, graph, engine, guess, {}, transaction, keeps=False)
        watched.watch = witness.watch
        return watched

    def run(watched: WatchedRun) -> list[Tensor | None]:
        try:
            return watched.execute(closure, params).tangents
        finally:
            transaction.rewind()

    def push(tangents: Mapping[int, Tangents], count: int) -> list[Tensor | None]:
        try:
            return pushed(tangents, count)
        except StopIteration as error:  # of the closure: it would end the search's generators
            raise _Carried(error) from None

    def pushed(tangents: Mapping[int, Tangents], count: int) -> list[Tensor | None]:
        """All lanes in one run; each in its own run if they cannot share one."""
        nonlocal together
        if together and count > 1:
            watched = prepared(tangents, StackedEngine(count, {}, frozen_statistics=frozen), range(count))
            try:
                return run(watched)
            except Exception as error:
                cause = error.__cause__ or error
                if transaction.raised or (
                    cause is not watched.failure
                    and not isinstance(cause, (torch.OutOfMemoryError, MemoryError, NotImplementedError))
                ):
                    raise
                together = False
        runs = [run(prepared(tangents, FastEngine(frozen_statistics=frozen), [lane])) for lane in range(count)]
        return [_stacked(lanes) for lanes in zip(*runs, strict=True)]

    try:
        found = find_layouts(
            sites,
            graph.cuts,
            push,
            given=given,
            others=[analysis.tape.shapes[v] for v in analysis.active],
            coupled=frozenset() if frozen else frozenset(analysis.coupled_by_batch_norm()),
            doubtful=frozenset(site.value for site in sites if may_hold_no_examples(analysis, site)),
            seed=seed,
            known=known,
        )
    except _Carried as carried:
        raise carried.error from None
    asleep = witness.asleep if known is None else witness.asleep & known.asleep
    unproven = analysis.upstream(v for c in asleep for v in analysis.tape.calls[c].sources)
    coupled = frozenset(found.coupled)
    return replace(
        found,
        asleep=asleep,
        unproven=tuple(site.index for site in sites if site.value in unproven and site.index not in coupled),
    )


class _Carried(Exception):
    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def _stacked(lanes: Sequence[Tensor | None]) -> Tensor | None:
    like = next((t for t in lanes if t is not None), None)
    return None if like is None else torch.stack([torch.zeros_like(like) if t is None else t for t in lanes])


def mixing_of(
    closure: Callable[[], Any],
    analysis: Analysis,
    graph: SiteGraph,
    found: Found,
    params: Mapping[int, Tensor],
    ids: Mapping[int, int],
    make_engine: Callable[[], JvpEngine],
    transaction: Transaction,
) -> str:
    """The operation after which the examples of the last coupled site interact; "" if none was found. Takes one run of
    the closure, except for batch normalisation."""
    coupled = [site for site in graph.sites if site.layout is Layout.COUPLED and site.shares is None]
    if found.batch == 1 or not coupled:
        return ""
    last = coupled[-1]
    if last.value in analysis.coupled_by_batch_norm():
        return "batch_norm, which in training mode normalises by the whole batch"
    layout = Layout.candidates(last.shape, found.batch)[0]
    if layout is Layout.COUPLED:
        return ""
    generator = torch.Generator().manual_seed(0)
    moving = torch.randperm(found.batch, generator=generator) < found.batch // 2
    mixing = Mixing(moving)

    def guess(site: Site, s: Tensor, values: dict[int, Tensor]) -> Tensor | None:
        if site.index != last.index:
            return None
        noise = torch.randn(s.shape, generator=generator).to(s)
        return noise.mul_(layout.spread(moving.to(s), tuple(s.shape)))

    engine = FastEngine(frozen_statistics=make_engine().frozen_statistics)
    watched = WatchedRun(ids, graph, engine, guess, {}, transaction, keeps=False)
    watched.watch = mixing.watch
    try:
        watched.execute(closure, params)
    except GraphMismatch as departure:
        raise unstable(departure) from None
    finally:
        transaction.rewind()
    if mixing.call is None:
        return ""
    index, shape = mixing.call
    return f"{analysis.tape.calls[index].op} (its output: {list(shape)})"


def constant_calls(analysis: Analysis, sites: Sequence[Site], found: Found) -> frozenset[int]:
    """Calls that read a parameter and another tensor but hold no examples, such as ``F.embedding(arange(T), W)``. They
    are parameter expressions. Their shape tells; where T = N, the values made from them do, which hold the examples
    apart."""
    if found.batch <= 1:
        return frozenset()
    apart = {v for v, layout in (found.ends | found.layouts).items() if layout is not Layout.COUPLED}

    def holds_none(site: Site) -> bool:
        fits = Layout.candidates(site.shape, found.batch)[0] is not Layout.COUPLED
        return not fits or (site.value not in apart and analysis.leads_to(site.value, sites) <= apart)

    return frozenset(site.call.index for site in sites if may_hold_no_examples(analysis, site) and holds_none(site))


def may_hold_no_examples(analysis: Analysis, site: Site) -> bool:
    """Whether nothing but parameters, and indices or a mask beside them, make the site's output."""
    reads_network = any(v in analysis.active for v in site.call.inputs)
    return not reads_network and site.cut is None and _is_about_parameters(analysis.tape, site)


def _is_about_parameters(tape: Tape, site: Site) -> bool:
    """Whether the call looks parameters up by index, or masks them: its other tensors are then no batch of inputs."""
    mine = tape.mine[site.call.index]
    others = [v for k, v in enumerate(site.call.inputs) if k not in mine]
    masked = any(tape.shapes[site.call.inputs[k]] == site.shape for k in mine)
    return masked or not any(is_differentiable(tape.dtypes[v]) for v in others)


def reprobe(
    plan: Plan,
    closure: Callable[[], Any],
    params: Mapping[int, Tensor],
    ids: Mapping[int, int],
    make_engine: Callable[[], JvpEngine],
    transaction: Transaction,
) -> None:
    """Probe again: tangents of a site that could not reach the loss (a zero-initialised head) may reach it now."""
    assert plan.analysis is not None
    graph = plan.graph
    assert plan.found is not None
    found = layouts_of(
        closure,
        plan.analysis,
        plan.sites,
        params,
        ids,
        make_engine,
        transaction,
        plan.given,
        plan.uses,
        plan.found,
        plan.together,
    )
    changed = (found.batch, found.layouts, found.ends) != (plan.found.batch, plan.found.layouts, plan.found.ends)
    plan.found = found
    if changed:
        new = plan.analysis.graph(list(plan.sites), found.layouts, found.batch, stream=plan.stream, ends=found.ends)
        plan.graph = replace(new, constants={**new.constants, **graph.constants})  # the tape has forgotten its batch
        object.__setattr__(plan.graph, "early", graph.early)
        plan.guesses = None
    plan.due = False


def is_due_for_probe(plan: Plan) -> bool:
    """Whether the next pass needs a probe before it: after 1, 2, 4, 8, ... passes; more often while the tangent of some
    site has not been seen to reach the loss; always where the data decide which rows go where."""
    uses = plan.uses
    if plan.analysis is None or uses == 0:
        return False
    asleep = not plan.alive and (uses < 64 or uses % 16 == 0)
    return plan.routes or asleep or uses & (uses - 1) == 0


def _forget_tensors(tape: Tape) -> None:
    """Let go of the batch: later probes need the analysis, and not the tensors."""
    tape.expressions.clear()
    tape.writes.let_go()
    tape.outside = {v: t for v, t in tape.outside.items() if isinstance(t, torch.nn.Parameter)}


def check_loss(loss: Any) -> None:
    """Raise ``ClosureError`` unless it is a scalar or ``[N]`` floating tensor."""
    if not isinstance(loss, Tensor):
        raise ClosureError(
            f"the closure must return the loss as a tensor, scalar or one per example [N]; it returned "
            f"{'None (a missing return?)' if loss is None else type(loss).__name__}"
        )
    if loss.dim() > 1:
        raise ClosureError(
            f"the closure returned a tensor of shape {list(loss.shape)}; return a scalar, or losses of shape [N]: "
            "reduce the other dimensions"
        )
    if not loss.is_floating_point():
        raise ClosureError(
            f"the closure returned a loss of dtype {loss.dtype}; it must be a real floating-point tensor"
        )
    if loss.is_inference():
        raise ClosureError(
            "the loss was made inside torch.inference_mode(), where derivatives are silently lost; remove it"
        )


def check_finite(loss: Tensor, d: Tensor | None = None) -> None:
    """Raise ``ClosureError`` unless the loss (and the directional derivatives) are finite. One host sync."""
    if loss.numel() == 0:
        raise ClosureError("the closure returned no losses (shape [0]): the batch is empty; skip it")
    both = loss.sum() if d is None else loss.sum() + d.sum().to(loss.device)
    if math.isfinite(both.item()):
        return
    if bool(torch.isfinite(loss).all()):
        raise ClosureError(
            "the directional derivative of the loss is not finite although the loss is; look for sqrt, log or a "
            "division at zero in the closure, or lower the learning rate"
        )
    raise ClosureError(
        f"the loss is not finite ({loss.detach().mean().item()}); nothing was updated. Check the batch (an empty one "
        "gives nan), lower the learning rate, or pass check_finite=False"
    )


def check_examples(sites: Sequence[Site], analysis: Analysis) -> None:
    """Raise ``ClosureError`` if the batch is empty, that is, if every tensor that the loss reads is. A single empty
    output is allowed: an expert to which no token goes, an image in which nothing was found."""
    shapes = [analysis.tape.shapes[v] for v in analysis.cut_values]
    if shapes and all(0 in shape for shape in shapes):
        empty = next((f"{site.op} gave an output" for site in sites if 0 in site.shape), "the loss reads a tensor")
        raise ClosureError(f"the batch is empty: {empty} of shape {list(shapes[0])}; skip such a batch")


def independent(names: Sequence[str], graph: SiteGraph) -> str:
    few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    why = " (they are read only under torch.no_grad() or through detach())" if graph.stopped_params else ""
    return (
        f"the loss does not depend on any parameter handed to the optimizer ({few}){why}; return the loss itself, "
        "computed from the model inside the closure, not a detached copy"
    )


def unstable(departure: GraphMismatch) -> ClosureError:
    where = f" (call {departure.index + 1}: {departure.what})" if departure.what else ""
    return ClosureError(
        f"the closure does not repeat: run twice with the same random state, it made other calls or read other tensors"
        f"{where}; take the batch before the step, draw noise from a generator of torch, numpy or random, and keep "
        "caches (use_cache=True, lru_cache) out of the closure"
    )


def precision(analysis: Analysis) -> float:
    """Relative difference that rounding may make between two runs by different kernels, in the closure's lowest
    precision."""
    dtypes = {analysis.tape.dtypes[v] for v in analysis.active}
    return max(1e-4, *(4 * torch.finfo(dtype).eps for dtype in dtypes)) if dtypes else 1e-4


def check_repeats(first: Tensor, second: Tensor, tolerance: float, again: Callable[[], Tensor]) -> None:
    """Raise ``ClosureError`` if runs from the same random state give different losses.

    Args:
        tolerance: relative, for other kernels.
        again: the loss of one more run. It decides where two differ: other kernels alone may move the loss of an
            ill-conditioned network (a batch norm over two nearly equal numbers magnifies every last bit).
    """
    a, b = first.double(), second.detach().double()

    def close(x: Tensor, y: Tensor) -> bool:
        return torch.allclose(x, y, rtol=tolerance, atol=1e-6)

    if not bool(torch.isfinite(a)) or close(a, b):
        return
    c = again().double()
    if not (close(a, c) or close(b, c)):
        raise ClosureError(
            f"the closure does not repeat: a second pass from the same random state gave the loss {b.item():.6g} in "
            f"place of {a.item():.6g}; take the batch before the step, and draw noise from a generator of torch, numpy "
            "or random"
        )


def warn_of_coupling(plan: Plan, warn: Callable[[str], None]) -> None:
    """Warn once if examples interact or cannot be told apart. A batch of one example needs no warning."""
    graph = plan.graph
    several = [s for s in graph.sites if 0 not in s.shape and s.shape and s.shape[0] > 1 and 1 not in s.shape[:2]]
    coupled = [s for s in several if s.layout is Layout.COUPLED and s.shares is None and s.cut is None]
    if graph.batch > 1 and coupled:
        which = f"{len(coupled)} of {len(graph.sites)} sites ({', '.join(sorted({site.op for site in coupled}))})"
        where = (
            f"examples interact in {plan.mixing}: {which} before it"
            if plan.mixing
            else f"the {graph.batch} examples interact, or lie in no known order, at {which}, the last of which has an "
            f"output of shape {list(coupled[-1].shape)}: these"
        )
        warn(f"{where} take the scalar derivative of the whole batch, which is valid but far noisier")
    elif graph.batch == 1 and 2 * len(several) > len(graph.sites):
        warn(
            "the closure's examples could not be told apart: every site takes the scalar derivative, which is valid "
            "but far noisier; keep the batch in the first or second dimension"
        )
