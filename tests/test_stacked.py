"""K guesses in one pass equal K passes, above all where a size of a tensor is K: no operation may mix the two up."""

import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import GuessGradOptimizer
from guessopt.engine.jvp.dual import DualEngine
from guessopt.engine.jvp.duals import pack, unpack
from guessopt.engine.jvp.stacked import StackedEngine
from guessopt.tree import tensors_in

from .problems import Problem, labels

K = 3
REAL = torch.float64
S = (K,) * 3


@dataclass(frozen=True)
class Op:
    """``shapes``: of the tensors that the arguments begin with; ``rest``: what follows them; ``listed``: the tensors go
    in as one tuple."""

    fn: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    rest: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    positive: bool = False
    listed: bool = False
    dtype: torch.dtype = REAL


def op(fn: Callable[..., Any], *shapes: tuple[int, ...], rest: tuple[Any, ...] = (), **options: Any) -> Op:
    own = {key: options.pop(key) for key in ("positive", "listed", "dtype") if key in options}
    return Op(fn, shapes, rest, tuple(options.items()), **own)


SHAPES: list[tuple[int, ...]] = [(), (K,), (1, K), (K, K), (2, K), (K, 1), S, (2, 1, K), (1, K, 1), (K, K, K, K)]
UNARIES: list[Callable[..., Any]] = [
    torch.relu, F.relu, F.gelu, F.silu, torch.tanh, torch.sigmoid, torch.exp, torch.abs, torch.neg, F.softplus,
    F.hardswish, torch.square, Tensor.clone, Tensor.contiguous, torch.rsqrt, F.leaky_relu, F.elu, torch.log,
]  # fmt: skip
BINARIES: list[Callable[..., Any]] = [
    torch.add, Tensor.__add__, torch.mul, Tensor.__mul__, torch.sub, Tensor.__rsub__, torch.div, torch.maximum,
    torch.hypot, torch.atan2, Tensor.__truediv__,
]  # fmt: skip
IN_PLACE: list[Callable[..., Any]] = [Tensor.add_, Tensor.mul_, Tensor.__iadd__, Tensor.sub_, Tensor.div_, Tensor.copy_]
PAIRS = [
    (a, b) for a, b in itertools.product(SHAPES, SHAPES)
    if all(x in (y, 1) or y == 1 for x, y in zip(a[::-1], b[::-1], strict=False)) and abs(len(a) - len(b)) < 4
]  # fmt: skip
WRITES = [(a, b) for a, b in PAIRS if torch.broadcast_shapes(a, b) == a]

