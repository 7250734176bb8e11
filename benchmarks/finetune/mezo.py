"""MeZO (Malladi et al. 2023, Algorithm 1): the loss at parameters moved by ``+eps z`` and ``-eps z``, in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class MeZO(Optimizer):
    """SGD along ``z ~ N(0, I)``, which is drawn anew from its seed each time: nothing of the parameters' size is kept.

    The loss must be deterministic (no dropout).
    """

    def __init__(self, params: Any, lr: float = 1e-6, eps: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """One update; returns the mean of the two losses."""
        seed, eps = int(torch.randint(2**62, ())), self.defaults["eps"]
        self._move(seed, eps)
        above = closure()
        self._move(seed, -2 * eps)
        below = closure()
        self._move(seed, eps - self.defaults["lr"] * float(above - below) / (2 * eps))
        return (above + below) / 2

    def _move(self, seed: int, distance: float) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        generator = torch.Generator(parameters[0].device).manual_seed(seed)
        for p in parameters:
            p.add_(torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=generator), alpha=distance)
