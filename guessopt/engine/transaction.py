"""Undo the closure's side effects before it runs again. They happen once in a step that succeeds, and not at all in a
step that fails.

A closure may write memory that it did not allocate (buffers, running statistics), bind names (``self.count += 1``, a
cache made in the first forward), change containers (``self.history.append``) and draw from generators.
"""

from __future__ import annotations

import dis
import random
import sys
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from guessopt.rng import RandomState
from guessopt.tracing.writes import Memory, quietly


@contextmanager
def _silent_compiled_modules() -> Iterator[None]:
    """Without the warning about global hooks that compiled modules give."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)
        yield


#: An object, its state before the step, and a function ``put(object, state)``.
Kept = tuple[Any, Any, Callable[[Any, Any], Any]]


class Transaction:
    """Puts back what runs of the closure change.

    Attributes:
        random: the states of the global generators before the first run.
        raised: whether the last run of the closure ended with an error of the closure's own, and not of a torch call.
    """

    def __init__(self, devices: tuple[int, ...]) -> None:
        self.raised = False
        self.random = RandomState.capture(devices)
        self._memory = Memory()
        self._kept: list[Kept] = []
        self._seen: dict[int, Any] = {}
        self._homes: set[str] = {"__main__"}
        self._left = _MOST
        self._closure: Any = None

    def save(self, t: Tensor | torch.Generator) -> None:
        """Copy the state of ``t``, which is about to be written or drawn from."""
        if isinstance(t, torch.Generator):
            self._walk(t, 0)
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
            self._homes.add(_root(closure.func if isinstance(closure, partial) else closure))
            self._walk(closure, 0)
        for plan in plans:
            for module in plan.modules:
                self._walk_attributes(module)
            for t in plan.elsewhere:
                self.save(t)

    @contextmanager
    def finding(self) -> Iterator[list[nn.Module]]:
        """Within, look at every module before it first runs. Afterwards the list holds the modules that have changed
        and that ``watch`` did not find."""
        found: list[nn.Module] = []
        known = [(node, dict(node.__dict__)) for node in self._seen.values() if isinstance(node, nn.Module)]

        def before(module: nn.Module, args: Any) -> None:
            if id(module) not in self._seen:
                found.append(module)
                known.append((module, dict(module.__dict__)))
                with quietly():
                    self._walk(module, 0)

        handle = register_module_forward_pre_hook(before)
        try:
            with _silent_compiled_modules():
                yield found
        finally:
            handle.remove()
            for module, state in known:
                if id(module.__dict__) not in self._seen and _differs(module.__dict__, state):
                    found.append(module)
                    self._seen[id(module.__dict__)] = module.__dict__
                    self._keep(module.__dict__, state, _put_dict)

    def rewind(self) -> None:
        """Put everything back to its state before the first run."""
        self._memory.restore()
        for owner, value, put in self._kept:
            put(owner, value)
        self.random.restore()

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Within, the closure may run and be rewound. Afterwards everything is as it was on entry."""
        memory, now = Memory(), [_now(*kept) for kept in self._kept]
        for t in self._memory.saved():
            memory.save(t)
        random = RandomState.capture(tuple(self.random.devices))
        yield
        memory.restore()
        for owner, value, put in now:
            put(owner, value)
        random.restore()

    def settle(self, engine: Any) -> None:
        """Replace tensors of the level's own kind, which are of no use after the pass, in everything that the closure
        has bound."""
        if not engine.wraps:
            return
        plain = engine.plain
        for owner, before, put in self._kept:
            if put is _put_dict:
                for key, value in owner.items():
                    if value is not before.get(key):
                        owner[key] = _settled(value, plain)
            elif put is _put_list:
                owner[:] = [_settled(value, plain) for value in owner]
            elif put is _put_cell:
                owner.cell_contents = _settled(owner.cell_contents, plain)

    # --- what a closure reaches ---------------------------------------------------------------------------------------

    def _walk(self, node: Any, depth: int) -> None:
        kind = type(node)
        if kind in _STATELESS or id(node) in self._seen:
            return
        if isinstance(node, (ModuleType, type, Tensor, torch.optim.Optimizer)):
            return
        self._seen[id(node)] = node
        if isinstance(node, nn.Module):
            self._walk_module(node)
        elif isinstance(node, FunctionType):
            self._walk_function(node, depth)
        elif isinstance(node, MethodType):
            self._walk(node.__self__, depth)
            self._walk(node.__func__, depth)
        elif isinstance(node, partial):
            for part in (node.func, *node.args, *node.keywords.values()):
                self._walk(part, depth)
        elif isinstance(node, tuple):
            self._walk_each(node, depth)
        elif isinstance(node, (dict, list, set, deque)):
            self._walk_container(node, depth)
        elif isinstance(node, CellType):
            self._walk_cell(node, depth)
        elif isinstance(node, torch.Generator):
            self._kept.append((node, node.get_state(), torch.Generator.set_state))
        elif isinstance(node, random.Random):
            self._kept.append((node, node.getstate(), random.Random.setstate))
        elif kind.__module__.partition(".")[0] == "numpy":
            self._walk_numpy(node)
        elif (_root(node) in self._homes or kind.__module__.startswith("torch.amp")) and depth < _DEPTH:
            self._walk_object(node, depth + 1)

    def _walk_each(self, nodes: Collection[Any], depth: int) -> None:
        self._left -= len(nodes)
        if self._left < 0:
            return
        for node in nodes:
            if type(node) not in _STATELESS:
                self._walk(node, depth)

    def _walk_module(self, module: nn.Module) -> None:
        kind: Any = type(module)
        state = module.__dict__
        if _is_torchs(kind) and not state["_forward_pre_hooks"] and not state["_forward_hooks"]:
            if state["_modules"]:
                self._walk_children(state["_modules"])
            return
        if isinstance(module, torch.jit.ScriptModule):  # has its attributes elsewhere
            return
        self._homes.add(_package(kind))
        self._walk_attributes(module)
        forward = getattr(type(module), "forward", None)
        if isinstance(forward, FunctionType):
            self._walk(forward, _DEPTH)

    def _walk_children(self, modules: dict[str, nn.Module | None]) -> None:
        seen = self._seen
        for module in modules.values():
            if module is None or id(module) in seen:
                continue
            seen[id(module)] = module
            kind: Any = type(module)
            state = module.__dict__
            if (  # torch's own layer, of which most networks have many
                not _is_torchs(kind) or state["_modules"] or state["_forward_pre_hooks"] or state["_forward_hooks"]
            ):
                self._walk_module(module)

    def _walk_attributes(self, module: nn.Module) -> None:
        state = module.__dict__
        if id(state) in self._seen:
            return
        self._seen[id(state)] = state
        params, buffers, passing = state["_parameters"], state["_buffers"], state["_non_persistent_buffers_set"]
        self._kept += (
            (state, state.copy(), _put_dict),
            (params, params.copy() if params else _NOTHING, _put_dict),
            (buffers, buffers.copy() if buffers else _NOTHING, _put_dict),
            (passing, passing.copy() if passing else _NOTHING, _put_set),
        )
        self._walk_children(state["_modules"])
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            if state[name]:
                self._walk_each(state[name].values(), 0)
        for name in [name for name in state if name not in _INTERNAL] if len(state) > len(_INTERNAL) else ():
            value = state[name]
            if type(value) not in _STATELESS:
                self._walk(value, 0)

    def _walk_function(self, fn: FunctionType, depth: int) -> None:
        names, stored = _names_of(fn.__code__)
        known = fn.__globals__
        if stored:
            self._kept.append((known, {name: known.get(name, _ABSENT) for name in stored}, _put_names))
        for cell in fn.__closure__ or ():
            self._walk(cell, depth)
        self._walk_each(fn.__defaults__ or (), depth)
        if fn.__kwdefaults__:
            self._walk_each(fn.__kwdefaults__.values(), depth)
        own = _root(fn) in self._homes and depth < _DEPTH
        named = [known[name] for name in names if name in known]
        self._walk_each(named if own else [node for node in named if type(node) in _CONTAINERS], depth)

    def _walk_cell(self, cell: CellType, depth: int) -> None:
        try:
            value = cell.cell_contents
        except ValueError:  # empty
            value = _ABSENT
        self._kept.append((cell, value, _put_cell))
        self._walk(value, depth)

    def _walk_container(self, node: Any, depth: int) -> None:
        if len(node) > _LARGE and not isinstance(node, (deque, set)):
            self._kept.append((node, len(node), _put_length))
            return
        if isinstance(node, dict):
            self._keep(node, dict(node), _put_dict)
            self._walk_each(list(node.values()), depth)
        elif isinstance(node, list):
            self._keep(node, list(node), _put_list)
            self._walk_each(node, depth)
        else:
            self._keep(node, list(node), _put_set if isinstance(node, set) else _put_deque)

    def _walk_object(self, node: Any, depth: int) -> None:
        state = getattr(node, "__dict__", None)
        if isinstance(state, dict):
            self._keep(state, dict(state), _put_dict)
            self._walk_each(list(state.values()), depth)
        slots = [
            name for kind in type(node).__mro__ for name in getattr(kind, "__slots__", ()) if isinstance(name, str)
        ]
        if slots := [name for name in slots if name not in ("__dict__", "__weakref__")]:
            values = {name: getattr(node, name, _ABSENT) for name in slots}
            self._kept.append((node, values, _put_slots))
            self._walk_each(list(values.values()), depth)

    def _walk_numpy(self, node: Any) -> None:
        numpy = sys.modules["numpy"]
        if isinstance(node, numpy.ndarray):
            if node.nbytes <= _LARGE_ARRAY and node.flags.writeable:
                self._kept.append((node, node.copy(), _put_array))
        elif isinstance(node, numpy.random.Generator):
            self._kept.append((node.bit_generator, node.bit_generator.state, _put_state))
        elif isinstance(node, numpy.random.RandomState):
            self._kept.append((node, node.get_state(), type(node).set_state))

    def _keep(self, owner: Any, value: Any, put: Callable[[Any, Any], None]) -> None:
        self._kept.append((owner, value, put))


