"""Step time over a backprop step and over a checkpointed one, and where a W-perp step's time goes.

With ``--guesses K`` instead: what K guesses in one pass cost, as a multiple of what one costs (``GuessCost``). With
``--single`` instead: steps of small networks, and what audits cost in a thousand of them; with ``--against DIR`` beside
the steps of another version of the package, whose checkout is there.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from pathlib import Path
from statistics import mean, median
from time import process_time
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from benchmarks import step_times
from benchmarks.measure import Ratio, Step, Stopwatch, interleaved, ratio, seconds
from benchmarks.problems import causal_lm, cnn, relu_mlp, vit
from benchmarks.report import COMMITTED, SCRATCH, Table, print_table, write_json
from benchmarks.training import ESTIMATORS, LABELS
from guessopt import GuessGradOptimizer, GuessWarning, WPerp, WTranspose
from guessopt.engine.forward import ForwardRun
from guessopt.engine.gradients import parameter_gradients
from guessopt.engine.jvp import engines
from guessopt.step import guessing, modes, runs, updating
from guessopt.step.updating import update
from guessopt.tracing import context


@dataclass(frozen=True)
class Settings:
    """What is run: ``methods`` are pairs of an estimator's and an engine's name; ``engine`` is the one whose
    ``steps`` consecutive steps are taken apart."""

    quick: bool
    device: str
    rounds: int
    steps: int
    engine: str
    methods: dict[str, tuple[str, str]]


# --- problems ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A model and one batch for it."""

    model: nn.Sequential
    x: Tensor
    y: Tensor

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    def checkpointed_loss(self) -> Tensor:
        """The same, with every layer's or block's inside forgotten and computed again."""
        x = self.x
        for layer in layers(self.model):
            x = checkpoint(layer, x, use_reentrant=False)
        return F.cross_entropy(x, self.y)

    def copy(self) -> Problem:
        """The same batch for a model of its own."""
        return Problem(copy.deepcopy(self.model), self.x, self.y)


def layers(model: nn.Sequential) -> list[nn.Sequential]:
    """The model in pieces: each starts at a child with parameters and takes along what follows without (a ReLU)."""
    pieces: list[list[nn.Module]] = []
    for child in model:
        if not pieces or any(True for _ in child.parameters()):
            pieces.append([])
        pieces[-1].append(child)
    return [nn.Sequential(*piece) for piece in pieces]


def mlp(width: int, depth: int, batch: int) -> Problem:
    return Problem(relu_mlp(width, depth, inputs=width), torch.randn(batch, width), torch.randint(10, (batch,)))


def images(model: nn.Sequential, batch: int) -> Problem:
    return Problem(model, torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,)))


