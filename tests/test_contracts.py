"""Contracts that hold for every estimator, in every memory mode, on every network: CONFIGS x CONTRACTS.

A new estimator, network or option is one more row of a table here; a new contract is one more function.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import count, cycle, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import guessopt
from guessopt import GuessGradOptimizer
from guessopt.estimators import estimator_names, make_estimator
from guessopt.step.modes import MODES

from .awkward import NETWORKS as AWKWARD
from .problems import PROBLEMS, Problem, labels, learned, of

Contract = Callable[["Config"], None]
pytestmark = pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")

# --- the table --------------------------------------------------------------------------------------------------------

SHIPPED = [name for name in estimator_names() if type(make_estimator(name)).__module__.startswith("guessopt.")]


def small(name: str, **options: Any) -> dict[str, Any]:
    """The estimator with narrow bases, renewed within a few steps, so that the age of a basis matters."""
    known = {f.name for f in fields(make_estimator(name))}  # type: ignore[arg-type]
    return {"name": name, **{key: value for key, value in {"k": 2, "refresh": 3}.items() if key in known}, **options}


VARIANTS: dict[str, Any] = {
    "w_perp masked": small("w_perp", basis="masked"),
    "w_perp by example": small("w_perp", basis="example"),
    "w_perp bottom": small("w_perp", basis="example", select="bottom"),
    "w_perp debiased": small("w_perp", debias=True),
    "w_perp_ns by example": small("w_perp_ns", basis="example"),
    "w_transpose power": small("w_transpose", power=2.0),
    "w_transpose debiased": small("w_transpose", debias=True),
    "w_preconditioned shared": small("w_preconditioned", basis="shared"),
    "activation_mixing raw": small("activation_mixing", normalise=False),
    "feedback corrected": small("learned_feedback", gamma=1, every=2),
    "feedback alone": small("learned_feedback", gamma=0, ahead=0),
    "feedback random": small("learned_feedback", every=2, start="random"),
    "feedback by site": small("learned_feedback", residual=False),
    "feedback by position": small("learned_feedback", residual=False, structure="position", gamma=0.5),
    "feedback of W-perp": small("learned_feedback", residual=False, guess={"name": "w_perp", "k": 2, "refresh": 3}),
    "feedback of mixtures": small("learned_feedback", residual=False, entries=8),
    "feedback fixed": small("learned_feedback", residual=False, start="random", beta=0, gamma=0),
    "feedback leaking": small("learned_feedback", residual=False, start="random", leak=0.01),
    "feedback from weights": small("learned_feedback", residual=False, source="weights", gamma=0),
    "patterns": {"0.*": small("w_transpose"), "*": small("w_perp")},
    "patterns with feedback": {"0.*": small("w_transpose"), "*": small("learned_feedback", residual=False)},
}
ESTIMATORS: dict[str, Any] = {**{name: small(name) for name in SHIPPED}, **VARIANTS}


class Mixed(nn.Module):
    """One weight is the embedding and the head; one weight is made of two parameters; one bias is added by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.w, self.g, self.b = (nn.Parameter(torch.randn(*shape)) for shape in ((6, 8), (8, 8), (8, 1), (8,)))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.e)
        h = torch.relu(h @ (self.w * self.g).t() + self.b)
        return h @ self.e.t()


def classifier(*layers: nn.Module) -> Problem:
    """Five examples of six inputs, three classes."""
    x = torch.randn(5, 6, dtype=torch.float64)
    return of(nn.Sequential(*layers), CrossEntropy(x), 5)


class CrossEntropy:
    """A loss of a model that can be pickled."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __call__(self, model: nn.Module) -> Tensor:
        return F.cross_entropy(model(self.x), labels(len(self.x), 3))


def dropout() -> Problem:
    return classifier(
        nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)
    )


def frozen_middle() -> Problem:
    """The frozen layer's weight has a basis, but no parameter's name."""
    problem = dropout()
    assert isinstance(problem.model, nn.Sequential)
    problem.model[3].requires_grad_(False)
    return replace(problem, named=[(name, p) for name, p in problem.named if p.requires_grad])


def batch_norm() -> Problem:
    """Batch statistics, running statistics, dropout, an activation in place, and pooling."""
    return classifier(
        nn.Unflatten(1, (1, 2, 3)),
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.2)),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d((1, 2))),
        *(nn.Flatten(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)),
    )


def encoder() -> Problem:
    """``nn.TransformerEncoderLayer`` calls torch's fused attention."""
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.1)
    return classifier(nn.Unflatten(1, (1, 6)), layer, nn.Flatten(), nn.Linear(6, 3))


