"""``ValueRun``: a plain run of the closure with the guesses added to the values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from guessopt.engine.audit.digests import digest, signs
from guessopt.engine.audit.linearised import copied, flat, linearised
from guessopt.engine.audit.memo import (
    RECTIFIERS,
    Entry,
    Memo,
    NotAuditable,
    base_name,
    bits_of,
    is_linearised,
    is_number,
    snapshot,
)
from guessopt.engine.forward import ForwardRun, GuessAt
from guessopt.engine.jvp.primal import PrimalRun
from guessopt.engine.op_call import OpCall
from guessopt.engine.transaction import Transaction
from guessopt.graph import Kind, SiteGraph
from guessopt.layout import is_differentiable
from guessopt.ops.base import is_in_place
from guessopt.rng import RandomState, cuda_devices
from guessopt.sites import Site, label
from guessopt.tracing.functions import AS_IT_IS
from guessopt.tracing.tape import memory_of, version_of
from guessopt.tree import results_of


class ValueEngine(PrimalRun):
    """Guesses are added to values: ``eps`` times the guess to the site's output, or to the parameter.

    Args:
        memo: notes the sizes of values and guesses, in the first run; None in the others.
    """

    same_objects = False

    def __init__(self, eps: float, memo: Memo | None) -> None:
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
            self.memo.bits = min(self.memo.bits, bits_of(s.dtype))
            sizes = (torch.linalg.vector_norm(t.detach().abs().double()) for t in (s, y))
            self.memo.ratios.append(torch.div(*sizes))


class ValueRun(ForwardRun):
    """A plain run with ``relative * memo.scale`` times the guesses added to values.

    The run with ``relative = 0`` is the first: it fills the memo. The others take from it what the table in
    ``guessopt.engine.audit`` says.

    Attributes:
        moving: the memory of the tensors that the guesses move, in the first run.
        fakes: the memory of copies that take the place of aliases made without gradients, in the first run.
        digests: by call, digests of its outputs; None if they are not wanted.
    """

    def __init__(
        self,
        ids: Mapping[int, int],
        graph: SiteGraph,
        guess: GuessAt,
        directions: Mapping[int, Tensor],
        transaction: Transaction,
        memo: Memo,
        relative: float,
    ) -> None:
        self.eps = relative * memo.scale if relative else 0.0
        engine = ValueEngine(self.eps, None if relative else memo)
        super().__init__(ids, graph, engine, guess, directions, transaction, keeps=False)
        self.memo, self.relative, self.first = memo, relative, not relative
        self.moving: set[int] = set()
        self.fakes: set[int] = set()
        self.digests: dict[int, list[Tensor]] | None = None
        #: The copies that take the place of aliases, kept so that no other tensor gets their memory.
        self._alive: list[Tensor] = []

    def loss_of(self, closure: Callable[[], Any], params: Mapping[int, Tensor]) -> float:
        """The closure's loss with the guesses added."""
        for p, v in self.directions.items():
            self.duals[id(params[p])] = self.engine.substitute(params[p], v)
        loss = self.run(closure)
        return float(loss.detach().double().mean())

    def inject(self, site: Site, s: Tensor, in_place: bool) -> Tensor:
        if self.first:
            self.moving.add(memory_of(s))
        return super().inject(site, s, in_place)

    def perform(self, op: OpCall) -> Any:
        with AS_IT_IS if op.kind in (Kind.EXPRESSION, Kind.STOPPED) else self.no_grad:
            out = self._perform(op)
        if self.digests is not None:
            self.digests[op.index] = [digest(t) for t in results_of(out, op.tensors) if is_differentiable(t)]
        return out

    def _perform(self, op: OpCall) -> Any:
        if op.kind in (Kind.LOSS, Kind.IDLE):
            return self.differentiate(op)
        if op.kind is Kind.STOPPED:
            return self._remember_stopped(op) if self.first else self._repeat_stopped(op)
        out = super().perform(op)
        reads = op.kind is not Kind.EXPRESSION and bool(self.graph.mine[op.index])
        unlisted = reads and op.index not in self.graph.sites_at
        if unlisted:
            out = self._move(op, out)
        if self.first and (unlisted or op.kind is Kind.SITE):
            self.moving.update(map(memory_of, results_of(out, op.tensors)))
        return out

    def _move(self, op: OpCall, out: Any) -> Any:
        """Move the outputs of a call that reads parameters and has no site, by noise of their own size: the graph says
        that the loss does not depend on them."""
        leaves, spec = flat(out)
        for k, t in enumerate(leaves):
            if isinstance(t, Tensor) and is_differentiable(t) and t.numel():
                self.memo.moved = True
                noise = signs(t.numel(), op.index).to(t.device).view(t.shape)
                rms = torch.linalg.vector_norm(t.detach()) / math.sqrt(t.numel())
                shift = (noise * rms * self.relative).to(t.dtype)
                leaves[k] = t.add_(shift) if any(t is given for given in op.tensors) else t + shift
        return tree_unflatten(leaves, spec)

    # --- calls with gradients -----------------------------------------------------------------------------------------

    def differentiate(self, op: OpCall) -> Any:
        """Run an operation of the network or of the loss; no tangent is computed."""
        if self.first:
            return self._remember(op)
        entry = self.memo.entries.get(op.index)
        return self._plain_call(op) if entry is None else self._repeat(entry, op)

    def _plain_call(self, op: OpCall) -> Any:
        return self.engine.call(op.fn, op.args, op.kwargs, writes=False)

    def _remember(self, op: OpCall) -> Any:
        """Run an operation in the first run."""
        tensors = op.tensors
        if not self._moves(tensors):
            self._check_writes(op, tensors[:1])
            return self._plain_call(op)
        entry = Entry()
        name = base_name(op.fn)
        if name in RECTIFIERS:
            entry.mask = None if self.memo.light else tensors[0] > 0
        elif is_linearised(op.fn, name, tensors):
            entry.inputs = copied(op.args), copied(op.kwargs)
        versions = [version_of(t) for t in tensors]
        out = self._plain_call(op)
        written = [t for t, version in zip(tensors, versions, strict=True) if version_of(t) != version]
        self._check_writes(op, written)
        results, entry.spec = flat(out)
        entry.targets = _identities(results, tensors)
        held = [not is_differentiable(t) if isinstance(t, Tensor) else is_number(t, name) for t in results]
        entry.values = [snapshot(t) if hold else None for t, hold in zip(results, held, strict=True)]
        if results and all(held):
            entry.random = RandomState.capture(cuda_devices(tensors))
        if any(held) or entry.mask is not None or entry.inputs is not None:
            self.memo.entries[op.index] = entry
        for t in (*results, *written, *(tensors[:1] if out is None else ())):
            if isinstance(t, Tensor) and is_differentiable(t):
                self.moving.add(memory_of(t))
                if t.is_floating_point():
                    self.memo.bits = min(self.memo.bits, bits_of(t.dtype))
        return out

    def _repeat(self, entry: Entry, op: OpCall) -> Any:
        """A call that the first run has remembered, in a later run."""
        if entry.random is not None:
            values = entry.values
            entry.random.restore()
        elif entry.mask is not None:
            values = [op.tensors[0] * entry.mask]
        else:
            out = NotImplemented
            if entry.inputs is not None:
                writes = is_in_place(op.fn) or op.kwargs.get("inplace")
                out = linearised(op.fn, copied(entry.inputs) if writes else entry.inputs, (op.args, op.kwargs))
            if out is NotImplemented:
                out = self._plain_call(op)
            values, _ = flat(out)
            values = [v if kept is None else kept for v, kept in zip(values, entry.values, strict=True)]
        values = [v.clone() if isinstance(v, Tensor) and any(v is k for k in entry.values) else v for v in values]
        for k, position in entry.targets.items():  # write where the first run wrote
            if values[k] is not op.tensors[position]:
                op.tensors[position].copy_(values[k])
            values[k] = op.tensors[position]
        return tree_unflatten(values, entry.spec)

    # --- calls without gradients --------------------------------------------------------------------------------------

    def _remember_stopped(self, op: OpCall) -> Any:
        """Run an operation under ``no_grad``, ``detach`` or ``.data`` in the first run."""
        tensors = op.tensors
        versions = [version_of(t) for t in tensors]
        if not self._moves(tensors):
            out = op.fn(*op.args, **op.kwargs)
            self._check_writes(
                op, [t for t, version in zip(tensors, versions, strict=True) if version_of(t) != version]
            )
            return out
        entry = Entry()
        with torch.no_grad():
            before = {k: t.clone() for k, t in enumerate(tensors)} if _writes(op) else {}
            out = op.fn(*op.args, **op.kwargs)
            changed = [k for k, t in enumerate(tensors) if version_of(t) != versions[k]]
            self._check_writes(op, [tensors[k] for k in changed])
            for k in changed:
                if k not in before:
                    raise NotAuditable(f"{label(op.fn)} writes into its arguments without gradient")
                moves = memory_of(tensors[k]) in self.moving and is_differentiable(tensors[k])
                entry.change[k] = moves, tensors[k] - before[k] if moves else tensors[k].clone()
            results, entry.spec = flat(out)
            entry.targets = {k: p for k, p in _identities(results, tensors).items() if p in entry.change}
            read = {memory_of(t) for t in tensors}
            for k, t in enumerate(results):
                if isinstance(t, Tensor) and k not in entry.targets and memory_of(t) in read and is_differentiable(t):
                    results[k] = t.clone()
                    self.fakes.add(memory_of(results[k]))
            entry.values = [snapshot(t) if k not in entry.targets else None for k, t in enumerate(results)]
            entry.random = RandomState.capture(cuda_devices(tensors))
        if base_name(op.fn) == "detach" and is_in_place(op.fn):
            raise NotAuditable("detach_() stops gradients in place")
        self.memo.entries[op.index] = entry
        self._alive += (t for t in results if isinstance(t, Tensor))
        return tree_unflatten(results, entry.spec)

    def _repeat_stopped(self, op: OpCall) -> Any:
        """The same operation in a later run."""
        entry, tensors = self.memo.entries.get(op.index), op.tensors
        if entry is None:
            return op.fn(*op.args, **op.kwargs)
        with torch.no_grad():
            for position, (moves, change) in entry.change.items():
                tensors[position].add_(change) if moves else tensors[position].copy_(change)
            if entry.random is not None:
                entry.random.restore()
            values = [
                tensors[entry.targets[k]] if k in entry.targets else v.clone() if isinstance(v, Tensor) else v
                for k, v in enumerate(entry.values)
            ]
        return tree_unflatten(values, entry.spec)

    # --- what moves, and what may not be written ----------------------------------------------------------------------

    def _moves(self, tensors: list[Tensor]) -> bool:
        return any(memory_of(t) in self.moving for t in tensors) or any(
            t is moved for moved in self.duals.values() for t in tensors
        )

    def _check_writes(self, op: OpCall, written: list[Tensor]) -> None:
        if self.fakes and _writes(op) and any(memory_of(t) in self.fakes for t in written):
            raise NotAuditable(f"{label(op.fn)} writes through an alias made by detach() or under no_grad")


def _writes(op: OpCall) -> bool:
    """Whether an operation writes into an argument, by its name and its flags."""
    return is_in_place(op.fn) or bool(op.kwargs.get("inplace")) or op.kwargs.get("out") is not None


def _identities(results: list[Any], tensors: list[Tensor]) -> dict[int, int]:
    """Results that are arguments: by result, the argument's position."""
    found = {}
    for k, r in enumerate(results):
        for position, t in enumerate(tensors):
            if r is t:
                found[k] = position
                break
    return found
