"""Nested arguments: tuples, lists and dicts that hold tensors.

Every function here walks in one order: depth first, positional arguments before keyword arguments. This is the order of
``torch.utils._pytree``. The functions run at every torch call of a closure, so they avoid its cost.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from numbers import Number
from typing import Any, TypeVar

import torch
from torch import Tensor

Leaf = TypeVar("Leaf")

#: The commonest types of arguments that hold nothing else.
_ATOMS: set[type] = {bool, int, float, str, type(None), torch.dtype, torch.device, type(...)}


def tensors_in(args: Any, kwargs: Mapping[str, Any] | None = None) -> list[Tensor]:
    """The tensors among arguments, in order.

    >>> [t.item() for t in tensors_in(([torch.tensor(1)], torch.tensor(2)), {"a": torch.tensor(3)})]
    [1, 2, 3]
    """
    found: list[Tensor] = []
    _collect(args, found)
    if kwargs:
        _collect(kwargs, found)
    return found


def _collect(node: Any, found: list[Tensor]) -> None:
    if isinstance(node, Tensor):
        found.append(node)
    elif isinstance(node, (tuple, list)):
        for item in node:
            if isinstance(item, Tensor):
                found.append(item)
            elif isinstance(item, (tuple, list, dict)):
                _collect(item, found)
    elif isinstance(node, dict):
        for item in node.values():
            _collect(item, found)


def results_of(out: Any, tensors: list[Tensor]) -> list[Tensor]:
    """The tensors that a call has returned. If it returned None: the first of its ``tensors``, which it has written."""
    if isinstance(out, Tensor):
        return [out]
    return tensors_in((out,)) if out is not None else tensors[:1]


def map_tensors(node: Any, f: Callable[[Tensor], Any]) -> Any:
    """``node`` with ``f(t)`` in place of each tensor ``t``."""
    return map_leaves(node, Tensor, f)


def map_leaves(node: Any, kind: type[Leaf], f: Callable[[Leaf], Any]) -> Any:
    """``node`` with ``f(leaf)`` in place of each leaf of type ``kind`` (no plain number or name). Other leaves, and the
    containers' types, stay.

    >>> map_leaves((1, [{2}], {"a": {3, 4}}), set, sum)
    (1, [2], {'a': 7})
    """
    if isinstance(node, kind):
        return f(node)
    if isinstance(node, (tuple, list)):
        items = [
            item if type(item) in _ATOMS else f(item) if isinstance(item, kind) else map_leaves(item, kind, f)
            for item in node
        ]
        if type(node) is tuple:
            return tuple(items)
        return type(node)(*items) if hasattr(node, "_fields") else type(node)(items)
    if isinstance(node, dict):
        return {key: map_leaves(item, kind, f) for key, item in node.items()} if node else {}
    return node


def split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], list[Any]]:
    """The tensors among arguments, in order; and the arguments' outline.

    The outline is a nested list. It keeps numbers, names and flags. The class ``Tensor`` replaces each tensor, and its
    type replaces any other object. ``compared`` compares two outlines.

    >>> split((torch.zeros(1), (2, torch.ones(1))), {"dim": 0})
    ([tensor([0.]), tensor([1.])], [<class 'torch.Tensor'>, [2, <class 'torch.Tensor'>], ['dim', 0]])
    """
    tensors: list[Tensor] = []
    outline = _outline(args, tensors)
    if kwargs:
        outline.append(_outline_of_dict(kwargs, tensors))
    return tensors, outline


def _outline(node: Iterable[Any], tensors: list[Tensor]) -> list[Any]:
    found: list[Any] = []
    for item in node:
        kind = type(item)
        if kind is Tensor or (kind not in _ATOMS and isinstance(item, Tensor)):
            tensors.append(item)
            found.append(Tensor)
        elif kind in _ATOMS:
            found.append(item)
        elif isinstance(item, (tuple, list)):
            found.append(_outline(item, tensors))
        elif isinstance(item, dict):
            found.append(_outline_of_dict(item, tensors))
        else:
            found.append(item if kind in _COMPARED else _stand_in(item))
    return found


def _stand_in(item: Any) -> Any:
    """A number for a number. The type for any other object: an array of numpy, say, may not be compared."""
    kind = type(item)
    if _is_number(kind):
        return item
    numpy = sys.modules.get("numpy")
    return item.item() if numpy is not None and isinstance(item, numpy.generic) else kind


def _outline_of_dict(node: Mapping[Any, Any], tensors: list[Tensor]) -> list[Any]:
    found: list[Any] = []
    for key, item in node.items():
        found.append(key)
        if type(item) in _ATOMS:
            found.append(item)
        else:
            found += _outline((item,), tensors)
    return found


#: Types of arguments that an outline keeps and ``compared`` compares by ``==``.
_COMPARED: set[type] = {
    bool, int, float, complex, str, type(None), type(...), slice,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
}  # fmt: skip


def compared(outline: list[Any], recorded: list[Any]) -> bool | None:
    """Whether a call has the recorded arguments: True; None if only numbers differ (a weight, an index); False if
    anything else differs (a flag, a name, the number of arguments).

    >>> compared([1, 0.5, True], [1, 0.5, True]), compared([1, 0.25, True], [1, 0.5, True])
    (True, None)
    >>> compared([1, 0.5, False], [1, 0.5, True])
    False
    """
    if len(outline) != len(recorded):
        return False
    answer: bool | None = True
    for given, known in zip(outline, recorded, strict=True):
        found = _compared(given, known)
        if found is False:
            return False
        if found is None:
            answer = None
    return answer


def _compared(given: Any, known: Any) -> bool | None:
    if given is known:
        return True
    kind = type(given)
    if kind is list and type(known) is list:
        return compared(given, known)
    if kind is slice and type(known) is slice:
        return compared([given.start, given.stop, given.step], [known.start, known.stop, known.step])
    if _is_number(kind) and _is_number(type(known)):
        return True if given == known or (given != given and known != known) else None
    if kind in _COMPARED:
        return kind is type(known) and bool(given == known)
    return False


def _is_number(kind: type) -> bool:
    return kind is not bool and issubclass(kind, Number)  # numpy's too