NETWORKS: dict[str, Callable[[], Problem]] = {
    **{name: build for name, build in PROBLEMS.items() if name != "transformer"},
    "dropout": dropout,
    "frozen middle": frozen_middle,
    "batch norm": batch_norm,
    "encoder": encoder,
    "mixed parameters": lambda: classifier(Mixed()),
}
#: Networks with a residual stream, along which learned feedback works in other ways.
STREAMS = ("residual, batch norm in eval mode", "tied transformer", "prompts", "rotary language model", "encoder",
           "residual")  # fmt: skip
LEARNING = [name for name, spec in ESTIMATORS.items() if "learned_feedback" in str(spec)]
ALONG_STREAMS = [name for name in LEARNING if "residual" not in str(ESTIMATORS[name])]
#: The first pass of "replay" calls torch's fused attention, "store" an explicit formula: the rounding differs.
FUSED_ATTENTION = ("rotary language model", "encoder")

WAYS = list(product(MODES, (1, 3)))


def ways_of_variant(estimator: str) -> list[tuple[str, int]]:
    """Memory modes and guesses. The estimator itself is in the table in all of them."""
    second = "replay" if list(VARIANTS).index(estimator) % 2 else "stream"
    return [("replay", 1), ("stream", 1)] if estimator in LEARNING else [("store", 3), (second, 1)]


#: A memory mode, and options; ``"stream"`` builds fused updates, whose rounding differs.
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("stream", {"fused": True}),
    "Adagrad": ("stream", {"fused": True}),
    "RMSprop": ("stream", {}),
    **{base: ("replay", {}) for base in ("NAdam", "ASGD", "Adafactor", "Rprop")},
}
#: Options, guesses, memory modes.
OPTIONS: list[tuple[dict[str, Any], int, Iterable[str]]] = [
    ({"seed": 5}, 1, ("store",)),
    ({"seed": 5, "stack_guesses": False}, 3, ("store",)),
    ({"orthogonal": True}, 3, ("store",)),
    ({"exact_last": True}, 1, MODES),
    ({"exact_last": True}, 2, MODES),
    ({"batch_norm": "frozen_statistics"}, 3, MODES),
    ({"check_finite": False}, 1, ("store",)),
]


@dataclass(frozen=True)
class Config:
    """One way to train a network."""

    estimator: str
    memory: str = "store"
    guesses: int = 1
    network: str = "dropout"
    base: str = "SGD"
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    #: None: all that apply.
    contracts: tuple[Contract, ...] | None = None

    def __str__(self) -> str:
        parts = [self.estimator, self.memory, f"{self.guesses} guesses", self.network, self.base]
        return ", ".join([*parts, *(f"{key}={value}" for key, value in self.options.items())])

    @property
    def is_refused(self) -> bool:
        """Learned feedback keeps one guess for a second pass, and no residual stream for ``"stream"``."""
        several = self.guesses > 1 and self.memory != "store"
        stream = self.network in STREAMS and self.memory == "stream" and self.estimator in ALONG_STREAMS
        return self.estimator in LEARNING and (several or stream)


def configs() -> Iterator[Config]:
    """Every estimator in every mode, each time on the next network; other bases and options; awkward networks."""
    networks = cycle(NETWORKS)
    for estimator in ESTIMATORS:
        for memory, guesses in WAYS if estimator in SHIPPED else ways_of_variant(estimator):
            rows = [Config(estimator, memory, guesses, next(networks)) for _ in range(3)]
            yield from [row for row in rows if not row.is_refused][:1]
    for base, (memory, options) in BASES.items():
        yield Config("w_perp", memory, base=base, options=options)
    for network in [name for name in NETWORKS if name not in PROBLEMS]:  # those are in test_exactness
        for estimator in ("w_perp", "w_transpose", "activation_perturbation", "directional_descent"):
            yield Config(estimator, network=network, contracts=(engines_agree,))
    for options, guesses, modes in OPTIONS:
        for memory in modes:
            yield Config("w_perp", memory, guesses, "batch norm", options=options)
    ways = cycle(WAYS)
    for estimator in ESTIMATORS:
        for network in AWKWARD if estimator in SHIPPED else list(AWKWARD)[:3]:
            rows = [replace(Config(estimator, *next(ways), network), contracts=(scales_with_the_loss,)) for _ in WAYS]
            yield from [row for row in rows if not row.is_refused][:1]
            next(ways)


