"""A residual network as a chain of blocks.

A *state* is a value that everything passes through: each block reads the state before it and makes the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from guessopt.layout import Shape
from guessopt.sites import Call, values_needed


@dataclass(frozen=True)
class Block:
    """The part of a network between two neighbouring states.

    Attributes:
        source: the state before it; None: the network's input.
        goals: the state after it; of the last block, the cuts.
        program: the calls between, in order.
        entries: values made there from the network's input alone.
        skip: the shortcut's calls, starting at ``origin``; None without a shortcut. A shortcut passes no matrix
            site, or a single one (a projection) beside several.
        origin: where the shortcut begins. From ``source`` to here it is the identity.
        matrices: matrix sites on the longest way through.
        sites: indices of the sites inside.
    """

    source: int | None
    goals: tuple[int, ...]
    program: tuple[Call, ...]
    entries: tuple[int, ...]
    skip: tuple[Call, ...] | None
    origin: int | None
    matrices: int
    sites: tuple[int, ...] = ()

    def needs(self) -> set[int]:
        """Values that the programs read and do not make."""
        found = {v for v in (self.source, self.origin, *self.entries) if v is not None}
        return found | values_needed(self.program) | values_needed(self.skip or ())

    @cached_property
    def ends_in_skip(self) -> bool:
        """Whether nothing but the skip reads its origin, as after an addition."""
        if not self.skip or self.origin == self.source:
            return False
        reached, calls = {self.origin}, {call.index for call in self.skip}
        for call in self.program:
            if reached.intersection(call.inputs):
                reached.update(call.outputs)
                if call.index not in calls:
                    return False
        return True


@dataclass(frozen=True)
class ResidualChain:
    """A network as a chain of blocks.

    Attributes:
        blocks: in order; the last one is the head.
        shapes: of the states, by value.
        overwritten_later: values that blocks need and that later calls write into.
        drawing: calls inside blocks that may draw random numbers.
    """

    blocks: tuple[Block, ...]
    shapes: dict[int, Shape]
    overwritten_later: frozenset[int] = frozenset()
    drawing: frozenset[int] = frozenset()

    @cached_property
    def reverses(self) -> frozenset[int]:
        """The calls that the blocks' reverse graphs hold."""
        return frozenset(call.index for block in self.blocks for call in block.program)

    @cached_property
    def origins(self) -> frozenset[int]:
        """Where skips begin that nothing else reads. A block's reverse graph can be pulled back to these values."""
        return frozenset(block.origin for block in self.blocks if block.ends_in_skip and block.origin is not None)

    @cached_property
    def needs(self) -> frozenset[int]:
        """Values that are needed beside the blocks' graphs: the states, and inputs of skips that run once more."""
        return frozenset(self.shapes).union(*map(values_needed, self._apart))

    @cached_property
    def read(self) -> frozenset[int]:
        """Values that the blocks read and do not make."""
        return frozenset().union(*(block.needs() for block in self.blocks))

    @cached_property
    def redrawn(self) -> frozenset[int]:
        """The drawing calls that run once more beside the blocks' graphs."""
        return self.drawing.intersection(call.index for skip in self._apart for call in skip)

    @property
    def _apart(self) -> list[tuple[Call, ...]]:
        """Skips to whose origin no block's graph leads: they run once more."""
        return [block.skip for block in self.blocks if block.skip and not block.ends_in_skip]
