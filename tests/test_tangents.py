"""Tangent rules against torch's own forward mode. The rows are in ``operations.py``."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

from guessopt.ops import CachedCall, attention, op_of

from .calls import Built, assert_close, build
from .machine import skip_if_refused
from .operations import (
    SDPA,
    SPARSE,
    STACKED,
    TANGENTS,
    UNCOVERED,
    Case,
    M,
    by_name,
)


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


@pytest.mark.parametrize("case", STACKED, ids=by_name)
def test_a_stacked_tangent_is_every_guess_its_own(case: Case) -> None:
    built = build(case, torch.float64)
    op = op_of(case.fn)
    assert op.stacked_tangent is not None
    guesses = [{k: torch.randn_like(v) for k, v in built.tangents.items()} for _ in range(3)]
    stack = {k: torch.stack([guess[k] for guess in guesses]) for k in built.tangents}
    found = replace(built, tangents=stack).own(rule=op.stacked_tangent)
    for k, guess in enumerate(guesses):
        out, dout = replace(built, tangents=guess).stock()
        assert_close(found[0], out, 1e-12)
        assert_close(found[1][k], dout, 1e-12)


LARGE = Case("sdpa-large", SDPA, (M(8, 2, 64, 4), M(8, 2, 64, 4), M(8, 2, 64, 4)), {"is_causal": True})


@pytest.mark.parametrize("case", [*(c for c in TANGENTS if op_of(c.fn).reuse is not None), LARGE], ids=by_name)
def test_a_cached_result_is_taken_over(case: Case) -> None:
    built, op = build(case, torch.float64), op_of(case.fn)
    assert op.reuse is not None
    args = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(), built.args)
    out = (op.in_reverse or case.fn)(*args, **built.kwargs)
    cached = CachedCall.of(built.args, built.kwargs, out, op.reuse(out))
    assert cached.matches(built.args, built.kwargs)
    taken, dout = built.own(known=cached)
    assert taken is cached.out or (case.fn is SDPA and case is not LARGE)
    own, expected = built.own()
    assert_close(taken, own, 1e-12)
    assert_close(dout, expected, 1e-12)


def test_a_cached_derivative_is_taken_over() -> None:
    built = build(Case("gelu", F.gelu, (M(2, 3),)), torch.float64)
    slope = torch.full((2, 3), 3.0, dtype=torch.float64)
    out, dout = built.own(known=CachedCall.of(built.args, {}, None, slope))
    assert_close(out, F.gelu(built.args[0]), 1e-15)
    assert_close(dout, 3 * built.tangents[id(built.args[0])], 1e-15)


def test_a_cached_call_matches_the_same_numbers_in_the_same_memory_alone() -> None:
    x, w = torch.randn(3, 4), torch.randn(4)
    cached = CachedCall.of(([x, w], 2.0), {"dim": 1}, torch.zeros(3))
    assert cached.matches((([x, w]), 2.0), {"dim": 1}) and cached.matches(((x[:], w.detach()), 2.0), {"dim": 1})
    for args, kwargs in (
        (([x, w], 2), {"dim": 1}),
        (([x, w], 2.0), {"dim": 0}),
        (([x, w], 2.0), {}),
        (([x, w.clone()], 2.0), {"dim": 1}),
        (([x[:2], w], 2.0), {"dim": 1}),
        (([x], 2.0), {"dim": 1}),
        (([x, 1.0], 2.0), {"dim": 1}),
    ):
        assert not cached.matches(args, kwargs)
    w.add_(1)
    assert not cached.matches(([x, w], 2.0), {"dim": 1})
    with torch.inference_mode():  # writes into these do not show
        y = torch.randn(3)
    assert not CachedCall.of((y,), {}, None).matches((y,), {})


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.parametrize("fn", SPARSE, ids=["sparse.mm", "spmm", "sparse.addmm", "matmul"])
def test_tangent_of_a_product_with_a_sparse_matrix(fn: Callable[..., Any], layout: torch.layout) -> None:
    a = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, -3.0]], dtype=torch.float64)
    h, dh, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 4), (3, 4), (2, 1)))
    rule, first = op_of(fn).tangent, (b,) if fn is torch.sparse.addmm else ()
    assert rule is not None
    out, dout = rule((*first, a.to_sparse(layout=layout), h), (*(None for _ in first), None, dh))
    assert_close(out, SPARSE[fn](*first, a, h), 1e-12)
    assert_close(dout, a @ dh, 1e-12)


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
        assert any(op_of(fn).tangent for fn in seen), f"call {k}: {seen}"
