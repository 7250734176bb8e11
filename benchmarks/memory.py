"""Peak memory and time of a step: backprop, checkpointing, MeZO and guessing; training under a real limit."""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.baselines import LEARNERS, Guessed, state_bytes
from benchmarks.isolated import Task, collect, fresh
from benchmarks.measure import Peaks, Ratio, interleaved, peaks, ratio
from benchmarks.problems import vit
from benchmarks.report import COMMITTED, SCRATCH, Table, print_table
from benchmarks.speed import Problem, images, mlp
from benchmarks.training import Learner
from guessopt.step import modes

LR = 1e-4


@dataclass(frozen=True)
class Case:
    """A problem by its title; ``--quick`` has another for the same place."""

    title: str
    make: Callable[[], Problem]


FULL = {
    "mlp12": Case("MLP 12x1024", lambda: mlp(1024, 12, 512)),
    "mlp24": Case("MLP 24x1024", lambda: mlp(1024, 24, 512)),
    "vit6": Case("ViT depth 6", lambda: images(vit(depth=6), 64)),
    "mlp48": Case("MLP 48x1024", lambda: mlp(1024, 48, 512)),
    "vit12": Case("ViT depth 12", lambda: images(vit(depth=12), 64)),
}
QUICK = {
    "mlp12": Case("MLP 4x64", lambda: mlp(64, 4, 256)),
    "mlp24": Case("MLP 8x64", lambda: mlp(64, 8, 256)),
    "vit12": Case("ViT depth 2", lambda: images(vit(48, 2, patch=8), 4)),
}
TIMED = {
    False: {"mlp": Case("MLP 6x1024", lambda: mlp(1024, 6, 512)), "vit": FULL["vit6"]},
    True: {"mlp": QUICK["mlp12"], "vit": QUICK["vit12"]},
}
RACERS = (
    "backprop", "checkpointed", "in_backward", "w_perp_store", "w_perp_replay", "w_perp_stream",
    "learned_feedback", "learned_feedback_replay", "learned_feedback_stream",
)  # fmt: skip
WITH_JVP = " on a step with a forward-mode pass"


@dataclass(frozen=True)
class Settings:
    """``steps`` of a peak's measurement, ``long`` of stream's; ``rounds`` of interleaved times in the table, ``race``
    in the comparison of the modes; ``width``, ``depth``, ``batch``, ``budget`` (bytes) of the run under a limit."""

    quick: bool
    device: str
    steps: int
    long: int
    rounds: int
    race: int
    width: int
    depth: int
    batch: int
    budget: int

    def case(self, name: str) -> Problem:
        return placed((QUICK if self.quick else FULL)[name].make(), self.device)


def settings_of(args: argparse.Namespace) -> Settings:
    if args.quick:
        return Settings(True, args.device, 2, 4, 1, 2, width=192, depth=40, batch=512, budget=10 * 2**20)
    return Settings(False, args.device, 3, 52, 3, 9, width=1024, depth=40, batch=1024, budget=64 * 2**20)


def placed(problem: Problem, device: str) -> Problem:
    return Problem(problem.model.to(device), problem.x.to(device), problem.y.to(device))


# --- measurements, each in a process of its own -----------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One method on one problem. ``parameters`` in bytes; ``time`` over a backprop step, interleaved with it."""

    parameters: int
    peaks: Peaks
    seconds: float
    time: Ratio


def learner(method: str, model: nn.Module) -> Learner:
    return LEARNERS[method][1](model, LR)


def cell(name: str, method: str, settings: Settings) -> Cell:
    return measured(settings.case(name), method, settings.steps, settings.rounds)


def measured(problem: Problem, method: str, steps: int, rounds: int) -> Cell:
    """Peaks over the first steps, then times beside backprop's on a copy."""
    made: list[Learner] = []

    def make() -> Learner:
        made.append(learner(method, problem.model))
        return made[0]

    found = peaks(make, problem.x, problem.y, steps, state_bytes)
    kinds = {method: made[0]}
    if method != "backprop":
        kinds["backprop"] = learner("backprop", problem.copy().model)
        kinds["backprop"].step(problem.x, problem.y)
    times = race(kinds, problem.x, problem.y, rounds)
    parameters = sum(p.nbytes for p in problem.model.parameters())
    return Cell(parameters, found, median(times[method]), ratio(times[method], times["backprop"]))


