"""The path of a step: closure -> SiteGraph -> guesses y_i -> one forward-mode pass -> D_n -> g^_i -> gradients."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from guessopt.cache import SiteCache
from guessopt.engine.audit import Audit, AuditReport
from guessopt.engine.combine import combined, mean_weights, projection_weights, stack
from guessopt.engine.following import GraphMismatch
from guessopt.engine.forward import ForwardRun, Guess
from guessopt.engine.gradients import Gradients, estimated_cotangents, parameter_gradients
from guessopt.engine.jvp import ENGINES
from guessopt.engine.jvp.base import JvpEngine
from guessopt.engine.jvp.primal import BlockVjpRun, LossGradRun, PrimalRun
from guessopt.engine.jvp.stacked import StackedEngine
from guessopt.errors import ClosureError, GuessWarning, PartialUpdateError
from guessopt.estimator import Estimator, LearningStep, describe
from guessopt.exclusive import exclusive, hold_interrupts, leave_modes, unscaled
from guessopt.feedback.updates import sound
from guessopt.graph import SiteGraph
from guessopt.hooks import Hooks, apart, fire, hooked, lifted
from guessopt.layout import Shape, numel
from guessopt.ops.cached import CachedCall
from guessopt.ops.drawing import draws_now
from guessopt.record import ForwardRecord, SavedCall
from guessopt.rng import NoiseSource, RandomState
from guessopt.sites import ParallelSites, Site
from guessopt.step.plan import (
    Plan,
    Transaction,
    check_finite,
    check_repeats,
    is_due_for_probe,
    reprobe,
    trace,
    unstable,
    warn_of_coupling,
)
from guessopt.step.replay import Deliver, Journal, Replay
from guessopt.tracing.context import ParallelContext, Random, SiteContext, centred, draw, walked
from guessopt.tracing.interceptor import NoGrad, without_autocast
from guessopt.update import Updates, base_step, only, together

#: What a step keeps: see ``GuessGradOptimizer``.
MODES = ("store", "replay", "stream")

#: Plans kept: one per branch taken and shape met.
MAX_PLANS = 16


@dataclass
class DrawContext:
    """The guesses of one pass.

    Attributes:
        count: guesses at each site.
        source: the stream that they are drawn from.
        known: by call, results computed before the closure makes the call; None if the pass cannot use them.
        joined: by site, guesses that were made together with the guess of an earlier parallel site.
        locals: by site, its surroundings, for estimators that learn.
        random: by call, the random states before the network's own draws, for estimators that learn.
    """

    count: int
    source: NoiseSource
    known: dict[int, CachedCall] | None
    joined: dict[int, Tensor] = field(default_factory=dict)
    contexts: dict[int, SiteContext] = field(default_factory=dict)
    random: Random = field(default_factory=dict)


class Estimation:
    """What ``GuessGradOptimizer`` does between a closure and ``.grad``; the optimizer itself is what users see.

    ``_estimate`` is the whole path. The passes are in ``engine``, the guesses in ``estimators``; here is their order.
    """

    base: Optimizer
    guesses: int
    stack_guesses: bool | None
    orthogonal: bool
    exact_last: bool | None
    memory: str
    engine: str
    batch_norm: str
    check_finite: bool
    _params: list[Tensor]
    _by_position: dict[int, Tensor]
    _ids: dict[int, int]
    _names: list[str]
    _estimators: list[Estimator]
    _amplitudes: dict[Estimator, float]
    _devices: tuple[int, ...]
    _level: Callable[[], JvpEngine]
    _noise: NoiseSource
    _cache: SiteCache
    _steps: int
    _plans: list[Plan]
    _pending: bool
    _warned: set[str]
    _budget: int | None
    audit: bool
    _asked: list[AuditReport] | None
    _hooks: Hooks
    _updates: Updates
    _together: tuple[str | None] | None
    _estimated_ids: set[int]

    def _refresh(self) -> None:
        """Look again at which parameters train."""
        raise NotImplementedError

    def _estimate(
        self, closure: Callable[[], Any], transaction: Transaction | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """closure -> SiteGraph -> guesses y_i -> one forward-mode pass -> D_n -> g^_i -> site rule -> gradients.

        Hooks on parameters do not apply to these."""
        with self._atomic(closure, transaction) as transaction:
            return self._estimated(closure, transaction)

    def _estimated(self, closure: Callable[[], Any], transaction: Transaction) -> tuple[Tensor, dict[int, Tensor]]:
        """``_estimate``, within ``_atomic``."""
        if self.memory in ("store", "auto"):
            loss, gradients, guesses = self._guess_once(closure, transaction, self.guesses)
            passes = self.guesses // guesses
            for lane in range(1, passes):
                self._noise.lane = lane
                transaction.rewind()
                for k, g in self._guess_once(closure, transaction, 1)[1].items():
                    gradients[k] = gradients[k] + g if k in gradients else g
            if passes > 1:
                gradients = {position: g / passes for position, g in gradients.items()}
        else:
            plan, records = self._derivatives(closure, transaction)
            loss = records[0].loss
            if plan.graph.stream is None:
                gradients = self._replay(plan, records, closure, transaction)
                self._learn(plan, records[0])
            else:  # block by block, without another pass
                gradients = self._gradients(plan, records[0])
        self._steps += 1
        return loss, apart({k: _laid_out(g, self._params[k]) for k, g in gradients.items()})

    def _refused(self, memory: str, graph: SiteGraph | None = None) -> str | None:
        """Why a memory mode cannot be used; None if it can. Without a graph, some reasons are not known yet."""
        if memory not in ("replay", "stream"):
            return None
        if memory == "stream" and graph is not None and graph.rewritten:
            names = ", ".join(self._names[p] for p in sorted(graph.rewritten)[:3])
            return (
                f"the closure writes parameters itself ({names}), which memory='stream' updates while it runs; "
                "use memory='replay', or write them after the step"
            )
        if memory == "stream" and graph is not None:
            self._together = self._together or (together(self.base),)
            if self._together[0]:
                return self._together[0]
        if self.orthogonal:
            return f"orthogonal takes all guesses at once, which memory={memory!r} does not keep; use memory='store'"
        for e in dict.fromkeys(e for e in self._estimators if e.learns):
            several = f"guesses={self.guesses}: each guess uses the lesson of the one before, and needs its own passes"
            if why := several if self.guesses > 1 else e.refuses(memory, graph):
                return f"{e.name} does not go with memory={memory!r} here: {why}; or use memory='store'"
        return None

    @property
    def _frozen(self) -> bool:
        """Whether batch statistics are taken for constants."""
        return self.batch_norm == "frozen_statistics"

    @contextmanager
    def _atomic(self, closure: Callable[[], Any], transaction: Transaction | None = None) -> Iterator[Transaction]:
        """Within, an exception undoes everything. Of a ``PartialUpdateError`` with a journal, the updates stay;
        ``finish`` makes the rest."""
        if not callable(closure):
            raise TypeError(f"closure: expected a function that returns the loss, got {type(closure).__name__}")
        with exclusive("step() or estimate()"):
            self._refresh()
            with lifted(self._params, self._hooks), self._restoring(closure, transaction) as started:
                yield started

    @contextmanager
    def _restoring(self, closure: Callable[[], Any], transaction: Transaction | None) -> Iterator[Transaction]:
        noise, cached, steps = self._noise.snapshot(), self._cache.copy(), self._steps
        grads, plans = [p.grad for p in self._params], list(self._plans)
        known = [(plan.uses, plan.stacks, plan.failures) for plan in plans]
        self._noise.follow()
        transaction = transaction or Transaction(self._devices)
        transaction.watch(closure, self._plans)
        try:
            yield transaction
        except BaseException as error:
            hold_interrupts()
            leave_modes()
            transaction.rewind()
            if not isinstance(error, PartialUpdateError) or error.journal is None:
                self._noise.restore(noise)
                self._cache.restore(cached)
                self._steps, self._plans = steps, plans
                for plan, before in zip(plans, known, strict=True):
                    plan.uses, plan.stacks, plan.failures = before
                    plan.ways.clear()  # the next pass finds out again which operations go one by one
                for p, grad in zip(self._params, grads, strict=True):
                    p.grad = grad
            raise
        finally:
            self._noise.lane = 0

    def _guess_once(
        self, closure: Callable[[], Any], transaction: Transaction, guesses: int
    ) -> tuple[Tensor, dict[int, Tensor], int]:
        """The loss, an estimate, and the number of guesses in it: all of them, or 1 if guesses run in turn."""
        plan, record = self._forward(closure, transaction, guesses)
        if self.orthogonal and record.d.dim() == 1:
            record = self._in_turn(plan, record, closure, transaction)
        if self.check_finite:
            check_finite(record.loss, record.d)
        guesses = len(record.d) if record.d.dim() == 2 else 1
        if guesses == 1:
            try:
                return record.loss, self._gradients(plan, record), 1
            except RuntimeError as error:
                if record.graphs is None or "inplace operation" not in str(error):
                    raise
            self._forgo_graphs(plan)
            transaction.rewind()
            return self._guess_once(closure, transaction, guesses)
        weights = projection_weights(record, plan.graph) if self.orthogonal else mean_weights(record)
        record, formed = combined(record, plan.graph, weights)
        cotangents = estimated_cotangents(plan.graph, record, formed)
        return record.loss, parameter_gradients(plan.graph, record, cotangents, self._by_position, self._ids), guesses

    def _gradients(self, plan: Plan, record: ForwardRecord) -> dict[int, Tensor]:
        """Gradients by position, from the record of a pass with one guess or none."""
        gradients = Gradients(plan.graph, self._by_position, self._ids, directed=record.params)
        formed = self._formed(plan, record, partial(gradients.consume, record))
        cotangents = estimated_cotangents(plan.graph, record, formed)
        return parameter_gradients(plan.graph, record, cotangents, self._by_position, self._ids, gradients)

    def _derivatives(self, closure: Callable[[], Any], transaction: Transaction) -> tuple[Plan, list[ForwardRecord]]:
        """The first pass of replay; one pass for each guess if guesses run in turn. The records hold ``D_n``, the loss,
        the state of the guesses' stream, and the exact errors where a site takes them."""
        records: list[ForwardRecord] = []
        plan: Plan | None = None
        while sum(record.count for record in records) < self.guesses:
            if plan is not None:
                self._noise.lane = len(records)
                transaction.rewind()
            found, record = self._forward(closure, transaction, self.guesses if plan is None else 1, keeps=False)
            if plan is not None and found is not plan:
                raise unstable(GraphMismatch(what="a pass for another guess made other calls"))
            if self.check_finite:
                check_finite(record.loss, record.d)
            plan = found
            records.append(record)
            if any(learning_step.subtracts for learning_step in record.learning_steps.values()):
                transaction.rewind()
                try:
                    self._show(plan, record.learning_steps, "look", record.noise, closure, transaction, record.random)
                except GraphMismatch as departure:
                    raise unstable(departure) from None
        assert plan is not None
        return plan, records

    def _replay(
        self,
        plan: Plan,
        records: Sequence[ForwardRecord],
        closure: Callable[[], Any],
        transaction: Transaction,
        deliver: Deliver | None = None,
        done: Collection[int] = (),
    ) -> dict[int, Tensor]:
        """The second pass: gradients by position, without those that ``deliver`` has taken."""
        transaction.rewind()
        guesses, known = [], dict[int, CachedCall]()
        for lane, record in enumerate(records):
            source, record.params = self._again(record.noise, record.count, lane)
            round = DrawContext(record.count, source, known, random=record.random)
            if record.learning_steps:
                guesses.append(self._shown(plan, record.learning_steps, "serve", round))
            else:
                guesses.append(partial(self._guess, plan, round))
        frozen = self._frozen
        run = Replay(
            self._ids, self._by_position, plan.graph, guesses, records, transaction,
            frozen_statistics=frozen, deliver=deliver, done=done,
        )  # fmt: skip
        run.known = known
        try:
            return run.replay(closure)
        except GraphMismatch as departure:
            raise unstable(departure) from None

    def _show(
        self,
        plan: Plan,
        learning_steps: Mapping[Estimator, LearningStep],
        how: str,
        noise: Any,
        closure: Callable[[], Any],
        transaction: Transaction,
        random: Random,
    ) -> None:
        """An extra pass for estimators that must see all sites before they can guess, or predict, at one."""
        level = PrimalRun(frozen_statistics=self._frozen)
        source, directions = self._again(noise)
        guess = self._shown(plan, learning_steps, how, DrawContext(1, source, None, random=random))
        ForwardRun(self._ids, plan.graph, level, guess, directions, transaction, keeps=False).run(closure)

    def _draws(
        self, plan: Plan, closure: Callable[[], Any], transaction: Transaction, random: dict[int, RandomState | None]
    ) -> None:
        """An extra pass that notes the random states before the network's own draws."""
        level = PrimalRun(frozen_statistics=self._frozen)
        run = ForwardRun(self._ids, plan.graph, level, lambda *_: None, {}, transaction, keeps=False)
        run.random = random
        run.run(closure)
        transaction.rewind()

    def _again(self, noise: Any, count: int = 1, lane: int = 0) -> tuple[NoiseSource, dict[int, Tensor]]:
        """The guesses' stream as it was before a pass, once the guesses for parameters are drawn; and these guesses."""
        source = NoiseSource(self._noise.seed)
        source.restore(noise)
        source.lane = lane
        return source, self._directions(count, source)

    def _shown(
        self, plan: Plan, learning_steps: Mapping[Estimator, LearningStep], how: str, round: DrawContext
    ) -> Guess:
        """``_guess`` in a round. For a site whose estimator learns, the lesson's method ``how`` gets the guess and the
        surroundings, which are then dropped."""
        guesses, guess = self._guesses_of(plan), partial(self._guess, plan, round)
        idle = {e for e in learning_steps if how == "see" and not e.injects(self._steps, plan.graph)}
        show = {e: getattr(learning_step, how) for e, learning_step in learning_steps.items()}
        for learning_step in learning_steps.values():
            learning_step.open()

        def shown(site: Site, s: Tensor, values: dict[int, Tensor]) -> Any:
            estimator = guesses[site.index][0] if site.index in guesses else None
            if estimator in idle:
                return None
            y = guess(site, s, values)
            if estimator not in show:
                return y
            with torch.no_grad(), without_autocast(s):
                told = show[estimator](round.contexts.pop(site.index), y)
            return y if how == "see" else told

        return shown

    def _lessons(self, plan: Plan) -> dict[Estimator, LearningStep]:
        """A step begins, for the estimators that learn."""
        guesses = self._guesses_of(plan)
        sites: dict[Estimator, list[Site]] = {}
        for index, (estimator, _, _) in guesses.items():
            if estimator.learns:
                sites.setdefault(estimator, []).append(plan.graph.sites[index])

        def noise(site: Site, shape: Shape) -> Tensor:
            return draw(self._noise, "normal", shape, site.dtype, self._params[site.params[0]].device)

        return {
            estimator: estimator.begin(
                tuple(own), plan.graph, {site.index: self._cache.peek(guesses[site.index][2]) for site in own}, noise
            )
            for estimator, own in sites.items()
        }

    def _learn(self, plan: Plan, record: ForwardRecord) -> None:
        """Keep what the estimators have learned in this step, for the next pass. From a batch with numbers that are not
        finite they learn nothing."""
        guesses = self._guesses_of(plan)
        finite = None if self.check_finite or not record.learning_steps else _finite(record)
        for learning_step in record.learning_steps.values():
            for index, state in learning_step.learned().items():
                key = guesses[index][2]
                if finite is not None:
                    state = sound(state, self._cache.peek(key), finite)
                if state is not None:
                    self._cache.put(key, self._steps, state)

    def _stream(self, closure: Callable[[], Any]) -> Tensor:
        """Replay, each gradient applied and freed as soon as it is whole."""
        with self._atomic(closure) as transaction, unscaled():
            for p in self._params:
                p.grad = None
            plan, records = self._derivatives(closure, transaction)
            if plan.uses == len(records):  # a plan's first step: see the second pass through before anything moves
                self._replay(plan, records, closure, transaction, deliver=lambda gradients: None)
            self._apply(plan, Journal(transaction.random, tuple(records)), closure, transaction)
            self._steps += 1
        self._updated()
        return records[0].loss

    def _apply(self, plan: Plan, journal: Journal, closure: Callable[[], Any], transaction: Transaction) -> None:
        """The second pass, in which the base updates each parameter as soon as its gradient is whole."""

        def deliver(gradients: dict[int, Tensor]) -> None:
            hold_interrupts()
            for position, g in gradients.items():
                self._update_one(position, _laid_out(g, self._params[position]), journal.done)
                transaction.forget(self._params[position])

        self._fire(self.base._optimizer_step_pre_hooks)
        try:
            deliver(self._replay(plan, journal.records, closure, transaction, deliver, frozenset(journal.done)))
            self._learn(plan, journal.records[0])
        except BaseException as error:
            if not journal.done or (isinstance(error, PartialUpdateError) and error.journal is None):
                raise
            raise PartialUpdateError(
                f"the step failed after {len(journal.done)} of {len(self._by_position)} parameters had been updated "
                f"({type(error).__name__}: {error}); opt.finish(error.journal, closure) updates the rest",
                journal,
            ) from error
        self._updates.passed(self.base)

    def _in_turn(
        self, plan: Plan, first: ForwardRecord, closure: Callable[[], Any], transaction: Transaction
    ) -> ForwardRecord:
        """Make a pass for each of the other guesses; return one record, as if all guesses had shared a pass."""
        records = [first]
        for lane in range(1, self.guesses):
            self._noise.lane = lane
            transaction.rewind()
            try:
                records.append(self._pass(plan, closure, transaction))
            except GraphMismatch as departure:
                raise unstable(departure) from None
        return stack(records)

    def _forward(
        self, closure: Callable[[], Any], transaction: Transaction, guesses: int = 1, *, keeps: bool = True
    ) -> tuple[Plan, ForwardRecord]:
        """One pass by the first plan that the closure follows; by a new plan if it follows none. The pass carries all
        guesses if they can share it, else one."""
        for plan in list(self._plans):
            noise = self._noise.snapshot()
            try:
                return plan, self._fresh_pass(plan, closure, transaction, guesses, keeps)
            except GraphMismatch:
                transaction.rewind()
                self._noise.restore(noise)
        for last in (False, True):  # a first run may have filled caches that later ones read
            plan = trace(
                closure, self._by_position, self._ids, self._names, self._level, transaction,
                finite=self.check_finite, stream=self._streams, together=self.memory not in ("replay", "stream"),
            )  # fmt: skip
            self._check_plan(plan)
            if self._plans:
                self._plans[0].graph.forget()
            self._plans.insert(0, plan)
            del self._plans[MAX_PLANS:]
            noise = self._noise.snapshot()
            try:
                return plan, self._fresh_pass(plan, closure, transaction, guesses, keeps)
            except GraphMismatch as departure:
                self._plans.remove(plan)
                if last:
                    raise unstable(departure) from None
                transaction.rewind()
                self._noise.restore(noise)
        raise AssertionError

    def _fresh_pass(
        self, plan: Plan, closure: Callable[[], Any], transaction: Transaction, guesses: int, keeps: bool
    ) -> ForwardRecord:
        """A pass. It is repeated if a guess was made from tensors that the closure then did not read, or if what the
        closure reads has changed so often that the layouts must be probed again."""
        probes = is_due_for_probe(plan)
        if probes:
            self._reprobe(plan, closure, transaction)
        if plan.volatile > 1 or plan.graph.constants.keys() != plan.graph.early:
            self._look(plan, closure, transaction)
        noise, cached = self._noise.snapshot(), self._cache.copy()
        for _ in range(3):
            record = self._shared_pass(plan, closure, transaction, guesses, keeps)
            due, plan.due = plan.due and not probes and plan.analysis is not None, False
            if not due and not plan.stale:
                return record
            transaction.rewind()
            self._noise.restore(noise)
            self._cache.restore(dict(cached))
            plan.volatile += plan.stale
            plan.uses -= not plan.stale
            if due:
                self._reprobe(plan, closure, transaction)
                probes = True
        raise GraphMismatch(what="it reads other tensors or numbers in every run")

    def _reprobe(self, plan: Plan, closure: Callable[[], Any], transaction: Transaction) -> None:
        reprobe(plan, closure, self._by_position, self._ids, self._level, transaction)

    def _look(self, plan: Plan, closure: Callable[[], Any], transaction: Transaction) -> Tensor:
        """Run the closure to find the tensors that guesses need before the closure reads them; returns the loss."""
        level = PrimalRun(frozen_statistics=self._frozen)
        run = ForwardRun(self._ids, plan.graph, level, lambda *site: None, {}, transaction, keeps=False)
        loss = run.run(closure)
        run.check_end(loss)
        plan.observe(run)
        transaction.rewind()
        return loss.detach().mean()

    def _shared_pass(
        self, plan: Plan, closure: Callable[[], Any], transaction: Transaction, guesses: int, keeps: bool
    ) -> ForwardRecord:
        """A pass with all guesses if they can share it, else with one. A failed attempt is undone."""
        if guesses == 1 or not self._stacks(plan):
            return self._pass(plan, closure, transaction, keeps=keeps)
        noise, cached = self._noise.snapshot(), self._cache.copy()
        try:
            record = self._pass(plan, closure, transaction, guesses, keeps)
            plan.stacks = True
            return record
        except Exception as error:
            short = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if transaction.raised or self.stack_guesses or (plan.stacks and not short):
                raise
            why = f"{type(error).__name__}: {error}"
        transaction.rewind()
        self._noise.restore(noise)
        self._cache.restore(cached)
        record = self._pass(plan, closure, transaction, keeps=keeps)  # raises too where the closure is at fault
        plan.stacks = False
        plan.failures += 1
        self._warn(f"guesses do not share a pass but run in turn, which takes longer: {why.splitlines()[0]}")
        return record

    def _stacks(self, plan: Plan) -> bool:
        """Whether guesses may share a pass, as far as is known.

        Raises:
            ValueError: they cannot, and ``stack_guesses=True``."""
        if self.stack_guesses is False:
            return False
        if plan.stacks is None or (self.stack_guesses and not plan.stacks):
            shared = ", ".join(dict.fromkeys(plan.graph.shared_writes))
            reasons = {
                f"engine={self.engine!r} carries one tangent": not ENGINES[self.engine].stacks,
                "an estimator learns from one guess at a time": any(e.learns for e in self._estimators),
                f"the network writes into memory that other tensors share ({shared})": bool(shared),
                "an operation writes tensors that are not among its arguments": bool(plan.graph.hidden),
            }
            why = next((reason for reason, holds in reasons.items() if holds), None)
            if why is not None and self.stack_guesses:
                raise ValueError(f"stack_guesses: guesses cannot share a pass here: {why}; leave it at None")
            if why is not None:
                plan.stacks = False
                if shared:
                    self._warn(f"guesses do not share a pass but run in turn, which takes longer: {why}")
        return plan.stacks is not False or plan.failures == 1  # one failure may be a passing one

    def _pass(
        self, plan: Plan, closure: Callable[[], Any], transaction: Transaction, count: int = 1, keeps: bool = True
    ) -> ForwardRecord:
        guesses, learning_steps = self._guesses_of(plan), self._lessons(plan)
        keeps = keeps or plan.graph.stream is not None
        audited = self._is_audited(plan)
        before = None if keeps and not audited else self._noise.snapshot()
        random = dict[int, RandomState | None].fromkeys(_redrawn(plan.graph)) if learning_steps else {}
        while not keeps and any(learning_step.needs_init for learning_step in learning_steps.values()):
            if None in random.values():  # first find the random states before the network's draws
                self._draws(plan, closure, transaction, random)
            self._show(plan, learning_steps, "begin", before, closure, transaction, random)
            transaction.rewind()
        level = self._level()
        if count > 1:
            level = StackedEngine(count, plan.ways, frozen_statistics=level.frozen_statistics)
        elif level.rests and self._rests(plan):
            level = self._resting(plan)
        round = DrawContext(count, self._noise, {} if level.reuses else None, random=random)
        guess: Guess = partial(self._guess, plan, round)
        if learning_steps and not keeps:
            guess = self._shown(plan, learning_steps, "see", round)
        elif not all(learning_step.keeps[0] for learning_step in learning_steps.values()):
            guess = _forgetting(guess, round.contexts)
        directions = self._directions(count, self._noise)
        left = partial(_let_go, plan.graph, round.contexts) if learning_steps and keeps else None
        run = ForwardRun(
            self._ids, plan.graph, level, guess, directions, transaction,
            keeps=keeps, left=left, direct=self._direct(plan, learning_steps),
        )  # fmt: skip
        run.known = {} if round.known is None else round.known
        if random:
            run.random = random
        run.keeps_guesses = keeps and all(learning_step.keeps[1] for learning_step in learning_steps.values())
        try:
            record = run.execute(closure, self._by_position)
        except (RuntimeError, IndexError) as error:
            if not run.guessing or not plan.uses or isinstance(error, torch.OutOfMemoryError):
                raise
            raise GraphMismatch(what=f"the way to the next layer has other shapes ({error})") from error
        if learning_steps:
            _check_real(record.errors)
        plan.observe(run)
        plan.stale = run.stale and any(e.looks_ahead for e in self._estimators)
        if audited and not plan.stale:  # a stale pass is made again
            self._audit(plan, record, before, closure, transaction, light=not keeps)
        record.noise, record.learning_steps = before, learning_steps
        if keeps:
            record.contexts = round.contexts
        else:
            with torch.no_grad():
                for learning_step in learning_steps.values():
                    learning_step.close(record)
            record.tangents, record.params = [], {}
            if not learning_steps and not any(
                site.cut is not None and site.index not in guesses for site in plan.graph.sites
            ):
                record.errors = []
        plan.graph.met.clear()
        if not keeps:
            plan.graph.met.update(run.met)
        if plan.loss is not None:

            def again() -> Tensor:
                with transaction.ahead():
                    transaction.rewind()
                    return self._look(plan, closure, transaction)

            check_repeats(plan.loss, record.loss, plan.tolerance, again)
            plan.loss = None
        plan.uses += not plan.stale
        if plan is not self._plans[0]:
            self._plans.remove(plan)
            self._plans[0].graph.forget()
            self._plans.insert(0, plan)
        return record

    def _is_audited(self, plan: Plan) -> bool:
        """A plan's first pass, the second, fourth, eighth, ...: see ``engine.audit``."""
        uses = plan.uses + 1
        return self._asked is not None or (self.audit and uses & (uses - 1) == 0)

    def _audit(
        self,
        plan: Plan,
        record: ForwardRecord,
        before: Any,
        closure: Callable[[], Any],
        transaction: Transaction,
        light: bool,
    ) -> None:
        """Raise ``AuditError`` unless plain runs show that the loss moves as the pass's tangents say. Buffers and
        random states are as the pass has left them."""
        if why := self._is_not_auditable(plan, record):
            report = AuditReport(float(record.d.sum()), skipped=(why,))
        else:
            lane = 0 if record.count > 1 else self._noise.lane
            guesses = partial(self._white if light else self._guessed_again, plan, record, before, lane)
            with transaction.ahead():
                try:
                    if light:
                        transaction.rewind()
                        guess, directions = guesses()
                        level = self._level()
                        run = ForwardRun(self._ids, plan.graph, level, guess, directions, transaction, keeps=False)
                        record = run.execute(closure, self._by_position)
                    audit = Audit(
                        closure, plan.graph, guesses, self._ids, self._by_position, transaction, record,
                        plan.tolerance, light=light,
                    )  # fmt: skip
                    report = audit.report(calls=self._asked is not None)
                except GraphMismatch as departure:
                    raise unstable(departure) from None
        if self._asked is not None:
            self._asked.append(report)
        else:
            report.check()

    def _is_not_auditable(self, plan: Plan, record: ForwardRecord) -> str | None:
        """Why a pass is not audited."""
        reasons = {
            "batch_norm='frozen_statistics' leaves a part of the derivative out by design": (
                self._frozen and plan.normalises_batch
            ),
            "no guess is made in this step": self._rests(plan),
            "the guesses are replaced by their means": self._noise.means,
            "the loss or its derivative is not finite": not bool(torch.isfinite(record.loss + record.d.sum())),
        }
        return next((why for why, holds in reasons.items() if holds), None)

    def _guessed_again(
        self, plan: Plan, record: ForwardRecord, before: Any, lane: int
    ) -> tuple[Guess, Mapping[int, Tensor]]:
        """The pass's guess function from its start, and the guesses for parameters. Guesses that were kept are used;
        others are made once more. Of K guesses, the first."""
        directed = {saved.call.index: saved.directions for saved in record.saved_calls if saved.directions is not None}
        covered = {s.index for c in directed for s in plan.graph.sites_at[c]} | record.guesses.keys()
        if covered >= self._guesses_of(plan).keys() and not any(e.debias for e in self._estimators):
            several = record.count > 1

            def kept(site: Site, s: Tensor, values: dict[int, Tensor]) -> Tensor | list[Tensor] | None:
                y = record.guesses.get(site.index)
                if y is not None:
                    return y[0] if several else y
                vs = directed.get(site.call.index)
                return None if vs is None else [v[0] if several else v for v in vs]

            return kept, {p: v[0] if several else v for p, v in record.params.items()}
        source, directions = self._again(before, 1, lane)
        round = DrawContext(1, source, None)
        return _forgetting(partial(self._guess, plan, round), round.contexts), directions

    def _white(self, plan: Plan, record: ForwardRecord, before: Any, lane: int) -> tuple[Guess, Mapping[int, Tensor]]:
        """White noise in place of the pass's guesses: the same in every run, whatever the network computes."""
        source, directions = self._again(before, 1, lane)
        guessed = self._guesses_of(plan).keys()

        def noise(site: Site, s: Tensor, values: dict[int, Tensor]) -> Tensor | None:
            if site.index not in guessed or 0 in s.shape:
                return None
            y = draw(source, "normal", tuple(s.shape), s.dtype, s.device)
            return y if site.reach is None else site.reach.restrict(y)

        return noise, directions

    def audited(self, closure: Callable[[], Any]) -> AuditReport:
        """The report for ``guessopt.audit``; everything is as before, afterwards."""

        class Enough(Exception):
            pass

        found: list[AuditReport] = []
        self._asked = found
        try:
            with self._atomic(closure) as transaction:
                self._forward(closure, transaction, self.guesses, keeps=self.memory in ("store", "auto"))
                raise Enough
        except Enough:
            return found[-1]
        finally:
            self._asked = None

    def _guess(
        self, plan: Plan, round: DrawContext, site: Site, s: Tensor, values: dict[int, Tensor]
    ) -> Tensor | tuple[Tensor, Tensor] | list[Tensor] | None:
        """The guess ``y`` for a site. Several guesses are stacked.

        Returns:
            None if the site needs no guess; a list of directions for its parameters if these are guessed; a pair
            (guess, corrected guess) with ``debias=True``.
        """
        found = self._guesses_of(plan).get(site.index)
        if found is None:
            return None
        if site.index in round.joined:
            return round.joined.pop(site.index)
        estimator, key, learned = found
        source, several = round.source, round.count > 1
        joint, known = plan.joints.get(site.index), None if estimator.learns else round.known
        ctx = SiteContext(site, s, values, source, several=several, known=known)
        if joint is not None:
            ctx = ParallelContext(joint, site, s, values, source, several=several, known=known)
        if estimator.learns:
            ctx = lasting(ctx, values, source)
            round.contexts[site.index] = ctx.replaying(round.random) if round.random else ctx
            if not estimator.injects(self._steps, plan.graph):
                return None
        if 0 in site.shape:  # an expert to which no token goes
            return s.new_zeros((round.count, *site.shape) if several else site.shape)
        lanes = source.lanes
        if site.by_parameter and estimator.per_example_parameters:
            noise = centred(estimator.noise)
            drawn = [[ctx.noise(shape, noise) for shape in site.direction_shapes] for _ in lanes(round.count)]
            return [_stacked(each, round.count) for each in zip(*drawn, strict=True)]
        with NoGrad():
            state = self._prepared(site, estimator, key, ctx)
            if estimator.learns:
                state = (state, self._cache.peek(learned))
            made = (_typed(estimator.sample(state, ctx), s) for _ in lanes(round.count))
            if joint is not None:
                each_site = zip(joint.sites, *made, strict=True)
                round.joined |= {index: _stacked(ys, round.count) for index, *ys in each_site}
                return round.joined.pop(site.index)
            restrict = site.reach.restrict if site.reach is not None else None
            ys = _stacked(made if restrict is None else map(restrict, made), round.count)
            if not estimator.debias:
                return ys
            each = ys if several else [ys]
            return ys, _stacked((_typed(estimator.correct(state, ctx, y), s) for y in each), round.count)

    def _formed(
        self, plan: Plan, record: ForwardRecord, consume: Callable[[dict[int, Tensor]], None] | None = None
    ) -> dict[int, Tensor]:
        """The cotangents that estimators form themselves, without those that ``consume`` has taken. What the estimators
        learn here is used from the next pass on."""
        formed: dict[int, Tensor] = {}
        guesses = self._guesses_of(plan)
        for estimator, learning_step in record.learning_steps.items():
            own = [index for index in record.contexts if guesses[index][0] == estimator]
            contexts = {index: record.contexts.pop(index) for index in own}
            with torch.no_grad(), without_autocast(record.errors[0]):
                formed |= learning_step.estimate(contexts, record, consume or formed.update)
        self._learn(plan, record)
        return formed

    def _direct(self, plan: Plan, learning_steps: Mapping[Estimator, LearningStep]) -> frozenset[int]:
        """Calls whose gradients come from the reverse graphs of a stream's blocks: no guess corrects them in this
        step."""
        graph = plan.graph
        corrected = any(
            learning_step.keeps[1] and e.injects(self._steps, graph) for e, learning_step in learning_steps.items()
        )
        return frozenset() if corrected else graph.direct

    def _resting(self, plan: Plan) -> JvpEngine:
        """The level of a step without guesses: it takes the exact errors, and along a stream it keeps the blocks'
        reverse graphs unless they are made again later."""
        frozen, stream = self._frozen, plan.graph.stream
        lacks = not plan.keeps_graphs or any(cut.shared for cut in plan.graph.cuts)
        if stream is None or lacks or self.memory == "replay":
            return LossGradRun(frozen_statistics=frozen)
        return BlockVjpRun(stream, plan.graph.marked, frozen_statistics=frozen)

    def _rests(self, plan: Plan) -> bool:
        """Whether this step makes no guess: every estimator learns, and predicts without one in this step."""
        return all(e.learns and not e.injects(self._steps, plan.graph) for e in self._amplitudes)

    def _guesses_of(self, plan: Plan) -> dict[int, tuple[Estimator, str, str]]:
        """By site, the estimator and the names of its prepared and its learned state. A site is absent if its error is
        known exactly, if it shares a later site's guess, or if its parameters themselves are guessed."""
        if plan.guesses is None:
            plan.guesses = {}
            for site in plan.graph.sites:
                e = self._estimator_of(site)
                if not (self._is_served(plan.graph, site) or self._is_exact(site, e) or e.space == "parameters"):
                    plan.guesses[site.index] = (e, self._key(site, e), self._learned_key(plan.graph, site, e))
            plan.joints = {joint.sites[0]: joint for joint in plan.graph.joints if self._joins(plan.guesses, joint)}
        return plan.guesses

    @staticmethod
    def _joins(guesses: Mapping[int, tuple[Estimator, str, str]], joint: ParallelSites) -> bool:
        """Whether one estimator guesses at all of its sites, and does so for all at once."""
        estimators = {guesses[index][0] if index in guesses else None for index in joint.sites}
        return len(estimators) == 1 and all(e is not None and e.joint for e in estimators)

    @staticmethod
    def _key(site: Site, estimator: Estimator) -> str:
        return f"{describe(estimator)} {site.segment.key}" if site.segment is not None and estimator.prepares else ""

    @staticmethod
    def _learned_key(graph: SiteGraph, site: Site, estimator: Estimator) -> str:
        """Names a site across traces of the same model: its parameters, and which of their uses it is."""
        use = sum(other.params == site.params for other in graph.sites[: site.index])
        return f"{describe(estimator)} at {site.params} {use}"

    def _prepared(self, site: Site, estimator: Estimator, key: str, ctx: SiteContext) -> Any:
        if not key:
            return None
        return self._cache.get(
            key,
            step=self._steps,
            refresh=estimator.refresh,
            make=lambda previous: estimator.prepare(site, ctx.weights(), previous),
        )

    def _is_served(self, graph: SiteGraph, site: Site) -> bool:
        """Whether the site shares a later site's guess."""
        while site.shares is not None:
            site = graph.sites[site.shares]
            if self._estimator_of(site).space == "activations":
                return True
        return False

    def _is_exact(self, site: Site, estimator: Estimator) -> bool:
        wanted = estimator.exact_last if self.exact_last is None else self.exact_last
        return wanted and site.cut is not None

    def _directions(self, count: int, source: NoiseSource) -> dict[int, Tensor]:
        """Guesses for the parameters whose estimator works on these."""
        found: dict[int, Tensor] = {}
        for position, p in self._by_position.items():
            estimator = self._estimators[position]
            if estimator.space == "parameters":
                vs = (draw(source, estimator.noise, tuple(p.shape), p.dtype, p.device) for _ in source.lanes(count))
                amplitude = self._amplitudes[estimator]
                found[position] = _stacked(vs, count) if amplitude == 1 else _stacked(vs, count).mul_(amplitude)
        return found

    def _update(self, arrived: Iterable[Tensor] = ()) -> None:
        """The base's own step, without the closure, whole or not at all (see ``Updates``); its own hooks before a step
        fire, the global ones have fired for this optimizer.

        Args:
            arrived: parameters whose hooks wait for the gradient that is now in ``.grad``.
        """
        self._fire(self.base._optimizer_step_pre_hooks)
        with self._updates.whole(self.base, self._params, self._names):
            for p in arrived:
                fire(p)
            base_step(self.base)

    def _updated(self) -> None:
        """The update is final; then the base's hooks after a step fire. An error of theirs does not undo the step."""
        self._pending = False
        self._estimated_ids.clear()
        self._fire(self.base._optimizer_step_post_hooks)

    def _fire(self, hooks: Mapping[int, Callable[..., Any]]) -> None:
        for hook in list(hooks.values()):
            hook(self.base, (), {})

    def _update_one(self, position: int, gradient: Tensor, done: set[int]) -> None:
        """The base's step for one parameter, which is then ``done`` whatever yet fails, and its gradient freed."""
        p, name = self._params[position], self._names[position]
        p.grad = hooked(gradient, p, self._hooks, name)
        try:
            with only(self.base, p, unfused=gradient.is_sparse), self._updates.single(self.base, p, name):
                fire(p)
                base_step(self.base)
                done.add(position)
        finally:
            p.grad = None

    # --- which guess, and which warnings ---

    @property
    def _streams(self) -> bool:
        """Whether one estimator serves all and works along residual streams."""
        return len(set(self._estimators)) == 1 and self._estimators[0].streams

    def _choice_of(self, site: Site) -> Estimator:
        """The first parameter's; parameters with guesses of their own (directional descent) come last."""
        estimators = [self._estimators[position] for position in site.params]
        return next((e for e in estimators if e.space == "activations"), estimators[0])

    def _estimator_of(self, site: Site) -> Estimator:
        """The one that serves the site; the choice itself, unless that leaves the work to others."""
        return self._choice_of(site).for_site(site)

    def _check_plan(self, plan: Plan) -> None:
        """Raise ``ValueError`` for options that this model does not allow; warn, once, of surprises."""
        own = [site for site in plan.graph.sites if site.shares is None]
        if why := self._refused(self.memory, plan.graph):
            raise ValueError(f"memory: {why}")
        by_estimator: dict[Estimator, list[Site]] = {}
        for site in own:
            by_estimator.setdefault(self._estimator_of(site), []).append(site)
        for estimator, sites in by_estimator.items():
            estimator.check(tuple(sites))
            for site in sites:
                note = plan.graph.blocked.get(site.index) or estimator.note(site)
                if note and estimator.guided and estimator is self._choice_of(site):
                    self._warn(
                        f"{estimator.name}: {self._names[site.params[0]]} ({site.op}) gets another guess: {note}"
                    )
        warn_of_coupling(plan, self._warn)
        if self.orthogonal:
            self._check_orthogonal(plan)
        if self._frozen and plan.normalises_batch:
            self._warn(
                "batch_norm='frozen_statistics': batch statistics are taken for constants; the estimate leaves out "
                "how examples act on each other through them, a bias that grows as batches shrink"
            )
        if plan.routes:
            self._warn(
                "the network picks rows by indices that it computes as it runs: where the examples lie is checked "
                "anew in every step, at the cost of one more forward-mode pass"
            )
        if plan.compiled:
            self._warn("torch.compile'd code in the closure runs uncompiled: compiled code would lose the tangents")
        if unread := self._unread(plan.graph):
            few = ", ".join(unread[:5]) + (f" and {len(unread) - 5} more" if len(unread) > 5 else "")
            self._warn(f"the loss does not depend on {few}: no gradient will be estimated for them")

    def _unread(self, graph: SiteGraph) -> list[str]:
        """Parameters from which no derivative reaches the loss."""
        read = {p for site in graph.sites for p in site.params} | set(graph.loss_params)
        return [self._names[k] for k in self._by_position if k not in read]

    def _forgo_graphs(self, plan: Plan) -> None:
        plan.keeps_graphs = False
        self._warn(
            "the network writes into memory that its own backward would read, so no block's graph can be kept: each "
            "block is run once more, which takes longer"
        )

    def _check_orthogonal(self, plan: Plan) -> None:
        for estimator in self._estimators:
            if estimator.learns or estimator.debias:
                how = (
                    "forms the estimate itself" if estimator.learns else "undoes its bias guess by guess (debias=True)"
                )
                raise ValueError(f"orthogonal: not with {estimator.name}, which {how}; leave out one of the two")
        guessed = [plan.graph.sites[index] for index in self._guesses_of(plan)]
        entries = sum(
            sum(map(numel, site.direction_shapes)) if site.by_parameter else numel(site.shape) for site in guessed
        )
        entries += sum(p.numel() for k, p in self._by_position.items() if self._estimators[k].space == "parameters")
        if self.guesses * plan.graph.batch > entries:
            self._warn(
                f"orthogonal: {self.guesses} guesses in {entries // plan.graph.batch} dimensions per example depend on "
                "each other: the estimate is the projection on all that they span; fewer guesses give the same"
            )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, GuessWarning, stacklevel=_users_frame())


