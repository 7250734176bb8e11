"""Random networks, injected faults, resuming, a soak: wrong answers, state lost, memory and time that grow."""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import os
import random
import resource
import signal
import time
import tracemalloc
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import reliability_resume
from benchmarks.report import COMMITTED, SCRATCH, print_table, write_json
from guessopt import GuessGradOptimizer

PAGE = Path("docs/reliability.md")
NOT_RUN = "not run"
CHUNK = 20
"""Networks of one task."""
SECONDS = 120
"""A check that takes longer is given up, and counts as an error without a remedy."""
EXAMPLES = 3
"""Of each kind of finding and each task, how many are kept."""
PARTS = ("networks", "operations", "faults", "interrupts", "soak", "shapes", "audit", "resume")

Figures = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """``calls``: at about how many calls of each step an error is put in; ``interrupts`` of each step; ``steps`` of the
    soak; ``shapes``: numbers of examples; ``audited``: steps that the audit's cost is measured over."""

    networks: int
    calls: int
    interrupts: int
    steps: int
    shapes: int
    audited: int


FULL = Settings(networks=5000, calls=60, interrupts=40, steps=100_000, shapes=1000, audited=1000)
QUICK = Settings(networks=40, calls=3, interrupts=3, steps=2000, shapes=60, audited=100)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", type=int, metavar="N", help=f"random networks (default: {FULL.networks})")
    parser.add_argument("--first-seed", type=int, default=0, metavar="S", help="seed of the first network (default: 0)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--workers", type=int, default=2, metavar="K", help="processes (default: 2)")
    parser.add_argument("--fresh", action="store_true", help="try again what an earlier run has tried")


# --- tasks, run in worker processes -----------------------------------------------------------------------------------

Task = Callable[[], Figures]


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def networks(first: int, count: int) -> Figures:
    """Every oracle on each network of a range of seeds."""
    made = importlib.import_module("tests.fuzzing.networks")
    return _checked({seed: made.from_seed(seed) for seed in range(first, first + count)})


def operations(family: str) -> Figures:
    """Every oracle on a network for each variant of one operation."""
    made = importlib.import_module("tests.fuzzing.networks")
    variants = made.OPERATIONS[family].variants
    return _checked({place: made.alone(family, variant) for place, variant in enumerate(variants)})


def _checked(chosen: Mapping[int, Any]) -> Figures:
    oracles = importlib.import_module("tests.fuzzing.oracles")
    counts: Counter[str] = Counter()
    kinds: dict[str, Figures] = {}
    for seed, network in chosen.items():
        for name in oracles.ORACLES:
            for found in _in_time(oracles, name, network) or [oracles.Finding(name, "right", "")]:
                counts[found.kind] += 1
                if found.kind != "right":
                    _keep(kinds, found, seed, network)
    return {"cases": len(chosen), "counts": dict(counts), "kinds": kinds}


def _keep(kinds: dict[str, Figures], found: Any, seed: int, network: Any) -> None:
    own = kinds.setdefault(found.key, {**found._asdict(), "count": 0, "seed": seed, "network": repr(network)})
    own["count"] += 1
    if len(repr(network)) < len(own["network"]):
        own |= {**found._asdict(), "seed": seed, "network": repr(network)}


def _in_time(oracles: Any, name: str, network: Any) -> list[Any]:
    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        found: list[Any] = oracles.ORACLES[name](network)
        return found
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


WORLDS: dict[str, Figures] = {
    "store": {"memory": "store"},
    "replay": {"memory": "replay"},
    "stream": {"memory": "stream"},
    "directional descent": {"estimator": "directional_descent"},
    "learned feedback": {"estimator": "learned_feedback"},
    "two guesses": {"guesses": 2},
}
STEPS = 6


def faults(world: str, kind: str, where: str, calls: int) -> Figures:
    """An error at every k-th call of the first steps, in one place."""
    module = importlib.import_module("tests.fuzzing.faults")
    make = partial(module.World, **WORLDS[world])
    calm = module.reference(make, STEPS, kind, where)
    found = module.walk(make, calm, module.every(kind, where, calm.calls, calls))
    return _lost(found)


def interrupts(world: str, count: int) -> Figures:
    """KeyboardInterrupt at random times of the first steps."""
    module = importlib.import_module("tests.fuzzing.faults")
    make = partial(module.World, **WORLDS[world])
    calm, pick = module.reference(make, 3), random.Random(0)
    lasts = []
    for step in range(3):
        ready = module.ready(make, step)
        start = time.perf_counter()
        ready.step(step)
        lasts.append(time.perf_counter() - start)

    def at_random(step: int) -> Iterable[tuple[str, Any]]:
        for _ in range(count):
            delay = pick.random() * lasts[step]
            yield f"an interrupt after {1e3 * delay:.2f} ms", module.interrupt_after(delay)

    return _lost(module.walk(make, calm, at_random, KeyboardInterrupt))


