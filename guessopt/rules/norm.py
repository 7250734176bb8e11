"""Normalisations with an affine part: ``s = xhat * w + b``, so ``dw = sum g xhat`` and ``db = sum g``.

The normalised ``xhat`` comes from the operation itself without its affine part; running statistics are not touched.
Letters: n examples and positions, c the channels or features that the weight covers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from guessopt.rules.base import Rule, register_rule

_NAMES: dict[Callable[..., Any], tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
}


@register_rule(F.batch_norm, F.layer_norm, F.group_norm, F.rms_norm)
class NormRule(Rule):
    """Weight and bias of batch, layer, group and RMS normalisation."""

    def gradients(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: int,
        wanted: list[int],
        g: Tensor,
    ) -> list[Tensor | None]:
        bound = dict(zip(_NAMES[fn], args, strict=False)) | kwargs
        tensors = [name for name, value in bound.items() if isinstance(value, Tensor)]
        x = bound["input"]
        shape = bound["weight"].shape if isinstance(bound.get("weight"), Tensor) else bound["bias"].shape
        channel_first = fn in (F.batch_norm, F.group_norm)
        dims = [d for d in range(g.dim()) if d != 1] if channel_first else list(range(g.dim() - len(shape)))
        gradients: list[Tensor | None] = []
        for k in wanted:
            if tensors[k] == "weight":
                gradients.append((g * _normalised(fn, x, bound)).sum(dims))
            elif tensors[k] == "bias":
                gradients.append(g.sum(dims))
            else:
                return super().gradients(without_side_effects(fn), args, kwargs, output, wanted, g)
        return gradients


def _normalised(fn: Callable[..., Any], x: Tensor, bound: dict[str, Any]) -> Tensor:
    if fn is F.batch_norm:
        eps = bound.get("eps", 1e-5)
        if bound.get("training", False):
            return F.batch_norm(x, None, None, None, None, True, 0.1, eps)
        return F.batch_norm(x, bound["running_mean"], bound["running_var"], None, None, False, 0.1, eps)
    if fn is F.group_norm:
        return F.group_norm(x, bound["num_groups"], None, None, bound.get("eps", 1e-5))
    if fn is F.layer_norm:
        return F.layer_norm(x, bound["normalized_shape"], None, None, bound.get("eps", 1e-5))
    return F.rms_norm(x, bound["normalized_shape"], None, bound.get("eps"))


def without_side_effects(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The operation without its side effect on running statistics."""
    if fn is not F.batch_norm:
        return fn

    def batch_norm(*args: Any, **kwargs: Any) -> Tensor:
        bound = dict(zip(_NAMES[fn], args, strict=False)) | kwargs
        for name in ("running_mean", "running_var"):
            if isinstance(bound.get(name), Tensor):
                bound[name] = bound[name].clone()
        return F.batch_norm(**bound)

    return batch_norm
