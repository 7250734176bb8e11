"""``Estimation``: the options of an optimizer, and everything that the optimizer keeps from step to step.

The other modules of this package work on an ``Estimation``: ``modes`` has the algorithm, ``runs`` the runs of the
closure, ``guessing`` the guesses, ``learning`` the estimators that learn, ``checks`` the refusals and the warnings.
"""

from __future__ import annotations

import operator
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from guessopt.cache import SiteCache
from guessopt.credit import DiscountChoice
from guessopt.engine.audit import AuditReport
from guessopt.engine.jvp import make_engine
from guessopt.engine.jvp.base import JvpEngine
from guessopt.engine.transaction import Transaction
from guessopt.errors import GuessWarning, PartialUpdateError
from guessopt.estimator import Estimator
from guessopt.exclusive import exclusive, hold_interrupts, leave_modes
from guessopt.graph import SiteGraph
from guessopt.groups import check_trainable, names_of
from guessopt.hooks import Hooks, lifted, watch
from guessopt.registry import describe, estimators_for
from guessopt.rng import NoiseSource, cuda_devices
from guessopt.sites import ParallelSites, Site
from guessopt.step.mode import MODES, Mode
from guessopt.step.plan import Assignment, Plan
from guessopt.tracing.context import SiteContext
from guessopt.update import Updates, together


