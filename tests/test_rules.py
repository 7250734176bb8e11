"""The rules of operations, one by one: tangents, parameter gradients and pull-backs against torch's own autograd.

Cases are data: a new rule needs a row in ``TANGENTS`` (``test_every_tangent_rule_has_a_case`` says which).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

from guessopt.ops import attention, conv, elementwise, linear, norm
from guessopt.ops.base import _TANGENTS, PULLED_BACK, REUSED, CachedCall, MatrixRule, Rule, rule_for, tangent_for
from guessopt.sites import Call, Matrix, Value

from .machine import skip_if_refused

FAMILIES = {module.__name__ for module in (attention, conv, elementwise, linear, norm)}
REGISTERED = [fn for fn, (rule, _) in _TANGENTS.items() if rule.__module__ in FAMILIES]


@dataclass(frozen=True)
class T:
    """A random tensor to be: ``moves`` with a tangent, ``positive`` entries."""

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
    return T(shape, moves=True)


def C(*shape: int) -> T:
    return T(shape)


def P(*shape: int) -> T:
    return T(shape, positive=True)


SEEN = torch.tensor([[True, False, True], [True, True, False], [False, True, True], [False, False, True]])
NOTHING_SEEN = torch.tensor([[True, False, True], [False, False, False], [False, True, True], [True, True, True]])
QKV = (M(2, 3, 4, 5), M(2, 3, 3, 5), M(2, 3, 3, 6))
SDPA = F.scaled_dot_product_attention

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
    Case("sdpa-dropout", SDPA, QKV, {"dropout_p": 0.1}),
]


def by_name(case: Case) -> str:
    return case.name


@dataclass
class Built:
    """A case with tensors: ``args`` and ``kwargs`` without tangents, and the tangents by ``id`` of their primals."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tangents: dict[int, Tensor]

    def own(self, **known: Any) -> Any:
        """What the rule gives, as an engine would call it."""
        entry = tangent_for(self.fn)
        assert entry is not None
        rule, duals = entry
        with torch.no_grad():
            moving = tuple(
                [self.tangents.get(id(t)) for t in a] if isinstance(a, list) else self.tangents.get(id(a))
                for a in self.args[:duals]
            )
            if duals == 1:
                return rule(self.args[0], moving[0], *self.args[1:], **self.kwargs, **known)
            return rule(self.args[:duals], moving, *self.args[duals:], **self.kwargs, **known)

    def stock(self) -> tuple[Tensor, Tensor]:
        """Torch's own forward AD."""
        with torch.no_grad(), fw.dual_level(), sdpa_kernel(SDPBackend.MATH):
            args = tree_map_only(
                Tensor, lambda a: fw.make_dual(a, self.tangents[id(a)]) if id(a) in self.tangents else a, self.args
            )
            out, dout = fw.unpack_dual(self.fn(*args, **self.kwargs))
        return out, dout

    def twin(self) -> "Built":
        """The same, in tensors of its own."""
        copies: dict[int, Tensor] = {}

        def copy(t: Tensor) -> Tensor:
            copies[id(t)] = t.clone()
            return copies[id(t)]

        args, kwargs = tree_map_only(Tensor, copy, (self.args, self.kwargs))
        return Built(self.fn, args, kwargs, {id(copies[k]): t.clone() for k, t in self.tangents.items()})


def build(case: Case, dtype: torch.dtype) -> Built:
    tangents: dict[int, Tensor] = {}

    def make(a: Any) -> Any:
        if isinstance(a, T):
            t = a.make(dtype)
            if a.moves:
                tangents[id(t)] = torch.randn(a.shape, dtype=torch.float64).to(dtype)
            return t
        return [make(item) for item in a] if isinstance(a, list) else a

    args, kwargs = tuple(make(a) for a in case.args), {k: make(a) for k, a in case.kwargs.items()}
    return Built(case.fn, args, kwargs, tangents)


