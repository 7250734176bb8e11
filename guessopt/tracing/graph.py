"""From a tape to a ``SiteGraph``.

The idea: a recorded run tells everything that a forward-mode pass needs to know, before any tangent exists. Three steps
find it out.

1. *Match* (``match``, ``analysis``). Follow derivatives from the loss back to the parameters. The last calls, back to
   the first matrix site or parameter, are the loss. The values that they read are the *cuts*: the network ends there,
   and ordinary reverse mode gives the exact error ``dL/dv``. Every other call that reads trainable parameters is a
   *site*: its output gets a guess.
2. *Verify* (``verify``). A guess is better if it knows the way from its site to the next matrix site. That way can be
   run by itself if no call of it writes into memory that other tensors share. A bias added right after a site has the
   site's cotangent. A residual network is a chain of blocks (``residual``).
3. *Extract* (``extract``, this module). Copy the findings into plain records (``guessopt.graph``, ``guessopt.sites``).
   A run then needs no search: the graph lists, call by call, which tensors to save, keep, note and release.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from guessopt.chains import ResidualChain
from guessopt.graph import Cut, Kind, Outside, Positions, SiteGraph, Watched
from guessopt.layout import Layout, Shape
from guessopt.sites import Call, Influence, ParallelSites, Segment, Site, values_needed
from guessopt.tracing.analysis import Analysis
from guessopt.tracing.match import is_complex, matrix_call
from guessopt.tracing.residual import Network
from guessopt.tracing.tape import Tape
from guessopt.tracing.verify import is_outnumbered, program


def site_graph(
    analysis: Analysis,
    sites: Sequence[Site],
    layouts: Mapping[int, Layout],
    batch: int,
    *,
    segments: bool = True,
    chain: bool = False,
    ends: Mapping[int, Layout] | None = None,
    positions: Positions | None = None,
) -> SiteGraph:
    """Copy what an analysis has found into a ``SiteGraph``.

    Args:
        sites: found by ``sites_of``.
        layouts: of each site's value; coupled where missing.
        batch: N.
        segments: whether guesses will need the segments.
        chain: whether an estimator asks for the residual chain.
        ends: layouts of the cuts' values; None: ``layouts`` holds these too.
        positions: where the positions of the loss lie.
    """
    tape = analysis.tape
    cuts = tuple(_cut(analysis, v, (ends or layouts).get(v, Layout.COUPLED)) for v in analysis.cut_values)
    final = tuple(_laid_out(analysis, site, sites, cuts, layouts, batch) for site in sites)
    if positions is not None:
        cuts = tuple(replace(cut, position_dim=positions.ends.get(cut.value)) for cut in cuts)
        final = tuple(
            replace(
                site,
                position_dim=positions.dims.get(site.value),
                influence=positions.influence.get(site.value, Influence.ALL),
            )
            for site in final
        )
    found = _residual_chain(analysis, final, batch) if chain and batch > 1 else None
    keeping = _keeping(tape, final, found) if segments else Keeping({}, {}, {})
    by_loss = _expressions_of_loss(analysis)
    return SiteGraph(
        calls=tuple(tape.calls),
        kinds=_kinds(analysis, sites),
        reads=tuple(tape.origins),
        mine=tuple(tape.mine),
        outside=_outside(tape),
        active=frozenset(analysis.active),
        overwritten=frozenset(tape.overwritten),
        sites=final,
        cuts=cuts,
        batch=batch,
        positions=0 if positions is None else positions.count,
        mutations=dict(tape.writes.found),
        rewritten=tape.rewritten,
        hidden=tape.writes.hidden,
        watch=keeping.watch,
        release=keeping.release,
        constants=keeping.constants,
        constant_values=frozenset(keeping.constants),
        ahead=_calls_ahead(final) if segments else frozenset(),
        returned=analysis.returned,
        loss_params=frozenset().union(*(tape.origins[c] for c in by_loss)),
        keeps_graph=any(tape.kinds[c] is Kind.EXPRESSION for c in by_loss),
        stopped_params=frozenset(tape.stopped),
        answers=tuple(tape.answers),
        cost=analysis.cost(),
        shared_writes=_shared_writes(analysis),
        blocked={site.index: analysis.blocked[site.value] for site in sites if site.value in analysis.blocked},
        chain=found,
        joints=_parallel_sites(tape, final) if segments else (),
        without_forward=analysis.without_forward,
    )


# --- calls ------------------------------------------------------------------------------------------------------------


def _kinds(analysis: Analysis, sites: Sequence[Site]) -> tuple[Kind, ...]:
    calls_of_sites = {site.call.index for site in sites}
    return tuple(_kind(analysis, call, call.index in calls_of_sites) for call in analysis.tape.calls)


def _kind(analysis: Analysis, call: Call, has_site: bool) -> Kind:
    tape, kind = analysis.tape, analysis.tape.kinds[call.index]
    if call.index in analysis.loss:
        return Kind.LOSS
    if kind not in (Kind.SITE, Kind.PLAIN) or has_site:
        return kind
    if returned := analysis.active.intersection(call.inputs, call.outputs):
        # It handed back its argument, and may hand back a copy next time: derivatives must pass.
        return Kind.LOSS if all(tape.producer[v] in analysis.loss for v in returned) else Kind.PLAIN
    reached = not analysis.active.isdisjoint(call.inputs)
    return Kind.IDLE if reached and call.index not in analysis.useful else Kind.PLAIN


def _shared_writes(analysis: Analysis) -> tuple[str, ...]:
    """Operations of the network that write into memory which other tensors share."""
    calls = (call for call in analysis.tape.calls if call.in_place and call.aliases and call.index not in analysis.loss)
    return tuple(call.op for call in calls if not analysis.active.isdisjoint((*call.inputs, *call.outputs)))


def _expressions_of_loss(analysis: Analysis) -> set[int]:
    """The loss's calls, and the expressions of parameters alone that it reads."""
    tape, found = analysis.tape, set(analysis.loss)
    stack = [analysis.returned, *(v for c in analysis.loss for v in tape.calls[c].inputs)]
    while stack:
        c = tape.producer.get(stack.pop())
        if c is not None and c not in found and tape.kinds[c] is Kind.EXPRESSION:
            found.add(c)
            stack += tape.calls[c].inputs
    return found