def _lost(found: Any) -> Figures:
    examples = [f"{place}: {', '.join(lost[:3])}" for place, lost in list(found.lost.items())[:EXAMPLES]]
    return {"tried": found.tried, "lost": len(found.lost), "examples": examples}


def tiny() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(16, 4), torch.arange(16) % 3


def resident() -> int:
    """Bytes of memory that this process holds; where the system does not say, the most that it has held."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def tensors_alive() -> int:
    gc.collect()
    return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


def soak(steps: int) -> Figures:
    """What grows over many steps of a small network, from a tenth of them on."""
    model, x, y = tiny()
    opt = GuessGradOptimizer(model.parameters(), torch.optim.SGD, "w_perp", lr=1e-3, seed=0)
    times = array("d", bytes(8 * steps))  # made at once: it must not grow itself
    warm = steps // 10

    def train(first: int, last: int) -> None:
        for place in range(first, last):
            start = time.perf_counter()
            opt.step(partial(_loss, model, x, y))
            times[place] = time.perf_counter() - start

    train(0, warm)
    alive, held = tensors_alive(), resident()
    train(warm, steps - warm)
    grown, more = resident() - held, tensors_alive() - alive
    traced = _traced_growth(lambda: train(steps - warm, steps - warm // 2), lambda: train(steps - warm // 2, steps))
    return {
        "steps": steps, "resident_bytes": grown, "python_bytes": traced, "python_steps": warm // 2, "tensors": more,
        "first_seconds": median(times[warm // 2 : warm]),
        "last_seconds": median(times[steps - 2 * warm : steps - warm]),
    }  # fmt: skip


def _traced_growth(warm: Callable[[], None], work: Callable[[], None]) -> int:
    """Bytes of Python objects that ``work`` leaves behind."""
    tracemalloc.start()
    try:
        warm()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        work()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def shapes(count: int) -> Figures:
    """Step time and memory while every step has another number of examples."""
    model, *_ = tiny()
    x, y = torch.randn(count + 4, 4), torch.arange(count + 4) % 3
    opt = GuessGradOptimizer(model.parameters(), torch.optim.SGD, "w_perp", lr=1e-3, seed=0)
    times, held = [], []
    order = random.Random(0).sample(range(4, count + 4), count)
    for n in order:
        start = time.perf_counter()
        opt.step(partial(_loss, model, x[:n], y[:n]))
        times.append(time.perf_counter() - start)
        held.append(resident())
    tenth = max(count // 10, 1)
    return {
        "shapes": count,
        "first_seconds": median(times[tenth : 2 * tenth]),
        "last_seconds": median(times[-tenth:]),
        "resident_bytes": held[-1] - held[2 * tenth],
    }


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def audit(steps: int) -> Figures:
    """What the audit adds to the steps' time: over the same steps, in turn with and without it."""
    spent: dict[bool, float] = {}
    for on in (False, True, False, True):
        model, x, y = tiny()
        opt = GuessGradOptimizer(model.parameters(), torch.optim.SGD, "w_perp", lr=1e-3, seed=0, audit=on)
        start = time.process_time()
        for _ in range(steps):
            opt.step(partial(_loss, model, x, y))
        spent[on] = min(time.process_time() - start, spent.get(on, float("inf")))
    return {"steps": steps, "ratio": spent[True] / spent[False]}


def resume() -> Figures:
    """What ``reliability_resume`` finds."""
    found = reliability_resume.resume_mismatches()
    return {"mismatches": len(found), "examples": found[:EXAMPLES]}


# --- running them -----------------------------------------------------------------------------------------------------


