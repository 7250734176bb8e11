"""``Transaction``: undo the closure's side effects before it runs again.

They happen once in a step that succeeds, and not at all in a step that fails.

A closure may write memory that it did not allocate (buffers, running statistics), bind names (``self.count += 1``, a
cache made in the first forward), change containers (``self.history.append``) and draw from generators.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from guessopt.engine.jvp.base import JvpEngine
from guessopt.engine.reach import Reach
from guessopt.engine.states import Dict, differs
from guessopt.rng import RandomState
from guessopt.tracing.writes import Memory, quietly


class Transaction:
    """Puts back the changes that runs of the closure make, in this order: memory; names, attributes, containers and
    generators; the global generators.

    Attributes:
        random: the states of the global generators before the first run.
        raised: whether the last run of the closure ended with an error of the closure's own, and not of a torch call.
    """

    def __init__(self, devices: tuple[int, ...]) -> None:
        self.raised = False
        self.random = RandomState.capture(devices)
        self._memory = Memory()
        self._reach = Reach()
        self._closure: Any = None

    # --- what is saved ------------------------------------------------------------------------------------------------

    def save(self, t: Tensor | torch.Generator) -> None:
        """Copy the state of ``t``, which is about to be written or drawn from."""
        if isinstance(t, torch.Generator):
            self._reach.walk(t)
        else:
            self._memory.save(t)

    def forget(self, t: Tensor) -> None:
        """Do not put ``t`` back: its update is final."""
        self._memory.forget(t)

    def watch(self, closure: Callable[[], Any] | None, plans: Iterable[Any] = ()) -> None:
        """Copy the state that the closure can reach: the names that it binds, its modules' attributes, containers and
        generators. Also the modules and tensors that plans have found to change (``modules`` and ``elsewhere``)."""
        if closure is not None and closure is not self._closure:
            self._closure = closure
            self._reach.walk_closure(closure)
        for plan in plans:
            for module in plan.modules:
                self._reach.walk_attributes(module)
            for t in plan.elsewhere:
                self.save(t)

    @contextmanager
    def finding(self) -> Iterator[list[nn.Module]]:
        """Within, look at every module before it first runs. Afterwards the list holds the modules that have changed
        and that ``watch`` did not find."""
        found: list[nn.Module] = []
        seen, kept = self._reach.seen, self._reach.kept
        known = [(node, dict(node.__dict__)) for node in seen.values() if isinstance(node, nn.Module)]

        def before(module: nn.Module, args: Any) -> None:
            if id(module) not in seen:
                found.append(module)
                known.append((module, dict(module.__dict__)))
                with quietly():
                    self._reach.walk(module)

        handle = register_module_forward_pre_hook(before)
        try:
            with _silent_compiled_modules():
                yield found
        finally:
            handle.remove()
            for module, state in known:
                if id(module.__dict__) not in seen and differs(module.__dict__, state):
                    found.append(module)
                    seen[id(module.__dict__)] = module.__dict__
                    kept.append((module.__dict__, state, Dict))

    # --- how it is put back -------------------------------------------------------------------------------------------

    def rewind(self) -> None:
        """Put everything back to its state before the first run."""
        self._memory.restore()
        for owner, state, kind in self._reach.kept:
            kind.put(owner, state)
        self.random.restore()

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Within, the closure may run and be rewound. Afterwards everything is as it was on entry."""
        memory, now = Memory(), [kind.now(owner, state) for owner, state, kind in self._reach.kept]
        for t in self._memory.saved():
            memory.save(t)
        random = RandomState.capture(tuple(self.random.devices))
        yield
        memory.restore()
        for owner, state, kind in now:
            kind.put(owner, state)
        random.restore()

    def settle(self, engine: JvpEngine) -> None:
        """Replace the engine's wrapped tensors, which are of no use after the run, in everything that the closure has
        bound."""
        if engine.wraps:
            for owner, before, kind in self._reach.kept:
                kind.settle(owner, before, engine.plain)


@contextmanager
def _silent_compiled_modules() -> Iterator[None]:
    """Without the warning about global hooks that compiled modules give."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)
        yield
