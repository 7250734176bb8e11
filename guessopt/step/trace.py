"""From a closure to a plan: record the closure, find where its examples lie, and find where they interact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guessopt.engine.following import GraphMismatch
from guessopt.engine.jvp.base import JvpEngine
from guessopt.engine.jvp.fast import FastEngine
from guessopt.engine.jvp.stacked import StackedEngine
from guessopt.engine.positions import find_positions
from guessopt.engine.probe import Found, Push, Tangents, find_layouts
from guessopt.engine.transaction import Transaction
from guessopt.engine.witness import Mixing, WatchedRun, Witness
from guessopt.errors import ClosureError
from guessopt.graph import Positions, SiteGraph
from guessopt.layout import Layout, is_differentiable
from guessopt.record import Guess
from guessopt.sites import Site
from guessopt.step.checks import check_examples, check_finite, check_loss, independent, precision, unstable
from guessopt.step.estimation import Estimation
from guessopt.step.plan import Plan
from guessopt.tracing.analysis import Analysis
from guessopt.tracing.extract import sites_of
from guessopt.tracing.graph import site_graph
from guessopt.tracing.tape import Tape


@dataclass
class _Recording:
    """One recorded run of the closure, and where its examples lie.

    Attributes:
        given: the number of losses, if the closure returns several.
        modules: the modules whose attributes the closure changes, by ``id``.
    """

    tape: Tape
    analysis: Analysis
    sites: list[Site]
    loss: Tensor
    given: int | None
    modules: dict[int, torch.nn.Module]
    found: Found


def trace(
    est: Estimation, closure: Callable[[], Any], transaction: Transaction, *, finite: bool, together: bool = True
) -> Plan:
    """Make a plan: run the closure once to record it, and again to probe it. Then put everything back.

    Args:
        finite: refuse a loss that is not finite.
        together: whether probes may carry several tangents in one run. This takes more memory.

    Raises:
        ClosureError: the closure returns no loss, or no parameter has a part in the loss.
    """
    transaction.watch(closure)
    recording = _recorded(est, closure, transaction, finite, together)
    tape, analysis, found, chain = recording.tape, recording.analysis, recording.found, est.follows_chain
    graph = site_graph(
        analysis, recording.sites, found.layouts, found.batch, chain=chain, ends=found.ends, positions=found.positions
    )
    if not graph.sites and not graph.loss_params:
        raise ClosureError(independent(est.names, graph))
    plan = Plan(
        graph,
        analysis if found.batch > 1 or found.positions is not None else None,
        tuple(recording.sites),
        recording.given,
        recording.loss.detach().mean(),
        tolerance=precision(analysis),
        normalises_batch=bool(analysis.coupled_by_batch_norm()),
        found=found,
        mixing=mixing_of(est, closure, analysis, graph, found, transaction),
        routes=analysis.routes_by_data(),
        compiled=tape.compiled,
        stream=chain,
        together=together,
        modules=tuple(recording.modules.values()),
        elsewhere=tuple(tape.writes.elsewhere),
    )
    _forget_tensors(tape)
    return plan


def _recorded(
    est: Estimation, closure: Callable[[], Any], transaction: Transaction, finite: bool, together: bool
) -> _Recording:
    """Record and probe the closure. Record it again when a call turns out to be an expression of parameters. Record it
    once more if the probe's runs make other calls: a first run may fill caches that later runs read."""
    as_expression: frozenset[int] = frozenset()
    found: Found | None = None
    departed = False
    modules: dict[int, torch.nn.Module] = {}
    while True:
        tape, loss = _tape_of(est, closure, transaction, as_expression, modules)
        analysis = Analysis(tape, tape.value(loss))
        if not (weights := analysis.weight_calls()) <= as_expression:
            as_expression |= weights
            transaction.rewind()
            continue
        sites = sites_of(analysis)
        if finite:
            check_finite(loss)
        check_examples(sites, analysis)
        transaction.rewind()
        given = int(loss.shape[0]) if loss.dim() == 1 else None
        try:
            found = layouts_of(est, closure, analysis, sites, transaction, given, known=found, together=together)
        except GraphMismatch as mismatch:
            if departed:
                raise unstable(mismatch) from None
            as_expression, departed, found = frozenset(), True, None
            continue
        constant = constant_calls(analysis, sites, found)
        if constant <= as_expression:
            return _Recording(tape, analysis, sites, loss, given, modules, found)
        as_expression |= constant


