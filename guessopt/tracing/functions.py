"""Facts about single torch functions, and the contexts in which calls are made."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from guessopt.layout import is_differentiable

#: A context that does nothing. One object serves all calls, for speed.
AS_IT_IS = nullcontext[None]()


class NoGrad:
    """``torch.no_grad()`` at a fraction of its cost. A run enters it at every call."""

    def __init__(self) -> None:
        self._before: list[bool] = []

    def __enter__(self) -> None:
        self._before.append(torch.is_grad_enabled())
        torch._C._set_grad_enabled(False)

    def __exit__(self, *error: object) -> None:
        torch._C._set_grad_enabled(self._before.pop())


def autocast_of(t: Tensor) -> tuple[str, torch.dtype] | None:
    """Device type and dtype of the autocast in force for the tensor's device; None without autocast."""
    if not torch._C._is_any_autocast_enabled():
        return None
    kind = t.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return (kind, torch.get_autocast_dtype(kind)) if enabled else None


def without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """Within, no autocast on the tensor's device."""
    return torch.autocast(t.device.type, enabled=False) if autocast_of(t) else nullcontext()


#: Of their second tensor these read only the dtype or the shape (``x.type_as(self.weight)``).
_AFTER_ANOTHER: set[Callable[..., Any]] = {
    Tensor.type_as, Tensor.to, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as,
}  # fmt: skip

#: These make a sparse matrix of indices, which have no derivative, and values.
_SPARSE: set[Callable[..., Any]] = {
    torch.sparse_coo_tensor, torch.sparse_csr_tensor, torch.sparse_csc_tensor, torch.sparse_compressed_tensor,
}  # fmt: skip


def read_by(fn: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    """Of a call's tensors, the ones whose entries its result depends on."""
    if fn in _SPARSE:
        return [t for t in tensors if is_differentiable(t)]
    return tensors[:1] if fn in _AFTER_ANOTHER else tensors


def dense(w: Tensor) -> Tensor:
    """The weight as an ordinary tensor. A quantised weight, of a tensor class of its own, is dequantised."""
    return w.dequantize() if is_traceable_wrapper_subclass(w) and hasattr(w, "dequantize") else w


_STOPPING: set[Callable[..., Any]] = {
    Tensor.detach,
    torch.detach,
    Tensor.detach_,
    Tensor.data.__get__,  # type: ignore[attr-defined]
    Tensor.data.__set__,  # type: ignore[attr-defined]
}


def stops_gradient(fn: Callable[..., Any]) -> bool:
    """Whether ``fn`` is one of the spellings of ``detach``."""
    return fn in _STOPPING