# --- training ---------------------------------------------------------------------------------------------------------

BEFORE, AFTER = 2, 2


class Run:
    """A network in training. ``changes``: options of the optimizer in place of the config's."""

    def __init__(self, config: Config, **changes: Any) -> None:
        torch.manual_seed(3)
        self.problem = {**NETWORKS, **AWKWARD}[config.network]()
        options = {
            "lr": 0.02,
            "audit": False,
            "memory": config.memory,
            "guesses": config.guesses,
            **config.options,
            **changes,
        }
        base = getattr(torch.optim, config.base)
        self.opt = GuessGradOptimizer(self.problem.named, base, ESTIMATORS[config.estimator], **options)
        self.losses: list[float] = []

    @property
    def model(self) -> nn.Module:
        assert self.problem.model is not None
        return self.problem.model

    def closure(self) -> Tensor:
        assert self.problem.loss is not None
        return self.problem.loss(self.model)

    def train(self, steps: int) -> Run:
        self.losses += [float(self.opt.step(self.closure)) for _ in range(steps)]
        return self

    def weights(self) -> dict[str, Any]:
        """What the user sees: losses, parameters, buffers."""
        return {"losses": list(self.losses), "model": copy.deepcopy(self.model.state_dict())}

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {**self.weights(), "optimizer": copy.deepcopy(self.opt.state_dict()), "random": torch.get_rng_state()}


def differences(found: Any, expected: Any, tolerance: float = 0.0, place: str = "") -> list[str]:
    """The places at which two nested states differ."""
    if isinstance(expected, dict):
        if not isinstance(found, dict) or found.keys() != expected.keys():
            return [f"{place}: other keys"]
        pairs = [(found[key], value, f"{place}/{key}") for key, value in expected.items()]
    elif isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return [f"{place}: {len(found)} entries in place of {len(expected)}"]
        pairs = [(a, b, f"{place}/{k}") for k, (a, b) in enumerate(zip(found, expected, strict=True))]
    elif isinstance(expected, Tensor):
        near = torch.equal(found, expected) or (
            tolerance and torch.allclose(found.double(), expected.double(), rtol=tolerance, atol=tolerance)
        )
        return [] if near else [f"{place}: off by {float((found.double() - expected.double()).abs().max()):.1e}"]
    elif isinstance(expected, float) and isinstance(found, float):
        return [] if found == pytest.approx(expected, rel=tolerance, abs=0) else [f"{place}: {found} and {expected}"]
    else:
        return [] if found == expected else [f"{place}: {found} and {expected}"]
    return [difference for a, b, where in pairs for difference in differences(a, b, tolerance, where)]


def assert_same(found: Any, expected: Any, tolerance: float = 0.0) -> None:
    assert differences(found, expected, tolerance) == []


@dataclass
class Reference:
    """Uninterrupted training of ``BEFORE + AFTER`` steps, and copies of the model and the optimizer in the middle."""

    middle: dict[str, Any]
    state_dicts: bytes
    file: bytes
    copies: dict[str, Callable[[], Any]]
    run: Run
    end: dict[str, Any]


@lru_cache(maxsize=1)  # the contracts of one config follow each other
def reference(config: Config) -> Reference:
    run = Run(config).train(BEFORE)
    pair = run.model, run.opt
    state_dicts = through_file(lambda file: torch.save([part.state_dict() for part in pair], file))
    file = through_file(lambda file: guessopt.save(file, run.opt, run.model))
    copies = copies_of(pair) if config.memory == "store" else {}
    middle = run.state()
    run.train(AFTER)
    return Reference(middle, state_dicts, file, copies, run, run.state())


