"""``GuessGradOptimizer``: a ``torch.optim`` optimizer whose gradients are guessed in a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from guessopt.cache import SiteCache
from guessopt.engine.levels import make_level
from guessopt.engine.planning import (
    Plan,
    Transaction,
    trace,
)
from guessopt.engine.replay import Journal
from guessopt.estimators.base import Estimator, estimators_for, plain
from guessopt.groups import build, check_tensors, groups_of, names_of, tensors_of, with_fused
from guessopt.memory import bytes_of
from guessopt.rng import NoiseSource
from guessopt.stepping import MODES, Stepping


class GuessGradOptimizer(Stepping, Optimizer):
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
        batch_norm: in training mode, ``"exact"`` differentiates through the batch statistics, which couples the
        examples:
            sites before it take the scalar derivative. ``"frozen_statistics"`` takes the statistics for constants: one
            derivative per example, far less noise, and a bias (what examples do to each other is left out).

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
        transaction.watch(closure, self._plans)
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
        check_tensors(list(tensors_of(group["params"])))
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
        devices = {p.device.index for p in self._params if p.device.type == "cuda"}
        self._devices = tuple(sorted(d for d in devices if d is not None))
        self._plans = []
