"""Sites and segments: where parameters meet activations, and the way from there to the next matrix site(s)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from guessopt.graph import Kind
from guessopt.layout import numel
from guessopt.ops.base import Rule, op_of
from guessopt.ops.elementwise import fused_pull_back, is_rectifier
from guessopt.sites import MAX_DOWNSTREAM_SITES, Call, DownstreamPath, Matrix, Segment, Site
from guessopt.tracing.analysis import Analysis
from guessopt.tracing.functions import dense
from guessopt.tracing.match import MatrixCall, is_complex, joined_span
from guessopt.tracing.tape import Tape
from guessopt.tracing.verify import SharedMemory, elementwise_chain, follower, program

#: Serves operations on complex numbers by torch's own derivative. The other rules are written for real numbers.
_GENERIC = Rule()


def sites_of(analysis: Analysis) -> list[Site]:
    """Every output, of a call that reads trainable parameters, from which a derivative reaches the loss; in order."""
    tape = analysis.tape
    found: list[Site] = []
    for c in sorted(analysis.useful - analysis.loss):
        if tape.kinds[c] is Kind.SITE:
            call = tape.calls[c]
            found += [_site(analysis, call, k, len(found) + n) for n, k in enumerate(_outputs(analysis, call))]
    return [_with_follower(analysis, site, found) for site in found]


def _outputs(analysis: Analysis, call: Call) -> list[int]:
    """Positions of the call's results that are sites. A write makes its target one if anything of it is read."""
    read = {v for v in call.outputs if v in analysis.cut_values or analysis.users(v)}
    results = call.outputs[: call.result_count]
    return [k for k, v in enumerate(results) if v in analysis.active and (v in read or (call.in_place and read))]


def _site(analysis: Analysis, call: Call, output: int, index: int) -> Site:
    tape, v = analysis.tape, call.outputs[output]
    return Site(
        index=index, call=call, output=output, value=v,
        rule=_GENERIC if is_complex(tape, *call.inputs, *call.outputs) else op_of(call.fn).rule,
        params=tuple(sorted(tape.origins[call.index])), shape=tape.shapes[v], dtype=tape.dtypes[v],
        segment=_segment(analysis, v), overwritten=v in tape.overwritten, reach=joined_span(tape, call),
        kept=_kept_bytes(tape, call, v),
    )  # fmt: skip


def _kept_bytes(tape: Tape, call: Call, output: int) -> int:
    """Bytes that a run keeps for a site: its activations, and the guess (not the parameters)."""
    values = {v for v in call.inputs if v not in tape.weights} | {output}
    return sum(numel(tape.shapes[v]) * tape.dtypes[v].itemsize for v in values)


def _with_follower(analysis: Analysis, site: Site, sites: Sequence[Site]) -> Site:
    """The site with ``shares`` and ``cut``: a bias added right after a site has the same cotangent, so that one guess,
    at the later of the two, serves both."""
    shared = follower(analysis, site, sites)
    end = site if shared is None else shared
    cut = analysis.cut_values.index(end.value) if end.value in analysis.cut_values else None
    return replace(site, shares=None if shared is None else shared.index, cut=cut)


# --- the way to the next matrix site(s) -------------------------------------------------------------------------------


def _segment(analysis: Analysis, source: int) -> Segment | None:
    """The way from a site's output to the first matrix site that it reaches, and the sites parallel to that one. None
    where no matrix site follows, or where the way cannot be run by itself (``Analysis.blocked`` then says why)."""
    tape, x = analysis.tape, analysis.next_input([source])
    if x is None:
        return None
    readers = analysis.readers(x)
    if is_complex(tape, source, x, *(m.weight for m in readers)):
        analysis.blocked[source] = "its output, or the next layer, is complex"
        return None
    matrices = _matrices(analysis, readers)
    chain = elementwise_chain(tape, source, x)
    try:
        return Segment(
            source, matrices, chain,
            program=program(tape, source, [x]) if chain is None else (),
            weight_program=program(tape, source, [w for m in matrices for w in m.weights]),
            fused=None if chain is None else fused_pull_back(chain),
            rectified=chain is not None and is_rectifier(chain),
            onward=_downstream(analysis, source, x),
        )  # fmt: skip
    except SharedMemory as error:
        analysis.blocked[source] = str(error)
        return None


def _matrices(analysis: Analysis, readers: Sequence[MatrixCall]) -> tuple[Matrix, ...]:
    """The matrix sites that read one input; those whose weights can be stacked are one."""
    shapes = analysis.tape.shapes
    groups: dict[str, list[MatrixCall]] = {}
    for m in readers:
        inner = shapes[m.weight][1:] if m.geometry != "linear" else ()
        groups.setdefault(f"{m.geometry} {inner}", []).append(m)
    return tuple(
        Matrix(
            rule=group[0].rule, call=group[0].call, weights=tuple(m.weight for m in group),
            weight_shapes=tuple(shapes[m.weight] for m in group), x=group[0].x, x_shape=shapes[group[0].x],
            key=";".join(_weight_key(analysis, m.weight) for m in group),
        )
        for group in groups.values()
    )  # fmt: skip


def _downstream(analysis: Analysis, source: int, x: int) -> tuple[DownstreamPath, ...]:
    """The ways from a site's output through 1, 2, ... matrix sites (Singhal eq. 7); ``x``: the first one's input."""
    tape = analysis.tape
    found: list[DownstreamPath] = []
    following: int | None = x
    while following is not None and len(found) < MAX_DOWNSTREAM_SITES:
        outputs = [o for m in analysis.readers(following) for o in m.call.outputs]
        following = analysis.next_input(outputs)
        goals = outputs if following is None else [following]
        if is_complex(tape, *goals):
            break
        try:
            calls = program(tape, source, goals)
        except SharedMemory:
            break
        found.append(DownstreamPath(tuple(goals), tuple(tape.shapes[v] for v in goals), calls))
    return tuple(found)


def _weight_key(analysis: Analysis, w: int) -> str:
    """Names a weight across traces: by its parameter's position, by the parameters of which it is an expression, or by
    the numbers of a weight that does not train."""
    tape, shape = analysis.tape, list(analysis.tape.shapes[w])
    if w in tape.parameters:
        return f"param {tape.parameters[w]}"
    if w in tape.outside:
        return f"constant {shape} {_fingerprint(tape.outside[w])}"
    origin, numbers = sorted(tape.origins[tape.producer[w]]), analysis.expression_numbers
    return f"expression of {origin} {shape} {numbers.setdefault((tuple(origin), w), len(numbers))}"


def _fingerprint(t: Tensor) -> str:
    """The sum of about a thousand entries."""
    with torch.no_grad():
        numbers = dense(t.detach()).flatten()
        return f"{float(numbers[:: max(numbers.numel() // 1024, 1)].double().sum()):.6g}"
