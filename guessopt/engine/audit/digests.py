"""Random projections, by which tensors of several runs are compared without keeping them."""

from __future__ import annotations

import torch
from torch import Tensor


def signs(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (count,), generator=generator).double() * 2 - 1


def digest(t: Tensor) -> Tensor:
    """Three random projections of a tensor. Two tensors that differ have different projections, almost surely."""
    t = t.detach()
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    flat = t.double().reshape(-1).cpu()
    return torch.stack([flat @ signs(flat.numel(), seed) for seed in range(3)])
