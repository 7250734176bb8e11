"""The ``Op`` records, one by one: tangents, parameter gradients, pull-backs and the rest, against torch's own autograd.

The rows are in ``operations.py``. ``test_every_operation_has_a_row`` goes through the registry.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from guessopt import GuessGradOptimizer
from guessopt.engine.jvp.gaps import check_tangent
from guessopt.ops import CachedCall, Entries, MatrixRule, Op, Rule, op_of, register, register_rule
from guessopt.ops.base import OPS, UNKNOWN, without_side_effects
from guessopt.ops.elementwise import derivative, fused_pull_back, lasting_derivative, pull_back
from guessopt.sites import Call, Matrix, Value

from .calls import Built, assert_close, build
from .operations import (
    BACKWARD_ONLY,
    DRAWS,
    ENTRYWISE,
    GRADIENTS,
    IN_CONTEXT,
    IN_REVERSE,
    SPARSE,
    STACKED,
    STATISTICS,
    TANGENTS,
    Case,
    by_name,
)

# --- the registry -----------------------------------------------------------------------------------------------------

#: Records at import, before a test adds to them.
RECORDS = dict(OPS)

ROWS: dict[str, list[Case]] = {
    "tangent": TANGENTS,
    "stacked_tangent": STACKED,
    "rule": GRADIENTS,
    "entries": ENTRYWISE,
    "in_reverse": IN_REVERSE,
    "without_statistics": STATISTICS,
    "context": IN_CONTEXT,
    "draws": DRAWS,
    "backward_only": BACKWARD_ONLY,
}

#: Parts that the rows of another part test as well; those of losses and masks are in ``test_probe`` and ``test_draws``.
WITH = {
    "functions": "", "is_loss": "", "masks_by_shape": "",
    "duals": "tangent", "reuse": "tangent",
    "pull_back": "entries", "rectifier": "entries", "keeps_derivative": "entries", "is_addition": "entries",
    "treatment": "context", "fuses": "context",
}  # fmt: skip


@pytest.mark.parametrize("part", ROWS)
def test_every_operation_has_a_row(part: str) -> None:
    covered = {case.fn for case in ROWS[part]} | (SPARSE.keys() if part == "tangent" else set())
    having = [fn for fn, op in RECORDS.items() if getattr(op, part) is not getattr(UNKNOWN, part)]
    assert having
    assert [fn for fn in having if fn not in covered] == []


def test_every_part_has_a_table() -> None:
    assert {field.name for field in fields(Op)} == ROWS.keys() | WITH.keys()


def _tangent(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    return x, dx


def _reusing_tangent(x: Tensor, dx: Tensor, *, known: CachedCall | None = None) -> tuple[Tensor, Tensor]:
    return x, dx


CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "duals, reuse and stacked_tangent": {"duals": 2},
    "reuse and a tangent": {"tangent": _reusing_tangent},
    "reuse and a tangent with": {"tangent": _tangent, "reuse": id},
    "context and treatment": {"treatment": "runs otherwise"},
    "fuses": {"fuses": True},
    "pull_back needs": {"pull_back": pull_back},
    "rectifier and": {"rectifier": True, "entries": Entries.UNARY},
    "Entries.DROPOUT": {"entries": Entries.DROPOUT},
    "rule is an instance": {"rule": Rule},
    "functions are": {"functions": (3,)},
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_parts_that_contradict_each_other_are_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Op(**{"functions": (lambda x: x,), **CONTRADICTIONS[message]})


def test_a_function_has_one_record() -> None:
    with pytest.raises(ValueError, match=r"Op of relu: .*relu is in the Op of relu"):
        register(Op((torch.relu,)))
    with pytest.raises(ValueError, match="empty"):
        register(Op(()))
    assert op_of([].append) is UNKNOWN  # type: ignore[arg-type]
    unhashable: Any = {}
    assert op_of(unhashable) is UNKNOWN


def test_a_matrix_rule_has_all_of_its_methods() -> None:
    class Half(MatrixRule):
        def matrix(self, matrix: Matrix, weight: Tensor) -> Tensor:
            return weight[None]

    with pytest.raises(TypeError, match="abstract"):
        Half()  # type: ignore[abstract]


def test_a_registered_rule_leaves_the_other_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = op_of(torch.add)
    monkeypatch.setitem(OPS, torch.add, before)  # undone at the end

    @register_rule(torch.add)
    class Own(Rule):
        pass

    after = op_of(torch.add)
    assert isinstance(after.rule, Own) and after.tangent is before.tangent and after.is_addition
    assert op_of(Tensor.add) is before


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GRADIENTS, ids=by_name)
def test_gradients_are_those_of_autograd(case: Case) -> None:
    built = build(case, torch.float64)
    tensors = [a for a in (*built.args, *built.kwargs.values()) if isinstance(a, Tensor)]
    statistics = {id(a) for a in built.args[1:3]} if case.fn is F.batch_norm else set()
    wanted = [k for k, t in enumerate(tensors) if t.is_floating_point() and id(t) not in statistics]
    before = [t.clone() for t in tensors]
    rule = op_of(case.fn).rule

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


NO_MATRIX = ("linear-one-output", "addmm-scaled", "w@x")
MATRICES = [c for c in GRADIENTS if isinstance(op_of(c.fn).rule, MatrixRule) and c.name not in NO_MATRIX]


def matrix_of(built: Built) -> tuple[Matrix, Tensor, Tensor]:
    """The matrix site of a call, built by hand, with its weight and input."""
    rule = op_of(built.fn).rule
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


# --- paths from one matrix site to the next ---------------------------------------------------------------------------


def _jacobian(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(fn, x).reshape(x.numel(), -1)


PLAIN = [case for case in ENTRYWISE if op_of(case.fn).entries is not Entries.DROPOUT]


@pytest.mark.parametrize("case", PLAIN, ids=by_name)
def test_a_path_is_pulled_back_entry_by_entry(case: Case) -> None:
    built = build(case, torch.float64)
    s, rest = built.args[0], built.args[1:]
    op, call = op_of(case.fn), Call(0, case.fn, (Value(0), *rest), case.kwargs, (0,), (1,))

    def run(t: Tensor) -> Tensor:
        return case.fn(t.clone(), *rest, **case.kwargs)

    jacobian, u = _jacobian(run, s), torch.randn_like(s)
    m = jacobian.diag().view_as(s)
    assert run(s).shape == s.shape and torch.equal(jacobian, torch.diag(m.flatten()))
    found = derivative(((case.fn, run),), s)
    assert_close(torch.ones_like(s) if found is None else found.double(), m, 1e-12)
    assert_close(pull_back(((case.fn, run),), s, u), m * u, 1e-12)
    fused = fused_pull_back([call])
    assert (fused is None) is (op.pull_back is None)
    if fused is not None:
        assert_close(fused(u, s, False), m * u, 1e-12)
        assert_close(fused(u.clone(), s, True), m * u, 1e-12)
    if op.rectifier and fused is not None:
        assert_close(fused(u, run(s), False), m * u, 1e-12)
    lasting = lasting_derivative([call], s)
    assert (lasting is not None) is op.keeps_derivative
    if lasting is not None:
        assert lasting[0] is call
        assert_close(lasting[1], m, 1e-12)
    if op.is_addition:
        assert torch.equal(case.fn(s, s), s + s)


@pytest.mark.parametrize("case", [c for c in ENTRYWISE if c not in PLAIN], ids=by_name)
def test_dropout_passes_as_its_mean(case: Case) -> None:
    s = build(case, torch.float64).args[0]
    path = ((case.fn, partial(case.fn)),)
    assert case.fn(s, 0.5, False).shape == s.shape
    assert derivative(path, s) is None and pull_back(path, s, s) is s


# --- the other parts --------------------------------------------------------------------------------------------------


def _weighted(out: Any) -> Tensor:
    """A number from an operation's results, with fixed weights."""
    results = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
    return sum((t * torch.linspace(1, 2, t.numel()).to(t).view_as(t)).sum() for t in results)  # type: ignore[return-value]


