"""May a base update one parameter at a time? Tried on copies of the base with small stand-ins for the parameters."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from guessopt.layout import is_differentiable
from guessopt.rng import RandomState, cuda_devices
from guessopt.update.base import MAX_COPIED_BYTES, base_step, holds_numbers
from guessopt.update.whole import Undo

#: Steps of a trial.
_TRIED_STEPS = 3
#: The most entries of a stand-in's dimensions.
_MAX_SIDE = 3


@contextmanager
def only(base: Optimizer, p: Tensor, *, unfused: bool = False) -> Iterator[None]:
    """Within, the base's groups hold no parameter but ``p``.

    Args:
        unfused: switch torch's fused kernels off, which refuse sparse gradients.
    """
    groups = base.param_groups
    before: list[dict[str, Any]] = [{k: group[k] for k in ("params", "fused") if k in group} for group in groups]
    try:
        for group in groups:
            group["params"] = [p] if any(q is p for q in group["params"]) else []
            if unfused and group.get("fused"):
                group["fused"] = False
        yield
    finally:
        for group, own in zip(groups, before, strict=True):
            group.update(own)


def together(base: Optimizer) -> str | None:
    """Why the base must update all parameters in one call; None if it can be called once for each.

    Both ways are tried on copies of the base with small stand-ins for the parameters. The copies' parameters and all
    numbers that they keep are compared. The real parameters and state are not touched.
    """
    if type(base).__module__.startswith("torch.optim."):
        return None  # known
    name = type(base).__name__
    small = 8 * sum(p.nbytes for group in base.param_groups for p in group["params"]) <= MAX_COPIED_BYTES
    error: Exception | None = None
    random = RandomState.capture(cuda_devices(p for group in base.param_groups for p in group["params"]))
    before = Undo().walked([vars(base)], small)
    for side, sparse in ((_MAX_SIDE, False), (_MAX_SIDE, True), *((None, sparse) for sparse in (False, True) if small)):
        try:
            where = _difference(base, side, sparse)
        except Exception as e:
            error = error or e
            continue
        finally:
            random.restore()
            before.restore(told=True)
        if where is None:
            return None
        return (
            f"base {name} updates parameters together: {where} differs where it is called once for each parameter; use "
            "memory='replay'"
        )
    return (
        f"base {name} could not be tried on copies ({type(error).__name__}: {error}), so it is not known whether it "
        "may be called once for each parameter; use memory='replay'"
    )


def _difference(base: Optimizer, side: int | None, sparse: bool) -> str | None:
    """The first number that differs between an update of all parameters and updates one by one, and that does not
    differ between two updates of all. None if there is none."""
    copies = [_Copy(base, side) for _ in range(3)]
    one, again, apart = copies
    shapes, generator = one.params, torch.Generator().manual_seed(0)
    random = RandomState.capture(cuda_devices(shapes))
    gradients = [[_random(p, generator, sparse) for p in shapes] for _ in range(_TRIED_STEPS)]
    for each in (one, again):
        random.restore()
        for gs in gradients:
            for p, g in zip(each.params, gs, strict=True):
                p.grad = g.clone()
            base_step(each.base)
    now = RandomState.capture(tuple(random.devices))
    draws = not torch.equal(now.torch_cpu, random.torch_cpu) or any(
        not torch.equal(now.devices[k], random.devices[k]) for k in now.devices
    )
    random.restore()
    for p in apart.params:
        p.grad = None
    for gs in gradients:
        pairs = list(zip(apart.params, gs, strict=True))
        for p, g in pairs if draws else reversed(pairs):
            p.grad = g.clone()
            with only(apart.base, p):
                base_step(apart.base)
            p.grad = None
    found = one.differences(apart)
    noise = one.differences(again) if found else []
    found = [path for path in found if path not in noise]
    return min(found, key=lambda path: path.startswith("its state"), default=None)


def _random(p: Tensor, generator: torch.Generator, sparse: bool) -> Tensor:
    real = torch.float64 if p.dtype in (torch.float64, torch.complex128) else torch.float32
    g = torch.randn((*p.shape, *((2,) if p.is_complex() else ())), generator=generator, dtype=real)
    g = (torch.view_as_complex(g) if p.is_complex() else g).to(p.device, p.dtype)
    return g.to_sparse() if sparse else g


class _Copy:
    """A copy of a base on stand-ins for its parameters.

    Args:
        side: the most entries of a stand-in's dimensions; None for stand-ins as large as the parameters.
    """

    def __init__(self, base: Optimizer, side: int | None) -> None:
        self.side, self.memo = side, dict[int, Any]()
        originals = [p for group in base.param_groups for p in group["params"]]
        for p in originals:
            q = self.narrow(p)
            q = torch.nn.Parameter(q, p.requires_grad) if isinstance(p, torch.nn.Parameter) else q
            q.requires_grad_(p.requires_grad)
            q.__dict__.update(p.__dict__)
            self.memo[id(p)] = q
        self.params = [self.memo[id(p)] for p in originals]
        self.start = [q.detach().clone() for q in self.params]
        self.base: Optimizer = self.of(base)

    def narrow(self, t: Tensor) -> Tensor:
        t = t.detach()
        if self.side is not None and t.layout is torch.strided:
            t = t[tuple(slice(self.side) for _ in t.shape)]
        return t.clone()

    def of(self, node: Any) -> Any:
        if id(node) in self.memo:
            return self.memo[id(node)]
        found: Any
        if isinstance(node, Tensor):
            self.memo[id(node)] = found = self.narrow(node)
        elif isinstance(node, Optimizer):
            self.memo[id(node)] = found = type(node).__new__(type(node))
            for key, value in vars(node).items():
                if key != "step":
                    vars(found)[key] = OrderedDict() if key.startswith("_optimizer_") else self.of(value)
        elif isinstance(node, dict):
            self.memo[id(node)] = found = copy.copy(node)
            found.clear()
            for key, value in node.items():
                found[self.of(key)] = self.of(value)
        elif isinstance(node, list):
            self.memo[id(node)] = found = []
            found += map(self.of, node)
        elif isinstance(node, tuple):
            items = [self.of(item) for item in node]
            found = type(node)(*items) if hasattr(node, "_fields") else tuple(items)
        else:
            found = copy.deepcopy(node, self.memo)
        return found

    def differences(self, other: _Copy) -> list[str]:
        """The paths at which two copies differ: first the base's numbers, then the parameters."""
        twins = {id(p): q for p, q in zip(self.params, other.params, strict=True)}
        found: list[str] = []
        _compare(vars(self.base), vars(other.base), "its", twins, found, set())
        for k, (p, q, start) in enumerate(zip(self.params, other.params, self.start, strict=True)):
            moved = float((p.detach() - start).abs().max()) if p.numel() else 0.0
            if not _near(p, q, 1e-3 * moved):
                found.append(f"parameter {k}")
        return found


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.layout is not torch.strided:
        a, b = a.to_dense(), b.to_dense()
    if not is_differentiable(a):
        return torch.equal(a, b)
    a, b = a.detach(), b.detach()
    if a.numel() == 0:
        return True
    tolerance += 4 * torch.finfo(a.dtype).eps * float(a.abs().max().nan_to_num())
    return bool(((a - b).abs() <= tolerance).logical_or(a.isnan() & b.isnan()).all())


