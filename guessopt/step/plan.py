"""A plan: the graph of a closure, with counts and findings of earlier runs."""

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

#: Largest number of plans kept. Each branch of the closure and each input shape needs its own plan.
MAX_PLANS = 16


class Assignment(NamedTuple):
    """The estimator that guesses at a site, and the names of its prepared state ("": none) and of its learned state."""

    estimator: Estimator
    prepared: str
    learned: str


@dataclass
class Plan:
    """A graph in use.

    Attributes:
        analysis: the analysis of the trace, for later probes; None if the batch has one example.
        sites: the sites of the analysis, without layouts.
        given: the number of losses, if the closure returns several.
        loss: the loss of the trace, until a run has confirmed it within ``tolerance``; then None.
        tolerance: the relative difference of the loss that rounding may cause.
        uses: number of runs so far.
        changes: how often a tensor or a number that the closure reads has changed between two runs. The key is the
            tensor's value, or ``-1 - index`` of the call that takes the number.
        last: by value, a weak reference to the tensor that the last run read, and the tensor's version.
        due: whether a change in ``changes`` asks for a probe.
        stale: whether the last run made a guess from tensors or numbers that the closure then did not use.
        volatile: how many runs were stale.
        assignments: the ``Assignment`` of each site, by site index; None until ``Estimation.assignments`` makes them.
        normalises_batch: whether batch normalisation couples the examples.
        found: where the examples lie, and the calls through which no tangent has come yet.
        mixing: the operation in which examples interact; "" if there is none.
        routes: whether the network picks rows by indices that it computes.
        compiled: whether the closure calls compiled code.
        stacks: whether K guesses share a run; None: not known yet.
        failures: how many attempts to share a run failed.
        ways: see ``StackedEngine``.
        stream: whether the graph was built to have the residual chain.
        together: whether probes may carry several tangents in one run.
        keeps_graphs: whether a run may keep the reverse graphs of the blocks.
        joints: by index of their first site, parallel sites that get one guess.
        modules, elsewhere: further modules and tensors that a ``Transaction`` must watch; it finds the others itself.
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
        """Whether the probes have seen each site's tangent reach the loss, on every path to the loss."""
        return self.found is None or self.found.alive

    def observe(self, run: ForwardRun) -> None:
        """Compare the tensors and numbers that a run has read with those of the last run. Change 1, 2, 4, 8, ... of a
        tensor or a number asks for a probe."""
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
    """Whether the next run needs a probe before it.

    A probe comes after 1, 2, 4, 8, ... runs. While some site's tangent has not reached the loss, it comes before each
    of the first 64 runs and each 16th later run. Where the data decide which rows go where, it comes before every run.
    """
    uses = plan.uses
    if plan.analysis is None or uses == 0:
        return False
    asleep = not plan.alive and (uses < 64 or uses % 16 == 0)
    return plan.routes or asleep or uses & (uses - 1) == 0
