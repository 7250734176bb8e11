"""A plan: the graph of a closure, and what the runs by it have shown so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from guessopt.engine.forward import ForwardRun
from guessopt.engine.probe import Found
from guessopt.estimator import Estimator
from guessopt.graph import SiteGraph
from guessopt.sites import ParallelSites, Site
from guessopt.tracing.analysis import Analysis

#: Plans kept: one for each branch that the closure takes and each shape that it meets.
MAX_PLANS = 16


class Assignment(NamedTuple):
    """Who guesses at a site, and the names of its prepared ("": none) and of its learned state."""

    estimator: Estimator
    prepared: str
    learned: str


@dataclass
class Plan:
    """A graph in use.

    Attributes:
        analysis: what later probes need; None where there is one example.
        sites: the sites as the analysis has them, without layouts.
        given: the number of losses, where the closure returns several.
        loss: the loss of the trace, until a run has confirmed it within ``tolerance``; then None.
        uses: runs so far.
        changes: how often a tensor that the closure reads, or a number, has changed from one run to the next: by the
            tensor's value, or by ``-1 - index`` of the call that takes the number.
        last: by value, the tensor that the last run read, and its version.
        due: whether such a change asks for a probe.
        stale: whether the last run made a guess from tensors or numbers that the closure then did not use.
        volatile: how many runs were stale.
        assignments: by site, who guesses there; None as long as nobody has asked.
        normalises_batch: whether batch normalisation couples the examples.
        found: where the examples lie, and through which calls no tangent has come yet.
        mixing: the operation in which examples interact; "" if there is none.
        routes: whether the network picks rows by indices that it computes.
        compiled: whether the closure calls compiled code.
        stacks: whether K guesses share a run; None: not known yet.
        failures: how many attempts to share a run failed.
        ways: see ``StackedEngine``.
        stream: whether the graph has the residual stream as a chain of blocks.
        together: whether probes may carry several tangents in one run.
        keeps_graphs: whether a run may keep the reverse graphs of the chain's blocks.
        joints: by first site, parallel sites that get one guess.
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
    assignments: dict[int, Assignment] | None = None
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


def is_due_for_probe(plan: Plan) -> bool:
    """Whether the next pass needs a probe before it: after 1, 2, 4, 8, ... passes; more often while the tangent of some
    site has not been seen to reach the loss; always where the data decide which rows go where."""
    uses = plan.uses
    if plan.analysis is None or uses == 0:
        return False
    asleep = not plan.alive and (uses < 64 or uses % 16 == 0)
    return plan.routes or asleep or uses & (uses - 1) == 0