def _compare(a: Any, b: Any, path: str, twins: dict[int, Any], found: list[str], seen: set[int]) -> None:
    """Add to ``found`` the paths at which two copies keep different numbers."""
    if id(a) in seen or id(a) in twins:
        return
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or not _near(a, b, 1e-3 * float(_largest(a))):
            found.append(path)
    elif isinstance(a, bool | int | str):
        if a != b:
            found.append(path)
    elif isinstance(a, float):
        if not isinstance(b, float) or not (math.isclose(a, b, rel_tol=1e-6) or (a != a and b != b)):
            found.append(path)
    elif isinstance(a, dict) and isinstance(b, dict):
        seen.add(id(a))
        for key, value in a.items():
            twin = twins.get(id(key), key) if isinstance(key, Tensor) else key
            name = f"{path} {key}" if isinstance(key, str) else path
            if twin in b:
                _compare(value, b[twin], name, twins, found, seen)
            elif not (isinstance(value, dict) and not value):
                found.append(name)
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        seen.add(id(a))
        if len(a) != len(b):
            found.append(path)
        for x, y in zip(a, b, strict=False):
            _compare(x, y, path, twins, found, seen)
    elif type(a) is type(b) and holds_numbers(a):
        seen.add(id(a))
        _compare(vars(a), vars(b), path, twins, found, seen)


def _largest(t: Tensor) -> Tensor:
    t = t.detach().to_dense() if t.layout is not torch.strided else t.detach()
    return t.abs().max().nan_to_num() if t.numel() else torch.zeros(())