OPS: dict[str, Op] = {
    **{f"{fn.__name__} {list(s)}": op(fn, s, positive=True) for fn in UNARIES for s in SHAPES},
    **{
        f"{fn.__name__} {list(a)} {list(b)}": op(fn, a, b, positive=True)
        for fn, (a, b) in itertools.product(BINARIES, PAIRS)
        if fn in (torch.add, torch.mul) or (a, b) in PAIRS[:: 2 + len(fn.__name__) % 3]
    },
    **{f"{fn.__name__} {list(a)} {list(b)}": op(fn, a, b, positive=True) for fn in IN_PLACE for a, b in WRITES},
    **{f"relu_ {list(s)}": op(Tensor.relu_, s) for s in SHAPES},
    **{f"F.relu inplace {list(s)}": op(F.relu, s, rest=(True,)) for s in SHAPES},
    **{f"add with alpha {list(a)} {list(b)}": op(torch.add, a, b, alpha=0.5) for a, b in PAIRS},
    **{f"pow 3 {list(s)}": op(torch.pow, s, rest=(3,)) for s in SHAPES},
    **{f"times 2 {list(s)}": op(torch.mul, s, rest=(2,)) for s in SHAPES},
    **{f"plus 1 {list(s)}": op(torch.add, s, rest=(1,)) for s in SHAPES},
    **{f"clamp {list(s)}": op(torch.clamp, s, min=0.1) for s in SHAPES},
    **{f"sum {list(s)}": op(torch.sum, s) for s in SHAPES},
    **{f"mean over dim 0 {list(s)}": op(torch.mean, s, dim=0, keepdim=True) for s in SHAPES[1:]},
    **{f"softmax {list(s)}": op(torch.softmax, s, dim=0) for s in SHAPES[1:]},
    **{f"F.softmax {list(s)}": op(F.softmax, s, dim=-1) for s in SHAPES[1:]},
    **{f"linear {list(s)}": op(F.linear, s, (K, K), (K,)) for s in SHAPES if s[-1:] == (K,)},
    **{f"linear without bias {list(s)}": op(F.linear, s, (2, K)) for s in SHAPES if s[-1:] == (K,)},
    **{f"linear, one output {list(s)}": op(F.linear, s, (K,)) for s in SHAPES if s[-1:] == (K,)},
    **{
        f"matmul {list(a)} {list(b)}": op(torch.matmul, a, b)
        for a, b in itertools.product([(K,), (K, K), S, (1, K, K), (K, K, K, K)], repeat=2)
    },
    **{f"with itself {list(s)}": op(lambda x: x * x + x, s) for s in SHAPES},
    **{f"with itself in place {list(s)}": op(lambda x: Tensor.mul_(x, x), s) for s in SHAPES},
    "addmm": op(torch.addmm, (K,), (K, K), (K, K)),
    "addmm [K, K]": op(torch.addmm, (K, K), (K, K), (K, K)),
    "bmm": op(torch.bmm, S, S),
    "baddbmm": op(torch.baddbmm, (K, 1, K), S, S),
    "einsum": op(torch.einsum, S, (K, K), listed=True),
    "where": op(lambda a, b: torch.where(torch.eye(K, dtype=torch.bool), a, b), (K,), (K, K)),
    "transpose": op(torch.transpose, S, rest=(0, 2)),
    "expand": op(Tensor.expand, (K,), rest=(K, K, K)),
    "expand of a number": op(Tensor.expand, (), rest=(K,)),
    "reshape": op(Tensor.reshape, S, rest=(K * K, K)),
    "getitem": op(operator.getitem, S, rest=(0,)),
    "getitem, last": op(Tensor.__getitem__, S, rest=((..., 0),)),
    "unbind": op(torch.unbind, S, rest=(-1,)),
    "chunk": op(torch.chunk, S, rest=(K, -1)),
    "cat": op(torch.cat, (K, K), (K, K), listed=True),
    "cat, last": op(torch.cat, S, S, listed=True, dim=-1),
    "stack": op(torch.stack, (K,), (K,), listed=True),
    "cumsum": op(torch.cumsum, S, rest=(0,)),
    "amax": op(torch.amax, S, rest=(-1,)),
    "sort": op(torch.sort, S),
    "flip": op(torch.flip, S, rest=((0,),)),
    "logsumexp": op(torch.logsumexp, S, rest=(0,)),
    "norm": op(torch.linalg.vector_norm, S),
    "embedding": op(lambda w: F.embedding(torch.arange(K), w), (K, K)),
    "layer_norm": op(F.layer_norm, S, (K,), (K,)),
    "group_norm": op(lambda x, w, b: F.group_norm(x, K, w, b), (K, K, K), (K,), (K,)),
    "batch_norm": op(lambda x, w, b: F.batch_norm(x, None, None, w, b, True), S, (K,), (K,)),
    "conv1d": op(F.conv1d, S, S, (K,)),
    "conv2d": op(F.conv2d, (K, K, K, K), (K, K, 1, 1), (K,)),
    "conv_transpose1d": op(F.conv_transpose1d, S, S, (K,)),
    "max_pool1d": op(F.max_pool1d, S, rest=(K,)),
    "avg_pool2d": op(F.avg_pool2d, (K, K, K, K), rest=(K,)),
    "attention": op(F.scaled_dot_product_attention, (K, K, K, K), (K, K, K, K), (K, K, K, K)),
    "attention of two dimensions": op(F.scaled_dot_product_attention, (K, K), (K, K), (K, K)),
    "attention of other ranks": op(F.scaled_dot_product_attention, (K, K, K, K), S, (K, K)),
    "attention, causal": op(F.scaled_dot_product_attention, S, S, S, is_causal=True),
    "bilinear": op(F.bilinear, (K, K), (K, K), S, (K,)),
    "addcmul": op(torch.addcmul, (K,), (K, K), (K,)),
    "addcmul_": op(Tensor.addcmul_, (K, K), (K,), (K,)),
    "lerp": op(torch.lerp, (K,), (K, K), (K, 1)),
    "masked_fill": op(lambda x: x.masked_fill(torch.eye(K, dtype=torch.bool), 0.0), S),
    "index_add": op(lambda x, y: x.index_add(0, torch.arange(K), y), (K, K), (K, K)),
    "prelu": op(F.prelu, S, (K,)),
    "glu": op(F.glu, (K, 2 * K)),
    "lstm cell": op(torch.lstm_cell, (K, K), (K, K), (K, K), (4 * K, K), (4 * K, K), (4 * K,), (4 * K,)),
    "gru cell": op(torch.gru_cell, (K, K), (K, K), (3 * K, K), (3 * K, K), (3 * K,), (3 * K,)),
    "complex product": op(torch.mul, (K, K), (K,), dtype=torch.complex128),
    "complex sum": op(torch.add, (K, K), (K, K), dtype=torch.complex128),
    "complex abs": op(torch.abs, (K, K), dtype=torch.complex128),
    "complex linear": op(F.linear, S, (K, K), (K,), dtype=torch.complex128),
    "fft": op(torch.fft.fft, S, dtype=torch.complex128),
    "view_as_real": op(torch.view_as_real, (K, K), dtype=torch.complex128),
}  # fmt: skip


