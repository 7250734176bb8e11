"""Operations for which torch's forward mode has no derivative, or another one than reverse mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from guessopt.ops.attention import drops_out
from guessopt.ops.drawing import RECURRENT

#: These multiply where they scatter, if asked to. Torch's tangent is then 0 wherever a factor is 0.
_SCATTERS: set[Callable[..., Any]] = {torch.scatter_reduce, Tensor.scatter_reduce, Tensor.scatter_reduce_}

#: Functions whose forward derivative in torch differs from their backward, at a kink or at zeros. The backward counts.
_UNEQUAL: set[Callable[..., Any]] = {F.prelu, Tensor.prelu, torch.fmax, Tensor.fmax, *_SCATTERS}

#: Operations that run in another way than a plain run's, and how; ``preflight`` tells the user.
TREATMENTS: dict[Callable[..., Any], str] = {
    **dict.fromkeys(RECURRENT, "runs unfused: oneDNN's fused recurrence has no forward derivative"),
    F.scaled_dot_product_attention: "runs by the explicit formula: the fused kernels have no forward derivative",
}


def check_tangent(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ``NotImplementedError`` if torch's forward derivative of a call differs from its backward."""
    if fn in _UNEQUAL and (
        fn not in _SCATTERS or any(type(a) is str and a == "prod" for a in (*args, *kwargs.values()))
    ):
        raise NotImplementedError("forward AD has another derivative than backward")


def is_foreign(fn: Callable[..., Any]) -> bool:
    """Whether ``fn`` is an operation of another library (``torch.library.custom_op``) with its own backward. Forward AD
    drops the tangents of such operations and raises no error."""
    if not isinstance(fn, OpOverload) or fn.namespace in ("aten", "prims", "prim"):
        return False
    return not torch._C._dispatch_has_kernel_for_dispatch_key(fn.name(), "CompositeImplicitAutograd")


def may_fuse(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call without tangents may take attention's fused kernel. With dropout that kernel may draw another
    mask."""
    return fn is F.scaled_dot_product_attention and not drops_out(args, kwargs)


@contextmanager
def without_mkldnn() -> Iterator[None]:
    """Within, torch uses no kernel of oneDNN."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)