def tasks_of(args: argparse.Namespace, settings: Settings, parts: Iterable[str]) -> dict[str, Task]:
    """By name; the name says all that the result depends on."""
    found: dict[str, Task] = {}
    if "networks" in parts:
        wanted = args.networks if args.networks is not None else settings.networks
        for first in range(args.first_seed, args.first_seed + wanted, CHUNK):
            count = min(CHUNK, args.first_seed + wanted - first)
            found[f"networks {first} {count}"] = partial(networks, first, count)
    if "operations" in parts and not args.quick:
        families = importlib.import_module("tests.fuzzing.networks").OPERATIONS
        found |= {f"operations {family}": partial(operations, family) for family in families}
    if "faults" in parts:
        for world in WORLDS:
            for kind in ("function", "operation"):
                for where in ("closure", "engine", "update"):
                    name = f"faults {world}, {kind}, {where}, {settings.calls}"
                    found[name] = partial(faults, world, kind, where, settings.calls)
    if "interrupts" in parts:
        for world in WORLDS:
            found[f"interrupts {world} {settings.interrupts}"] = partial(interrupts, world, settings.interrupts)
    alone: dict[str, tuple[Callable[..., Figures], tuple[Any, ...]]] = {
        "soak": (soak, (settings.steps,)),
        "shapes": (shapes, (settings.shapes,)),
        "audit": (audit, (settings.audited,)),
        "resume": (resume, ()),
    }
    for name, (function, arguments) in alone.items():
        if name in parts:
            found[" ".join([name, *map(str, arguments)])] = partial(function, *arguments)
    return found


def _work(job: tuple[str, Task]) -> tuple[str, Figures]:
    _quiet()
    name, task = job
    try:
        return name, task()
    except Exception as error:
        return name, {"error": f"{type(error).__name__}: {error}"}


def results_of(tasks: Mapping[str, Task], path: Path, workers: int, fresh: bool) -> dict[str, Figures]:
    """Each task's result, made in a worker process (a new one after 20 tasks), and kept in ``path`` as it comes."""
    done: dict[str, Figures] = json.loads(path.read_text()) if path.is_file() and not fresh else {}
    missing = [(name, task) for name, task in tasks.items() if name not in done]
    if len(missing) < len(tasks):
        print(f"{len(tasks) - len(missing)} finished tasks taken from {path} (--fresh tries them again)")
    path.parent.mkdir(parents=True, exist_ok=True)
    if missing:
        with get_context("spawn").Pool(min(workers, len(missing)), maxtasksperchild=20) as pool:
            for name, result in tqdm(
                pool.imap_unordered(_work, missing), total=len(missing), unit="task", disable=None
            ):
                done[name] = result
                if "error" not in result:
                    kept = {name: result for name, result in done.items() if "error" not in result}
                    path.with_suffix(".part").write_text(json.dumps(kept))
                    path.with_suffix(".part").replace(path)
    return {name: done[name] for name in tasks}


def figures_of(results: Mapping[str, Figures]) -> Figures:
    """Added up by part."""
    found: Figures = {part: NOT_RUN for part in PARTS}
    by_part: dict[str, dict[str, Figures]] = {}
    errors = {name: result["error"] for name, result in results.items() if "error" in result}
    for name, result in results.items():
        part, _, rest = name.partition(" ")
        if "error" not in result:
            by_part.setdefault(part, {})[rest] = result
    for part, own in by_part.items():
        if part in ("networks", "operations"):
            found[part] = _networks(own.values())
        elif part in ("faults", "interrupts"):
            found[part] = {
                "tried": sum(result["tried"] for result in own.values()),
                "lost": sum(result["lost"] for result in own.values()),
                "places": {place: result for place, result in own.items() if result["lost"]},
            }
        else:
            (found[part],) = own.values()
    return {**found, "errors": errors}


def _networks(results: Iterable[Figures]) -> Figures:
    counts: Counter[str] = Counter()
    kinds: dict[str, Figures] = {}
    cases = 0
    for result in results:
        cases += result["cases"]
        counts.update(result["counts"])
        for key, own in result["kinds"].items():
            if own["kind"] == "skipped":
                continue
            known = kinds.get(key)
            if known is None or len(own["network"]) < len(known["network"]):
                kinds[key] = {**own, "count": own["count"] + (known["count"] if known else 0)}
            else:
                known["count"] += own["count"]
    listed = sorted(kinds.values(), key=lambda own: (own["kind"], -own["count"]))
    return {"cases": cases, "checks": sum(counts.values()), "counts": dict(counts), "kinds": listed}


def shorten(kind: Figures, seconds: float = 20.0) -> Figures:
    """The same finding on the simplest network that still shows it."""
    oracles = importlib.import_module("tests.fuzzing.oracles")
    made = importlib.import_module("tests.fuzzing.networks")
    names = {name: getattr(made, name) for name in ("Network", "Op")}
    network, until = eval(kind["network"], names), time.monotonic() + seconds
    sought = oracles.Finding(kind["oracle"], kind["kind"], kind["message"], kind["where"]).key

    def fails(other: Any) -> bool:
        if time.monotonic() > until:
            return False
        return any(found.key == sought for found in _in_time(oracles, kind["oracle"], other))

    return {**kind, "network": repr(made.minimise(network, fails))}


