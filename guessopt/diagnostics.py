"""Instruments that judge estimators. The only module that may backpropagate through the network.

Letters: g the true gradient or cotangent, g^ an estimate of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from guessopt.engine.forward import Pass
from guessopt.engine.gradients import parameter_gradients
from guessopt.engine.levels import Level
from guessopt.engine.planning import Transaction
from guessopt.optimizer import GuessGradOptimizer
from guessopt.sites import ForwardRecord, Site, SiteGraph
from guessopt.tracing.local import Local

Closure = Callable[[], Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Cosine:
    """Cosine similarity of an estimated gradient with the true one, of all parameters and of each."""

    total: float
    per_parameter: dict[str, float]


def true_gradient(opt: GuessGradOptimizer, closure: Closure) -> dict[str, Tensor]:
    """The gradient by backpropagation, by parameter name; nothing is changed.

    >>> import torch, guessopt
    >>> net = torch.nn.Linear(2, 1)
    >>> opt = guessopt.GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, lr=0.1)
    >>> true_gradient(opt, lambda: net(torch.ones(3, 2)).mean())["bias"]
    tensor([1.])
    """
    _, run, record = _backpropagate(opt, closure)
    through = run.gradients(list(opt._by_position.values()), record)
    return _named(opt, {k: g for k, g in zip(opt._by_position, through, strict=True) if g is not None})


def estimated_gradient(opt: GuessGradOptimizer, closure: Closure) -> dict[str, Tensor]:
    """One estimate by the optimizer's own engine, by parameter name. The stream of guesses moves on, so that calls
    differ; nothing else is changed.

    >>> import torch, guessopt
    >>> net = torch.nn.Linear(2, 1)
    >>> opt = guessopt.GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, lr=0.1)
    >>> estimated_gradient(opt, lambda: net(torch.ones(3, 2)).mean())["weight"].shape
    torch.Size([1, 2])
    """
    transaction = Transaction(opt._devices)
    steps, learned = opt._steps, opt._cache.learned()
    try:
        return _named(opt, opt._estimate(closure, transaction)[1])
    finally:
        opt._steps = steps
        opt._cache.relearn(learned)
        transaction.rewind()


def expected_gradient(opt: GuessGradOptimizer, closure: Closure) -> dict[str, Tensor]:
    """``E g^``: every site's true cotangent through its estimator's declared second moment (Singhal eq. 14), then
    through the sites' own rules; by parameter name.

    Raises:
        ValueError: an estimator declares no second moment.

    >>> import torch, guessopt
    >>> net = torch.nn.Linear(2, 1)
    >>> opt = guessopt.GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, lr=0.1)
    >>> expected_gradient(opt, lambda: net(torch.ones(3, 2)).mean())["bias"]
    tensor([1.])
    """
    graph, run, record = _backpropagate(opt, closure)
    by_site = dict(zip(run.outputs, run.gradients(list(run.outputs.values()), record), strict=True))
    cotangents: dict[int, Tensor] = {}
    for site in reversed(graph.sites):
        estimator = opt._estimator_of(site)
        g = by_site[site.index]
        if g is None:
            g = torch.zeros_like(run.outputs[site.index])
        if opt._is_served(graph, site):
            assert site.shares is not None
            cotangents[site.index] = cotangents[site.shares]
            continue
        moment: Tensor | None = g
        if estimator.space == "parameters":
            moment = g if estimator.unbiased else None
        elif site.by_parameter and estimator.per_example_parameters:
            moment = None if estimator.noise == "uniform" else g
        elif not opt._is_exact(site, estimator):
            local = run.locals[site.index]
            g = g if site.reach is None else site.reach.restrict(g)
            with torch.no_grad():
                state = opt._prepared(site, estimator, opt._key(site, estimator), local)
                moment = estimator.second_moment(state, local, g)
                if moment is not None and estimator.debias:
                    moment = estimator.correct(state, local, moment)
            if moment is not None and site.reach is not None:
                moment = site.reach.restrict(moment)
        if moment is None:
            raise ValueError(f"{estimator.name} declares no second moment with these options")
        cotangents[site.index] = moment
    return _named(opt, parameter_gradients(graph, record, cotangents, opt._by_position, opt._ids))


def cosine(opt: GuessGradOptimizer, closure: Closure) -> Cosine:
    """Cosine similarity of one estimated gradient with the true one (Singhal Figure 1).

    >>> import torch, guessopt
    >>> net = torch.nn.Linear(2, 1)
    >>> opt = guessopt.GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, lr=0.1, exact_last=True)
    >>> round(cosine(opt, lambda: net(torch.ones(3, 2)).mean()).total, 4)
    1.0
    """
    estimate, true = estimated_gradient(opt, closure), true_gradient(opt, closure)
    pairs = {name: (estimate[name].flatten().double(), g.flatten().double()) for name, g in true.items()}
    each = {name: float(torch.cosine_similarity(a, b, dim=0)) for name, (a, b) in pairs.items()}
    a, b = (torch.cat([pair[k] for pair in pairs.values()]) for k in (0, 1))
    return Cosine(float(torch.cosine_similarity(a, b, dim=0)), each)


def _named(opt: GuessGradOptimizer, gradients: dict[int, Tensor]) -> dict[str, Tensor]:
    return {opt._names[k]: gradients[k] if k in gradients else torch.zeros_like(p) for k, p in opt._by_position.items()}


def _backpropagate(opt: GuessGradOptimizer, closure: Closure) -> tuple[SiteGraph, _ReversePass, ForwardRecord]:
    """Run the closure with an ordinary autograd graph, along the plan that a step would follow."""
    noise = opt._noise.snapshot()
    estimated_gradient(opt, closure)
    opt._noise.restore(noise)
    transaction = Transaction(opt._devices)
    run = _ReversePass(opt, transaction)
    try:
        return run.graph, run, run.execute(closure, opt._by_position)
    finally:
        transaction.rewind()


class _Reverse(Level):
    """No tangents: the network's own graph is kept for reverse mode. ``ends``: the cuts on the network's side."""

    name = "reverse"

    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[int, Tensor] = {}

    def run(self, body: Callable[[], T]) -> T:
        return body()

    def primal(self, t: Tensor) -> Tensor:
        return t.detach()

    def plain(self, t: Tensor) -> Tensor:
        return t

    def inject(self, s: Tensor, y: Tensor, in_place: bool) -> Tensor:
        return s

    def substitute(self, p: Tensor, v: Tensor) -> Tensor:
        return p

    def cut(self, number: int, v: Tensor, *, shared: bool, clone: bool) -> tuple[Tensor, Tensor]:
        if shared:
            return v, v
        self.ends[number] = v
        leaf = v.detach().requires_grad_()
        return (leaf.clone() if clone else leaf), leaf


class _ReversePass(Pass):
    """A pass that notes every site's output and surroundings instead of guessing."""

    def __init__(self, opt: GuessGradOptimizer, transaction: Transaction) -> None:
        self.reverse = _Reverse()
        super().__init__(opt._ids, opt._plans[0].graph, self.reverse, self.note, {}, transaction.saved)
        self.no_grad, self.keeps_graph = nullcontext(), True
        self.source = opt._noise
        self.outputs: dict[int, Tensor] = {}
        self.locals: dict[int, Local] = {}
        if self.graph.loss_params and any(cut.shared for cut in self.graph.cuts):
            raise NotImplementedError(
                "diagnostics cannot yet separate a loss that reads parameters itself from one that reads a value "
                "which the network goes on to use; leave the parameter term out of the closure for the measurement"
            )

    def note(self, site: Site, s: Tensor, values: dict[int, Tensor]) -> None:
        self.locals[site.index] = Local(site, s, dict(values), self.source)

    def inject(self, site: Site, s: Tensor, in_place: bool) -> Tensor:
        self.outputs[site.index] = s
        return super().inject(site, s, in_place)

    def gradients(self, variables: list[Tensor], record: ForwardRecord) -> tuple[Tensor | None, ...]:
        """Of the loss, through the whole network."""
        ends = self.reverse.ends
        starts = [self.total, *ends.values()] if self.total.requires_grad else list(ends.values())
        weights = [torch.ones_like(self.total)] * (len(starts) - len(ends)) + [record.errors[k] for k in ends]
        return torch.autograd.grad(starts, variables, weights, allow_unused=True, retain_graph=True)
