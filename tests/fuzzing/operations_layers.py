"""Operations: layers, normalisations and activations.

Each gets the maker, the value (to see its shape), a variant and a size, and returns a function. The function takes
sizes of the batch from the value that it gets, as the batch may change between steps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzzing.parts import FEATURES, SPATIAL, Fn, Maker, family, need


@family("module no_bias functional matmul right_transposed addmm einsum tensordot bmm keywords", FEATURES)
def linear(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    d = h.shape[-1]
    if variant in ("module", "no_bias"):
        layer = m.linear(d, size, bias=variant == "module")
        return lambda h: layer(h)
    w, b = m.parameter(d, size, std=d**-0.5), m.parameter(size) if variant in ("addmm", "keywords") else None
    match variant:
        case "matmul":
            return lambda h: h @ w
        case "right_transposed":
            return lambda h: (w.t() @ h.mT).mT
        case "addmm":
            need(h.dim() == 2)
            return lambda h: torch.addmm(b, h, w)  # type: ignore[arg-type]
        case "einsum":
            return lambda h: torch.einsum("...i,io->...o", h, w)
        case "tensordot":
            return lambda h: torch.tensordot(h, w, 1)
        case "bmm":
            need(h.dim() == 3)
            return lambda h: torch.bmm(h, w.expand(h.shape[0], -1, -1))
        case "keywords":
            return lambda h: F.linear(input=h, weight=w.t(), bias=b)
    return lambda h: F.linear(h, w.t())


@family("plain grouped dilated strided transposed depthwise circular", SPATIAL)
def conv(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    c, kernel = h.shape[1], min(size, 3)
    one, two = (nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d)
    plain, transposed = one if m.kind == "signal" else two
    layer: Any
    match variant:
        case "grouped":
            need(c % 2 == 0)
            layer = plain(c, 4, kernel, padding=1, groups=2)
        case "dilated":
            layer = plain(c, 3, 2, padding=1, dilation=2)
        case "strided":
            layer = plain(c, 3, kernel, stride=2, padding=1)
        case "transposed":
            layer = transposed(c, 2, 2, stride=2)
        case "depthwise":
            layer = plain(c, c, kernel, padding="same", groups=c)
        case "circular":
            layer = plain(c, 2, 3, padding=1, padding_mode="circular")
        case _:
            layer = plain(c, 3, kernel, bias=size % 2 == 0)
    layer = m.module(layer)
    return lambda h: layer(h)


@family("positions added_per_token lookup_padded table_rows", FEATURES)
def embedding(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    d = h.shape[-1]
    if variant == "positions":
        need(m.kind == "sequence")
        table = m.module(nn.Embedding(h.shape[1] + 1, d))
        return lambda h: h + table(torch.arange(h.shape[1]))
    shape = m.shaped()
    ids = m.data(lambda n: torch.randint(4, shape(n)))
    if variant == "table_rows":
        rows = m.parameter(4, d)
        return lambda h: h * rows[ids()]
    table = m.module(nn.Embedding(4, d, padding_idx=1 if variant == "lookup_padded" else None))
    return lambda h: h + table(ids())


@family("mean sum max padded offsets", ("rows",))
def embedding_bag(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    mode = variant if variant in ("mean", "sum", "max") else "sum"
    bag = m.module(nn.EmbeddingBag(6, h.shape[-1], mode=mode, padding_idx=0 if variant == "padded" else None))
    ids = m.data(lambda n: torch.randint(1, 6, (n, size)))
    if variant == "offsets":
        return lambda h: h + bag(ids().flatten(), torch.arange(0, len(h) * size, size))
    return lambda h: h + bag(ids())


@family("module with_itself", FEATURES)
def bilinear(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    d = h.shape[-1]
    layer = m.module(nn.Bilinear(d, d, size))
    if variant == "with_itself":
        return lambda h: layer(h, h)
    return lambda h: layer(h, h.tanh().flip(-1))


@family("module functional handwritten no_affine", FEATURES)
def layer_norm(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    d = h.shape[-1]
    need(d > 1)
    if variant == "handwritten":
        w = m.parameter(d)
        return lambda h: w * (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 0.1).sqrt()
    if variant in ("functional", "no_affine"):
        weights = (m.parameter(d), m.parameter(d)) if variant == "functional" else (None, None)
        return lambda h: F.layer_norm(h, (d,), *weights)
    layer = m.module(nn.LayerNorm(d))
    return lambda h: layer(h)


@family("one_group two_groups", (*SPATIAL, "rows"))
def group_norm(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    groups = 1 if variant == "one_group" else 2
    need(h.shape[1] % groups == 0 and h[0].numel() > groups)
    layer = m.module(nn.GroupNorm(groups, h.shape[1]))
    return lambda h: layer(h)


@family("train evaluating functional no_statistics flag", (*SPATIAL, "rows"))
def batch_norm(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    c = h.shape[1]
    need(h.numel() > c)
    make = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[h.dim()]
    if variant == "functional":
        w = m.parameter(c)
        return lambda h: F.batch_norm(h, None, None, w, training=True)
    layer = m.module(make(c, track_running_stats=variant != "no_statistics"))
    if variant == "flag":
        flag = m.switch("flag")
        return lambda h: F.batch_norm(h, layer.running_mean, layer.running_var, layer.weight, layer.bias, not flag())
    if variant == "evaluating":
        layer.eval()
    elif variant == "train":
        m.built.uses.add("train")
    return lambda h: layer(h)


@family("plain affine tracking", SPATIAL)
def instance_norm(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    make = nn.InstanceNorm1d if h.dim() == 3 else nn.InstanceNorm2d
    need(h[0, 0].numel() > 1)
    layer = m.module(make(h.shape[1], affine=variant != "plain", track_running_stats=variant == "tracking"))
    return lambda h: layer(h)


@family("module handwritten", FEATURES)
def rms_norm(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    if variant == "module":
        layer = m.module(nn.RMSNorm(h.shape[-1]))
        return lambda h: layer(h)
    w = m.parameter(h.shape[-1])
    return lambda h: h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 0.1) * (1 + w)


SMOOTH = (
    "tanh relu gelu silu sigmoid softplus elu leaky_relu hardtanh hardswish mish selu celu softsign tanhshrink "
    "logsigmoid relu6 softshrink"
)


@family(SMOOTH)
def activation(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    function: Fn = getattr(F, variant)
    return lambda h: function(h)


@family("square exp_small sin abs atan log1p_abs sqrt_abs reciprocal cubed erf clamp softmax log_softmax normalize std")
def pointwise(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    last = 1 if m.kind in SPATIAL else -1
    others: dict[str, Fn] = {
        "exp_small": lambda h: (h / 4).exp(),
        "log1p_abs": lambda h: torch.log1p(h.abs()),
        "sqrt_abs": lambda h: (h.abs() + 0.1).sqrt(),
        "reciprocal": lambda h: 1 / (1 + h * h),
        "cubed": lambda h: h**3 / 4,
        "clamp": lambda h: h.clamp(-0.7, 0.9),
        "softmax": lambda h: torch.softmax(h, last),
        "log_softmax": lambda h: F.log_softmax(h, dim=last),
        "normalize": lambda h: F.normalize(h, dim=last, eps=1e-3),
        "std": lambda h: h / (h.std(last, keepdim=True, unbiased=False) + 0.5),
    }
    if variant in others:
        return others[variant]
    function: Fn = getattr(torch, variant)
    return lambda h: function(h)


@family("relu silu leaky_relu elu hardtanh tanh_ sigmoid_ clamp_ mul_ exp_")
def in_place(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    """Overwrites its argument, which is what came out of a product."""
    scale = m.parameter(1, mean=1.0, std=0.1)
    methods: dict[str, Fn] = {
        "tanh_": lambda z: z.tanh_(),
        "sigmoid_": lambda z: z.sigmoid_(),
        "clamp_": lambda z: z.clamp_(-1, 1),
        "mul_": lambda z: z.mul_(0.7),
        "exp_": lambda z: z.div_(4).exp_(),
    }
    function = methods.get(variant) or (lambda z: getattr(F, variant)(z, inplace=True))
    return lambda h: function(h * scale)


@family("add mul div power added_in_place")
def scalar(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    """A parameter without dimensions."""
    w = m.parameter()

    def added(h: Tensor) -> Tensor:
        z = h * 1.0
        z += w
        return z

    return {
        "add": lambda h: h + w,
        "mul": lambda h: w * h,
        "div": lambda h: h / (1 + w * w),
        "power": lambda h: (h.abs() + 0.2) ** w,
        "added_in_place": added,
    }[variant]


@family("glu maxout swiglu", FEATURES)
def gated_unit(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    layer = m.linear(h.shape[-1], 2 * size)
    if variant == "glu":
        return lambda h: F.glu(layer(h), -1)
    if variant == "maxout":
        return lambda h: layer(h).unflatten(-1, (2, -1)).amax(-2)

    def swiglu(h: Tensor) -> Tensor:
        a, b = layer(h).chunk(2, -1)
        return F.silu(a) * b

    return swiglu


@family("one channels")
def prelu(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    layer = m.module(nn.PReLU(1 if variant == "one" else h.shape[1]))
    return lambda h: layer(h)


@family("module inplace alpha feature path evaluating weight")
def dropout(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    if variant == "weight":
        need(m.kind in FEATURES)
        w = m.parameter(h.shape[-1], h.shape[-1])
        return lambda h: h @ F.dropout(w, 0.4)
    if variant == "path":
        layer = m.parameter(1, mean=1.0)
        time = m.kind == "time"

        def path(h: Tensor) -> Tensor:
            shape = (1, h.shape[1], 1) if time else (h.shape[0], *[1] * (h.dim() - 1))
            return h + layer * h.tanh() * torch.empty(shape, dtype=h.dtype).bernoulli_(0.6) / 0.6

        return path
    if variant == "alpha":
        return lambda h: F.alpha_dropout(h, 0.3, training=True)
    if variant == "feature":
        need(m.kind in SPATIAL)
        return lambda h: F.dropout1d(h, 0.4) if h.dim() == 3 else F.dropout2d(h, 0.4)
    layer = m.module(nn.Dropout(0.4))
    if variant == "evaluating":
        layer.eval()
    elif variant == "inplace":
        return lambda h: F.dropout(h * 1.0, 0.4, inplace=True)
    else:
        m.built.uses.add("train")
    return lambda h: layer(h)