def snippet(kind: Figures) -> str:
    """Runs as it stands, from the project's root."""
    return (
        "from tests.fuzzing.networks import Network, Op\n"
        "from tests.fuzzing.oracles import check\n"
        f"print(check({kind['network']}, {kind['oracle']!r}))"
    )


def run(args: argparse.Namespace) -> None:
    settings, parts = QUICK if args.quick else FULL, args.parts or PARTS
    out = args.out or (SCRATCH if args.quick else COMMITTED)
    if importlib.util.find_spec("hypothesis") is None or importlib.util.find_spec("tests") is None:
        raise SystemExit("reliability: needs hypothesis and the folder tests; run it from the project's root")
    _quiet()
    tasks = tasks_of(args, settings, parts)
    results = results_of(tasks, (args.out or SCRATCH) / "reliability_progress.json", args.workers, args.fresh)
    figures = figures_of(results)
    for part in ("networks", "operations"):
        kinds = figures[part]["kinds"] if figures[part] != NOT_RUN else []
        bad = [kind for kind in kinds if kind["kind"] in ("wrong", "obscure")]
        for kind in tqdm(bad, desc="making shorter", leave=False, disable=None):
            kind |= shorten(kind)
    show(figures)
    wanted = args.networks if args.networks is not None else settings.networks
    described = {"quick": args.quick, "parts": list(parts), "networks": wanted, "first_seed": args.first_seed}
    write_json(out / "reliability.json", args, seeds=[args.first_seed], settings=described, figures=figures)
    whole = not args.quick and not args.out and set(parts) == set(PARTS)
    target = PAGE if whole else out / PAGE.name
    target.write_text(page(json.loads((out / "reliability.json").read_text())))
    print(f"Written: {out / 'reliability.json'} and {target}")


# --- what is said of them ---------------------------------------------------------------------------------------------


def summary(figures: Figures) -> list[tuple[str, str]]:
    """One line for each question."""
    rows: list[tuple[str, str]] = []
    for part, label in (("networks", "random networks"), ("operations", "operations, each in a network of its own")):
        own = figures[part]
        if own == NOT_RUN:
            rows.append((label, NOT_RUN))
            continue
        counts = own["counts"]
        rows += [
            (label, f"{own['cases']:,}"),
            ("checks on them", f"{own['checks']:,}"),
            ("wrong answers", f"{counts.get('wrong', 0):,}"),
            ("errors without a remedy", f"{counts.get('obscure', 0):,}"),
            ("refusals that name a remedy", f"{counts.get('refused', 0):,}"),
        ]
    for part, label in (("faults", "errors put in"), ("interrupts", "interrupts at random times")):
        own = figures[part]
        rows.append((label, NOT_RUN if own == NOT_RUN else f"{own['tried']:,}"))
        rows.append(("... after which state was lost", NOT_RUN if own == NOT_RUN else f"{own['lost']:,}"))
    own = figures["resume"]
    rows.append(("mismatches after resuming", str(own if own == NOT_RUN else own["mismatches"])))
    own = figures["soak"]
    if own == NOT_RUN:
        rows.append(("growth over many steps", NOT_RUN))
    else:
        rows += [
            (f"resident memory over {own['steps']:,} steps", _bytes(own["resident_bytes"])),
            (f"Python objects over {own['python_steps']:,} steps", _bytes(own["python_bytes"])),
            ("tensors more", f"{own['tensors']:+,}"),
            ("step time, last over first", f"{own['last_seconds'] / own['first_seconds']:.2f}"),
        ]
    own = figures["shapes"]
    if own == NOT_RUN:
        rows.append(("many shapes", NOT_RUN))
    else:
        rows += [
            (f"resident memory over {own['shapes']:,} shapes", _bytes(own["resident_bytes"])),
            ("step time over shapes, last over first", f"{own['last_seconds'] / own['first_seconds']:.2f}"),
        ]
    own = figures["audit"]
    ratio = NOT_RUN if own == NOT_RUN else own["ratio"]
    rows.append(("step time with the audit over without", ratio if ratio == NOT_RUN else f"{ratio:.3f}"))
    return rows


def _bytes(count: int) -> str:
    return f"{count:+,} bytes"


def kinds_of(figures: Figures) -> list[Figures]:
    """Of findings on networks."""
    return [kind for part in ("networks", "operations") if figures[part] != NOT_RUN for kind in figures[part]["kinds"]]


