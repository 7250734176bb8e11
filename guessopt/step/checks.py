"""Checks of the closure (its loss, its repeatability) and of the options against a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from guessopt.engine.following import GraphMismatch
from guessopt.errors import ClosureError
from guessopt.estimator import Estimator
from guessopt.graph import SiteGraph
from guessopt.layout import Layout, numel
from guessopt.sites import Site
from guessopt.step.estimation import Estimation
from guessopt.step.plan import Plan
from guessopt.tracing.analysis import Analysis


def check_loss(loss: Any) -> None:
    """Raise ``ClosureError`` unless the loss is a real floating-point tensor, a scalar or ``[N]``."""
    if not isinstance(loss, Tensor):
        raise ClosureError(
            f"the closure must return the loss as a tensor, scalar or one per example [N]; it returned "
            f"{'None (a missing return?)' if loss is None else type(loss).__name__}"
        )
    if loss.dim() > 1:
        raise ClosureError(
            f"the closure returned a tensor of shape {list(loss.shape)}; return a scalar, or losses of shape [N]: "
            "reduce the other dimensions"
        )
    if not loss.is_floating_point():
        raise ClosureError(
            f"the closure returned a loss of dtype {loss.dtype}; it must be a real floating-point tensor"
        )
    if loss.is_inference():
        raise ClosureError(
            "the loss was made inside torch.inference_mode(), where derivatives are silently lost; remove it"
        )


def check_finite(loss: Tensor, d: Tensor | None = None) -> None:
    """Raise ``ClosureError`` unless the loss (and the directional derivatives) are finite. One host sync."""
    if loss.numel() == 0:
        raise ClosureError("the closure returned no losses (shape [0]): the batch is empty; skip it")
    both = loss.sum() if d is None else loss.sum() + d.sum().to(loss.device)
    if math.isfinite(both.item()):
        return
    if bool(torch.isfinite(loss).all()):
        raise ClosureError(
            "the directional derivative of the loss is not finite although the loss is; look for sqrt, log or a "
            "division at zero in the closure, or lower the learning rate"
        )
    raise ClosureError(
        f"the loss is not finite ({loss.detach().mean().item()}); nothing was updated. Check the batch (an empty one "
        "gives nan), lower the learning rate, or pass check_finite=False"
    )


def check_examples(sites: Sequence[Site], analysis: Analysis) -> None:
    """Raise ``ClosureError`` if the batch is empty: if every tensor that the loss reads has no entries. A single empty
    output is allowed: an expert that receives no token, an image in which nothing was found."""
    shapes = [analysis.tape.shapes[v] for v in analysis.cut_values]
    if shapes and all(0 in shape for shape in shapes):
        empty = next((f"{site.op} gave an output" for site in sites if 0 in site.shape), "the loss reads a tensor")
        raise ClosureError(f"the batch is empty: {empty} of shape {list(shapes[0])}; skip such a batch")


def independent(names: Sequence[str], graph: SiteGraph) -> str:
    few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    why = " (they are read only under torch.no_grad() or through detach())" if graph.stopped_params else ""
    return (
        f"the loss does not depend on any parameter handed to the optimizer ({few}){why}; return the loss itself, "
        "computed from the model inside the closure, not a detached copy"
    )


def unstable(departure: GraphMismatch) -> ClosureError:
    where = f" (call {departure.index + 1}: {departure.what})" if departure.what else ""
    return ClosureError(
        f"the closure does not repeat: run twice with the same random state, it made other calls or read other tensors"
        f"{where}; take the batch before the step, draw noise from a generator of torch, numpy or random, and keep "
        "caches (use_cache=True, lru_cache) out of the closure"
    )


def precision(analysis: Analysis) -> float:
    """The relative difference of the loss that rounding may cause between two runs by different kernels, in the
    closure's lowest precision."""
    dtypes = {analysis.tape.dtypes[v] for v in analysis.active}
    return max(1e-4, *(4 * torch.finfo(dtype).eps for dtype in dtypes)) if dtypes else 1e-4


def check_repeats(first: Tensor, second: Tensor, tolerance: float, again: Callable[[], Tensor]) -> None:
    """Raise ``ClosureError`` if runs from the same random state give different losses.

    Args:
        tolerance: the relative difference that other kernels may cause.
        again: makes one more run and returns its loss. If two runs differ, this loss must equal one of theirs: other
            kernels alone may move the loss of an ill-conditioned network (a batch norm over two nearly equal numbers).
    """
    a, b = first.double(), second.detach().double()

    def close(x: Tensor, y: Tensor) -> bool:
        return torch.allclose(x, y, rtol=tolerance, atol=1e-6)

    if not bool(torch.isfinite(a)) or close(a, b):
        return
    c = again().double()
    if not (close(a, c) or close(b, c)):
        raise ClosureError(
            f"the closure does not repeat: a second pass from the same random state gave the loss {b.item():.6g} in "
            f"place of {a.item():.6g}; take the batch before the step, and draw noise from a generator of torch, numpy "
            "or random"
        )