#: Longer lists and dicts are not copied in every step. Entries that were added are taken off again.
_LARGE = 1000
_LARGE_ARRAY = 1 << 16
#: How many objects of the user's, one inside the other, are followed.
_DEPTH = 3
#: How many values are looked at in all.
_MOST = 20_000
_ABSENT: Any = object()
_CONTAINERS = {list, dict, set, deque}
_NOTHING: Any = {}
_INTERNAL = nn.Module().__dict__.keys()
_STATELESS: set[Any] = {
    bool, int, float, complex, str, bytes, type(None), type(Ellipsis), object, slice, range, type, ModuleType, Tensor,
    nn.Parameter, torch.Size, torch.dtype, torch.device, torch.layout, type(len), type(str.join), property, CodeType,
    type(torch.relu), type(Tensor.add),
}  # fmt: skip


@lru_cache(1024)
def _package(kind: Any) -> str:
    return str(kind.__module__).partition(".")[0]


@lru_cache(1024)
def _is_torchs(kind: Any) -> bool:
    """Whether a module is torch's own: these bind no attributes as they run."""
    return bool(kind.__module__.startswith("torch.nn.modules."))


def _root(node: Any) -> str:
    """The package that a function, or an object's class, comes from."""
    named = node if isinstance(node, (FunctionType, MethodType)) else type(node)
    return (getattr(named, "__module__", None) or "").partition(".")[0]