def text(batch: int) -> Problem:
    ids = torch.randint(65, (batch, 65))
    return Problem(causal_lm(), ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


@dataclass(frozen=True)
class Entry:
    """A problem by its batch size: the full one, and that of ``--quick``."""

    title: str
    make: Callable[[int], Problem]
    batch: int
    quick: int


PROBLEMS = {
    "mlp6x1024": Entry("MLP 6x1024", lambda n: mlp(1024, 6, n), batch=512, quick=32),
    "mlp12x32": Entry("MLP 12x32", lambda n: mlp(32, 12, n), batch=64, quick=64),
    "cnn": Entry("CNN", lambda n: images(cnn(), n), batch=64, quick=4),
    "vit": Entry("ViT", lambda n: images(vit(), n), batch=64, quick=2),
    "lm": Entry("causal LM", text, batch=16, quick=2),
}

# --- steps ------------------------------------------------------------------------------------------------------------

LR = 1e-4
ROOT = Path(__file__).parents[1]
DEFAULT_ENGINE: str = inspect.signature(GuessGradOptimizer).parameters["engine"].default
MATH_ATTENTION = "unfused attention with engine {}, which has no forward-mode rule for the fused one"


def backprop(problem: Problem, loss: Callable[[], Tensor]) -> Step:
    adamw = torch.optim.AdamW(problem.model.parameters(), lr=LR)

    def step() -> None:
        adamw.zero_grad()
        loss().backward()
        adamw.step()

    return step


def guess_optimizer(problem: Problem, estimator: Any, engine: Any) -> GuessGradOptimizer:
    return GuessGradOptimizer(
        problem.model.parameters(), base=torch.optim.AdamW, estimator=estimator, engine=engine, lr=LR
    )


class Bench:
    """Steps of every kind on copies of one problem, each warmed up; ``notes`` says what was done differently."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.notes: list[str] = []

    def backprop(self) -> Step:
        own = self.problem.copy()
        return warm(backprop(own, own.loss))

    def checkpointed(self) -> Step:
        own = self.problem.copy()
        return warm(backprop(own, own.checkpointed_loss))

    def forward(self) -> Step:
        """The closure by itself."""
        return warm(torch.no_grad()(self.problem.loss))

    def guess(self, estimator: Any, engine: str) -> Step:
        own = self.problem.copy()
        guesser = guess_optimizer(own, estimator, engine)
        return self._with_attention(lambda: guesser.step(own.loss), engine)

    def empty_pass(self, engine: str) -> Step:
        """A guess step without guesses: what the interception of the closure's calls costs."""
        own = self.problem.copy()
        guesser = guess_optimizer(own, "activation_perturbation", engine)

        def step() -> object:
            with mock.patch.object(guessing, "guess_at", lambda *_: None):
                return guesser.estimate(own.loss)

        return self._with_attention(step, engine)

    def _with_attention(self, step: Step, engine: str) -> Step:
        """The step, with unfused attention if the engine cannot do the fused."""
        try:
            return warm(step)
        except NotImplementedError as error:
            if "scaled_dot_product" not in str(error):
                raise

        def unfused() -> None:
            with sdpa_kernel(SDPBackend.MATH):
                step()

        if (note := MATH_ATTENTION.format(engine)) not in self.notes:
            self.notes.append(note)
        return warm(unfused)


def warm(step: Step) -> Step:
    """Past tracing and the probes of the first steps, and past what an optimizer allocates in them."""
    for _ in range(5):
        step()
    return step


# --- where the time goes ----------------------------------------------------------------------------------------------

REFRESH, PROBE, PASS, REST = "guesses: SVD", "probe", "pass", "bookkeeping"
POINTS: tuple[tuple[Any, str, str], ...] = (
    (guessing, "guess_at", "guesses: transposes"),
    (context, "draw", "guesses: noise"),
    (context.SiteContext, "pull_back", "guesses: pull back"),
    (WPerp, "prepare", REFRESH),
    (ForwardRun, "execute", PASS),
    (modes, "estimated_cotangents", "parameter gradients"),
    (modes, "parameter_gradients", "parameter gradients"),
    (updating, "update", "base update"),
    (runs, "trace", PROBE),
    (runs, "probe_again", PROBE),
)
"""Places in the package, and the phase that each is. What is in none is bookkeeping."""
PHASES = ("forward", "interception", "tangents", *dict.fromkeys(phase for *_, phase in POINTS if phase != PASS), REST)


@contextmanager
def instrumented(watch: Stopwatch) -> Iterator[None]:
    """Let the stopwatch see the phases of every guess optimizer's steps."""

    def timed(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with watch.phase(phase):
                return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for owner, name, phase in POINTS:
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), phase)))
        yield


@dataclass(frozen=True)
class LongRun:
    """Consecutive steps with two refreshes of every basis among them, interleaved with the other methods' steps.

    ``breakdown``: shares of a W-perp step by phase; ``slowest``: slowest step over the median one; ``because``: the
    phase in which W-perp's slowest step exceeds the median most.
    """

    perp_over_transpose: float
    perp_over_backprop: float
    slowest: dict[str, float]
    because: str
    breakdown: dict[str, float]
    seconds: dict[str, float]


