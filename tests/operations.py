"""Rows for the tests of the operations: calls with random tensors, one table for each part of an ``Op``.

A new operation needs a row in each table whose part its ``Op`` has; ``test_rules`` tells which row is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class T:
    """A random tensor to be: ``moves`` says that it has a tangent, ``positive`` that its entries are positive."""

    shape: tuple[int, ...]
    moves: bool = False
    positive: bool = False

    def make(self, dtype: torch.dtype) -> Tensor:
        t = torch.randn(self.shape, dtype=torch.float64)
        return (t.abs() + 0.2 if self.positive else t).to(dtype)


@dataclass(frozen=True)
class Case:
    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def M(*shape: int) -> T:
    """With a tangent."""
    return T(shape, moves=True)


def C(*shape: int) -> T:
    """Constant."""
    return T(shape)


def P(*shape: int) -> T:
    """Constant and positive."""
    return T(shape, positive=True)


SEEN = torch.tensor([[True, False, True], [True, True, False], [False, True, True], [False, False, True]])
NOTHING_SEEN = torch.tensor([[True, False, True], [False, False, False], [False, True, True], [True, True, True]])
IDS = torch.tensor([[0, 1, 2], [4, 4, 1]])
QKV = (M(2, 3, 4, 5), M(2, 3, 3, 5), M(2, 3, 3, 6))
SDPA = F.scaled_dot_product_attention

#: The tangent rule gives what torch gives.
TANGENTS = [
    Case("linear", F.linear, (M(2, 3, 4), C(5, 4), C(5))),
    Case("linear-no-bias", F.linear, (M(3, 4), C(5, 4))),
    Case("linear-kwargs", F.linear, (M(3, 4),), {"weight": C(5, 4), "bias": C(5)}),
    Case("prelu", torch.prelu, (M(2, 3, 4), C(3))),
    Case("prelu-one-slope", torch.prelu, (M(2, 3), C(1))),
    Case("matmul", torch.matmul, (M(2, 3, 4), C(4, 5))),
    Case("x@w", Tensor.matmul, (M(3, 4), C(4, 5))),
    Case("w@x", Tensor.matmul, (C(3, 4), M(4, 5))),
    Case("__matmul__", Tensor.__matmul__, (M(3, 4), C(4))),
    Case("mm", torch.mm, (M(3, 4), C(4, 5))),
    Case("Tensor.mm", Tensor.mm, (M(3, 4), C(4, 5))),
    Case("bmm", torch.bmm, (M(2, 3, 4), C(2, 4, 5))),
    Case("Tensor.bmm", Tensor.bmm, (C(2, 3, 4), M(2, 4, 5))),
    Case("addmm", torch.addmm, (C(5), M(3, 4), C(4, 5))),
    Case("addmm-scaled", torch.addmm, (C(5), M(3, 4), C(4, 5)), {"beta": 0.5, "alpha": 2.0}),
    Case("Tensor.addmm", Tensor.addmm, (C(5), M(3, 4), C(4, 5))),
    Case("conv1d", F.conv1d, (M(2, 3, 8), C(4, 3, 3), C(4), 2, 1)),
    Case("conv2d", F.conv2d, (M(2, 4, 6, 6), C(6, 2, 3, 3), C(6), 1, 1, 1, 2)),
    Case("conv2d-same", F.conv2d, (M(2, 4, 6, 6), C(6, 4, 2, 3)), {"padding": "same", "dilation": 2}),
    Case("conv2d-unbatched", F.conv2d, (M(4, 6, 6), C(6, 4, 3, 3), C(6))),
    Case("conv3d", F.conv3d, (M(1, 2, 4, 4, 4), C(3, 2, 2, 2, 2), C(3))),
    Case("conv_transpose1d", F.conv_transpose1d, (M(2, 3, 8), C(3, 4, 3), C(4), 2, 1, 1)),
    Case("conv_transpose2d", F.conv_transpose2d, (M(2, 4, 5, 5), C(4, 3, 3, 3), C(6), 2, 1, 1, 2, 1)),
    Case("conv_transpose3d", F.conv_transpose3d, (M(1, 2, 3, 3, 3), C(2, 3, 2, 2, 2), C(3))),
    Case("layer_norm", F.layer_norm, (M(2, 3, 5), (5,), C(5), C(5))),
    Case("layer_norm-2d-plain", F.layer_norm, (M(2, 3, 5), (3, 5)), {"eps": 0.1}),
    Case("layer_norm-no-bias", F.layer_norm, (M(2, 3, 5), (3, 5)), {"weight": C(3, 5)}),
    Case("torch.layer_norm", torch.layer_norm, (M(2, 3, 5), (5,), C(5), C(5), 1e-3, False)),
    Case("rms_norm", F.rms_norm, (M(2, 3, 5), (5,), C(5))),
    Case("rms_norm-2d-plain", F.rms_norm, (M(2, 3, 5), (3, 5)), {"eps": 0.1}),
    Case("torch.rms_norm", torch.rms_norm, (M(2, 5), (5,), C(5), 1e-3)),
    Case("group_norm", F.group_norm, (M(2, 6, 4, 3), 3, C(6), C(6))),
    Case("group_norm-plain", F.group_norm, (M(2, 6, 4), 2), {"eps": 0.1}),
    Case("batch_norm-eval", F.batch_norm, (M(4, 3, 2, 2), C(3), P(3), C(3), C(3))),
    Case("batch_norm-eval-plain", F.batch_norm, (M(4, 3), C(3), P(3)), {"eps": 0.1}),
    Case("batch_norm-train", F.batch_norm, (M(4, 3, 2, 2), C(3), P(3), C(3), C(3), True, 0.3)),
    Case("batch_norm-train-no-statistics", F.batch_norm, (M(4, 3), None, None), {"training": True}),
    Case("instance_norm", F.instance_norm, (M(2, 3, 4, 4),), {"weight": C(3), "bias": C(3)}),
    Case("instance_norm-plain", F.instance_norm, (M(2, 3, 4),)),
    Case("add", torch.add, (M(2, 3), C(3))),
    Case("x+w", Tensor.add, (M(3), C(2, 3))),
    Case("x+y", Tensor.add, (M(2, 3), C(2, 3))),
    Case("__add__", Tensor.__add__, (M(2, 3), 2.0)),
    Case("__radd__", Tensor.__radd__, (C(3), M(2, 3))),
    Case("sub", torch.sub, (M(2, 3), C(3))),
    Case("w-x", Tensor.sub, (C(2, 3), M(3))),
    Case("__sub__", Tensor.__sub__, (M(2, 3), 1)),
    Case("mul", torch.mul, (M(2, 3), C(3))),
    Case("multiply", torch.multiply, (M(3), C(2, 3))),
    Case("w*x", Tensor.mul, (C(3), M(2, 3))),
    Case("x*2", Tensor.mul, (M(2, 3), 2)),
    Case("Tensor.multiply", Tensor.multiply, (M(2, 3), C(3))),
    Case("__mul__", Tensor.__mul__, (M(2, 3), 0.3)),
    Case("__rmul__", Tensor.__rmul__, (M(2, 3), 0.3)),
    Case("mul-both", Tensor.mul, (M(2, 3), M(2, 3))),
    Case("mul-both-broadcast", torch.mul, (M(2, 1), M(2, 2, 3))),
    Case("neg", torch.neg, (M(2, 3),)),
    Case("Tensor.neg", Tensor.neg, (M(2, 3),)),
    Case("__neg__", Tensor.__neg__, (M(2, 3),)),
    Case("rsqrt", torch.rsqrt, (T((2, 3), True, True),)),
    Case("Tensor.rsqrt", Tensor.rsqrt, (T((2, 3), True, True),)),
    Case("mean", torch.mean, (M(2, 3, 4), -1, True)),
    Case("Tensor.mean", Tensor.mean, (M(2, 3, 4),), {"dim": (0, 2)}),
    Case("mean-all", Tensor.mean, (M(2, 3),)),
    Case("cat", torch.cat, ([M(2, 3), M(1, 3)],)),
    Case("concat", torch.concat, ([M(2, 3), C(2, 1), C(2, 0)], -1)),
    Case("concatenate", torch.concatenate, ([C(2, 3), M(1, 3)],), {"dim": 0}),
    Case("embedding_bag", F.embedding_bag, (IDS, M(5, 3))),
    Case("embedding_bag-sum", F.embedding_bag, (IDS, M(5, 3)), {"mode": "sum", "per_sample_weights": C(2, 3)}),
    Case("embedding_bag-max", F.embedding_bag, (IDS, M(5, 3)), {"mode": "max"}),
    Case(
        "embedding_bag-max-offsets",
        F.embedding_bag,
        (IDS.flatten(), M(5, 3)),
        {"mode": "max", "offsets": torch.tensor([0, 2, 2]), "padding_idx": 1},
    ),
    Case("silu", F.silu, (M(2, 3),)),
    Case("gelu", F.gelu, (M(2, 3),)),
    Case("gelu-tanh", F.gelu, (M(2, 3),), {"approximate": "tanh"}),
    Case("div", torch.div, (M(2, 3), P(3))),
    Case("divide", torch.divide, (M(2, 3), P(3))),
    Case("true_divide", torch.true_divide, (M(3), P(2, 3))),
    Case("x/w", Tensor.div, (M(2, 3), P(3))),
    Case("Tensor.divide", Tensor.divide, (M(2, 3), P(3))),
    Case("Tensor.true_divide", Tensor.true_divide, (M(2, 3), 3)),
    Case("__truediv__", Tensor.__truediv__, (M(2, 3), 3)),
    Case("pow", torch.pow, (M(2, 3), 2)),
    Case("x.pow(3)", Tensor.pow, (M(2, 3), 3)),
    Case("x**-1.5", Tensor.__pow__, (T((2, 3), True, True), -1.5)),
    Case("square", torch.square, (M(2, 3),)),
    Case("Tensor.square", Tensor.square, (M(2, 3),)),
    Case("dropout", F.dropout, (M(4, 5), 0.4)),
    Case("torch.dropout", torch.dropout, (M(4, 5), 0.4, True)),
    Case("softmax", F.softmax, (M(2, 3, 4),), {"dim": 1, "_stacklevel": 3, "dtype": None}),
    Case("torch.softmax", torch.softmax, (M(2, 3, 4), -1)),
    Case("Tensor.softmax", Tensor.softmax, (M(2, 3, 4),), {"dim": 0}),
    Case("special.softmax", torch.special.softmax, (M(2, 3, 4), -1)),
    Case("sdpa", SDPA, QKV),
    Case("sdpa-q", SDPA, (M(2, 3, 4, 5), C(2, 3, 3, 5), C(2, 3, 3, 6))),
    Case("sdpa-k", SDPA, (C(2, 3, 4, 5), M(2, 3, 3, 5), C(2, 3, 3, 6))),
    Case("sdpa-v", SDPA, (C(2, 3, 4, 5), C(2, 3, 3, 5), M(2, 3, 3, 6))),
    Case("sdpa-qk", SDPA, (M(2, 3, 4, 5), M(2, 3, 3, 5), C(2, 3, 3, 6)), {"scale": 0.3}),
    Case("sdpa-causal", SDPA, (M(2, 4, 5), M(2, 4, 5), M(2, 4, 5)), {"is_causal": True}),
    Case("sdpa-bool-mask", SDPA, QKV, {"attn_mask": SEEN}),
    Case("sdpa-fully-masked-row", SDPA, QKV, {"attn_mask": NOTHING_SEEN}),
    Case("sdpa-key-mask", SDPA, QKV, {"attn_mask": SEEN[:2].reshape(2, 1, 1, 3)}),
    Case("sdpa-float-mask", SDPA, QKV, {"attn_mask": C(2, 1, 4, 3)}),
    Case("sdpa-gqa", SDPA, (M(2, 4, 3, 5), M(2, 2, 3, 5), M(2, 2, 3, 5)), {"enable_gqa": True}),
    Case("sdpa-broadcast", SDPA, (M(2, 3, 4, 5), M(1, 3, 3, 5), M(2, 1, 3, 6))),
]


def _bag(
    ids: Tensor, w: Tensor, offsets: Tensor | None = None, mode: str = "mean", padding_idx: int = -1, **kwargs: Any
) -> Tensor:
    """``F.embedding_bag`` in operations that have a forward derivative."""
    weights = kwargs.get("per_sample_weights", torch.ones(ids.shape, dtype=w.dtype))
    bounds = [0, *offsets[1:].tolist(), len(ids)] if offsets is not None else []
    bags = [slice(a, b) for a, b in pairwise(bounds)] or range(len(ids))
    kept = [ids[bag] != padding_idx for bag in bags]
    rows = [(w[ids[bag]] * weights[bag][:, None])[keep] for bag, keep in zip(bags, kept, strict=True)]
    reduced: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": lambda t: t.mean(0), "sum": lambda t: t.sum(0), "max": lambda t: t.max(0).values
    }  # fmt: skip
    return torch.stack([reduced[mode](row) if len(row) else w[0] * 0 for row in rows])


#: In place of operations to which torch gives no forward derivative.
STOCK: dict[Any, Callable[..., Any]] = {F.embedding_bag: _bag}

#: Operations on a sparse matrix, in place of which another serves on a dense one.
SPARSE: dict[Any, Callable[..., Any]] = {
    torch.sparse.mm: torch.mm, torch.spmm: torch.mm, torch.sparse.addmm: torch.addmm, torch.matmul: torch.matmul,
}  # fmt: skip

#: The stacked tangent rule gives, guess by guess, what torch gives.
STACKED = [
    *(case for case in TANGENTS if case.fn in (F.linear, SDPA) and case.name != "sdpa-gqa"),
    *(Case(fn.__name__, fn, (M(2, 3), M(2, 3))) for fn in (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)),
]

#: The tangent rule leaves these to torch.
UNCOVERED = [
    Case("matmul-both", Tensor.matmul, (M(3, 4), M(4, 5))),
    Case("matmul-out", torch.matmul, (M(3, 4), C(4, 5)), {"out": C(3, 5)}),
    Case("addmm-bias", torch.addmm, (M(5), M(3, 4), C(4, 5))),
    Case("add-both", Tensor.add, (M(3), M(3))),
    Case("add-alpha", torch.add, (M(3), C(3)), {"alpha": 2}),
    Case("mul-out", torch.mul, (M(3), M(3)), {"out": C(3)}),
    Case("mean-out", torch.mean, (M(2, 3), 0), {"out": C(3)}),
    Case("cat-out", torch.cat, ([M(2), C(1)],), {"out": C(3)}),
    Case("silu-in-place", F.silu, (M(3), True)),
    Case("div-rounded", torch.div, (M(3), C(3)), {"rounding_mode": "floor"}),
    Case("div-denominator", torch.div, (C(3), M(3))),
    Case("pow-tensor", torch.pow, (M(3), C(3))),
    Case("dropout-in-place", F.dropout, (M(3), 0.5, True, True)),
    Case("dropout-eval", F.dropout, (M(3), 0.5, False)),
    Case("batch_norm-one-value", F.batch_norm, (M(1, 3), None, None, None, None, True)),
    Case("instance_norm-running", F.instance_norm, (M(2, 3, 4), C(3), P(3))),
    Case("softmax-no-dim", F.softmax, (M(2, 3),)),
    Case("embedding_bag-norm", F.embedding_bag, (IDS, M(5, 3)), {"max_norm": 1.0}),
    Case("sdpa-dropout", SDPA, QKV, {"dropout_p": 0.1}),
]

#: The parameter rule gives what autograd gives.
GRADIENTS = [
    Case("linear", F.linear, (C(2, 3, 4), C(5, 4), C(5))),
    Case("linear-no-bias", F.linear, (C(3, 4), C(5, 4))),
    Case("linear-vector", F.linear, (C(4), C(5, 4), C(5))),
    Case("linear-kwargs", F.linear, (C(3, 4),), {"weight": C(5, 4), "bias": C(5)}),
    Case("linear-one-output", F.linear, (C(3, 4), C(4))),
    Case("matmul", torch.matmul, (C(2, 3, 4), C(4, 5))),
    Case("x@w", Tensor.matmul, (C(3, 4), C(4, 5))),
    Case("w@x", Tensor.__matmul__, (C(3, 4), C(2, 4, 5))),
    Case("__matmul__", Tensor.__matmul__, (C(3, 4), C(4, 5))),
    Case("mm", torch.mm, (C(3, 4), C(4, 5))),
    Case("Tensor.mm", Tensor.mm, (C(3, 4), C(4, 5))),
    Case("addmm", torch.addmm, (C(5), C(3, 4), C(4, 5))),
    Case("Tensor.addmm", Tensor.addmm, (C(5), C(3, 4), C(4, 5))),
    Case("addmm-scaled", torch.addmm, (C(5), C(3, 4), C(4, 5)), {"alpha": 0.5}),
    Case("conv1d", F.conv1d, (C(2, 3, 8), C(4, 3, 3), C(4), 2, 1)),
    Case("conv2d", F.conv2d, (C(2, 4, 7, 6), C(6, 4, 3, 3), C(6))),
    Case("conv2d-stride", F.conv2d, (C(2, 4, 7, 6), C(6, 4, 3, 2), C(6), (2, 1), (1, 0))),
    Case("conv2d-dilation", F.conv2d, (C(2, 4, 7, 6), C(6, 4, 3, 3), None, 1, 2, 2)),
    Case("conv2d-groups", F.conv2d, (C(2, 4, 7, 6), C(6, 2, 3, 3), C(6), 1, 1, 1, 2)),
    Case("conv2d-depthwise", F.conv2d, (C(2, 4, 7, 6), C(4, 1, 3, 3), C(4), 1, 1, 1, 4)),
    Case("conv2d-same", F.conv2d, (C(2, 4, 7, 6), C(6, 4, 2, 3), C(6), 1, "same", 2)),
    Case("conv2d-valid", F.conv2d, (C(2, 4, 7, 6), C(6, 4, 2, 3), C(6), 2, "valid")),
    Case("conv2d-unbatched", F.conv2d, (C(4, 7, 6), C(6, 4, 2, 3), C(6))),
    Case("conv2d-kwargs", F.conv2d, (C(2, 4, 7, 6), C(6, 4, 2, 3)), {"bias": C(6), "stride": 2}),
    Case("conv3d", F.conv3d, (C(1, 2, 4, 4, 4), C(3, 2, 2, 2, 2), C(3), 2, 1)),
    Case("layer_norm", F.layer_norm, (C(2, 3, 5), (5,), C(5), C(5))),
    Case("layer_norm-2d", F.layer_norm, (C(2, 3, 5), (3, 5)), {"weight": C(3, 5), "bias": C(3, 5), "eps": 0.1}),
    Case("layer_norm-no-bias", F.layer_norm, (C(2, 3, 5), (5,), C(5))),
    Case("layer_norm-no-weight", F.layer_norm, (C(2, 3, 5), (5,)), {"bias": C(5)}),
    Case("rms_norm", F.rms_norm, (C(2, 3, 5), (5,), C(5))),
    Case("rms_norm-eps", F.rms_norm, (C(2, 3, 5), (3, 5), C(3, 5), 0.1)),
    Case("group_norm", F.group_norm, (C(2, 6, 4, 3), 3, C(6), C(6))),
    Case("group_norm-no-bias", F.group_norm, (C(2, 6, 4), 2, C(6))),
    Case("batch_norm-eval", F.batch_norm, (C(4, 3, 2, 2), C(3), P(3), C(3), C(3))),
    Case("batch_norm-eval-no-bias", F.batch_norm, (C(4, 3), C(3), P(3)), {"weight": C(3), "eps": 0.1}),
    Case("batch_norm-train", F.batch_norm, (C(4, 3, 2, 2), C(3), P(3), C(3), C(3), True)),
    Case("batch_norm-train-no-statistics", F.batch_norm, (C(4, 3), None, None, C(3), C(3), True)),
    Case("torch.layer_norm", torch.layer_norm, (C(2, 3, 5), (5,), C(5), C(5), 1e-3, False)),
    Case("torch.rms_norm", torch.rms_norm, (C(2, 5), (5,), C(5), 1e-3)),
    Case("scale", torch.mul, (C(2, 3, 4), C(4))),
    Case("scale-channels", torch.multiply, (C(3, 1), C(2, 3, 4))),
    Case("x*w", Tensor.mul, (C(2, 3), C(3))),
    Case("Tensor.multiply", Tensor.multiply, (C(2, 3), C(2, 3))),
    Case("__mul__", Tensor.__mul__, (C(2, 3), C())),
    Case("__rmul__", Tensor.__rmul__, (C(3), C(2, 3))),
    Case("x*2", Tensor.mul, (C(2, 3), 2)),
    Case("bias", torch.add, (C(2, 3, 4), C(4))),
    Case("bias-scaled", torch.add, (C(2, 3, 4), C(4)), {"alpha": 2}),
    Case("x+b", Tensor.add, (C(2, 3), C(2, 3))),
    Case("__add__", Tensor.__add__, (C(2, 3), C(1, 3))),
    Case("__radd__", Tensor.__radd__, (C(3), C(2, 3))),
    Case("prelu-generic", F.prelu, (C(2, 3, 4), C(3))),
    Case("embedding_bag-generic", F.embedding_bag, (IDS, C(5, 3)), {"mode": "sum"}),
    Case("embedding-generic", F.embedding, (torch.tensor([[0, 2], [1, 1]]), C(3, 4))),
]  # fmt: skip

X = M(4, 5)

#: Each entry of the output depends on that entry of the one tensor alone.
ENTRYWISE = [
    *(
        Case(fn.__name__, fn, (X,))
        for fn in (
            torch.relu, Tensor.relu, F.relu, torch.relu_, Tensor.relu_,
            F.leaky_relu, F.leaky_relu_, F.elu, F.elu_, F.selu, F.celu, F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid,
            F.gelu, F.silu, F.mish, F.softplus, F.softsign, F.tanhshrink, F.logsigmoid, F.sigmoid, F.tanh,
            torch.sigmoid, Tensor.sigmoid, torch.tanh, Tensor.tanh, torch.sin, Tensor.sin, torch.cos, Tensor.cos,
            torch.exp, Tensor.exp, torch.square, Tensor.square, torch.abs, Tensor.abs,
            torch.neg, Tensor.neg, Tensor.__neg__, Tensor.contiguous, Tensor.clone, torch.clone,
        )
    ),
    Case("gelu-tanh", F.gelu, (X,), {"approximate": "tanh"}),
    Case("silu-in-place", F.silu, (X,), {"inplace": True}),
    *(Case(fn.__name__, fn, (X, 2)) for fn in (torch.pow, Tensor.pow, Tensor.__pow__)),
    *(Case(fn.__name__, fn, (X, -0.5, 0.5)) for fn in (torch.clamp, Tensor.clamp)),
    *(
        Case(fn.__name__, fn, (X, 3))
        for fn in (
            torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, torch.sub, Tensor.sub, Tensor.__sub__,
            Tensor.__rsub__, torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__,
            torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.divide, Tensor.true_divide,
            Tensor.__truediv__,
        )
    ),
    *(Case(fn.__name__, fn, (X, 0.5, True)) for fn in (F.dropout, torch.dropout, F.alpha_dropout)),
    *(Case(fn.__name__, fn, (M(2, 3), 0.5, True)) for fn in (torch.feature_dropout, F.feature_alpha_dropout)),
    Case("dropout1d", F.dropout1d, (M(2, 3, 2), 0.5, True)),
    Case("dropout2d", F.dropout2d, (M(2, 3, 2, 2), 0.5, True)),
    Case("dropout3d", F.dropout3d, (M(2, 3, 1, 2, 2), 0.5, True)),
]  # fmt: skip

#: What replaces the operation in reverse mode gives the same results and gradients.
IN_REVERSE = [
    Case("hardsigmoid", F.hardsigmoid, (M(4, 5),)),
    Case("unbind", torch.unbind, (M(3, 4, 5),)),
    Case("Tensor.unbind", Tensor.unbind, (M(4, 3, 5), 1)),
    Case("sdpa", SDPA, (M(2, 3, 4, 5), M(2, 3, 4, 5), M(2, 3, 4, 5))),
    Case("sdpa-long", SDPA, (M(8, 2, 64, 4), M(8, 2, 64, 4), M(8, 2, 64, 4)), {"is_causal": True}),
]

#: Operations that move running statistics.
STATISTICS = [
    Case("batch_norm", F.batch_norm, (C(4, 3), C(3), P(3), C(3), C(3), True)),
    Case("batch_norm-kwargs", F.batch_norm, (C(4, 3), C(3), P(3)), {"training": True}),
    Case("instance_norm", F.instance_norm, (C(4, 3, 5), C(3), P(3))),
    Case("torch.batch_norm", torch.batch_norm, (C(4, 3), C(3), C(3), C(3), P(3), True, 0.1, 1e-5, False)),
    Case("torch.instance_norm", torch.instance_norm, (C(4, 3, 5), None, None, C(3), P(3), True, 0.1, 1e-5, False)),
]


def _recurrent(gates: int, states: int, dropout: float, train: bool) -> tuple[Any, ...]:
    """Arguments of a recurrent network of two layers, 3 inputs and 2 units."""
    weights = [C(gates * 2, n) for n in (3, 2, 2, 2)]
    state = [M(2, 4, 2) for _ in range(states)]
    return (M(5, 4, 3), state if states > 1 else state[0], weights, False, 2, dropout, train, False, False)


RECURRENT = {torch.lstm: (4, 2), torch.gru: (3, 1), torch.rnn_tanh: (1, 1), torch.rnn_relu: (1, 1)}

#: Torch has a forward derivative in the context.
IN_CONTEXT = [
    *(Case(fn.__name__, fn, _recurrent(*sizes, 0.0, True)) for fn, sizes in RECURRENT.items()),
    Case("sdpa", SDPA, QKV),
]

#: Calls that draw, and calls of the same functions that do not.
DRAWS = [
    *(
        Case(f"{case.name}{what}", case.fn, (case.args[0], *rest))
        for case in (*ENTRYWISE, Case("dropout_", torch.dropout_, (X,)), Case("alpha", torch.alpha_dropout, (X,)))
        if "dropout" in case.fn.__name__
        for what, rest in {"": (0.5, True), "-eval": (0.5, False), "-zero": (0.0, True)}.items()
    ),
    Case("dropout-kwargs", F.dropout, (X,), {"p": 0.5, "training": False}),
    Case("dropout-default", F.dropout, (X,)),
    *(
        Case(f"{fn.__name__}{what}", fn, _recurrent(*sizes, *how))
        for fn, sizes in RECURRENT.items()
        for what, how in {"": (0.5, True), "-eval": (0.5, False), "-zero": (0.0, True)}.items()
    ),
    Case("sdpa", SDPA, QKV),
    Case("sdpa-dropout", SDPA, QKV, {"dropout_p": 0.5}),
    Case("sdpa-dropout-positional", SDPA, (*QKV, None, 0.5)),
]

#: Calls whose tangent in torch is not that of their backward.
BACKWARD_ONLY = [
    Case("prelu", F.prelu, (M(2, 3), C(3))),
    Case("Tensor.prelu", Tensor.prelu, (M(2, 3), C(3))),
    Case("fmax", torch.fmax, (M(2, 3), C(3))),
    Case("Tensor.fmax", Tensor.fmax, (M(2, 3), C(3))),
    *(
        Case(fn.__name__, fn, (C(5, 3), 0, torch.tensor([[0, 1, 0], [0, 2, 2]]), M(2, 3), "prod"))
        for fn in (torch.scatter_reduce, Tensor.scatter_reduce, Tensor.scatter_reduce_)
    ),
]


def by_name(case: Case) -> str:
    """A case's id in pytest."""
    return case.name