def race(learners: Mapping[str, Learner], x: Tensor, y: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each learner's steps, taken in turns; on a CPU, of the one thread, whatever else the machine does."""
    steps = {name: (lambda own=own: own.step(x, y)) for name, own in learners.items()}
    device, clock = ("cuda", time.perf_counter) if x.is_cuda else ("cpu", time.process_time)
    return interleaved(steps, rounds=max(rounds, 2), device=device, clock=clock)


def long_stream(settings: Settings) -> Cell:
    """Stream over so many steps that every basis is renewed."""
    problem = settings.case("mlp24")
    found = peaks(lambda: learner("w_perp_stream", problem.model), problem.x, problem.y, settings.long, state_bytes)
    return Cell(sum(p.nbytes for p in problem.model.parameters()), found, 0.0, Ratio(0.0, 0.0, 0.0))


@dataclass(frozen=True)
class Between:
    """Bytes alive between replay's passes that the step has allocated, and those of the loss and of ``D_n``. The rest
    are states of random generators (the closure's and the guesses')."""

    live: int
    loss: int
    derivatives: int
    random: int


def between(settings: Settings) -> Between:
    """Measured in the fifth step of replay: nothing is being set up, and no basis falls due."""
    problem = settings.case("mlp24")
    own = Guessed(problem.model, LR, "w_perp", "replay")
    for _ in range(4):
        own.step(problem.x, problem.y)
    own.optimizer.zero_grad()
    second, cuda = modes.second_run, problem.x.is_cuda
    sizes: list[tuple[int, int, int]] = []
    before = torch.cuda.memory_allocated() if cuda else 0

    def spy(est: Any, plan: Any, records: Any, closure: Any, transaction: Any) -> Any:
        gc.collect()
        stream = sum(state.nbytes for state in own.optimizer.estimation.noise.state()["generators"].values())
        random = transaction.random.torch_cpu.nbytes + 2 * stream  # before the step, and before its first pass
        sizes.append((records[0].loss.nbytes, records[0].d.nbytes, random))
        with record_function("between the passes"):
            live.append(torch.cuda.memory_allocated() - before if cuda else 0)
        return second(est, plan, records, closure, transaction)

    live: list[int] = []
    profiling = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with mock.patch.object(modes, "second_run", spy), profiling as profiler:
        own.step(problem.x, problem.y)
    if not cuda:
        assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
        events = profiler.profiler.kineto_results.events()
        mark = min(event.start_ns() for event in events if event.name() == "between the passes")
        live = [sum(e.nbytes() for e in events if e.name() == "[memory]" and e.start_ns() < mark)]
    return Between(live[0], *sizes[0])


@dataclass(frozen=True)
class Race:
    """Times of a step over a checkpointed backprop step, interleaved. Of methods that make a forward-mode pass on one
    step in several, the steps without; those with it go by the name ``... WITH_JVP``."""

    over_checkpointed: dict[str, Ratio]
    seconds: dict[str, float]


def modes_race(name: str, settings: Settings) -> Race:
    problem = placed(TIMED[settings.quick][name].make(), settings.device)
    learners = {method: learner(method, problem.copy().model) for method in RACERS}
    warm = 2 if settings.quick else 4
    for own in learners.values():
        for _ in range(warm):
            own.step(problem.x, problem.y)
    times = race(learners, problem.x, problem.y, settings.race)
    over, seconds = {}, {}
    for method, own in learners.items():
        for name, rounds in kinds_of_steps(method, own, range(warm, warm + len(times[method]))).items():
            each = [times[method][k - warm] for k in rounds]
            over[name] = ratio(each, [times["checkpointed"][k - warm] for k in rounds])
            seconds[name] = median(each)
    return Race(over, seconds)


def kinds_of_steps(method: str, own: Learner, steps: range) -> dict[str, list[int]]:
    """A learner's steps by what they are called in a ``Race``, where there are at least two of a kind."""
    every = getattr(own, "every", 1)
    found: dict[str, list[int]] = {}
    for step in steps:
        found.setdefault(method + WITH_JVP if every > 1 and step % every == 0 else method, []).append(step)
    return {name: each for name, each in found.items() if len(each) > 1}


# --- under a limit ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limited:
    """What became of a method under the limit: steps done, the losses, and what it died of (empty: nothing)."""

    steps: int
    losses: list[float]
    error: str


LIMITED = ("backprop", "checkpointed", "in_backward", "w_perp_stream")
LIMITED_STEPS = 3
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def limited(method: str, settings: Settings) -> Limited:
    """A few steps in a process that may map no more than the budget beyond parameters, optimizer state and what a first
    step with eight examples has loaded."""
    try:
        result: Limited = fresh(under_limit, method, settings)
        return result
    except BrokenProcessPool:
        return Limited(0, [], "the process was killed")


def under_limit(method: str, settings: Settings) -> Limited:
    import resource

    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)  # larger blocks go back to the system as soon as they are freed
    libc.mallopt(M_TRIM_THRESHOLD, 2**16)
    problem = mlp(settings.width, settings.depth, settings.batch)
    own = learner(method, problem.model)
    for _ in range(2):
        own.step(problem.x[:8], problem.y[:8])
    own.model.zero_grad()
    gc.collect()
    libc.malloc_trim(0)
    allowed = address_space() + settings.budget
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    losses: list[float] = []
    try:
        for _ in range(LIMITED_STEPS):
            own.step(problem.x, problem.y)
            with torch.no_grad():
                losses.append(nn.functional.cross_entropy(problem.model(problem.x), problem.y).item())
    except (RuntimeError, MemoryError) as error:
        return Limited(len(losses), losses, str(error).splitlines()[0])
    return Limited(len(losses), losses, "")


