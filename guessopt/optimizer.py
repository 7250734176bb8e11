"""``GuessGradOptimizer``: a ``torch.optim`` optimizer whose gradients are guessed in a forward pass."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from guessopt.cache import SiteCache
from guessopt.engine.forward import Departure, Pass
from guessopt.engine.gradients import estimated_cotangents, parameter_gradients
from guessopt.engine.levels import make_level
from guessopt.engine.planning import (
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
from guessopt.engine.replay import Deliver, Journal, Replay
from guessopt.engine.stacked import StackedLevel, combined, mean_weights, projection_weights, stack
from guessopt.errors import GuessWarning, PartialUpdateError
from guessopt.estimators.base import Estimator, describe, estimators_for, plain
from guessopt.memory import bytes_of, choose
from guessopt.rng import NoiseSource
from guessopt.sites import ForwardRecord, Site, SiteGraph, numel
from guessopt.tracing.local import Local, centred, draw

#: What a step keeps: see ``GuessGradOptimizer``.
MODES = ("store", "replay", "stream")

#: Plans kept: one per branch taken and shape met.
MAX_PLANS = 16


class GuessGradOptimizer(Optimizer):
    """Trains without backpropagation: forward-mode AD with structured guesses fills ``.grad``,
    ``base`` does the update.

    Args:
        params: parameters, named parameters, or groups; a group may carry its own ``"estimator"``.
        base: an optimizer class (built with ``base_kwargs``), a callable from groups to an optimizer, or an optimizer
        built
            on the same parameters.
        estimator: an estimator, its class or its registered name; or a dict from patterns of parameter names (the first
            that matches decides) to any of these.
        guesses: K independent guesses per step, averaged. They share one pass: the primal is computed once, and K
            tangents are in memory at a time.
        stack_guesses: False takes a pass for each guess in turn, with the memory of one. None, the default, does so
            only where guesses cannot share: another engine than ``"fast"``, estimators that learn, a network that
            writes into memory which other tensors share, a GPU out of memory. True raises in place of that. The
            guesses are the same either way.
        orthogonal: in place of the mean, take the cotangent's projection on the span of the guesses, times
            ``c = mean_k |y_k|^2 / K``: ``g^ = c Y (Y^T Y)^{-1} D``, with ``Y`` an example's K guesses at all sites.
            Equal to the mean where these are orthogonal and of one length, and unbiased where they are isotropic and
            normal; what guesses have in common is not counted twice. Guesses in turn are then all kept.
        exact_last: whether sites read by the loss directly take their exact error; None leaves it to the estimator.
        memory: ``"store"``: one pass, which keeps every site's input and guess until the directional derivatives are
            known. ``"replay"``: two passes; the first keeps nothing, the second makes inputs and guesses again, as the
            random states are the same. ``"stream"``: replay in which ``step(closure)`` has ``base`` update each
            parameter as soon as its gradient is whole, and frees it: no full ``.grad`` ever exists (``estimate`` fills
            ``.grad`` as ever, to accumulate or to clip). A base of ``torch.optim`` is built with ``fused=True`` where
            it can be. ``"auto"``: the fastest of these within ``budget``, by ``guessopt.plan`` in the first step, whose
            name the attribute ``memory`` then has.
        budget: for ``memory="auto"``: bytes that a step may take above parameters and base state, as an integer or a
            string such as ``"8GB"``; None: the GPU's free memory, or on a CPU no limit.
        engine: ``"fast"`` (own tangent rules), ``"dual"`` (torch's, on dual tensors) or ``"func"``
            (``torch.func.jvp``, the reference).
        seed: of the guesses; None follows ``torch.manual_seed``.
        check_finite: refuse a step on a non-finite loss (one device sync a step).
        batch_norm: in training mode, ``"exact"`` differentiates through the batch statistics, which couples the
        examples:
            sites before it take the scalar derivative. ``"frozen_statistics"`` takes the statistics for constants: one
            derivative per example, far less noise, and a bias (what examples do to each other is left out).

    Raises:
        ValueError, TypeError: bad arguments, by name. ``step`` raises ``ValueError`` for ``stack_guesses=True`` where
            guesses cannot share a pass, and for ``orthogonal`` with estimators that learn or undo their bias.

    A complete loop; only the two lines with ``opt`` differ from ordinary training:

    >>> import torch, torch.nn.functional as F
    >>> from guessopt import GuessGradOptimizer, WPerp
    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(64, 8), torch.randint(2, (64,))
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> opt = GuessGradOptimizer(model.parameters(), base=torch.optim.AdamW, estimator=WPerp(k=2), lr=1e-2)
    >>> losses = [opt.step(lambda: F.cross_entropy(model(x), y)).item() for _ in range(50)]
    >>> losses[-1] < losses[0]
    True
    """

    def __init__(
        self,
        params: Iterable[Any],
        base: Any = torch.optim.AdamW,
        estimator: Any = "w_perp",
        *,
        guesses: int = 1,
        stack_guesses: bool | None = None,
        orthogonal: bool = False,
        exact_last: bool | None = None,
        memory: str = "store",
        budget: int | str | None = None,
        engine: str = "fast",
        seed: int | None = None,
        check_finite: bool = True,
        batch_norm: str = "exact",
        **base_kwargs: Any,
    ) -> None:
        if not isinstance(guesses, int) or guesses < 1:
            raise ValueError(
                f"guesses: the number of guesses per step must be an integer of at least 1, got {guesses!r}"
            )
        if memory not in (*MODES, "auto"):
            raise ValueError(f"memory: {memory!r} is not one of {', '.join(MODES)}, auto")
        if budget is not None and memory != "auto":
            raise ValueError(f"budget: memory={memory!r} takes none; use memory='auto'")
        if stack_guesses not in (None, True, False):
            raise ValueError(f"stack_guesses: {stack_guesses!r} is not one of None, True, False")
        if orthogonal and guesses < 2:
            raise ValueError(f"orthogonal: takes at least 2 guesses to project on, got guesses={guesses}")
        if orthogonal and memory not in ("store", "auto"):
            raise ValueError(
                f"orthogonal: takes all guesses at once, which memory={memory!r} does not keep; use 'store'"
            )
        if batch_norm not in ("exact", "frozen_statistics"):
            raise ValueError(f"batch_norm: {batch_norm!r} is not one of exact, frozen_statistics")
        self._level = partial(make_level, engine, frozen_statistics=batch_norm == "frozen_statistics")
        self._level()
        self.stack_guesses, self.orthogonal = stack_guesses, bool(orthogonal)
        self.guesses, self.exact_last, self.memory, self.engine = guesses, exact_last, memory, engine
        self.batch_norm = batch_norm
        self.check_finite = check_finite
        self._budget = None if budget is None else bytes_of(budget)
        self._default = plain(estimator)
        groups = _groups(params, self._default)
        if memory in ("stream", "auto"):
            base_kwargs = _fused(base, groups, base_kwargs)
        self.base = _build(base, groups, base_kwargs, self._default)
        super().__init__([{"params": list(g["params"])} for g in self.base.param_groups], {})
        self._noise = NoiseSource(seed)
        self._cache = SiteCache()
        self._steps = 0
        self._plans: list[Plan] = []
        self._pending = False
        self._warned: set[str] = set()
        self._trainable: tuple[bool, ...] = ()
        self._refresh()

    # --- the path of a step -------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """With a closure: zero the gradients, estimate them, update; returns the loss (before the update). Without:
        update from the gradients that ``estimate`` has added.

        Args:
            closure: computes the loss (a scalar, or per-example losses ``[N]``, of which the mean is taken) and nothing
                else; may run more than once, with random states replayed and buffers changed once.

        Raises:
            ClosureError: no gradient can be estimated; everything is as before.
            RuntimeError: nothing estimated, or estimated gradients pending.
        """
        if closure is None:
            if all(p.grad is None for p in self._params):
                raise RuntimeError(
                    "step() found no gradient: call estimate(closure) before it, or pass the closure: step(closure)"
                )
            self._update()
            return None
        if self._pending and any(p.grad is not None for p in self._params):
            raise RuntimeError(
                "step(closure) would discard the gradients that estimate(closure) has added: call step() to apply "
                "them or zero_grad() to drop them"
            )
        self._settle(closure)
        if self.memory == "stream":
            return self._stream(closure)
        loss, gradients = self._estimate(closure)
        for position, p in enumerate(self._params):
            p.grad = gradients.get(position)
        self._update()
        return loss

    def estimate(self, closure: Callable[[], Any]) -> Tensor:
        """Add estimated gradients to ``.grad``, as ``loss.backward()`` would; returns the loss.
        ``step()`` applies them."""
        self._settle(closure)
        loss, gradients = self._estimate(closure)
        for position, gradient in gradients.items():
            p = self._params[position]
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        self._pending = True
        return loss

    def _estimate(
        self, closure: Callable[[], Any], transaction: Transaction | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """closure -> SiteGraph -> guesses y_i -> one forward-mode pass -> D_n -> g^_i -> site rule -> gradients."""
        with self._atomic(closure, transaction) as transaction:
            if self.memory in ("store", "auto"):
                loss, gradients, guesses = self._guess_once(closure, transaction)
                passes = self.guesses // guesses
                for lane in range(1, passes):
                    self._noise.lane = lane
                    transaction.rewind()
                    for k, g in self._guess_once(closure, transaction)[1].items():
                        gradients[k] = gradients[k] + g if k in gradients else g
                if passes > 1:
                    gradients = {position: g / passes for position, g in gradients.items()}
            else:
                plan, records = self._derivatives(closure, transaction)
                loss, gradients = records[0].loss, self._replay(plan, records, closure, transaction)
            self._steps += 1
            return loss, {k: g.to(self._params[k].dtype) for k, g in gradients.items()}

    def _settle(self, closure: Callable[[], Any]) -> None:
        """Replace ``memory="auto"`` by the mode that serves."""
        if self.memory == "auto":
            self.memory = choose(self, closure, self._budget)

    def _modes(self) -> tuple[str, ...]:
        """The memory modes that all estimators allow."""
        return ("store",) if any(e.learns for e in self._estimators) else MODES

    @contextmanager
    def _atomic(self, closure: Callable[[], Any], transaction: Transaction | None = None) -> Iterator[Transaction]:
        """Everything within, or nothing: an exception leaves all as it was."""
        if not callable(closure):
            raise TypeError(f"closure: expected a function that returns the loss, got {type(closure).__name__}")
        self._refresh()
        noise, cached, steps = self._noise.snapshot(), self._cache.copy(), self._steps
        grads, plans = [p.grad for p in self._params], list(self._plans)
        self._noise.follow()
        transaction = transaction or Transaction(self._devices)
        try:
            yield transaction
        except PartialUpdateError:
            transaction.rewind()
            raise
        except BaseException:
            transaction.rewind()
            self._noise.restore(noise)
            self._cache.restore(cached)
            self._steps, self._plans = steps, plans
            for p, grad in zip(self._params, grads, strict=True):
                p.grad = grad
            raise
        finally:
            self._noise.lane = 0

    def _guess_once(
        self, closure: Callable[[], Any], transaction: Transaction
    ) -> tuple[Tensor, dict[int, Tensor], int]:
        """An estimate, and how many guesses have gone into it: all, or where they go in turn one."""
        plan, record = self._forward(closure, transaction, self.guesses)
        if self.orthogonal and record.d.dim() == 1:
            record = self._in_turn(plan, record, closure, transaction)
        if self.check_finite:
            check_finite(record.loss, record.d)
        guesses = len(record.d) if record.d.dim() == 2 else 1
        if guesses > 1:
            weights = projection_weights(record, plan.graph) if self.orthogonal else mean_weights(record)
            record, formed = combined(record, plan.graph, weights)
        else:
            formed = self._formed(plan, record)
        cotangents = estimated_cotangents(plan.graph, record, formed)
        return record.loss, parameter_gradients(plan.graph, record, cotangents, self._by_position, self._ids), guesses

    def _derivatives(self, closure: Callable[[], Any], transaction: Transaction) -> tuple[Plan, list[ForwardRecord]]:
        """The first pass of replay, or where guesses go in turn one for each: what it leaves is ``D_n``, the loss and
        the state of the guesses' stream (and the exact errors, where a site takes them)."""
        records: list[ForwardRecord] = []
        plan: Plan | None = None
        while sum(record.count for record in records) < self.guesses:
            if plan is not None:
                self._noise.lane = len(records)
                transaction.rewind()
            found, record = self._forward(closure, transaction, self.guesses if plan is None else 1, keeps=False)
            if plan is not None and found is not plan:
                raise unstable()
            if self.check_finite:
                check_finite(record.loss, record.d)
            plan = found
            records.append(record)
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
        """The second pass: gradients by position, but for those handed to ``deliver``."""
        transaction.rewind()
        guesses = []
        for lane, record in enumerate(records):
            source = NoiseSource(self._noise.seed)
            source.restore(record.noise)
            source.lane = lane
            record.params = self._directions(record.count, source)
            guesses.append(partial(self._guess, self._guesses_of(plan), {}, record.count, source))
        frozen = self.batch_norm == "frozen_statistics"
        run = Replay(
            self._ids, self._by_position, plan.graph, guesses, records, transaction.saved,
            frozen_statistics=frozen, deliver=deliver, done=done,
        )  # fmt: skip
        try:
            return run.replay(closure)
        except Departure:
            raise unstable() from None

    def _stream(self, closure: Callable[[], Any]) -> Tensor:
        """Replay, each gradient applied and freed as soon as it is whole."""
        with self._atomic(closure) as transaction:
            for p in self._params:
                p.grad = None
            plan, records = self._derivatives(closure, transaction)
            if plan.uses == len(records):  # a plan's first step: see the second pass through before anything moves
                self._replay(plan, records, closure, transaction, deliver=lambda gradients: None)
            self._apply(plan, Journal(transaction.random, tuple(records)), closure, transaction)
            self._steps += 1
            return records[0].loss

    def finish(self, journal: Journal, closure: Callable[[], Any]) -> None:
        """Complete a step of ``memory="stream"`` that failed half-way: update the parameters that it had not reached.

        Args:
            journal: of the ``PartialUpdateError``; completed in place.
            closure: the same closure.

        Raises:
            PartialUpdateError: it failed again, further on or at the same place.
        """
        transaction = Transaction(self._devices)
        now, transaction.random = transaction.random, journal.random
        self._refresh()
        if not self._plans:
            self._plans.append(
                trace(closure, self._by_position, self._ids, self._names, self._level, transaction, finite=False)
            )
        try:
            self._apply(self._plans[0], journal, closure, transaction)
            self._steps += 1
        except BaseException:
            transaction.random = now
            transaction.rewind()
            raise

    def _apply(self, plan: Plan, journal: Journal, closure: Callable[[], Any], transaction: Transaction) -> None:
        """The second pass, in which the base updates each parameter as its gradient is whole; its hooks fire once."""

        def deliver(gradients: dict[int, Tensor]) -> None:
            for position, g in gradients.items():
                self._update_one(position, g.to(self._params[position].dtype))
                journal.done.add(position)

        self._fire(self.base._optimizer_step_pre_hooks)
        try:
            deliver(self._replay(plan, journal.records, closure, transaction, deliver, frozenset(journal.done)))
        except BaseException as error:
            if not journal.done:
                raise
            raise PartialUpdateError(
                f"the step failed after {len(journal.done)} of {len(self._by_position)} parameters had been updated "
                f"({type(error).__name__}: {error}); opt.finish(error.journal, closure) updates the rest",
                journal,
            ) from error
        self._fire(self.base._optimizer_step_post_hooks)
        self._pending = False

    def _in_turn(
        self, plan: Plan, first: ForwardRecord, closure: Callable[[], Any], transaction: Transaction
    ) -> ForwardRecord:
        """The other guesses by passes of their own; all as if they had shared one."""
        records = [first]
        for lane in range(1, self.guesses):
            self._noise.lane = lane
            transaction.rewind()
            try:
                records.append(self._pass(plan, closure, transaction))
            except Departure:
                raise unstable() from None
        return stack(records)

    def _forward(
        self, closure: Callable[[], Any], transaction: Transaction, guesses: int = 1, *, keeps: bool = True
    ) -> tuple[Plan, ForwardRecord]:
        """One pass, by the plan that the closure keeps to; by a new one if it keeps to none. It carries all guesses if
        they can share it, else one."""
        for plan in list(self._plans):
            noise = self._noise.snapshot()
            try:
                if is_due_for_probe(plan):
                    reprobe(plan, closure, self._by_position, self._ids, self._level, transaction)
                return plan, self._shared_pass(plan, closure, transaction, guesses, keeps)
            except Departure:
                transaction.rewind()
                self._noise.restore(noise)
        plan = trace(
            closure, self._by_position, self._ids, self._names, self._level, transaction,
            finite=self.check_finite, stream=self._streams,
        )  # fmt: skip
        self._check_plan(plan)
        self._plans.insert(0, plan)
        try:
            return plan, self._shared_pass(plan, closure, transaction, guesses, keeps)
        except Departure:
            self._plans.remove(plan)
            raise unstable() from None

    def _shared_pass(
        self, plan: Plan, closure: Callable[[], Any], transaction: Transaction, guesses: int, keeps: bool
    ) -> ForwardRecord:
        """A pass with all guesses if it can be, else with one; what a failed attempt has changed is put back."""
        if guesses == 1 or not self._stacks(plan):
            return self._pass(plan, closure, transaction, keeps=keeps)
        noise, cached = self._noise.snapshot(), self._cache.copy()
        try:
            record = self._pass(plan, closure, transaction, guesses, keeps)
            plan.stacks = True
            return record
        except Exception as error:
            if self.stack_guesses or (plan.stacks and not isinstance(error, torch.OutOfMemoryError)):
                raise
            why = f"{type(error).__name__}: {error}"
        transaction.rewind()
        self._noise.restore(noise)
        self._cache.restore(cached)
        record = self._pass(plan, closure, transaction, keeps=keeps)  # raises too where the closure is at fault
        plan.stacks = False
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
                f"engine={self.engine!r} carries one tangent": self.engine != "fast",
                "an estimator learns from one guess at a time": any(e.learns for e in self._estimators),
                f"the network writes into memory that other tensors share ({shared})": bool(shared),
            }
            why = next((reason for reason, holds in reasons.items() if holds), None)
            if why is not None and self.stack_guesses:
                raise ValueError(f"stack_guesses: guesses cannot share a pass here: {why}; leave it at None")
            if why is not None:
                plan.stacks = False
                if shared:
                    self._warn(f"guesses do not share a pass but run in turn, which takes longer: {why}")
        return plan.stacks is not False

    def _pass(
        self, plan: Plan, closure: Callable[[], Any], transaction: Transaction, count: int = 1, keeps: bool = True
    ) -> ForwardRecord:
        locals: dict[int, Local] = {}
        guesses, before = self._guesses_of(plan), None if keeps else self._noise.snapshot()
        level = self._level()
        if count > 1:
            level = StackedLevel(count, plan.ways, frozen_statistics=level.frozen_statistics)
        guess = partial(self._guess, guesses, locals, count, self._noise)
        directions = self._directions(count, self._noise)
        run = Pass(self._ids, plan.graph, level, guess, directions, transaction.saved, keeps=keeps)
        record = run.execute(closure, self._by_position)
        record.noise = before
        if keeps:
            record.locals = locals
        else:
            record.tangents, record.params = [], {}
            if not any(site.cut is not None and site.index not in guesses for site in plan.graph.sites):
                record.errors = []
        if plan.loss is not None:
            check_repeats(plan.loss, record.loss, plan.tolerance)
            plan.loss = None
        plan.uses += 1
        if plan is not self._plans[0]:
            self._plans.remove(plan)
            self._plans.insert(0, plan)
            del self._plans[MAX_PLANS:]
        return record

    def _guess(
        self,
        guesses: dict[int, tuple[Estimator, str, str]],
        locals: dict[int, Local],
        count: int,
        source: NoiseSource,
        site: Site,
        s: Tensor,
        values: dict[int, Tensor],
    ) -> Tensor | tuple[Tensor, Tensor] | list[Tensor] | None:
        """The guess ``y`` for a site; None where it needs none; directions for its parameters where
        these are few; with the
        correction that undoes the bias, where it is asked for. ``locals``: where to keep what an estimator that learns
        will need. ``count``: guesses; more than one are stacked in front."""
        found = guesses.get(site.index)
        if found is None:
            return None
        estimator, key, learned = found
        local = Local(site, s, values, source, several=count > 1)
        if estimator.learns:
            locals[site.index] = local = _lasting(local, values, source)
            if not estimator.injects(self._steps):
                return None
        lanes = source.lanes
        if site.by_parameter and estimator.per_example_parameters:
            noise = centred(estimator.noise)
            drawn = [[local.noise(shape, noise) for shape in site.direction_shapes] for _ in lanes(count)]
            return [_stacked(list(each)) for each in zip(*drawn, strict=True)]
        with torch.no_grad():
            state = self._prepared(site, estimator, key, local)
            if estimator.learns:
                state = (state, self._cache.peek(learned))
            ys = [estimator.sample(state, local) for _ in lanes(count)]
            ys = ys if site.reach is None else [site.reach.restrict(y) for y in ys]
            if not estimator.debias:
                return _stacked(ys)
            return _stacked(ys), _stacked([estimator.correct(state, local, y) for y in ys])

    def _formed(self, plan: Plan, record: ForwardRecord) -> dict[int, Tensor]:
        """The cotangents that estimators form themselves; what they learn here serves from the next pass on."""
        formed: dict[int, Tensor] = {}
        guesses = self._guesses_of(plan)
        for estimator in dict.fromkeys(guesses[index][0] for index in record.locals):
            locals = {index: local for index, local in record.locals.items() if guesses[index][0] == estimator}
            states = {index: self._cache.peek(guesses[index][2]) for index in locals}
            with torch.no_grad():
                found, learned = estimator.estimate(locals, record, plan.graph, states)
            formed.update(found)
            for index, state in learned.items():
                self._cache.put(guesses[index][2], self._steps, state)
        return formed

    def _guesses_of(self, plan: Plan) -> dict[int, tuple[Estimator, str, str]]:
        """By site, the estimator and the names of its prepared and its learned state; absent where the error is known
        exactly, or a later site's guess serves, or the parameters themselves are guessed."""
        if plan.guesses is None:
            plan.guesses = {}
            for site in plan.graph.sites:
                e = self._estimator_of(site)
                if not (self._is_served(plan.graph, site) or self._is_exact(site, e) or e.space == "parameters"):
                    plan.guesses[site.index] = (e, self._key(site, e), self._learned_key(plan.graph, site, e))
        return plan.guesses

    @staticmethod
    def _key(site: Site, estimator: Estimator) -> str:
        return f"{describe(estimator)} {site.segment.key}" if site.segment is not None and estimator.prepares else ""

    @staticmethod
    def _learned_key(graph: SiteGraph, site: Site, estimator: Estimator) -> str:
        """Names a site across traces of the same model: its parameters, and which of their uses it is."""
        use = sum(other.params == site.params for other in graph.sites[: site.index])
        return f"{describe(estimator)} at {site.params} {use}"

    def _prepared(self, site: Site, estimator: Estimator, key: str, local: Local) -> Any:
        if not key:
            return None
        return self._cache.get(
            key,
            step=self._steps,
            refresh=estimator.refresh,
            make=lambda previous: estimator.prepare(site, local.weights(), previous),
        )

    def _is_served(self, graph: SiteGraph, site: Site) -> bool:
        """A later site's guess stands for this one's as well."""
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
                vs = [draw(source, estimator.noise, tuple(p.shape), p.dtype, p.device) for _ in source.lanes(count)]
                amplitude = self._amplitudes[estimator]
                found[position] = _stacked(vs) if amplitude == 1 else _stacked(vs).mul_(amplitude)
        return found

    def _update(self) -> None:
        """The base's own step, without the closure; its own hooks fire, the global ones have fired for this
        optimizer."""
        self._fire(self.base._optimizer_step_pre_hooks)
        self._base_step()
        self._fire(self.base._optimizer_step_post_hooks)
        self._pending = False

    def _fire(self, hooks: Mapping[int, Callable[..., Any]]) -> None:
        for hook in list(hooks.values()):
            hook(self.base, (), {})

    def _base_step(self) -> None:
        base_step = type(self.base).step
        plain = getattr(base_step, "__wrapped__", base_step) if getattr(base_step, "hooked", None) else base_step
        if "step" in vars(self.base):
            self.base.step()
        else:
            with torch.no_grad():
                plain(self.base)

    def _update_one(self, position: int, gradient: Tensor) -> None:
        """The base's step for one parameter, whose gradient is then freed."""
        p, groups = self._params[position], self.base.param_groups
        params = [group["params"] for group in groups]
        p.grad = gradient
        try:
            for group in groups:
                group["params"] = [p] if any(q is p for q in group["params"]) else []
            self._base_step()
        finally:
            for group, own in zip(groups, params, strict=True):
                group["params"] = own
            p.grad = None

    # --- what users of torch.optim expect -----------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        pass  # Optimizer.__init__ assigns an empty list

    @property
    def state(self) -> Any:
        """The base's."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        pass

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        pass

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As for any optimizer; pending estimates are dropped."""
        self.base.zero_grad(set_to_none)
        self._pending = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimizer; the group may carry its own ``"estimator"``."""
        if not hasattr(self, "_noise"):
            return  # Optimizer.__init__ adds groups that the base has already
        group = dict(param_group)
        group["estimator"] = plain(group.get("estimator", self._default))
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        _check_tensors(list(_tensors(group["params"])))
        self.base.add_param_group(group)
        self._trainable = ()
        self._refresh()

    def state_dict(self) -> dict[str, Any]:
        """The base's state, and under ``"guessopt"`` the guess stream, the prepared states and their age."""
        packed = super().state_dict()
        packed["guessopt"] = {
            "steps": self._steps,
            "noise": self._noise.state(),
            "cache": self._cache.state_dict(),
        }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What ``state_dict`` gave; training then continues bit for bit.

        Raises:
            ValueError: another model's or another optimizer's state.
        """
        if "guessopt" not in state_dict:
            raise ValueError(
                "state_dict has no 'guessopt' entry: it is not of a GuessGradOptimizer; load a plain optimizer's "
                "state into opt.base"
            )
        own = state_dict["guessopt"]
        for group in state_dict["param_groups"]:
            plain(group["estimator"])
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "guessopt"})
        self._steps = own["steps"]
        self._noise.load(own["noise"])
        self._cache.load_state_dict(own["cache"])
        self._trainable = ()
        self._refresh()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.base.__setstate__(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._default}, memory={self.memory!r}, base={self.base!r})"

    # --- bookkeeping --------------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Look again at which parameters train; start over if that has changed."""
        trainable = tuple(p.requires_grad for group in self.param_groups for p in group["params"])
        if trainable == self._trainable:
            return
        self._params = [p for group in self.param_groups for p in group["params"]]
        self._trainable = trainable
        if not any(trainable):
            raise ValueError(
                f"params: none of the {len(trainable)} parameters requires a gradient: all are frozen; set "
                "requires_grad_(True) on those to train"
            )
        self._names = _names(self.param_groups)
        self._by_position = {k: p for k, p in enumerate(self._params) if p.requires_grad}
        self._ids = {id(p): k for k, p in self._by_position.items()}
        self._estimators: list[Estimator] = []
        for group in self.param_groups:
            start, count = len(self._estimators), len(group["params"])
            names = self._names[start : start + count]
            self._estimators += estimators_for(group["estimator"], names, named=bool(group.get("param_names")))
        if self.memory not in (*self._modes(), "auto"):
            learner = min(e.name for e in self._estimators if e.learns)
            raise ValueError(f"memory: {learner} needs what every site saw; use memory='store'")
        entries: dict[Estimator, int] = {}
        for position, p in self._by_position.items():
            entries[self._estimators[position]] = entries.get(self._estimators[position], 0) + p.numel()
        self._amplitudes = {estimator: estimator.amplitude(count) for estimator, count in entries.items()}
        devices = {p.device.index for p in self._params if p.device.type == "cuda"}
        self._devices = tuple(sorted(d for d in devices if d is not None))
        self._plans = []

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
        """Refuse what makes no sense for this model; say, once, what is not as a user would expect."""
        own = [site for site in plan.graph.sites if site.shares is None]
        by_estimator: dict[Estimator, list[Site]] = {}
        for site in own:
            by_estimator.setdefault(self._estimator_of(site), []).append(site)
        for estimator, sites in by_estimator.items():
            estimator.check(tuple(sites))
            for site in sites:
                note = plan.graph.blocked.get(site.index) or estimator.note(site)
                if note and estimator is self._choice_of(site):
                    self._warn(
                        f"{estimator.name}: {self._names[site.params[0]]} ({site.op}) gets another guess: {note}"
                    )
        warn_of_coupling(plan, self._warn)
        if self.orthogonal:
            self._check_orthogonal(plan)
        if self.batch_norm == "frozen_statistics" and plan.normalises_batch:
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
        read = {p for site in plan.graph.sites for p in site.params} | set(plan.graph.loss_params)
        unread = [self._names[k] for k in self._by_position if k not in read]
        if unread:
            few = ", ".join(unread[:5]) + (f" and {len(unread) - 5} more" if len(unread) > 5 else "")
            self._warn(f"the loss does not depend on {few}: no gradient will be estimated for them")

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


