"""Jacobians of parts of a network, by reverse mode. ``J`` is the Jacobian of ``run`` at its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import vjp
from torch.nn.attention import SDPBackend, sdpa_kernel


def push(run: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], vs: Sequence[Tensor]) -> list[Tensor]:
    """``J v`` by reverse mode twice: ``J^T u`` is linear in ``u``, and its derivative along ``u`` gives ``J v``.

    Forward mode would be shorter, but may be under way already, and does not nest."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused kernels cannot be differentiated twice
        variables = [t.detach().requires_grad_() for t in inputs]
        outs = run(*variables)
        us = [torch.zeros_like(out, requires_grad=True) for out in outs]
        pulled = torch.autograd.grad(outs, variables, us, create_graph=True, allow_unused=True)
        through = [(p, v) for p, v in zip(pulled, vs, strict=True) if p is not None and p.requires_grad]
        if not through:
            return [torch.zeros_like(u) for u in us]
        found = torch.autograd.grad([p for p, _ in through], us, [v.to(p.dtype) for p, v in through], allow_unused=True)
    return [torch.zeros_like(u) if jv is None else jv for u, jv in zip(us, found, strict=True)]


def pull_back_by_vjp(fn: Callable[[Tensor], Tensor], x: Tensor, e: Tensor) -> Tensor:
    """``J^T e`` of one operation at ``x``."""
    result: Tensor = vjp(fn, x)[1](e)[0]
    return result
