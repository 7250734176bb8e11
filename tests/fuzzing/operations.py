"""The operations. Each gets the maker, the value (to see its shape), a variant and a size, and returns a function.

The function takes sizes of the batch from the value that it gets, as the batch may change between steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzzing.parts import ANY, FEATURES, PLACES, SPATIAL, Fn, Maker, examples_first, family, need


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


@family("plain causal boolean_mask float_mask grouped_queries learned_bias scaled dropout flag padding", PLACES)
def fused_attention(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    first, d, heads = examples_first(m.kind), h.shape[-1], 2
    q, k, v, o = m.linear(d, 4), m.linear(d, 4), m.linear(d, 4), m.linear(4, d)
    t = m.tokens
    mask = m.data(lambda n: torch.rand(t, t) > 0.3) if variant in ("boolean_mask", "float_mask") else None
    keep = m.data(lambda n: torch.rand(n, 1, 1, t) > 0.3) if variant == "padding" else None
    bias = m.parameter(heads, t, t) if variant == "learned_bias" else None
    flag = m.switch("flag") if variant == "flag" else None

    def attend(h: Tensor) -> Tensor:
        x = first(h)
        a, b, c = (f(x).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (q, k, v))
        options: dict[str, Any] = {}
        if variant == "causal" or (flag is not None and not flag()):
            options["is_causal"] = True
        elif mask is not None:
            both = mask() | torch.eye(t, dtype=torch.bool)
            options["attn_mask"] = both if variant == "boolean_mask" else both.to(x.dtype)
        elif keep is not None:
            options["attn_mask"] = keep() | torch.eye(t, dtype=torch.bool)
        elif bias is not None:
            options["attn_mask"] = bias.expand(len(x), -1, -1, -1)
        elif variant == "grouped_queries":
            b, c, options = b[:, :1], c[:, :1], {"enable_gqa": True}
        elif variant == "scaled":
            options["scale"] = 0.3
        elif variant == "dropout":
            options["dropout_p"] = 0.3
        out = F.scaled_dot_product_attention(a, b, c, **options)
        return first(o(out.transpose(1, 2).flatten(2)))

    return attend


@family("module no_weights padded causal encoder_layer", PLACES)
def multihead(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    d, first = h.shape[-1], m.kind == "sequence"
    need(d % 2 == 0)
    if variant == "encoder_layer":
        layer = m.module(nn.TransformerEncoderLayer(d, 2, 3, dropout=0.0, batch_first=first))
        return lambda h: layer(h)
    layer = m.module(nn.MultiheadAttention(d, 2, batch_first=first))
    t = m.tokens
    padded = m.data(lambda n: (torch.rand(n, t) > 0.6) & (torch.arange(t) > 0)) if variant == "padded" else None

    def attend(h: Tensor) -> Tensor:
        options: dict[str, Any] = {"need_weights": variant == "module"}
        if padded is not None:
            options["key_padding_mask"] = padded()
        if variant == "causal":
            options |= {"attn_mask": torch.ones(t, t).triu(1).bool()}
        out: Tensor = layer(h, h, h, **options)[0]
        return out

    return attend


@family("softmax masked one_matrix linear_kernel rotary_complex talking_heads", PLACES)
def attention(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    first, d = examples_first(m.kind), h.shape[-1]
    one = m.linear(d, 12) if variant == "one_matrix" else None
    parts = None if one else [m.linear(d, 4) for _ in range(3)]
    o = m.linear(4, d)
    mix = m.parameter(2, 2) if variant == "talking_heads" else None

    def rotate(x: Tensor) -> Tensor:
        turn = torch.polar(torch.ones(x.shape[-2], 1, dtype=x.dtype), torch.arange(x.shape[-2], dtype=x.dtype)[:, None])
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    def attend(h: Tensor) -> Tensor:
        x = first(h)
        n, t, _ = x.shape
        if one is not None:
            q, k, v = one(x).view(n, t, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            assert parts is not None
            q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in parts)
        if variant == "rotary_complex":
            q, k = rotate(q), rotate(k)
        if variant == "linear_kernel":
            out = F.softplus(q) @ (F.softplus(k).mT @ v) / t
        else:
            scores = q @ k.mT / 2
            if variant == "masked":
                scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), float("-inf"))
            weights = scores.softmax(-1)
            if mix is not None:
                weights = torch.einsum("nhts,hg->ngts", weights, mix)
            out = weights @ v
        return first(o(out.transpose(1, 2).reshape(n, t, 4)))

    return attend


@family("gru lstm rnn bidirectional two_layers last_hidden", PLACES)
def recurrent(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    kinds: dict[str, Any] = {"gru": nn.GRU, "rnn": nn.RNN, "two_layers": nn.GRU}
    options: dict[str, Any] = {"bidirectional": variant == "bidirectional", "num_layers": 1 + (variant == "two_layers")}
    layer = m.module(kinds.get(variant, nn.LSTM)(h.shape[-1], size, batch_first=m.kind == "sequence", **options))
    if variant == "last_hidden":
        m.kind = "rows"
        return lambda h: layer(h)[1][0][-1]
    return lambda h: layer(h)[0]


@family("gru lstm rnn", ("sequence",))
def cell(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    step = m.module({"gru": nn.GRUCell, "lstm": nn.LSTMCell, "rnn": nn.RNNCell}[variant](h.shape[-1], size))

    def loop(h: Tensor) -> Tensor:
        state, seen = None, []
        for t in range(h.shape[1]):
            state = step(h[:, t], state)
            seen.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(seen, 1)

    return loop


@family("gru rnn", ("sequence",))
def packed(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    layer = m.module((nn.GRU if variant == "gru" else nn.RNN)(h.shape[-1], size, batch_first=True))
    t = m.tokens
    lengths = m.data(lambda n: torch.randint(1, t + 1, (n,)))
    m.kind = "rows"

    def run(h: Tensor) -> Tensor:
        rows = nn.utils.rnn.pack_padded_sequence(h, lengths(), batch_first=True, enforce_sorted=False)
        last: Tensor = layer(rows)[1][-1]
        return last

    return run


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


@family("mean sum amax last learned_weights flatten", PLACES)
def pool_positions(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    first = examples_first(m.kind)
    weights = m.parameter(m.tokens) if variant == "learned_weights" else None
    m.kind = "rows"
    if weights is not None:
        return lambda h: torch.einsum("ntd,t->nd", first(h), weights.softmax(0))
    return {
        "mean": lambda h: first(h).mean(1),
        "sum": lambda h: first(h).sum(1),
        "amax": lambda h: first(h).amax(1),
        "last": lambda h: first(h)[:, -1],
        "flatten": lambda h: first(h).flatten(1),
    }[variant]


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


@family("residual centred running set", PLACES)
def sums(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    """Sums over positions."""
    t = 1 if m.kind == "sequence" else 0
    layer = m.linear(h.shape[-1], h.shape[-1])
    return {
        "residual": lambda h: h + layer(h).sum(t, keepdim=True),
        "centred": lambda h: layer(h) - layer(h).mean(t, keepdim=True),
        "running": lambda h: layer(h).cumsum(t),
        "set": lambda h: layer(h - h.amax(t, keepdim=True)),
    }[variant]


@family("by_argmax weighted one_empty top_two", ("rows", "merged", "merged_time"))
def experts(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    d = h.shape[-1]
    parts = [m.linear(d, d) for _ in range(3 if variant == "one_empty" else 2)]
    router = m.linear(d, len(parts)) if variant in ("weighted", "top_two") else None
    fixed = torch.randn(d, len(parts), dtype=torch.float64)

    def route(h: Tensor) -> Tensor:
        out = torch.zeros_like(h)
        if variant == "top_two":
            assert router is not None
            best = router(h).softmax(-1).topk(2, -1)
            for k, part in enumerate(parts):
                rows, place = torch.where(best.indices == k)
                out = out.index_add(0, rows, part(h[rows]) * best.values[rows, place, None])
            return out
        if router is not None:
            weights, chosen = router(h).softmax(-1).max(-1)
        else:
            chosen = (h @ fixed.to(h.dtype)).argmax(-1)
            weights = None
        if variant == "one_empty":
            chosen = chosen.clamp(max=1)
        for k, part in enumerate(parts):
            rows = torch.where(chosen == k)[0]
            value = part(h[rows])
            out = out.index_add(0, rows, value if weights is None else value * weights[rows, None])
        return h + out

    return route


@family("linear attention dropout", FEATURES)
def checkpoint(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    from torch.utils.checkpoint import checkpoint as again

    a, b = m.linear(h.shape[-1], 4), m.linear(4, h.shape[-1])

    def inside(h: Tensor) -> Tensor:
        z = torch.tanh(a(h))
        if variant == "attention":
            z = torch.softmax(z @ z.mT, -1) @ z
        if variant == "dropout":
            z = F.dropout(z, 0.3)
        out: Tensor = b(z)
        return out

    need(variant != "attention" or m.kind == "sequence")
    return lambda h: h + again(inside, h, use_reentrant=False)


class Cube(torch.autograd.Function):
    """With a forward derivative of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * g * x * x

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * t * x * x


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


@family("mean centred flip softmax cumsum similarity shuffle", FEATURES)
def couple(m: Maker, h: Tensor, variant: str, size: int) -> Fn:
    """Examples act on each other."""
    n = 1 if m.kind == "time" else 0
    order = m.data(lambda n: torch.randperm(n)) if variant == "shuffle" else None
    need(variant != "similarity" or m.kind == "rows")
    need(variant != "shuffle" or m.kind == "rows")
    return {
        "mean": lambda h: h + h.mean(n, keepdim=True),
        "centred": lambda h: h - h.mean(n, keepdim=True),
        "flip": lambda h: 0.7 * h + 0.3 * h.flip(n),
        "softmax": lambda h: torch.softmax(h, n),
        "cumsum": lambda h: h.cumsum(n) / 2,
        "similarity": lambda h: torch.softmax(h @ h.mT, -1) @ h,
        "shuffle": lambda h: h[order()],  # type: ignore[misc]
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
