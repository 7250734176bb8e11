"""Well-known models, unchanged: missed parameters, errors, fallbacks and step times. Fails on a surprise."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.exactness import exactness
from benchmarks.machine import refused
from benchmarks.measure import Ratio, interleaved, ratio, seconds
from benchmarks.mezo import forward_mode, mezo
from benchmarks.mezo import problem as language_model
from benchmarks.report import COMMITTED, SCRATCH, Table, print_table, write_json
from benchmarks.zoo import Entry, Subject, entries, sized
from guessopt import GuessGradOptimizer, GuessWarning
from guessopt.layout import Layout

#: The largest relative errors allowed: in float64 or float32; in 16 bits.
EXACT, LOW = 1e-6, 2e-2

#: Models with more parameters than this are timed over a few steps only.
LARGE = 10**7

#: Learning rates of the runs in 16 bits.
RATES = (1e-3, 1e-2)

Figures = dict[str, Any]


@dataclass(frozen=True)
class Coverage:
    """The row of a model.

    Attributes:
        parameters: number of trainable tensors.
        sites: number of calls that read them.
        guided: sites with the guess that the estimator is named for. The others are last, share the guess of another
            site, or guess their own few parameters.
        missed: parameters without a gradient.
        fallbacks: sites that take the scalar derivative of the whole batch; ``reason``: the known reasons.
        unlisted: parameters of such sites that the row's ``Entry`` does not list.
        other_guess: sites with another guess, and why.
        error: relative error, as in ``exactness``.
    """

    parameters: int
    sites: int
    guided: int
    missed: list[str]
    fallbacks: int
    reason: str
    unlisted: list[str]
    other_guess: list[str]
    error: float

    def complaints(self, limit: float) -> list[str]:
        found = []
        if self.missed:
            found.append(f"no gradient for {', '.join(self.missed[:3])}")
        if self.unlisted:
            found.append(f"unlisted scalar fallback at {', '.join(self.unlisted[:3])}")
        if not self.error <= limit:
            found.append(f"relative error {self.error:.1e}")
        return found


def survey(entry: Entry, subject: Subject, **options: Any) -> Coverage:
    """One step of a model with the default settings, and the check of its exactness."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GuessWarning)
        opt = GuessGradOptimizer(subject.named(), torch.optim.SGD, lr=0.0, seed=0, **options)
        opt.step(subject.closure)
    graph = opt.estimation.plans[0].graph
    coupled = [site for site in graph.sites if site.layout is Layout.COUPLED and site.shares is None]
    names = [opt.estimation.names[site.params[0]] for site in coupled]
    reasons = [why for pattern, why in entry.fallbacks.items() if any(fnmatchcase(name, pattern) for name in names)]
    guesses = opt.estimation.assignments(opt.estimation.plans[0])
    return Coverage(
        parameters=len(subject.named()),
        sites=len(graph.sites),
        guided=sum(not graph.sites[k].is_last and not graph.sites[k].by_parameter for k in guesses),
        missed=[name for name, p in subject.named() if p.grad is None or not bool(p.grad.any())],
        fallbacks=len(coupled),
        reason="; ".join(reasons),
        unlisted=[name for name in names if not any(fnmatchcase(name, pattern) for pattern in entry.fallbacks)],
        other_guess=[str(w.message) for w in caught if "another guess" in str(w.message)],
        error=exactness(subject, **options).error,
    )


def step_time(build: Callable[[], Subject], *, rounds: int, block: int, device: str = "cpu") -> Ratio:
    """Time of a step with the default settings over that of a backprop step. ``ratio`` is of the fastest rounds."""
    ours, theirs = build(), build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GuessWarning)
        opt = GuessGradOptimizer(ours.named(), torch.optim.SGD, lr=0.0, seed=0)
        sgd = torch.optim.SGD([p for _, p in theirs.named()], lr=0.0)

        def backpropagation() -> None:
            sgd.zero_grad()
            theirs.closure().backward()
            sgd.step()

        steps = {"ours": lambda: opt.step(ours.closure), "backprop": backpropagation}
        for step in steps.values():
            seconds(step, 4, device)  # the first probes
        times = interleaved(steps, rounds=rounds, block=block, device=device)
    return replace(ratio(times["ours"], times["backprop"]), ratio=min(times["ours"]) / min(times["backprop"]))


# --- the experiment ---------------------------------------------------------------------------------------------------

