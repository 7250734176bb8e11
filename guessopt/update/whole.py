"""The base's update as a whole: it happens, or it is undone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from guessopt.errors import PartialUpdateError
from guessopt.update.base import MAX_COPIED_BYTES, holds_numbers

#: Updates before which parameters and state are copied.
MAX_COPIED_UPDATES = 8


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.layout is torch.strided and torch.equal(a, b)


class Undo:
    """The state before an update.

    Attributes:
        containers: dicts and lists, each with a copy of its entries.
        tensors: tensors, each with its version, and its value if values are copied.
    """

    def __init__(self) -> None:
        self.containers: list[tuple[Any, Any]] = []
        self.tensors: list[tuple[Tensor, int, Tensor | None]] = []

    @classmethod
    def of(cls, base: Optimizer, params: Iterable[Tensor], plain: bool) -> Undo:
        """The state of a base, without copies of tensors.

        Args:
            plain: whether the base keeps all its numbers in groups and state, so that nothing else must be searched.
        """
        params = list(params)
        grads = [g for p in params if (g := p.grad) is not None]
        if not plain:
            return cls().walked([vars(base), grads])
        found, state = cls(), base.state
        own = [state[params[0]]] if len(params) == 1 and params[0] in state else list(state.values())
        dicts = [vars(base), state, *base.param_groups, *own]
        found.containers = [(each, dict(each)) for each in dicts]
        found.containers += [(group["params"], list(group["params"])) for group in base.param_groups]
        state_tensors = [t for each in own for t in each.values() if isinstance(t, Tensor)]
        found.tensors = [(t, t._version, None) for t in (*params, *grads, *state_tensors)]
        return found

    def walked(self, roots: Iterable[Any], copies: bool = False, skip: Iterable[Any] = ()) -> Undo:
        """Add everything that can be reached from ``roots``, but for the objects in ``skip``.

        Args:
            copies: whether to copy tensors' values.
        """
        seen, stack = {id(node) for node in skip}, list(roots)
        while stack:
            node = stack.pop()
            if isinstance(node, Tensor):
                if id(node) not in seen:
                    seen.add(id(node))
                    self.tensors.append((node, node._version, node.detach().clone() if copies else None))
            elif isinstance(node, (dict, list)):
                if id(node) not in seen:
                    seen.add(id(node))
                    self.keep(node)
                    stack += node.values() if isinstance(node, dict) else node
            elif isinstance(node, tuple):
                stack += node
            elif id(node) not in seen and holds_numbers(node):
                seen.add(id(node))
                stack.append(vars(node))
        return self

    def keep(self, node: Any) -> None:
        """Add a container without its contents."""
        self.containers.append((node, dict(node) if isinstance(node, dict) else list(node)))

    def told(self) -> bool:
        """Whether every tensor that has changed since has a new version. Needs the values of tensors."""
        return all(
            t._version != version or (value is not None and _equal(t, value)) for t, version, value in self.tensors
        )

    def restore(self, told: bool) -> list[Tensor]:
        """Put everything back.

        Args:
            told: whether every write gives a tensor a new version. If not, any tensor may have been written.

        Returns:
            The tensors that were written and have no copy.
        """
        for node, before in self.containers:
            if isinstance(node, dict):
                node.clear()
                node.update(before)
            else:
                node[:] = before
        left = []
        with torch.no_grad():
            for t, version, value in self.tensors:
                if value is not None:
                    if not _equal(t, value):
                        t.copy_(value)
                elif t._version != version or not told:
                    left.append(t)
        return left


class Updates:
    """The updates of one base.

    Before each of the first ``MAX_COPIED_UPDATES`` updates, parameters and state are copied if that takes at most
    ``MAX_COPIED_BYTES``. A failure of such an update puts everything back. A later failure puts everything back if no
    tensor had been written yet, and else raises ``PartialUpdateError``.

    Attributes:
        made: updates so far.
        told: whether every write of the base gives its tensor a new version.
        plain: whether the base keeps all its numbers in its groups and its parameters' state.
    """

    def __init__(self, base: Optimizer) -> None:
        self.made = 0
        self.told: bool = type(base).__module__.startswith("torch.optim.")
        self.plain = False

    @contextmanager
    def whole(self, base: Optimizer, params: Sequence[Tensor], names: Sequence[str]) -> Iterator[None]:
        """An update of all parameters."""
        copies = self._copies(params)
        if copies:
            undo = Undo().walked([vars(base), [p.grad for p in params if p.grad is not None]], True)
        else:
            undo = Undo.of(base, params, self.plain)
        try:
            yield
        except BaseException as error:
            self._undo(undo, error, base, params, names)
            raise
        if self.made == 0:
            self.plain = _is_plain(base)
        if self.made == 1 and copies and not self.told:  # now that there is state
            self.told = undo.told()
        self.made += 1

    @contextmanager
    def single(self, base: Optimizer, p: Tensor, name: str) -> Iterator[None]:
        """An update of one parameter; the groups hold no other."""
        copies = self._copies([p])
        if copies or not self.plain:
            roots = [vars(base), base.state.get(p, {}), p, p.grad]
            undo = Undo().walked([r for r in roots if r is not None], copies, skip=[base.state])
            undo.keep(base.state)
        else:
            undo = Undo.of(base, [p], True)
        try:
            yield
        except BaseException as error:
            self._undo(undo, error, base, [p], [name])
            raise

    def passed(self, base: Optimizer) -> None:
        """Count a step of single updates as one update."""
        if self.made == 0:
            self.plain = _is_plain(base)
        self.made += 1

    def _copies(self, params: Sequence[Tensor]) -> bool:
        return self.made < MAX_COPIED_UPDATES and 4 * sum(p.nbytes for p in params) <= MAX_COPIED_BYTES

    def _undo(
        self, undo: Undo, error: BaseException, base: Optimizer, params: Sequence[Tensor], names: Sequence[str]
    ) -> None:
        told = self.told and not torch._C._len_torch_dispatch_stack()  # under a mode, torch counts no versions of lists
        left = {id(t) for t in undo.restore(told)}
        if not left:
            return
        written = [name for p, name in zip(params, names, strict=True) if id(p) in left]
        few = ", ".join(written[:3]) + (f" and {len(written) - 3} more" if len(written) > 3 else "")
        raise PartialUpdateError(
            f"{type(base).__name__} failed in its update ({type(error).__name__}: {error}) after it had written to "
            f"{few or 'its state'}; load parameters and optimizer from a checkpoint. Gradients, buffers and random "
            "states are as before the step",
            None,
        ) from error


def _is_plain(base: Optimizer) -> bool:
    """Whether all numbers of a base are direct entries of its groups and of its parameters' state."""

    def is_leaf(node: Any) -> bool:
        return not isinstance(node, dict | list | tuple) and not (holds_numbers(node) and not isinstance(node, Tensor))

    known, own = ("state", "param_groups", "defaults"), ("params", "param_names", "estimator")
    others = [v for k, v in vars(base).items() if k not in known and not k.startswith("_optimizer_")]
    inside = [v for group in base.param_groups for k, v in group.items() if k not in own]
    inside += [v for state in base.state.values() for v in (state.values() if isinstance(state, dict) else [{}])]
    numbers = (tuple, list)  # of numbers: betas
    return all(
        is_leaf(v) or (isinstance(v, numbers) and all(isinstance(x, int | float | str) for x in v))
        for v in (*others, *inside)
    ) and not any(isinstance(v, list) for v in others)
