"""Closure to plan: trace, find the examples, and keep the result for the runs that follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guessopt.engine.forward import Departure, Pass
from guessopt.engine.levels import Level
from guessopt.engine.probe import Found, find_layouts
from guessopt.engine.transaction import Transaction
from guessopt.errors import ClosureError
from guessopt.sites import Joint, Layout, Site, SiteGraph
from guessopt.tracing.graph import Analysis
from guessopt.tracing.tape import Tape


@dataclass
class Plan:
    """A graph in use. ``loss``: of the trace, until a pass has confirmed it within ``tolerance``; ``uses``: passes so
    far; ``stacks``: whether K guesses share a pass (None: not known yet); ``ways``: see ``StackedLevel``; ``joints``:
    sites that are guessed as one, by the first one's index; ``keeps_graphs``: whether a pass may leave the stream's
    blocks with reverse graphs, as far as is known."""

    graph: SiteGraph
    analysis: Analysis | None
    sites: tuple[Site, ...]
    coupled_before: frozenset[int]
    given: int | None
    loss: Tensor | None
    uses: int = 0
    tolerance: float = 0.0
    guesses: dict[int, Any] | None = None
    normalises_batch: bool = False
    alive: bool = False
    routes: bool = False
    compiled: bool = False
    stacks: bool | None = None
    ways: dict[int, bool] = field(default_factory=dict)
    stream: bool = False
    keeps_graphs: bool = True
    joints: dict[int, Joint] = field(default_factory=dict)
    #: What a ``Transaction`` has to watch beside what it finds by itself.
    modules: tuple[torch.nn.Module, ...] = ()
    elsewhere: tuple[Tensor, ...] = ()


def trace(
    closure: Callable[[], Any],
    params: Mapping[int, Tensor],
    ids: Mapping[int, int],
    names: Sequence[str],
    make_level: Callable[[], Level],
    transaction: Transaction,
    *,
    finite: bool,
    stream: bool = False,
) -> Plan:
    """Run the closure, as often as it takes to know it, leaving everything as it was.

    Args:
        stream: whether an estimator asks for the residual stream.

    Raises:
        ClosureError: what it returns is no loss, or no parameter has a part in it.
    """
    as_expression: frozenset[int] = frozenset()
    transaction.watch(closure)
    changing: dict[int, torch.nn.Module] = {}
    while True:
        tape = Tape(ids, as_expression, transaction.save)
        with transaction.finding() as modules:
            loss = tape.run(closure)
        # F.embedding scales rows to its max_norm where it reads them, and once more changes nothing.
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
            found = layouts_of(closure, analysis, sites, params, ids, make_level, transaction, given)
        except Departure:
            raise unstable() from None
        constant = constant_calls(analysis, sites, found)
        if constant <= as_expression:
            break
        as_expression |= constant
    graph = analysis.graph(sites, found.layouts, found.batch, stream=stream)
    if not graph.sites and not graph.loss_params:
        raise ClosureError(independent(names, graph))
    plan = Plan(graph, None, tuple(sites), frozenset(), given, loss.detach().mean())
    plan.tolerance = precision(analysis)
    plan.modules, plan.elsewhere = tuple(changing.values()), tuple(tape.writes.elsewhere)
    plan.alive, plan.stream = found.alive, stream
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
    make_level: Callable[[], Level],
    transaction: Transaction,
    given: int | None,
    seed: int = 0,
    known: tuple[int, dict[int, Layout]] | None = None,
) -> Found:
    """Probe the closure for where its examples lie."""
    graph = analysis.graph(list(sites), {}, 1, segments=False)
    frozen = make_level().frozen_statistics

    def push(tangents: dict[int, Callable[[Tensor], Tensor]]) -> list[Tensor | None]:
        def guess(site: Site, s: Tensor, values: dict[int, Tensor]) -> Tensor | None:
            return tangents[site.index](s) if site.index in tangents else None

        run = Pass(ids, graph, make_level(), guess, {}, transaction, keeps=False)
        try:
            return run.execute(closure, params).tangents
        finally:
            transaction.rewind()

    return find_layouts(
        sites,
        graph.cuts,
        push,
        given=given,
        coupled=frozenset() if frozen else frozenset(analysis.coupled_by_batch_norm()),
        seed=seed,
        known=known,
    )


def constant_calls(analysis: Analysis, sites: Sequence[Site], found: Found) -> frozenset[int]:
    """Calls that read a parameter and another tensor but hold no examples (``F.embedding(arange(T), W)``): parameter
    expressions after all. Their shape tells, or (T = N) that examples are apart again in what is made of them."""
    if found.batch <= 1:
        return frozenset()
    apart = {v for v, layout in found.layouts.items() if layout is not Layout.COUPLED}

    def holds_none(site: Site) -> bool:
        fits = Layout.candidates(site.shape, found.batch)[0] is not Layout.COUPLED
        return not fits or (site.value not in apart and analysis.leads_to(site.value, sites) <= apart)

    return frozenset(
        site.call.index
        for site in sites
        if not any(v in analysis.active for v in site.call.inputs)
        and site.cut is None
        and _is_about_parameters(analysis.tape, site)
        and holds_none(site)
    )


def _is_about_parameters(tape: Tape, site: Site) -> bool:
    """Looking parameters up by index, or masking them: what else there is in the call can be no batch of inputs."""
    mine = tape.mine[site.call.index]
    others = [v for k, v in enumerate(site.call.inputs) if k not in mine]
    masked = any(tape.shapes[site.call.inputs[k]] == site.shape for k in mine)
    return masked or not any(tape.dtypes[v].is_floating_point for v in others)


def reprobe(
    plan: Plan,
    closure: Callable[[], Any],
    params: Mapping[int, Tensor],
    ids: Mapping[int, int],
    make_level: Callable[[], Level],
    transaction: Transaction,
) -> None:
    """Look again: a site whose tangents could not reach the loss (a zero-initialised head) may have come alive."""
    assert plan.analysis is not None
    graph = plan.graph
    known = {site.value: site.layout for site in graph.sites} | {cut.value: cut.layout for cut in graph.cuts}
    found = layouts_of(
        closure,
        plan.analysis,
        plan.sites,
        params,
        ids,
        make_level,
        transaction,
        plan.given,
        plan.uses,
        (graph.batch, known),
    )
    plan.alive = plan.alive or found.alive
    if found.layouts != known:
        new = plan.analysis.graph(list(plan.sites), found.layouts, found.batch, stream=plan.stream)
        plan.graph = replace(new, constants=graph.constants)
        plan.guesses = None


def is_due_for_probe(plan: Plan) -> bool:
    """Before the next three passes; then before the eighth, 16th, ... while nothing has reached the loss; always where
    the data decide which rows go where."""
    uses = plan.uses
    if plan.analysis is None or uses == 0:
        return False
    return plan.routes or uses <= 3 or (uses & (uses + 1) == 0 and not plan.alive)


def _forget_tensors(tape: Tape) -> None:
    """The analysis stays for later probes; the batch that it was made from need not."""
    tape.expressions.clear()
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
        raise ClosureError(f"the closure returned a loss of dtype {loss.dtype}; it must be a floating-point tensor")
    if loss.is_inference():
        raise ClosureError(
            "the loss was made inside torch.inference_mode(), where derivatives are silently lost; remove it"
        )


def check_finite(loss: Tensor, d: Tensor | None = None) -> None:
    """Raise ``ClosureError`` unless the loss (and the directional derivatives) are finite. One host sync."""
    if loss.numel() == 0:
        raise ClosureError("the closure returned no losses (shape [0]): the batch is empty; skip it")
    both = loss.sum() if d is None else loss.sum() + d.sum().to(loss.device)
    if bool(torch.isfinite(both)):
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
    for site in sites:
        if 0 in site.shape:
            raise ClosureError(
                f"the batch is empty: {site.op} gave an output of shape {list(site.shape)}; skip such a batch"
            )


def independent(names: Sequence[str], graph: SiteGraph) -> str:
    few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    why = " (they are read only under torch.no_grad() or through detach())" if graph.stopped_params else ""
    return (
        f"the loss does not depend on any parameter handed to the optimizer ({few}){why}; return the loss itself, "
        "computed from the model inside the closure, not a detached copy"
    )


def unstable() -> ClosureError:
    return ClosureError(
        "the closure does not repeat: run twice with the same random state it made different torch calls; compute the "
        "loss from fixed inputs (draw the batch outside the closure, and keep caches out of it)"
    )


def precision(analysis: Analysis) -> float:
    """Relative difference that rounding may make between two runs by different kernels, in the closure's lowest
    precision."""
    dtypes = {analysis.tape.dtypes[v] for v in analysis.active}
    return max(1e-4, *(4 * torch.finfo(dtype).eps for dtype in dtypes)) if dtypes else 1e-4


def check_repeats(first: Tensor, second: Tensor, tolerance: float) -> None:
    """Raise ``ClosureError`` if two runs from the same random state gave different losses."""
    a, b = first.double(), second.detach().double()
    if not bool(torch.isfinite(a)):
        return
    if not torch.allclose(a, b, rtol=tolerance, atol=1e-6):
        raise ClosureError(
            f"the closure does not repeat: a second pass from the same random state gave the loss {b.item():.6g} in "
            f"place of {a.item():.6g}; draw the batch outside the closure and use torch's, numpy's or random's "
            "global generators"
        )


def warn_of_coupling(plan: Plan, warn: Callable[[str], None]) -> None:
    """One warning if examples interact, or cannot be told apart."""
    graph = plan.graph
    coupled = [s for s in graph.sites if s.layout is Layout.COUPLED and s.shares is None and s.cut is None]
    if graph.batch > 1 and coupled:
        ops = ", ".join(sorted({site.op for site in coupled}))
        warn(
            f"examples interact after {len(coupled)} of {len(graph.sites)} sites ({ops}), as batch normalisation in "
            "training mode makes them: these sites take the scalar derivative of the whole batch, which is valid "
            "but far noisier"
        )
    elif graph.batch == 1 and any(s.shape and s.shape[0] > 1 for s in graph.sites):
        warn(
            "the closure's examples could not be told apart: every site takes the scalar derivative, which is valid "
            "but far noisier; keep the batch in the first or second dimension"
        )
