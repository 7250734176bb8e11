"""Hooks on parameters, called as autograd would call them; and marks on gradients: estimated or by ``backward()``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

#: Attribute of a gradient: True if ``estimate`` or ``step`` made it, False once ``backward()`` has added to it.
_MADE = "_guessopt_made"


#: id of a parameter -> number of a hook -> hook.
Hooks = dict[int, dict[int, Callable[[Tensor], "Tensor | None"]]]


@contextmanager
def lifted(params: Iterable[Tensor], hooks: Hooks) -> Iterator[None]:
    """Inside the block, ``hooks`` holds the parameters' gradient hooks, and the parameters have none. A step computes
    parts of gradients by autograd; hooks must see whole gradients only."""
    taken = [(p, p._backward_hooks) for p in params if p._backward_hooks]
    try:
        for p, own in taken:
            assert own is not None
            hooks[id(p)] = own
            p._backward_hooks = None
        yield
    finally:
        for p, own in taken:
            assert own is not None
            own.update(p._backward_hooks or {})
            p._backward_hooks = own
            hooks.pop(id(p), None)


def hooked(g: Tensor, p: Tensor, hooks: Hooks, name: str) -> Tensor:
    """The gradient after the hooks of ``register_hook``, called in their order.

    Raises:
        TypeError: a hook returned something other than a tensor or None.
        RuntimeError: a hook returned a tensor of another shape or dtype than the parameter.
    """
    for hook in list(hooks.get(id(p), {}).values()):
        with torch.no_grad():
            found = hook(g)
        if found is None:
            continue
        if not isinstance(found, Tensor):
            raise TypeError(f"{name}: a hook returned {type(found).__name__}; return a tensor or None")
        if found.shape != p.shape or found.dtype != p.dtype:
            raise RuntimeError(
                f"{name}: a hook returned a gradient of shape {list(found.shape)} and {found.dtype}; return one of "
                f"shape {list(p.shape)} and {p.dtype}"
            )
        g = found.detach()
    return g


def accumulates(p: Tensor) -> bool:
    """Whether the parameter has hooks of ``register_post_accumulate_grad_hook``."""
    hooks = p._post_accumulate_grad_hooks
    if hooks:
        for hook in hooks.values():
            if hook is not _by_backward:
                return True
    return False


def fire(p: Tensor) -> None:
    """Call the hooks of ``register_post_accumulate_grad_hook``. The gradient must be in ``.grad``."""
    with torch.no_grad():
        for hook in list((p._post_accumulate_grad_hooks or {}).values()):
            if hook is not _by_backward:
                hook(p)


def _by_backward(p: Tensor) -> None:
    if p.grad is not None:
        setattr(p.grad, _MADE, False)


def watch(p: Tensor) -> None:
    """Mark the parameter's ``.grad`` whenever ``backward()`` adds to it."""
    hooks = p._post_accumulate_grad_hooks or {}
    if p.is_leaf and p.requires_grad and not any(hook is _by_backward for hook in hooks.values()):
        p.register_post_accumulate_grad_hook(_by_backward)


def mark(g: Tensor, made: bool = True) -> None:
    """Mark the gradient: whether ``estimate`` or ``step`` made it."""
    setattr(g, _MADE, made)


def is_made(p: Tensor, estimated: bool) -> bool:
    """Whether ``estimate`` or ``step`` made all of ``.grad``. No gradient and a gradient of zeros count as made. If the
    marks do not decide, the test for zeros costs one host sync.

    Args:
        estimated: whether ``estimate`` has added to this ``.grad`` since the last update. If so, an unmarked tensor
            that has replaced the estimate (a clipped copy) counts as made.
    """
    g = p.grad
    if g is None:
        return True
    made = getattr(g, _MADE, None)
    if made or (made is None and estimated):
        return True
    values = g.coalesce().values() if g.layout is torch.sparse_coo else g
    return not bool(values.any())


def apart(gradients: dict[int, Tensor]) -> dict[int, Tensor]:
    """Give each gradient its own memory, so that an in-place operation on one gradient does not change another. Before,
    the gradients of both terms of ``a + b`` are one tensor."""
    seen = set[int]()
    for k, g in gradients.items():
        if g.layout is torch.strided:
            storage = g.untyped_storage()._cdata
            if storage in seen:
                gradients[k] = g.clone()
            seen.add(storage)
    return gradients