def arguments(case: Op, tensors: list[Tensor]) -> tuple[Any, ...]:
    if case.fn is torch.einsum:
        return ("abc,cd->abd", *tensors)
    if case.fn is F.layer_norm:
        return tensors[0], (K,), *tensors[1:]
    if case.fn is torch.lstm_cell:
        return tensors[0], tensors[1:3], *tensors[3:]
    return (tuple(tensors),) if case.listed else (*tensors, *case.rest)


def outputs(out: Any, args: tuple[Any, ...]) -> list[Tensor]:
    return tensors_in((out if out is not None else args[0],))


def stacked(case: Op, tensors: list[Tensor], tangents: list[Tensor | None]) -> list[tuple[Tensor, Tensor | None]]:
    engine = StackedEngine(K, {})

    def body() -> list[tuple[Tensor, Tensor | None]]:
        given = [t.clone() for t in tensors]
        for t, v in zip(given, tangents, strict=True):
            if v is not None:
                engine.inject(t, v.clone(), False)
        args = arguments(case, given)
        out = engine.call(case.fn, args, dict(case.kwargs), writes=False)
        return [(t, engine.tangent(t)) for t in outputs(out, args)]

    return engine.run(body)


def in_turn(case: Op, tensors: list[Tensor], tangents: list[Tensor | None], k: int) -> list[tuple[Tensor, Any]]:
    engine = DualEngine()

    def body() -> list[tuple[Tensor, Tensor | None]]:
        given = [
            t.clone() if v is None else pack(t.clone(), v[k].clone()) for t, v in zip(tensors, tangents, strict=True)
        ]
        args = arguments(case, given)
        try:
            out = engine.call(case.fn, args, dict(case.kwargs), writes=False)
        except NotImplementedError:  # torch's tangent is not its backward's
            out = engine.through_backward(case.fn, args, dict(case.kwargs))
        return [unpack(t) for t in outputs(out, args)]

    return engine.run(body)


def patterns(count: int) -> Iterator[tuple[bool, ...]]:
    """Which tensors have tangents: each alone, two neighbours, all."""
    for k in range(count):
        yield tuple(j == k for j in range(count))
        if k:
            yield tuple(j in (k - 1, k) for j in range(count))
    yield (True,) * count


def check(case: Op) -> None:
    with torch.no_grad():
        tensors = [torch.randn(shape, dtype=case.dtype) for shape in case.shapes]
        tensors = [t.abs() + 0.5 for t in tensors] if case.positive else tensors
        for moves in dict.fromkeys(patterns(len(tensors))):
            tangents = [
                torch.randn(K, *t.shape, dtype=t.dtype) if m else None for t, m in zip(tensors, moves, strict=True)
            ]
            found = stacked(case, tensors, tangents)
            for k in range(K):
                for (t, v), (primal, tangent) in zip(found, in_turn(case, tensors, tangents, k), strict=True):
                    torch.testing.assert_close(t, primal, rtol=1e-12, atol=1e-12)
                    if v is not None:
                        assert v.shape == (K, *t.shape) and v.dtype is t.dtype, (moves, v.shape, t.shape)
                    mine = torch.zeros_like(t) if v is None else v[k]
                    torch.testing.assert_close(
                        mine, torch.zeros_like(t) if tangent is None else tangent, rtol=1e-11, atol=1e-11,
                        msg=lambda m, moves=moves: f"{moves}: {m}",
                    )  # fmt: skip


