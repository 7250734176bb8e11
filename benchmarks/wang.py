"""Tables 1 to 5 and Figures 1 and 2 of Wang et al. 2025 on MNIST-1D, ours beside theirs; resumes where it stopped."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.data import Dataset, mnist1d
from benchmarks.estimators import Estimated
from benchmarks.mnist1d import PAPER_TEST, PAPER_TRAIN, thinned
from benchmarks.problems import relu_mlp
from benchmarks.report import COMMITTED, SCRATCH, Table, plot_curves, print_table, spread, write_json
from benchmarks.training import Backprop, History, Learner, Settings, batches, fit
from guessopt import ActivationPerturbation, DirectionalDescent, WPerp, WPerpNS, WPreconditioned, WTranspose
from guessopt.diagnostics import bias, covariance_norm, overlap, variance

# The paper's W-perp has one basis per example; the package's default shares one, masked per example ("shared" here).
ESTIMATORS: dict[str, tuple[str, Callable[[int], Any]]] = {
    "directional_descent": ("weight perturbation", lambda width: DirectionalDescent()),
    "activation_perturbation": ("activation perturbation", lambda width: ActivationPerturbation()),
    "w_transpose": ("W^T", lambda width: WTranspose()),
    "w_perp": ("W-perp k=10", lambda width: WPerp(k=10, basis="example")),
    # With a square W the image of (W M)^T is that of M: all of V, masked, has the same law and needs no bases. (Before
    # the narrower head the shared rows are masked, not orthonormal.)
    "w_perp_rank": ("W-perp k=rank", lambda width: WPerp(k=width)),
    "w_perp_25": ("W-perp k=25", lambda width: WPerp(k=25, basis="example")),
    "w_perp_1": ("W-perp k=1", lambda width: WPerp(k=1, basis="example")),
    "w_perp_bottom": ("W-perp bottom", lambda width: WPerp(k=10, basis="example", select="bottom")),
    "w_perp_ns": ("W-perp-NS", lambda width: WPerpNS(k=10, basis="example")),
    "w_preconditioned": ("W-P", lambda width: WPreconditioned()),
    "w_perp_shared": ("W-perp shared k=10", lambda width: WPerp(k=10)),
    "w_perp_ns_shared": ("W-perp-NS shared", lambda width: WPerpNS(k=10)),
}
SLOW = ("w_perp_ns",)
"""Run only if named by ``--methods``: the paper's form, a Newton-Schulz product per example (2 h at width 128)."""
LABELS = {"backprop": "backprop"} | {name: label for name, (label, _) in ESTIMATORS.items()}
WIDTHS = (64, 128, 256, 512)


@dataclass(frozen=True)
class Part:
    """A table or figure: which methods at which widths, and whether it needs measurements along the way."""

    title: str
    widths: tuple[int, ...]
    methods: tuple[str, ...]
    measured: bool = False


