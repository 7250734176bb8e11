"""``Reach``: the state that a closure can reach, and so change.

The walk begins at the closure. It goes on through the variables and globals of functions, through modules' attributes,
through containers, and through objects of the packages that the closure and its modules come from. It stops at tensors,
whose memory is saved when a call is about to write it.
"""

from __future__ import annotations

import dis
import random
import sys
from collections import deque
from collections.abc import Collection
from functools import lru_cache, partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from guessopt.engine.states import (
    Array,
    Cell,
    Deque,
    Dict,
    Kept,
    Length,
    List,
    Names,
    NumpyBitGenerator,
    NumpyRandomState,
    PythonGenerator,
    Set,
    Slots,
    TorchGenerator,
)

#: Entries of the longest list or dict that is copied. Of a longer one only the length is kept.
_MAX_COPIED = 1000
#: Size of the largest numpy array that is copied.
_MAX_ARRAY_BYTES = 1 << 16
#: Objects of the user's, one inside the other, that are followed.
_MAX_DEPTH = 3
#: Values that are looked at in all.
_MAX_VALUES = 20_000
_CONTAINERS = {list, dict, set, deque}
_NOTHING: Any = {}
_INTERNAL = nn.Module().__dict__.keys()
_STATELESS: set[Any] = {
    bool, int, float, complex, str, bytes, type(None), type(Ellipsis), object, slice, range, type, ModuleType, Tensor,
    nn.Parameter, torch.Size, torch.dtype, torch.device, torch.layout, type(len), type(str.join), property, CodeType,
    type(torch.relu), type(Tensor.add),
}  # fmt: skip