def long_run(bench: Bench, settings: Settings, label: str) -> LongRun:
    engine, steps = settings.engine, settings.steps
    watch = Stopwatch(settings.device, whole=(PROBE,))
    kinds = {
        "backprop": bench.backprop(),
        "forward": bench.forward(),
        "empty pass": bench.empty_pass(engine),
        "w_transpose": bench.guess(WTranspose(), engine),
        "w_perp": bench.guess(WPerp(k=10, refresh=max(steps // 2, 1)), engine),
    }
    laps: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    with instrumented(watch):
        for _ in tqdm(range(steps), desc=f"{label:>12}, consecutive", unit="step", leave=False, disable=None):
            for name, step in kinds.items():
                with watch.phase(REST):
                    step()
                laps[name].append(watch.lap())
    totals = {name: [sum(lap.values()) for lap in each] for name, each in laps.items()}
    mine, slowest = totals["w_perp"], totals["w_perp"].index(max(totals["w_perp"]))
    excess = {phase: laps["w_perp"][slowest].get(phase, 0) - typical(laps["w_perp"], phase) for phase in PHASES}
    spent = {phase: typical(laps["w_perp"], phase) for phase in PHASES}
    spent["forward"] = median(totals["forward"])
    spent["interception"] = typical(laps["empty pass"], PASS) - spent["forward"]
    spent["tangents"] = typical(laps["w_perp"], PASS) - typical(laps["empty pass"], PASS)
    whole = sum(spent.values())
    return LongRun(
        perp_over_transpose=mean(mine) / mean(totals["w_transpose"]),
        perp_over_backprop=mean(mine) / mean(totals["backprop"]),
        slowest={name: max(totals[name]) / median(totals[name]) for name in ("w_perp", "w_transpose", "backprop")},
        because=max(excess, key=lambda phase: excess[phase]),
        breakdown={phase: spent[phase] / whole for phase in PHASES},
        seconds={name: median(each) for name, each in totals.items()},
    )


def typical(laps: list[dict[str, float]], phase: str) -> float:
    """A step's time in a phase: the median, but the mean for what happens seldom."""
    average = mean if phase in (REFRESH, PROBE) else median
    return average([lap.get(phase, 0.0) for lap in laps])


# --- several guesses --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GuessCost:
    """CPU seconds (medians of interleaved rounds), and two ratios of the part of a step that guesses make.

    ``ratio``: of a step's time without the plain forward and the parameter gradients, which guesses share, K guesses
    over one. ``tangents``: the same without the base's update too. ``over_in_turn``: a step with K guesses in one pass
    over one with a pass for each.
    """

    ratio: float
    tangents: float
    over_in_turn: float
    seconds: dict[str, float]


GUESS_PROBLEMS = {
    "mlp6x1024": PROBLEMS["mlp6x1024"],
    "mlp3x128": Entry(
        "MNIST-1D MLP 3x128",
        lambda n: Problem(relu_mlp(128, 3), torch.randn(n, 40), torch.randint(10, (n,))),
        batch=512,
        quick=64,
    ),
}


def guess_cost(problem: Problem, estimator: Any, guesses: int, rounds: int) -> GuessCost:
    """See ``GuessCost``. Rounds go through the kinds of step in turn, by CPU time, whatever else runs."""
    gradients: list[float] = []

    def stepper(**options: Any) -> tuple[GuessGradOptimizer, Step]:
        own = problem.copy()
        guesser = GuessGradOptimizer(own.model.parameters(), torch.optim.AdamW, estimator, lr=LR, **options)
        return guesser, warm(lambda: guesser.step(own.loss))

    def timed(*args: Any) -> Any:
        start = process_time()
        found = parameter_gradients(*args)
        gradients.append(process_time() - start)
        return found

    one, one_step = stepper()
    kinds: dict[str, Step] = {
        "forward": warm(torch.no_grad()(problem.loss)),
        "one": one_step,
        "shared": stepper(guesses=guesses, stack_guesses=True)[1],
        "in turn": stepper(guesses=guesses, stack_guesses=False)[1],
        "update": partial(update, one.estimation),
    }
    times: dict[str, list[float]] = {name: [] for name in (*kinds, "gradients")}
    with mock.patch.object(modes, "parameter_gradients", timed):
        for _ in range(rounds):
            for name, step in kinds.items():
                gradients.clear()
                start = process_time()
                step()
                times[name].append(process_time() - start)
                if name == "one":
                    times["gradients"].append(sum(gradients))
    t = {name: median(each) for name, each in times.items()}
    shared = t["forward"] + t["gradients"]
    return GuessCost(
        ratio=(t["shared"] - shared) / (t["one"] - shared),
        tangents=(t["shared"] - shared - t["update"]) / (t["one"] - shared - t["update"]),
        over_in_turn=t["shared"] / t["in turn"],
        seconds=t,
    )


def run_guesses(args: argparse.Namespace, out: Path) -> None:
    """``GuessCost`` of each problem and estimator: a table, and ``guesses.json``."""
    found: dict[str, dict[str, GuessCost]] = {}
    estimators = {name: make() for name, make in ESTIMATORS.items() if not make().learns}
    for name, entry in GUESS_PROBLEMS.items():
        torch.manual_seed(0)
        problem = entry.make(entry.quick if args.quick else entry.batch)
        rounds = args.rounds or (3 if args.quick else 15)
        found[name] = {method: guess_cost(problem, e, args.guesses, rounds) for method, e in estimators.items()}
    figures = {name: {method: asdict(cost) for method, cost in costs.items()} for name, costs in found.items()}
    write_json(out / "guesses.json", args, seeds=[0], settings={"guesses": args.guesses}, figures=figures)
    print_table(
        f"What {args.guesses} guesses in one pass cost, in units of one guess",
        ["problem, method", "guess part", "without update", "step over in turn"],
        [
            [
                f"{GUESS_PROBLEMS[name].title}, {LABELS.get(method, method)}",
                f"{cost.ratio:.2f}",
                f"{cost.tangents:.2f}",
                f"{cost.over_in_turn:.2f}",
            ]
            for name, costs in found.items()
            for method, cost in costs.items()
        ],
    )


# --- small networks ---------------------------------------------------------------------------------------------------


def run_single(args: argparse.Namespace, out: Path) -> None:
    """``step_times.Times`` of each small network and each way to make its steps: a table, and ``steps.json``."""
    networks = list(step_times.NETWORKS)[:1] if args.quick else list(step_times.NETWORKS)
    blocks, count = (2, 2) if args.quick else (args.rounds or 12, 5)
    now, before = step_times.Side(ROOT), step_times.Side(args.against) if args.against else None
    found: dict[str, dict[str, step_times.Times]] = {}
    try:
        for network in networks:
            found[network] = {
                options: step_times.measured(network, options, now, before, blocks, count)
                for options in tqdm(step_times.OPTIONS, desc=f"{network:>14}", leave=False, disable=None)
            }
    finally:
        now.close()
        if before is not None:
            before.close()
    figures = {network: {options: asdict(t) for options, t in each.items()} for network, each in found.items()}
    write_json(out / "steps.json", args, seeds=[0], settings={"blocks": blocks, "steps": count}, figures=figures)
    print_table(
        "Milliseconds of a step (the least), and audits' share of 1,000 steps",
        ["network, method", "before", "now", "now / before", "audits"],
        [
            [f"{network}, {options}", *(shown(x) for x in (t.before, t.now)), shown(t.over), shown(t.audits, "%")]
            for network, each in found.items()
            for options, t in each.items()
        ],
    )


def shown(x: float | None, unit: str = "") -> str:
    return "-" if x is None else f"{100 * x:.1f}%" if unit else f"{x:.3f}"


# --- the experiment ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One problem's figures; ``seconds`` of a median step, which only ratios should be quoted from."""

    parameters: int
    batch: int
    over_backprop: dict[str, Ratio]
    over_checkpointed: dict[str, Ratio]
    seconds: dict[str, float]
    long_run: LongRun
    notes: list[str]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), metavar="NAME")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default: 15)")
    parser.add_argument("--steps", type=int, help="consecutive steps with two refreshes among them (default: 100)")
    parser.add_argument("--engine", default=DEFAULT_ENGINE, help="of the consecutive steps (default: the optimizer's)")
    parser.add_argument("--reference", action="store_true", help="the engine torch.func.jvp as well")
    parser.add_argument("--guesses", type=int, metavar="K", help="measure only what K guesses in one pass cost (CPU)")
    parser.add_argument("--single", action="store_true", help="measure only steps of small networks, and audits (CPU)")
    parser.add_argument("--against", type=Path, metavar="DIR", help="the same, beside another version's checkout")


