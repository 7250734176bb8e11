"""The entries of a ``state_dict`` beside the base's state, and the checks before any entry is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from guessopt.cache import SiteCache
from guessopt.credit import DiscountChoice
from guessopt.groups import names_of
from guessopt.registry import estimators_for, plain
from guessopt.rng import NoiseSource, is_here
from guessopt.step.estimation import Estimation

#: Version of the entry ``"guessopt"`` of a ``state_dict``. Raise it with a change that older versions cannot read.
VERSION = 1

Groups = Sequence[dict[str, Any]]


def described(base: Optimizer) -> dict[str, Any]:
    """A description of the optimizer: the version, the base's class, and each parameter's shape, dtype and device."""
    return {
        "version": VERSION,
        "base": type(base).__name__,
        "params": [
            {"shape": list(p.shape), "dtype": _name(p.dtype), "device": str(p.device)}
            for group in base.param_groups
            for p in group["params"]
        ],
    }


def check(state: Any, base: Optimizer) -> None:
    """Check that a ``state_dict`` fits an optimizer.

    Raises:
        ValueError: it does not; the message names the part and the remedy.
    """
    if not isinstance(state, Mapping) or "guessopt" not in state:
        raise ValueError(
            "state_dict has no 'guessopt' entry: it is not of a GuessGradOptimizer; load a plain optimizer's "
            "state into opt.base"
        )
    own = state["guessopt"]
    _check_version(own)
    _check_entries("state_dict", state, {"state": Mapping, "param_groups": list})
    _check_entries(
        "state_dict['guessopt']",
        own,
        {"base": str, "params": list, "steps": int, "noise": Mapping, "cache": Mapping},
    )
    if own["base"] not in {cls.__name__ for cls in type(base).__mro__}:
        raise ValueError(
            f"state_dict: saved with the base {own['base']}, but this optimizer's base is {type(base).__name__}; "
            f"build it with base={own['base']}"
        )
    _check_groups(state["param_groups"], base.param_groups)
    _check_params(own["params"], base.param_groups)
    known = {k for group in state["param_groups"] for k in group["params"]}
    for key in state["state"]:
        if isinstance(key, int) and key not in known:
            raise ValueError(f"state_dict['state'] has an entry {key} that belongs to no parameter: it is damaged")
    _check_own(own)


def packed(est: Estimation) -> dict[str, Any]:
    """The base's ``state_dict``, with the entry ``"guessopt"``."""
    own = {"steps": est.steps, "noise": est.noise.state(), "cache": est.cache.state_dict()}
    if est.choice.measured_at >= 0:
        own["discount"] = {
            key: list(value) if isinstance(value, tuple) else value for key, value in vars(est.choice).items()
        }
    return {**est.base.state_dict(), "guessopt": {**described(est.base), **own}}


@contextmanager
def loaded(est: Estimation, state: dict[str, Any]) -> Iterator[None]:
    """Load what ``packed`` returned; within, an error undoes it.

    Raises:
        ValueError: see ``check``.
    """
    check(state, est.base)
    own, noise, cache = state["guessopt"], NoiseSource(est.noise.seed), SiteCache()
    to = moved(own, est.base.param_groups)
    left = noise.load(own["noise"], to)
    cache.load_state_dict(own["cache"], placement(to))
    before, attributes = Before(est.base), dict(vars(est))
    try:
        load_base(est.base, state)
        est.steps, est.noise, est.cache, est.choice = own["steps"], noise, cache, _choice(own.get("discount"))
        est.forget_parameters()
        est.refresh()
        yield
    except BaseException:
        before.restore()
        vars(est).clear()
        vars(est).update(attributes)
        raise
    if left:
        est.warn(
            f"the guesses were drawn on {', '.join(left)}, whose generator cannot go on here: guesses start again "
            "from their seed, so that training continues, but not bit for bit"
        )


def _choice(saved: Any) -> DiscountChoice:
    """What ``discount="auto"`` had measured; nothing if it was not in use."""
    if saved is None:
        return DiscountChoice()
    _check_entries("state_dict['guessopt']['discount']", saved, {"signal": list, "noise": list, "measured_at": int})
    if not len(saved["signal"]) == len(saved["noise"]) == len(DiscountChoice.GRID):
        raise ValueError("state_dict['guessopt']['discount']: not one figure for each discount: it is damaged")
    return DiscountChoice(tuple(saved["signal"]), tuple(saved["noise"]), saved["measured_at"])


