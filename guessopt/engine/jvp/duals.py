"""Tensors with a tangent attached (``torch.autograd.forward_ad``): taken apart and put together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from guessopt.layout import is_differentiable


def unpack(t: Tensor) -> tuple[Tensor, Tensor | None]:
    """Primal and tangent; None in place of the tangent if there is none.

    ``fw.unpack_dual`` without its checks: a dual level is open, and dual levels do not nest.
    """
    if (t.is_floating_point() or t.is_complex()) and t.layout is torch.strided:  # other tensors carry no tangent
        pair: tuple[Tensor, Tensor | None] = torch._unpack_dual(t, level=0)
        return pair
    return t, None


def pack(primal: Tensor, tangent: Tensor) -> Tensor:
    """``primal`` with ``tangent`` attached: ``fw.make_dual`` without its checks."""
    dual: Tensor = torch._make_dual(primal, tangent, level=0)
    return dual


def unpack_list(node: Any) -> tuple[Any, Any]:
    """Primals and tangents of a list of tensors, as two lists; None in place of the second if no tensor has a tangent.
    Any other object comes back as ``(node, None)``."""
    if not isinstance(node, (tuple, list)) or not all(isinstance(t, Tensor) for t in node):
        return node, None
    pairs = [unpack(t) for t in node]
    moving = any(tangent is not None for _, tangent in pairs)
    return [primal for primal, _ in pairs], [tangent for _, tangent in pairs] if moving else None


def carries_tangent(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a tensor directly among the arguments has a tangent."""
    for a in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(a, Tensor) and type(a) is not torch.nn.Parameter and unpack(a)[1] is not None:
            return True
    return False


def in_dtype_of_primal(out: Any) -> Any:
    """``out`` with its tangent in the primal's dtype. Under autocast some of torch's rules give a float32 tangent to a
    bfloat16 output."""
    if not isinstance(out, Tensor) or not is_differentiable(out):
        return out
    primal, tangent = unpack(out)
    if tangent is None or tangent.dtype is primal.dtype:
        return out
    return pack(primal, tangent.to(primal.dtype))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """``Re(conj(a) b)``, entry by entry: the inner product of torch's gradients and tangents, also of complex ones."""
    return torch.real(a.conj() * b) if a.is_complex() or b.is_complex() else a * b
