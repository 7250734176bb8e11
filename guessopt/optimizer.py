"""``GuessGradOptimizer``: a ``torch.optim`` optimizer whose gradients are guessed in a forward pass."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from guessopt.cache import SiteCache
from guessopt.engine.jvp import make_engine
from guessopt.estimator import Estimator, estimators_for, plain
from guessopt.exclusive import exclusive, hold_interrupts, leave_modes, refuse_in_closure, unscaled
from guessopt.groups import build, check_tensors, check_trainable, groups_of, listed, names_of, tensors_of, with_fused
from guessopt.hooks import Hooks, accumulates, fire, hooked, is_made, lifted, mark, watch
from guessopt.memory_plan import bytes_of, choose
from guessopt.rng import NoiseSource, RandomState, cuda_devices
from guessopt.state import Before, check, described, load_base, moved, placement
from guessopt.step.estimation import MODES, Estimation
from guessopt.step.plan import (
    Plan,
    Transaction,
    trace,
)
from guessopt.step.replay import Journal
from guessopt.update import Updates


class GuessGradOptimizer(Estimation, Optimizer):
    """Trains without backpropagation: forward-mode AD with structured guesses fills ``.grad``,
    ``base`` does the update.

    Args:
        params: parameters, named parameters, or groups; a group may carry its own ``"estimator"``.
        base: an optimizer class (built with ``base_kwargs``), a callable from groups to an optimizer, or an optimizer
            built on the same parameters.
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
            known (learned feedback along a residual stream: what each block computes). ``"replay"``: two passes; the
            first keeps nothing, the second makes inputs and guesses again, as the random states are the same (along a
            stream: block after block, each from its state). ``"stream"``: replay in which ``step(closure)`` has
            ``base`` update each parameter as soon as its gradient is whole, and frees it: no full ``.grad`` ever exists
            (``estimate`` fills ``.grad`` as ever, to accumulate or to clip); refused along a stream. A base of
            ``torch.optim`` is built with ``fused=True`` where it can be. ``"auto"``: the fastest of these within
            ``budget``, by ``guessopt.plan`` in the first step, whose name the attribute ``memory`` then has.
        budget: for ``memory="auto"``: bytes that a step may take above parameters and base state, as an integer or a
            string such as ``"8GB"``; None: the GPU's free memory, or on a CPU no limit.
        engine: ``"fast"`` (own tangent rules), ``"dual"`` (torch's, on dual tensors) or ``"func"``
            (``torch.func.jvp``, the reference).
        seed: of the guesses; None follows ``torch.manual_seed``.
        check_finite: refuse a step on a non-finite loss (one device sync a step).
        batch_norm: of batch normalisation in training mode. ``"exact"`` differentiates through the batch statistics.
            These couple the examples, so that layers before it take one derivative for the whole batch.
            ``"frozen_statistics"`` takes the statistics for constants: one derivative per example, far less noise, and
            a bias (the influence of the examples on each other is left out).
        audit: check, in steps 1, 2, 4, 8, ..., that the loss moves as the tangents say (``guessopt.audit``). This takes
            a few more runs of the closure. ``AuditError`` if it does not.
        foreign_gradients: ``"refuse"``: ``step()`` without a closure raises ``RuntimeError`` where ``.grad`` holds a
            gradient that ``estimate`` did not make. So nobody trains by ``backward()`` unawares. A tensor that replaces
            an estimate in ``.grad`` (a clipped copy) is accepted. ``"allow"`` applies any gradient.

    A failed step leaves everything as it was: parameters, base state, buffers, ``.grad``, random states. For this, the
    first 8 updates copy gradients, parameters and base state, if the copies take at most 64 MiB (``"stream"``: of one
    parameter at a time). A later update makes no copies. If the base fails there before it has written anything,
    everything is put back; if it has written, ``PartialUpdateError`` names the parameters. Ctrl-C takes effect in the
    closure or after the step, never in an update.

    Hooks on parameters (``register_hook``, ``register_post_accumulate_grad_hook``) act on estimated gradients as
    they would on gradients of ``backward()``. Steps of several threads take turns.

    Raises:
        ValueError, TypeError: bad arguments, by name. ``step`` raises ``ValueError`` for ``stack_guesses=True`` where
            guesses cannot share a pass, for ``orthogonal`` with estimators that learn or undo their bias, and for
            learned feedback along a residual stream in two passes.

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

    ``step()`` alone applies estimated gradients, and refuses those of ``backward()``:

    >>> F.cross_entropy(model(x), y).backward()
    >>> opt.step()
    Traceback (most recent call last):
    RuntimeError: step() found a gradient of parameter 0 [16, 8] that estimate(closure) did not make (backward(), ...
    >>> opt.foreign_gradients = "allow"
    >>> opt.step()
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
        audit: bool = True,
        foreign_gradients: str = "refuse",
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
        if foreign_gradients not in ("refuse", "allow"):
            raise ValueError(f"foreign_gradients: {foreign_gradients!r} is not one of refuse, allow")
        self.foreign_gradients = foreign_gradients
        self._level = partial(make_engine, engine, frozen_statistics=batch_norm == "frozen_statistics")
        self._level()
        self.stack_guesses, self.orthogonal = stack_guesses, bool(orthogonal)
        self.guesses, self.exact_last, self.memory, self.engine = guesses, exact_last, memory, engine
        self.batch_norm = batch_norm
        self.check_finite = check_finite
        self.audit, self._asked = bool(audit), None
        self._budget = None if budget is None else bytes_of(budget)
        self._default = plain(estimator)
        groups = groups_of(params, self._default)
        if memory in ("stream", "auto"):
            base_kwargs = with_fused(base, groups, base_kwargs)
        self.base = build(base, groups, base_kwargs, self._default)
        super().__init__([{"params": list(g["params"])} for g in self.base.param_groups], {})
        self._noise = NoiseSource(seed)
        self._cache = SiteCache()
        self._steps = 0
        self._plans: list[Plan] = []
        self._pending = False
        self._warned: set[str] = set()
        self._trainable: tuple[bool, ...] = ()
        self._params: list[Tensor] = []
        self._hooks: Hooks = {}
        self._estimated_ids: set[int] = set()
        self._refresh()

    # --- the path of a step -------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """With a closure: zero the gradients, estimate them, update; returns the loss (before the update). Without:
        update from the gradients that ``estimate`` has added.

        Args:
            closure: computes the loss and nothing else: a scalar, or losses ``[N]``, of which the mean is taken. It may
                run more than once. Between two runs, random states, buffers and attributes are put back
                (``docs/closures.md``).

        Raises:
            ClosureError: no gradient can be estimated; everything is as before.
            RuntimeError: nothing estimated, gradients that were not estimated, or estimated gradients pending. With a
                closure, gradients that were not estimated are dropped.
            PartialUpdateError: see the class.
        """
        refuse_in_closure("step()")
        if closure is None:
            with exclusive("step()"):
                self._apply_estimated()
            self._updated()
            return None
        if self._pending and any(p.grad is not None for p in self._params):
            raise RuntimeError(
                "step(closure) would discard the gradients that estimate(closure) has added: call step() to apply "
                "them or zero_grad() to drop them"
            )
        self._settle(closure)
        if self.memory == "stream":
            return self._stream(closure)
        with self._atomic(closure) as transaction, unscaled():
            loss, gradients = self._hooked(closure, transaction)
            for position, p in enumerate(self._params):
                p.grad = gradients.get(position)
                if p.grad is not None:
                    mark(p.grad)
            self._update([self._params[k] for k in gradients if accumulates(self._params[k])])
        self._updated()
        return loss

    def estimate(self, closure: Callable[[], Any]) -> Tensor:
        """Add estimated gradients to ``.grad``, as ``loss.backward()`` would; returns the loss.
        ``step()`` applies them."""
        refuse_in_closure("estimate()")
        self._settle(closure)
        with self._atomic(closure) as transaction:
            loss, gradients = self._hooked(closure, transaction)
            waiting = [self._params[k] for k in gradients if accumulates(self._params[k])]
            made = {k: is_made(p, id(p) in self._estimated_ids) for k, p in enumerate(self._params) if k in gradients}
            for position, gradient in gradients.items():
                p = self._params[position]
                if p.grad is None:
                    p.grad = gradient
                elif waiting or p.grad.layout is not torch.strided:  # hooks may yet fail: leave the old tensor as it is
                    p.grad = gradient + p.grad if gradient.layout is torch.strided else p.grad + gradient
                else:
                    p.grad.add_(gradient)
                mark(p.grad, made[position])
            for p in waiting:
                fire(p)
            self._estimated_ids.update(id(self._params[k]) for k in gradients)
        self._pending = True
        return loss

    def _settle(self, closure: Callable[[], Any]) -> None:
        """Replace ``memory="auto"`` by the mode that ``guessopt.plan`` recommends."""
        if self.memory == "auto":
            self.memory = choose(self, closure, self._budget)

    def _hooked(self, closure: Callable[[], Any], transaction: Transaction) -> tuple[Tensor, dict[int, Tensor]]:
        """An estimate after the hooks on parameters."""
        loss, gradients = self._estimated(closure, transaction)
        if self._hooks:
            gradients = {k: hooked(g, self._params[k], self._hooks, self._names[k]) for k, g in gradients.items()}
        return loss, gradients

    def _apply_estimated(self) -> None:
        """``step()`` without a closure."""
        self._refresh()
        found = [(k, p) for k, p in enumerate(self._params) if p.grad is not None]
        if not found:
            raise RuntimeError(
                "step() found no gradient: call estimate(closure) before it, or pass the closure: step(closure)"
            )
        if self.foreign_gradients == "refuse":
            for k, p in found:
                if not is_made(p, id(p) in self._estimated_ids):
                    raise RuntimeError(
                        f"step() found a gradient of {self._names[k]} that estimate(closure) did not make (backward(), "
                        "or .grad = ...): pass the closure, step(closure), or call estimate(closure) in place of "
                        "backward(); foreign_gradients='allow' applies such gradients"
                    )
        random = RandomState.capture(self._devices)
        try:
            self._update()
        except BaseException:
            random.restore()
            raise
        for _, p in found:
            if p.grad is not None:
                mark(p.grad)

    def finish(self, journal: Journal, closure: Callable[[], Any]) -> None:
        """Complete a step of ``memory="stream"`` that failed half-way: update the parameters that it had not reached.

        Args:
            journal: the ``journal`` of the ``PartialUpdateError``; completed in place.
            closure: the closure of the failed step.

        Raises:
            PartialUpdateError: it failed again.
        """
        with exclusive("finish()"):
            transaction = Transaction(self._devices)
            now, transaction.random = transaction.random, journal.random
            self._refresh()
            transaction.watch(closure, self._plans)
            try:
                with lifted(self._params, self._hooks):
                    if not self._plans:
                        plan = trace(
                            closure, self._by_position, self._ids, self._names, self._level, transaction, finite=False
                        )
                        self._plans.append(plan)
                    self._apply(self._plans[0], journal, closure, transaction)
                self._steps += 1
            except BaseException:
                hold_interrupts()
                leave_modes()
                transaction.random = now
                transaction.rewind()
                raise
        self._updated()

    # --- what users of torch.optim expect -----------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        if not self._is_built:
            return  # Optimizer.__init__ assigns an empty list
        groups = [{"estimator": self._default, **group} for group in value]
        check_tensors([p for group in groups for p in group["params"]])
        for group in groups:
            group["estimator"] = plain(group["estimator"])
        self.base.param_groups = groups
        self._trainable = ()
        self._refresh()

    @property
    def state(self) -> Any:
        """The base's."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        if self._is_built:
            self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        if self._is_built:
            self.base.defaults = value

    @property
    def _is_built(self) -> bool:
        return "_noise" in vars(self)

    def __getattr__(self, name: str) -> Any:
        """Other public attributes of the base, such as ``train()`` and ``eval()`` of schedule-free optimizers."""
        if name.startswith("_") or "base" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base, name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As for any optimizer; pending estimates are dropped."""
        self.base.zero_grad(set_to_none)
        self._pending = False
        self._estimated_ids.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimizer; the group may carry its own ``"estimator"``."""
        if not self._is_built:
            return  # Optimizer.__init__ adds groups that the base has already
        refuse_in_closure("add_param_group()")
        group = dict(param_group)
        estimator = plain(group.pop("estimator", self._default))  # a key that some bases refuse
        group["params"] = listed(group["params"])
        check_tensors(list(tensors_of(group["params"])))
        self.base.add_param_group(group)
        self.param_groups[-1]["estimator"] = estimator
        self._trainable = ()
        self._refresh()

    def state_dict(self) -> dict[str, Any]:
        """The base's state. The entry ``"guessopt"`` holds the stream of guesses, the prepared and learned states with
        their age, and a description (base class, shapes, dtypes) that ``load_state_dict`` checks. Plain data:
        ``torch.load(..., weights_only=True)`` reads it."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        packed = dict(self.base.state_dict())
        packed["guessopt"] = {
            **described(self.base),
            "steps": self._steps,
            "noise": self._noise.state(),
            "cache": self._cache.state_dict(),
        }
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            packed = post_hook(self, packed) or packed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that ``state_dict`` returned; training then continues bit for bit. On another device the guesses
        start again from their seed, and a warning says so.

        Raises:
            ValueError: the state belongs to another model or optimizer, is damaged, or is of a newer version. The
                optimizer is unchanged.
        """
        refuse_in_closure("load_state_dict()")
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        check(state_dict, self.base)
        own, noise, cache = state_dict["guessopt"], NoiseSource(self._noise.seed), SiteCache()
        to = moved(own, self.base.param_groups)
        left = noise.load(own["noise"], to)
        cache.load_state_dict(own["cache"], placement(to))
        before, attributes = Before(self.base), dict(vars(self))
        try:
            load_base(self.base, state_dict)
            self._steps, self._noise, self._cache = own["steps"], noise, cache
            self._trainable = ()
            self._refresh()
            for post_hook in self._optimizer_load_state_dict_post_hooks.values():
                post_hook(self)
        except BaseException:
            before.restore()
            vars(self).clear()
            vars(self).update(attributes)
            raise
        if left:
            self._warn(
                f"the guesses were drawn on {', '.join(left)}, whose generator cannot go on here: guesses start again "
                "from their seed, so that training continues, but not bit for bit"
            )

    def __reduce__(self) -> Any:
        """For ``copy.deepcopy`` and ``pickle``: build an optimizer with these options on a copy of the base. Hooks are
        not copied, as with any optimizer of torch. The next step makes new plans."""
        names = inspect.signature(GuessGradOptimizer).parameters.keys() - {"base"}
        options = {name: value for name, value in vars(self).items() if name in names}
        options |= {"estimator": self._default, "budget": self._budget if self.memory == "auto" else None}
        own = ("_noise", "_cache", "_steps", "_warned", "_pending")
        return _rebuilt, (type(self), self.base, options), {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._default}, memory={self.memory!r}, base={self.base!r})"

    # --- bookkeeping --------------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Look again at which parameters train; start over if that has changed."""
        params = [p for group in self.param_groups for p in group["params"]]
        trainable = tuple(p.requires_grad for p in params)
        if trainable == self._trainable and all(map(operator.is_, params, self._params)):
            return
        check_trainable(params)  # before anything is taken over: the next step must say so again
        self._params, self._trainable = params, trainable
        self._names = names_of(self.param_groups)
        self._by_position = {k: p for k, p in enumerate(self._params) if p.requires_grad}
        self._ids = {id(p): k for k, p in self._by_position.items()}
        self._estimators: list[Estimator] = []
        for group in self.param_groups:
            start, count = len(self._estimators), len(group["params"])
            names = self._names[start : start + count]
            self._estimators += estimators_for(group["estimator"], names, named=bool(group.get("param_names")))
        if why := self._refused(self.memory):
            raise ValueError(f"memory: {why}")
        entries: dict[Estimator, int] = {}
        for position, p in self._by_position.items():
            entries[self._estimators[position]] = entries.get(self._estimators[position], 0) + p.numel()
        self._amplitudes = {estimator: estimator.amplitude(count) for estimator, count in entries.items()}
        self._devices = tuple(sorted(cuda_devices(self._params)))
        self._plans = []
        self._updates, self._together = Updates(self.base), None
        if self.foreign_gradients == "refuse":
            for p in self._params:
                watch(p)


def _rebuilt(cls: type[GuessGradOptimizer], base: Optimizer, options: dict[str, Any]) -> GuessGradOptimizer:
    opt, params = cls.__new__(cls), [p for group in base.param_groups for p in group["params"]]
    thawed = [] if any(p.requires_grad for p in params) else [p for p in params if p.is_floating_point()][:1]
    try:
        for p in thawed:  # the constructor refuses parameters that are all frozen; a copy may have them
            p.requires_grad_(True)
        GuessGradOptimizer.__init__(opt, [dict(group) for group in base.param_groups], base, **options)
    finally:
        for p in thawed:
            p.requires_grad_(False)
    return opt