def run(args: argparse.Namespace) -> None:
    out = args.out or (SCRATCH if args.quick else COMMITTED)
    if args.single or args.against:
        run_single(args, out)
        return
    if args.guesses:
        before = torch.get_num_threads()
        torch.set_num_threads(args.threads)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", GuessWarning)
                run_guesses(args, out)
        finally:
            torch.set_num_threads(before)
        return
    chosen = [name for name in engines._ENGINES if name != "func" or args.reference]
    settings = Settings(
        quick=args.quick,
        device=args.device,
        rounds=args.rounds or (3 if args.quick else 15),
        steps=args.steps or (6 if args.quick else 100),
        engine=args.engine,
        methods={f"{method}, {engine}": (method, engine) for engine in chosen for method in ESTIMATORS},
    )
    path, before = out / "speed.json", torch.get_num_threads()
    rows: dict[str, Row] = {}
    torch.set_num_threads(args.threads)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GuessWarning)  # which guess a site gets is no matter of speed
            for name in args.problems:
                rows[name] = measure(name, settings)
                figures = {key: asdict(row) for key, row in rows.items()}
                write_json(path, args, seeds=[0], settings=asdict(settings), figures=figures)
    finally:
        torch.set_num_threads(before)
    for table in tables(rows, settings):
        print_table(*table)
    plot(rows, out / "speed.png")
    print(f"Figures in {path}, shares in {out / 'speed.png'}")