def _check_version(own: Any) -> None:
    version = own.get("version") if isinstance(own, Mapping) else None
    if not isinstance(version, int):
        raise ValueError("state_dict['guessopt'] has no version: it is damaged, or older than version 1 of the format")
    if version > VERSION:
        raise ValueError(
            f"state_dict['guessopt'] has version {version}, and this guessopt reads up to {VERSION}: it was saved by "
            "a newer guessopt; upgrade with pip install -U guessopt"
        )


def _check_entries(what: str, found: Any, expected: Mapping[str, type]) -> None:
    if not isinstance(found, Mapping):
        raise ValueError(f"{what}: expected a dict, got {type(found).__name__}: it is damaged")
    for key, kind in expected.items():
        if key not in found:
            raise ValueError(f"{what} has no entry {key!r}: it is damaged")
        if not isinstance(found[key], kind):
            expected_name = getattr(kind, "__name__", str(kind))
            raise ValueError(
                f"{what}[{key!r}]: expected {expected_name}, got {type(found[key]).__name__}: it is damaged"
            )


def _check_groups(saved: Groups, groups: Groups) -> None:
    if len(saved) != len(groups):
        raise ValueError(
            f"state_dict has {len(saved)} parameter groups, the optimizer has {len(groups)}: build the optimizer with "
            "the same groups"
        )
    for k, (old, new) in enumerate(zip(saved, groups, strict=True)):
        _check_entries(f"state_dict['param_groups'][{k}]", old, {"params": list, "estimator": Mapping})
        if len(old["params"]) != len(new["params"]):
            raise ValueError(
                f"state_dict: parameter group {k} has {len(old['params'])} parameters, the optimizer's has "
                f"{len(new['params'])}: another model's state, or other parameters were chosen"
            )
        names, own = old.get("param_names"), new.get("param_names")
        if names and own and list(names) != list(own):
            a, b = next((a, b) for a, b in zip(names, own, strict=True) if a != b)
            raise ValueError(
                f"state_dict: parameter {a!r} of group {k} stands where the optimizer has {b!r}: another model's "
                "state, or another order; to load by position, delete 'param_names' from the state's groups"
            )
        try:
            named = names or own
            estimators_for(plain(old["estimator"]), named or [""] * len(old["params"]), named=bool(named))
        except (ValueError, TypeError) as error:
            raise ValueError(f"state_dict: group {k} names an estimator that cannot be made: {error}") from error


def _check_params(saved: Sequence[Any], groups: Groups) -> None:
    params, names = [p for group in groups for p in group["params"]], names_of(groups)
    if len(saved) != len(params):
        raise ValueError(
            f"state_dict['guessopt']['params'] has {len(saved)} entries for {len(params)} parameters: it is damaged"
        )
    for old, p, name in zip(saved, params, names, strict=True):
        _check_entries("state_dict['guessopt']['params']", old, {"shape": list, "dtype": str, "device": str})
        _check_device(old["device"], f"state_dict['guessopt']['params'], {name}")
        if list(old["shape"]) != list(p.shape):
            raise ValueError(
                f"state_dict: {name} had shape {list(old['shape'])} and has {list(p.shape)}: another model's state"
            )
        if ("complex" in old["dtype"]) != p.is_complex():
            raise ValueError(f"state_dict: {name} was {old['dtype']} and is {_name(p.dtype)}: another model's state")


def _check_device(name: str | None, where: str) -> None:
    try:
        torch.device(name or "cpu")
    except RuntimeError:
        raise ValueError(f"{where} names no device: {name!r}; it is damaged") from None


def _check_own(own: Mapping[str, Any]) -> None:
    noise = own["noise"]
    _check_entries("state_dict['guessopt']['noise']", noise, {"stream": int, "seed": int, "generators": Mapping})
    for name, state in noise["generators"].items():
        if not isinstance(name, str) or not isinstance(state, Tensor):
            raise ValueError(f"state_dict['guessopt']['noise']: the generator {name!r} has no state: it is damaged")
        _check_device(name.partition(" lane ")[0], "state_dict['guessopt']['noise']")
    for key, entry in own["cache"].items():
        where = f"state_dict['guessopt']['cache'][{key!r}]"
        _check_entries(where, entry, {"step": int, "device": (str | None), "state": object})  # type: ignore[dict-item]
        _check_device(entry["device"], where)
    for item in own.get("omitted", []):
        if not isinstance(item, list | tuple) or len(item) != 2:
            raise ValueError("state_dict['guessopt']['omitted'] is damaged")