def _tape_of(
    est: Estimation,
    closure: Callable[[], Any],
    transaction: Transaction,
    as_expression: frozenset[int],
    modules: dict[int, torch.nn.Module],
) -> tuple[Tape, Tensor]:
    """Run the closure and record its calls. Returns the tape and the loss. Adds changed modules to ``modules``."""
    tape = Tape(est.ids, as_expression, transaction.save)
    with transaction.finding() as changed:
        loss = tape.run(closure)
    # F.embedding scales the rows that it reads to max_norm. A second scaling changes nothing: ignore it.
    tape.rewritten = frozenset(p for p, t in est.by_position.items() if tape.writes.written(t) - {F.embedding})
    modules |= {id(module): module for module in changed}
    check_loss(loss)
    return tape, loss


def layouts_of(
    est: Estimation,
    closure: Callable[[], Any],
    analysis: Analysis,
    sites: Sequence[Site],
    transaction: Transaction,
    given: int | None,
    seed: int = 0,
    known: Found | None = None,
    together: bool = True,
) -> Found:
    """Probe the closure to find where its examples lie. ``known``: see ``find_layouts``."""
    graph = site_graph(analysis, sites, {}, 1, segments=False)
    frozen, witness = est.frozen_statistics, Witness(analysis)
    together = together and not graph.shared_writes

    def prepared(tangents: Mapping[int, Tangents], engine: JvpEngine, lanes: Sequence[int]) -> WatchedRun:
        def guess(site: Site, s: Tensor, values: dict[int, Tensor]) -> Guess | None:
            if site.index not in tangents:
                return None
            made = tangents[site.index](s, lanes)
            return Guess(made if isinstance(engine, StackedEngine) else made[0])

        watched = WatchedRun(est.ids, graph, engine, guess, {}, transaction, keeps=False)
        watched.watch = witness.watch
        return watched

    def run(watched: WatchedRun) -> list[Tensor | None]:
        try:
            return watched.execute(closure, est.by_position).tangents
        except StopIteration as error:  # of the closure: it would end the search's generators
            raise _Carried(error) from None
        finally:
            transaction.rewind()

    def push(tangents: Mapping[int, Tangents], count: int) -> Iterator[list[Tensor | None]]:
        """All tangents (lanes) in one run; or each in its own run, if they cannot share a run."""
        nonlocal together
        if together and count > 1:
            watched = prepared(tangents, StackedEngine(count, {}, frozen_statistics=frozen), range(count))
            try:
                shared = run(watched)
                yield from ([None if t is None else t[k] for t in shared] for k in range(count))
                return
            except Exception as error:
                cause = error.__cause__ or error
                if transaction.raised or (
                    cause is not watched.failure
                    and not isinstance(cause, (torch.OutOfMemoryError, MemoryError, NotImplementedError))
                ):
                    raise
                together = False
        for lane in range(count):
            yield run(prepared(tangents, FastEngine(frozen_statistics=frozen), [lane]))

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
        positions = None if est.discount is None else positions_of(found, graph, push, seed, known)
    except _Carried as carried:
        raise carried.error from None
    asleep = witness.asleep if known is None else witness.asleep & known.asleep
    unproven = analysis.upstream(v for c in asleep for v in analysis.tape.calls[c].sources)
    coupled = frozenset(found.coupled)
    return replace(
        found,
        positions=positions,
        asleep=asleep,
        unproven=tuple(site.index for site in sites if site.value in unproven and site.index not in coupled),
    )


def positions_of(found: Found, graph: SiteGraph, push: Push, seed: int, known: Found | None) -> Positions | None:
    """Search for the positions of the loss. Every site counts, coupled or not."""
    earlier = known.positions if known is not None and known.layouts == found.layouts else None
    return find_positions(graph.sites, graph.cuts, found, push, seed, earlier)