class Estimation:
    """How gradients are estimated: options, parameters, plans, prepared and learned states.

    Args:
        base: the optimizer that makes the updates; its groups hold the parameters and their estimators.
        seed: seed of the guesses; None follows ``torch.manual_seed``.

    The other arguments are those of ``GuessGradOptimizer``.

    Attributes:
        params, names: every parameter in the optimizer's order, and its name.
        by_position, ids: the parameters that train, by position in that order; their positions by ``id``.
        estimators: the estimator of each parameter.
        amplitudes: by estimator in use, the factor of its guesses for parameters (directional descent).
        devices: indices of the CUDA devices in use.
        noise: the random stream of the guesses.
        cache: prepared and learned states, by site.
        steps: number of steps made.
        plans: the plans in use, the last used first.
        choice: what ``discount="auto"`` has measured and chosen.
        asked: the list that takes the reports for ``guessopt.audit``; None if no audit was asked for.
        updates: makes the base's updates, whole or not at all.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        guesses: int,
        stack_guesses: bool | None,
        orthogonal: bool,
        discount: float | str | None,
        exact_last: bool | None,
        memory: str,
        engine: str,
        batch_norm: str,
        check_finite: bool,
        audit: bool,
        foreign_gradients: str,
        seed: int | None,
    ) -> None:
        self.base = base
        self.guesses, self.stack_guesses, self.orthogonal = guesses, stack_guesses, orthogonal
        self._discount, self.choice = discount, DiscountChoice()
        self.exact_last, self.memory, self.engine = exact_last, memory, engine
        self.batch_norm, self.check_finite, self.audit = batch_norm, check_finite, audit
        self.foreign_gradients = foreign_gradients
        self.make_engine: Callable[[], JvpEngine] = partial(
            make_engine, engine, frozen_statistics=self.frozen_statistics
        )
        self.make_engine()  # refuses an unknown name
        self.noise, self.cache = NoiseSource(seed), SiteCache()
        self.steps = 0
        self.warned: set[str] = set()
        self.asked: list[AuditReport] | None = None
        self.hooks: Hooks = {}
        self._together: tuple[str | None] | None = None
        self.forget_parameters()

    # --- parameters ---------------------------------------------------------------------------------------------------

    def forget_parameters(self) -> None:
        """Make the next ``refresh`` start over."""
        self.params: list[Tensor] = []
        self.trainable: tuple[bool, ...] = ()

    def refresh(self) -> bool:
        """Find the parameters that train. If they have changed, start over. Returns whether they have changed.

        Raises:
            ValueError: no parameter trains, no estimator is given for one, or the memory mode cannot be used.
        """
        params = [p for group in self.base.param_groups for p in group["params"]]
        trainable = tuple(p.requires_grad for p in params)
        if trainable == self.trainable and all(map(operator.is_, params, self.params)):
            return False
        check_trainable(params)  # before anything is taken over: the next step must say so again
        self.params, self.trainable = params, trainable
        self.names = names_of(self.base.param_groups)
        self.by_position = {k: p for k, p in enumerate(params) if p.requires_grad}
        self.ids = {id(p): k for k, p in self.by_position.items()}
        self.estimators: list[Estimator] = []
        for group in self.base.param_groups:
            start, count = len(self.estimators), len(group["params"])
            names = self.names[start : start + count]
            self.estimators += estimators_for(group["estimator"], names, named=bool(group.get("param_names")))
        if why := self.refused(self.memory):
            raise ValueError(f"memory: {why}")
        entries: dict[Estimator, int] = {}
        for position, p in self.by_position.items():
            entries[self.estimators[position]] = entries.get(self.estimators[position], 0) + p.numel()
        self.amplitudes = {estimator: estimator.amplitude(count) for estimator, count in entries.items()}
        self.devices = tuple(sorted(cuda_devices(params)))
        self.plans: list[Plan] = []
        self.updates, self._together = Updates(self.base), None
        if self.foreign_gradients == "refuse":
            for p in params:
                watch(p)
        return True

    def refused(self, memory: str, graph: SiteGraph | None = None) -> str | None:
        """Why a memory mode cannot be used; None if it can. Without a graph, some reasons are not known yet."""
        mode = _mode(memory)
        if mode.keeps:
            return None
        if mode.early and graph is not None and graph.rewritten:
            names = ", ".join(self.names[p] for p in sorted(graph.rewritten)[:3])
            return (
                f"the closure writes parameters itself ({names}), which memory={memory!r} updates while it runs; "
                "use memory='replay', or write them after the step"
            )
        if mode.early and graph is not None:
            self._together = self._together or (together(self.base),)
            if self._together[0]:
                return self._together[0]
        if self.orthogonal:
            return f"orthogonal takes all guesses at once, which memory={memory!r} does not keep; use memory='store'"
        for e in dict.fromkeys(e for e in self.estimators if e.learns):
            several = f"guesses={self.guesses}: each guess uses what the last one taught, and needs its own passes"
            if why := several if self.guesses > 1 else e.refuses(memory, graph):
                return f"{e.name} does not go with memory={memory!r} here: {why}; or use memory='store'"
        return None

    @property
    def gamma(self) -> float | None:
        """The discount of this step."""
        return self.choice.discount if isinstance(self.discount, str) else self.discount

    @property
    def discount(self) -> float | str | None:
        """See ``GuessGradOptimizer``. A plan made without a discount does not know where the positions lie: a change
        from or to None drops the plans."""
        return self._discount

    @discount.setter
    def discount(self, value: float | str | None) -> None:
        if (value is None) is not (self._discount is None):
            self.plans = []
        self._discount = value

    # --- all or nothing -----------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self, closure: Callable[[], Any], started: Transaction | None = None) -> Iterator[Transaction]:
        """An exception inside the block undoes everything. After a ``PartialUpdateError`` with a journal the updates
        stay, and ``GuessGradOptimizer.finish`` makes the remaining updates.

        Args:
            started: a transaction that is already open; None opens one.
        """
        if not callable(closure):
            raise TypeError(f"closure: expected a function that returns the loss, got {type(closure).__name__}")
        with exclusive("step() or estimate()"):
            self.refresh()
            with lifted(self.params, self.hooks), self._undone_on_error(closure, started) as transaction:
                yield transaction

    @contextmanager
    def _undone_on_error(self, closure: Callable[[], Any], started: Transaction | None) -> Iterator[Transaction]:
        noise, cached, steps, choice = self.noise.snapshot(), self.cache.copy(), self.steps, self.choice
        grads, plans = [p.grad for p in self.params], list(self.plans)
        before = [(plan.uses, plan.stacks, plan.failures) for plan in plans]
        self.noise.follow()
        transaction = started or Transaction(self.devices)
        transaction.watch(closure, self.plans)
        try:
            yield transaction
        except BaseException as error:
            hold_interrupts()
            leave_modes()
            transaction.rewind()
            if not isinstance(error, PartialUpdateError) or error.journal is None:
                self.noise.restore(noise)
                self.cache.restore(cached)
                self.steps, self.plans, self.choice = steps, plans, choice
                for plan, counts in zip(plans, before, strict=True):
                    plan.uses, plan.stacks, plan.failures = counts
                    plan.ways.clear()  # the next run finds out again which operations go one by one
                for p, grad in zip(self.params, grads, strict=True):
                    p.grad = grad
            raise
        finally:
            self.noise.guess_index = 0

    @property
    def mode(self) -> Mode:
        """The memory mode. ``"auto"`` is ``"store"`` until the first step has chosen."""
        return _mode(self.memory)

    # --- which estimator serves a site --------------------------------------------------------------------------------

    @property
    def frozen_statistics(self) -> bool:
        """Whether batch statistics are treated as constants."""
        return self.batch_norm == "frozen_statistics"

    @property
    def follows_chain(self) -> bool:
        """Whether one estimator serves all parameters and works along residual streams."""
        return len(set(self.estimators)) == 1 and self.estimators[0].streams

    def choice_of(self, site: Site) -> Estimator:
        """The estimator that the user chose for the site's parameters: of several, the first that guesses activations;
        if none does, the first."""
        estimators = [self.estimators[position] for position in site.params]
        return next((e for e in estimators if e.space == "activations"), estimators[0])

    def estimator_of(self, site: Site) -> Estimator:
        """The estimator that serves the site: the user's choice, or the estimator that replaces it here."""
        return self.choice_of(site).for_site(site)

    def is_served(self, graph: SiteGraph, site: Site) -> bool:
        """Whether the site shares a later site's guess (``a(x) + b(x)``: one guess for the sum)."""
        while site.shares is not None:
            site = graph.sites[site.shares]
            if self.estimator_of(site).space == "activations":
                return True
        return False

    def is_exact(self, site: Site, estimator: Estimator) -> bool:
        """Whether the site takes its exact error: the loss reads its output, and ``exact_last`` is wanted."""
        wanted = estimator.exact_last if self.exact_last is None else self.exact_last
        return wanted and site.cut is not None

    def assignments(self, plan: Plan) -> dict[int, Assignment]:
        """By site index, the estimator that guesses there. A site is absent if its error is known exactly, if it shares
        a later site's guess, or if its parameters themselves are guessed."""
        if plan.assignments is None:
            plan.assignments = {}
            for site in plan.graph.sites:
                e = self.estimator_of(site)
                if not (self.is_served(plan.graph, site) or self.is_exact(site, e) or e.space == "parameters"):
                    learned = _learned_key(plan.graph, site, e)
                    plan.assignments[site.index] = Assignment(e, _prepared_key(site, e), learned)
            plan.joints = {joint.sites[0]: joint for joint in plan.graph.joints if _joins(plan.assignments, joint)}
        return plan.assignments

    def prepared(self, site: Site, estimator: Estimator, ctx: SiteContext, key: str | None = None) -> Any:
        """The estimator's prepared state at a site, made again every ``refresh`` steps; None if the estimator prepares
        nothing.

        Args:
            key: the state's name in ``cache``; None: find the name.
        """
        key = _prepared_key(site, estimator) if key is None else key
        if not key:
            return None
        return self.cache.get(
            key,
            step=self.steps,
            refresh=estimator.refresh,
            make=lambda previous: estimator.prepare(site, ctx.weights(), previous),
        )

    # --- what the user should know ------------------------------------------------------------------------------------

    def warn(self, message: str) -> None:
        """Issue a ``GuessWarning`` that points at the user's line, once for each message."""
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, GuessWarning, stacklevel=_users_frame())


def _mode(memory: str) -> Mode:
    return MODES["store" if memory == "auto" else memory]


def _prepared_key(site: Site, estimator: Estimator) -> str:
    return f"{describe(estimator)} {site.segment.key}" if site.segment is not None and estimator.prepares else ""


def _learned_key(graph: SiteGraph, site: Site, estimator: Estimator) -> str:
    """A site's name, equal in all traces of a model: its parameters, and the number of this use of them."""
    use = sum(other.params == site.params for other in graph.sites[: site.index])
    return f"{describe(estimator)} at {site.params} {use}"


def _joins(assignments: dict[int, Assignment], joint: ParallelSites) -> bool:
    """Whether one estimator serves all of these sites, and can make one guess for all of them."""
    estimators = {assignments[k].estimator if k in assignments else None for k in joint.sites}
    return len(estimators) == 1 and all(e is not None and e.joint for e in estimators)


def _users_frame() -> int:
    """The stack level, for ``warnings.warn`` in the caller, of the first frame outside this package and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("guessopt", "torch"):
        level, frame = level + 1, frame.f_back
    return level