_PAPER_METHODS = ("directional_descent", "activation_perturbation", "w_transpose", "w_perp", "backprop")
PARTS = {
    "1": Part(
        "Table 1: train accuracy by k", (128,), ("w_transpose", "w_perp_rank", "w_perp_25", "w_perp", "w_perp_1")
    ),
    "2": Part(
        "Table 2: layer 1 along each method's own trajectory", (128,), ("w_transpose", "w_perp_bottom", "w_perp"), True
    ),
    "3": Part("Table 3: train accuracy by width", WIDTHS, (*_PAPER_METHODS, "w_perp_shared")),
    "4": Part(
        "Table 4: accuracy and time",
        (512, 128),
        ("w_perp_ns", "w_perp", "w_transpose", "w_perp_ns_shared", "w_perp_shared"),
    ),
    "5": Part(
        "Table 5: layer 1 along each method's own trajectory",
        (256,),
        ("w_perp", "w_preconditioned", "w_transpose"),
        True,
    ),
    "figure1": Part("Figure 1: overlap of the gradient with the top k directions", (128, 512), ("w_perp",), True),
    "figure2": Part("Figure 2: train accuracy by width", WIDTHS, (*_PAPER_METHODS, "w_perp_shared")),
}
PAPER_1 = {"w_transpose": 0.312, "w_perp_rank": 0.311, "w_perp_25": 0.323, "w_perp": 0.324, "w_perp_1": 0.275}
# Variance (18), bias (17) and covariance norm of layer 1, in Tables 2 and 5 (the latter has no norm).
PAPER_MOMENTS: dict[str, dict[str, tuple[float, ...]]] = {
    "2": {
        "w_transpose": (1.50e-4, 2.75e-4, 0.084),
        "w_perp_bottom": (1.30e-5, 2.83e-4, 0.085),
        "w_perp": (1.03e-5, 2.86e-5, 0.085),
    },
    "5": {"w_perp": (6.33e-6, 3.63e-5), "w_preconditioned": (1.75e-4, 1.35e-8), "w_transpose": (7.04e-5, 1.68e-4)},
}
PAPER_5 = {"w_perp": (0.433, 0.383), "w_preconditioned": (0.367, 0.314), "w_transpose": (0.375, 0.316)}
PAPER_4 = {
    (512, "w_perp_ns"): (0.594, 0.477, "6 h"),
    (512, "w_perp"): (0.581, 0.498, "40 h"),
    (512, "w_transpose"): (0.486, 0.438, "26 min"),
    (128, "w_perp_ns"): (0.326, 0.291, "9 min"),
    (128, "w_perp"): (0.324, 0.283, "1 h"),
    (128, "w_transpose"): (0.312, 0.277, "5 min"),
}
LAYER_1 = "0.weight"
LAYERS = ("0.weight", "2.weight", "4.weight")


@dataclass(frozen=True)
class Look:
    """Measurements at one moment of a training run, on a fixed batch.

    ``variance``, ``variance_of_mean``: Wang eq. 18 as its text and as its formula have it (``diagnostics.Variance``);
    ``bias``: eq. 17; ``relative_bias``: that over the norm of the mean gradient; by layer, as ``covariance_norm``.
    ``overlap``: eq. 19 over k, by layer.
    """

    epoch: int
    variance: dict[str, float]
    variance_of_mean: dict[str, float]
    bias: dict[str, float]
    relative_bias: dict[str, float]
    covariance_norm: dict[str, float]
    overlap: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Cell:
    """One training run: accuracies, the seconds that training alone took (on a CPU the thread's own, which no neighbour
    stretches; None: not measured), and what was measured along the way."""

    width: int
    method: str
    seed: int
    history: History
    seconds: float | None
    looks: list[Look] = field(default_factory=list)

    @property
    def key(self) -> tuple[int, str, int]:
        return self.width, self.method, self.seed


@dataclass(frozen=True)
class Plan:
    """What is run: ``parts`` by name at ``widths``; ``looks`` measurements a run, of ``draws`` passes each."""

    parts: dict[str, Part]
    settings: Settings
    seeds: range
    looks: int
    draws: int

    def cells(self) -> dict[tuple[int, str, int], bool]:
        """Keys of the runs, cheapest width first, and whether each is measured; a run serves every part that has it."""
        found: dict[tuple[int, str, int], bool] = {}
        for part in self.parts.values():
            for width in part.widths:
                for method in part.methods:
                    for seed in self.seeds:
                        key = width, method, seed
                        found[key] = found.get(key, False) or part.measured
        return dict(sorted(found.items(), key=lambda item: (item[0][2], item[0][0])))


