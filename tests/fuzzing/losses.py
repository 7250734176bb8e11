"""The losses. Each gets the maker, the network's output and a reduction, and returns a function of the output.

Reductions: "mean", "sum", "per_example" (losses of shape [N]).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzzing.parts import FEATURES, LOSSES, SPATIAL, Fn, Maker, loss, need


def _reduced(m: Maker, values: Tensor, reduction: str) -> Tensor:
    """Losses by place -> scalar, or one per example."""
    if reduction != "per_example":
        return values.mean() if reduction == "mean" else values.sum()
    n, kind = m.built.batch, m.kind
    if kind in ("time", "merged_time"):
        values = values.unflatten(0, (-1, n)) if kind == "merged_time" else values
        return values.transpose(0, 1).flatten(1).sum(1)
    return (values.unflatten(0, (n, -1)) if kind == "merged" else values).reshape(n, -1).sum(1)


def _torch_reduction(reduction: str) -> str:
    return "none" if reduction == "per_example" else reduction


def _head(m: Maker, h: Tensor, classes: int) -> Fn:
    if m.kind in SPATIAL:
        layer = m.linear(h[0].numel(), classes)
        return lambda h: layer(h.flatten(1))
    layer = m.linear(h.shape[-1], classes)
    return lambda h: layer(h)


@loss()
def square(m: Maker, h: Tensor, reduction: str) -> Fn:
    """Written by hand, on the output itself."""
    scale = m.parameter(1, mean=1.0, std=0.2)
    return lambda h: _reduced(m, (h * scale).square(), reduction)


@loss("weights ignore smoothing probabilities channels_second everything head_free")
def cross_entropy(m: Maker, h: Tensor, reduction: str, variant: str) -> Fn:
    if variant == "head_free":
        need(m.kind in FEATURES and h.shape[-1] > 1)
    classes = h.shape[-1] if variant == "head_free" else 3
    head: Fn = (lambda h: h) if variant == "head_free" else _head(m, h, classes)
    places = m.shaped()
    options: dict[str, Any] = {}
    if variant in ("ignore", "everything"):
        options["ignore_index"] = 1
    if variant in ("smoothing", "everything"):
        options["label_smoothing"] = 0.1
    weighted = m.constant(classes) if variant in ("weights", "everything") else None
    if variant == "probabilities":
        target = m.data(lambda n: torch.rand(*places(n), classes, dtype=torch.float64).softmax(-1))
    else:  # class 0 for the first: never all of them ignored
        target = m.data(lambda n: (torch.arange(math.prod(places(n))) % classes).reshape(places(n)))

    def run(h: Tensor) -> Tensor:
        z, y = head(h), target()
        own = dict(options)
        if weighted is not None:
            own["weight"] = weighted().sigmoid() + 0.2
        if variant == "channels_second":
            values = F.cross_entropy(z.movedim(-1, 1), y, reduction=_torch_reduction(reduction), **own)
        else:
            rows = y.flatten(0, -2) if variant == "probabilities" else y.flatten()
            values = F.cross_entropy(z.flatten(0, -2), rows, reduction=_torch_reduction(reduction), **own)
            values = values.view(y.shape[: z.dim() - 1]) if values.dim() else values
        return _reduced(m, values, reduction) if values.dim() else values

    return run


def _regression(m: Maker, h: Tensor) -> tuple[Fn, Callable[[], Tensor]]:
    places = m.shaped()
    return _head(m, h, 2), m.data(lambda n: torch.rand(*places(n), 2, dtype=torch.float64))


def _simple(function: Callable[..., Tensor]) -> Callable[[Maker, Tensor, str], Fn]:
    """A loss of torch's with input, target and reduction."""

    def make(m: Maker, h: Tensor, reduction: str) -> Fn:
        head, target = _regression(m, h)

        def run(h: Tensor) -> Tensor:
            values = function(head(h), target(), reduction=_torch_reduction(reduction))
            return _reduced(m, values, reduction) if values.dim() else values

        return run

    return make


LOSSES["mse"] = _simple(F.mse_loss)
LOSSES["smooth_l1"] = _simple(F.smooth_l1_loss)
LOSSES["huber"] = _simple(F.huber_loss)
LOSSES["binary"] = _simple(F.binary_cross_entropy_with_logits)
LOSSES["soft_margin"] = _simple(lambda z, y, **k: F.soft_margin_loss(z, 2 * (y > 0.5) - 1.0, **k))
LOSSES["poisson"] = _simple(F.poisson_nll_loss)
LOSSES["l1"] = _simple(F.l1_loss)
LOSSES["gaussian"] = _simple(lambda z, y, **k: F.gaussian_nll_loss(z, y, z.square() + 0.3, **k))
LOSSES["modules"] = _simple(lambda z, y, **k: nn.MSELoss(**k)(z, y))


