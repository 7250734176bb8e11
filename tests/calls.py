"""A row of ``operations`` with random tensors in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as fw
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from guessopt.ops import op_of

from .operations import STOCK, Case, T


@dataclass
class Built:
    """A case with tensors: ``args`` and ``kwargs`` without tangents, and the tangents by ``id`` of their primals."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tangents: dict[int, Tensor]

    def own(self, rule: Callable[..., Any] | None = None, **known: Any) -> Any:
        """The rule's result, called as an engine calls it."""
        rule, duals = rule or op_of(self.fn).tangent, op_of(self.fn).duals
        assert rule is not None
        with torch.no_grad():
            moving = tuple(
                [self.tangents.get(id(t)) for t in a] if isinstance(a, list) else self.tangents.get(id(a))
                for a in self.args[:duals]
            )
            if duals == 1:
                return rule(self.args[0], moving[0], *self.args[1:], **self.kwargs, **known)
            return rule(self.args[:duals], moving, *self.args[duals:], **self.kwargs, **known)

    def stock(self) -> tuple[Tensor, Tensor]:
        """Torch's own forward AD."""
        with torch.no_grad(), fw.dual_level(), sdpa_kernel(SDPBackend.MATH):
            args = tree_map_only(
                Tensor, lambda a: fw.make_dual(a, self.tangents[id(a)]) if id(a) in self.tangents else a, self.args
            )
            out, dout = fw.unpack_dual(STOCK.get(self.fn, self.fn)(*args, **self.kwargs))
        return out, dout

    def twin(self) -> Built:
        """The same, in tensors of its own."""
        copies: dict[int, Tensor] = {}

        def copy(t: Tensor) -> Tensor:
            copies[id(t)] = t.clone()
            return copies[id(t)]

        args, kwargs = tree_map_only(Tensor, copy, (self.args, self.kwargs))
        return Built(self.fn, args, kwargs, {id(copies[k]): t.clone() for k, t in self.tangents.items()})


def build(case: Case, dtype: torch.dtype) -> Built:
    tangents: dict[int, Tensor] = {}

    def make(a: Any) -> Any:
        if isinstance(a, T):
            t = a.make(dtype)
            if a.moves:
                tangents[id(t)] = torch.randn(a.shape, dtype=torch.float64).to(dtype)
            return t
        return [make(item) for item in a] if isinstance(a, list) else a

    args, kwargs = tuple(make(a) for a in case.args), {k: make(a) for k, a in case.kwargs.items()}
    return Built(case.fn, args, kwargs, tangents)


def assert_close(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert a.shape == b.shape
    error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.1e}"