def _calls_ahead(sites: Sequence[Site]) -> frozenset[int]:
    """The calls that segments make before the closure does."""
    segments = [site.segment for site in sites if site.segment is not None]
    return frozenset(
        call.index
        for segment in segments
        for calls in (segment.elementwise or (), segment.program, segment.weight_program, _onward(segment))
        for call in calls
    )


def _onward(segment: Segment) -> list[Call]:
    return [call for way in segment.onward for call in way.program]


# --- values -----------------------------------------------------------------------------------------------------------


def _outside(tape: Tape) -> dict[int, Outside]:
    weights = {m.weight for call in tape.calls if (m := matrix_call(tape, call)) is not None}
    return {
        v: Outside(tape.shapes[v], tape.dtypes[v], tape.parameters.get(v), v in weights and v not in tape.parameters)
        for v in tape.first_use
    }


def _cut(analysis: Analysis, v: int, layout: Layout) -> Cut:
    shared = any(u not in analysis.loss for u in analysis.users(v))
    return Cut(v, analysis.tape.shapes[v], layout, shared, overwritten_later=v in analysis.tape.overwritten)


class Keeping(NamedTuple):
    """What a run keeps for segments and for the residual chain; see the fields of ``SiteGraph``."""

    watch: dict[int, tuple[Watched, ...]]
    release: dict[int, tuple[int, ...]]
    constants: dict[int, Tensor]