def copies_of(pair: Any) -> dict[str, Callable[[], Any]]:
    """How the pair was copied -> the copy."""
    copied, pickled = copy.deepcopy(pair), pickle.dumps(pair)
    saved = through_file(lambda file: torch.save(pair, file))
    return {
        "copy.deepcopy": lambda: copied,
        "pickle": lambda: pickle.loads(pickled),
        "torch.save": lambda: torch.load(io.BytesIO(saved), weights_only=False),
    }


def through_file(save: Callable[[Path], Any]) -> bytes:
    """The content of the file that ``save`` writes."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        save(path)
        return path.read_bytes()


# --- the contracts ----------------------------------------------------------------------------------------------------


def resumes_bit_for_bit(config: Config) -> None:
    """A new model and optimizer, in a process seeded otherwise, go on from what was saved."""
    expected = reference(config)
    run = Run(config)
    torch.manual_seed(99)
    way = len(str(config)) % 3
    if way == 0:
        through_file(lambda path: (path.write_bytes(expected.file), guessopt.load(path, run.opt, run.model)))
    else:
        model, opt = torch.load(io.BytesIO(expected.state_dicts), weights_only=True)
        if way == 1:
            torch.set_rng_state(expected.middle["random"])
        run.model.load_state_dict(model)
        run.opt.load_state_dict(opt)
        torch.set_rng_state(expected.middle["random"])
    run.losses = list(expected.middle["losses"])
    assert_same(run.train(AFTER).state(), expected.end)


def copies_go_on_bit_for_bit(config: Config) -> None:
    """The original stays as it is while a copy trains."""
    expected = reference(config)
    for copied in expected.copies.values():
        run = Run(config)
        run.problem.model, run.opt = copied()
        trained = {id(p) for group in run.opt.param_groups for p in group["params"]}
        assert trained and trained <= {id(p) for p in run.model.parameters()}, "model and optimizer share no parameters"
        run.losses = list(expected.middle["losses"])
        torch.set_rng_state(expected.middle["random"])
        assert_same(run.train(AFTER).state(), expected.end)
    assert_same(expected.run.state(), expected.end)


def engines_agree(config: Config) -> None:
    """The package's own tangents, torch's dual tensors, and ``torch.func.jvp``."""
    steps, lr = (BEFORE, 0.02) if config.estimator in LEARNING else (1, 1.0)
    found = {engine: Run(config, engine=engine, lr=lr).train(steps).weights() for engine in ("fast", "dual", "func")}
    for engine in ("dual", "func"):
        assert_same(found[engine], found["fast"], 1e-10)


def memory_modes_agree(config: Config) -> None:
    """Losses, weights, the base's state and learned feedback are those of ``"store"``."""
    expected = reference(config)
    run = Run(config, memory="store").train(BEFORE + AFTER)
    tolerance = 1e-9 if config.guesses > 1 or config.network in FUSED_ATTENTION else 0.0
    found, end = run.state(), expected.end
    for part in ("losses", "model", "random"):
        assert_same(found[part], end[part], tolerance)
    assert_same(found["optimizer"]["state"], end["optimizer"]["state"], tolerance)
    assert_same(learned(run.opt), learned(expected.run.opt), tolerance)


def stacked_guesses_are_those_in_turn(config: Config) -> None:
    """``stack_guesses=True`` raises where the guesses cannot share a pass."""
    together, in_turn = (Run(config, stack_guesses=so).train(BEFORE) for so in (True, False))
    tolerance = 1e-5 if config.estimator == "w_perp debiased" else 1e-8  # a pseudo-inverse enlarges rounding
    assert_same(together.weights(), in_turn.weights(), tolerance)


def a_failed_step_changes_nothing(config: Config) -> None:
    """The closure raises in its first run, or in a later one; then training goes on as if it had not."""
    run = Run(config)
    for step, failing in enumerate([(3,), (1, 2, 3)]):
        for number in failing:
            before = run.state()
            if not failed_step(run, number):
                break
            assert_same(run.state(), before)
        run.train(1 + step - len(run.losses))
    assert_same(run.state(), reference(config).middle)


