"""Does the loss move as the tangents say?

Forward AD can lose a tangent without a word: through an operation that drops it, a write through an alias, a plan that
no longer fits. One number catches each such loss. The pass found ``D = sum_n D_n`` with the guesses ``y_i`` as
tangents. Plain runs of the closure with the guesses as *values*, ``s_i + eps y_i``, must give

    (L(eps) - L(-eps)) / (2 eps) = D.

``L`` is the loss that the closure returns, so the plan's cuts are tested as well. A call that reads a trainable
parameter but has no site in the plan is moved too: the plan says that the loss does not depend on it.

Tangents of legitimate code differ from difference quotients in some places. A first run, with ``eps = 0``, remembers
these calls where their inputs move, and the runs with ``eps`` treat them so:

- Calls under ``no_grad``, ``detach``, ``.data``: the result of the first run. Where such a call writes into a tensor
  that moves, the change that the first run made is added: the tangent passes by, as in autograd.
- Integers, booleans, Python numbers (argmax, comparisons, ``item``): the result of the first run.
- Kinks and jumps, of which a tangent knows one side (``_KINKED``: relu, clamp, round, max pooling, topk, ...), and
  draws that depend on their inputs (``bernoulli(p)``, ``rrelu``): the linear approximation at the first run's inputs,
  by torch's own derivative of that one call.
- ``autograd.Function``, operations of other libraries, tensor subclasses: the same, since their derivative may be a
  surrogate (straight-through).
- Dropout and other draws: nothing, since the random states are the same in every run.

A closure is not auditable, and the report says why, where it writes through an alias made by ``detach`` or
``no_grad``, and under ``batch_norm="frozen_statistics"``, whose tangents leave a part out by design.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.autograd.forward_ad as fw
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_unflatten

from guessopt.engine.forward import ForwardRun, Guess
from guessopt.engine.jvp.engines import DualEngine, FastEngine, JvpEngine, PrimalRun, is_foreign
from guessopt.engine.transaction import Transaction
from guessopt.errors import AuditError
from guessopt.graph import Kind, SiteGraph
from guessopt.layout import is_differentiable
from guessopt.ops.base import is_in_place
from guessopt.record import ForwardRecord
from guessopt.rng import RandomState, cuda_devices
from guessopt.sites import Site
from guessopt.tracing.answers import CustomFunction
from guessopt.tracing.functions import AS_IT_IS
from guessopt.tracing.tape import memory_of, version_of
from guessopt.tree import map_tensors, results_of, tensors_in

#: Operations whose derivative is one-sided, or one of several, or of a smooth stand-in: by name, without underscores.
_KINKED = frozenset((
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "rrelu_with_noise", "elu", "selu", "celu", "threshold",
    "hardtanh", "hardswish", "hardsigmoid", "hardshrink", "softshrink", "abs", "absolute", "clamp", "clip",
    "clamp_min", "clamp_max", "max", "min", "maximum", "minimum", "amax", "amin", "fmax", "fmin", "aminmax", "topk",
    "sort", "msort", "median", "nanmedian", "kthvalue", "mode", "cummax", "cummin", "quantile", "nanquantile",
    "max_pool1d", "max_pool2d", "max_pool3d", "max_pool1d_with_indices", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "boolean_dispatch", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "adaptive_max_pool1d_with_indices", "adaptive_max_pool2d_with_indices",
    "adaptive_max_pool3d_with_indices", "fractional_max_pool2d", "fractional_max_pool3d",
    "fractional_max_pool2d_with_indices", "fractional_max_pool3d_with_indices", "lp_pool1d", "lp_pool2d", "lp_pool3d",
    "floor", "ceil", "round", "trunc", "fix", "frac", "sign", "sgn", "heaviside", "remainder", "fmod", "floor_divide",
    "floordiv", "ifloordiv", "rfloordiv", "mod", "imod", "rmod", "copysign", "bernoulli", "poisson", "binomial",
    "standard_gamma", "sample_dirichlet", "gumbel_softmax", "angle", "atan2", "arctan2", "l1_loss", "smooth_l1_loss",
    "huber_loss", "hinge_embedding_loss", "margin_ranking_loss", "multi_margin_loss", "multilabel_margin_loss",
    "triplet_margin_loss", "triplet_margin_with_distance_loss", "cosine_embedding_loss", "cdist", "pairwise_distance",
    "pdist", "norm", "std", "std_mean", "sqrt", "rsqrt", "linalg_norm", "linalg_vector_norm", "linalg_matrix_norm",
    "vector_norm", "matrix_norm", "dist", "renorm", "nan_to_num", "embedding_bag", "segment_reduce", "scatter_reduce",
    "index_reduce", "grid_sample", "normalize", "cosine_similarity", "rnn_relu", "rnn_relu_cell", "linalg_eigh",
    "linalg_eig", "linalg_svd", "linalg_qr", "svd", "qr", "fake_quantize_per_tensor_affine",
    "fake_quantize_per_channel_affine", "fake_quantize_learnable_per_tensor_affine",
    "fake_quantize_learnable_per_channel_affine", "fused_moving_avg_obs_fake_quant",
))  # fmt: skip
#: Of these the sign of the input is all that the derivative needs: one byte an entry.
_RECTIFIERS = frozenset({"relu"})
_PYTHON_NUMBERS = (bool, int, float, complex)
_ADDRESSES = frozenset({"data_ptr", "untyped_storage", "storage", "id"})

#: By the lowest precision's bits: the first step, as a part of the values' sizes, and the factor to a smaller one; and
#: the part of the number by which tangents and differences may be apart.
_FIRST = {64: (1e-3, 0.1), 32: (1e-2, 0.25), 16: (1e-1, 0.5)}
_RELATIVE = {64: 1e-4, 32: 3e-3, 16: 2e-1}
#: Steps that are tried.
_MOST = 4


class NotAuditable(BaseException):
    """Difference quotients of this closure tell nothing. Never leaves this module."""


@dataclass(frozen=True)
class CallCheck:
    """One call of the closure in the report's table.

    Attributes:
        expected: a random projection of the tangents of its outputs.
        measured: the same projection of the difference quotients of its outputs.
        occurrence: how many calls of this operation came before it.
    """

    index: int
    op: str
    occurrence: int
    shape: tuple[int, ...]
    expected: float
    measured: float
    ok: bool

    def __str__(self) -> str:
        mark = " " if self.ok else "*"
        where = f"{self.op} no. {self.occurrence} {list(self.shape)}"
        return f"{mark} {self.index:5d}  {where:42s} {self.expected:12.5g} {self.measured:12.5g}"


@dataclass
class AuditReport:
    """The answer of ``guessopt.audit``.

    Attributes:
        expected: the derivative of the loss along the guesses by the tangents, ``sum_n D_n``.
        measured: difference quotients of the loss: relative size of the step -> quotient.
        tolerance: of the last quotient.
        skipped: why nothing was measured, or why the quotients decide nothing.
        calls: the table, if it was asked for or the audit failed.
        problem: what is wrong, in words; None if nothing is. ``ok`` is then True.

    >>> import torch, guessopt
    >>> _ = torch.manual_seed(0)
    >>> net, x = torch.nn.Linear(3, 1).double(), torch.randn(5, 3).double()
    >>> report = guessopt.audit(guessopt.GuessGradOptimizer(net.parameters()), lambda: net(x).square().mean())
    >>> report.ok, report.problem, report.skipped
    (True, None, ())
    >>> (step, quotient), = report.measured.items()
    >>> abs(quotient - report.expected) < report.tolerance
    True
    >>> print(report.calls[0])  # a call of the network: by tangents, by differences
          0  linear no. 0 [5, 1] ...
    """

    expected: float
    measured: dict[float, float] = field(default_factory=dict)
    tolerance: float = math.nan
    skipped: tuple[str, ...] = ()
    calls: tuple[CallCheck, ...] = ()
    problem: str | None = None

    @property
    def ok(self) -> bool:
        return self.problem is None

    def check(self) -> None:
        """Raise ``AuditError`` unless the audit has passed."""
        if self.problem is not None:
            raise AuditError(self.problem)

    def __str__(self) -> str:
        state = "FAILED" if self.problem else ("skipped" if self.skipped and not self.measured else "passed")
        lines = [f"audit {state}: derivative of the loss along the guesses {self.expected:.6g} by the tangents"]
        lines += [f"  {q:.6g} by differences of size {eps:.2g}" for eps, q in self.measured.items()]
        if self.measured:
            lines.append(f"  tolerance {self.tolerance:.2g}")
        lines += [f"  {note}" for note in self.skipped]
        if self.problem:
            lines.append(f"  {self.problem}")
        if self.calls:
            lines.append("   call  operation, occurrence, shape                   tangents  differences")
            lines += [f"  {call}" for call in self.calls]
        return "\n".join(lines)


@dataclass
class _Entry:
    """A call that the first run remembers.

    Attributes:
        values: its results; None for a result that later runs compute.
        spec: the nesting of its results.
        targets: number of a result -> position of the argument that it is.
        change: by argument, the change that a call without gradients has written into it.
        inputs: the arguments of a call that is linearised.
        mask: of a rectifier, where it lets its input through.
        random: the random states after the call.
    """

    values: list[Any] = field(default_factory=list)
    spec: Any = None
    targets: dict[int, int] = field(default_factory=dict)
    change: dict[int, tuple[bool, Tensor]] = field(default_factory=dict)
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    mask: Tensor | None = None
    random: RandomState | None = None


@dataclass
class _Memo:
    """What the first run leaves to the others: ``entries`` by call, and the sizes of values against their guesses."""

    entries: dict[int, _Entry] = field(default_factory=dict)
    ratios: list[Tensor] = field(default_factory=list)
    moved: bool = False
    bits: int = 64
    light: bool = False

    @cached_property
    def scale(self) -> float:
        """The step by which no guess is larger than the value that it is added to (but for values near zero)."""
        found = torch.stack([ratio.double().cpu() for ratio in self.ratios]) if self.ratios else torch.ones(1)
        found = found[torch.isfinite(found) & (found > 0)]
        return max(float(found.min()), float(found.median()) / 100) if found.numel() else 1.0


class _ValueLevel(PrimalRun):
    """Guesses are values: ``eps`` times the guess is added to the site's output, or to the parameter."""

    same_objects = False

    def __init__(self, eps: float, memo: _Memo | None) -> None:
        super().__init__()
        self.eps, self.memo = eps, memo

    def inject(self, s: Tensor, y: Tensor, in_place: bool) -> Tensor:
        self._measure(s, y)
        y = y.to(s.dtype)
        return s.add_(y, alpha=self.eps) if in_place else torch.add(s, y, alpha=self.eps)

    def substitute(self, p: Tensor, v: Tensor) -> Tensor:
        self._measure(p, v)
        return torch.add(p.detach(), v.to(p.dtype), alpha=self.eps)

    def _measure(self, s: Tensor, y: Tensor) -> None:
        if self.memo is not None:
            self.memo.moved = True
            self.memo.bits = min(self.memo.bits, _bits(s.dtype))
            sizes = (torch.linalg.vector_norm(t.detach().abs().double()) for t in (s, y))
            self.memo.ratios.append(torch.div(*sizes))


