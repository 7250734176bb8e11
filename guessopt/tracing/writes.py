"""Finds, in one run, the memory that a closure writes and did not allocate; saves memory and puts it back.

A function mode sees the closure's calls, but not the memory that they write: ``row = buffer[0]; row += 1`` writes a
buffer, ``F.instance_norm`` its running statistics. The schemas of torch's low-level operations name the written
arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, is_traceable_wrapper_subclass

from guessopt.errors import ClosureError
from guessopt.tree import map_tensors, tensors_in


class Writes(TorchDispatchMode):
    """Sees every low-level operation of the closure's calls.

    Args:
        save: called with each tensor whose memory the closure has not allocated, before it is written.

    Attributes:
        found: by call, the positions of those of its tensors that it writes.
        hidden: by call, the tensors that it writes and that are not among its arguments.
        elsewhere: all tensors that are written and are no argument of the call that writes them.
    """

    supports_higher_order_operators = True

    def __init__(self, save: Callable[[Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.save = save
        self.found: dict[int, tuple[int, ...]] = {}
        self.hidden: dict[int, tuple[Tensor, ...]] = {}
        self.elsewhere: list[Tensor] = []
        self._written: dict[int, set[Any]] = {}
        # By memory, whether the closure has allocated it; and a weak reference, which keeps the address in use.
        self._made: dict[int, tuple[bool, object]] = {}
        self._call: tuple[int, Sequence[Tensor]] | None = None
        self._fn: Callable[..., Any] | None = None
        self._allocates = False

    def begin(
        self, index: int, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> None:
        """A call of the closure begins."""
        self._call, self._fn = (index, tensors), fn
        for generator in generators_in(args, kwargs):
            self.save(generator)
            self.found[index] = ()
        self._allocates = fn in _ALLOCATING
        if fn in _LENDING or fn in BINDING:
            for t in tensors[:1]:
                self._note(t)

    def end(self) -> None:
        """The call is over."""
        self._call, self._fn, self._allocates = None, None, False

    def let_go(self) -> None:
        """The run is over: keep the findings, and let go of everything else."""
        self.save = _nothing
        self._made.clear()

    def of(self, index: int) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
        """The call's entries in ``found`` and ``hidden``."""
        return self.found.get(index, ()), self.hidden.get(index, ())

    def written(self, t: Tensor) -> set[Any]:
        """The functions by which the closure has written a tensor's memory."""
        return set().union(*(self._written.get(key, ()) for key, _ in _memories(t)))

    def __torch_dispatch__(
        self, fn: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            if not isinstance(fn, OpOverload):
                return fn(*args, **kwargs)
            made = self._allocates and fn in _LIFTING
            for t in tensors_in(args, kwargs):
                self._know(t, made)
            for t in written_by(fn, args, kwargs):
                self._note(t)
            out = fn(*args, **kwargs)
            for t in tensors_in((out,)):
                self._know(t, fn.overloadpacket is not torch.ops.aten.set_)
            return out

    def _know(self, t: Tensor, made: bool) -> None:
        for key, memory in _memories(t):
            if key not in self._made:
                self._made[key] = made, memory if isinstance(memory, Tensor) else StorageWeakRef(memory)

    def _note(self, t: Tensor) -> None:
        """``t`` is about to be written."""
        self._know(t, False)
        keys = {key for key, _ in _memories(t) if not self._made[key][0]}
        if not keys:
            return
        self.save(t)
        for key in keys:
            self._written.setdefault(key, set()).add(self._fn)
        index, tensors = self._call or (-1, ())
        where = {k for k, other in enumerate(tensors) if any(key in keys for key, _ in _memories(other))}
        if where:
            self.found[index] = tuple(sorted(where.union(self.found.get(index, ()))))
        else:
            self.elsewhere.append(t)
            if self._call is not None:
                self.hidden[index] = (*self.hidden.get(index, ()), t)


def _nothing(t: Any) -> None:
    pass


def generators_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Generator]:
    """The generators among a call's arguments."""
    values = (*args, *kwargs.values()) if kwargs else args
    return [a for a in values if type(a) not in _NO_GENERATORS and isinstance(a, torch.Generator)]


_NO_GENERATORS: set[type] = {Tensor, torch.nn.Parameter, bool, int, float, str, type(None), tuple, list, torch.Size}


def copied(args: tuple[Any, ...], kwargs: dict[str, Any], positions: Collection[int]) -> Any:
    """A call's arguments with copies of the tensors at some positions. Calls with them leave the originals alone."""
    tensors = tensors_in(args, kwargs)
    own = {id(tensors[k]) for k in positions}

    def copy(t: Tensor) -> Tensor:
        return t.clone() if id(t) in own else t

    return map_tensors(args, copy), map_tensors(kwargs, copy)


