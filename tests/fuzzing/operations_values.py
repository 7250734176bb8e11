"""Operations: expressions of parameters, writes, stopped gradients, noise, what changes from step to step.

Each gets the maker, the value (to see its shape), a variant and a size, and returns a function. The function takes
sizes of the batch from the value that it gets, as the batch may change between steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzzing.parts import ANY, FEATURES, SPATIAL, Fn, Maker, family, need
from tests.problems import Cube


@family("twice transposed sum_of_uses bias_twice", FEATURES)
def shared(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    d = h.shape[-1]
    if variant == "transposed":
        layer = m.linear(d, size)
        return lambda h: F.linear(torch.tanh(layer(h)), layer.weight.t())
    layer = m.linear(d, d)
    return {
        "twice": lambda h: layer(torch.tanh(layer(h))),
        "sum_of_uses": lambda h: layer(h) + layer(h.sin()),
        "bias_twice": lambda h: layer(h) * layer.bias,
    }[variant]


class _Skew(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w - 0.5 * w.tanh()


@family("weight_norm spectral_norm parametrized masked straight_through softmax_rows normalized", FEATURES)
def weight(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    """A weight that is an expression of parameters."""
    d = h.shape[-1]
    layer: Any = nn.Linear(d, size).double()
    if variant == "weight_norm":
        layer = nn.utils.parametrizations.weight_norm(layer)
    elif variant == "spectral_norm":
        layer = nn.utils.parametrizations.spectral_norm(layer).eval()
    elif variant == "parametrized":
        nn.utils.parametrize.register_parametrization(layer, "weight", _Skew())
    layer = m.module(layer)
    if variant in ("weight_norm", "spectral_norm", "parametrized"):
        return lambda h: layer(h)
    mask = (torch.rand(size, d) > 0.4).double()
    weights: dict[str, Callable[[], Tensor]] = {
        "masked": lambda: layer.weight * mask.to(layer.weight.dtype),
        "straight_through": lambda: layer.weight + (layer.weight.round() - layer.weight).detach(),
        "softmax_rows": lambda: layer.weight.softmax(-1),
        "normalized": lambda: F.normalize(layer.weight, dim=-1, eps=1e-3),
    }
    return lambda h: F.linear(h, weights[variant](), layer.bias)


@family("gate low_rank scale cumulated written stacked outer power affine addcmul lerp", FEATURES)
def expression(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    d = h.shape[-1]
    if variant == "low_rank":
        a, b = m.parameter(d, 2), m.parameter(2, size)
        return lambda h: h @ (a @ b)
    w = m.parameter(d, std=0.7)
    if variant == "outer":
        v = m.parameter(d)
        return lambda h: h @ torch.outer(w, v)
    if variant in ("affine", "addcmul"):
        b = m.parameter(d)
        return (lambda h: h * w + b) if variant == "affine" else (lambda h: torch.addcmul(b.expand_as(h), h, w))
    masked = torch.arange(d) % 2 == 0

    def written(h: Tensor) -> Tensor:
        q = w.clone()
        q.masked_fill_(masked, 0.0)
        return h + q * 2

    return {
        "gate": lambda h: torch.sigmoid(w) * h,
        "scale": lambda h: h * w.exp(),
        "cumulated": lambda h: h + w.cumsum(0),
        "written": written,
        "stacked": lambda h: h * torch.stack([w, 1 + w]).mean(0),
        "power": lambda h: (h.abs() + 0.2) ** w,
        "lerp": lambda h: torch.lerp(h, h.tanh(), w.sigmoid()),
    }[variant]


@family(
    "activation raw old_name_to old_name_float old_name_contiguous old_name_dropout two_readers expression weights "
    "max_ base_of_view"
)
def penalty(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    """A term of the loss that reads the network's inside, under a name that is older than the last call."""
    need(m.built.network.reduction != "per_example")
    spatial = m.kind in SPATIAL
    need(not spatial)
    layer = m.linear(h.shape[-1], h.shape[-1])
    w = m.parameter(h.shape[-1]) if variant == "expression" else None

    def run(h: Tensor) -> Tensor:
        s = layer(h)
        if variant == "raw":
            m.extra(s.square())
        if variant == "base_of_view":
            s.view(-1).tanh_()
            m.extra(s.square())
            return s
        t = torch.tanh(s)
        match variant:
            case "old_name_to":
                z = t.to(t.device)
            case "old_name_float":
                z = t.to(t.dtype)
            case "old_name_contiguous":
                z = t.contiguous()
            case "old_name_dropout":
                z = F.dropout(t, 0.5, training=False)
            case "expression":
                q = torch.sigmoid(w)  # type: ignore[arg-type]
                m.extra(q)
                return t * q
            case "weights":
                m.extra(layer.weight.square())
                return t
            case "raw":
                return t
            case "max_":
                m.extra(t.amax(-1))
                return t
            case _:
                z = t
        m.extra(t.abs())
        return z + t.sin() if variant == "two_readers" else z

    return run