class _Carried(Exception):
    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def mixing_of(
    est: Estimation,
    closure: Callable[[], Any],
    analysis: Analysis,
    graph: SiteGraph,
    found: Found,
    transaction: Transaction,
) -> str:
    """The operation after which the examples of the last coupled site interact; "" if none was found. The search takes
    one run of the closure; batch normalisation is found without a run."""
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

    def guess(site: Site, s: Tensor, values: dict[int, Tensor]) -> Guess | None:
        if site.index != last.index:
            return None
        noise = torch.randn(s.shape, generator=generator).to(s)
        return Guess(noise.mul_(layout.spread(moving.to(s), tuple(s.shape))))

    engine = FastEngine(frozen_statistics=est.frozen_statistics)
    watched = WatchedRun(est.ids, graph, engine, guess, {}, transaction, keeps=False)
    watched.watch = mixing.watch
    try:
        watched.execute(closure, est.by_position)
    except GraphMismatch as departure:
        raise unstable(departure) from None
    finally:
        transaction.rewind()
    if mixing.call is None:
        return ""
    index, shape = mixing.call
    return f"{analysis.tape.calls[index].op} (its output: {list(shape)})"


def constant_calls(analysis: Analysis, sites: Sequence[Site], found: Found) -> frozenset[int]:
    """Calls that read a parameter and another tensor but hold no examples, such as ``F.embedding(arange(T), W)``. Such
    calls are expressions of parameters. Their shape has no batch dimension. If T = N, the shape cannot tell; then the
    values computed from the call decide: all of them must hold the examples apart."""
    if found.batch <= 1:
        return frozenset()
    apart = {v for v, layout in (found.ends | found.layouts).items() if layout is not Layout.COUPLED}

    def holds_none(site: Site) -> bool:
        fits = Layout.candidates(site.shape, found.batch)[0] is not Layout.COUPLED
        return not fits or (site.value not in apart and analysis.leads_to(site.value, sites) <= apart)

    return frozenset(site.call.index for site in sites if may_hold_no_examples(analysis, site) and holds_none(site))


def may_hold_no_examples(analysis: Analysis, site: Site) -> bool:
    """Whether the site's output depends on parameters, indices and masks alone."""
    reads_network = any(v in analysis.active for v in site.call.inputs)
    return not reads_network and site.cut is None and _is_about_parameters(analysis.tape, site)


def _is_about_parameters(tape: Tape, site: Site) -> bool:
    """Whether the call looks up parameters by index, or masks them. Its other tensors are then no batch of inputs."""
    mine = tape.mine[site.call.index]
    others = [v for k, v in enumerate(site.call.inputs) if k not in mine]
    masked = any(tape.shapes[site.call.inputs[k]] == site.shape for k in mine)
    return masked or not any(is_differentiable(tape.dtypes[v]) for v in others)


def probe_again(est: Estimation, plan: Plan, closure: Callable[[], Any], transaction: Transaction) -> None:
    """Probe again. A tangent that could not reach the loss before (a zero-initialised head) may reach the loss now."""
    assert plan.analysis is not None
    graph = plan.graph
    assert plan.found is not None
    found = layouts_of(
        est, closure, plan.analysis, plan.sites, transaction, plan.given, plan.uses, plan.found, plan.together
    )
    changed = found.places != plan.found.places
    plan.found = found
    if changed:
        new = site_graph(
            plan.analysis, plan.sites, found.layouts, found.batch, chain=plan.stream, ends=found.ends,
            positions=found.positions,
        )  # fmt: skip
        constants = {**new.constants, **graph.constants}  # the tape has forgotten its batch
        plan.graph = replace(new, constants=constants, constant_values=graph.constant_values)
        plan.assignments = None
    plan.due = False


def _forget_tensors(tape: Tape) -> None:
    """Free the batch: later probes need the analysis, not the tensors."""
    tape.expressions.clear()
    tape.writes.let_go()
    tape.outside = {v: t for v, t in tape.outside.items() if isinstance(t, torch.nn.Parameter)}
