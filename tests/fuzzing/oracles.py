"""What must hold on every network. An oracle takes a ``Network`` and returns what it has found, an empty list if all is
well; ``ORACLES`` has them by name.

A refusal (``ClosureError``, ``ValueError``, ``NotImplementedError``) that names a remedy is no wrong answer; it is
reported as ``refused``. An error of any other type, or one without a remedy, is ``obscure``.
"""

from __future__ import annotations

import copy
import random
import re
import traceback
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from guessopt import ClosureError, GuessGradOptimizer
from guessopt.step.modes import estimate_alone
from tests.fuzzing.networks import Built, Network, Unfit, build
from tests.problems import seeded
from tests.test_exactness import OneHot, one_hots

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
DIVERGED = 1e30
"""A gradient above this comes from a training that diverged; the rounding of such a network is all that two of its
estimates differ by, and the squares of the larger ones overflow."""
MOST_GUESSES = 150
"""One-hot guesses that a network may take; larger ones are skipped by the oracles that need the sum."""

ESTIMATORS: tuple[Any, ...] = (
    "w_perp",
    "w_transpose",
    {"name": "w_perp_ns", "k": 1},
    "w_preconditioned",
    "activation_mixing",
    "downstream",
    "learned_feedback",
    "directional_descent",
    "activation_perturbation",
    "auto",
    {"name": "w_perp", "k": 1},
)
REFUSED_BY_TORCH_FUNC = (
    "vmap", "setup_context", "data pointer", "has no derivative", "mutating directly", "in-place", "inplace",
    "engine='func' cannot", "not implemented", "generate_vmap_rule", "functorch",
)  # fmt: skip
"""What ``torch.func.jvp``, the reference engine, refuses on its own."""

REMEDY = re.compile(
    r"\b(use|pass|remove|set|call|return|draw|skip|lower|keep|put|give|leave|take|make|move|add|replace|look|load|compute|"
    r"check|write|register|run|try|train|wrap|choose|hand)\b",
    re.IGNORECASE,
)


class Finding(NamedTuple):
    """``kind``: "wrong", "refused", "obscure" or "skipped"; ``where``: the innermost places in the package."""

    oracle: str
    kind: str
    message: str
    where: str = ""

    @property
    def key(self) -> str:
        """The same for findings of one kind: names of parameters, shapes and figures are left out."""
        text = self.message.split(": off by")[0] if self.kind == "wrong" else self.message
        text = re.sub(r"[\w.]*\d[\w.]*|\[[^\]]*\]|\([^)]*\)", "#", text)
        return f"{self.oracle} {self.kind} {text[:90]} {self.where.split(' < ')[0]}"


class Wrong(Exception):
    """A wrong answer."""


class Skipped(Exception):
    """The oracle has nothing to say on this network."""


Check = Callable[[Network], None]
Oracle = Callable[[Network], list[Finding]]
ORACLES: dict[str, Oracle] = {}


def oracle(check: Check) -> Oracle:
    name = check.__name__

    @wraps(check)
    def judged(network: Network) -> list[Finding]:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
            warnings.simplefilter("ignore")
            try:
                check(network)
            except Unfit:
                raise
            except Skipped as why:
                return [Finding(name, "skipped", str(why))]
            except Wrong as why:
                return [Finding(name, "wrong", str(why))]
            except Exception as error:
                return [_judged(name, error)]
        return []

    ORACLES[name] = judged
    return judged


def _judged(name: str, error: Exception) -> Finding:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "guessopt/" in f.filename]
    where = " < ".join(f"{f.filename.rsplit('guessopt/', 1)[1]}:{f.name}" for f in frames[:-4:-1])
    meant = isinstance(error, ClosureError | ValueError | NotImplementedError) and REMEDY.search(str(error))
    raised_here = traceback.extract_tb(error.__traceback__)[-1].filename.find("guessopt/") >= 0
    kind = "refused" if meant and raised_here else "obscure"
    return Finding(name, kind, f"{type(error).__name__}: {error}", where)


def check(network: Network, *names: str) -> list[Finding]:
    """What the oracles named (all of them, if none is) find."""
    return [finding for name in names or ORACLES for finding in ORACLES[name](network)]


# --- helpers ----------------------------------------------------------------------------------------------------------


def optimizer(built: Built, estimator: Any = "activation_perturbation", **options: Any) -> GuessGradOptimizer:
    options = {"lr": 0.01, "seed": 1, **options}
    return GuessGradOptimizer(built.named, torch.optim.SGD, copy.deepcopy(estimator), **options)


def estimator_for(network: Network, salt: int = 0) -> Any:
    return ESTIMATORS[(network.seed + salt) % len(ESTIMATORS)]