def _check_real(errors: Sequence[Tensor]) -> None:
    """Raise ``ClosureError`` if an estimator that learns would have to learn from complex errors."""
    shape = next((list(e.shape) for e in errors if e.is_complex()), None)
    if shape is not None:
        raise ClosureError(
            f"learned_feedback: the loss reads a complex tensor of shape {shape} from the network, and feedback maps "
            "are real; use another estimator, or let the network end in torch.view_as_real or abs"
        )


def _users_frame() -> int:
    """The stack level, for ``warnings.warn`` in the caller, of the first frame outside this package and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("guessopt", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def _laid_out(g: Tensor, p: Tensor) -> Tensor:
    """The gradient in the parameter's dtype, and in its memory layout, which torch's fused updates take for granted."""
    if g.dtype is not p.dtype:
        g = g.to(p.dtype)
    if g.layout is not torch.strided or g.stride() == p.stride():
        return g
    return torch.empty_like(p, requires_grad=False).copy_(g)


def _finite(record: ForwardRecord) -> Tensor:
    """Whether the loss, the errors and the directional derivatives are, as a number on the loss's device."""
    parts = (record.loss, record.d, *record.errors)
    return torch.isfinite(torch.stack([t.detach().sum().to(record.loss) for t in parts]).sum())


def _forgetting(guess: Guess, contexts: dict[int, SiteContext]) -> Guess:
    """The guess, without what it leaves in ``contexts``."""

    def forgetting(site: Site, s: Tensor, values: dict[int, Tensor]) -> Any:
        y = guess(site, s, values)
        contexts.clear()
        return y

    return forgetting


