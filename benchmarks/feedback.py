"""Learned feedback against backprop and feedback alignment on eleven networks; resumes where it stopped."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.data import Dataset, characters, cifar10, mnist1d
from benchmarks.measure import time_ratios
from benchmarks.problems import MeanToken, causal_lm, cnn, relu_mlp, resnet, vit
from benchmarks.report import COMMITTED, SCRATCH, Table, plot_curves, print_table, spread, write_json
from benchmarks.training import batches
from guessopt import ActivationPerturbation, ClosureError, GuessGradOptimizer, LearnedFeedback, WPerp, WTranspose
from guessopt.diagnostics import cosine

_learned = partial(LearnedFeedback, gamma=0, every="auto")
# Direct feedback alignment: matrices that never learn; the error reaches every site through its own.
_fixed = partial(LearnedFeedback, gamma=0, beta=0, ahead=0, residual=False)
ESTIMATORS: dict[str, tuple[str, Callable[[], Any]]] = {
    "learned_feedback": ("learned feedback", _learned),
    "random_feedback": ("random DFA", lambda: _fixed(start="random")),
    "fixed_feedback": ("fixed DFA", lambda: _fixed(start="weights")),
    "w_perp": ("W-perp", lambda: WPerp(k=10)),
    "w_transpose": ("W^T", WTranspose),
    "activation_perturbation": ("activation pert.", ActivationPerturbation),
    # Parts of learned feedback, named by --methods to see what each is worth.
    "learned_feedback_near": ("learned, ahead=0", lambda: _learned(ahead=0)),
    "learned_feedback_skips": ("skips alone", lambda: LearnedFeedback(gamma=0, beta=0, ahead=0)),
    "learned_feedback_sites": ("learned, no stream", lambda: _learned(residual=False)),
    "learned_feedback_position": ("learned, position", lambda: _learned(structure="position")),
    "learned_feedback_shared": ("learned, shared", lambda: _learned(structure="shared")),
    "learned_feedback_guesses": ("learned, guesses", lambda: _learned(source="guesses")),
    "learned_feedback_weights": ("learned, weights", lambda: _learned(source="weights")),
    "learned_feedback_zero": ("learned, from zero", lambda: _learned(start="zero", source="guesses")),
    "learned_feedback_auto": ("learned, gamma auto", LearnedFeedback),
}
LABELS = {"backprop": "backprop"} | {name: label for name, (label, _) in ESTIMATORS.items()}
METHODS = tuple(LABELS)[:7]
LRS = (1e-4, 3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Problem:
    """A network, its data and a budget.

    ``judge``: the figure by which a learning rate is chosen: ``train`` or ``test`` accuracy, or the test ``loss``.
    ``target``: what learned feedback should reach of it, relative to backprop's (of a loss: of its drop below the
    unigram's). ``looks``: moments at which a run is judged; ``lowest``: of all rates; ``seeds``: runs at the best;
    ``decays``: the rate falls linearly to zero. (At a constant one AdamW throws deep networks back now and then, by
    whichever gradient, and the last step is a lottery.)"""

    title: str
    network: Callable[[], nn.Module]
    data: Callable[[Path | None, bool], Dataset]
    steps: int
    batch: int
    judge: str
    target: float
    looks: int = 8
    seeds: int = 2
    lowest: float = 3e-4
    decays: bool = True

    def settings(self, quick: bool) -> dict[str, Any]:
        """What a figure depends on; ``judged``: on so many examples."""
        if quick:
            budget = {"steps": 2, "batch": 8, "looks": 1, "judged": 50}
        else:
            budget = {"steps": self.steps, "batch": self.batch, "looks": self.looks, "judged": 2000}
        return {"title": self.title, **budget, "decays": self.decays}


def _cifar(root: Path | None, quick: bool, images: int = 10_000, test_images: int = 2_000) -> Dataset:
    data = cifar10(root, 200, 100) if quick else cifar10(root, images, test_images)
    return replace(data, x=data.x.unflatten(1, (3, 32, 32)), x_test=data.x_test.unflatten(1, (3, 32, 32)))


def _cifar_all(root: Path | None, quick: bool) -> Dataset:
    return _cifar(root, quick, 50_000, 10_000)


def _signals(root: Path | None, quick: bool) -> Dataset:
    return mnist1d(root)


def _text(root: Path | None, quick: bool) -> Dataset:
    return characters(root)


def _mlp(width: int, depth: int, target: float) -> Problem:
    return Problem(
        f"MNIST-1D, MLP {depth}x{width}",
        partial(relu_mlp, width, depth),
        _signals,
        2400,
        512,
        "train",
        target,
        looks=60,
        seeds=5,
        lowest=1e-4,
        decays=depth > 3,  # three layers: as in Wang 4.1
    )


PROBLEMS = {
    **{f"mnist1d_{width}": _mlp(width, 3, 0.99) for width in (64, 128, 256, 512)},
    "depth6": _mlp(128, 6, 0.97),
    "depth12": _mlp(128, 12, 0.97),
    "cifar_mlp": Problem(
        "CIFAR-10, MLP 6x512",
        lambda: nn.Sequential(nn.Flatten(), *relu_mlp(512, 6, inputs=3072)),
        _cifar_all,
        3910,
        128,
        "test",
        0.97,
        looks=20,
    ),
    "cnn": Problem("CIFAR-10 (10,000), CNN", cnn, _cifar, 800, 64, "test", 0.95),
    "resnet": Problem("CIFAR-10 (10,000), ResNet", partial(resnet, 16, 2), _cifar, 800, 64, "test", 0.95),
    "vit": Problem(
        "CIFAR-10 (10,000), ViT 64x4",
        partial(vit, 64, 4, 4, patch=4, token=MeanToken),
        _cifar,
        800,
        64,
        "test",
        0.95,
    ),
    "charlm": Problem(
        "tinyshakespeare, causal LM 64x4", partial(causal_lm, 65, 64, 4, 4, hidden=172), _text, 600, 32, "loss", 0.9
    ),
}


QUICK = ["mnist1d_64", "cnn", "resnet", "vit", "charlm"]
"""The problems of the quick version."""


@dataclass(frozen=True)
class Look:
    """One moment of a run: accuracies, the test loss, and the cosine to the true gradient, of all parameters and of
    each site's cotangent (none for backprop, or where it was not asked for)."""

    step: int
    train: float
    test: float
    loss: float
    cosine: float | None = None
    sites: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One training run. ``seconds``: of training alone, on a CPU the thread's own; ``failed``: it came to a loss that
    is not finite."""

    problem: str
    method: str
    lr: float
    seed: int
    settings: dict[str, Any]
    looks: list[Look]
    seconds: float
    failed: bool = False

    @property
    def key(self) -> Key:
        return self.problem, self.method, self.lr, self.seed

    def figure(self, judge: str) -> float:
        """Larger is better."""
        if self.failed or not self.looks:
            return -math.inf
        last = self.looks[-1]
        return judged(last, judge)

    def reaches(self, judge: str, figure: float) -> float | None:
        """Steps until a figure is reached, between two looks in proportion; None if it never is."""
        steps, before = 0.0, None
        for look in self.looks:
            now = judged(look, judge)
            if now >= figure:
                share = 1.0 if before is None else (figure - before) / (now - before)
                return steps + share * (look.step - steps)
            steps, before = look.step, now
        return None


def judged(look: Look, judge: str) -> float:
    """Larger is better."""
    figure: float = -look.loss if judge == "loss" else getattr(look, judge)
    return figure


Key = tuple[str, str, float, int]
Cells = dict[Key, Cell]
Pace = dict[str, dict[str, float]]


def add_options(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(PROBLEMS)
    parser.add_argument(
        "--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), metavar="P", help=names
    )
    parser.add_argument("--methods", nargs="+", choices=list(LABELS), metavar="METHOD", help=", ".join(LABELS))
    parser.add_argument("--fresh", action="store_true", help="run again what an earlier, interrupted run finished")
    parser.add_argument("--estimate", action="store_true", help="print how long what is missing will take, and stop")


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    problems = args.problems or (QUICK if args.quick else list(PROBLEMS))
    methods = tuple(args.methods or METHODS)
    seeds = {name: args.seeds or (1 if args.quick else PROBLEMS[name].seeds) for name in problems}
    lrs = (1e-3,) if args.quick else LRS
    out = args.out or (SCRATCH if args.quick else COMMITTED)
    path = out / "feedback.json"
    bench = Bench(args, lrs, *(({}, {}) if args.fresh or args.quick else finished(path)))
    if bench.cells:
        print(f"{len(bench.cells)} finished runs taken from {path} (--fresh runs them again)")
    if args.estimate:
        bench.estimate(problems, methods, seeds)
        return

    def keep() -> None:
        recorded = {"lrs": list(lrs), "device": args.device, "unigram_loss": bench.unigram, "pace": bench.pace}
        figures = [asdict(bench.cells[key]) for key in sorted(bench.cells)]
        write_json(path, args, seeds=sorted({key[3] for key in bench.cells}), settings=recorded, figures=figures)

    for problem in problems:
        for key in bench.missing(problem, methods, seeds[problem]):
            print(f"{problem}, {LABELS[key[1]]}, lr {key[2]:g}, seed {key[3]}")
            bench.cells[key] = bench.train(key)
            keep()
        if bench.measure(problem, methods):
            keep()
    for table in tables(bench, problems, methods):
        print_table(*table)
    plot(bench, problems, methods, out / "feedback.png")
    print(f"Figures in {path}, curves in {out / 'feedback.png'}")


def finished(path: Path) -> tuple[Cells, Pace]:
    """The runs of an earlier call that had the settings of today, and the paces that it measured."""
    if not path.is_file():
        return {}, {}
    content = json.loads(path.read_text())
    cells = {
        key: cell
        for key, cell in cells_of(content).items()
        if cell.problem in PROBLEMS and cell.settings == PROBLEMS[cell.problem].settings(quick=False)
    }
    return cells, content["settings"].get("pace", {})


def cells_of(content: dict[str, Any]) -> Cells:
    cells = (Cell(**{**each, "looks": [Look(**look) for look in each["looks"]]}) for each in content["figures"])
    return {cell.key: cell for cell in cells}


class Runs:
    """The runs so far.

    ``unigram``: by problem judged by a loss, the loss of who knows but the letters' frequencies; ``pace``: by problem
    and method, the time of a step over that of a step of backprop."""

    def __init__(self, lrs: tuple[float, ...], cells: Cells, unigram: dict[str, float], pace: Pace) -> None:
        self.lrs, self.cells, self.unigram, self.pace = lrs, cells, unigram, pace

    def paced(self, problem: str, method: str) -> float | None:
        """``pace``, where it is known."""
        return 1.0 if method == "backprop" else self.pace.get(problem, {}).get(method)

    def grid(self, problem: str) -> tuple[float, ...]:
        return tuple(lr for lr in self.lrs if lr >= PROBLEMS[problem].lowest)

    def best(self, problem: str, method: str) -> float:
        """The learning rate whose run with seed 0 ended best."""
        judge = PROBLEMS[problem].judge
        return max(self.grid(problem), key=lambda lr: self.cells[problem, method, lr, 0].figure(judge))

    def chosen(self, problem: str, method: str) -> list[Cell]:
        """All runs at the best rate, by seed; none where the grid is not complete."""
        if any((problem, method, lr, 0) not in self.cells for lr in self.grid(problem)):
            return []
        at = problem, method, self.best(problem, method)
        return [self.cells[key] for key in sorted(self.cells) if key[:3] == at]


class Bench(Runs):
    """The runs so far, and how to make more."""

    def __init__(self, args: argparse.Namespace, lrs: tuple[float, ...], cells: Cells, pace: Pace) -> None:
        super().__init__(lrs, cells, {}, pace)
        self.root, self.device, self.quick = args.data_root, args.device, args.quick
        self.clock = time.perf_counter if torch.device(args.device).type == "cuda" else time.thread_time
        self.data = cache(lambda problem: PROBLEMS[problem].data(self.root, self.quick).to(self.device))
        for problem in {cell.problem for cell in cells.values()}:
            self._weigh(problem)

    def _weigh(self, problem: str) -> None:
        if PROBLEMS[problem].judge == "loss" and problem not in self.unigram:
            self.unigram[problem] = unigram_loss(self.data(problem))

    def missing(self, problem: str, methods: tuple[str, ...], seeds: int) -> Iterator[Key]:
        """Seed 0 on the whole grid; then, once that is there, the other seeds at the best rate."""
        for method in methods:
            for lr in self.grid(problem):
                if (problem, method, lr, 0) not in self.cells:
                    yield problem, method, lr, 0
        for seed in range(1, seeds):
            for method in methods:
                key = (problem, method, self.best(problem, method), seed)
                if key not in self.cells:
                    yield key

    def train(self, key: Key) -> Cell:
        name, method, lr, seed = key
        problem, data = PROBLEMS[name], self.data(name)
        self._weigh(name)
        settings = problem.settings(self.quick)
        torch.manual_seed(seed)
        learner = Learner(problem.network().to(self.device), method, lr)
        generator = torch.Generator().manual_seed(seed)
        clock = self.clock
        steps, looks, start, spent = settings["steps"], list[Look](), clock(), 0.0
        bar = tqdm(total=steps, desc=f"{name} {LABELS[method]}", unit="step", disable=None, leave=False)
        try:
            for number, (x, y) in enumerate(endless(data, settings["batch"], generator), 1):
                learner.step(x, y, lr * (1 - (number - 1) / steps) if settings["decays"] else lr)
                bar.update()
                if _due(number, steps, settings["looks"]):
                    spent += clock() - start
                    measured = _due(number, steps, min(2, settings["looks"]))
                    looks.append(learner.look(number, data, settings["judged"], settings["batch"] if measured else 0))
                    start = clock()
                if number == steps:
                    break
            failed = not math.isfinite(looks[-1].loss)
        except ClosureError as error:
            if "finite" not in str(error):
                raise
            failed = True
        bar.close()
        looks = [look for look in looks if math.isfinite(look.loss)]
        return Cell(name, method, lr, seed, settings, looks, spent, failed)

    def measure(self, problem: str, methods: tuple[str, ...]) -> bool:
        """The paces that are missing, side by side; whether there were any."""
        known = self.pace.setdefault(problem, {})
        missing = [m for m in methods if m not in known and m != "backprop"]
        if missing:
            x, y = next(endless(self.data(problem), PROBLEMS[problem].settings(self.quick)["batch"], torch.Generator()))
            steps = {}
            for method in ("backprop", *missing):
                torch.manual_seed(0)
                steps[method] = partial(Learner(PROBLEMS[problem].network().to(self.device), method, 1e-4).step, x, y)
            rounds, block = (2, 1) if self.quick else (9, 16)  # forward-mode passes are at most 16 steps apart
            times = time_ratios(
                steps, baseline="backprop", rounds=rounds, block=block, device=self.device, clock=self.clock
            )
            known |= {method: times[method].ratio for method in missing}
        return bool(missing)

    def estimate(self, problems: list[str], methods: tuple[str, ...], seeds: dict[str, int]) -> None:
        """Time of the missing runs, from a few steps of each."""
        rows, total = [], 0.0
        for name in problems:
            problem = PROBLEMS[name]
            settings = problem.settings(self.quick)
            for method in methods:
                wanted = len(self.grid(name)) + seeds[name] - 1
                left = wanted - sum(key[:2] == (name, method) for key in self.cells)
                if left <= 0:
                    continue
                x, y = next(endless(self.data(name), settings["batch"], torch.Generator()))
                torch.manual_seed(0)
                learner = Learner(problem.network().to(self.device), method, 1e-4)
                for _ in range(4):  # tracing and its probes
                    learner.step(x, y)
                start = time.perf_counter()
                for _ in range(4):
                    learner.step(x, y)
                step = (time.perf_counter() - start) / 4
                total += left * step * settings["steps"]
                minutes = step * settings["steps"] / 60
                rows.append([f"{name} {LABELS[method]}", str(left), f"{1e3 * step:.0f}", f"{minutes:.1f}"])
        print_table("Estimated time", ["problem, method", "runs", "ms/step", "min/run"], rows)
        print(f"{total / 3600:.1f} h in all, one after another, measurements along the way aside")


def _due(number: int, steps: int, looks: int) -> bool:
    return number * looks // steps > (number - 1) * looks // steps


def endless(data: Dataset, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches, epoch after epoch."""
    while True:
        yield from batches(data, batch, generator)


