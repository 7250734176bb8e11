"""Running moments, and the steps that feedback matrices take by them.

A state is a dict: ``B`` with the ``steps`` it has learned for, ``power`` and ``pairs`` (``E |r|^2`` and
``E (r . r')^2`` of two examples), ``width`` (their ratio, a typical eigenvalue of ``E r r^T``) and ``usual``, the usual
size of a step's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TINY = 1e-30

#: Weight of the newest step in the running moments, once there are so many.
RECENT = 0.02

State = dict[str, Any]

#: ``<a, b>`` and ``|b|^2``, to tell how well ``b`` foretells ``a``.
Products = tuple[Tensor, Tensor]


def fits(state: State | None, shape: tuple[int, ...], by_weights: bool) -> bool:
    """Whether ``B`` was learned at this size, and from weights, or else from guesses, whose ``power`` is kept."""
    if state is None or "B" not in state or by_weights == ("power" in state):
        return False
    return tuple(state["B"].shape) == shape


def samples(r: Tensor) -> int:
    return r.shape[0] * r.shape[1]


def moments(old: State | None, r: Tensor, amplitude: Any = 1.0) -> State:
    """``power``, ``pairs``, ``width`` and ``steps`` after one more look at ``r`` ``[n, g, f]``, at amplitude 1."""
    flat = r.flatten(0, 1)
    power = torch.linalg.vector_norm(flat).square() / len(flat) / amplitude**2
    pairs = (flat * flat.roll(1, 0)).sum(1).square().mean() / amplitude**4
    steps = 1 if old is None else old["steps"] + 1
    if old is not None:
        power = recent(old["power"], power.nan_to_num(0, 0, 0), steps)
        pairs = recent(old["pairs"], pairs.nan_to_num(0, 0, 0), steps)
    width = torch.maximum(pairs / power.clamp_min(TINY), power / flat.shape[1])  # no smaller than the mean eigenvalue
    return {"power": power, "pairs": pairs, "width": width, "steps": steps}


def recent(old: Any, new: Tensor, steps: int) -> Tensor:
    """A running mean: plain at first, then over the last ``1 / RECENT`` steps or so."""
    mean: Tensor = old + max(RECENT, 1 / steps) * (new - old)
    return mean


def shared_gain(news: list[tuple[State, int]]) -> Tensor:
    """``1 + sum E|r|^2 / (width N)``: by how much regressors that learn together, each from N samples, slow down."""
    return 1 + torch.stack([new["power"] / new["width"].clamp_min(TINY) / n for new, n in news]).sum()


def normalised(new: State, crowded: Tensor, beta: float) -> Tensor:
    """The gain of a normalised least-mean-squares step."""
    gain: Tensor = max(beta, 1 / (new["steps"] + 1)) / (new["width"] * crowded).clamp_min(TINY)
    return gain


def stepped(old: State | None, steps: int, gradient: Tensor, gain: Any, *, leak: float, clip: float) -> State:
    """``B`` and ``usual`` after a step; a gradient that is not finite teaches nothing, one larger than ``clip`` times
    the usual is scaled down."""
    size = gradient.norm()
    sound = torch.isfinite(size)
    usual = None if old is None else old.get("usual")
    bounded = size if usual is None else torch.minimum(size, clip * usual)
    step = torch.where(sound, gradient * (gain * bounded / size.clamp_min(TINY)), 0)
    b = step if old is None else (1 - leak) * old["B"] + step
    if usual is None:
        return {"B": b, "usual": torch.where(sound, size, 0)}
    return {"B": b, "usual": recent(usual, torch.where(sound, bounded, usual), steps)}


def sound(new: State, old: State | None, finite: Tensor) -> State | None:
    """The new state if it is finite, and the loss and its derivatives are; else the old state. The device makes the
    choice, so that the host does not wait. Without an old state the host waits, and the result is None if the new one
    is not finite.

    Args:
        finite: whether the loss and the derivatives of the batch are; a single number on the device.
    """
    tensors = {name: t for name, t in new.items() if isinstance(t, Tensor) and t.is_floating_point()}
    finite = torch.stack([finite, *(torch.isfinite(t.sum()) for t in tensors.values())]).all()
    if old is None or any(not isinstance(old.get(name), Tensor) for name in tensors):
        return new if bool(finite) else old
    return new | {name: torch.where(finite, t, old[name].to(t.dtype)) for name, t in tensors.items()}


def agreement(missed: Tensor, own: Tensor) -> Products:
    """``<missed, own>`` and ``|own|^2``."""
    return (missed * own).sum(), own.expand_as(missed).square().sum()


def proven(old: State | None, agreed: Products | None, steps: int, like: Tensor) -> State:
    """``share``: the regression of what was missing on what ``B`` made of it before it had seen it, cut to [0, 1]."""
    if old is None or agreed is None:
        return {"share": like.new_zeros(())}
    with_, size = (product.nan_to_num(0, 0, 0) for product in agreed)
    if "with" in old:
        with_, size = recent(old["with"], with_, steps), recent(old["size"], size, steps)
    share = (with_ / size.clamp_min(TINY)).clamp(0, 1)
    return {"with": with_, "size": size, "share": share}


def shrunken(old: State | None, each: Tensor, steps: int) -> State:
    """``gamma = 1 - noise / signal`` (positive part): of the squared mean correction, the share that is not the noise
    of a mean over so many examples. ``each``: the correction by example."""
    signal = each.mean(0).square().sum()
    noise = each.square().sum() / each.shape[0] ** 2
    if old is not None and "signal" in old:
        signal, noise = recent(old["signal"], signal, steps), recent(old["noise"], noise, steps)
    gamma = (1 - noise / signal.clamp_min(TINY)).clamp(0, 1)
    return {"signal": signal, "noise": noise, "gamma": gamma}