def address_space() -> int:
    """Bytes that this process has mapped."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmSize")).split()[1]) * 1024


# --- the experiment ---------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problems", nargs="+", choices=FULL, metavar="NAME", help=", ".join(FULL))
    parser.add_argument("--fresh", action="store_true", help="measure again what an earlier, interrupted run finished")


def run(args: argparse.Namespace) -> None:
    settings, out = settings_of(args), args.out or (SCRATCH if args.quick else COMMITTED)
    cases = {name: case for name, case in (QUICK if args.quick else FULL).items() if name in (args.problems or FULL)}
    path = out / "memory.json"
    tasks: dict[str, Task] = {"stream": (long_stream, (settings,)), "between": (between, (settings,))}
    if sys.platform == "linux" and args.device == "cpu":
        tasks |= {f"limit {method}": (limited, (method, settings)) for method in LIMITED}
    for name in TIMED[args.quick]:
        tasks[f"race {name}"] = modes_race, (name, settings)
    for name in cases:
        tasks |= {f"{name} {method}": (cell, (name, method, settings)) for method in LEARNERS}
    figures = collect(path, args, asdict(settings), tasks)
    for table in tables(figures, cases, settings):
        print_table(*table)
    plot(figures, cases, out / "memory.png")
    print(f"Figures in {path}, picture in {out / 'memory.png'}")


def mb(n: float) -> str:
    return f"{n / 1e6:.1f}"


def above(peaks: Mapping[str, int], *, gradients: bool = False) -> int:
    """The peak above parameters and optimizer state (and ``.grad``)."""
    return peaks["peak"] - peaks["state"] - (peaks["gradients"] if gradients else 0)


def prepared(peaks: Mapping[str, int]) -> int:
    """What a method keeps between steps beside the optimizer's state and ``.grad``: W-perp's bases."""
    return peaks["kept"] - peaks["state"] - peaks["gradients"]


def tables_of(content: Mapping[str, Any]) -> list[Table]:
    """The tables of a JSON that this experiment wrote."""
    settings, figures = Settings(**content["settings"]), content["figures"]
    cases = {name: case for name, case in FULL.items() if f"{name} backprop" in figures}
    return tables(figures, cases, settings)


def tables(figures: Any, cases: Mapping[str, Case], settings: Settings) -> list[Table]:
    found = [
        peaks_table(case, {m: figures[f"{name} {m}"] for m in LEARNERS if f"{name} {m}" in figures})
        for name, case in cases.items()
    ]
    notes = [flat(figures, [name for name in cases if name.startswith(family)], cases) for family in ("mlp", "vit")]
    long = figures["stream"]["peaks"]
    rivals = [m for m in ("backprop", "in_backward") if f"mlp24 {m}" in figures]
    notes.append(
        f"Stream, {(QUICK if settings.quick else FULL)['mlp24'].title}, steps 1 to {settings.long}: "
        f"{mb(above(long))} MB above parameters and state ({mb(prepared(long))} of them kept). "
        + "; ".join(f"{LEARNERS[m][0]}: {mb(above(figures[f'mlp24 {m}']['peaks']))} MB" for m in rivals)
    )
    alive = figures["between"]
    rest = alive["live"] - alive["loss"] - alive["derivatives"] - alive["random"]
    notes.append(
        f"Alive between replay's passes: {alive['live']} bytes: the loss {alive['loss']}, D_n {alive['derivatives']}, "
        f"random states {alive['random']}, other {rest}."
    )
    races = {name: figures[f"race {name}"] for name in TIMED[settings.quick]}
    over = [each["over_checkpointed"] for each in races.values()]
    names = list(dict.fromkeys(m for each in over for m in each))
    found.append(
        Table(
            "Time over a checkpointed backprop step (quartiles), interleaved",
            ["", *(TIMED[settings.quick][name].title for name in races)],
            [[racer(m), *(str(Ratio(**own[m])) if m in own else "" for own in over)] for m in names],
            "\n".join(note for note in notes if note),
        )
    )
    ends = {m: figures[f"limit {m}"] for m in LIMITED if f"limit {m}" in figures}
    if ends:
        found.append(
            Table(
                f"MLP {settings.depth}x{settings.width}, batch {settings.batch}: {settings.budget / 2**20:.0f} MiB "
                "beyond parameters and state",
                ["", "steps", "losses", "ended by"],
                [
                    [
                        LEARNERS[m][0],
                        str(e["steps"]),
                        " ".join(f"{v:.4f}" for v in e["losses"]),
                        e["error"].partition("DefaultCPUAllocator: ")[2][:21] or e["error"] or "-",
                    ]
                    for m, e in ends.items()
                ],
            )
        )
    return found


def racer(name: str) -> str:
    method = name.removesuffix(WITH_JVP)
    return LEARNERS[method][0] + name[len(method) :]


def peaks_table(case: Case, cells: Mapping[str, Any]) -> Table:
    return Table(
        f"{case.title}, {mb(cells['backprop']['parameters'])} MB of parameters: peak in MB above these",
        ["", "peak", "- state", "- .grad", "kept", "time"],
        [
            [
                LEARNERS[method][0],
                mb(each["peaks"]["peak"]),
                mb(above(each["peaks"])),
                mb(above(each["peaks"], gradients=True)),
                mb(prepared(each["peaks"])),
                f"{each['time']['ratio']:.2f}",
            ]
            for method, each in cells.items()
        ],
        "- state: less the optimizer's state (AdamW). - .grad: less the gradients as well. kept: from step to step,\n"
        "beside state and .grad (W-perp: its bases). time: a step over a backprop step.",
    )


def flat(figures: Any, names: list[str], cases: Mapping[str, Case]) -> str:
    """Replay's peak by depth."""
    found = [figures[f"{name} w_perp_replay"]["peaks"] for name in names]
    if len(found) < 2:
        return ""
    whole = [above(each, gradients=True) for each in found]
    passing = [above(each, gradients=True) - prepared(each) for each in found]
    said = ", ".join(f"{cases[n].title} {mb(v)} MB" for n, v in zip(names, whole, strict=True))
    return (
        f"Replay above parameters, .grad and state: {said} (largest / smallest {max(whole) / min(whole):.2f}; without "
        f"the bases kept {', '.join(map(mb, passing))}: {max(passing) / min(passing):.2f})."
    )


def plot(figures: Any, cases: Mapping[str, Case], path: Path) -> None:
    """A group of bars for each problem: the peak above parameters and optimizer state."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(1.9 * len(cases) + 3.5, 4), layout="constrained")
    width = 0.85 / len(LEARNERS)
    for number, (method, (label, _)) in enumerate(LEARNERS.items()):
        heights = [above(figures[f"{name} {method}"]["peaks"]) / 1e6 for name in cases]
        axis.bar([k + number * width for k in range(len(cases))], heights, width, label=label, color=f"C{number}")
    axis.set(yscale="log", ylabel="MB above parameters and optimizer state")
    axis.set_xticks([k + 0.4 for k in range(len(cases))], [case.title for case in cases.values()])
    figure.legend(loc="outside right center", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