def _redrawn(graph: SiteGraph) -> frozenset[int]:
    """Calls that draw random numbers and that estimators which learn run once more."""

    def found() -> frozenset[int]:
        segments = [site.segment for site in graph.sites if site.segment is not None]
        return frozenset(call.index for segment in segments for call in walked(segment) if draws_now(call))

    return frozenset() if graph.stream is not None else graph.derive("redrawn", found)


def _let_go(graph: SiteGraph, contexts: dict[int, SiteContext], saved: SavedCall) -> None:
    """After a rectifier, keep its result in place of its input, whose memory is given back: the mask is the same."""
    for index, position in graph.rectified.get(saved.call.index, ()):
        if index in contexts:
            contexts[index].s = saved.args[position]


def _typed(y: Any, s: Tensor) -> Any:
    """The guess in the dtype of the site's output: the next weight may have another one."""
    return y.to(s.dtype) if isinstance(y, Tensor) and y.dtype is not s.dtype else y


def _stacked(guesses: Iterable[Tensor], count: int) -> Tensor:
    """A single guess as it is; K guesses as one tensor ``[K, ...]``."""
    if count == 1:
        (only,) = guesses
        return only
    stack: Tensor | None = None
    for k, guess in enumerate(guesses):
        stack = guess.new_empty(count, *guess.shape) if stack is None else stack
        stack[k].copy_(guess)
    assert stack is not None
    return stack


def lasting(ctx: SiteContext, values: dict[int, Tensor], source: NoiseSource) -> SiteContext:
    """The surroundings of a site, with copies of tensors that the closure may yet write in place."""
    site, segment = ctx.site, ctx.site.segment
    if segment is not None and any(call.in_place for call in segment.program):
        needed = {v for call in segment.program for v in call.inputs if v in values}
        values = {**values, **{v: values[v].clone() for v in needed}}
    elif not site.overwritten:
        return ctx
    return SiteContext(site, ctx.s.clone(), values, source)
