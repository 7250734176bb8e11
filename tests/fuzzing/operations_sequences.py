"""Operations: attention, recurrence, positions, experts; examples that act on each other.

Each gets the maker, the value (to see its shape), a variant and a size, and returns a function. The function takes
sizes of the batch from the value that it gets, as the batch may change between steps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzzing.parts import FEATURES, PLACES, Fn, Maker, examples_first, family, need


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
