"""Checks: what can be relied upon before a part of the network is used by itself."""

from __future__ import annotations

from collections.abc import Sequence

from guessopt.layout import Layout, numel
from guessopt.ops.elementwise import is_elementwise
from guessopt.sites import Call, Site
from guessopt.tracing.analysis import Analysis
from guessopt.tracing.match import is_complex, is_plain_addition
from guessopt.tracing.tape import Tape

#: Entries of an example's output for each entry of the parameters, from which on the parameters are guessed instead.
MIN_OUTPUT_PER_PARAMETER = 4


class SharedMemory(Exception):
    """A part of the network writes into memory that other tensors share, so it cannot be run by itself."""


def program(tape: Tape, source: int, goals: Sequence[int]) -> tuple[Call, ...]:
    """The calls, in order, that compute the goals from the source and from values older than the source.

    Raises:
        SharedMemory: one of the calls writes into memory that other tensors share.
    """
    start, calls = tape.producer[source], set[int]()
    stack = list(goals)
    while stack:
        v = stack.pop()
        c = tape.producer.get(v)
        if v == source or c is None or c in calls or (c <= start and v not in tape.aliased):
            continue
        if tape.calls[c].aliases or v in tape.aliased:
            raise SharedMemory(f"{tape.calls[c].op} writes into memory that other tensors share")
        calls.add(c)
        stack += tape.calls[c].inputs
    return tuple(tape.calls[c] for c in sorted(calls))


def elementwise_chain(tape: Tape, source: int, x: int) -> tuple[Call, ...] | None:
    """The calls from ``source`` to ``x`` if all of them are real, unary and elementwise; None otherwise."""
    chain, v = [], x
    while v != source:
        c = tape.producer.get(v)
        if c is None:
            return None
        call = tape.calls[c]
        if len(call.inputs) != 1 or call.aliases or call.held or not is_elementwise(call.fn) or is_complex(tape, v):
            return None
        if tape.shapes[call.inputs[0]] != tape.shapes[v]:
            return None
        chain.append(call)
        v = call.inputs[0]
    return tuple(reversed(chain))


def follower(analysis: Analysis, site: Site, sites: Sequence[Site]) -> Site | None:
    """The site that adds a bias right after this one, and so has the same cotangent; None where there is none."""
    users = analysis.users(site.value)
    if len(users) != 1 or site.value in analysis.cut_values:
        return None
    call = analysis.tape.calls[users[0]]
    found = next((other for other in sites if other.call is call), None)
    if found is None or not is_plain_addition(call) or found.shape != site.shape:
        return None
    return found if found.dtype.is_complex is site.dtype.is_complex else None


def is_outnumbered(analysis: Analysis, site: Site, sites: Sequence[Site], layout: Layout, batch: int) -> bool:
    """Whether each example's own parameters are to be guessed in place of its output.

    They are if the output has ``MIN_OUTPUT_PER_PARAMETER`` times as many entries as the parameters, and if per-example
    parameters broadcast against the output.
    """
    if not site.rule.has_parameter_tangent or site.shares is not None or any(s.shares == site.index for s in sites):
        return False
    tape = analysis.tape
    shapes = [tape.shapes[site.call.inputs[k]] for k in tape.mine[site.call.index]]
    dims = len(site.shape) - (2 if layout is Layout.BATCH_SECOND else 1)
    if site.rule.channels_second:
        dims -= len(site.shape) - 2
    fits = all(len(shape) <= dims or (len(shape) <= dims + 1 and shape[:1] == (1,)) for shape in shapes)
    entries = numel(site.shape) // (1 if layout is Layout.COUPLED else batch)
    return fits and entries >= MIN_OUTPUT_PER_PARAMETER * sum(numel(shape) for shape in shapes)