def plain(t: Tensor) -> Tensor:
    """``t`` outside any transform."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def parts(t: Tensor) -> list[Tensor]:
    """The tensors with memory of their own that ``t`` is made of: itself, unless it wraps others."""
    t = plain(t)
    if is_traceable_wrapper_subclass(t):
        return [part for name in t.__tensor_flatten__()[0] for part in parts(getattr(t, name))]
    return [t]


def has_storage(t: Tensor) -> bool:
    return t.layout is torch.strided and not t.is_meta and torch._C._has_storage(t)


@contextmanager
def quietly() -> Iterator[None]:
    """Within, no mode sees the operations, and no derivative passes through them."""
    with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
        yield


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _place(t: Tensor) -> tuple[Any, ...]:
    """Where in which memory ``t`` lies."""
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype


_PLAIN = {Tensor, torch.nn.Parameter}


class Memory:
    """Copies of the memory of tensors, each made when the tensor was saved."""

    def __init__(self) -> None:
        self._memory: dict[int, tuple[torch.UntypedStorage, int, Tensor]] = {}
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._names: dict[int, tuple[Tensor, Tensor]] = {}

    def save(self, t: Tensor) -> None:
        """Keep a copy of the whole storage of ``t``, and ``t``'s place in the storage."""
        if id(t) in self._names:
            return
        ordinary = type(t) in _PLAIN and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        if ordinary and not torch._C._len_torch_dispatch_stack() and has_storage(t):
            self._save(t)
            return
        with quietly():
            for part in parts(t):
                (self._save if has_storage(part) else self._copy)(part)

    def _save(self, t: Tensor) -> None:
        name = t.detach()
        self._names[id(t)] = t, name
        storage = t.untyped_storage()
        if storage._cdata not in self._memory:
            size = storage.nbytes()
            whole = size == t.numel() * t.element_size() and t.is_contiguous()
            self._memory[storage._cdata] = storage, size, name.clone() if whole else _bytes(storage).clone()

    def _copy(self, t: Tensor) -> None:
        if id(t) in self._copies or t.device.type == "meta":
            return
        try:
            self._copies[id(t)] = t, t.detach().clone()
        except RuntimeError as error:
            raise ClosureError(
                f"the closure writes into a {type(t).__name__} of shape {list(t.shape)} ({t.layout}). It cannot be "
                "copied, so a failed step could not put it back; write it outside the closure"
            ) from error

    def saved(self) -> list[Tensor]:
        """The tensors whose memory is kept."""
        return [t for t, _ in (*self._names.values(), *self._copies.values())]

    def forget(self, t: Tensor) -> None:
        for part in parts(t):
            self._names.pop(id(part), None)
            self._copies.pop(id(part), None)
            if has_storage(part):
                self._memory.pop(part.untyped_storage()._cdata, None)

    def restore(self) -> None:
        """Put everything back. The last saved comes first, since two tensors may share memory of a numpy array."""
        with quietly():
            for storage, size, value in reversed(self._memory.values()):
                if storage.nbytes() != size:
                    storage.resize_(size)
                if size:
                    _bytes(storage).copy_(_bytes(value.untyped_storage()))
            for t, value in reversed(self._copies.values()):
                t.copy_(value)
            for t, name in reversed(self._names.values()):
                if _place(t) != _place(name):
                    t.data = name


@contextmanager
def kept(tensors: Collection[Tensor]) -> Iterator[None]:
    """Undo writes into these tensors that happen within."""
    memory = Memory()
    for t in tensors:
        memory.save(t)
    try:
        yield
    finally:
        memory.restore()


def _memories(t: Tensor) -> list[tuple[int, Any]]:
    """A key for each piece of memory that ``t`` lies in, and the object that must live for the key to stay unique."""
    found: list[tuple[int, Any]] = []
    for part in parts(t):
        if has_storage(part):
            storage = part.untyped_storage()
            found.append((storage._cdata, storage))
        else:
            found.append((-id(part), part))
    return found


def written_by(fn: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes, by its schema."""
    positions, names = _targets(fn)
    if not positions:
        return []
    targets = [args[k] if k < len(args) else kwargs.get(name) for k, name in zip(positions, names, strict=True)]
    if fn in _STATISTICS and not _trains(fn, args, kwargs):
        return []
    return tensors_in(targets)


@cache
def _targets(fn: OpOverload) -> tuple[tuple[int, ...], tuple[str, ...]]:
    arguments = list(enumerate(fn._schema.arguments))
    named = fn in _STATISTICS
    found = [
        (k, a.name)
        for k, a in arguments
        if (a.alias_info is not None and a.alias_info.is_write) or (named and a.name.startswith("running_"))
    ]
    return tuple(k for k, _ in found), tuple(name for _, name in found)


def _trains(fn: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    names = [a.name for a in fn._schema.arguments]
    if "training" not in names:
        return True
    position = names.index("training")
    return bool(args[position] if position < len(args) else kwargs.get("training", True))


#: These write running statistics, and their schemas do not say so.
_STATISTICS: set[OpOverload] = {
    getattr(torch.ops.aten, name).default
    for name in (
        "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm_gather_stats",
        "batch_norm_gather_stats_with_counts", "batch_norm_update_stats",
    )
    if hasattr(torch.ops.aten, name)
}  # fmt: skip

_LIFTING = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default}
#: These allocate the memory that they lift. Memory that is lifted elsewhere may belong to a numpy array.
_ALLOCATING: set[Callable[..., Any]] = {torch.tensor, Tensor.new, Tensor.new_tensor}
#: These hand a tensor's memory to code that no mode sees.
_LENDING: set[Callable[..., Any]] = {
    Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage,
    Tensor.__cuda_array_interface__.__get__, torch.Tensor._typed_storage,
}  # fmt: skip
#: These make a tensor's name mean other memory.
BINDING: set[Callable[..., Any]] = {Tensor.data.__set__, Tensor.set_, Tensor.resize_, Tensor.resize_as_}  # type: ignore[attr-defined]