QUICK = ("torch/*",)
PRECISION = (
    "torch/TransformerEncoder", "torch/LSTM", "hf/bert sdpa", "hf/gpt2 sdpa", "hf/llama sdpa", "hf/gemma sdpa",
    "hf/t5 sdpa", "hf/vit sdpa", "hf/swin sdpa", "hf/mamba", "peft/LoRA",
)  # fmt: skip
MODES = ("bfloat16", "float16", "autocast bfloat16")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=["*"], metavar="PATTERN", help="rows to run (default: all)")
    parser.add_argument("--fresh", action="store_true", help="repeat the runs that the file has already")


def run(args: argparse.Namespace) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    out = args.out or (SCRATCH if args.quick else COMMITTED)
    path = out / "coverage.json"
    settings = {"rounds": 3 if args.quick else 5, "mezo_steps": 10 if args.quick else 200, "device": args.device}
    figures = {} if args.fresh or args.quick else finished(path, settings)
    for section in ("matrix", "precision", "sized", "mezo"):
        figures.setdefault(section, {})

    patterns = QUICK if args.quick else args.models
    jobs = list(plan(patterns, settings, quick=args.quick))
    for section, name, work in tqdm(jobs, desc="coverage", leave=False):
        if name not in figures[section]:
            torch.manual_seed(0)
            figures[section][name] = work()
            write_json(path, args, seeds=[0], settings=settings, figures=figures)
    for table in tables_of({"figures": figures}):
        print_table(*table)
    print(f"Figures in {path}")
    if complaints := list(complain(figures)):
        raise SystemExit("coverage: " + "; ".join(complaints))


def plan(
    patterns: Iterable[str], settings: Mapping[str, Any], *, quick: bool
) -> Iterable[tuple[str, str, Callable[[], Figures]]]:
    """Section, row and work of every job, in order."""
    chosen = {n: e for n, e in entries().items() if any(fnmatchcase(n, pattern) for pattern in patterns)}
    for name, entry in chosen.items():
        yield "matrix", name, partial(matrix_row, entry, settings["rounds"])
    for name in PRECISION:
        if name in chosen:
            yield "precision", name, partial(precision_row, chosen[name])
    if quick:
        yield "mezo", "float16, 0.001, MeZO, eps 0.0001", partial(_mezo, torch.float16, 1e-3, settings, eps=1e-4)
        return
    for name, build in sized().items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            yield "sized", name, partial(_sized, build)
    for lr, dtype in product(RATES, (torch.float32, torch.float16, torch.bfloat16)):
        where = f"{str(dtype).removeprefix('torch.')}, {lr:g}"
        for eps in (1e-3, 1e-4):
            if lr == RATES[0] or eps == 1e-4:
                yield "mezo", f"{where}, MeZO, eps {eps:g}", partial(_mezo, dtype, lr, settings, eps=eps)
        for estimator in ("directional_descent", "w_perp"):
            if lr == RATES[0] or estimator == "directional_descent":
                yield "mezo", f"{where}, {estimator}", partial(_mezo, dtype, lr, settings, estimator=estimator)


def _mezo(
    dtype: torch.dtype, lr: float, settings: Mapping[str, Any], *, eps: float = 0, estimator: str = ""
) -> Figures:
    steps = settings["mezo_steps"]
    if why := refused(lambda: language_model(dtype)[1](), ("mezo", dtype)):
        return {"refused": why}
    if estimator:
        return asdict(forward_mode(dtype, estimator, lr=lr, steps=steps))
    return asdict(mezo(dtype, eps=eps, lr=lr, steps=steps))


def _sized(build: Callable[[], Subject]) -> Figures:
    if missing("transformers"):
        return {"absent": "transformers"}
    if why := refused(lambda: backward(build())):
        return {"refused": why}
    return asdict(step_time(build, rounds=5, block=20))


