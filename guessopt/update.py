"""The base's update: whole or not at all, and whether a base may update one parameter at a time."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from guessopt.errors import PartialUpdateError
from guessopt.layout import is_differentiable
from guessopt.rng import RandomState, cuda_devices

#: Updates before which parameters and state are copied, and the most bytes that copies may take.
COPIED, MOST = 8, 64 * 2**20

#: Steps of a dry run, and the most entries of a stand-in's dimensions.
STEPS, SIDE = 3, 3


def base_step(base: Optimizer) -> None:
    """The base's own ``step``, without the hooks that torch has wrapped around it."""
    if "step" in vars(base):  # a scheduler's counter
        base.step()
        return
    step = type(base).step
    plain = getattr(step, "__wrapped__", step) if getattr(step, "hooked", None) else step
    with torch.no_grad():
        plain(base)


def _holds(node: Any) -> bool:
    """Whether this object may keep numbers of a base in its attributes."""
    if isinstance(node, Optimizer):
        return True
    return hasattr(node, "__dict__") and not callable(node) and not isinstance(node, ModuleType)


# --- whole or not at all ----------------------------------------------------------------------------------------------


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.layout is torch.strided and torch.equal(a, b)


class Undo:
    """The state before an update: containers, and the versions of tensors or, with ``copies``, their values."""

    def __init__(self) -> None:
        self.containers: list[tuple[Any, Any]] = []
        self.tensors: list[tuple[Tensor, int, Tensor | None]] = []
        self.versions: list[Tensor] = []
        self.before: list[int] = []

    @classmethod
    def of(cls, base: Optimizer, params: Iterable[Tensor], plain: bool) -> Undo:
        """Without copies.

        Args:
            plain: whether the base keeps all its numbers in groups and state, so that nothing else must be searched.
        """
        params = list(params)
        grads = [g for p in params if (g := p.grad) is not None]
        if not plain:
            return cls().walked([vars(base), grads])
        found, state = cls(), base.state
        own = [state[params[0]]] if len(params) == 1 and params[0] in state else list(state.values())
        dicts = [vars(base), state, *base.param_groups, *own]
        found.containers = [(each, dict(each)) for each in dicts]
        found.containers += [(group["params"], list(group["params"])) for group in base.param_groups]
        found.versions = [*params, *grads]
        for each in own:
            found.versions += [t for t in each.values() if isinstance(t, Tensor)]
        found.before = [t._version for t in found.versions]
        return found

    def walked(self, roots: Iterable[Any], copies: bool = False, skip: Iterable[Any] = ()) -> Undo:
        """Add everything that can be reached from ``roots``."""
        seen, stack = {id(node) for node in skip}, list(roots)
        while stack:
            node = stack.pop()
            if isinstance(node, Tensor):
                if id(node) not in seen:
                    seen.add(id(node))
                    self.tensors.append((node, node._version, node.detach().clone() if copies else None))
            elif isinstance(node, (dict, list)):
                if id(node) not in seen:
                    seen.add(id(node))
                    self.keep(node)
                    stack += node.values() if isinstance(node, dict) else node
            elif isinstance(node, tuple):
                stack += node
            elif id(node) not in seen and _holds(node):
                seen.add(id(node))
                stack.append(vars(node))
        return self

    def keep(self, node: Any) -> None:
        """Add a container without its contents."""
        self.containers.append((node, dict(node) if isinstance(node, dict) else list(node)))

    def told(self) -> bool:
        """Whether every changed tensor has a new version. Needs copies."""
        return all(
            t._version != version or (value is not None and _equal(t, value)) for t, version, value in self.tensors
        )

    def restore(self, told: bool) -> list[Tensor]:
        """Put everything back; returns tensors that were written and of which there is no copy.

        Args:
            told: whether every write gives a new version. If not, any tensor may have been written.
        """
        for node, before in self.containers:
            if isinstance(node, dict):
                node.clear()
                node.update(before)
            else:
                node[:] = before
        left = []
        with torch.no_grad():
            for t, version, value in self.tensors:
                if value is not None:
                    if not _equal(t, value):
                        t.copy_(value)
                elif t._version != version or not told:
                    left.append(t)
        return left + [t for t, v in zip(self.versions, self.before, strict=True) if t._version != v or not told]