@lru_cache(4096)
def _names_of(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The global names that code reads, and those that it binds; inner functions included."""
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


def _put_dict(owner: dict[Any, Any], value: dict[Any, Any]) -> None:
    if _differs(owner, value):
        owner.clear()
        owner.update(value)


def _differs(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    return len(a) != len(b) or any(
        k is not j or v is not w for (k, v), (j, w) in zip(a.items(), b.items(), strict=True)
    )


def _put_list(owner: list[Any], value: list[Any]) -> None:
    if len(owner) != len(value) or any(a is not b for a, b in zip(owner, value, strict=True)):
        owner[:] = value


def _put_set(owner: set[Any], value: Iterable[Any]) -> None:
    owner.clear()
    owner.update(value)


def _put_deque(owner: deque[Any], value: list[Any]) -> None:
    owner.clear()
    owner.extend(value)


def _put_length(owner: Any, length: int) -> None:
    if isinstance(owner, dict):
        while len(owner) > length:
            owner.popitem()
    else:
        del owner[length:]


def _put_cell(owner: CellType, value: Any) -> None:
    if value is not _ABSENT:
        owner.cell_contents = value
    else:
        del owner.cell_contents


def _put_names(owner: dict[str, Any], value: dict[str, Any]) -> None:
    for name, bound in value.items():
        if bound is _ABSENT:
            owner.pop(name, None)
        else:
            owner[name] = bound


def _put_slots(owner: Any, value: dict[str, Any]) -> None:
    for name, bound in value.items():
        if bound is not _ABSENT:
            object.__setattr__(owner, name, bound)
        elif hasattr(owner, name):
            object.__delattr__(owner, name)


def _put_tail(owner: Any, tail: Any) -> None:
    owner.update(tail) if isinstance(owner, dict) else owner.extend(tail)


def _now(owner: Any, before: Any, put: Callable[[Any, Any], Any]) -> Kept:
    """A ``Kept`` with the object's state now. ``before``: the state in its earlier ``Kept``. For ``_put_length``: the
    items beyond the earlier length."""
    if put is _put_length:
        items = list(owner.items() if isinstance(owner, dict) else owner)
        return owner, items[before:], _put_tail
    if put in (_put_names, _put_slots):
        get = owner.get if put is _put_names else partial(getattr, owner)
        return owner, {name: get(name, _ABSENT) for name in before}, put
    if put is _put_cell:
        try:
            return owner, owner.cell_contents, put
        except ValueError:
            return owner, _ABSENT, put
    if put is _put_state:
        return owner, owner.state, put
    for name in ("get_state", "getstate", "copy"):
        if hasattr(owner, name) and put not in (_put_list, _put_dict, _put_set, _put_deque):
            return owner, getattr(owner, name)(), put
    return owner, dict(owner) if put is _put_dict else list(owner), put


def _put_array(owner: Any, value: Any) -> None:
    owner[...] = value


def _put_state(owner: Any, value: Any) -> None:
    owner.state = value


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
