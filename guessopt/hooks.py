"""Hooks on parameters, as autograd would call them; and who made a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

#: Of a gradient: True where ``estimate`` or ``step`` made it, False where ``backward()`` has added to it.
_MADE = "_guessopt_made"


#: By the parameter's id, hooks by their numbers.
Hooks = dict[int, dict[int, Callable[[Tensor], "Tensor | None"]]]


@contextmanager
def lifted(params: Iterable[Tensor], hooks: Hooks) -> Iterator[None]:
    """Without the hooks that act on gradients, which are in ``hooks`` meanwhile: within, gradients of parts are
    computed, to which they do not apply."""
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
    """The gradient after the hooks of ``register_hook``, in their order.

    Raises:
        TypeError, RuntimeError: a hook returned what is no gradient for its parameter.
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
    """Whether hooks of ``register_post_accumulate_grad_hook`` wait for the parameter's gradient."""
    hooks = p._post_accumulate_grad_hooks
    if hooks:
        for hook in hooks.values():
            if hook is not _by_backward:
                return True
    return False


def fire(p: Tensor) -> None:
    """Call these hooks: the gradient is in ``.grad``."""
    with torch.no_grad():
        for hook in list((p._post_accumulate_grad_hooks or {}).values()):
            if hook is not _by_backward:
                hook(p)


def _by_backward(p: Tensor) -> None:
    if p.grad is not None:
        setattr(p.grad, _MADE, False)


def watch(p: Tensor) -> None:
    """From now on notice where ``backward()`` adds to the parameter's ``.grad``."""
    hooks = p._post_accumulate_grad_hooks or {}
    if p.is_leaf and p.requires_grad and not any(hook is _by_backward for hook in hooks.values()):
        p.register_post_accumulate_grad_hook(_by_backward)


def mark(g: Tensor, made: bool = True) -> None:
    """Made here; or not."""
    setattr(g, _MADE, made)


def is_made(p: Tensor, estimated: bool) -> bool:
    """Whether all of ``.grad`` was made here. Zeros are nobody's. One host sync where it looks at values.

    Args:
        estimated: whether ``estimate`` has added to it, so that another tensor in its place may derive from it.
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
    """Each gradient with memory of its own (those of both terms of ``a + b`` are one tensor): what is done to one in
    place must not be done to another."""
    seen = set[int]()
    for k, g in gradients.items():
        if g.layout is torch.strided:
            storage = g.untyped_storage()._cdata
            if storage in seen:
                gradients[k] = g.clone()
            seen.add(storage)
    return gradients