# --- a plan and the options -------------------------------------------------------------------------------------------


def check_plan(est: Estimation, plan: Plan) -> None:
    """Raise ``ValueError`` for options that this model does not allow. Warn once of each surprise."""
    own = [site for site in plan.graph.sites if site.shares is None]
    if why := est.refused(est.memory, plan.graph):
        raise ValueError(f"memory: {why}")
    by_estimator: dict[Estimator, list[Site]] = {}
    for site in own:
        by_estimator.setdefault(est.estimator_of(site), []).append(site)
    for estimator, sites in by_estimator.items():
        estimator.check(tuple(sites))
        for site in sites:
            note = plan.graph.blocked.get(site.index) or estimator.note(site)
            if note and estimator.guided and estimator is est.choice_of(site):
                est.warn(f"{estimator.name}: {est.names[site.params[0]]} ({site.op}) gets another guess: {note}")
    _warn_of_coupling(plan, est.warn)
    if est.orthogonal:
        _check_orthogonal(est, plan)
    if est.frozen_statistics and plan.normalises_batch:
        est.warn(
            "batch_norm='frozen_statistics': batch statistics are taken for constants; the estimate leaves out "
            "how examples act on each other through them, a bias that grows as batches shrink"
        )
    if plan.routes:
        est.warn(
            "the network picks rows by indices that it computes as it runs: where the examples lie is checked "
            "anew in every step, at the cost of one more forward-mode pass"
        )
    if plan.compiled:
        est.warn("torch.compile'd code in the closure runs uncompiled: compiled code would lose the tangents")
    if names := unread(est, plan.graph):
        few = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        est.warn(f"the loss does not depend on {few}: no gradient will be estimated for them")


def unread(est: Estimation, graph: SiteGraph) -> list[str]:
    """Parameters from which no derivative reaches the loss."""
    read = {p for site in graph.sites for p in site.params} | set(graph.loss_params)
    return [est.names[k] for k in est.by_position if k not in read]


def _check_orthogonal(est: Estimation, plan: Plan) -> None:
    for estimator in est.estimators:
        if estimator.learns or estimator.debias:
            how = "forms the estimate itself" if estimator.learns else "undoes its bias guess by guess (debias=True)"
            raise ValueError(f"orthogonal: not with {estimator.name}, which {how}; leave out one of the two")
    guessed = [plan.graph.sites[index] for index in est.assignments(plan)]
    entries = sum(
        sum(map(numel, site.direction_shapes)) if site.by_parameter else numel(site.shape) for site in guessed
    )
    entries += sum(p.numel() for k, p in est.by_position.items() if est.estimators[k].space == "parameters")
    if est.guesses * plan.graph.batch > entries:
        est.warn(
            f"orthogonal: {est.guesses} guesses in {entries // plan.graph.batch} dimensions per example depend on "
            "each other: the estimate is the projection on all that they span; fewer guesses give the same"
        )


def _warn_of_coupling(plan: Plan, warn: Callable[[str], None]) -> None:
    """Warn once if examples interact or cannot be told apart. A batch of one example needs no warning."""
    graph = plan.graph
    several = [s for s in graph.sites if 0 not in s.shape and s.shape and s.shape[0] > 1 and 1 not in s.shape[:2]]
    coupled = [s for s in several if s.layout is Layout.COUPLED and s.shares is None and s.cut is None]
    if graph.batch > 1 and coupled:
        which = f"{len(coupled)} of {len(graph.sites)} sites ({', '.join(sorted({site.op for site in coupled}))})"
        where = (
            f"examples interact in {plan.mixing}: {which} before it"
            if plan.mixing
            else f"the {graph.batch} examples interact, or lie in no known order, at {which}, the last of which has an "
            f"output of shape {list(coupled[-1].shape)}: these"
        )
        warn(f"{where} take the scalar derivative of the whole batch, which is valid but far noisier")
    elif graph.batch == 1 and 2 * len(several) > len(graph.sites):
        warn(
            "the closure's examples could not be told apart: every site takes the scalar derivative, which is valid "
            "but far noisier; keep the batch in the first or second dimension"
        )
