"""The sources of measurements: the engine's estimates, and a reverse pass through the whole network for the truth.

Letters: n example, g the true cotangent, g^ an estimate of it, y the guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from guessopt.engine.forward import ForwardRun
from guessopt.engine.gradients import estimated_cotangents, parameter_gradients
from guessopt.engine.jvp.primal import WithoutTangents
from guessopt.engine.transaction import Transaction
from guessopt.exclusive import exclusive
from guessopt.graph import SiteGraph
from guessopt.hooks import lifted
from guessopt.optimizer import GuessGradOptimizer
from guessopt.record import ForwardRecord
from guessopt.sites import Influence, ParallelSites, Site
from guessopt.step.guessing import lasting
from guessopt.step.learning import learned_cotangents
from guessopt.step.runs import forward
from guessopt.tracing.context import ParallelContext, SiteContext

Closure = Callable[[], Any]


@contextmanager
def measuring(opt: GuessGradOptimizer) -> Iterator[Transaction]:
    """Code inside the block leaves no trace: the closure's side effects and random states are undone, learned states
    are restored, and prepared states do not age."""
    with exclusive("a measurement"), lifted(opt.estimation.params, opt.estimation.hooks):
        est = opt.estimation
        steps, learned, choice = est.steps, est.cache.learned(), est.choice
        transaction = Transaction(opt.estimation.devices)
        transaction.watch(None, opt.estimation.plans)
        try:
            yield transaction
        finally:
            transaction.rewind()
            est.steps, est.choice = steps, choice
            est.cache.relearn(learned)


@dataclass(frozen=True)
class Draw:
    """An estimate: cotangents ``g^_i`` by site index, gradients by the parameter's position."""

    graph: SiteGraph
    cotangents: dict[int, Tensor]
    gradients: dict[int, Tensor]


def draw(opt: GuessGradOptimizer, closure: Closure, guesses: int = 1) -> Draw:
    """The engine's estimate from one forward-mode run, or the mean of ``guesses`` such estimates. The stream of guesses
    moves on; nothing else changes."""
    found: Draw | None = None
    for _ in range(guesses):
        with measuring(opt) as transaction:
            opt.estimation.refresh()
            opt.estimation.noise.follow()
            plan, record = forward(opt.estimation, closure, transaction)
            cotangents = estimated_cotangents(plan.graph, record, learned_cotangents(opt.estimation, plan, record))
            gradients = parameter_gradients(
                plan.graph, record, cotangents, opt.estimation.by_position, opt.estimation.ids
            )
        one = Draw(plan.graph, cotangents, gradients)
        found = one if found is None else _plus(found, one)
    assert found is not None
    if guesses == 1:
        return found
    return Draw(
        found.graph,
        {k: t / guesses for k, t in found.cotangents.items()},
        {k: t / guesses for k, t in found.gradients.items()},
    )


def _plus(a: Draw, b: Draw) -> Draw:
    return Draw(
        a.graph,
        _sums(a.cotangents, b.cotangents),
        _sums(a.gradients, b.gradients),
    )


def _sums(a: dict[int, Tensor], b: dict[int, Tensor]) -> dict[int, Tensor]:
    return {k: a[k] + b[k] if k in a and k in b else a.get(k, b.get(k)) for k in {**a, **b}}  # type: ignore[misc]


def named(opt: GuessGradOptimizer, gradients: dict[int, Tensor]) -> dict[str, Tensor]:
    """Gradients by parameter name; zeros for a parameter without a gradient."""
    return {
        opt.estimation.names[k]: gradients[k] if k in gradients else torch.zeros_like(p)
        for k, p in opt.estimation.by_position.items()
    }


def find_plan(opt: GuessGradOptimizer, closure: Closure) -> None:
    """Put the plan that a step would follow first in ``opt.estimation.plans``."""
    noise = opt.estimation.noise.snapshot()
    draw(opt, closure)
    opt.estimation.noise.restore(noise)


def backpropagate(opt: GuessGradOptimizer, closure: Closure) -> tuple[SiteGraph, ReversePass, ForwardRecord]:
    """Run the closure with an ordinary autograd graph, along the plan that a step would follow."""
    find_plan(opt, closure)
    with measuring(opt) as transaction:
        run = ReversePass(opt, transaction)
        return run.graph, run, run.execute(closure, opt.estimation.by_position)


