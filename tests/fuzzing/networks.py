"""A random network as data: a ``Network`` is short, prints as code that makes it again, and shrinks.

``compose(pick)`` makes one; ``pick`` chooses from a list, whether hypothesis does the choosing (``networks()``) or a
seed (``from_seed``). ``build`` makes parameters and a closure of it. What does not fit a shape raises ``Unfit`` and is
left out of the description.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import tests.fuzzing.losses
import tests.fuzzing.operations_layers
import tests.fuzzing.operations_sequences
import tests.fuzzing.operations_shapes
import tests.fuzzing.operations_values  # noqa: F401  (they fill the tables)
from tests.fuzzing.parts import ANY, LOSSES, OPERATIONS, Built, Maker, Network, Op, Unfit, need

Pick = Callable[[Sequence[Any]], Any]

INPUTS = (*ANY, "tokens", "tokens_padded")
FIRST = ("linear", "activation")
FAMILY_NAMES = (*FIRST, *sorted(set(OPERATIONS) - {*FIRST}), *FIRST, "switch", "switch", "switch")
LOSS_NAMES = ("square", "cross_entropy", "mse", *sorted(set(LOSSES) - {"square", "cross_entropy", "mse"}))


def build(network: Network, strict: bool = True) -> Built:
    """Parameters and a closure. ``strict``: False leaves out what does not fit.

    Raises:
        Unfit: ``strict``, and something does not fit.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(network.seed)
        built = Built(network)
        maker = Maker(built)
        h = _input(maker, network)
        kept, losses = [], []
        for place, op in enumerate(network.ops):
            maker.label = f"{op.family}{place}"
            try:
                h = _add(maker, built, op, h)
            except Unfit:
                if strict:
                    raise
                continue
            kept.append(op)
        for place, name in enumerate(network.losses):
            maker.label = f"loss{place}"
            before = _mark(built)
            try:
                function = LOSSES[name](maker, h, network.reduction)
                value = function(h)
                need(value.dim() == (1 if network.reduction == "per_example" else 0))
                need(value.numel() in (1, built.batch) and bool(torch.isfinite(value).all()))
                built.loss_functions.append(function)
                losses.append(name)
            except Unfit:
                _undo(built, before)
                if strict:
                    raise
        need(bool(losses) and bool(built.named))
    built.network = replace(network, ops=tuple(kept), losses=tuple(losses))
    return built


def _input(maker: Maker, network: Network) -> Tensor:
    t, d = network.tokens, network.width
    maker.label = "input"
    maker.kind = "sequence" if network.inputs.startswith("tokens") else network.inputs
    if network.inputs.startswith("tokens"):
        maker.built.makers["x"] = lambda n: torch.randint(5, (n, t))
        padding = 0 if network.inputs == "tokens_padded" else None
        lookup = maker.module(nn.Embedding(5, d, padding_idx=padding))
        maker.built.functions.append(lambda ids: lookup(ids))
    else:
        shapes: dict[str, Callable[[int], tuple[int, ...]]] = {
            "signal": lambda n: (n, d, t + 2),
            "image": lambda n: (n, d, t + 2, t + 2),
        }
        places = maker.shaped()
        shape = shapes.get(maker.kind, lambda n: (*places(n), d))
        maker.built.makers["x"] = lambda n: torch.randn(*shape(n), dtype=torch.float64)
    maker.built.state["x"] = maker.built.makers["x"](network.batch)
    return maker.built.forward()


def _mark(built: Built) -> tuple[Any, ...]:
    names = [n for n, _ in built.model.named_children()], list(built.model._parameters)
    return names, dict(built.makers), set(built.uses)


def _undo(built: Built, mark: tuple[Any, ...]) -> None:
    (children, params), makers, uses = mark
    for name in [n for n in built.model._modules if n not in children]:
        del built.model._modules[name]
    for name in [n for n in built.model._parameters if n not in params]:
        del built.model._parameters[name]
    for name in [n for n in built.makers if n not in makers]:
        del built.makers[name], built.state[name]
    built.uses = uses