def show(figures: Figures) -> None:
    print_table("Reliability", ("", ""), summary(figures))
    for kind in kinds_of(figures):
        print(f"\n{kind['count']} x {kind['oracle']}: {kind['kind']}: {kind['message'][:300]}")
        if kind["where"]:
            print(f"  at {kind['where']}")
        if kind["kind"] != "refused":
            print(snippet(kind))
    for part in ("faults", "interrupts"):
        for place, own in figures[part]["places"].items() if figures[part] != NOT_RUN else ():
            print(f"\n{part}, {place}: state lost in {own['lost']} of {own['tried']}", *own["examples"], sep="\n  ")
    for name, error in figures["errors"].items():
        print(f"\n{name} failed: {error}")


INTRODUCTION = """\
# Reliability

Made by `python -m benchmarks reliability`; do not edit.

The package takes the place of `loss.backward()`. A wrong gradient often looks like a right one: training goes on, and
is worse. So each step must be right, or it must raise an error that says what is not supported and what to do. After
an error everything must be as it was before the step. This page says how that was tested and what was found.

## What was found
"""

METHODS = """\
## What was tried

**Random networks.** Each network has one to five operations of about 45 families, one or two losses, and a random
layout: examples in the first or the second dimension, examples and positions merged, one example, sizes that are equal
by chance. Each one is checked in eight ways:

| check | what must hold |
|---|---|
| exact | the sum of the estimates over all one-hot guesses is autograd's gradient (relative error below 1e-8) |
| engines | the engines `fast`, `dual` and `func` give the same estimate from the same seed |
| modes | two steps with `memory="store"`, `"replay"` and `"stream"` end in the same parameters and buffers |
| stacked | K guesses in one pass give what K guesses in turn give |
| scaling | the estimate of three times a loss is three times the estimate of the loss |
| plain | after a step, loss, buffers and random states are those of one plain forward pass |
| changes | after some steps, something changes (batch size, data, dtype, a flag, the layer in use, a frozen \
parameter, a mixing weight, `eval()`), and the same optimizer is exact from the next step on |
| past | after such a change, the optimizer gives the same estimate as a new one that has loaded its state |

Every variant of every operation also gets a network of its own, with a layer before and a layer after it.

An error counts as a refusal if the package raises it and its message names a remedy. Other errors count as errors
without a remedy.

**Errors put in.** A small network with batch norm, dropout, numpy's and Python's random numbers and a counter makes
six steps. An error is raised at every k-th torch call, in the closure, elsewhere in the step, and in the base
optimizer's update. Then parameters, buffers, `.grad`, random states, the optimizer's state and torch's modes are
compared with those before the step. The step is then made again, and must give bit for bit what it gives without the
error. Interrupts (Ctrl-C) come at random times.

**Resuming.** A run that is saved and loaded in a new process goes on bit for bit as the run that was not interrupted.

**Long runs.** A small network makes many steps; then every step has another number of examples. Memory and step time
must not grow.
"""


def page(content: Mapping[str, Any]) -> str:
    """The page for a result file's content."""
    figures, found = content["figures"], content["environment"]
    lines = [INTRODUCTION, "| | |", "|---|--:|"]
    lines += [f"| {label} | {value} |" for label, value in summary(figures)]
    kinds = kinds_of(figures)
    bad = [kind for kind in kinds if kind["kind"] in ("wrong", "obscure")]
    refused = [kind for kind in kinds if kind["kind"] == "refused"]
    if bad:
        lines += ["", "## Kinds of wrong answers and of errors without a remedy", ""]
        for kind in bad:
            message = " ".join(kind["message"].split())[:200]
            lines += [f"{kind['count']} of `{kind['oracle']}`: {message}", "", "```", snippet(kind), "```", ""]
    if refused:
        lines += ["", "## Refusals", "", "| times | message |", "|--:|---|"]
        messages: Counter[str] = Counter()
        for kind in refused:
            messages[" ".join(kind["message"].split())[:200].replace("|", "\\|")] += kind["count"]
        lines += [f"| {count} | {message} |" for message, count in messages.most_common()]
    lost = [
        f"- {part}, {place}: {own['lost']} of {own['tried']}, for example {own['examples'][0]}"
        for part in ("faults", "interrupts")
        if figures[part] != NOT_RUN
        for place, own in figures[part]["places"].items()
    ]
    if lost:
        lines += ["", "## State lost", "", *lost]
    circumstances = ", ".join(f"{name} {value}" for name, value in found.items())
    lines += ["", METHODS, "## How to repeat it", "", "```", content["command"], "```", "", f"With {circumstances}."]
    lines += ["`--networks N --first-seed S` picks other networks. A run that was stopped goes on where it stopped."]
    return "\n".join(lines) + "\n"