class Reach:
    """Walks, and keeps the state of everything on the way.

    Attributes:
        kept: in the order of the walk.
        seen: ``id`` of each object that was walked -> the object.
    """

    def __init__(self) -> None:
        self.kept: list[Kept] = []
        self.seen: dict[int, Any] = {}
        self._homes: set[str] = {"__main__"}
        self._left = _MAX_VALUES  # values that may yet be looked at

    def walk_closure(self, closure: Any) -> None:
        """Walk from a closure, with its package as one of those whose objects are walked."""
        self._homes.add(_package_of(closure.func if isinstance(closure, partial) else closure))
        self.walk(closure)

    def walk(self, node: Any, depth: int = 0) -> None:
        """Walk from an object that lies ``depth`` objects of the user's deep."""
        kind = type(node)
        if kind in _STATELESS or id(node) in self.seen:
            return
        if isinstance(node, (ModuleType, type, Tensor, torch.optim.Optimizer)):
            return
        self.seen[id(node)] = node
        if isinstance(node, nn.Module):
            self._walk_module(node)
        elif isinstance(node, FunctionType):
            self._walk_function(node, depth)
        elif isinstance(node, MethodType):
            self.walk(node.__self__, depth)
            self.walk(node.__func__, depth)
        elif isinstance(node, partial):
            for part in (node.func, *node.args, *node.keywords.values()):
                self.walk(part, depth)
        elif isinstance(node, tuple):
            self._walk_each(node, depth)
        elif isinstance(node, (dict, list, set, deque)):
            self._walk_container(node, depth)
        elif isinstance(node, CellType):
            self._walk_cell(node, depth)
        elif isinstance(node, torch.Generator):
            self.kept.append((node, node.get_state(), TorchGenerator))
        elif isinstance(node, random.Random):
            self.kept.append((node, node.getstate(), PythonGenerator))
        elif kind.__module__.partition(".")[0] == "numpy":
            self._walk_numpy(node)
        elif (_package_of(node) in self._homes or kind.__module__.startswith("torch.amp")) and depth < _MAX_DEPTH:
            self._walk_object(node, depth + 1)

    def _walk_each(self, nodes: Collection[Any], depth: int) -> None:
        self._left -= len(nodes)
        if self._left < 0:
            return
        for node in nodes:
            if type(node) not in _STATELESS:
                self.walk(node, depth)

    def _walk_module(self, module: nn.Module) -> None:
        kind: Any = type(module)
        state = module.__dict__
        if _is_torchs(kind) and not state["_forward_pre_hooks"] and not state["_forward_hooks"]:
            if state["_modules"]:
                self._walk_children(state["_modules"])
            return
        if isinstance(module, torch.jit.ScriptModule):  # its attributes are not in ``__dict__``
            return
        self._homes.add(_package_of_class(kind))
        self.walk_attributes(module)
        forward = getattr(type(module), "forward", None)
        if isinstance(forward, FunctionType):
            self.walk(forward, _MAX_DEPTH)

    def _walk_children(self, modules: dict[str, nn.Module | None]) -> None:
        seen = self.seen
        for module in modules.values():
            if module is None or id(module) in seen:
                continue
            seen[id(module)] = module
            kind: Any = type(module)
            state = module.__dict__
            hooks = state["_forward_pre_hooks"] or state["_forward_hooks"]
            if not _is_torchs(kind) or state["_modules"] or hooks:  # most layers are torch's own and have none of these
                self._walk_module(module)

    def walk_attributes(self, module: nn.Module) -> None:
        """Walk a module's attributes, parameters, buffers, hooks and children."""
        state = module.__dict__
        if id(state) in self.seen:
            return
        self.seen[id(state)] = state
        params, buffers, passing = state["_parameters"], state["_buffers"], state["_non_persistent_buffers_set"]
        self.kept += (
            (state, state.copy(), Dict),
            (params, params.copy() if params else _NOTHING, Dict),
            (buffers, buffers.copy() if buffers else _NOTHING, Dict),
            (passing, passing.copy() if passing else _NOTHING, Set),
        )
        self._walk_children(state["_modules"])
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            if state[name]:
                self._walk_each(state[name].values(), 0)
        for name in [name for name in state if name not in _INTERNAL] if len(state) > len(_INTERNAL) else ():
            value = state[name]
            if type(value) not in _STATELESS:
                self.walk(value, 0)

    def _walk_function(self, fn: FunctionType, depth: int) -> None:
        names, stored = _names_of(fn.__code__)
        known = fn.__globals__
        if stored:
            self.kept.append((known, Names.take(known, stored), Names))
        for cell in fn.__closure__ or ():
            self.walk(cell, depth)
        self._walk_each(fn.__defaults__ or (), depth)
        if fn.__kwdefaults__:
            self._walk_each(fn.__kwdefaults__.values(), depth)
        own = _package_of(fn) in self._homes and depth < _MAX_DEPTH
        named = [known[name] for name in names if name in known]
        self._walk_each(named if own else [node for node in named if type(node) in _CONTAINERS], depth)

    def _walk_cell(self, cell: CellType, depth: int) -> None:
        value = Cell.take(cell)
        self.kept.append((cell, value, Cell))
        self.walk(value, depth)

    def _walk_container(self, node: Any, depth: int) -> None:
        if len(node) > _MAX_COPIED and not isinstance(node, (deque, set)):
            self.kept.append((node, len(node), Length))
            return
        if isinstance(node, dict):
            self.kept.append((node, dict(node), Dict))
            self._walk_each(list(node.values()), depth)
        elif isinstance(node, list):
            self.kept.append((node, list(node), List))
            self._walk_each(node, depth)
        else:
            self.kept.append((node, list(node), Set if isinstance(node, set) else Deque))

    def _walk_object(self, node: Any, depth: int) -> None:
        state = getattr(node, "__dict__", None)
        if isinstance(state, dict):
            self.kept.append((state, dict(state), Dict))
            self._walk_each(list(state.values()), depth)
        slots = [
            name for kind in type(node).__mro__ for name in getattr(kind, "__slots__", ()) if isinstance(name, str)
        ]
        if slots := [name for name in slots if name not in ("__dict__", "__weakref__")]:
            values = Slots.take(node, slots)
            self.kept.append((node, values, Slots))
            self._walk_each(list(values.values()), depth)

    def _walk_numpy(self, node: Any) -> None:
        numpy = sys.modules["numpy"]
        if isinstance(node, numpy.ndarray):
            if node.nbytes <= _MAX_ARRAY_BYTES and node.flags.writeable:
                self.kept.append((node, node.copy(), Array))
        elif isinstance(node, numpy.random.Generator):
            self.kept.append((node.bit_generator, node.bit_generator.state, NumpyBitGenerator))
        elif isinstance(node, numpy.random.RandomState):
            self.kept.append((node, node.get_state(), NumpyRandomState))


@lru_cache(1024)
def _package_of_class(kind: Any) -> str:
    return str(kind.__module__).partition(".")[0]


@lru_cache(1024)
def _is_torchs(kind: Any) -> bool:
    """Whether a module's class is torch's own: such modules bind no attributes as they run."""
    return bool(kind.__module__.startswith("torch.nn.modules."))


def _package_of(node: Any) -> str:
    """The package that a function, or an object's class, comes from."""
    named = node if isinstance(node, (FunctionType, MethodType)) else type(node)
    return (getattr(named, "__module__", None) or "").partition(".")[0]


@lru_cache(4096)
def _names_of(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The global names that code and its inner functions read, and the global names that they bind."""
    found, stored = set(code.co_names), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            stored.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names, bound = _names_of(constant)
            found |= names
            stored |= bound
    return frozenset(found), frozenset(stored)