def failed_step(run: Run, number: int) -> bool:
    """A step in which run ``number`` of the closure raises. False: the step succeeded, for it needed fewer runs."""
    runs = count(1)

    def closure() -> Tensor:
        if next(runs) == number:
            raise KeyError("failing")
        return run.closure()

    try:
        run.losses.append(float(run.opt.step(closure)))
    except KeyError:
        return True
    assert next(runs) <= number, "the closure's error was swallowed"
    return False


def scales_with_the_loss(config: Config) -> None:
    """Three times the loss gives three times the estimate."""
    steps = []
    for scale in (1.0, 3.0):
        run = Run(replace(config, base="SGD"), lr=1.0)
        before = [p.detach().clone() for _, p in run.problem.named]
        run.opt.step(lambda run=run, scale=scale: scale * run.closure())
        steps.append([old - p.detach() for old, (_, p) in zip(before, run.problem.named, strict=True)])
    once, thrice = steps
    assert any(bool(step.any()) for step in once) and all(bool(step.isfinite().all()) for step in once)
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(b, 3 * a, rtol=1e-6, atol=1e-9)


#: Each contract, and to which configs it applies.
CONTRACTS: dict[Contract, Callable[[Config], bool]] = {
    resumes_bit_for_bit: lambda config: True,
    copies_go_on_bit_for_bit: lambda config: config.memory == "store",
    engines_agree: lambda config: (config.memory, config.guesses, config.base) == ("store", 1, "SGD"),
    memory_modes_agree: lambda config: config.memory != "store",
    stacked_guesses_are_those_in_turn: lambda config: (
        config.memory == "store" and config.guesses > 1 and config.estimator not in LEARNING
    ),
    a_failed_step_changes_nothing: lambda config: True,
    scales_with_the_loss: lambda config: config.memory == "store" or config.contracts is not None,
}
CONFIGS = list(configs())
#: Networks whose sites' weights do not lead to one output of at most 128 features: feedback from weights refuses them.
NO_CHAIN_OF_WEIGHTS = ("functional", "rotary language model", "frozen middle")


def has_two_runs(config: Config) -> bool:
    """A pseudo-inverse enlarges the rounding of fused attention beyond any tolerance: ``debias`` is left out there."""
    enlarged = "debiased" in config.estimator and config.network in FUSED_ATTENTION
    refused = config.estimator == "feedback from weights" and config.network in NO_CHAIN_OF_WEIGHTS
    return not (config.is_refused or enlarged or refused)


#: Both runs of a step agree with the one run of ``"store"`` for every estimator on every network.
TWO_RUNS = [
    config
    for estimator, network, memory in product(ESTIMATORS, NETWORKS, ("replay", "stream"))
    if has_two_runs(config := Config(estimator, memory, 1, network))
]
ROWS = [
    pytest.param(config, contract, id=f"{contract.__name__.replace('_', ' ')}: {config}")
    for config in CONFIGS
    for contract, applies in CONTRACTS.items()
    if applies(config) and contract in (config.contracts or CONTRACTS)
]
ROWS += [
    pytest.param(config, memory_modes_agree, id=f"every network: {config}", marks=pytest.mark.slow)
    for config in TWO_RUNS
]


@pytest.mark.parametrize(("config", "contract"), ROWS)
def test_contract(config: Config, contract: Contract) -> None:
    contract(config)


def test_every_estimator_is_in_the_table_in_every_way_that_it_allows() -> None:
    found = {(config.estimator, config.memory, config.guesses) for config in CONFIGS if not config.contracts}
    assert found >= {
        (name, memory, guesses)
        for name in SHIPPED
        for memory, guesses in WAYS
        if not Config(name, memory, guesses).is_refused
    }
    assert {config.network for config in CONFIGS} == NETWORKS.keys() | AWKWARD.keys()
    found = {(config.network, config.memory) for config in CONFIGS if not config.contracts}
    assert found >= set(product(NETWORKS, MODES))


@pytest.mark.parametrize("part", ["model", "optimizer", "random", "losses"])
def test_the_comparison_can_fail(part: str) -> None:
    run = Run(Config("learned_feedback")).train(1)
    before = run.state()
    run.train(1)
    assert differences(run.state()[part], before[part]) != []