def _add(maker: Maker, built: Built, op: Op, h: Tensor) -> Tensor:
    entry = OPERATIONS[op.family]
    need(maker.kind in entry.kinds)
    mark, kind, tokens = _mark(built), maker.kind, maker.tokens
    try:
        function = entry.build(maker, h, op.variant, op.size)
        out = function(h.clone())
        need(out.numel() > 0 and out.numel() <= 4000 and out.is_floating_point() and bool(torch.isfinite(out).all()))
    except (Unfit, RuntimeError, ValueError, IndexError) as error:
        _undo(built, mark)
        built.extras.clear()
        maker.kind, maker.tokens = kind, tokens
        raise Unfit(str(error)) from None
    built.extras.clear()
    maker.follow(out)
    built.functions.append(function)
    return out.detach()


# --- the choice of a network -----------------------------------------------------------------------------------------

REDUCTIONS = ("mean", "mean", "sum", "per_example")


def compose(pick: Pick, most: int = 5) -> Network:
    """A network that fits together, by choices from lists."""
    same = pick((False, False, False, True))
    batch = pick((3, 2, 1, 4, 5))
    tokens, width = (batch, batch) if same else (pick((2, 1, 3, 4)), pick((3, 1, 2, 4)))
    inputs = pick(INPUTS)
    ops = []
    for _ in range(pick(range(1, most + 1))):
        name = pick(FAMILY_NAMES)
        ops.append(Op(name, pick(OPERATIONS[name].variants), pick((3, 1, 2, 4))))
    losses = tuple(pick(LOSS_NAMES) for _ in range(pick((1, 1, 1, 2))))
    network = Network(tuple(ops), losses, inputs, batch, tokens, width, pick(REDUCTIONS), pick(range(1000)))
    try:
        return build(network, strict=False).network
    except Unfit:
        return build(replace(network, losses=("square",)), strict=False).network


def from_seed(seed: int) -> Network:
    return compose(random.Random(seed).choice)


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """The same choices, made (and shrunk) by hypothesis: the first entry of each list is the simplest."""
    return compose(lambda options: draw(st.sampled_from(options)))


def alone(family: str, variant: str) -> Network:
    """A network with that operation, between two layers where it fits there.

    Raises:
        Unfit: there is none.
    """
    op, layer = Op(family, variant), Op("linear", "module")
    for inputs in INPUTS:
        for ops in ((layer, op, layer), (op, layer), (op,)):
            for width in (4, 3):
                try:
                    return build(Network(ops, ("mse",), inputs, 3, 3, width)).network
                except Unfit:
                    continue
    raise Unfit(f"{op} fits no network")


def simpler(network: Network) -> Sequence[Network]:
    """One step simpler each, the greatest steps first."""
    found = [replace(network, ops=network.ops[:i] + network.ops[i + 1 :]) for i in range(len(network.ops))]
    if len(network.losses) > 1:
        found += [replace(network, losses=(name,)) for name in network.losses]
    if network.losses != ("square",):
        found.append(replace(network, losses=("square",)))
    if network.reduction != "mean":
        found.append(replace(network, reduction="mean"))
    if network.inputs != "rows":
        found += [replace(network, inputs=kind) for kind in ("rows", "sequence") if kind != network.inputs]
    for op_at, op in enumerate(network.ops):
        if op.variant != OPERATIONS[op.family].variants[0]:
            first = op._replace(variant=OPERATIONS[op.family].variants[0])
            found.append(replace(network, ops=(*network.ops[:op_at], first, *network.ops[op_at + 1 :])))
    for name, small in (("batch", 2), ("tokens", 2), ("width", 2)):
        if getattr(network, name) > small:
            found.append(replace(network, **{name: small}))  # type: ignore[arg-type]
    return found


def minimise(network: Network, fails: Callable[[Network], bool], most: int = 40) -> Network:
    """The simplest network on the way down that still fails."""
    tried = 0
    while True:
        for other in simpler(network):
            tried += 1
            if tried > most:
                return network
            try:
                build(other)
            except Unfit:
                continue
            if fails(other):
                network = other
                break
        else:
            return network
