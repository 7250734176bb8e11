"""``GuessGradOptimizer``: a ``torch.optim`` optimizer whose gradients are guessed in a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from guessopt.engine.transaction import Transaction
from guessopt.exclusive import exclusive, refuse_in_closure, unscaled
from guessopt.groups import build, check_tensors, groups_of, listed, tensors_of, with_fused
from guessopt.hooks import accumulates, fire, hooked, is_made, mark
from guessopt.memory_plan import bytes_of, choose
from guessopt.options import (
    Base,
    BatchNorm,
    Discount,
    Engine,
    EstimatorChoice,
    ForeignGradients,
    Memory,
    Option,
    Params,
    check_options,
)
from guessopt.registry import plain
from guessopt.state import loaded, packed
from guessopt.step import modes
from guessopt.step.estimation import Estimation
from guessopt.step.replay import Journal
from guessopt.step.updating import apply_gradients, call_hooks, finish_early, step_early, update_by


class GuessGradOptimizer(Optimizer):
    """A ``torch.optim`` optimizer that trains without backpropagation: it estimates gradients by forward-mode AD with
    structured guesses, writes them to ``.grad``, and lets ``base`` make the update.

    Args:
        params: parameters, named parameters, or groups. A group may carry its own ``"estimator"``.
        base: an optimizer class (built with ``base_kwargs``), a callable from groups to an optimizer, or an optimizer
            built on the same parameters.
        estimator: an estimator, its class or its registered name; or a dict from patterns of parameter names to
            estimators. The first pattern that matches decides.
        guesses: K independent guesses per step, averaged. They share one run of the closure, with K tangents in memory.
        stack_guesses: None: guesses share a run where they can. False: one run for each guess, with the memory of one
            guess. True: share a run, or raise. The guesses are equal either way. Guesses cannot share a run with an
            engine other than ``"fast"``, with estimators that learn, or where the network writes into shared memory.
        orthogonal: project the cotangent on the span of the guesses instead of taking their mean:
            ``g^ = c Y (Y^T Y)^{-1} D``, with ``c = mean_k |y_k|^2 / K``. The K columns of ``Y`` are an example's
            guesses at all sites. Unbiased for isotropic normal guesses.
        discount: position credit. None: one derivative for each example, as in both papers. A number gamma in [0, 1]:
            if the loss is a sum over positions (a language model's), position t takes the sum of the derivatives at
            ``t' >= t``, weighted by ``gamma^(t' - t)``. 1 adds no bias, less has less noise, ``"auto"`` measures both.
        exact_last: whether sites that the loss reads take their exact error. None: the estimator decides.
        memory: the memory mode (table below). ``"auto"``: the first step takes the fastest mode within ``budget``, and
            sets the attribute ``memory`` to its name.
        budget: for ``memory="auto"``: bytes that a step may take beyond parameters and base state, as an integer or a
            string such as ``"8GB"``. None: the GPU's free memory, or no limit on a CPU.
        engine: how tangents are computed. ``"fast"``: this package's rules where there are any. ``"dual"``: torch's
            rules on dual tensors. ``"func"``: ``torch.func.jvp``, the reference. All give the same numbers.
        seed: seed of the guesses. None follows ``torch.manual_seed``.
        check_finite: refuse a loss that is not finite. The check waits for the device once a step.
        batch_norm: ``"exact"`` differentiates through the batch statistics of batch normalisation in training mode.
            These couple the examples: layers before it take one derivative for the whole batch.
            ``"frozen_statistics"`` treats them as constants: one derivative per example, far less noise, but a bias.
        audit: in steps 1, 2, 4, 8, ..., check that the loss moves as the tangents predict (``guessopt.audit``). An
            audit takes a few more runs of the closure.
        foreign_gradients: ``"refuse"``: ``step()`` without a closure raises ``RuntimeError`` where ``.grad`` holds a
            gradient that ``estimate`` did not make, so that nobody trains by ``backward()`` unnoticed. A tensor that
            replaces an estimate in ``.grad`` (a clipped copy) is accepted. ``"allow"`` applies any gradient.

    ============ ======= ==========================================================================================
    ``memory``   runs    what is kept
    ============ ======= ==========================================================================================
    ``"store"``  1       inputs and guesses of every site, until the directional derivatives are known
    ``"replay"`` 2       nothing; the second run makes inputs and guesses again, from equal random states
    ``"stream"`` 2       nothing; ``step(closure)`` also updates each parameter as soon as its gradient is whole, and
                         frees the gradient. ``estimate`` fills ``.grad`` as in other modes. ``torch.optim`` bases are
                         built with ``fused=True`` where possible
    ============ ======= ==========================================================================================

    A failed step restores everything: parameters, base state, buffers, ``.grad``, random states. For this, the first 8
    updates copy gradients, parameters and base state, if the copies take at most 64 MiB (``"stream"``: of one parameter
    at a time). Later updates make no copies. If the base fails then and has written nothing, everything is restored; if
    it has written, ``PartialUpdateError`` names the parameters. Ctrl-C takes effect in the closure or after the step.

    Hooks on parameters (``register_hook``, ``register_post_accumulate_grad_hook``) act on estimated gradients as
    they would on gradients of ``backward()``. Steps of several threads take turns.

    Raises:
        ValueError, TypeError: bad arguments, by name. ``step`` raises ``ValueError`` for options that the network does
            not allow: ``stack_guesses=True`` where guesses cannot share a run, ``orthogonal`` with estimators that
            learn or undo bias, ``"stream"`` with a base that updates parameters together or learned feedback's streams.
        AuditError: from ``step`` and ``estimate``, with ``audit=True``: the loss does not move as predicted.

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

    guesses = Option[int]()
    stack_guesses = Option["bool | None"]()
    orthogonal = Option[bool]()
    discount = Option[Discount]()
    exact_last = Option["bool | None"]()
    memory = Option[str]()
    engine = Option[str]()
    check_finite = Option[bool]()
    batch_norm = Option[str]()
    audit = Option[bool]()
    foreign_gradients = Option[str]()

    def __init__(
        self,
        params: Params,
        base: Base = torch.optim.AdamW,
        estimator: EstimatorChoice = "w_perp",
        *,
        guesses: int = 1,
        stack_guesses: bool | None = None,
        orthogonal: bool = False,
        discount: Discount = None,
        exact_last: bool | None = None,
        memory: Memory = "store",
        budget: int | str | None = None,
        engine: Engine = "fast",
        seed: int | None = None,
        check_finite: bool = True,
        batch_norm: BatchNorm = "exact",
        audit: bool = True,
        foreign_gradients: ForeignGradients = "refuse",
        **base_kwargs: Any,
    ) -> None:
        check_options(
            guesses=guesses, stack_guesses=stack_guesses, orthogonal=orthogonal, discount=discount, memory=memory,
            budget=budget, batch_norm=batch_norm, foreign_gradients=foreign_gradients,
        )  # fmt: skip
        self._budget = None if budget is None else bytes_of(budget)
        self._default = plain(estimator)
        groups = groups_of(params, self._default)
        if memory in ("stream", "auto"):
            base_kwargs = with_fused(base, groups, base_kwargs)
        self.base = build(base, groups, base_kwargs, self._default)
        super().__init__([{"params": list(g["params"])} for g in self.base.param_groups], {})
        self.estimation = Estimation(
            self.base, guesses=guesses, stack_guesses=stack_guesses, orthogonal=bool(orthogonal), discount=discount,
            exact_last=exact_last, memory=memory, engine=engine, batch_norm=batch_norm, check_finite=check_finite,
            audit=bool(audit), foreign_gradients=foreign_gradients, seed=seed,
        )  # fmt: skip
        self._pending = False
        self._estimated_ids: set[int] = set()
        self.estimation.refresh()

    # --- the path of a step -------------------------------------------------------------------------------------------

    @overload  # type: ignore[override]
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Tensor]) -> Tensor: ...
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:
        """With a closure: zero the gradients, estimate them, update; return the loss before the update, a scalar.
        Without a closure: update from the gradients that ``estimate`` has added; return None.

        Args:
            closure: computes the loss and nothing else. It returns a scalar, or losses ``[N]``; the step takes their
                mean. The closure may run more than once. Between two runs, random states, buffers and attributes are
                restored (``docs/closures.md``).

        Raises:
            ClosureError: no gradient can be estimated; everything is as before.
            RuntimeError: without a closure: ``.grad`` holds no gradient, or one that ``estimate`` did not make. With a
                closure: estimated gradients wait in ``.grad``. (A closure's step drops other gradients.)
            PartialUpdateError: see the class.
        """
        refuse_in_closure("step()")
        if closure is None:
            with exclusive("step()"):
                apply_gradients(self.estimation, self._estimated_ids)
            self._updated()
            return None
        est = self.estimation
        if self._pending and any(p.grad is not None for p in est.params):
            raise RuntimeError(
                "step(closure) would discard the gradients that estimate(closure) has added: call step() to apply "
                "them or zero_grad() to drop them"
            )
        self._settle(closure)
        with est.transaction(closure) as transaction, unscaled():  # all or nothing
            if est.mode.early:
                loss = step_early(est, closure, transaction)
            else:
                loss, gradients = self._hooked(closure, transaction)
                update_by(est, gradients)
        self._updated()
        return loss

    def estimate(self, closure: Callable[[], Any]) -> Tensor:
        """Add estimated gradients to ``.grad``, as ``loss.backward()`` would; return the loss, a scalar. ``step()``
        applies the gradients."""
        refuse_in_closure("estimate()")
        self._settle(closure)
        est = self.estimation
        with est.transaction(closure) as transaction:
            loss, gradients = self._hooked(closure, transaction)
            waiting = [est.params[k] for k in gradients if accumulates(est.params[k])]
            made = {k: is_made(p, id(p) in self._estimated_ids) for k, p in enumerate(est.params) if k in gradients}
            for position, gradient in gradients.items():
                p = est.params[position]
                if p.grad is None:
                    p.grad = gradient
                elif waiting or p.grad.layout is not torch.strided:  # hooks may yet fail: leave the old tensor as it is
                    p.grad = gradient + p.grad if gradient.layout is torch.strided else p.grad + gradient
                else:
                    p.grad.add_(gradient)
                mark(p.grad, made[position])
            for p in waiting:
                fire(p)
            self._estimated_ids.update(id(est.params[k]) for k in gradients)
        self._pending = True
        return loss

    def _settle(self, closure: Callable[[], Any]) -> None:
        """Replace ``memory="auto"`` by the mode that ``guessopt.plan`` recommends."""
        if self.memory == "auto":
            self.memory = choose(self.estimation, closure, self._budget)

    def _hooked(self, closure: Callable[[], Any], transaction: Transaction) -> tuple[Tensor, dict[int, Tensor]]:
        """The loss, and the estimated gradients by position after the hooks on parameters."""
        est = self.estimation
        loss, gradients = modes.estimate(est, closure, transaction)
        if est.hooks:
            gradients = {k: hooked(g, est.params[k], est.hooks, est.names[k]) for k, g in gradients.items()}
        return loss, gradients

    def finish(self, journal: Journal, closure: Callable[[], Any]) -> None:
        """Complete a step of ``memory="stream"`` that failed half-way: update the remaining parameters.

        Args:
            journal: the ``journal`` of the ``PartialUpdateError``; completed in place.
            closure: the closure of the failed step.

        Raises:
            PartialUpdateError: an update failed again.
        """
        with exclusive("finish()"):
            finish_early(self.estimation, journal, closure)
        self._updated()

    def _updated(self) -> None:
        """The update is final. Call the base's hooks after a step; an error in a hook does not undo the update."""
        self._pending = False
        self._estimated_ids.clear()
        call_hooks(self.estimation, self.base._optimizer_step_post_hooks)

    # --- what users of torch.optim expect -----------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's parameter groups."""
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
        self.estimation.forget_parameters()
        self.estimation.refresh()

    @property
    def state(self) -> Any:
        """The base's state."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        if self._is_built:
            self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        if self._is_built:
            self.base.defaults = value

    @property
    def _is_built(self) -> bool:
        return "estimation" in vars(self)

    def __getattr__(self, name: str) -> Any:
        """Other public attributes of the base, such as ``train()`` and ``eval()`` of schedule-free optimizers."""
        if name.startswith("_") or "base" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base, name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad``, as for any optimizer. This drops estimates that ``step()`` has not applied."""
        self.base.zero_grad(set_to_none)
        self._pending = False
        self._estimated_ids.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as for any optimizer. The group may carry its own ``"estimator"``."""
        if not self._is_built:
            return  # Optimizer.__init__ adds groups that the base has already
        refuse_in_closure("add_param_group()")
        group = dict(param_group)
        estimator = plain(group.pop("estimator", self._default))  # a key that some bases refuse
        group["params"] = listed(group["params"])
        check_tensors(list(tensors_of(group["params"])))
        self.base.add_param_group(group)
        self.param_groups[-1]["estimator"] = estimator
        self.estimation.forget_parameters()
        self.estimation.refresh()

    def state_dict(self) -> dict[str, Any]:
        """The base's state, with an entry ``"guessopt"``. The entry holds the random stream of the guesses, the
        prepared and learned states with their age, and a description (base class, shapes, dtypes) that
        ``load_state_dict`` checks. All is plain data: ``torch.load(..., weights_only=True)`` reads it."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        found = packed(self.estimation)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            found = post_hook(self, found) or found
        return found

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
        with loaded(self.estimation, state_dict):
            for post_hook in self._optimizer_load_state_dict_post_hooks.values():
                post_hook(self)

    def __reduce__(self) -> Any:
        """For ``copy.deepcopy`` and ``pickle``: build an optimizer with these options on a copy of the base. Hooks are
        not copied, as with any optimizer of torch. The next step makes new plans."""
        own = vars(GuessGradOptimizer).items()
        options = {name: getattr(self, name) for name, option in own if isinstance(option, Option)}
        options |= {"estimator": self._default, "budget": self._budget if self.memory == "auto" else None}
        est = self.estimation
        state = {name: getattr(est, name) for name in ("noise", "cache", "steps", "warned")}
        return _rebuilt, (type(self), self.base, options), state | {"pending": self._pending}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._pending = state["pending"]
        for name in state.keys() - {"pending"}:
            setattr(self.estimation, name, state[name])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._default}, memory={self.memory!r}, base={self.base!r})"


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
