"""Running moments, and the steps that feedback matrices take by them.

A state is a dict of tensors and numbers for one site:

| key | meaning |
|---|---|
| ``B``, ``steps`` | the feedback matrix, and the number of steps that it has learned for |
| ``power``, ``pairs`` | ``E |r|^2``, and ``E (r . r')^2`` for two examples; only where ``B`` is learned from guesses |
| ``width`` | ``pairs / power``, a typical eigenvalue of ``E r r^T`` |
| ``usual`` | the usual norm of a step's gradient |
| ``amplitude`` | the factor on the site's guess |
| ``errors`` | the second moment of the output's error; only where ``B`` is fitted to weights |
| ``with``, ``size``, ``share`` | the two running products of ``stream_shrinkage``, and their ratio |
| ``looks``, ``signal``, ``noise``, ``gamma`` | the running moments of ``correction_shrinkage``, and the weight |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Keeps divisions finite.
TINY = 1e-30

#: Least weight of the newest step in a running mean.
MIN_NEWEST_WEIGHT = 0.02

State = dict[str, Any]

#: ``<a, b>`` and ``|b|^2``, which tell how well ``b`` predicts ``a``.
Products = tuple[Tensor, Tensor]


def has_shape(state: State | None, shape: tuple[int, ...], by_weights: bool) -> bool:
    """Whether the state has a ``B`` of this shape, learned from weights if ``by_weights``, else from guesses."""
    if state is None or "B" not in state or by_weights == ("power" in state):
        return False
    return tuple(state["B"].shape) == shape


def samples(r: Tensor) -> int:
    """The number of samples in a regressor ``[n, g, f]``."""
    return r.shape[0] * r.shape[1]


def moments(old: State | None, r: Tensor, amplitude: Any = 1.0) -> State:
    """``power``, ``pairs``, ``width`` and ``steps`` after one more regressor ``r`` ``[n, g, f]``, for amplitude 1."""
    flat = r.flatten(0, 1)
    power = torch.linalg.vector_norm(flat).square() / len(flat) / amplitude**2
    pairs = (flat * flat.roll(1, 0)).sum(1).square().mean() / amplitude**4
    steps = 1 if old is None else old["steps"] + 1
    if old is not None:
        power = running_mean(old["power"], power.nan_to_num(0, 0, 0), steps)
        pairs = running_mean(old["pairs"], pairs.nan_to_num(0, 0, 0), steps)
    width = torch.maximum(pairs / power.clamp_min(TINY), power / flat.shape[1])  # no smaller than the mean eigenvalue
    return {"power": power, "pairs": pairs, "width": width, "steps": steps}


def running_mean(old: Any, new: Tensor, steps: int) -> Tensor:
    """The plain mean of the first ``1 / MIN_NEWEST_WEIGHT`` steps, then about that of the last so many."""
    mean: Tensor = old + max(MIN_NEWEST_WEIGHT, 1 / steps) * (new - old)
    return mean


def shared_gain(news: list[tuple[State, int]]) -> Tensor:
    """``1 + sum E|r|^2 / (width N)``: the factor by which regressors that learn together slow each other down.

    Args:
        news: for each, its moments and its number of samples N.
    """
    return 1 + torch.stack([new["power"] / new["width"].clamp_min(TINY) / n for new, n in news]).sum()


def normalised_gain(new: State, shared: Tensor, beta: float) -> Tensor:
    """Gain of a normalised least-mean-squares step, ``beta / (width shared)``; in the first steps ``1 / (t + 1)`` in
    place of ``beta``."""
    gain: Tensor = max(beta, 1 / (new["steps"] + 1)) / (new["width"] * shared).clamp_min(TINY)
    return gain


def stepped(old: State | None, steps: int, gradient: Tensor, gain: Any, *, leak: float, clip: float) -> State:
    """``B`` and ``usual`` after the step ``B <- (1 - leak) B + gain gradient``.

    A gradient larger than ``clip`` times the usual one is scaled down; one that is not finite counts as zero.
    """
    size = gradient.norm()
    is_finite = torch.isfinite(size)
    usual = None if old is None else old.get("usual")
    bounded = size if usual is None else torch.minimum(size, clip * usual)
    step = torch.where(is_finite, gradient * (gain * bounded / size.clamp_min(TINY)), 0)
    b = step if old is None else (1 - leak) * old["B"] + step
    if usual is None:
        return {"B": b, "usual": torch.where(is_finite, size, 0)}
    return {"B": b, "usual": running_mean(usual, torch.where(is_finite, bounded, usual), steps)}


def sound(new: State, old: State | None, finite: Tensor) -> State | None:
    """The new state if it is finite, and the loss and its derivatives are; else the old state.

    The device makes the choice, so that the host does not wait. Without an old state the host waits, and the result is
    None if the new state is not finite.

    Args:
        finite: whether the loss and the derivatives of the batch are finite; a single number on the device.
    """
    tensors = {name: t for name, t in new.items() if isinstance(t, Tensor) and t.is_floating_point()}
    finite = torch.stack([finite, *(torch.isfinite(t.sum()) for t in tensors.values())]).all()
    if old is None or any(not isinstance(old.get(name), Tensor) for name in tensors):
        return new if bool(finite) else old
    return new | {name: torch.where(finite, t, old[name].to(t.dtype)) for name, t in tensors.items()}


def products(target: Tensor, prediction: Tensor) -> Products:
    """``<target, prediction>`` and ``|prediction|^2``."""
    return (target * prediction).sum(), prediction.expand_as(target).square().sum()


def stream_shrinkage(old: State | None, agreed: Products | None, steps: int, like: Tensor) -> State:
    """``share = <target, prediction> / |prediction|^2``, cut to [0, 1]: the weight of a ``B`` along a stream.

    The predictions are those that ``B`` made before it learned from their batch.
    """
    if old is None or agreed is None:
        return {"share": like.new_zeros(())}
    with_, size = (product.nan_to_num(0, 0, 0) for product in agreed)
    if "with" in old:
        with_, size = running_mean(old["with"], with_, steps), running_mean(old["size"], size, steps)
    share = (with_ / size.clamp_min(TINY)).clamp(0, 1)
    return {"with": with_, "size": size, "share": share}


def correction_shrinkage(old: State | None, each: Tensor, steps: int) -> State:
    """``gamma = 1 - noise / signal``, cut to [0, 1] (James-Stein, positive part).

    ``signal`` is the squared mean of the correction over the batch, ``noise`` the part of it that is the sampling noise
    of a mean over so many examples.

    Args:
        each: the correction of each example, ``[n, *]``.
    """
    signal = each.mean(0).square().sum()
    noise = each.square().sum() / each.shape[0] ** 2
    if old is not None and "signal" in old:
        signal, noise = running_mean(old["signal"], signal, steps), running_mean(old["noise"], noise, steps)
    gamma = (1 - noise / signal.clamp_min(TINY)).clamp(0, 1)
    return {"signal": signal, "noise": noise, "gamma": gamma}