def assert_close(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert a.shape == b.shape
    error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("case", TANGENTS, ids=by_name)
def test_tangent_is_that_of_torch(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    built = build(case, dtype)
    twin = built.twin()
    state = torch.get_rng_state()
    out, dout = built.own()
    drawn = torch.get_rng_state()
    torch.set_rng_state(state)
    expected, dexpected = twin.stock()

    assert torch.equal(drawn, torch.get_rng_state())
    assert out.dtype == expected.dtype == dtype
    assert_close(out, expected, tolerance)
    assert_close(dout, dexpected, tolerance)
    for a, b in zip((*built.args, *built.kwargs.values()), (*twin.args, *twin.kwargs.values()), strict=True):
        if isinstance(a, Tensor):  # inputs as they were, running statistics moved once
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", TANGENTS, ids=by_name)
def test_bfloat16_stays_bfloat16(case: Case) -> None:
    built = build(case, torch.bfloat16)
    plain = built.twin()
    skip_if_refused(lambda: plain.fn(*plain.args, **plain.kwargs))
    expected, _ = built.twin().stock()
    wide = Built(*tree_map_only(Tensor, lambda t: t, (built.fn, built.args, built.kwargs)), built.tangents).twin()
    out, dout = built.own()
    assert out.dtype is expected.dtype is dout.dtype is torch.bfloat16
    assert torch.isfinite(dout).all()
    if "dropout" not in case.name:
        assert_close(out, expected, 3e-2)
        leaves = [t for t in tree_flatten((wide.args, wide.kwargs))[0] if isinstance(t, Tensor)]
        doubles = {id(t): t.double() if t.is_floating_point() else t for t in leaves}
        args, kwargs = tree_map_only(Tensor, lambda t: doubles[id(t)], (wide.args, wide.kwargs))
        exact = Built(wide.fn, args, kwargs, {id(doubles[k]): t.double() for k, t in wide.tangents.items()})
        assert_close(dout, exact.stock()[1], 5e-2)


@pytest.mark.parametrize("case", TANGENTS, ids=by_name)
def test_tangent_has_memory_of_its_own(case: Case) -> None:
    """An in-place operation that follows (a residual ``+=``) must not reach what the rule was given."""
    built = build(case, torch.float64)
    given = [t for t in (*built.args, *built.kwargs.values(), *built.tangents.values()) if isinstance(t, Tensor)]
    storages = {t.untyped_storage().data_ptr() for t in given}
    out, dout = built.own()
    assert out.untyped_storage().data_ptr() not in storages
    assert dout.untyped_storage().data_ptr() not in storages | {out.untyped_storage().data_ptr()}
    with torch.no_grad():
        dout += 1  # refused by expanded tensors


@pytest.mark.parametrize("case", UNCOVERED, ids=by_name)
def test_what_a_rule_does_not_cover_is_left_to_torch(case: Case) -> None:
    assert build(case, torch.float64).own() is NotImplemented


LARGE = Case("sdpa-large", SDPA, (M(8, 2, 64, 4), M(8, 2, 64, 4), M(8, 2, 64, 4)), {"is_causal": True})


@pytest.mark.parametrize("case", [*(case for case in TANGENTS if case.fn in REUSED), LARGE], ids=by_name)
def test_a_known_result_is_taken_over(case: Case) -> None:
    built = build(case, torch.float64)
    args = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(), built.args)
    out = PULLED_BACK.get(case.fn, case.fn)(*args, **built.kwargs)
    known = CachedCall.of(built.args, built.kwargs, out, REUSED[case.fn](out))
    assert known.serves(built.args, built.kwargs)
    taken, dout = built.own(known=known)
    assert taken is known.out or (case.fn is SDPA and case is not LARGE)
    own, expected = built.own()
    assert_close(taken, own, 1e-12)
    assert_close(dout, expected, 1e-12)


def test_a_known_derivative_is_taken_over() -> None:
    built = build(Case("gelu", F.gelu, (M(2, 3),)), torch.float64)
    slope = torch.full((2, 3), 3.0, dtype=torch.float64)
    out, dout = built.own(known=CachedCall.of(built.args, {}, None, slope))
    assert_close(out, F.gelu(built.args[0]), 1e-15)
    assert_close(dout, 3 * built.tangents[id(built.args[0])], 1e-15)


def test_what_is_known_serves_the_same_numbers_in_the_same_memory_alone() -> None:
    x, w = torch.randn(3, 4), torch.randn(4)
    known = CachedCall.of(([x, w], 2.0), {"dim": 1}, torch.zeros(3))
    assert known.serves((([x, w]), 2.0), {"dim": 1}) and known.serves(((x[:], w.detach()), 2.0), {"dim": 1})
    for args, kwargs in (
        (([x, w], 2), {"dim": 1}),
        (([x, w], 2.0), {"dim": 0}),
        (([x, w], 2.0), {}),
        (([x, w.clone()], 2.0), {"dim": 1}),
        (([x[:2], w], 2.0), {"dim": 1}),
        (([x], 2.0), {"dim": 1}),
        (([x, 1.0], 2.0), {"dim": 1}),
    ):
        assert not known.serves(args, kwargs)
    w.add_(1)
    assert not known.serves(([x, w], 2.0), {"dim": 1})
    with torch.inference_mode():  # writes into these do not show
        y = torch.randn(3)
    assert not CachedCall.of((y,), {}, None).serves((y,), {})


#: Operations on a sparse matrix, in place of which another serves on a dense one.
SPARSE: dict[Any, Callable[..., Any]] = {
    torch.sparse.mm: torch.mm, torch.spmm: torch.mm, torch.sparse.addmm: torch.addmm, torch.matmul: torch.matmul,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.parametrize("fn", SPARSE, ids=["sparse.mm", "spmm", "sparse.addmm", "matmul"])
def test_tangent_of_a_product_with_a_sparse_matrix(fn: Callable[..., Any], layout: torch.layout) -> None:
    a = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, -3.0]], dtype=torch.float64)
    h, dh, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 4), (3, 4), (2, 1)))
    entry, first = tangent_for(fn), (b,) if fn is torch.sparse.addmm else ()
    assert entry is not None
    out, dout = entry[0]((*first, a.to_sparse(layout=layout), h), (*(None for _ in first), None, dh))
    assert_close(out, SPARSE[fn](*first, a, h), 1e-12)
    assert_close(dout, a @ dh, 1e-12)