def _users_frame() -> int:
    """The stack level, for ``warnings.warn`` in the caller, of the first frame outside this package and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("guessopt", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def _stacked(guesses: list[Tensor]) -> Tensor:
    """One as it is, several with K in front."""
    return torch.stack(guesses) if len(guesses) > 1 else guesses[0]


def _lasting(local: Local, values: dict[int, Tensor], source: NoiseSource) -> Local:
    """The surroundings of a site, safe from what the closure will yet write in place."""
    site, segment = local.site, local.site.segment
    if segment is not None and any(call.in_place for call in segment.program):
        needed = {v for call in segment.program for v in call.inputs if v in values}
        values = {**values, **{v: values[v].clone() for v in needed}}
    elif not site.overwritten:
        return local
    return Local(site, local.s.clone(), values, source)


def _tensors(params: Any) -> Iterable[Any]:
    if isinstance(params, Tensor):
        yield params
        return
    for item in params:
        yield item[1] if isinstance(item, tuple) else item


def _groups(params: Any, default: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameters, named parameters or groups, as groups that each name their estimator."""
    if isinstance(params, Tensor):
        raise TypeError("params: expected an iterable of parameters or groups, got a single tensor; wrap it in a list")
    if isinstance(params, torch.nn.Module):
        raise TypeError("params: expected an iterable of parameters or groups, got a module; pass model.parameters()")
    items = list(params)
    if not items:
        raise ValueError("params: the list of parameters is empty")
    groups: list[dict[str, Any]] = [dict(item) for item in items] if isinstance(items[0], dict) else [{"params": items}]
    seen: list[Any] = []
    for group in groups:
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        group["estimator"] = plain(group.get("estimator", default))
        seen += _tensors(group["params"])
    _check_tensors(seen)
    if not any(p.requires_grad for p in seen):
        raise ValueError(
            f"params: none of the {len(seen)} parameters requires a gradient: all are frozen; set "
            "requires_grad_(True) on those to train"
        )
    return groups