FAMILIES = sorted({name.partition(" [")[0] for name in OPS})


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_operation_takes_a_stack_as_it_takes_one(family: str) -> None:
    for name, case in OPS.items():
        if name.partition(" [")[0] == family:
            try:
                check(case)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


# --- whole networks ---------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A convolution, then parameters of a given shape by a given operation, then a normalisation, then a head."""

    def __init__(self, apply: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], mix: str) -> None:
        super().__init__()
        self.conv, self.head, self.apply, self.mix = nn.Conv1d(2, K, 1), nn.Linear(K, 2), apply, mix
        self.s = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.apply(torch.tanh(self.conv(x)), self.s)
        if self.mix == "batch":
            h = F.batch_norm(h, None, None, training=True)
        out: Tensor = self.head(h.amax(2))
        return out


PARAMETERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "h + s": lambda h, s: h + s, "s + h": lambda h, s: s + h, "h * s": lambda h, s: h * s, "s * h": lambda h, s: s * h,
    "h - s": lambda h, s: h - s, "h / s": lambda h, s: h / s, "h += s": lambda h, s: h.add_(s),
    "h *= s": lambda h, s: h.mul_(s), "torch.add(h, s)": torch.add, "h ** s": lambda h, s: (h + 1.5) ** s,
    "s first": lambda h, s: torch.ones_like(h) * s + h, "s alone": lambda h, s: h + (s * s).sqrt(),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize("mix", ["batch", "none"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_beside_a_stack(name: str, mix: str) -> None:
    """A scalar before a batch norm whose last dimension is K: its guess is of no more dimensions than itself."""
    for shape in [(), (1,), (K,), (1, 1), (K, 1), (K, K), (1, K, K)] if mix == "batch" else [(), (K,), (K, K)]:
        for estimator in ("activation_perturbation", "directional_descent"):
            found = []
            for stack in (None, False):
                torch.manual_seed(0)
                model, x = Scaled(PARAMETERS[name], shape, mix).double(), torch.randn(6, 2, K, dtype=REAL)
                problem = Problem(
                    list(model.named_parameters()), lambda m=model, x=x: F.cross_entropy(m(x), labels(6, 2))
                )
                opt = GuessGradOptimizer(
                    problem.named, torch.optim.SGD, estimator, lr=0.0, seed=0, guesses=K, stack_guesses=stack
                )
                opt.estimate(problem.closure)
                assert stack is False or opt.estimation.plans[0].stacks
                found.append([p.grad for p in problem.parameters()])
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, s=shape: f"{s}: {m}")


class Cube(nn.Module):
    """Attention, convolution and recurrence where every size is K: examples, tokens, features, guesses."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.conv, self.norm = nn.Linear(K, 3 * K), nn.Conv1d(K, K, 1), nn.LayerNorm(K)
        self.cell, self.head, self.at = nn.GRUCell(K, K), nn.Linear(K, K), nn.Parameter(torch.randn(K, K))

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.at
        h = h + F.scaled_dot_product_attention(*self.qkv(h).chunk(3, -1))
        h = self.norm(h * torch.sigmoid(self.conv(h)))
        out: Tensor = self.head(self.cell(h.sum(1), h.amax(1)))
        return out


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("estimator", ["w_perp", "w_transpose", "downstream", "activation_perturbation"])
def test_a_network_whose_every_size_is_the_number_of_guesses(estimator: str, orthogonal: bool) -> None:
    found = []
    for stack in (None, False):
        torch.manual_seed(0)
        model, x = Cube().double(), torch.randn(K, K, K, dtype=REAL)
        opt = GuessGradOptimizer(
            model.named_parameters(), torch.optim.SGD, estimator, lr=0.0, seed=0, guesses=K, stack_guesses=stack,
            orthogonal=orthogonal,
        )  # fmt: skip
        opt.estimate(lambda m=model, x=x: F.cross_entropy(m(x), labels(K, K)))  # type: ignore[misc]
        assert stack is False or opt.estimation.plans[0].stacks
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
