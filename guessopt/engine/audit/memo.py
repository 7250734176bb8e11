"""What the first run remembers for the runs with ``eps``: calls whose tangent differs from a difference quotient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from guessopt.engine.jvp.gaps import is_foreign
from guessopt.rng import RandomState
from guessopt.tracing.answers import CustomFunction

#: Operations whose derivative is one-sided, one of several, or that of a smooth function in their place. By name,
#: without underscores at either end.
KINKED = frozenset((
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "rrelu_with_noise", "elu", "selu", "celu", "threshold",
    "hardtanh", "hardswish", "hardsigmoid", "hardshrink", "softshrink", "abs", "absolute", "clamp", "clip",
    "clamp_min", "clamp_max", "max", "min", "maximum", "minimum", "amax", "amin", "fmax", "fmin", "aminmax", "topk",
    "sort", "msort", "median", "nanmedian", "kthvalue", "mode", "cummax", "cummin", "quantile", "nanquantile",
    "max_pool1d", "max_pool2d", "max_pool3d", "max_pool1d_with_indices", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "boolean_dispatch", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "adaptive_max_pool1d_with_indices", "adaptive_max_pool2d_with_indices",
    "adaptive_max_pool3d_with_indices", "fractional_max_pool2d", "fractional_max_pool3d",
    "fractional_max_pool2d_with_indices", "fractional_max_pool3d_with_indices", "lp_pool1d", "lp_pool2d", "lp_pool3d",
    "floor", "ceil", "round", "trunc", "fix", "frac", "sign", "sgn", "heaviside", "remainder", "fmod", "floor_divide",
    "floordiv", "ifloordiv", "rfloordiv", "mod", "imod", "rmod", "copysign", "bernoulli", "poisson", "binomial",
    "standard_gamma", "sample_dirichlet", "gumbel_softmax", "angle", "atan2", "arctan2", "l1_loss", "smooth_l1_loss",
    "huber_loss", "hinge_embedding_loss", "margin_ranking_loss", "multi_margin_loss", "multilabel_margin_loss",
    "triplet_margin_loss", "triplet_margin_with_distance_loss", "cosine_embedding_loss", "cdist", "pairwise_distance",
    "pdist", "norm", "std", "std_mean", "sqrt", "rsqrt", "linalg_norm", "linalg_vector_norm", "linalg_matrix_norm",
    "vector_norm", "matrix_norm", "dist", "renorm", "nan_to_num", "embedding_bag", "segment_reduce", "scatter_reduce",
    "index_reduce", "grid_sample", "normalize", "cosine_similarity", "rnn_relu", "rnn_relu_cell", "linalg_eigh",
    "linalg_eig", "linalg_svd", "linalg_qr", "svd", "qr", "fake_quantize_per_tensor_affine",
    "fake_quantize_per_channel_affine", "fake_quantize_learnable_per_tensor_affine",
    "fake_quantize_learnable_per_channel_affine", "fused_moving_avg_obs_fake_quant",
))  # fmt: skip
#: Operations whose derivative needs only the sign of the input: one byte an entry.
RECTIFIERS = frozenset({"relu"})
_PYTHON_NUMBERS = (bool, int, float, complex)
#: Operations whose number is an address in memory, which each run has its own.
_ADDRESSES = frozenset({"data_ptr", "untyped_storage", "storage", "id"})


class NotAuditable(BaseException):
    """Difference quotients of this closure tell nothing. ``Audit.report`` catches it."""


@dataclass
class Entry:
    """A call that the first run remembers.

    Attributes:
        values: its results; None for a result that later runs compute.
        spec: the nesting of its results.
        targets: number of a result -> position of the argument that it is.
        change: by argument, the change that a call without gradients has written into it.
        inputs: the arguments of a call that is linearised.
        mask: of a rectifier, where it lets its input through.
        random: the random states after the call.
    """

    values: list[Any] = field(default_factory=list)
    spec: Any = None
    targets: dict[int, int] = field(default_factory=dict)
    change: dict[int, tuple[bool, Tensor]] = field(default_factory=dict)
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    mask: Tensor | None = None
    random: RandomState | None = None


@dataclass
class Memo:
    """What the first run leaves to the others.

    Attributes:
        entries: by call.
        ratios: by guess, the norm of the value over the norm of the guess.
        moved: whether any guess was added.
        bits: of the lowest precision that was met.
        light: see ``Audit``.
    """

    entries: dict[int, Entry] = field(default_factory=dict)
    ratios: list[Tensor] = field(default_factory=list)
    moved: bool = False
    bits: int = 64
    light: bool = False

    @cached_property
    def scale(self) -> float:
        """The step by which no guess is larger than the value that it is added to (but for values near zero)."""
        found = torch.stack([ratio.double().cpu() for ratio in self.ratios]) if self.ratios else torch.ones(1)
        found = found[torch.isfinite(found) & (found > 0)]
        return max(float(found.min()), float(found.median()) / 100) if found.numel() else 1.0


def bits_of(dtype: torch.dtype) -> int:
    """The bits of a floating-point dtype, between 16 and 64."""
    return max(16, min(64, torch.finfo(dtype).bits))


def base_name(fn: Callable[..., Any]) -> str:
    """The function's name without underscores at either end."""
    name = getattr(fn, "__name__", "")
    return name.split(".")[0].strip("_") if isinstance(name, str) else ""


def is_linearised(fn: Callable[..., Any], name: str, tensors: list[Tensor]) -> bool:
    return (
        name in KINKED
        or isinstance(fn, CustomFunction)
        or is_foreign(fn)
        or any(is_traceable_wrapper_subclass(t) for t in tensors)
    )


def is_number(value: Any, name: str) -> bool:
    return name not in _ADDRESSES and (isinstance(value, _PYTHON_NUMBERS) or type(value).__name__ == "ndarray")


def snapshot(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if type(value).__name__ == "ndarray" else value