def _keeping(tape: Tape, sites: Sequence[Site], chain: ResidualChain | None) -> Keeping:
    """Where each value that segments or the chain need first appears, and after which call nothing needs it."""
    first: dict[int, int] = {}  # value -> call of the first site that needs it
    last: dict[int, int] = {}  # value -> call of the last site that needs it; -1: it is needed after the run
    for site in sites:
        if site.segment is not None and site.shares is None:
            needed = _needed(site.segment)
            last.update(dict.fromkeys(needed, site.call.index))
            first = dict.fromkeys(needed, site.call.index) | first
    if chain is not None:
        last.update(dict.fromkeys((*chain.shapes, *chain.read), -1))
    watch: dict[int, list[Watched]] = {}
    release: dict[int, list[int]] = {}
    constants: dict[int, Tensor] = {}
    for v in sorted(last):
        if v in tape.producer:
            call = tape.calls[tape.producer[v]]
            watch.setdefault(call.index, []).append(Watched("out", call.outputs.index(v), v))
        else:
            call_index, position = tape.first_use[v]
            if v in tape.outside and (v in tape.weights or call_index > first.get(v, call_index)):
                constants[v] = tape.outside[v]  # a later graph of the same tape takes over what an earlier one held
            if v in tape.weights:
                continue
            watch.setdefault(call_index, []).append(Watched("in", position, v))
        if last[v] >= 0:
            release.setdefault(last[v], []).append(v)
    return Keeping(
        {c: tuple(entries) for c, entries in watch.items()},
        {c: tuple(values) for c, values in release.items()},
        constants,
    )


def _needed(segment: Segment) -> set[int]:
    """Values that a segment and the ways onward from it read and do not make."""
    calls = (*segment.program, *segment.weight_program, *_onward(segment))
    return values_needed(calls, segment.weights) - {segment.source}


# --- sites ------------------------------------------------------------------------------------------------------------


def _laid_out(
    analysis: Analysis,
    site: Site,
    sites: Sequence[Site],
    cuts: tuple[Cut, ...],
    layouts: Mapping[int, Layout],
    batch: int,
) -> Site:
    """The site with all that depends on where its examples lie."""
    layout = layouts.get(site.value, Layout.COUPLED)
    return replace(
        site,
        layout=layout,
        cut=None if site.cut is None or cuts[site.cut].shared else site.cut,
        by_parameter=is_outnumbered(analysis, site, sites, layout, batch),
        direction_shapes=_direction_shapes(analysis.tape, site, 1 if layout is Layout.COUPLED else batch),
    )


def _direction_shapes(tape: Tape, site: Site, examples: int) -> tuple[Shape, ...]:
    return tuple((examples, *tape.shapes[site.call.inputs[k]]) for k in tape.mine[site.call.index])


def _parallel_sites(tape: Tape, sites: Sequence[Site]) -> tuple[ParallelSites, ...]:
    """Sites of linear layers with one input, one layout and one next matrix site, on the way to which they meet."""
    groups: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        m, segment = matrix_call(tape, site.call), site.segment
        if m is None or m.geometry != "linear" or segment is None or site.shares is not None:
            continue
        alone = segment.elementwise is not None or site.overwritten or site.call.in_place
        if not (alone or site.by_parameter or any(other.shares == site.index for other in sites)):
            key = (m.x, segment.matrices[0].x, site.layout, site.shape[:-1], site.dtype)
            groups.setdefault(key, []).append(site)
    return tuple(_joined(tape, group) for group in groups.values() if len(group) > 1)


def _joined(tape: Tape, sites: Sequence[Site]) -> ParallelSites:
    first, *rest = sites
    assert first.segment is not None
    others = program(tape, first.value, [site.value for site in rest])
    done = {call.index for call in others}
    calls = tuple(call for call in first.segment.program if call.index not in done)
    return ParallelSites(tuple(site.index for site in sites), tuple(site.value for site in sites), others, calls)


def _residual_chain(analysis: Analysis, sites: tuple[Site, ...], batch: int) -> ResidualChain | None:
    """The network as a chain of residual blocks. None for complex values, and where a state does not hold examples."""
    tape, calls = analysis.tape, tuple(sorted(analysis.useful - analysis.loss))
    if is_complex(tape, *analysis.cut_values, *(site.value for site in sites)):
        return None
    matrices = frozenset(
        c for c in calls if (m := matrix_call(tape, tape.calls[c])) is not None and m.x in analysis.active
    )
    found = Network(tape, calls, tuple(analysis.cut_values), matrices).chain(sites)
    if found is None or is_complex(tape, *found.shapes):
        return None
    if any(Layout.candidates(s, batch)[0] is Layout.COUPLED for s in found.shapes.values()):
        return None
    return replace(found, overwritten_later=found.read & tape.overwritten)
