"""Runs in forward mode beside an audit: the tangents of every call, and tangents at values moved by rounding."""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as fw
from torch import Tensor

from guessopt.engine.audit.digests import digest
from guessopt.engine.forward import ForwardRun
from guessopt.engine.jvp.fast import FastEngine
from guessopt.engine.op_call import OpCall
from guessopt.graph import Kind
from guessopt.layout import is_differentiable
from guessopt.sites import label
from guessopt.tree import results_of


class NudgedEngine(FastEngine):
    """Sites' outputs are moved by ``units`` units in the last place, their tangents are not."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.units, self.generator = units, torch.Generator().manual_seed(0)

    def inject(self, s: Tensor, y: Tensor, in_place: bool) -> Tensor:
        out = super().inject(s, y, in_place)
        signs = torch.randint(0, 2, s.shape, generator=self.generator).to(s.device, s.real.dtype) * 2 - 1
        nudge = self.primal(out) * signs * (self.units * torch.finfo(s.dtype).eps)
        return out.add_(nudge) if in_place else out + nudge


class TangentRun(ForwardRun):
    """A run in forward mode that notes a digest of the tangents of every call's outputs.

    Attributes:
        digests: by call; None for an output without tangent.
        labels: by call, the operation's name and the shape of its first output.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.digests: dict[int, list[Tensor | None]] = {}
        self.labels: dict[int, tuple[str, tuple[int, ...]]] = {}

    def perform(self, op: OpCall) -> Any:
        out = super().perform(op)
        results = [t for t in results_of(out, op.tensors) if is_differentiable(t)]
        if op.kind in (Kind.PLAIN, Kind.SITE, Kind.STOPPED) and results:
            tangents = [fw.unpack_dual(t).tangent for t in results]
            self.digests[op.index] = [None if tangent is None else digest(tangent) for tangent in tangents]
            self.labels[op.index] = label(op.fn), tuple(results[0].shape)
        return out