def _backward(fn: Callable[..., Any], built: Built) -> list[Tensor]:
    """The gradients of ``_weighted`` with respect to the tensors with tangents."""
    copies: dict[int, Tensor] = {}

    def variable(t: Tensor) -> Tensor:
        if id(t) not in built.tangents:
            return t
        copies[id(t)] = t.detach().requires_grad_()
        return copies[id(t)]

    args = tree_map_only(Tensor, variable, built.args)
    return list(torch.autograd.grad(_weighted(fn(*args, **built.kwargs)), [copies[k] for k in built.tangents]))


@pytest.mark.parametrize("case", IN_REVERSE, ids=by_name)
def test_a_replacement_in_reverse_mode_is_the_operation(case: Case) -> None:
    built, other = build(case, torch.float64), op_of(case.fn).in_reverse
    assert other is not None
    for a, b in zip(_backward(other, built), _backward(case.fn, built), strict=True):
        assert_close(a, b, 1e-7)  # torch's hardsigmoid has 1/6 in float32
    assert_close(_weighted(other(*built.args, **built.kwargs)), _weighted(case.fn(*built.args, **built.kwargs)), 1e-12)


@pytest.mark.parametrize("case", IN_CONTEXT, ids=by_name)
def test_the_forward_derivative_in_the_context_is_the_adjoint_of_the_backward(case: Case) -> None:
    built, op = build(case, torch.float64), op_of(case.fn)
    assert op.context is not None and op.treatment

    def dual(t: Tensor) -> Tensor:
        return fw.make_dual(t, built.tangents[id(t)]) if id(t) in built.tangents else t

    with torch.no_grad(), fw.dual_level(), op.context():
        args = tree_map_only(Tensor, dual, built.args)
        along = fw.unpack_dual(_weighted(case.fn(*args, **built.kwargs))).tangent
    pulled = _backward(case.fn, built)
    assert_close(along, sum((a * b).sum() for a, b in zip(pulled, built.tangents.values(), strict=True)), 1e-10)