def measure(name: str, settings: Settings) -> Row:
    entry = PROBLEMS[name]
    batch, device = entry.quick if settings.quick else entry.batch, settings.device
    torch.manual_seed(0)
    made = entry.make(batch)
    bench = Bench(Problem(made.model.to(device), made.x.to(device), made.y.to(device)))
    kinds = {"backprop": bench.backprop(), "checkpointed": bench.checkpointed()}
    kinds |= {key: bench.guess(ESTIMATORS[method](), engine) for key, (method, engine) in settings.methods.items()}
    block = max(1, ceil(0.02 / seconds(kinds["backprop"], 1, device)))  # long enough for the clock
    times: dict[str, list[float]] = {key: [] for key in kinds}
    for _ in tqdm(
        range(settings.rounds), desc=f"{entry.title:>12}, interleaved", unit="round", leave=False, disable=None
    ):
        for key, values in interleaved(kinds, rounds=1, block=block, device=device).items():
            times[key] += values
    return Row(
        parameters=sum(p.numel() for p in made.model.parameters()),
        batch=batch,
        over_backprop={key: ratio(values, times["backprop"]) for key, values in times.items()},
        over_checkpointed={key: ratio(values, times["checkpointed"]) for key, values in times.items()},
        seconds={key: median(values) / block for key, values in times.items()},
        long_run=long_run(bench, settings, entry.title),
        notes=bench.notes,
    )


def tables_of(content: dict[str, Any]) -> list[Table]:
    """The tables of a JSON that this experiment wrote."""

    def ratios(found: dict[str, Any]) -> dict[str, Ratio]:
        return {key: Ratio(**value) for key, value in found.items()}

    rows = {}
    for name, row in content["figures"].items():
        over = {key: ratios(row[key]) for key in ("over_backprop", "over_checkpointed")}
        rows[name] = Row(**{**row, **over, "long_run": LongRun(**row["long_run"])})
    return tables(rows, Settings(**content["settings"]))


def tables(rows: dict[str, Row], settings: Settings) -> list[Table]:
    engines = {engine for _, engine in settings.methods.values()}

    def label(key: str) -> str:
        method, _, engine = key.partition(", ")
        return LABELS.get(method, "checkpointed backprop") + (f", {engine}" if engine and len(engines) > 1 else "")

    over = Table(
        "Step time, ratios of medians (quartiles)",
        ["problem, method", "over backprop", "over checkpointed"],
        [
            [f"{PROBLEMS[name].title}, {label(key)}", str(row.over_backprop[key]), str(row.over_checkpointed[key])]
            for name, row in rows.items()
            for key in ("checkpointed", *settings.methods)
        ],
    )
    titles = [PROBLEMS[name].title.replace(" ", "\n", 1) for name in rows]
    runs = [row.long_run for row in rows.values()]
    consecutive = Table(
        f"{settings.steps} consecutive steps with two refreshes of every basis",
        ["", *titles],
        [
            ["mean W-perp / W^T", *(f"{run.perp_over_transpose:.2f}" for run in runs)],
            ["mean W-perp / backprop", *(f"{run.perp_over_backprop:.2f}" for run in runs)],
            ["slowest / median, W-perp", *(f"{run.slowest['w_perp']:.2f}" for run in runs)],
            ["  because of", *(run.because.removeprefix("guesses: ") for run in runs)],
            ["slowest / median, W^T", *(f"{run.slowest['w_transpose']:.2f}" for run in runs)],
            ["slowest / median, backprop", *(f"{run.slowest['backprop']:.2f}" for run in runs)],
        ],
    )
    shares = Table(
        "Shares of a W-perp step (k=10)",
        ["phase", *titles],
        [[phase, *(f"{100 * run.breakdown[phase]:.1f}%" for run in runs)] for phase in PHASES],
        "forward: the closure by itself. interception: a pass without guesses, less the forward. tangents: a pass\n"
        "with guesses, less their making and the pass without. bookkeeping: what is left of the step."
        + "".join(f"\n{PROBLEMS[name].title}: {note}." for name, row in rows.items() for note in row.notes),
    )
    return [over, consecutive, shares]


def plot(rows: dict[str, Row], path: Path) -> None:
    """One bar a problem: a W-perp step by phase, in units of a backprop step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8.5, 0.7 * len(rows) + 2.2), layout="constrained")
    titles, starts = [PROBLEMS[name].title for name in rows], [0.0] * len(rows)
    for number, phase in enumerate(PHASES):
        widths = [row.long_run.breakdown[phase] * row.long_run.perp_over_backprop for row in rows.values()]
        axis.barh(titles, widths, left=starts, color=f"C{number}" if number < 10 else "0.6", label=phase)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axis.axvline(1, color="black", linewidth=1)
    axis.set(xlabel="W-perp step, in backprop steps")
    axis.invert_yaxis()
    figure.legend(loc="outside right center", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
