"""A network as a chain of residual blocks.

A *state* is a value through which every derivative from earlier values reaches the loss. The states divide the network
into a chain of blocks. In a residual network most blocks have a *skip*: a way from state to state without a matrix site
(the identity, a rectifier after the addition, a strided slice with padding), or with a single one beside longer ways (a
projection).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import reduce

from torch import Tensor

from guessopt.chains import Block, ResidualChain
from guessopt.ops.base import op_of
from guessopt.ops.drawing import draws_now
from guessopt.sites import Call, Site
from guessopt.tracing.tape import Tape

#: Matrix sites on the longest way through a block, at most. A deeper block would be a network of its own.
MAX_BLOCK_DEPTH = 6

#: Additions that write into their first operand.
_IN_PLACE = {Tensor.add_, Tensor.__iadd__}


@dataclass(frozen=True)
class Network:
    """The part of a tape in which the blocks are searched.

    Attributes:
        calls: the network's calls in order: those through which a derivative reaches the loss, without the loss's own.
        cuts: the values that the loss reads.
        matrices: the calls that are matrix sites.
    """

    tape: Tape
    calls: tuple[int, ...]
    cuts: tuple[int, ...]
    matrices: frozenset[int]

    def chain(self, sites: tuple[Site, ...]) -> ResidualChain | None:
        """The network as a chain of blocks.

        None if no block has a skip around a matrix site, if a block is too deep, if the head has more than one matrix
        site, if a site lies outside of the chain, or if the loss reads no activation.
        """
        tape = self.tape
        if not self.cuts or any(tape.calls[c].aliases or tape.calls[c].held for c in self.calls):
            return None
        blocks = _merged(self._pieces())
        if len(blocks) < 2 or not any(block.matrices and self._is_free(block.skip) for block in blocks[:-1]):
            return None
        if blocks[-1].matrices > 1 or any(block.matrices > MAX_BLOCK_DEPTH for block in blocks):
            return None
        inside = [{o for call in block.program for o in call.outputs} | set(block.entries) for block in blocks]
        own = [site for site in sites if site.shares is None]
        if not all(any(site.value in values for values in inside) for site in own):
            return None
        return ResidualChain(
            tuple(
                replace(_trimmed(block), sites=tuple(site.index for site in own if site.value in values))
                for block, values in zip(blocks, inside, strict=True)
            ),
            {block.goals[0]: tape.shapes[block.goals[0]] for block in blocks[:-1]},
            drawing=frozenset(call.index for block in blocks for call in block.program if draws_now(call)),
        )

    def _is_free(self, skip: tuple[Call, ...] | None) -> bool:
        return skip is not None and self.matrices.isdisjoint(call.index for call in skip)

    def _states(self) -> list[int]:
        """Values that are the only ones alive after the call that makes them."""
        tape = self.tape
        last = {v: c for c in self.calls for v in tape.calls[c].inputs if v in tape.active}
        last |= dict.fromkeys(self.cuts, len(tape.calls))
        found: list[int] = []
        alive: set[int] = set()
        for c in self.calls:
            outputs = tape.calls[c].outputs
            alive = {v for v in alive.union(outputs) if last.get(v, -1) > c}
            if len(alive) == 1 and alive.issubset(outputs):
                found += alive
        return found

    def _pieces(self) -> list[Block]:
        """The parts between neighbouring states, and the last one to the cuts."""
        states = [v for v in self._states() if v not in self.cuts]
        found = []
        for source, goal in zip([None, *states], [*states, None], strict=True):
            start = -1 if source is None else self.tape.producer[source]
            stop = len(self.tape.calls) if goal is None else self.tape.producer[goal]
            calls = [c for c in self.calls if start < c <= stop]
            found.append(self._piece(source, calls, self.cuts if goal is None else (goal,)))
        return found

    def _piece(self, source: int | None, calls: list[int], goals: tuple[int, ...]) -> Block:
        tape = self.tape
        program: list[Call] = []
        entries: list[int] = []
        depth = {} if source is None else {source: 0}
        least = dict(depth)
        for c in calls:
            call, own = tape.calls[c], c in self.matrices
            inputs = [v for v in call.inputs if v in depth]
            if not inputs:
                entries += call.outputs
                depth |= dict.fromkeys(call.outputs, 0)
                continue
            program.append(call)
            depth |= dict.fromkeys(call.outputs, max(depth[v] for v in inputs) + own)
            ways = [least[v] for v in inputs if v in least]
            if ways:
                least |= {v: min(ways) + own for v in call.outputs if v in tape.active}
        matrices, fewest = max(depth[v] for v in goals), max(least.get(v, math.inf) for v in goals)
        has_skip = source is not None and (fewest == 0 or fewest == 1 < matrices)
        skip = self._shortest(program, least, goals) if has_skip else None
        return Block(source, goals, tuple(program), tuple(entries), skip, source, matrices)

    def _shortest(self, program: list[Call], least: dict[int, int], goals: tuple[int, ...]) -> tuple[Call, ...]:
        """The calls of the ways to the goals with the fewest matrix sites, ``least`` by value."""
        found: list[Call] = []
        wanted = set(goals)
        for call in reversed(program):
            made = wanted.intersection(call.outputs)
            if made:
                fewest = max(least[v] for v in made) - (call.index in self.matrices)
                found.append(call)
                wanted |= {v for v in call.inputs if least.get(v) == fewest}
        return tuple(reversed(found))


def _merged(pieces: list[Block]) -> list[Block]:
    """Blocks from pieces.

    | piece | joined with |
    |---|---|
    | after the last matrix site, and back to the last state before this site | the head |
    | before the first piece with a skip | all of them are one block, if it is not too deep (see below) |
    | any other piece without a matrix site | the piece before it |

    The first low-rank adapter of a frozen model is such a beginning: nothing before it trains, so that the value to
    which it adds is no state.
    """
    *pieces, head = pieces
    while pieces and (
        not pieces[-1].matrices or (pieces[-1].skip is None and head.matrices + pieces[-1].matrices <= 1)
    ):
        head = _joined(pieces.pop(), head)
    blocks: list[Block] = []
    for piece in pieces:
        if blocks and not piece.matrices:
            blocks[-1] = _joined(blocks[-1], piece)
        else:
            blocks.append(piece)
    first = next((k for k, block in enumerate(blocks) if block.skip is not None), 0)
    if first > 1 and sum(block.matrices for block in blocks[:first]) <= MAX_BLOCK_DEPTH:
        blocks[:first] = [reduce(_joined, blocks[:first])]
    return [*blocks, head]


def _joined(a: Block, b: Block) -> Block:
    """Two neighbours as one."""
    skip = None if a.skip is None or b.skip is None else a.skip + b.skip
    matrices = a.matrices + b.matrices
    return Block(a.source, b.goals, a.program + b.program, a.entries + b.entries, skip, a.source, matrices)


def _trimmed(block: Block) -> Block:
    """The block with its skip cut short: additions at the skip's beginning are the identity."""
    if not block.skip:
        return block
    skip, passed = list(block.skip), [block.source]
    while skip and _is_identity(skip[0], passed):
        passed += skip.pop(0).outputs
    return replace(block, skip=tuple(skip), origin=passed[-1])


def _is_identity(call: Call, passed: list[int | None]) -> bool:
    """Whether the call adds another value to one of those that have ``passed``."""
    addition = (op_of(call.fn).is_addition or call.fn in _IN_PLACE) and not call.kwargs
    return addition and len(call.inputs) == 2 and len([v for v in call.inputs if v in passed]) == 1
