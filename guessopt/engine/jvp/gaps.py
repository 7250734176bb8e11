"""Operations for which torch's forward mode has no derivative, or another one than reverse mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from guessopt.ops.base import op_of


def check_tangent(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ``NotImplementedError`` if torch's forward derivative of a call differs from its backward."""
    backward_only = op_of(fn).backward_only
    if backward_only is not None and backward_only(args, kwargs):
        raise NotImplementedError("forward AD has another derivative than backward")


def is_foreign(fn: Callable[..., Any]) -> bool:
    """Whether ``fn`` is an operation of another library (``torch.library.custom_op``) with its own backward. Forward AD
    drops the tangents of such operations and raises no error."""
    if not isinstance(fn, OpOverload) or fn.namespace in ("aten", "prims", "prim"):
        return False
    return not torch._C._dispatch_has_kernel_for_dispatch_key(fn.name(), "CompositeImplicitAutograd")


def may_fuse(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call without tangents may take a fused kernel. With dropout that kernel may draw another mask."""
    op = op_of(fn)
    return op.fuses and not (op.draws is not None and op.draws(args, kwargs))