@loss()
def nll(m: Maker, h: Tensor, reduction: str) -> Fn:
    head, places = _head(m, h, 3), m.shaped()
    target = m.data(lambda n: torch.randint(3, places(n)))

    def run(h: Tensor) -> Tensor:
        values = F.nll_loss(
            F.log_softmax(head(h), -1).flatten(0, -2), target().flatten(), reduction=_torch_reduction(reduction)
        )
        return _reduced(m, values.view(target().shape), reduction) if values.dim() else values

    return run


@loss("batchmean")
def kl(m: Maker, h: Tensor, reduction: str, variant: str) -> Fn:
    head, places = _head(m, h, 3), m.shaped()
    target = m.data(lambda n: torch.rand(*places(n), 3, dtype=torch.float64).softmax(-1))
    need(not (variant and reduction == "per_example"))

    def run(h: Tensor) -> Tensor:
        z = F.log_softmax(head(h), -1)
        values = F.kl_div(z, target(), reduction=variant or _torch_reduction(reduction))
        return _reduced(m, values, reduction) if values.dim() else values

    return run


@loss()
def cosine(m: Maker, h: Tensor, reduction: str) -> Fn:
    need(m.kind == "rows")
    head, other = _regression(m, h)
    sign = m.data(lambda n: torch.arange(n) % 2 * 2.0 - 1)
    return lambda h: F.cosine_embedding_loss(head(h), other(), sign(), 0.1, reduction=_torch_reduction(reduction))


@loss()
def margin(m: Maker, h: Tensor, reduction: str) -> Fn:
    need(m.kind == "rows")
    a, b = _head(m, h, 1), _head(m, h, 1)
    sign = m.data(lambda n: torch.arange(n) % 2 * 2.0 - 1)

    def run(h: Tensor) -> Tensor:
        return F.margin_ranking_loss(a(h)[:, 0], b(h)[:, 0], sign(), 0.3, reduction=_torch_reduction(reduction))

    return run


@loss()
def triplet(m: Maker, h: Tensor, reduction: str) -> Fn:
    need(m.kind == "rows")
    head, other = _regression(m, h)
    return lambda h: F.triplet_margin_loss(head(h), other(), other().flip(-1), reduction=_torch_reduction(reduction))


@loss("temperature")
def contrastive(m: Maker, h: Tensor, reduction: str, variant: str) -> Fn:
    """Every example's loss reads every example."""
    need(m.kind == "rows" and reduction == "mean" and len(h) > 1)
    a, b = _head(m, h, 3), _head(m, h, 3)
    scale = m.parameter(1) if variant else None

    def run(h: Tensor) -> Tensor:
        scores = F.normalize(a(h), dim=-1, eps=1e-3) @ F.normalize(b(h), dim=-1, eps=1e-3).mT
        scores = scores * (scale.exp() if scale is not None else 5.0)
        return F.cross_entropy(scores, torch.arange(len(h)))

    return run


@loss("temperature sequence_mean masked_mean")
def handwritten(m: Maker, h: Tensor, reduction: str, variant: str) -> Fn:
    head, places = _head(m, h, 3), m.shaped()
    target = m.data(lambda n: torch.randint(3, places(n)))
    temperature = m.parameter(1, mean=1.0, std=0.1) if variant == "temperature" else None
    need(variant != "masked_mean" or reduction == "mean")
    weight = m.data(lambda n: (torch.arange(math.prod(places(n))) % 3 != 1).double().reshape(places(n)))

    def run(h: Tensor) -> Tensor:
        z = head(h)
        if temperature is not None:
            z = z / temperature.exp()
        values = -torch.log_softmax(z, -1).gather(-1, target()[..., None])[..., 0]
        if variant == "masked_mean":
            return (values * weight()).sum() / weight().sum()
        return _reduced(m, values, reduction)

    return run


@loss()
def weight_decay(m: Maker, h: Tensor, reduction: str) -> Fn:
    """The parameters, read by the loss as well."""
    need(reduction != "per_example")
    layer = m.linear(h.shape[-1], 2) if m.kind in FEATURES else None
    need(layer is not None)

    def run(h: Tensor) -> Tensor:
        values = _reduced(m, layer(h).square(), reduction)  # type: ignore[misc]
        return values + 0.1 * sum(p.square().sum() for p in m.built.model.parameters())

    return run


@loss()
def spectrum(m: Maker, h: Tensor, reduction: str) -> Fn:
    """Through complex numbers."""
    need(m.kind in FEATURES)
    head, places = _head(m, h, 4), m.shaped()
    target = m.data(lambda n: torch.randn(*places(n), 4, dtype=torch.float64))

    def run(h: Tensor) -> Tensor:
        a, b = torch.fft.rfft(head(h)), torch.fft.rfft(target())
        return _reduced(m, (a - b).abs().square(), reduction)

    return run