class _NudgedLevel(FastEngine):
    """Sites' outputs are moved by some units in the last place, their tangents are not."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.units, self.generator = units, torch.Generator().manual_seed(0)

    def inject(self, s: Tensor, y: Tensor, in_place: bool) -> Tensor:
        out = super().inject(s, y, in_place)
        signs = torch.randint(0, 2, s.shape, generator=self.generator).to(s.device, s.real.dtype) * 2 - 1
        nudge = self.primal(out) * signs * (self.units * torch.finfo(s.dtype).eps)
        return out.add_(nudge) if in_place else out + nudge


class _Run(ForwardRun):
    """A plain run of the closure with the guesses added to values, ``relative`` times ``memo.scale``. The run with 0 is
    the first: it fills the memo."""

    def __init__(
        self, ids: Mapping[int, int], graph: SiteGraph, guess: Guess, directions: Mapping[int, Tensor],
        transaction: Transaction,
        memo: _Memo, relative: float,
    ) -> None:  # fmt: skip
        self.eps = relative * memo.scale if relative else 0.0
        engine = _ValueLevel(self.eps, None if relative else memo)
        super().__init__(ids, graph, engine, guess, directions, transaction, keeps=False)
        self.memo, self.relative, self.first = memo, relative, not relative
        self.moving: set[int] = set()
        self.fakes: set[int] = set()
        self.digests: dict[int, list[Tensor]] | None = None
        #: Copies that stand for aliases: their memory must not become another tensor's.
        self._alive: list[Tensor] = []

    def loss(self, closure: Callable[[], Any], params: Mapping[int, Tensor]) -> float:
        for p, v in self.directions.items():
            self.duals[id(params[p])] = self.engine.substitute(params[p], v)
        loss = self.run(closure)
        return float(loss.detach().double().mean())

    def inject(self, site: Site, s: Tensor, in_place: bool) -> Tensor:
        if self.first:
            self.moving.add(memory_of(s))
        return super().inject(site, s, in_place)

    def _run(
        self,
        index: int,
        kind: Kind,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
    ) -> Any:
        mine = self.graph.mine[index]
        with self.no_grad if kind in (Kind.LOSS, Kind.PLAIN, Kind.SITE, Kind.IDLE) else AS_IT_IS:
            if kind in (Kind.LOSS, Kind.IDLE):
                out = self._call(index, fn, args, kwargs)
            elif kind is Kind.STOPPED:
                out = self._stopped(index, fn, args, kwargs, tensors)
            else:
                out = super()._run(index, kind, fn, args, kwargs, tensors)
                unlisted = kind is not Kind.EXPRESSION and bool(mine) and index not in self.graph.sites_at
                if kind is Kind.SITE or unlisted:
                    if unlisted:
                        out = self._move(index, out, tensors)
                    if self.first:
                        self.moving.update(map(memory_of, results_of(out, tensors)))
        if self.digests is not None:
            self.digests[index] = [_digest(t) for t in results_of(out, tensors) if is_differentiable(t)]
        return out

    def _move(self, index: int, out: Any, tensors: list[Tensor]) -> Any:
        """Move the outputs of a call that reads parameters and has no site, by noise of their own size: the plan says
        that the loss does not depend on them."""
        leaves, spec = _flat(out)
        for k, t in enumerate(leaves):
            if isinstance(t, Tensor) and is_differentiable(t) and t.numel():
                self.memo.moved = True
                noise = _signs(t.numel(), index).to(t.device).view(t.shape)
                rms = torch.linalg.vector_norm(t.detach()) / math.sqrt(t.numel())
                shift = (noise * rms * self.relative).to(t.dtype)
                leaves[k] = t.add_(shift) if any(t is given for given in tensors) else t + shift
        return tree_unflatten(leaves, spec)

    def _call(self, index: int, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.first:
            entry = self.memo.entries.get(index)
            return self._plain(fn, args, kwargs) if entry is None else self._again(entry, fn, args, kwargs)
        tensors = tensors_in(args, kwargs)
        if not self._moves(tensors):
            self._check_writes(fn, tensors[:1], kwargs)
            return self._plain(fn, args, kwargs)
        entry = _Entry()
        name = _name(fn)
        if name in _RECTIFIERS:
            entry.mask = None if self.memo.light else tensors[0] > 0
        elif _is_linearised(fn, name, tensors):
            entry.inputs = _copied(args), _copied(kwargs)
        versions = [version_of(t) for t in tensors]
        out = self._plain(fn, args, kwargs)
        written = [t for t, version in zip(tensors, versions, strict=True) if version_of(t) != version]
        self._check_writes(fn, written, kwargs)
        results, entry.spec = _flat(out)
        entry.targets = _identities(results, tensors)
        held = [not is_differentiable(t) if isinstance(t, Tensor) else _is_number(t, name) for t in results]
        entry.values = [_kept(t) if hold else None for t, hold in zip(results, held, strict=True)]
        if results and all(held):
            entry.random = RandomState.capture(cuda_devices(tensors))
        if any(held) or entry.mask is not None or entry.inputs is not None:
            self.memo.entries[index] = entry
        for t in (*results, *written, *(tensors[:1] if out is None else ())):
            if isinstance(t, Tensor) and is_differentiable(t):
                self.moving.add(memory_of(t))
                if t.is_floating_point():
                    self.memo.bits = min(self.memo.bits, _bits(t.dtype))
        return out

    def _plain(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.engine.call(fn, args, kwargs, writes=False)

    def _again(self, entry: _Entry, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that the first run has remembered; see the list at the top of this module."""
        tensors = tensors_in(args, kwargs)
        if entry.random is not None:
            values = entry.values
            entry.random.restore()
        elif entry.mask is not None:
            values = [tensors[0] * entry.mask]
        else:
            if entry.inputs is not None:
                writes = is_in_place(fn) or kwargs.get("inplace")
                out = linearised(fn, _copied(entry.inputs) if writes else entry.inputs, (args, kwargs))
                if out is NotImplemented:
                    out = self._plain(fn, args, kwargs)
            else:
                out = self._plain(fn, args, kwargs)
            values, _ = _flat(out)
            values = [v if kept is None else kept for v, kept in zip(values, entry.values, strict=True)]
        return self._results(entry, values, tensors)

    @staticmethod
    def _results(entry: _Entry, values: list[Any], tensors: list[Tensor]) -> Any:
        """The call's results, written where the first run wrote them."""
        values = [v.clone() if isinstance(v, Tensor) and any(v is k for k in entry.values) else v for v in values]
        for k, position in entry.targets.items():
            if values[k] is not tensors[position]:
                tensors[position].copy_(values[k])
            values[k] = tensors[position]
        return tree_unflatten(values, entry.spec)

    def _stopped(
        self, index: int, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        if not self.first:
            entry = self.memo.entries.get(index)
            if entry is None:
                return fn(*args, **kwargs)
            with torch.no_grad():
                for position, (moves, change) in entry.change.items():
                    tensors[position].add_(change) if moves else tensors[position].copy_(change)
                if entry.random is not None:
                    entry.random.restore()
                values = [tensors[entry.targets[k]] if k in entry.targets else v for k, v in enumerate(entry.values)]
                values = [v.clone() if isinstance(v, Tensor) and k not in entry.targets else v
                          for k, v in enumerate(values)]  # fmt: skip
            return tree_unflatten(values, entry.spec)
        versions = [version_of(t) for t in tensors]
        if not self._moves(tensors):
            out = fn(*args, **kwargs)
            written = [t for t, version in zip(tensors, versions, strict=True) if version_of(t) != version]
            self._check_writes(fn, written, kwargs)
            return out
        entry = _Entry()
        with torch.no_grad():
            writes = is_in_place(fn) or bool(kwargs.get("inplace")) or kwargs.get("out") is not None
            before = {k: t.clone() for k, t in enumerate(tensors)} if writes else {}
            out = fn(*args, **kwargs)
            changed = [k for k, t in enumerate(tensors) if version_of(t) != versions[k]]
            self._check_writes(fn, [tensors[k] for k in changed], kwargs)
            for k in changed:
                if k not in before:
                    raise NotAuditable(f"{_label(fn)} writes into its arguments without gradient")
                moves = memory_of(tensors[k]) in self.moving and is_differentiable(tensors[k])
                entry.change[k] = moves, tensors[k] - before[k] if moves else tensors[k].clone()
            results, entry.spec = _flat(out)
            entry.targets = {k: p for k, p in _identities(results, tensors).items() if p in entry.change}
            read = {memory_of(t) for t in tensors}
            for k, t in enumerate(results):
                if isinstance(t, Tensor) and k not in entry.targets and memory_of(t) in read and is_differentiable(t):
                    results[k] = t.clone()
                    self.fakes.add(memory_of(results[k]))
            entry.values = [_kept(t) if k not in entry.targets else None for k, t in enumerate(results)]
            entry.random = RandomState.capture(cuda_devices(tensors))
        if _name(fn) == "detach" and is_in_place(fn):
            raise NotAuditable("detach_() stops gradients in place")
        self.memo.entries[index] = entry
        self._alive += (t for t in results if isinstance(t, Tensor))
        return tree_unflatten(results, entry.spec)

    def _moves(self, tensors: list[Tensor]) -> bool:
        return any(memory_of(t) in self.moving for t in tensors) or any(
            t is moved for moved in self.duals.values() for t in tensors
        )

    def _check_writes(self, fn: Callable[..., Any], written: list[Tensor], kwargs: dict[str, Any]) -> None:
        writes = is_in_place(fn) or kwargs.get("inplace") or kwargs.get("out") is not None
        if self.fakes and writes and any(memory_of(t) in self.fakes for t in written):
            raise NotAuditable(f"{_label(fn)} writes through an alias made by detach() or under no_grad")


class _Tangents(ForwardRun):
    """A forward-mode pass that notes a digest of the tangents that every call leaves."""

    digests: dict[int, list[Tensor | None]]
    labels: dict[int, tuple[str, tuple[int, ...]]]

    def _run(
        self,
        index: int,
        kind: Kind,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
    ) -> Any:
        out = super()._run(index, kind, fn, args, kwargs, tensors)
        results = [t for t in results_of(out, tensors) if is_differentiable(t)]
        if kind in (Kind.PLAIN, Kind.SITE, Kind.STOPPED) and results:
            tangents = [fw.unpack_dual(t).tangent for t in results]
            self.digests[index] = [None if tangent is None else _digest(tangent) for tangent in tangents]
            self.labels[index] = _label(fn), tuple(results[0].shape)
        return out


def linearised(
    fn: Callable[..., Any],
    base: tuple[tuple[Any, ...], dict[str, Any]],
    given: tuple[tuple[Any, ...], dict[str, Any]],
) -> Any:
    """``fn`` at the base arguments plus its derivative along the way from there to the given ones; ``NotImplemented``
    for an operation of torch that has no forward derivative."""
    (bases, spec), (there, _) = tree_flatten(base), tree_flatten(given)
    engine = DualEngine()

    def body() -> Any:
        packed = [
            fw.make_dual(b, (t.detach() - b).to(b.dtype))
            if isinstance(b, Tensor) and is_differentiable(b) and not is_traceable_wrapper_subclass(b)
            else b
            for b, t in zip(bases, there, strict=True)
        ]
        dual_args, dual_kwargs = tree_unflatten(packed, spec)
        try:
            if is_foreign(fn):
                raise NotImplementedError
            out = engine.call(fn, dual_args, dual_kwargs, writes=False)
        except NotImplementedError:
            try:
                out = engine.through_backward(fn, dual_args, dual_kwargs)
            except (RuntimeError, NotImplementedError):
                if isinstance(fn, CustomFunction) or is_foreign(fn):
                    raise NotAuditable(f"{_label(fn)} has no derivative of its own to compare with") from None
                return NotImplemented
        if out is NotImplemented:
            return out
        leaves, outs = _flat(out)
        for k, t in enumerate(leaves):
            if isinstance(t, Tensor) and is_differentiable(t):
                primal, tangent = fw.unpack_dual(t)
                leaves[k] = primal.detach() if tangent is None else primal.detach() + tangent
        return tree_unflatten(leaves, outs)

    with torch.no_grad():
        return engine.run(body)


#: Starts the pass's guesses again: a guess function for the sites, and the guesses for parameters.
Guesses = Callable[[], "tuple[Guess, Mapping[int, Tensor]]"]


@dataclass
class Audit:
    """One audit: plain runs of ``closure`` along ``graph``.

    Args:
        guesses: called before every run; returns the pass's guess function and its ``directions``.
        record: of the pass; of several guesses the first is tested.
        light: keep as little as possible: the guesses do not depend on what the network computes and are made again in
            each run, and a rectifier's kinks count as curvature.
        rtol: relative difference of the loss that other kernels may cause.
    """

    closure: Callable[[], Any]
    graph: SiteGraph
    guesses: Guesses
    ids: Mapping[int, int]
    params: Mapping[int, Tensor]
    transaction: Transaction
    record: ForwardRecord
    rtol: float = 0.0
    memo: _Memo = field(default_factory=_Memo)
    light: bool = False
    #: By site, the guesses of the first run. Later runs use them again: from moved values other guesses would come.
    made: dict[int, Any] = field(default_factory=dict)

    @cached_property
    def expected(self) -> float:
        d = self.record.d
        return float((d[0] if d.dim() == 2 else d).double().sum())

    @cached_property
    def slack(self) -> float:
        """The rounding error of ``expected``, a sum of products of tangents that many calls have rounded."""
        several, bulk = self.record.d.dim() == 2, 0.0
        for e, t in zip(self.record.errors, self.record.tangents, strict=True):
            if t is not None:
                bulk += float((e.double() * (t[0] if several else t).double()).abs().sum())
        return 32 * bulk * max((torch.finfo(site.dtype).eps for site in self.graph.sites), default=0.0)

    def report(self, *, calls: bool = False) -> AuditReport:
        """Run the audit. Afterwards everything that the closure writes is as before the first run."""
        report = AuditReport(self.expected)
        try:
            self._measure(report)
            if report.problem == "" and self._is_rounding(report):
                report.problem, report.skipped = None, ("rounding decides on the derivative itself",)
            if calls or report.problem is not None:
                report.calls = self._table()
        except NotAuditable as why:
            return AuditReport(self.expected, skipped=(f"not auditable: {why}",))
        finally:
            self.transaction.rewind()
        if report.problem == "":
            report.problem = self._describe(report)
        return report

    def _at(self, relative: float) -> float:
        return self._run(relative).loss(self.closure, self.params)

    def _run(self, relative: float) -> _Run:
        self.transaction.rewind()
        guess, directions = self.guesses()
        self.memo.light = self.light
        if self.light:
            return _Run(self.ids, self.graph, guess, directions, self.transaction, self.memo, relative)

        def same(site: Site, s: Tensor, values: dict[int, Tensor]) -> Any:
            if relative == 0.0 or site.index not in self.made:
                self.made[site.index] = guess(site, s, values)
            return self.made[site.index]

        return _Run(self.ids, self.graph, same, directions, self.transaction, self.memo, relative)

    def _measure(self, report: AuditReport) -> None:
        base, loss = self._at(0.0), float(self.record.loss)
        if not self.memo.moved:
            report.skipped = ("no guess was made",)
            return
        close = math.isclose(base, loss, rel_tol=max(1e-3, 4 * self.rtol), abs_tol=1e-5)
        if not close and self._at(0.0) == base and abs(base - loss) <= 100 * self._rounding(base):
            report.skipped = ("rounding alone moves the loss",)
            return
        if not close:
            report.problem = (
                f"the closure does not repeat: a run from the same random state gave the loss {base:.6g} in place of "
                f"{loss:.6g}; take the batch before the step, not from an iterator in the closure, and draw noise from "
                "a generator of torch, numpy or random. audit=False goes on without this check"
            )
            return
        bits, noise, last = self.memo.bits, 0.0, None
        relative, factor = _FIRST[bits]
        for _ in range(_MOST):
            eps = relative * self.memo.scale
            ahead, behind = self._at(relative), self._at(-relative)
            # A kink's one-sided derivatives are q - kink and q + kink; of a smooth loss, kink shrinks with eps.
            q, kink = (ahead - behind) / (2 * eps), abs(ahead - 2 * base + behind) / (2 * eps)
            report.measured[relative] = q
            off, most = abs(q - self.expected), max(abs(q), abs(self.expected))
            rounding = max(2 * self._loss_eps * abs(base), 6 * noise) / eps
            report.tolerance = _RELATIVE[bits] * most + self.slack + rounding
            # A step that should change the loss by much of its own size says nothing of a derivative.
            small = abs(self.expected) * eps <= 0.1 * max(abs(base), 1.0)
            if off == 0 or (off <= report.tolerance and rounding <= 0.1 * most):
                return
            if last is not None:
                noise = noise or self._rounding(base)
                rounding, drift = max(rounding, 6 * noise / eps), abs(q - last[0])
                report.tolerance = _RELATIVE[bits] * most + self.slack + rounding + kink + 3 * drift
                if off <= report.tolerance <= 0.5 * most:
                    return
                converged = drift <= 0.1 * max(abs(q), abs(last[0])) + rounding
                if small and converged and last[1] > last[2] + 6 * noise / last[3] and off > report.tolerance:
                    report.problem = ""
                    return
            last = q, off, report.tolerance, eps
            relative = relative * factor if kink >= rounding or not small else relative / factor
            if relative in report.measured or not math.isfinite(q):
                break
        report.skipped = ("no certainty: rounding, or a loss that is not smooth",)

    def _is_rounding(self, report: AuditReport) -> bool:
        """Whether ``expected`` itself moves as sites' outputs move by a few units in the last place (a standard
        deviation of equal numbers, the normalisation of what has cancelled)."""
        off = abs(list(report.measured.values())[-1] - self.expected)

        def apart(units: int) -> float:
            self.transaction.rewind()
            guess, directions = self.guesses()
            run = ForwardRun(
                self.ids, self.graph, _NudgedLevel(units), guess, directions, self.transaction, keeps=False
            )
            return abs(float(run.execute(self.closure, self.params).d.double().sum()) - self.expected)

        if not abs(apart(0) - apart(0)) <= 1e-6 * off:
            return False  # the closure does not repeat
        return not all(apart(units) <= 0.1 * off for units in (8, -8))

    def _rounding(self, base: float) -> float:
        """How far the loss jumps by rounding: from runs that are moved by a few units in the last place."""
        eps = _EPS[self.memo.bits]
        tiny = [self._at(sign * k * eps) for k in (2, 3) for sign in (1, -1)]
        return max(*(abs(loss - base) for loss in tiny), 4 * self._loss_eps * abs(base))

    @property
    def _loss_eps(self) -> float:
        return _EPS[64] if self.memo.bits == 64 else _EPS[32]

    def _table(self) -> tuple[CallCheck, ...]:
        """Every call's tangents against difference quotients."""
        first, factor = _FIRST[self.memo.bits]
        relative = first * factor
        runs = []
        for sign in (1, -1):
            runs.append(run := self._run(sign * relative))
            run.digests = {}
            run.loss(self.closure, self.params)
        self.transaction.rewind()
        guess, directions = self.guesses()
        engine: JvpEngine = FastEngine()
        tangents = _Tangents(self.ids, self.graph, engine, guess, directions, self.transaction, keeps=False)
        tangents.digests, tangents.labels = {}, {}
        tangents.execute(self.closure, self.params)
        plus, minus = (run.digests or {} for run in runs)
        eps, checks, seen = relative * self.memo.scale, [], Counter[str]()
        tolerance, ulp = 5 * _RELATIVE[self.memo.bits], _EPS[self.memo.bits]
        for index, digests in tangents.digests.items():
            op, shape = tangents.labels[index]
            occurrence, seen[op] = seen[op], seen[op] + 1
            worst: tuple[float, float, float] = 0.0, 0.0, -math.inf
            for a, b, t in zip(plus.get(index, ()), minus.get(index, ()), digests, strict=False):
                q = (a - b) / (2 * eps)
                t = torch.zeros_like(q) if t is None else t
                size = float(torch.maximum(q.abs(), t.abs()).max())
                excess = (q - t).abs() - tolerance * size - 16 * ulp * float(a.abs().max() + 1e-300) / eps
                k = int(excess.argmax())
                worst = max(worst, (float(t[k]), float(q[k]), float(excess[k])), key=lambda w: w[2])
            checks.append(CallCheck(index, op, occurrence, shape, worst[0], worst[1], worst[2] <= 0))
        return tuple(checks)

    def _describe(self, report: AuditReport) -> str:
        q = list(report.measured.values())[-1]
        first = next((call for call in report.calls if not call.ok), None)
        numbers = (
            f"the loss does not move as its tangents say: along the guesses its derivative is {report.expected:.6g} by "
            f"the tangents and {q:.6g} by differences (tolerance {report.tolerance:.2g})"
        )
        if first is None:
            where = (
                "every call up to the loss agrees, so the loss reads another value than the plan says, or writes into "
                "a value that is read later"
            )
        else:
            where = (
                f"the first call that departs is {first.op} (occurrence {first.occurrence} of this operation, its "
                f"output of shape {list(first.shape)}): {first.expected:.6g} by tangents, {first.measured:.6g} by "
                "differences"
            )
        return (
            f"{numbers}; {where}. Report this, or write the operation as a torch.autograd.Function with a jvp; "
            "audit=False goes on, perhaps with wrong gradients"
        )


_EPS = {64: torch.finfo(torch.float64).eps, 32: torch.finfo(torch.float32).eps, 16: torch.finfo(torch.bfloat16).eps}


def _bits(dtype: torch.dtype) -> int:
    return max(16, min(64, torch.finfo(dtype).bits))


def _name(fn: Callable[..., Any]) -> str:
    name = getattr(fn, "__name__", "")
    return name.split(".")[0].strip("_") if isinstance(name, str) else ""


def _label(fn: Callable[..., Any]) -> str:
    return str(getattr(fn, "__name__", fn))


def _is_linearised(fn: Callable[..., Any], name: str, tensors: list[Tensor]) -> bool:
    return (
        name in _KINKED
        or isinstance(fn, CustomFunction)
        or is_foreign(fn)
        or any(is_traceable_wrapper_subclass(t) for t in tensors)
    )


def _is_number(value: Any, name: str) -> bool:
    return name not in _ADDRESSES and (isinstance(value, _PYTHON_NUMBERS) or type(value).__name__ == "ndarray")


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if type(value).__name__ == "ndarray" else value


def _copied(node: Any) -> Any:
    return map_tensors(node, lambda t: t if is_traceable_wrapper_subclass(t) else t.detach().clone())


def _flat(out: Any) -> Any:
    """``tree_flatten`` that leaves a size a size: ``t.new(size)`` takes a tuple for data."""
    return tree_flatten(out, is_leaf=lambda node: isinstance(node, torch.Size))


def _identities(results: list[Any], tensors: list[Tensor]) -> dict[int, int]:
    """Results that are arguments: by result, the argument's position."""
    found = {}
    for k, r in enumerate(results):
        for position, t in enumerate(tensors):
            if r is t:
                found[k] = position
                break
    return found


def _signs(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (count,), generator=generator).double() * 2 - 1


def _digest(t: Tensor) -> Tensor:
    """Three random projections of a tensor. Two tensors that differ have different projections, almost surely."""
    t = t.detach()
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    flat = t.double().reshape(-1).cpu()
    return torch.stack([flat @ _signs(flat.numel(), seed) for seed in range(3)])
