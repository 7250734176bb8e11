"""From directional derivatives to parameter gradients: ``D_n -> g^_i -> site rule -> gradients``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from guessopt.credit import Credit, rate
from guessopt.errors import refusal, refused
from guessopt.graph import SiteGraph
from guessopt.record import ForwardRecord, SavedCall
from guessopt.rng import replayed
from guessopt.sites import Site
from guessopt.tracing.functions import AS_IT_IS
from guessopt.tracing.writes import kept


def estimated_cotangents(
    graph: SiteGraph, record: ForwardRecord, formed: Mapping[int, Tensor] | None = None
) -> dict[int, Tensor]:
    """The cotangents by site index: ``g^_i[n] = D_n y_i[n]`` (Singhal eq. 13; Wang 2). A site without a guess takes its
    cut's exact error. Guesses are removed from the record, to free their memory.

    Args:
        formed: cotangents that estimators have formed themselves, by site index.
    """
    found: dict[int, Tensor] = {}
    for site in reversed(graph.sites):
        if formed is not None and site.index in formed:
            found[site.index] = formed[site.index]
        elif (y := record.guesses.pop(site.index, None)) is not None:
            found[site.index] = scaled(y, site, record.d, record.credit)
        elif site.shares is not None and site.shares in found:
            found[site.index] = found[site.shares]
        elif site.cut is not None:
            found[site.index] = record.errors[site.cut]
    return found


def scaled(y: Tensor, site: Site, d: Tensor, credit: Credit | None = None) -> Tensor:
    """``D_n y[n]``, with credit ``D[n, t] y[n, t]``; ``[*shape]``, in new memory: two sites may hold one guess
    (``a(x) + b(x)``), and a guess may be expanded. The product of a float16 guess is float32, since it may leave
    float16's range.

    Args:
        y: the site's guess, ``[*shape]``.
        d: ``D_n``, ``[N]`` or ``[1]``.
    """
    d = rate(site, d, credit)
    if y.dtype is torch.float16:
        return y.float() * d.float()
    return y * (d if d.dtype is y.dtype else d.to(y.dtype))


def parameter_gradients(
    graph: SiteGraph,
    record: ForwardRecord,
    cotangents: Mapping[int, Tensor],
    params: Mapping[int, Tensor],
    ids: Mapping[int, int],
    gradients: Gradients | None = None,
) -> dict[int, Tensor]:
    """Gradients by position. Parameters without a gradient are absent.

    A site's transposed rule turns its cotangent into gradients of the tensors that the site's call reads. Gradients of
    expressions of parameters (``W.t()``) then go back to the parameters in reverse mode.

    Args:
        params: trainable parameters by position; ids: ``id`` to position.
        gradients: the sum to add to; None to begin a new one.
    """
    gradients = gradients or Gradients(graph, params, ids, directed=record.params)
    cotangents = {**cotangents, **gradients.known}
    for saved in (*gradients.saved_calls.values(), *record.saved_calls):
        if saved.directions is not None:
            gradients.direct(saved, record.d)
        else:
            gradients.saved(saved, cotangents)
    gradients.close(record)
    return gradients.take(params)


class Gradients:
    """Sums of parameter gradients, by the parameter's position. Calls are added one by one.

    Args:
        params: trainable parameters by position; ids: ``id`` to position.
        directed: positions of parameters that have guesses of their own.
        origin: gives the positions of the parameters that an expression is computed from. ``take`` needs ``origin`` to
            give the gradients of some parameters before the others.

    Attributes:
        found: the sums.
        saved_calls: by call index, the calls that ``consume`` could not add yet.
        known: by site index, the cotangents that ``consume`` has kept for these calls.
    """

    def __init__(
        self,
        graph: SiteGraph,
        params: Mapping[int, Tensor],
        ids: Mapping[int, int],
        directed: Collection[int] = (),
        origin: Callable[[Tensor], frozenset[int]] | None = None,
    ) -> None:
        self.graph, self.params, self.ids, self.directed, self.origin = graph, params, ids, directed, origin
        self.found: dict[int, Tensor] = {}
        self._expressions: list[tuple[Tensor, Tensor]] = []
        self.saved_calls: dict[int, SavedCall] = {}
        self.known: dict[int, Tensor] = {}

    def add(self, position: int, gradient: Tensor) -> None:
        """Add to one parameter's gradient. Sums of float16 or bfloat16 gradients are float32."""
        if position in self.found:  # a sum in bfloat16 would lose terms a hundred times smaller
            low = gradient.dtype in (torch.float16, torch.bfloat16)
            gradient = self.found[position] + (gradient.float() if low else gradient)
        self.found[position] = gradient

    def _keep(self, variable: Tensor, gradient: Tensor) -> None:
        """Add to the gradient of a parameter, or of an expression of parameters."""
        if id(variable) in self.ids:
            self.add(self.ids[id(variable)], gradient)
        else:
            self._expressions.append((variable, gradient.to(variable.dtype)))

    def saved(self, saved: SavedCall, cotangents: Mapping[int, Tensor]) -> None:
        """Add the gradients of a site's call, by the site's transposed rule.

        Args:
            cotangents: by site index.
        """
        for site in self.graph.sites_at[saved.call.index]:
            g = cotangents.get(site.index)
            if g is None:
                continue
            unit: Tensor | None = None
            if site.dtype is torch.float16 and g.dtype is torch.float32:
                unit = g.abs().amax().clamp_min(torch.finfo(g.dtype).tiny)
                g = (g / unit).half()  # the largest entry is 1: the rule's products stay in range
            autocast = torch.autocast(*saved.autocast) if saved.autocast else AS_IT_IS
            hidden = kept(saved.call.hidden) if saved.call.hidden else AS_IT_IS
            state = replayed(saved.random) if saved.random is not None else AS_IT_IS
            try:
                with state, autocast, hidden:
                    gradients = site.rule.gradients(
                        saved.call.fn, saved.args, saved.kwargs, site.output, saved.wanted, g
                    )
            except RuntimeError as error:
                if (why := refusal(error)) is None:
                    raise
                raise refused(saved.call.fn, f"its backward: {why}") from error
            for variable, gradient in zip(saved.variables, gradients, strict=True):
                if gradient is not None:
                    self._keep(variable, gradient if unit is None else gradient.float() * unit)

    def consume(self, record: ForwardRecord, cotangents: Mapping[int, Tensor]) -> None:
        """Take the calls out of the record. Add the calls whose cotangents are all known.

        Args:
            cotangents: by site index. A call with several sites waits until it has all its cotangents.
        """
        if record.saved_calls:
            self.saved_calls, record.saved_calls = {saved.call.index: saved for saved in record.saved_calls}, []
        calls = dict.fromkeys(
            self.graph.sites[k].call.index
            for index in cotangents
            for k in (*self.graph.shared_by.get(index, ()), index)
        )
        for index, g in cotangents.items():
            self.known |= dict.fromkeys((index, *self.graph.shared_by.get(index, ())), g)
        for call in calls:
            sites = self.graph.sites_at[call]
            if call in self.saved_calls and all(site.index in self.known for site in sites):
                self.saved(self.saved_calls.pop(call), {site.index: self.known.pop(site.index) for site in sites})

    def direct(self, saved: SavedCall, d: Tensor) -> None:
        """Add a call whose parameters were guessed example by example: ``sum_n D_n v[n]``."""
        for variable, v in zip(saved.variables, saved.directions or (), strict=True):
            self._keep(variable, sum_over_examples(d, v))

    def close(self, record: ForwardRecord, share: float = 1.0) -> None:
        """Add the gradients that come from no site. Their sources: blocks' reverse graphs; parameters with guesses of
        their own; parameters that the loss reads itself.

        Args:
            share: the weight of one guess in the mean of all guesses.
        """
        for variable, gradient in record.gradients:
            self._keep(variable, gradient)
        record.gradients = []
        for position, v in record.params.items():  # grad = D v (Baydin 2022; Singhal A.2)
            if record.count == 1:
                self.add(position, (record.d.sum() * share).to(v.dtype) * v)
            else:
                self.add(position, torch.tensordot((record.d.sum(1) * share).to(v.dtype), v, dims=1))
        part = share * record.count
        for position, gradient in record.exact.items():
            self.add(position, gradient if part == 1 else gradient * part)

    def take(self, positions: Collection[int]) -> dict[int, Tensor]:
        """Remove the gradients of these parameters from the sums, and return them by position. Gradients that come
        through expressions are included."""
        through = [p for p in positions if p not in self.directed]
        ready, later = self._expressions, list[tuple[Tensor, Tensor]]()
        if self.origin is not None and ready:
            within = [not self.origin(expression).isdisjoint(through) for expression, _ in ready]
            ready, later = ([pair for pair, w in zip(ready, within, strict=True) if w is on] for on in (True, False))
        self._expressions = later
        if ready and through:
            expressions, gradients = zip(*ready, strict=True)
            variables = [self.params[p] for p in through]
            found = torch.autograd.grad(expressions, variables, gradients, allow_unused=True, retain_graph=True)
            for position, gradient in zip(through, found, strict=True):
                if gradient is not None:
                    self.add(position, gradient)
        return {p: self.found.pop(p) for p in positions if p in self.found}


def sum_over_examples(d: Tensor, v: Tensor) -> Tensor:
    """``sum_n D_n v[n]``, ``[*]``.

    Args:
        d: ``[N]``.
        v: ``[N, *]``, or ``[1, *]`` for a direction that all examples share.
    """
    weights = d if v.shape[0] == d.shape[0] else d.sum().expand(v.shape[0])
    result: Tensor = torch.tensordot(weights.to(v.dtype), v, dims=1)
    return result