def tensors(built: Built) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in [*built.model.named_parameters(), *built.model.named_buffers()]}


def restore(built: Built, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, t in [*built.model.named_parameters(), *built.model.named_buffers()]:
            t.copy_(values[name])


def true_gradients(built: Built) -> dict[str, Tensor]:
    """Autograd's, from the same random states; buffers stay."""
    buffers = [b.clone() for b in built.model.buffers()]
    seeded()
    try:
        loss = built.closure()
        found = torch.autograd.grad(loss.mean(), [p for _, p in built.named], materialize_grads=True)
    except RuntimeError as error:
        raise Skipped(f"backward refuses: {error}") from None
    with torch.no_grad():
        for buffer, value in zip(built.model.buffers(), buffers, strict=True):
            buffer.copy_(value)
    return dict(zip([name for name, _ in built.named], found, strict=True))


def estimated(built: Built, estimator: Any, scale: float = 1.0, **options: Any) -> dict[str, Tensor]:
    """One estimate of a new optimizer."""
    for p in built.model.parameters():
        p.grad = None
    opt = optimizer(built, estimator, **options)
    seeded()
    opt.estimate(built.closure if scale == 1 else lambda: scale * built.closure())
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in built.named}
    for p in built.model.parameters():
        p.grad = None
    return found


def compare(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, what: str, estimator: Any = ""
) -> None:
    """Raise ``Wrong`` unless each is near, relative to all together."""
    whole = float(torch.stack([g.double().norm() for g in expected.values()]).norm())
    off = {name: float((found[name].double() - g.double()).norm()) / max(whole, 1e-9) for name, g in expected.items()}
    bad = {name: value for name, value in off.items() if not value <= tolerance}
    if bad:
        worst = max(bad, key=lambda name: bad[name] if bad[name] == bad[name] else float("inf"))
        raise Wrong(
            f"{what}: off by {off[worst]:.1e} of the gradient at {worst} ({len(bad)} of {len(off)} parameters)"
            + (f", with {estimator}" if estimator else "")
        )


# --- one-hot exactness -----------------------------------------------------------------------------------------------


class Steered(OneHot):
    """One entry of one site, also where the number of examples is not (yet) the plan's; ``turn``: 1, or 1j for the
    imaginary part of a complex entry."""

    turn: complex = 1

    def sample(self, state: Any, local: Any) -> Tensor:
        try:
            y = super().sample(state, local)
            return y * self.turn if y.is_complex() else y
        except (RuntimeError, IndexError):
            y = torch.zeros(local.s.shape, dtype=local.s.dtype)
            y.view(-1)[0] = 1
            return y


def one_run(opt: GuessGradOptimizer, built: Built, guess: OneHot, at: tuple[int, int]) -> dict[str, Tensor]:
    guess.at = at
    opt.estimation.refresh()
    if opt.estimation.estimators[0] is not guess:
        opt.estimation.estimators = [guess] * len(opt.estimation.names)
        for plan in opt.estimation.plans:
            plan.assignments = None
    seeded()
    gradients = estimate_alone(opt.estimation, built.closure)[1]
    return {opt.estimation.names[k]: g for k, g in gradients.items()}


def expectation(opt: GuessGradOptimizer, built: Built) -> dict[str, Tensor]:
    """The sum of the estimates over all one-hot guesses, from the optimizer as it is."""
    guess = Steered()
    for _ in range(3):
        guess.batch = 1
        none = one_run(opt, built, guess, (-1, 0))
        graph = opt.estimation.plans[0].graph
        guess.batch = graph.batch
        places: list[tuple[tuple[int, int], complex]] = [(at, 1) for at in one_hots(opt)]
        places += [(at, 1j) for at, _ in places if graph.sites[at[0]].dtype.is_complex]
        if len(places) > MOST_GUESSES:
            raise Skipped("too many one-hot guesses")
        total = {name: none[name].clone() if name in none else torch.zeros_like(p) for name, p in built.named}
        for at, guess.turn in places:
            for name, g in one_run(opt, built, guess, at).items():
                total[name] += g - none[name] if name in none else g
        guess.turn = 1
        if opt.estimation.plans[0].graph is graph:
            return total
    raise Wrong("the plan changes in every step although the closure does not")


@oracle
def exact(network: Network) -> None:
    """The sum of the estimates over all one-hot guesses is the gradient."""
    built = build(network)
    expected = true_gradients(built)
    opt = optimizer(built)
    compare(expectation(opt, built), expected, TOLERANCE[built.dtype], "sum over one-hot guesses")


# --- one estimate, made in other ways --------------------------------------------------------------------------------