class Truth:
    """A reverse pass through the whole network, and its results.

    Attributes:
        graph: the graph that the pass followed.
        contexts: by site index, the ``SiteContext`` for the site's estimator.
        g: by site index, the true cotangent ``dL/ds_i``, in the shape of ``s_i``.
        credited: by site index, the cotangent that position credit estimates: position t takes
            ``sum_{t'} gamma^(t' - t) dl_{t'}/ds_i``; ``g`` without a discount, and at sites without positions.
        gradient: the true gradients of the parameters, by position.
        names: by site index, the names of the sites that have their own cotangent.
        record: the record of the pass, with the inputs of the sites' calls.
        joints: groups of parallel sites that get one guess.
    """

    def __init__(self, opt: GuessGradOptimizer, closure: Closure) -> None:
        self.opt, self.closure = opt, closure
        find_plan(opt, closure)
        with measuring(opt) as transaction:
            run = ReversePass(opt, transaction)
            self.record = run.execute(closure, opt.estimation.by_position)
            # Before buffers are put back: their new values may be part of the graph.
            sites, params = list(run.outputs), list(opt.estimation.by_position)
            through = run.gradients([*run.outputs.values(), *opt.estimation.by_position.values()], self.record)
            credited = _credited(run, self.record, opt.estimation.gamma)
        self.graph, self.contexts = run.graph, run.contexts
        like = [*(ctx.s for ctx in run.contexts.values()), *opt.estimation.by_position.values()]
        filled = [torch.zeros_like(s) if g is None else g.detach() for s, g in zip(like, through, strict=True)]
        self.g: dict[int, Tensor] = dict(zip(sites, filled, strict=False))
        self.credited = self.g | credited
        self.gradient: dict[int, Tensor] = dict(zip(params, filled[len(sites) :], strict=True))
        self.names = site_names(opt, self.graph)
        self.joints = tuple(opt.estimation.plans[0].joints.values())

    @property
    def loss(self) -> Tensor:
        return self.record.loss

    @cached_property
    def means(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """``D y`` with each guess replaced by its mean: cotangents by site index, and gradients by position for
        parameters that are guessed themselves. Zero unless the noise is uniform."""
        opt = self.opt
        with measuring(opt) as transaction:
            opt.estimation.noise.means = True
            try:
                plan, record = forward(opt.estimation, self.closure, transaction)
            finally:
                opt.estimation.noise.means = False
            total = record.d.sum()
            return estimated_cotangents(plan.graph, record), {k: total * v for k, v in record.params.items()}

    def joint_local(self, joint: ParallelSites) -> ParallelContext:
        """The context of parallel sites that get one guess."""
        first = self.contexts[joint.sites[0]]
        return ParallelContext(joint, first.site, first.s, first.values, self.opt.estimation.noise)

    def rows(self, site: Site, t: Tensor) -> Tensor:
        """A tensor of the site's shape as ``[N, d]``, one row per example; ``[1, d]`` at a coupled site. A complex
        entry gives two numbers."""
        return real(site.layout.flat_rows(t, self.contexts[site.index].examples))

    def sites(self) -> Iterator[tuple[str, Site, SiteContext]]:
        """The sites with their own cotangent, in the order in which the network runs them: name, site, context."""
        for site in self.graph.sites:
            if site.index in self.names and site.index in self.contexts:
                yield self.names[site.index], site, self.contexts[site.index]

    def estimated(self) -> Iterator[tuple[str, Site, SiteContext]]:
        """The ``sites`` whose cotangent is estimated or exact, not those whose parameters are guessed themselves."""
        for name, site, ctx in self.sites():
            estimator = self.opt.estimation.estimator_of(site)
            if estimator.space == "activations" and not (site.by_parameter and estimator.per_example_parameters):
                yield name, site, ctx


def _credited(run: ReversePass, record: ForwardRecord, discount: float | None) -> dict[int, Tensor]:
    """The cotangents that position credit estimates, at the sites with positions: one reverse pass for each position,
    and one for the parts of the loss that have none."""
    graph = run.graph
    sites = [s for s in graph.sites if s.position_dim is not None and s.index in run.outputs]
    if discount is None or not sites:
        return {}
    found: dict[int, Tensor] = {}

    def add(errors: list[Tensor], weight: Callable[[Site], Tensor]) -> None:
        through = run.gradients(
            [run.outputs[site.index] for site in sites], replace(record, errors=errors), whole=False
        )
        for site, g in zip(sites, through, strict=True):
            if g is not None:
                dim, assigned = site.position_dim, weight(site).to(g)
                assert dim is not None
                part = g * site.layout.spread_positions(assigned[None], site.shape, graph.batch, dim)
                found[site.index] = found[site.index] + part if site.index in found else part

    t, ends = torch.arange(graph.positions), list(zip(graph.cuts, record.errors, strict=True))
    for later in range(graph.positions):
        here = (t == later).double()[None]

        def weight(site: Site, later: int = later) -> Tensor:
            if site.influence is Influence.OWN:
                return (t == later).double()
            fading = discount ** (t - later).abs().double()
            return torch.where(t <= later, fading, 0.0) if site.influence is Influence.LATER else fading

        errors = [
            torch.zeros_like(e) if cut.position_dim is None
            else e * cut.layout.spread_positions(here.to(e), cut.shape, graph.batch, cut.position_dim)
            for cut, e in ends
        ]  # fmt: skip
        add(errors, weight)
    if not graph.is_by_position:
        rest = [e if cut.position_dim is None else torch.zeros_like(e) for cut, e in ends]
        add(rest, lambda site: torch.ones(graph.positions))
    return found


def site_names(opt: GuessGradOptimizer, graph: SiteGraph) -> dict[int, str]:
    """Names of sites, by site index. A site's name is the first parameter that the site reads; the second site with
    this parameter adds ``#2``. Sites that share another site's cotangent (a bias added apart) have no name."""
    found: dict[int, str] = {}
    seen: dict[str, int] = {}
    for site in graph.sites:
        if site.shares is not None:
            continue
        name = opt.estimation.names[site.params[0]]
        seen[name] = seen.get(name, 0) + 1
        found[site.index] = name if seen[name] == 1 else f"{name} #{seen[name]}"
    return found


def unfused() -> AbstractContextManager[None]:
    """Compute attention by its formula. Fused kernels cannot differentiate ``J^T u`` again, as ``J v`` requires."""
    found: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return found


def real(t: Tensor) -> Tensor:
    """A complex tensor as a real one with a last dimension twice as long.

    >>> real(torch.tensor([1 + 2j]))
    tensor([1., 2.])
    """
    return torch.view_as_real(t.resolve_conj()).flatten(-2) if t.is_complex() else t


def double(t: Tensor) -> Tensor:
    """A tensor in double precision; a complex tensor stays complex."""
    return t.to(torch.complex128) if t.is_complex() else t.double()


class _Reverse(WithoutTangents):
    """An engine without tangents. It keeps the network's autograd graph. ``ends``: the network's tensor by cut."""

    name = "reverse"

    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[int, Tensor] = {}

    def through_backward(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return fn(*args, **kwargs)

    def cut(self, number: int, v: Tensor) -> tuple[Tensor, Tensor]:
        self.ends[number] = v
        return super().cut(number, v)


class ReversePass(ForwardRun):
    """A run that records every site's output and context, and makes no guess."""

    def __init__(self, opt: GuessGradOptimizer, transaction: Transaction) -> None:
        self.reverse = _Reverse()
        super().__init__(opt.estimation.ids, opt.estimation.plans[0].graph, self.reverse, self.note, {}, transaction)
        self.no_grad, self.keeps_graph = nullcontext(), True
        self.source = opt.estimation.noise
        self.outputs: dict[int, Tensor] = {}  # by site index, a zero that is added to its output
        self.contexts: dict[int, SiteContext] = {}
        if self.graph.loss_params and any(cut.shared for cut in self.graph.cuts):
            raise NotImplementedError(
                "diagnostics cannot yet separate a loss that reads parameters itself from one that reads a value "
                "which the network goes on to use; leave the parameter term out of the closure for the measurement"
            )

    def note(self, site: Site, s: Tensor, values: dict[int, Tensor]) -> None:
        values = dict(values)
        self.contexts[site.index] = lasting(SiteContext(site, s, values, self.source), values, self.source)

    def inject(self, site: Site, s: Tensor, in_place: bool) -> Tensor:
        """Add a zero to the output instead of a guess. The gradient of the zero is the output's cotangent, also if the
        output is overwritten later. It counts this output alone if a call has several outputs (a cell computes its
        ``h`` from its ``c``)."""
        s = super().inject(site, s, in_place)
        zero = s.new_zeros(()).expand(s.shape).requires_grad_()
        self.outputs[site.index] = zero
        if not in_place:
            return s + zero
        # the numbers of s do not change, and its backward may need them
        with torch.autograd._unsafe_preserve_version_counter(s):  # type: ignore[attr-defined]
            return s.add_(zero)

    def gradients(
        self, variables: Sequence[Tensor], record: ForwardRecord, whole: bool = True
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the loss for ``variables``, through the whole network. ``whole``: the loss's own calls too."""
        ends = self.reverse.ends
        starts = [self.total, *ends.values()] if whole and self.total.requires_grad else list(ends.values())
        weights = [torch.ones_like(self.total)] * (len(starts) - len(ends)) + [record.errors[k] for k in ends]
        return torch.autograd.grad(starts, list(variables), weights, allow_unused=True, retain_graph=True)