class Updates:
    """The updates of one base.

    Before each of the first ``COPIED`` updates, parameters and state are copied if that takes at most ``MOST`` bytes:
    a failure puts all back. Later a failure puts all back where nothing had been written yet.
    """

    def __init__(self, base: Optimizer) -> None:
        self.made = 0
        self.told: bool = type(base).__module__.startswith("torch.optim.")
        self.plain = False

    @contextmanager
    def whole(self, base: Optimizer, params: Sequence[Tensor], names: Sequence[str]) -> Iterator[None]:
        """An update of all parameters."""
        copies = self._copies(params)
        if copies:
            undo = Undo().walked([vars(base), [p.grad for p in params if p.grad is not None]], True)
        else:
            undo = Undo.of(base, params, self.plain)
        try:
            yield
        except BaseException as error:
            self._undo(undo, error, base, params, names)
            raise
        if self.made == 0:
            self.plain = _is_plain(base)
        if self.made == 1 and copies and not self.told:  # now that there is state
            self.told = undo.told()
        self.made += 1

    @contextmanager
    def single(self, base: Optimizer, p: Tensor, name: str) -> Iterator[None]:
        """An update of one parameter; the groups hold no other."""
        copies = self._copies([p])
        if copies or not self.plain:
            roots = [vars(base), base.state.get(p, {}), p, p.grad]
            undo = Undo().walked([r for r in roots if r is not None], copies, skip=[base.state])
            undo.keep(base.state)
        else:
            undo = Undo.of(base, [p], True)
        try:
            yield
        except BaseException as error:
            self._undo(undo, error, base, [p], [name])
            raise

    def passed(self, base: Optimizer) -> None:
        """A step of single updates is made."""
        if self.made == 0:
            self.plain = _is_plain(base)
        self.made += 1

    def _copies(self, params: Sequence[Tensor]) -> bool:
        return self.made < COPIED and 4 * sum(p.nbytes for p in params) <= MOST

    def _undo(
        self, undo: Undo, error: BaseException, base: Optimizer, params: Sequence[Tensor], names: Sequence[str]
    ) -> None:
        told = self.told and not torch._C._len_torch_dispatch_stack()  # under a mode, torch counts no versions of lists
        left = {id(t) for t in undo.restore(told)}
        if not left:
            return
        written = [name for p, name in zip(params, names, strict=True) if id(p) in left]
        few = ", ".join(written[:3]) + (f" and {len(written) - 3} more" if len(written) > 3 else "")
        raise PartialUpdateError(
            f"{type(base).__name__} failed in its update ({type(error).__name__}: {error}) after it had written to "
            f"{few or 'its state'}; load parameters and optimizer from a checkpoint. Gradients, buffers and random "
            "states are as before the step",
            None,
        ) from error


def _is_plain(base: Optimizer) -> bool:
    """Whether all numbers of a base are direct entries of its groups and of its parameters' state."""

    def is_leaf(node: Any) -> bool:
        return not isinstance(node, dict | list | tuple) and not (_holds(node) and not isinstance(node, Tensor))

    known, own = ("state", "param_groups", "defaults"), ("params", "param_names", "estimator")
    others = [v for k, v in vars(base).items() if k not in known and not k.startswith("_optimizer_")]
    inside = [v for group in base.param_groups for k, v in group.items() if k not in own]
    inside += [v for state in base.state.values() for v in (state.values() if isinstance(state, dict) else [[]])]
    numbers = (tuple, list)  # of numbers: betas
    return all(
        is_leaf(v) or (isinstance(v, numbers) and all(isinstance(x, int | float | str) for x in v))
        for v in (*others, *inside)
    ) and not any(isinstance(v, list) for v in others)


# --- one parameter at a time ------------------------------------------------------------------------------------------


@contextmanager
def only(base: Optimizer, p: Tensor, *, unfused: bool = False) -> Iterator[None]:
    """Within, the base's groups hold no parameter but ``p``.

    ``unfused``: without torch's fused kernels, which refuse sparse gradients."""
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
    """Why the base must update all parameters in one call; None where it can be called once for each.

    Both ways are tried on copies of the base with small stand-ins for the parameters. Compared are the parameters and
    all numbers that the base keeps. The real parameters and state are not touched.
    """
    if type(base).__module__.startswith("torch.optim."):
        return None  # known
    name = type(base).__name__
    small = 8 * sum(p.nbytes for group in base.param_groups for p in group["params"]) <= MOST
    error: Exception | None = None
    random = RandomState.capture(cuda_devices(p for group in base.param_groups for p in group["params"]))
    before = Undo().walked([vars(base)], small)
    for side, sparse in ((SIDE, False), (SIDE, True), *((None, sparse) for sparse in (False, True) if small)):
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
    gradients = [[_random(p, generator, sparse) for p in shapes] for _ in range(STEPS)]
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
    found = [path for path in one.differences(apart) if path not in one.differences(again)]
    return min(found, key=lambda path: path.startswith("its state"), default=None)


def _random(p: Tensor, generator: torch.Generator, sparse: bool) -> Tensor:
    real = torch.float64 if p.dtype in (torch.float64, torch.complex128) else torch.float32
    g = torch.randn((*p.shape, *((2,) if p.is_complex() else ())), generator=generator, dtype=real)
    g = (torch.view_as_complex(g) if p.is_complex() else g).to(p.device, p.dtype)
    return g.to_sparse() if sparse else g


class _Copy:
    """A copy of a base, on stand-ins of at most ``side`` entries a dimension (None: as large)."""

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
    elif type(a) is type(b) and _holds(a):
        seen.add(id(a))
        _compare(vars(a), vars(b), path, twins, found, seen)


def _largest(t: Tensor) -> Tensor:
    t = t.detach().to_dense() if t.layout is not torch.strided else t.detach()
    return t.abs().max().nan_to_num() if t.numel() else torch.zeros(())
