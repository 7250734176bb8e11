"""Operations: where numbers lie, and branches that meet.

Each gets the maker, the value (to see its shape), a variant and a size, and returns a function. The function takes
sizes of the batch from the value that it gets, as the batch may change between steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzzing.parts import FEATURES, PLACES, SPATIAL, Fn, Maker, examples_first, family, need


@family("average max adaptive adaptive_max lp global flatten", SPATIAL)
def pooling(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    n = 1 if m.kind == "signal" else 2
    if variant in ("global", "flatten"):
        m.kind = "rows"
        return (lambda h: h.flatten(2).mean(2)) if variant == "global" else (lambda h: h.flatten(1))
    name = {"average": "avg_pool", "max": "max_pool", "adaptive": "adaptive_avg_pool", "lp": "lp_pool"}
    function = getattr(F, f"{name.get(variant, 'adaptive_max_pool')}{n}d")
    if variant == "lp":
        return lambda h: function(h.abs() + 0.1, 2, 2)
    return lambda h: function(h, 2)


@family("constant reflect replicate features")
def pad(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    if variant in ("reflect", "replicate"):
        need(m.kind in SPATIAL)
        return lambda h: F.pad(h, (1, 0) * (h.dim() - 2), mode=variant)
    return lambda h: F.pad(h, (1, 0) if variant == "constant" else (0, 1, 0, 0), value=0.5)


@family("roll flip permute view transpose_twice movedim unfold repeat expand rot90")
def rearrange(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    time = m.kind == "time"
    if variant == "unfold":
        return lambda h: h.unfold(-1, 2, 1).flatten(-2)
    if variant == "rot90":
        need(m.kind == "image")
        return lambda h: h.rot90(1, (2, 3))
    where = 2 if time else -1
    return {
        "roll": lambda h: h.roll(1, where),
        "flip": lambda h: h.flip(where),
        "permute": lambda h: h.permute(*range(h.dim() - 1, -1, -1)).permute(*range(h.dim() - 1, -1, -1)) * 1.1,
        "view": lambda h: h.reshape(-1).view(h.shape),
        "transpose_twice": lambda h: h.transpose(0, -1).contiguous().tanh().transpose(0, -1),
        "movedim": lambda h: h.movedim(-1, 0).movedim(0, -1) * 0.9,
        "repeat": lambda h: h.repeat(*[1] * (h.dim() - 1), 2),
        "expand": lambda h: (h[..., None].expand(*h.shape, 2) * 0.5).flatten(-2),
    }[variant]


@family("chunk split stack cat unbind hsplit")
def cut_and_join(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    def split(h: Tensor) -> Tensor:
        a, b = h.split([1, h.shape[-1] - 1], -1)
        return torch.cat([b.tanh(), a], -1)

    def chunk(h: Tensor) -> Tensor:
        a, *rest = h.chunk(2, -1)
        return torch.cat([a.sin(), *rest], -1)

    need(h.shape[-1] > 1)
    return {
        "chunk": chunk,
        "split": split,
        "stack": lambda h: torch.stack([h, h.sin()], -1).flatten(-2),
        "cat": lambda h: torch.cat([h, h.tanh()], -1),
        "unbind": lambda h: torch.stack(list(h.unbind(-1))[::-1], -1),
        "hsplit": lambda h: torch.cat(h.tensor_split(2, -1)[::-1], -1),
    }[variant]


@family(
    "gather index_select take_along scatter scatter_add index_add sort topk fancy masked_scatter cumsum logcumsumexp"
)
def indexing(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    d = h.shape[-1]
    picks, order = torch.randint(d, (d,)), torch.randperm(d)
    return {
        "gather": lambda h: h.gather(-1, picks.expand(h.shape)),
        "index_select": lambda h: h.index_select(-1, picks),
        "take_along": lambda h: torch.take_along_dim(h, h.argsort(-1), -1),
        "scatter": lambda h: torch.zeros_like(h).scatter(-1, order.expand(h.shape), h),
        "scatter_add": lambda h: torch.zeros_like(h).scatter_add_(-1, picks.expand(h.shape), h.tanh()),
        "index_add": lambda h: h.index_add(-1, picks, h.tanh()),
        "sort": lambda h: h.sort(-1)[0],
        "topk": lambda h: h.topk(max(1, d - 1), -1)[0],
        "fancy": lambda h: h[..., order],
        "masked_scatter": lambda h: h.masked_scatter(h > 0, h.tanh()),
        "cumsum": lambda h: h.cumsum(-1) / d,
        "logcumsumexp": lambda h: h.logcumsumexp(-1),
    }[variant]


@family("pre post in_place dense rezero reuse conv")
def residual(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    if m.kind in SPATIAL:
        c = h.shape[1]
        layer = m.module((nn.Conv1d if m.kind == "signal" else nn.Conv2d)(c, c, 3, padding=1))
    else:
        need(variant != "conv")
        layer = m.linear(h.shape[-1], h.shape[-1])
    scale = m.parameter(1, std=0.5) if variant == "rezero" else None

    def added(h: Tensor) -> Tensor:
        out: Tensor = layer(h)
        out += h
        return F.relu(out, inplace=True)

    def reuse(h: Tensor) -> Tensor:
        z = layer(h)
        return z + z.tanh() * layer(z)

    return {
        "pre": lambda h: h + layer(h.tanh()),
        "post": lambda h: torch.tanh(layer(h)) + h,
        "in_place": added,
        "dense": lambda h: torch.cat([h, layer(h)], 1 if m.kind in SPATIAL else -1),
        "rezero": lambda h: h + scale * layer(h),
        "reuse": reuse,
        "conv": lambda h: torch.add(h, layer(h), alpha=0.3),
    }[variant]


@family("product sigmoid highway squeeze self_product attention_pool", FEATURES)
def gate(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    d = h.shape[-1]
    a, b = m.linear(d, d), m.linear(d, d) if variant in ("product", "highway", "squeeze") else None

    def highway(h: Tensor) -> Tensor:
        t = a(h).sigmoid()
        return t * b(h) + (1 - t) * h  # type: ignore[misc]

    if variant == "squeeze":
        need(m.kind == "sequence")
        return lambda h: h * b(a(h.mean(1, keepdim=True)).relu()).sigmoid()  # type: ignore[misc]
    if variant == "attention_pool":
        need(m.kind == "sequence")
        return lambda h: h * a(h).mean(-1, keepdim=True).softmax(1)
    return {
        "product": lambda h: a(h) * b(h),  # type: ignore[misc]
        "sigmoid": lambda h: a(h).sigmoid() * h,
        "highway": highway,
        "self_product": lambda h: a(h) * h,
    }[variant]


@family("sum difference relu_of_sum cat maximum three lora", FEATURES)
def parallel(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    d = h.shape[-1]
    a, b = m.linear(d, size), m.linear(d, size)
    c = m.linear(d, size) if variant == "three" else None
    up = m.linear(size, size) if variant == "lora" else None
    return {
        "sum": lambda h: a(h) + b(h),
        "difference": lambda h: torch.tanh(a(h) - b(h)),
        "relu_of_sum": lambda h: torch.relu((a(h) + b(h)) / 2),
        "cat": lambda h: torch.cat([a(h), b(h)], -1),
        "maximum": lambda h: torch.maximum(a(h), b(h)),
        "three": lambda h: torch.stack([a(h), b(h), c(h)]).sum(0),  # type: ignore[misc]
        "lora": lambda h: a(h) + up(b(h)) * 0.5,  # type: ignore[misc]
    }[variant]


@family("merge merge_time split to_time to_sequence to_signal to_image patches")
def relayout(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    """Moves the examples."""
    kind, t = m.kind, m.tokens
    new = {"merge": "merged", "merge_time": "merged_time", "to_time": "time", "to_signal": "signal"}
    if variant == "patches":
        need(kind in SPATIAL)
        m.kind = "sequence"
        return lambda h: h.flatten(2).transpose(1, 2)
    if variant == "to_image":
        need(kind == "sequence")
        m.kind = "image"
        return lambda h: h.transpose(1, 2)[..., None].expand(-1, -1, -1, 2)
    if variant in ("split", "to_sequence"):
        need(kind in ("merged", "merged_time", "time"))
        m.kind = "sequence"
        if kind == "time":
            return lambda h: h.transpose(0, 1)
        if kind == "merged":
            return lambda h: h.unflatten(0, (-1, t))
        return lambda h: h.unflatten(0, (t, -1)).transpose(0, 1)
    need(kind in PLACES)
    m.kind = new[variant]
    first = examples_first(kind)
    return {
        "merge": lambda h: first(h).flatten(0, 1),
        "merge_time": lambda h: first(h).transpose(0, 1).flatten(0, 1),
        "to_time": lambda h: first(h).transpose(0, 1),
        "to_signal": lambda h: first(h).transpose(1, 2),
    }[variant]