class Learner:
    """A network and what trains it, on cross-entropy of logits ``[N, C]`` or ``[N, C, T]``."""

    def __init__(self, model: nn.Module, method: str, lr: float) -> None:
        self.model = model
        self.optimizer: Any = None
        if method == "backprop":
            self.plain = torch.optim.AdamW(model.parameters(), lr=lr)
        else:
            estimator = ESTIMATORS[method][1]()
            self.optimizer = GuessGradOptimizer(model.named_parameters(), torch.optim.AdamW, estimator, lr=lr)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y)

    def step(self, x: Tensor, y: Tensor, lr: float | None = None) -> None:
        if lr is not None:
            for group in (self.optimizer or self.plain).param_groups:
                group["lr"] = lr
        if self.optimizer is not None:
            self.optimizer.step(lambda: self.loss(x, y))
            return
        self.plain.zero_grad()
        self.loss(x, y).backward()
        self.plain.step()

    def look(self, step: int, data: Dataset, judged: int, batch: int) -> Look:
        """Accuracies and the loss on the first so many examples; with ``batch``, the cosine on the first one."""
        self.model.eval()
        train, _ = self._judged(data.x[:judged], data.y[:judged])
        test, loss = self._judged(data.x_test[:judged], data.y_test[:judged])
        self.model.train()
        if self.optimizer is None or not batch:
            return Look(step, train, test, loss)
        found = cosine(self.optimizer, lambda: self.loss(data.x[:batch], data.y[:batch]))
        return Look(step, train, test, loss, found.total, found.per_site)

    @torch.no_grad()
    def _judged(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        parts = [(self.model(a), b) for a, b in zip(x.split(250), y.split(250), strict=True)]
        hits = sum(int((out.argmax(1) == b).sum()) for out, b in parts)
        losses = sum(float(F.cross_entropy(out, b, reduction="sum")) for out, b in parts)
        return hits / y.numel(), losses / y.numel()


def unigram_loss(data: Dataset) -> float:
    """Of the test characters under the training set's frequencies (each count one more)."""
    counts = torch.bincount(data.y.flatten(), minlength=int(data.y_test.max()) + 1) + 1
    return float(F.nll_loss((counts / counts.sum()).log().expand(data.y_test.numel(), -1), data.y_test.flatten()))


# --- what is shown ----------------------------------------------------------------------------------------------------


def tables_of(content: dict[str, Any]) -> list[Table]:
    """The tables of a JSON that this experiment wrote, as far as it has runs for them."""
    settings = content["settings"]
    runs = Runs(tuple(settings["lrs"]), cells_of(content), settings["unigram_loss"], settings["pace"])
    return [table for table in tables(runs, list(PROBLEMS), tuple(LABELS)) if table.rows]


def tables(runs: Runs, problems: list[str], methods: tuple[str, ...]) -> list[Table]:
    return [table(runs, name, methods) for name in problems]


def table(runs: Runs, name: str, methods: tuple[str, ...]) -> Table:
    problem = PROBLEMS[name]
    judge = problem.judge
    parts = (judge, "test") if judge == "loss" else (judge, "train" if judge == "test" else "test")
    rows, steps = [], 0
    base = runs.chosen(name, "backprop")
    for method in methods:
        cells = [cell for cell in runs.chosen(name, method) if not cell.failed]
        if not cells:
            continue
        ends, steps = [cell.looks[-1] for cell in cells], cells[0].settings["steps"]
        values = [[getattr(end, part) for end in ends] for part in parts]
        reached, slower = relative(runs, name, cells, base), slowness(runs, name, cells, base)
        row = [LABELS[method], f"{cells[0].lr:g}", str(len(cells)), spread(values[0]), f"{mean(values[1]):.3f}"]
        row += ["-" if reached is None else f"{reached:.3f}"]
        row += ["-" if t is None else f"{t:.2f}" for t in (runs.paced(name, method), slower)]
        rows.append([*row, *_cosines(ends)])
    columns = ["method", "lr", "seeds", *parts, "of\nbackprop", "step\ntime", "time\nto 95%", "cosine", "worst\nsite"]
    wanted = f"Learned feedback should reach {problem.target:g} of backprop's {judge}"
    fall = ", falling linearly to zero," if problem.decays else ""
    note = f"Learning rates{fall} by {judge} of seed 0. {wanted}{' drop below the unigram' if judge == 'loss' else ''}."
    small = runs.cells.get((name, "learned_feedback", LRS[0], 0))
    worst = [min(look.sites.values()) for look in small.looks if look.sites] if small is not None else []
    if worst:
        note += f" At lr {LRS[0]:g} its cosine was at least {min(worst):.3f} at every site."
    return Table(f"{problem.title}, {steps} steps", columns, rows, note)


def _cosines(ends: list[Look]) -> list[str]:
    """To the true gradient: of all parameters, and the worst site's."""
    values = [[end.cosine for end in ends if end.cosine is not None], [min(e.sites.values()) for e in ends if e.sites]]
    return [f"{mean(found):.3f}" if found else "-" for found in values]


def _pairs(cells: list[Cell], base: list[Cell]) -> list[tuple[Cell, Cell]]:
    return [(c, b) for c in cells for b in base if c.seed == b.seed and not b.failed]


def relative(runs: Runs, name: str, cells: list[Cell], base: list[Cell]) -> float | None:
    """The judged figure over backprop's, means over paired seeds; for a loss, the drops below the unigram's."""
    judge, pairs = PROBLEMS[name].judge, _pairs(cells, base)
    if not pairs:
        return None
    zero = runs.unigram.get(name, 0.0)
    return mean(zero + c.figure(judge) for c, _ in pairs) / mean(zero + b.figure(judge) for _, b in pairs)


def slowness(runs: Runs, name: str, cells: list[Cell], base: list[Cell]) -> float | None:
    """Time to 95% of backprop's last figure, over backprop's own: steps times the pace. None where a run never reaches
    it."""
    judge, zero = PROBLEMS[name].judge, runs.unigram.get(name, 0.0)
    pace = runs.paced(name, cells[0].method)
    ratios = []
    for c, b in _pairs(cells, base):
        figure = 0.95 * (zero + b.figure(judge)) - zero
        ours, theirs = c.reaches(judge, figure), b.reaches(judge, figure)
        if ours is None or not theirs or pace is None:
            return None
        ratios.append(pace * ours / theirs)
    return mean(ratios) if ratios else None


def plot(runs: Runs, problems: list[str], methods: tuple[str, ...], path: Path) -> None:
    panels: dict[str, dict[str, Any]] = {}
    for name in problems:
        judge = PROBLEMS[name].judge
        lines = {}
        for method in methods:
            cells = [cell for cell in runs.chosen(name, method) if not cell.failed]
            if cells:
                steps = [look.step for look in cells[0].looks]
                lines[LABELS[method]] = (steps, [[getattr(look, judge) for look in cell.looks] for cell in cells])
        panels[f"{judge}: {PROBLEMS[name].title}"] = lines
    plot_curves(path, panels, xlabel="step")
