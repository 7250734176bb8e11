"""What operations and losses are made with: the description of a network, its parameters and data, the two tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Fn = Callable[[Tensor], Tensor]

FEATURES = ("rows", "sequence", "time", "merged", "merged_time")
"""[N, d], [N, T, d], [T, N, d], [N*T, d], [T*N, d]: features last."""
PLACES = ("sequence", "time")
SPATIAL = ("signal", "image")
"""[N, C, L] and [N, C, H, W]."""
ANY = FEATURES + SPATIAL

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.RMSNorm)


class Unfit(Exception):
    """The operation does not fit the value, or the loss its shape."""


class Op(NamedTuple):
    """One operation. ``size``: a width, a kernel or a count, where it has one."""

    family: str
    variant: str
    size: int = 3

    def __repr__(self) -> str:
        return f"Op{tuple(self)!r}"


@dataclass(frozen=True, repr=False)
class Network:
    """``inputs``: what the first operation gets; ``batch``, ``tokens``, ``width``: N, T (also the height), d;
    ``losses``: names in ``LOSSES``, added up; ``reduction``: of each of them; ``seed``: of parameters and data."""

    ops: tuple[Op, ...] = ()
    losses: tuple[str, ...] = ("cross_entropy",)
    inputs: str = "rows"
    batch: int = 3
    tokens: int = 2
    width: int = 3
    reduction: str = "mean"
    seed: int = 0

    def __repr__(self) -> str:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        said = [f"{f.name}={own[f.name]!r}" for f in fields(self) if own[f.name] != f.default]
        return f"Network({', '.join(said)})"

    def __str__(self) -> str:
        steps = " > ".join(f"{op.family}.{op.variant}" for op in self.ops)
        return (
            f"{self.inputs} N={self.batch} T={self.tokens} d={self.width} | {steps} | "
            f"{' + '.join(self.losses)} ({self.reduction})"
        )


# --- what a network is built with ------------------------------------------------------------------------------------


class Built:
    """A network with its parameters and data.

    ``state`` holds what may change between steps: ``flag``, ``which``, ``mix`` and, by name, tensors made for a batch.
    ``uses`` names the entries of ``state`` that the network reads.
    """

    def __init__(self, network: Network) -> None:
        self.network, self.batch = network, network.batch
        self.model = nn.Module()
        self.state: dict[str, Any] = {"flag": True, "which": 0, "mix": 1.0}
        self.uses: set[str] = set()
        self.functions: list[Fn] = []
        self.loss_functions: list[Fn] = []
        self.extras: list[Tensor] = []
        self.makers: dict[str, Callable[[int], Tensor]] = {}
        self.dtype = torch.float64

    @property
    def named(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def data(self, name: str) -> Tensor:
        value: Tensor = self.state[name]
        return value

    def set_batch(self, n: int, seed: int = 0) -> None:
        """Other data, for ``n`` examples."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.network.seed + 1 + seed)
            self.batch = n
            for name, make in self.makers.items():
                value = make(n)
                self.state[name] = value.to(self.dtype) if value.is_floating_point() else value

    def set_dtype(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.model.to(dtype)
        for name in self.makers:
            if self.data(name).is_floating_point():
                self.state[name] = self.data(name).to(dtype)

    def forward(self) -> Tensor:
        self.extras.clear()
        h = self.data("x")
        for function in self.functions:
            h = function(h)
        return h

    def closure(self) -> Tensor:
        h = self.forward()
        total = self.loss_functions[0](h)
        for loss in self.loss_functions[1:]:
            total = total + loss(h)
        for extra in self.extras:
            total = total + 0.1 * extra
        self.extras.clear()
        return total


class Maker:
    """What an operation builds itself with. ``kind``: where the examples lie in the value that it gets."""

    def __init__(self, built: Built) -> None:
        self.built, self.kind, self.tokens = built, "rows", built.network.tokens
        self.label = ""
        self.count = 0

    def _name(self) -> str:
        self.count += 1
        return f"{self.label}_{self.count}"

    def module(self, module: Any) -> Any:
        self.built.model.add_module(self._name(), module.double())
        for layer in module.modules():
            if isinstance(layer, NORMS) and layer.weight is not None:
                nn.init.normal_(layer.weight, 1.0, 0.3)
        return module

    def linear(self, i: int, o: int, bias: bool = True) -> nn.Linear:
        made: nn.Linear = self.module(nn.Linear(i, o, bias=bias))
        return made

    def parameter(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> nn.Parameter:
        p = nn.Parameter(mean + std * torch.randn(shape, dtype=torch.float64))
        self.built.model.register_parameter(self._name(), p)
        return p

    def data(self, make: Callable[[int], Tensor]) -> Callable[[], Tensor]:
        """A tensor made for a batch of n; made anew when the batch changes."""
        name = f"{self._name()}_data"
        self.built.makers[name] = make
        self.built.state[name] = make(self.built.batch)
        return lambda: self.built.data(name)

    def constant(self, *shape: int) -> Callable[[], Tensor]:
        return self.data(lambda n: torch.randn(*shape, dtype=torch.float64))

    def switch(self, name: str) -> Callable[[], Any]:
        """Something that may change between steps."""
        self.built.uses.add(name)
        return lambda: self.built.state[name]

    def shaped(self) -> Callable[[int], tuple[int, ...]]:
        """For a batch of n, the shape of a value here without its features."""
        kind, t = self.kind, self.tokens
        shapes: dict[str, Callable[[int], tuple[int, ...]]] = {
            "sequence": lambda n: (n, t),
            "time": lambda n: (t, n),
            "merged": lambda n: (n * t,),
            "merged_time": lambda n: (n * t,),
        }
        return shapes.get(kind, lambda n: (n,))

    def extra(self, value: Tensor) -> None:
        """A term of the loss."""
        self.built.extras.append(value.mean() if self.built.network.reduction != "sum" else value.sum())

    def follow(self, h: Tensor) -> None:
        """The operation gave ``h``: keep the number of positions."""
        if self.kind in PLACES:
            self.tokens = h.shape[1 if self.kind == "sequence" else 0]


Builder = Callable[[Maker, Tensor, str, int], Fn]


class Family(NamedTuple):
    build: Builder
    variants: tuple[str, ...]
    kinds: tuple[str, ...]


OPERATIONS: dict[str, Family] = {}
LOSSES: dict[str, Callable[[Maker, Tensor, str], Fn]] = {}


def family(variants: str, kinds: Sequence[str] = ANY) -> Callable[[Builder], Builder]:
    def register(build: Builder) -> Builder:
        OPERATIONS[build.__name__.rstrip("_")] = Family(build, tuple(variants.split()), tuple(kinds))
        return build

    return register


def loss(names: str = "") -> Callable[[Callable[..., Fn]], Callable[..., Fn]]:
    """One name, or with ``names`` variants: the function then gets the variant as well."""

    def register(make: Callable[..., Fn]) -> Callable[..., Fn]:
        base = make.__name__.rstrip("_")
        LOSSES[base] = (lambda m, h, r: make(m, h, r, "")) if names else make
        for name in names.split():
            LOSSES[f"{base}_{name}"] = partial(_variant, make, name)
        return make

    return register


def _variant(make: Callable[..., Fn], name: str, m: Maker, h: Tensor, reduction: str) -> Fn:
    return make(m, h, reduction, name)


def need(condition: bool) -> None:
    if not condition:
        raise Unfit


def examples_first(kind: str) -> Fn:
    return (lambda h: h.transpose(0, 1)) if kind == "time" else (lambda h: h)
