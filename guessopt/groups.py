"""From the user's arguments to parameter groups and a base optimizer. Bad arguments are refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer

from guessopt.registry import plain
from guessopt.update import base_step


def tensors_of(params: Any) -> Iterable[Any]:
    if isinstance(params, Tensor):
        yield params
        return
    for item in params:
        yield item[1] if isinstance(item, tuple) else item


def groups_of(params: Any, default: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameters, named parameters or groups, as a list of groups. Each group has an ``"estimator"``."""
    if isinstance(params, Tensor):
        raise TypeError("params: expected an iterable of parameters or groups, got a single tensor; wrap it in a list")
    if isinstance(params, torch.nn.Module):
        raise TypeError("params: expected an iterable of parameters or groups, got a module; pass model.parameters()")
    items = list(params)
    if not items:
        raise ValueError("params: the list of parameters is empty")
    groups: list[dict[str, Any]] = [dict(item) for item in items] if isinstance(items[0], dict) else [{"params": items}]
    seen: list[Any] = []
    for group in groups:
        group["params"] = listed(group["params"])
        group["estimator"] = plain(group.get("estimator", default))
        seen += tensors_of(group["params"])
    check_tensors(seen)
    check_trainable(seen)
    return groups


def listed(params: Any) -> list[Any]:
    """A group's parameters as a list. A group may also hold a single tensor."""
    return [params] if isinstance(params, Tensor) else list(params)


def check_trainable(params: Sequence[Tensor]) -> None:
    """Raise ``ValueError`` if no parameter requires a gradient."""
    if not any(p.requires_grad for p in params):
        raise ValueError(
            f"params: none of the {len(params)} parameters requires a gradient: all are frozen; set "
            "requires_grad_(True) on those to train"
        )


def check_tensors(tensors: Sequence[Any]) -> None:
    if not tensors:
        raise ValueError("params: the list of parameters is empty")
    seen: dict[int, int] = {}
    for k, p in enumerate(tensors):
        if not isinstance(p, Tensor):
            raise TypeError(f"params: item {k} is {type(p).__name__}, not a tensor")
        if isinstance(p, (UninitializedParameter, UninitializedBuffer)):
            raise ValueError(
                f"params: item {k} belongs to a lazy module that has not seen its input yet; run the model once, under "
                "torch.no_grad(), before the optimizer is made"
            )
        if id(p) in seen:
            raise ValueError(
                f"params: the parameter of shape {list(p.shape)} is given twice (items {seen[id(p)]} and {k}); "
                f"give each once"
            )
        seen[id(p)] = k


def build(base: Any, groups: list[dict[str, Any]], kwargs: dict[str, Any], default: dict[str, Any]) -> Optimizer:
    """Build the base. Estimators enter its groups after that, since some bases refuse keys that they do not know."""
    own = {id(p): group["estimator"] for group in groups for p in tensors_of(group["params"])}
    bare = [{key: value for key, value in group.items() if key != "estimator"} for group in groups]
    if isinstance(base, Optimizer):
        if kwargs:
            raise TypeError(
                f"base: an optimizer that is already built takes no further options ({', '.join(kwargs)}); set "
                f"them on it"
            )
        given = {id(p) for group in groups for p in tensors_of(group["params"])}
        if given != {id(p) for group in base.param_groups for p in group["params"]}:
            raise ValueError("base: the optimizer was built on other parameters than those in params; use the same")
        built = base
    elif isinstance(base, type) and issubclass(base, Optimizer):
        refuse_closure_bases(base)
        built = base(bare, **kwargs)
    elif callable(base):
        built = base(bare, **kwargs)
        if not isinstance(built, Optimizer):
            raise TypeError(f"base: the callable returned {type(built).__name__}, not a torch.optim.Optimizer")
    else:
        raise TypeError(
            f"base: expected an optimizer class, a callable from groups to an optimizer, or an optimizer, got "
            f"{type(base).__name__}"
        )
    refuse_closure_bases(type(built))
    for group in built.param_groups:
        first = next(iter(group["params"]), None)
        group["estimator"] = plain(group.get("estimator", own.get(id(first), default)))
    return built


def with_fused(base: Any, groups: list[dict[str, Any]], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Options of the base, with ``fused=True`` if a base of torch offers it and the user has not chosen. A fused update
    makes no temporary copies of a parameter; other updates make up to three."""
    native = isinstance(base, type) and base.__module__.startswith("torch.optim.")
    if not native or "fused" not in inspect.signature(base).parameters or kwargs.keys() & {"fused", "foreach"}:
        return kwargs
    kinds = dict.fromkeys((t.device, t.dtype) for group in groups for t in tensors_of(group["params"]))
    trials = [torch.zeros(1, device=device, dtype=dtype, requires_grad=True) for device, dtype in kinds]
    for t in trials:
        t.grad = torch.zeros_like(t)
    try:
        made = base(trials, **kwargs, fused=True)
        base_step(made)  # without torch's global optimizer hooks
    except RuntimeError:  # not on this device, not for this dtype (complex), or not with these options
        return kwargs
    return {**kwargs, "fused": True}


def refuse_closure_bases(cls: type) -> None:
    closure = inspect.signature(cls.step).parameters.get("closure")  # type: ignore[attr-defined]
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"base: {cls.__name__} evaluates the closure itself, several times a step, and needs exact gradients; "
            "choose a base whose step() takes no closure, such as AdamW or SGD"
        )


def names_of(groups: Sequence[dict[str, Any]]) -> list[str]:
    found: list[str] = []
    for group in groups:
        given = group.get("param_names")
        for k, p in enumerate(group["params"]):
            found.append(given[k] if given else f"parameter {len(found)} {list(p.shape)}")
    return found