def add_options(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(PARTS)
    parser.add_argument("--tables", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help=names)
    parser.add_argument("--widths", type=int, nargs="+", help="only these hidden widths (default: the paper's)")
    parser.add_argument("--methods", nargs="+", choices=list(LABELS), metavar="METHOD", help=", ".join(LABELS))
    parser.add_argument("--fresh", action="store_true", help="run again what an earlier, interrupted run finished")
    parser.add_argument("--estimate", action="store_true", help="print how long what is missing will take, and stop")


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    plan = make_plan(args)
    data = mnist1d(args.data_root).to(args.device)
    recorded = asdict(plan.settings) | {"looks": plan.looks, "draws": plan.draws, "device": args.device}
    out = args.out or (SCRATCH if args.quick else COMMITTED)
    path = out / "wang.json"

    cells = {} if args.fresh or args.quick else finished(path, recorded)
    if cells:
        print(f"{len(cells)} finished runs taken from {path} (--fresh runs them again)")
    missing = {k: m for k, m in plan.cells().items() if k not in cells or (m and not cells[k].looks)}
    if args.estimate:
        estimate(missing, data, plan)
        return
    for number, (key, measured) in enumerate(missing.items(), 1):
        print(f"run {number} of {len(missing)}: width {key[0]}, {LABELS[key[1]]}, seed {key[2]}")
        cells[key] = train(*key, data, plan, measured)
        figures = [asdict(cells[k]) for k in sorted(cells)]
        write_json(path, args, seeds=sorted({k[2] for k in cells}), settings=recorded, figures=figures)
    chosen = [cells[key] for key in plan.cells() if key in cells]
    for table in tables(chosen, plan.parts):
        print_table(*table)
    print(f"{plan.settings.epochs} epochs (paper: 300), seeds {', '.join(map(str, plan.seeds))}.")
    plot(chosen, plan, out / "wang.png")
    print(f"Figures in {path}, curves in {out / 'wang.png'}")


def make_plan(args: argparse.Namespace) -> Plan:
    parts = {}
    for name in args.tables:
        part = PARTS[name]
        widths = (32,) if args.quick and not args.widths else part.widths
        if args.widths:
            widths = tuple(args.widths) if args.quick else tuple(w for w in widths if w in args.widths)
        methods = tuple(m for m in part.methods if (m in args.methods if args.methods else m not in SLOW))
        if widths and methods:
            parts[name] = Part(part.title, widths, methods, part.measured)
    if not parts:
        raise SystemExit("nothing to run: none of the chosen tables has these widths and methods")
    seeds = range(args.seeds or (1 if args.quick else 3))
    if args.quick:
        return Plan(parts, Settings(epochs=3), seeds, looks=1, draws=2)
    return Plan(parts, Settings(), seeds, looks=10, draws=20)


def finished(path: Path, settings: dict[str, Any]) -> dict[tuple[int, str, int], Cell]:
    """The runs of an earlier call, where there was one with the same settings."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    return cells_of(content) if content["settings"] == settings else {}


def cells_of(content: dict[str, Any]) -> dict[tuple[int, str, int], Cell]:
    found = {}
    for figures in content["figures"]:
        looks = [Look(**look) for look in figures["looks"]]
        cell = Cell(**{**figures, "history": History(**figures["history"]), "looks": looks})
        found[cell.key] = cell
    return found


def make_learner(method: str, width: int, settings: Settings, device: torch.device) -> Learner:
    model = relu_mlp(width).to(device)
    if method == "backprop":
        return Backprop(model, settings.lr)
    return Estimated(ESTIMATORS[method][1](width), model, settings.lr)


def train(width: int, method: str, seed: int, data: Dataset, plan: Plan, measured: bool) -> Cell:
    """One run. What is measured costs no part of ``seconds``, and moves nothing but the stream of guesses."""
    torch.manual_seed(seed)
    learner = make_learner(method, width, plan.settings, data.x.device)
    looks: list[Look] = []
    clock = time.perf_counter if data.x.is_cuda else time.thread_time
    epochs, seconds, start = plan.settings.epochs, 0.0, clock()

    def each(epoch: int) -> None:
        nonlocal seconds, start
        seconds += clock() - start
        if measured and epoch * plan.looks // epochs > (epoch - 1) * plan.looks // epochs:
            looks.append(look(learner, data, plan, epoch))
        start = clock()

    history = fit(learner, data, plan.settings, seed=seed, label=f"{LABELS[method]} {width}", each=each)
    return Cell(width, method, seed, thinned(history), seconds, looks)


def look(learner: Learner, data: Dataset, plan: Plan, epoch: int) -> Look:
    """All metrics of Wang 4.1 on the first batch of a fixed order."""
    x, y = next(batches(data, plan.settings.batch, torch.Generator().manual_seed(0)))

    def closure() -> torch.Tensor:
        return learner.loss(x, y)

    assert isinstance(learner, Estimated)
    opt = learner.optimizer
    spread_, off = variance(opt, closure, plan.draws), bias(opt, closure)
    norm = covariance_norm(opt, closure, probes=8)
    return Look(
        epoch,
        spread_.per_site,
        spread_.of_mean,
        off.per_site,
        off.relative,
        norm.per_site,
        overlap(opt, closure, examples=16).per_site,
    )


def estimate(missing: dict[tuple[int, str, int], bool], data: Dataset, plan: Plan) -> None:
    """Seconds of an epoch and of a look for every width and method, from two steps, and what all missing runs take."""
    rows, total, costs = [], 0.0, dict[tuple[int, str, bool], float]()
    steps = -(-len(data.x) // plan.settings.batch)
    for (width, method, _), measured in missing.items():
        if (width, method, measured) not in costs:
            learner = make_learner(method, width, plan.settings, data.x.device)
            x, y = data.x[: plan.settings.batch], data.y[: plan.settings.batch]
            for _ in range(3):  # tracing, and the bases of the first step
                learner.step(x, y)
            step = seconds(lambda: learner.step(x, y), 2)  # noqa: B023 (called here)
            each = 0.0
            if measured:
                few = replace(plan, draws=2)
                each = seconds(lambda: look(learner, data, few, 1), 1) + (plan.draws - 2) * step  # noqa: B023
            costs[width, method, measured] = plan.settings.epochs * steps * step + plan.looks * each
            minutes = costs[width, method, measured] / 60
            rows.append([f"{width} {LABELS[method]}", f"{1e3 * step:.1f}", f"{each:.1f}", f"{minutes:.1f}"])
        total += costs[width, method, measured]
    print_table("Estimated time", ["run", "ms/step", "s/look", "min/run"], rows)
    print(f"{len(missing)} runs, {total / 3600:.2f} h in all, one after another")


def seconds(work: Callable[[], object], repeats: int) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


# --- what is shown ----------------------------------------------------------------------------------------------------


def of(cells: Iterable[Cell], width: int, method: str) -> list[Cell]:
    return [cell for cell in cells if (cell.width, cell.method) == (width, method)]


def known(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def tables_of(content: dict[str, Any]) -> list[Table]:
    """The tables of a JSON that this experiment wrote, as far as it has runs for them."""
    found = tables([*cells_of(content).values()], PARTS)
    return [table for table in found if table.rows]


def tables(cells: list[Cell], parts: dict[str, Part]) -> list[Table]:
    found = []
    for name, part in parts.items():
        if name == "figure1":
            found.append(overlap_table(cells, part))
        elif part.measured:
            found.append(moments_table(cells, part, name))
        elif name != "figure2" or "3" not in parts:  # the figure draws Table 3
            found.append(accuracy_table(cells, part, name))
    return found


def took(runs: Sequence[Cell]) -> str:
    known = [run.seconds for run in runs if run.seconds is not None]
    return f"{mean(known):.0f} s" if known else "-"


def accuracy_table(cells: list[Cell], part: Part, name: str) -> Table:
    timed = name == "4"
    rows = []
    for width in part.widths:
        for method in part.methods:
            runs = of(cells, width, method)
            if not runs:
                continue
            paper = PAPER_4.get((width, method)) if timed else None
            train_ = paper[0] if paper else _paper_train(name, width, method)
            test = paper[1] if paper else PAPER_TEST.get(width, {}).get(method)
            row = [
                f"{width} {LABELS[method]}",
                spread([run.history.train[-1] for run in runs]),
                spread([run.history.test[-1] for run in runs]),
                known(train_),
                known(test),
            ]
            rows.append(row + ([took(runs), paper[2] if paper else "-"] if timed else []))
    columns = ["width, method", "train", "test", "paper\ntrain", "paper\ntest"]
    return Table(part.title, columns + (["time", "paper\ntime"] if timed else []), rows, "Without a spread: one seed.")


def _paper_train(name: str, width: int, method: str) -> float | None:
    if name == "1":
        return PAPER_1.get(method) if width == 128 else None
    return PAPER_TRAIN.get(width, {}).get(method)


def average(cells: Sequence[Cell], metric: str, layer: str = LAYER_1) -> float | None:
    """A metric of one layer over all looks of all seeds; None if it was not measured (an undeclared moment)."""
    values = [getattr(look, metric).get(layer) for cell in cells for look in cell.looks]
    there = [value for value in values if value is not None]
    return mean(there) if there else None


def moments_table(cells: list[Cell], part: Part, name: str) -> Table:
    def small(value: float | None) -> str:
        return known(value, ".2e").replace("e-0", "e-")

    rows = []
    for width in part.widths:
        for method in part.methods:
            runs = of(cells, width, method)
            if not runs:
                continue
            paper = PAPER_MOMENTS[name][method]
            row = [f"{width} {LABELS[method]}", small(average(runs, "variance")), small(average(runs, "bias"))]
            row.append(known(average(runs, "relative_bias"), ".2f"))
            row += map(small, paper[:2])
            if name == "2":
                row += [known(average(runs, "covariance_norm")), known(paper[2])]
            else:
                row += [f"{mean(run.history.train[-1] for run in runs):.3f}", known(PAPER_5[method][0])]
            rows.append(row)
    last = "cov." if name == "2" else "train"
    columns = ["width, method", "var.", "bias", "rel.\nbias", "paper\nvar.", "paper\nbias", last, f"paper\n{last}"]
    note = (
        "var. (18), bias (17), that over the mean gradient's norm, cov.: layer 1, mean over looks and seeds; "
        "all layers and other readings in the JSON."
    )
    return Table(part.title, columns, rows, note)


def mean_overlap(cells: Sequence[Cell], layer: str) -> list[float]:
    """Over k: the mean over looks and seeds; as far as every one of them goes."""
    curves = [look.overlap[layer] for cell in cells for look in cell.looks if layer in look.overlap]
    return [mean(column) for column in zip(*curves, strict=False)]


def overlap_table(cells: list[Cell], part: Part) -> Table:
    rows = []
    for width in part.widths:
        for method in part.methods:
            for number, layer in enumerate(LAYERS, 1):
                found = mean_overlap(of(cells, width, method), layer)
                if found:
                    at = [found[k - 1] if k <= len(found) else None for k in (1, 5, 10, 25, 50)]
                    rows.append([f"{width} layer {number}", *(known(value) for value in at), str(len(found))])
    return Table(part.title, ["width, layer", "k = 1", "5", "10", "25", "50", "rank"], rows)


def plot(cells: list[Cell], plan: Plan, path: Path) -> None:
    """Figure 2's curves by width, then Figure 1's by width; whatever was run."""
    panels: dict[str, dict[str, Any]] = {}
    for width in sorted({cell.width for cell in cells}):
        lines = {}
        for method in LABELS:
            runs = of(cells, width, method)
            if runs:
                lines[LABELS[method]] = (runs[0].history.epochs, [run.history.train for run in runs])
        panels[f"train accuracy, width {width}"] = lines
    plot_curves(path, panels)
    if "figure1" not in plan.parts:
        return
    part, overlaps = plan.parts["figure1"], dict[str, dict[str, Any]]()
    for width in part.widths:
        lines = {}
        for number, layer in enumerate(LAYERS, 1):
            found = mean_overlap(of(cells, width, "w_perp"), layer)
            if found:
                lines[f"layer {number}"] = ([*range(1, len(found) + 1)], [found])
        if lines:
            overlaps[f"overlap (19), width {width}"] = lines
    if overlaps:
        plot_curves(path.with_name("wang_overlap.png"), overlaps, xlabel="k")