def moved(own: Mapping[str, Any], groups: Groups) -> dict[str, str]:
    """Name of a device at the time of saving -> the device where its first parameter is now."""
    params = [p for group in groups for p in group["params"]]
    found: dict[str, str] = {}
    for old, p in zip(own["params"], params, strict=True):
        found.setdefault(old["device"], str(p.device))
    return found


def placement(moved: Mapping[str, str]) -> Callable[[str], torch.device]:
    """A function from the name of a device at the time of saving to the device for its tensors now: the new device of
    the parameters that were there; else the old device, if this machine has it; else the device of the first
    parameter."""

    def place(device: str) -> torch.device:
        if device in moved:
            return torch.device(moved[device])
        here = is_here(torch.device(device))
        return torch.device(device if here else next(iter(moved.values())))

    return place


class Before:
    """The state of a base before loading. Tensors are not copied, since loading replaces them."""

    def __init__(self, base: Optimizer) -> None:
        self.base, self.attributes = base, dict(vars(base))
        self.groups = [(group, dict(group), list(group["params"])) for group in base.param_groups]
        self.state = dict(base.state)
        self.entries = [(entry, dict(entry)) for entry in base.state.values() if isinstance(entry, dict)]

    def restore(self) -> None:
        vars(self.base).clear()
        vars(self.base).update(self.attributes)
        for group, options, params in self.groups:
            group.clear()
            group.update(options, params=params)
        self.base.param_groups[:] = [group for group, _, _ in self.groups]
        self.base.state.clear()
        self.base.state.update(self.state)
        for entry, content in self.entries:
            entry.clear()
            entry.update(content)


def load_base(base: Optimizer, state: Mapping[str, Any]) -> None:
    """Call the base's own ``load_state_dict``. Then give its tensors their saved dtypes, memory of their own, and the
    memory layout of their parameter, which torch's fused updates need.

    Raises:
        ValueError: the base cannot load it, or an option of a group is missing.
    """
    before = [dict(group) for group in base.param_groups]
    try:
        base.load_state_dict({key: value for key, value in state.items() if key != "guessopt"})
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"state_dict: {type(base).__name__} cannot load it ({type(error).__name__}: {error}): it is damaged, or "
            "another optimizer's"
        ) from error
    positions = [position for group in state["param_groups"] for position in group["params"]]
    dtypes = {k: entry["dtype"] for k, entry in zip(positions, state["guessopt"]["params"], strict=True)}
    for k, (group, old) in enumerate(zip(base.param_groups, before, strict=True)):
        for key, value in group.items():
            if isinstance(value, Tensor) and isinstance(old.get(key), Tensor):
                group[key] = value.to(old[key].device)
        group.update({key: old[key] for j, key in state["guessopt"].get("omitted", []) if j == k and key in old})
        missing = [key for key in old if key in base.defaults and key not in group]
        if missing:
            raise ValueError(
                f"state_dict['param_groups'][{k}] has no {missing[0]!r}, which {type(base).__name__} needs: it is "
                "another optimizer's state"
            )
        for position, p in zip(state["param_groups"][k]["params"], group["params"], strict=True):
            if position in state["state"] and p in base.state:
                saved = state["state"][position]
                if dtypes.get(position, _name(p.dtype)) != _name(p.dtype):  # torch has cast it, as the model was
                    saved = tree_map_only(Tensor, torch.clone, base.state[p])
                base.state[p] = _as_saved(base.state[p], saved, p)


def _as_saved(loaded: Any, saved: Any, p: Tensor) -> Any:
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor) and loaded.shape == saved.shape:
        if loaded.layout is not torch.strided:
            return loaded.clone() if loaded is saved else loaded
        if loaded.shape == p.shape and loaded.stride() != p.stride():
            return torch.empty_like(p, dtype=saved.dtype, requires_grad=False).copy_(saved)
        shared = loaded.untyped_storage().data_ptr() == saved.untyped_storage().data_ptr()
        return saved.to(loaded.device, copy=True) if shared or loaded.dtype != saved.dtype else loaded
    if isinstance(loaded, dict) and isinstance(saved, Mapping):
        return {key: _as_saved(value, saved.get(key), p) for key, value in loaded.items()}
    if type(loaded) in (list, tuple) and isinstance(saved, list | tuple) and len(loaded) == len(saved):
        return type(loaded)(_as_saved(a, b, p) for a, b in zip(loaded, saved, strict=True))
    return loaded


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