@family("add mul slice copy masked_fill through_view view_base row no_grad_clamp data_scale detached zero_init out")
def write(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    """Writes into a value that a parameter has part in."""
    scale = m.parameter(1, mean=1.0, std=0.1)

    def run(h: Tensor) -> Tensor:
        z = h * scale
        match variant:
            case "add":
                z += 0.5 * h.sin()
            case "mul":
                z.mul_(h)
            case "slice":
                z[..., 0] = z[..., -1] * 2
            case "copy":
                g = torch.empty_like(z)
                g.copy_(z * z.sigmoid())
                return g
            case "masked_fill":
                z.masked_fill_(h > 0.8, 0.2)
            case "through_view":
                z.view(-1).mul_(0.5)
            case "view_base":
                z.view(-1).tanh_()
                return z + z.square()
            case "row":
                z[..., :1].add_(1.0)
            case "no_grad_clamp":
                with torch.no_grad():
                    z.clamp_(-1, 1)
            case "data_scale":
                z.data.mul_(0.5)
            case "detached":
                z.detach().clamp_(-1, 1)
            case "zero_init":
                g = torch.zeros_like(z)
                g[...] = z
                return g
            case "out":
                z.sub_(h.detach() * 0.5).add_(z.tanh())
        return z

    return run


@family("detach_mix no_grad_scale straight_through stop_branch item", ANY)
def cut(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    scale = m.parameter(1, mean=1.0, std=0.2)

    def no_grad_scale(h: Tensor) -> Tensor:
        z = h * scale
        with torch.no_grad():
            c = 1 + z.abs().flatten(1).mean(1).max()
        return z / c

    return {
        "detach_mix": lambda h: scale * h + 0.5 * h.detach(),
        "no_grad_scale": no_grad_scale,
        "straight_through": lambda h: scale * h + ((scale * h).round() - scale * h).detach(),
        "stop_branch": lambda h: h * (scale * h).detach().sigmoid() * scale,
        "item": lambda h: h * scale * (1 + 0.1 * float(h.detach().abs().max() > 0.5)),
    }[variant]


@family("positive mask_data maximum clamp_by_parameter nan_guard")
def where(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    if variant == "mask_data":
        kind, tail = m.kind, tuple(h.shape[1:])
        need(kind not in ("merged", "merged_time", "time"))
        mask = m.data(lambda n: torch.rand(n, *tail) > 0.4)
        m.built.uses.add("data")
        return lambda h: torch.where(mask(), h, 0.1 * h.sin())
    w = m.parameter(h.shape[-1])
    return {
        "positive": lambda h: torch.where(h > 0, h * w, w.expand_as(h)),
        "maximum": lambda h: torch.maximum(h, w),
        "clamp_by_parameter": lambda h: torch.minimum(h, w + 1),
        "nan_guard": lambda h: h.nan_to_num() * w,
    }[variant]


@family("rfft_abs fft_real round_trip multiply view_as polar stft", FEATURES)
def complex_(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    d = h.shape[-1]
    if variant == "multiply":
        w = m.parameter(d // 2 + 1, 2)
        return lambda h: torch.fft.irfft(torch.fft.rfft(h) * torch.view_as_complex(w), n=d)
    if variant == "view_as":
        need(d % 2 == 0)
        turn = torch.tensor([0.6, 0.8], dtype=torch.float64)

        def view_as(h: Tensor) -> Tensor:
            c = torch.view_as_complex(h.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(c * torch.view_as_complex(turn.to(h.dtype))).flatten(-2)

        return view_as
    if variant == "stft":
        need(d >= 4 and h.dim() == 2)
        window = torch.ones(4, dtype=torch.float64)
        return lambda h: torch.stft(h, 4, window=window.to(h.dtype), return_complex=True).abs().flatten(1)
    return {
        "rfft_abs": lambda h: (torch.fft.rfft(h).abs().square() + 0.1).sqrt(),
        "fft_real": lambda h: torch.fft.fft(h).real / d,
        "round_trip": lambda h: torch.fft.irfft(torch.fft.rfft(h), n=d),
        "polar": lambda h: torch.polar(h.abs() + 0.1, h).imag,
    }[variant]


@family("cube")
def custom_function(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    return lambda h: Cube.apply(h) / (1 + h * h)


@family("gauss uniform normal_ bernoulli numpy python randint randn_scale permutation")
def noise(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    return {
        "gauss": lambda h: h + 0.3 * torch.randn_like(h),
        "uniform": lambda h: h * (torch.rand(h.shape, dtype=h.dtype) + 0.5),
        "normal_": lambda h: h + torch.empty_like(h).normal_(0, 0.2),
        "bernoulli": lambda h: h * torch.bernoulli(torch.full_like(h, 0.7)),
        "numpy": lambda h: h * float(np.random.rand() + 0.5),
        "python": lambda h: h * (random.random() + 0.5),
        "randint": lambda h: h * torch.randint(1, 3, h.shape),
        "randn_scale": lambda h: h * torch.randn(()).to(h.dtype),
        "permutation": lambda h: h[..., torch.randperm(h.shape[-1])],
    }[variant]


@family("which which_of_outputs flag mask mix scale_flag power_which slice_which relu_flag")
def switch(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    """Something outside decides, and may change between steps."""
    if variant in ("which", "which_of_outputs"):
        need(m.kind in FEATURES)
        parts, which = [m.linear(h.shape[-1], size) for _ in range(2)], m.switch("which")
        if variant == "which":
            return lambda h: parts[which()](h)
        return lambda h: [part(h) for part in parts][which()]
    if variant == "mask":
        tail = tuple(h.shape[1:])
        mask = m.data(lambda n: (torch.rand(tail) > 0.4).double())
        m.built.uses.add("data")
        scale = m.parameter(1, mean=1.0, std=0.1)
        return lambda h: scale * h * mask()
    if variant == "mix":
        mix, examples = m.switch("mix"), 1 if m.kind == "time" else 0
        need(m.kind not in ("merged", "merged_time"))
        return lambda h: mix() * h + (1 - mix()) * h.flip(examples)
    if variant in ("power_which", "slice_which"):
        which = m.switch("which")
        if variant == "power_which":
            return lambda h: (h.abs() + 0.2) ** (1 + which())
        need(h.shape[-1] > 1)
        return lambda h: h[..., which() : which() + 1] * h
    flag = m.switch("flag")
    if variant == "relu_flag":
        return lambda h: F.leaky_relu(h, 0.1 if flag() else 0.7)
    return lambda h: h * (1.0 if flag() else 2.0) + (0.0 if flag() else 1.0)