@oracle
def engines(network: Network) -> None:
    """The engines agree."""
    built = build(network)
    true_gradients(built)
    estimator = estimator_for(network)
    fast = estimated(built, estimator)
    for engine in ("dual", "func"):
        try:
            other = estimated(built, estimator, engine=engine)
        except RuntimeError as error:
            if engine == "func" and any(words in str(error) for words in REFUSED_BY_TORCH_FUNC):
                continue
            raise
        compare(fast, other, 1e-7, f"engine 'fast' against {engine!r}", estimator)


@oracle
def modes(network: Network) -> None:
    """Two steps of store, replay and stream."""
    true_gradients(build(network))
    estimator = estimator_for(network, 1)
    found: dict[str, dict[str, Tensor]] = {}
    for memory in ("store", "replay", "stream"):
        built = build(network)
        try:
            opt = optimizer(built, estimator, memory=memory)
            for step in range(2):
                seeded(step)
                opt.step(built.closure)
        except ValueError as error:
            if "does not go with memory" in str(error):
                continue
            raise
        found[memory] = tensors(built)
    for memory in found:
        compare(found[memory], found["store"], 1e-10, f"two steps with memory={memory!r} against 'store'", estimator)


@oracle
def stacked(network: Network) -> None:
    """K guesses in one pass are K guesses in turn; K often meets a dimension."""
    built = build(network)
    true_gradients(built)
    estimator = estimator_for(network, 2)
    dimensions = {n for n in (network.batch, network.width, network.tokens, network.tokens + 2, 2, 3) if n > 1}
    count = sorted(dimensions)[network.seed % len(dimensions)]
    one = estimated(built, estimator, guesses=count)
    other = estimated(built, estimator, guesses=count, stack_guesses=False)
    compare(one, other, 1e-7, f"{count} stacked guesses against guesses in turn", estimator)


@oracle
def scaling(network: Network) -> None:
    """estimate(3 L) = 3 estimate(L)."""
    built = build(network)
    true_gradients(built)
    for salt in (3, 7):
        estimator = estimator_for(network, salt)
        single = {name: 3 * g for name, g in estimated(built, estimator).items()}
        compare(estimated(built, estimator, 3.0), single, 1e-7, "estimate(3 L) against 3 estimate(L)", estimator)


@oracle
def credit(network: Network) -> None:
    """With ``discount=1`` the sum of the estimates over all one-hot guesses is the gradient, in every network. With
    less, engines and memory modes agree."""
    built = build(network)
    expected = true_gradients(built)
    opt = optimizer(built, discount=1.0)
    compare(expectation(opt, built), expected, TOLERANCE[built.dtype], "sum over one-hot guesses with discount=1")
    estimator = estimator_for(network, 4)
    fast = estimated(built, estimator, discount=0.6)
    for options in ({"memory": "replay"}, {"engine": "dual"}):
        try:
            other = estimated(built, estimator, discount=0.6, **options)
        except ValueError as error:
            if "does not go with memory" in str(error):
                continue
            raise
        compare(other, fast, 1e-7, f"discount=0.6 with {options}", estimator)


@oracle
def plain(network: Network) -> None:
    """Loss, buffers and random states after a step are a plain forward pass's."""
    memory = ("store", "replay", "stream")[network.seed % 3]
    one, other = build(network), build(network)
    true_gradients(one)
    opt = optimizer(one, lr=0.0, memory=memory)
    for step in range(2):
        seeded(step)
        loss = opt.step(one.closure)
        after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
        seeded(step)
        with torch.no_grad():
            expected = other.closure().mean()
        if not torch.allclose(loss.mean().double(), expected.double(), rtol=1e-9, atol=1e-12):
            raise Wrong(f"the loss is {float(loss.mean()):.9g}, a plain forward gives {float(expected):.9g}")
        if not torch.equal(after[0], torch.get_rng_state()):
            raise Wrong("torch's random state is not as after a plain forward")
        if after[1] != np.random.get_state()[1].tolist() or after[2] != random.getstate():  # type: ignore[index]
            raise Wrong("the random state of numpy or random is not as after a plain forward")
        for (name, a), (_, b) in zip(one.model.named_buffers(), other.model.named_buffers(), strict=True):
            if not torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-12):
                raise Wrong(f"buffer {name} is not as after a plain forward")
        if torch._C._len_torch_function_stack() or not torch.is_grad_enabled():
            raise Wrong("a mode is left behind")


# --- changes between steps -------------------------------------------------------------------------------------------


def _evaluate(built: Built) -> None:
    built.model.eval()