def _check_tensors(tensors: Sequence[Any]) -> None:
    if not tensors:
        raise ValueError("params: the list of parameters is empty")
    seen: dict[int, int] = {}
    for k, p in enumerate(tensors):
        if not isinstance(p, Tensor):
            raise TypeError(f"params: item {k} is {type(p).__name__}, not a tensor")
        if id(p) in seen:
            raise ValueError(
                f"params: the parameter of shape {list(p.shape)} is given twice (items {seen[id(p)]} and {k}); "
                f"give each once"
            )
        seen[id(p)] = k


def _build(base: Any, groups: list[dict[str, Any]], kwargs: dict[str, Any], default: dict[str, Any]) -> Optimizer:
    if isinstance(base, Optimizer):
        if kwargs:
            raise TypeError(
                f"base: an optimizer that is already built takes no further options ({', '.join(kwargs)}); set "
                f"them on it"
            )
        given = {id(p) for group in groups for p in _tensors(group["params"])}
        if given != {id(p) for group in base.param_groups for p in group["params"]}:
            raise ValueError("base: the optimizer was built on other parameters than those in params; use the same")
        own = {id(p): group["estimator"] for group in groups for p in _tensors(group["params"])}
        for group in base.param_groups:
            group.setdefault("estimator", own[id(group["params"][0])])
            group["estimator"] = plain(group["estimator"])
        built = base
    elif isinstance(base, type) and issubclass(base, Optimizer):
        _refuse_closure_bases(base)
        built = base(groups, **kwargs)
    elif callable(base):
        built = base(groups, **kwargs)
        if not isinstance(built, Optimizer):
            raise TypeError(f"base: the callable returned {type(built).__name__}, not a torch.optim.Optimizer")
        for group in built.param_groups:
            group.setdefault("estimator", default)
    else:
        raise TypeError(
            f"base: expected an optimizer class, a callable from groups to an optimizer, or an optimizer, got "
            f"{type(base).__name__}"
        )
    _refuse_closure_bases(type(built))
    return built


def _fused(base: Any, groups: list[dict[str, Any]], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Options with ``fused=True`` where a base of torch offers it and nobody has chosen: an update that makes no
    temporary copies of a parameter, of which the others make up to three."""
    native = isinstance(base, type) and base.__module__.startswith("torch.optim.")
    if not native or "fused" not in inspect.signature(base).parameters or kwargs.keys() & {"fused", "foreach"}:
        return kwargs
    try:
        base([{"params": list(_tensors(group["params"]))} for group in groups], **kwargs, fused=True)
    except RuntimeError:  # not on this device, or for these options
        return kwargs
    return {**kwargs, "fused": True}


def _refuse_closure_bases(cls: type) -> None:
    closure = inspect.signature(cls.step).parameters.get("closure")  # type: ignore[attr-defined]
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"base: {cls.__name__} evaluates the closure itself, several times a step, and needs exact gradients; "
            "choose a base whose step() takes no closure, such as AdamW or SGD"
        )


def _names(groups: Sequence[dict[str, Any]]) -> list[str]:
    found: list[str] = []
    for group in groups:
        given = group.get("param_names")
        for k, p in enumerate(group["params"]):
            found.append(given[k] if given else f"parameter {len(found)} {list(p.shape)}")
    return found
