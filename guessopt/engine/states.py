"""The state of one object that a closure may change: how it is read, and how it is put back.

A kind of state is a class without instances. A *kept* state is a tuple ``(owner, state, kind)``:
``kind.put(owner, state)`` puts it back, and ``kind.now(owner, state)`` keeps the state of this moment.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from types import CellType
from typing import Any

import torch
from torch import Tensor

#: In place of a name or a cell that holds nothing.
ABSENT: Any = object()

Kept = tuple[Any, Any, "type[State]"]


class State:
    """One kind of state. Its methods take the object, and the state that was kept of it."""

    @staticmethod
    def take(owner: Any, before: Any) -> Any:
        """The object's state at this moment, as far as the earlier state ``before`` covers it."""
        raise NotImplementedError

    @staticmethod
    def put(owner: Any, state: Any) -> None:
        """Put a state back."""
        raise NotImplementedError

    @staticmethod
    def settle(owner: Any, before: Any, plain: Callable[[Tensor], Tensor]) -> None:
        """Replace each tensor that has come into the object by ``plain`` of it."""

    @classmethod
    def now(cls, owner: Any, before: Any) -> Kept:
        return owner, cls.take(owner, before), cls


# --- containers -------------------------------------------------------------------------------------------------------


class Dict(State):
    """All entries of a dict, or of an object's ``__dict__``."""

    @staticmethod
    def take(owner: dict[Any, Any], before: Any) -> dict[Any, Any]:
        return dict(owner)

    @staticmethod
    def put(owner: dict[Any, Any], state: dict[Any, Any]) -> None:
        if differs(owner, state):
            owner.clear()
            owner.update(state)

    @staticmethod
    def settle(owner: dict[Any, Any], before: dict[Any, Any], plain: Callable[[Tensor], Tensor]) -> None:
        for key, value in owner.items():
            if value is not before.get(key):
                owner[key] = _settled(value, plain)


class List(State):
    @staticmethod
    def take(owner: list[Any], before: Any) -> list[Any]:
        return list(owner)

    @staticmethod
    def put(owner: list[Any], state: list[Any]) -> None:
        if len(owner) != len(state) or any(a is not b for a, b in zip(owner, state, strict=True)):
            owner[:] = state

    @staticmethod
    def settle(owner: list[Any], before: Any, plain: Callable[[Tensor], Tensor]) -> None:
        owner[:] = [_settled(value, plain) for value in owner]


class Set(State):
    @staticmethod
    def take(owner: set[Any], before: Any) -> list[Any]:
        return list(owner)

    @staticmethod
    def put(owner: set[Any], state: Iterable[Any]) -> None:
        owner.clear()
        owner.update(state)


class Deque(State):
    @staticmethod
    def take(owner: deque[Any], before: Any) -> list[Any]:
        return list(owner)

    @staticmethod
    def put(owner: deque[Any], state: list[Any]) -> None:
        owner.clear()
        owner.extend(state)


class Length(State):
    """The length of a long list or dict: entries added later are taken off."""

    @staticmethod
    def put(owner: Any, state: int) -> None:
        if isinstance(owner, dict):
            while len(owner) > state:
                owner.popitem()
        else:
            del owner[state:]

    @classmethod
    def now(cls, owner: Any, before: int) -> Kept:
        items = list(owner.items() if isinstance(owner, dict) else owner)
        return owner, items[before:], Tail


class Tail(State):
    """The entries of a long list or dict beyond an earlier length."""

    @staticmethod
    def put(owner: Any, state: Any) -> None:
        owner.update(state) if isinstance(owner, dict) else owner.extend(state)


# --- names ------------------------------------------------------------------------------------------------------------


class Cell(State):
    """The variable of an enclosing function."""

    @staticmethod
    def take(owner: CellType, before: Any = None) -> Any:
        try:
            return owner.cell_contents
        except ValueError:  # empty
            return ABSENT

    @staticmethod
    def put(owner: CellType, state: Any) -> None:
        if state is not ABSENT:
            owner.cell_contents = state
        else:
            del owner.cell_contents

    @staticmethod
    def settle(owner: CellType, before: Any, plain: Callable[[Tensor], Tensor]) -> None:
        if (value := Cell.take(owner)) is not ABSENT:
            owner.cell_contents = _settled(value, plain)


class Names(State):
    """Some names of a module's globals."""

    @staticmethod
    def take(owner: dict[str, Any], before: Iterable[str]) -> dict[str, Any]:
        return {name: owner.get(name, ABSENT) for name in before}

    @staticmethod
    def put(owner: dict[str, Any], state: dict[str, Any]) -> None:
        for name, bound in state.items():
            if bound is ABSENT:
                owner.pop(name, None)
            else:
                owner[name] = bound


class Slots(State):
    """The ``__slots__`` of an object."""

    @staticmethod
    def take(owner: Any, before: Iterable[str]) -> dict[str, Any]:
        return {name: getattr(owner, name, ABSENT) for name in before}

    @staticmethod
    def put(owner: Any, state: dict[str, Any]) -> None:
        for name, bound in state.items():
            if bound is not ABSENT:
                object.__setattr__(owner, name, bound)
            elif hasattr(owner, name):
                object.__delattr__(owner, name)


# --- arrays and generators --------------------------------------------------------------------------------------------


class Array(State):
    """The numbers of an array of numpy."""

    @staticmethod
    def take(owner: Any, before: Any = None) -> Any:
        return owner.copy()

    @staticmethod
    def put(owner: Any, state: Any) -> None:
        owner[...] = state


class TorchGenerator(State):
    @staticmethod
    def take(owner: torch.Generator, before: Any = None) -> Tensor:
        return owner.get_state()

    @staticmethod
    def put(owner: torch.Generator, state: Tensor) -> None:
        owner.set_state(state)


class PythonGenerator(State):
    """A ``random.Random``."""

    @staticmethod
    def take(owner: random.Random, before: Any = None) -> Any:
        return owner.getstate()

    @staticmethod
    def put(owner: random.Random, state: Any) -> None:
        owner.setstate(state)


class NumpyBitGenerator(State):
    @staticmethod
    def take(owner: Any, before: Any = None) -> Any:
        return owner.state

    @staticmethod
    def put(owner: Any, state: Any) -> None:
        owner.state = state


class NumpyRandomState(State):
    @staticmethod
    def take(owner: Any, before: Any = None) -> Any:
        return owner.get_state()

    @staticmethod
    def put(owner: Any, state: Any) -> None:
        owner.set_state(state)


def differs(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    """Whether two dicts hold other objects, or hold them in another order."""
    return len(a) != len(b) or any(
        k is not j or v is not w for (k, v), (j, w) in zip(a.items(), b.items(), strict=True)
    )


def _settled(node: Any, plain: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(node, Tensor):
        return plain(node)
    if isinstance(node, tuple):
        items = [_settled(item, plain) for item in node]
        return type(node)(*items) if hasattr(node, "_fields") else type(node)(items)
    if isinstance(node, list):
        node[:] = [_settled(item, plain) for item in node]
    elif isinstance(node, dict):
        node.update({key: _settled(value, plain) for key, value in node.items()})
    return node