def _freeze(built: Built) -> None:
    names = built.named
    names[len(names) // 2][1].requires_grad_(False)


CHANGES: dict[str, tuple[Callable[[Built], bool], Callable[[Built], None]]] = {
    "batch": (lambda b: True, lambda b: b.set_batch(b.batch + 1 + b.network.seed % 2)),
    "smaller batch": (lambda b: b.batch > 2, lambda b: b.set_batch(b.batch - 1)),
    "data": (lambda b: True, lambda b: b.set_batch(b.batch, seed=5)),
    "dtype": (lambda b: True, lambda b: b.set_dtype(torch.float32)),
    "frozen parameter": (lambda b: len(b.named) > 1, _freeze),
    "evaluation mode": (lambda b: "train" in b.uses, _evaluate),
    "flag": (lambda b: "flag" in b.uses, lambda b: b.state.update(flag=False)),
    "operand": (lambda b: "which" in b.uses, lambda b: b.state.update(which=1)),
    "mixing": (lambda b: "mix" in b.uses, lambda b: b.state.update(mix=0.5)),
}
"""By name: whether the network has it, and what is done."""


def change(network: Network, name: str) -> None:
    """After steps on the first variant, the same optimizer is exact on the changed one, from its first step on."""
    built = build(network)
    applies, act = CHANGES[name]
    if not applies(built):
        raise Skipped("the network has nothing to change")
    true_gradients(built)
    opt = optimizer(built)
    for step in range(2 + network.seed % 4):
        seeded(step)
        opt.step(built.closure)
    act(built)
    expected = true_gradients(built)
    if name == "dtype" and _rounding(built, expected) > 0.1 * TOLERANCE[built.dtype]:
        raise Skipped("autograd's own gradients in float32 are mostly rounding")
    if any(g.abs().max() > DIVERGED for g in expected.values() if g.numel()):
        raise Skipped("the training diverged: nothing but rounding is left to compare")
    guess = Steered()
    guess.batch = built.batch
    first = one_run(opt, built, guess, (0, 0))
    again = one_run(opt, built, guess, (0, 0))
    tolerance = TOLERANCE[built.dtype]
    if set(first) != set(again):
        raise Wrong(f"changed {name}: the first estimate gives gradients to other parameters than the second")
    if again:
        compare(first, again, tolerance, f"changed {name}: first estimate against the second")
    compare(expectation(opt, built), expected, tolerance, f"changed {name}: sum over one-hot guesses")


def _rounding(built: Built, single: dict[str, Tensor]) -> float:
    """The relative difference of autograd's float32 gradients from those of the same network in float64."""
    built.set_dtype(torch.float64)
    double = true_gradients(built)
    built.set_dtype(torch.float32)
    whole = float(torch.stack([g.norm() for g in double.values()]).norm())
    return max(float((single[name].double() - g).norm()) for name, g in double.items()) / max(whole, 1e-9)


def pick_change(network: Network, salt: int = 0) -> str:
    """One that the network's seed picks; switches that the network has come first."""
    built = build(network)
    fitting = [name for name, (applies, _) in CHANGES.items() if applies(built)]
    rare = [name for name in fitting if name in ("evaluation mode", "flag", "operand", "mixing")]
    names = rare if rare and (network.seed + salt) % 3 else fitting
    return names[(network.seed // 3 + salt) % len(names)]


@oracle
def changes(network: Network) -> None:
    """Exact after a change between steps."""
    change(network, pick_change(network))


def _layouts(opt: GuessGradOptimizer) -> tuple[Any, ...]:
    """Where the optimizer takes the examples to lie."""
    graph = opt.estimation.plans[0].graph
    return graph.batch, *(site.layout for site in graph.sites), *(cut.layout for cut in graph.cuts)


@oracle
def past(network: Network) -> None:
    """After a change, an optimizer with a past gives the estimate of a new one that has loaded its state: guesses too
    are made from the network as it is now."""
    name = pick_change(network, 1)
    if name in ("frozen parameter", "dtype"):
        name = "data"
    estimator = estimator_for(network, 5)
    built = build(network)
    true_gradients(built)
    opt = optimizer(built, estimator, lr=0.0)
    for step in range(2 + network.seed % 4):
        seeded(step)
        opt.step(built.closure)
    CHANGES[name][1](built)
    true_gradients(built)
    other = optimizer(built, estimator, lr=0.0)
    other.load_state_dict(opt.state_dict())
    found = []
    for each in (opt, other):
        each.zero_grad()
        before = tensors(built)
        seeded()
        each.estimate(built.closure)
        found.append({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in built.named})
        restore(built, before)
    if _layouts(opt) != _layouts(other):  # several may be right, and each has guesses of its own
        return change(network, name)
    compare(found[0], found[1], 1e-7, f"changed {name}: an optimizer with a past against a new one", estimator)