@pytest.mark.parametrize("case", STATISTICS, ids=by_name)
def test_without_side_effects_statistics_stay(case: Case) -> None:
    built = build(case, torch.float64)
    before = built.twin()
    out = without_side_effects(case.fn)(*built.args, **built.kwargs)
    for a, b in zip(built.args, before.args, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert torch.equal(out, case.fn(*built.args, **built.kwargs))
    assert any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in zip(built.args, before.args, strict=True))


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize("engine", ["dual", "func"])
@pytest.mark.parametrize("case", STATISTICS, ids=by_name)
def test_a_tangent_passes_where_statistics_move(case: Case, engine: str) -> None:
    gradients = []
    for name in ("fast", engine):
        torch.manual_seed(0)
        built = build(case, torch.float64)
        w, x, *rest = torch.nn.Parameter(torch.ones(3, dtype=torch.float64)), *built.args

        def closure(w: Tensor = w, x: Tensor = x, rest: list[Any] = rest, built: Built = built) -> Tensor:
            return case.fn(x * w.view(3, *(1,) * (x.dim() - 2)), *rest, **built.kwargs).pow(3).mean()

        opt = GuessGradOptimizer([w], torch.optim.SGD, "activation_perturbation", lr=0.1, seed=0, engine=name)
        opt.estimate(closure)
        assert w.grad is not None and w.grad.abs().min() > 0
        gradients.append(w.grad)
    assert_close(gradients[1], gradients[0], 1e-10)


@pytest.mark.filterwarnings("ignore:dropout")
@pytest.mark.parametrize("case", DRAWS, ids=by_name)
def test_a_call_draws_when_the_record_says_so(case: Case) -> None:
    built, op = build(case, torch.float64), op_of(case.fn)
    assert op.draws is not None
    before = torch.get_rng_state()
    case.fn(*built.args, **built.kwargs)
    assert op.draws(built.args, built.kwargs) is not torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("case", BACKWARD_ONLY, ids=by_name)
def test_a_tangent_that_is_not_the_backwards_is_refused(case: Case) -> None:
    built = build(case, torch.float64)
    with pytest.raises(NotImplementedError, match="forward AD"):
        check_tangent(case.fn, built.args, built.kwargs)
    check_tangent(torch.scatter_reduce, (), {"reduce": "sum"})