def test_every_tangent_rule_has_a_case() -> None:
    covered = {case.fn for case in TANGENTS} | SPARSE.keys()
    assert [fn for fn in REGISTERED if fn not in covered] == []


@pytest.mark.parametrize("kind", ["transposed", "channels_last"])
@pytest.mark.parametrize("fn", [F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm, F.softmax, F.dropout, F.conv2d])
def test_tangent_of_strided_input(fn: Callable[..., Any], kind: str) -> None:
    x, dx = torch.randn(2, 4, 4, 5, 5, dtype=torch.float64).mT.unbind(0)
    if kind == "channels_last":
        x, dx = x.contiguous(memory_format=torch.channels_last), dx.contiguous()
    w = torch.randn(4, dtype=torch.float64)
    rest: dict[Any, tuple[Any, ...]] = {
        F.layer_norm: ((5,),), F.rms_norm: ((5,),), F.group_norm: (2, w), F.batch_norm: (None, None, w, w, True),
        F.softmax: (1,), F.dropout: (0.5,), F.conv2d: (torch.randn(3, 4, 2, 2, dtype=torch.float64),),
    }  # fmt: skip
    built = Built(fn, (x, *rest[fn]), {}, {id(x): dx})
    torch.manual_seed(1)
    out, dout = built.own()
    torch.manual_seed(1)
    if fn is not F.dropout:  # torch's own tangent of group_norm refuses channels_last; a mask is drawn in memory order
        built = Built(fn, (x.contiguous(), *rest[fn]), {}, {})
        built.tangents[id(built.args[0])] = dx.contiguous()
    expected, dexpected = built.stock()
    assert_close(out, expected, 1e-12)
    assert_close(dout, dexpected, 1e-12)


@pytest.mark.parametrize("scores", [1, 40, 1 << 20])
def test_attention_in_pieces_is_attention(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention._SCORES, "cpu", scores)
    for name in ("sdpa", "sdpa-key-mask", "sdpa-float-mask", "sdpa-gqa"):
        built = build(next(case for case in TANGENTS if case.name == name), torch.float64)
        for a, b in zip(built.own(), built.twin().stock(), strict=True):
            assert_close(a, b, 1e-12)