def finished(path: Path, settings: Mapping[str, Any]) -> Figures:
    """The rows in the file, if it was written with the same settings."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    found: Figures = content["figures"] if content["settings"] == settings else {}
    return found


def missing(library: str) -> bool:
    return importlib.util.find_spec(library) is None


def matrix_row(entry: Entry, rounds: int) -> Figures:
    if missing(entry.library):
        return {"absent": entry.library}
    subject = entry.build(entry.dtype)
    if why := refused(partial(backward, subject)):
        return {"refused": why}
    row = asdict(survey(entry, subject)) | {"dtype": str(entry.dtype).removeprefix("torch.")}
    large = sum(p.numel() for _, p in subject.named()) > LARGE
    del subject
    time = step_time(lambda: entry.build(torch.float32), rounds=3 if large else rounds, block=1 if large else 3)
    return row | {"time": asdict(time), "limit": EXACT}


def precision_row(entry: Entry) -> Figures:
    """Relative error in 16 bits by mode; or the reason why torch refuses the mode on this machine."""
    if missing(entry.library):
        return {"absent": entry.library}

    def cell(mode: str) -> float | str:
        why = refused(lambda: backward(in_precision(entry, mode)))
        return why or exactness(in_precision(entry, mode), draws=4).error

    return {mode: cell(mode) for mode in MODES}


def backward(subject: Subject) -> None:
    """A forward and a backward pass by torch alone, which leaves ``.grad`` as it is."""
    torch.autograd.grad(subject.closure(), [p for _, p in subject.named()], allow_unused=True)


def in_precision(entry: Entry, mode: str) -> Subject:
    """The model with parameters of a dtype, or in float32 under autocast to the dtype."""
    dtype = getattr(torch, mode.split()[-1])
    if not mode.startswith("autocast"):
        return entry.build(dtype)
    subject = entry.build(torch.float32)

    def closure() -> Tensor:
        with torch.autocast("cpu", dtype):
            return subject.closure()

    return Subject(subject.model, closure)


def complain(figures: Figures) -> Iterable[str]:
    """Everything in the figures that should not be there, in words."""
    fields = set(Coverage.__dataclass_fields__)
    for name, row in figures["matrix"].items():
        if was_run(row):
            coverage = Coverage(**{key: value for key, value in row.items() if key in fields})
            yield from (f"{name}: {what}" for what in coverage.complaints(row["limit"]))
    for name, row in figures["precision"].items():
        errors = {mode: row[mode] for mode in row if isinstance(row[mode], float)}
        yield from (f"{name}: {mode}: {error:.1e}" for mode, error in errors.items() if not error <= LOW)


def was_run(row: Figures) -> bool:
    return "absent" not in row and "refused" not in row


def tables_of(content: Mapping[str, Any]) -> list[Table]:
    """The tables for the content of this experiment's JSON."""
    figures = content["figures"]
    present = {name: row for name, row in figures["matrix"].items() if was_run(row)}
    notes = ["coupled: sites that take the scalar derivative of the whole batch; time: over a step of backpropagation."]
    for name, row in figures["matrix"].items():
        if "absent" in row:
            notes.append(f"{name}: not run, needs {row['absent']}.")
        elif "refused" in row:
            notes.append(f"{name}: not run, torch refuses it on this machine: {row['refused']}.")
        elif row["fallbacks"]:
            notes.append(f"{name}: {row['fallbacks']} coupled, because {row['reason'] or 'UNLISTED'}.")
    found = [
        Table(
            "Coverage: default settings, training mode, dropout on",
            ["model", "trained", "sites", "missed", "error", "coupled", "time"],
            [
                [
                    name, str(row["parameters"]), str(row["sites"]), str(len(row["missed"])), f"{row['error']:.0e}",
                    str(row["fallbacks"]), f"{row['time']['ratio']:.2f}",
                ]
                for name, row in present.items()
            ],
            "\n".join(notes),
        )
    ]  # fmt: skip
    if low := {name: row for name, row in figures["precision"].items() if "absent" not in row}:
        rows = [[name, *(_cell(row[mode]) for mode in MODES)] for name, row in low.items()]
        refusals = [
            f"{name}, {mode}: not run, torch refuses it on this machine: {row[mode]}."
            for name, row in low.items()
            for mode in MODES
            if isinstance(row[mode], str)
        ]
        title = f"Relative error in 16 bits (allowed: {LOW:g})"
        found.append(Table(title, ["model", *MODES], rows, "\n".join(refusals)))
    if large := {name: row for name, row in figures["sized"].items() if was_run(row)}:
        rows = [[name, str(Ratio(**row))] for name, row in large.items()]
        found.append(Table("Step time over backpropagation", ["model", "ratio"], rows))
    if figures["mezo"]:
        trained = {name: row for name, row in figures["mezo"].items() if was_run(row)}
        refusals = [f"{name}: not run, {r['refused']}." for name, r in figures["mezo"].items() if not was_run(r)]
        found.append(
            Table(
                "One language model by differences of losses (MeZO) and by forward mode, SGD",
                ["precision, rate, method", "before", "after", "no slope", "drift"],
                [
                    [name, f"{r['first']:.3f}", f"{r['reported']:.3f}", f"{r['zeros']:.0%}", f"{r['drift']:.1%}"]
                    for name, r in trained.items()
                ],
                "after: the loss as a trainer reports it that leaves out nan; no slope: steps with a derivative of 0;\n"
                + "\n".join(["drift: how far as many steps move the weights at a learning rate of zero.", *refusals]),
            )
        )
    return found


def _cell(error: float | str) -> str:
    return "refused" if isinstance(error, str) else f"{error:.1e}"
