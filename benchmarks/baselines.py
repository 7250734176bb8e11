"""Backpropagation with checkpointing, with the optimizer in the backward pass, and MeZO's two forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from benchmarks.problems import layers
from benchmarks.training import Backprop, Forward
from guessopt.rng import RandomState


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def checkpointed(model: nn.Module, blocks: Iterable[nn.Module] | None = None) -> nn.Module:
    """The model, whose blocks forget their activations and compute them again in the backward pass.

    Args:
        blocks: modules inside the model, which are changed; None: the layers of an ``nn.Sequential``.
    """
    if blocks is None:
        assert isinstance(model, nn.Sequential)
        model = nn.Sequential(*layers(model))
        blocks = model
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


class InBackward(Backprop):
    """Updates each parameter as soon as its gradient is complete, and then frees the gradient."""

    def __init__(self, model: nn.Module, lr: float, **options: Any) -> None:
        self.optimizers = {p: AdamW([p], lr=lr, **options) for p in trainable(model)}
        super().__init__(model, None)
        for p in self.optimizers:
            p.register_post_accumulate_grad_hook(self._update)

    def _update(self, p: nn.Parameter) -> None:
        self.optimizers[p].step()
        p.grad = None

    def step(self, x: Tensor, y: Tensor) -> None:
        self.loss(x, y).backward()


class MeZO(Optimizer):
    """Two forward passes, at the parameters plus ``eps z`` and minus ``eps z`` (Malladi et al. 2023, Algorithm 1).

    ``z`` is drawn again from its seed for each move of the parameters, and the moves are in place. So no memory of the
    parameters' size is needed.
    """

    def __init__(self, params: Any, lr: float = 1e-6, eps: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """Returns the mean of the two losses. Both passes draw the same random numbers (dropout)."""
        seed = int(torch.randint(2**62, ()))
        loss, slope = self.slope(closure, seed)
        self.move(seed, lambda group: group["eps"] - group["lr"] * slope)
        return loss

    def slope(self, closure: Callable[[], Tensor], seed: int) -> tuple[Tensor, float]:
        """The loss and its slope along ``z``. Afterwards the parameters are at minus ``eps z``."""
        state = RandomState.capture()
        self.move(seed, lambda group: group["eps"])
        above = closure()
        state.restore()
        self.move(seed, lambda group: -2 * group["eps"])
        below = closure()
        return (above + below) / 2, float(above - below) / (2 * self.defaults["eps"])

    def move(self, seed: int, scale: Callable[[dict[str, Any]], float]) -> None:
        """Add ``scale(group) z`` to every parameter."""
        for group, p, z in self.directions(seed):
            p.add_(z, alpha=scale(group))

    def directions(self, seed: int) -> Iterable[tuple[dict[str, Any], Tensor, Tensor]]:
        """Group, parameter and ``z``, one parameter at a time."""
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    generator = generators.setdefault(p.device, torch.Generator(p.device).manual_seed(seed))
                    yield group, p, torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=generator)


class ZerothOrder(Forward):
    """Trains with MeZO."""

    def cosine(self, x: Tensor, y: Tensor) -> float:
        own, seed = self.optimizer, int(torch.randint(2**62, ()))
        with torch.no_grad():
            _, slope = own.slope(lambda: self.loss(x, y), seed)
            own.move(seed, lambda group: group["eps"])
        true = torch.autograd.grad(self.loss(x, y), [p for _, p, _ in own.directions(seed)])
        guess = torch.cat([z.flatten() for *_, z in own.directions(seed)])
        return cosine_similarity(slope * guess, torch.cat([g.flatten() for g in true]), dim=0).item()