def test_attention_under_autocast() -> None:
    built = build(next(case for case in TANGENTS if case.name == "sdpa"), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, dout = built.own()
    expected, dexpected = built.stock()
    assert out.dtype is dout.dtype is torch.bfloat16
    assert_close(out, expected, 3e-2)
    assert_close(dout, dexpected, 3e-2)


@pytest.mark.parametrize("name", ["layer_norm", "group_norm", "batch_norm-eval", "batch_norm-train", "rms_norm"])
def test_norms_with_wide_parameters(name: str) -> None:
    """bfloat16 activations with float32 weights and statistics, as autocast and mixed training have them."""
    built = build(next(case for case in TANGENTS if case.name == name), torch.float32)
    x = built.args[0].bfloat16()
    narrow = Built(built.fn, (x, *built.args[1:]), built.kwargs, {id(x): built.tangents[id(built.args[0])].bfloat16()})
    expected, dexpected = built.twin().stock()
    out, dout = narrow.own()
    assert out.dtype is built.fn(*narrow.args, **narrow.kwargs).dtype
    assert_close(out, expected, 3e-2)
    assert_close(dout, dexpected, 3e-2)


def test_spellings_are_seen() -> None:
    """What people write reaches a rule under the function object that a function mode sees."""
    seen: list[Any] = []

    class Log(TorchFunctionMode):
        def __torch_function__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(fn)
            return fn(*args, **(kwargs or {}))

    x, w, image = torch.randn(2, 4), torch.randn(4, 4), torch.randn(2, 4, 3, 3)
    modules = [
        torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.RMSNorm(4), torch.nn.BatchNorm1d(4),
        torch.nn.GroupNorm(2, 4), torch.nn.Dropout(0.5), torch.nn.Softmax(-1),
    ]  # fmt: skip
    convolutions = [torch.nn.Conv2d(4, 4, 2), torch.nn.ConvTranspose2d(4, 4, 2), torch.nn.InstanceNorm2d(4)]
    calls: list[Callable[[], Any]] = [
        lambda: x @ w, lambda: x.matmul(w), lambda: x.mm(w), lambda: torch.addmm(x[0], x, w), lambda: x + x,
        lambda: 2 + x, lambda: x - 1, lambda: x * 2, lambda: 2 * x, lambda: x / 2, lambda: x**2, lambda: x.pow(2),
        lambda: x.square(), lambda: x.softmax(-1), lambda: F.scaled_dot_product_attention(image, image, image),
        *(lambda m=m: m(x) for m in modules), *(lambda m=m: m(image) for m in convolutions),
    ]  # fmt: skip
    for k, call in enumerate(calls):
        seen.clear()
        with Log():
            call()
        assert any(tangent_for(fn) for fn in seen), f"call {k}: {seen}"


# Parameter gradients.

GRADIENTS = [
    Case("linear", F.linear, (C(2, 3, 4), C(5, 4), C(5))),
    Case("linear-no-bias", F.linear, (C(3, 4), C(5, 4))),
    Case("linear-vector", F.linear, (C(4), C(5, 4), C(5))),
    Case("linear-kwargs", F.linear, (C(3, 4),), {"weight": C(5, 4), "bias": C(5)}),
    Case("linear-one-output", F.linear, (C(3, 4), C(4))),
    Case("matmul", torch.matmul, (C(2, 3, 4), C(4, 5))),
    Case("x@w", Tensor.matmul, (C(3, 4), C(4, 5))),
    Case("w@x", Tensor.__matmul__, (C(3, 4), C(2, 4, 5))),
    Case("mm", torch.mm, (C(3, 4), C(4, 5))),
    Case("Tensor.mm", Tensor.mm, (C(3, 4), C(4, 5))),
    Case("addmm", torch.addmm, (C(5), C(3, 4), C(4, 5))),
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
    Case("prelu-generic", F.prelu, (C(2, 3, 4), C(3))),
    Case("embedding-generic", F.embedding, (torch.tensor([[0, 2], [1, 1]]), C(3, 4))),
]  # fmt: skip


@pytest.mark.parametrize("case", GRADIENTS, ids=by_name)
def test_gradients_are_those_of_autograd(case: Case) -> None:
    built = build(case, torch.float64)
    tensors = [a for a in (*built.args, *built.kwargs.values()) if isinstance(a, Tensor)]
    statistics = {id(a) for a in built.args[1:3]} if case.fn is F.batch_norm else set()
    wanted = [k for k, t in enumerate(tensors) if t.is_floating_point() and id(t) not in statistics]
    before = [t.clone() for t in tensors]
    rule = rule_for(case.fn)

    reference = built.twin()
    leaves = [a for a in (*reference.args, *reference.kwargs.values()) if isinstance(a, Tensor)]
    for k in wanted:
        leaves[k].requires_grad_()
    out = case.fn(*reference.args, **reference.kwargs)
    g = torch.randn_like(out)
    expected = torch.autograd.grad(out, [leaves[k] for k in wanted], g)

    parameters = wanted[1:] or wanted
    for chosen in (wanted, parameters, parameters[-1:]):
        with torch.no_grad():
            found = rule.gradients(case.fn, built.args, built.kwargs, 0, chosen, g)
        for k, got in zip(chosen, found, strict=True):
            assert got is not None
            assert got.shape == tensors[k].shape
            assert_close(got, expected[wanted.index(k)], 1e-12)
    for t, kept in zip(tensors, before, strict=True):
        assert torch.equal(t, kept), "the rule wrote into its arguments"


def test_every_gradient_rule_has_a_case() -> None:
    from guessopt.ops.base import _RULES

    covered = {type(rule_for(case.fn)) for case in GRADIENTS}
    assert {type(rule) for rule in _RULES.values() if type(rule).__module__ in FAMILIES} <= covered | {Rule}


# Matrix rules.

MATRICES = [case for case in GRADIENTS if isinstance(rule_for(case.fn), MatrixRule) and case.name not in
            ("linear-one-output", "addmm-scaled", "w@x")]  # fmt: skip


def matrix_of(built: Built) -> tuple[Matrix, Tensor, Tensor]:
    """The matrix site of a call, built by hand, with its weight and input."""
    rule = rule_for(built.fn)
    assert isinstance(rule, MatrixRule)
    weight, x = rule.weight(built.args, built.kwargs), rule.input(built.args, built.kwargs)
    tensors = [a for a in (*built.args, *built.kwargs.values()) if isinstance(a, Tensor)]
    number = {id(t): k for k, t in enumerate(tensors)}
    args, kwargs = tree_map_only(Tensor, lambda t: Value(number[id(t)]), (built.args, built.kwargs))
    call = Call(0, built.fn, args, kwargs, tuple(range(len(tensors))), (len(tensors),))
    w, i = number[id(weight)], number[id(x)]
    return Matrix(rule, call, (w,), (tuple(weight.shape),), i, tuple(x.shape), "weight"), weight, x


@pytest.mark.parametrize("case", MATRICES, ids=by_name)
def test_matrix_of_the_weight_is_the_operation(case: Case) -> None:
    built = build(case, torch.float64)
    matrix, weight, x = matrix_of(built)
    rows = matrix.rule.matrix(matrix, weight)
    zero = {id(a) for a in (*built.args, *built.kwargs.values()) if isinstance(a, Tensor)} - {id(x), id(weight)}
    args, kwargs = tree_map_only(
        Tensor, lambda t: torch.zeros_like(t) if id(t) in zero else t, (built.args, built.kwargs)
    )
    assert_close(matrix.rule.apply(matrix, rows, x), case.fn(*args, **kwargs), 1e-12)
    assert torch.linalg.matrix_rank(rows).max() <= matrix.rule.rank(matrix)


@pytest.mark.parametrize("stacked", [1, 2, 3])
@pytest.mark.parametrize("case", MATRICES, ids=by_name)
def test_transpose_is_the_adjoint_of_apply(case: Case, stacked: int) -> None:
    """``<rows x, e> = <x, rows^T e>``, for as many rows as W has, and for more (several weights stacked)."""
    built = build(case, torch.float64)
    matrix, weight, x = matrix_of(built)
    w = matrix.rule.matrix(matrix, weight)
    rows = torch.randn(w.shape[0], w.shape[1] * stacked, w.shape[2], dtype=torch.float64)
    out = matrix.rule.apply(matrix, rows, x)
    assert tuple(out.shape) == tuple(matrix.rule.cotangent_shape(matrix, rows, tuple(x.shape)))
    e = torch.randn_like(out)
    pulled = matrix.rule.transpose(matrix, rows, e, tuple(x.shape))
    assert pulled.shape == x.shape
    torch.testing.assert_close((out * e).sum(), (x * pulled).sum(), rtol=1e-12, atol=1e-12)
