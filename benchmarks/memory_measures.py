"""Measurements of memory and time, each made in a process of its own; and training under a memory limit."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.isolated import fresh
from benchmarks.measure import Peaks, Ratio, interleaved, peaks, ratio
from benchmarks.memory_cases import EVERY, LR, METHODS, RACERS, TIMED, WITH_JVP, Settings, state_bytes
from benchmarks.problems import Problem, mlp
from benchmarks.training import Learner


@dataclass(frozen=True)
class Cell:
    """One method on one problem. ``parameters`` in bytes; ``time`` over a backprop step, interleaved with it."""

    parameters: int
    peaks: Peaks
    seconds: float
    time: Ratio


def learner(method: str, model: nn.Module) -> Learner:
    return METHODS[method].learner(model, LR)


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
    """Seconds of each learner's steps, taken in turns. On a CPU it is the process's own time, which other processes do
    not lengthen."""
    steps = {name: (lambda own=own: own.step(x, y)) for name, own in learners.items()}
    device, clock = ("cuda", time.perf_counter) if x.is_cuda else ("cpu", time.process_time)
    return interleaved(steps, rounds=max(rounds, 2), device=device, clock=clock)


def long_stream(settings: Settings) -> Cell:
    """Peaks of mode "stream" over so many steps that every basis is made again."""
    problem = settings.case("mlp24")
    found = peaks(lambda: learner("w_perp_stream", problem.model), problem.x, problem.y, settings.long, state_bytes)
    return Cell(sum(p.nbytes for p in problem.model.parameters()), found, 0.0, Ratio(0.0, 0.0, 0.0))


@dataclass(frozen=True)
class Between:
    """Bytes alive between replay's two passes.

    Attributes:
        live: all that the step has allocated by then.
        loss, derivatives: of these, the loss and ``D_n``.
        random: of these, states of random generators, the closure's and the guesses'.
    """

    live: int
    loss: int
    derivatives: int
    random: int


def between(settings: Settings) -> Between:
    """Measured in the fifth step of replay, when the closure is called for the second pass. No basis is due then."""
    problem = settings.case("mlp24")
    own, x, y = learner("w_perp_replay", problem.model), problem.x, problem.y
    cuda, alive = x.is_cuda, list[int]()
    before = 0

    def closure() -> Tensor:  # its last call is for the second pass
        gc.collect()
        with record_function("closure called"):
            alive.append(torch.cuda.memory_allocated() - before if cuda else 0)
        return own.loss(x, y)

    for _ in range(4):
        own.optimizer.zero_grad()
        own.optimizer.step(closure)
    own.optimizer.zero_grad()
    before = torch.cuda.memory_allocated() if cuda else 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = own.optimizer.step(closure)
    live = alive[-1]
    if not cuda:
        assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
        events = profiler.profiler.kineto_results.events()
        second = max(event.start_ns() for event in events if event.name() == "closure called")
        live = sum(e.nbytes() for e in events if e.name() == "[memory]" and e.start_ns() < second)
    noise = own.optimizer.state_dict()["guessopt"]["noise"]["generators"]
    guesses = 2 * sum(state.nbytes for state in noise.values())  # before the step, and before its first pass
    return Between(live, loss.nbytes, len(x) * loss.element_size(), torch.get_rng_state().nbytes + guesses)


@dataclass(frozen=True)
class Race:
    """Times of a step over a checkpointed backprop step, measured in turns.

    Some methods make a forward-mode pass only on one step in several. Under such a method's name are its steps without
    that pass; its other steps have ``WITH_JVP`` added to the name.
    """

    over_checkpointed: dict[str, Ratio]
    seconds: dict[str, float]


def modes_race(name: str, settings: Settings) -> Race:
    problem = TIMED[settings.quick][name].make().to(settings.device)
    learners = {method: learner(method, problem.copy().model) for method in RACERS}
    warm = 2 if settings.quick else 4
    for own in learners.values():
        for _ in range(warm):
            own.step(problem.x, problem.y)
    times = race(learners, problem.x, problem.y, settings.race)
    over, seconds = {}, {}
    for method in learners:
        for name, rounds in kinds_of_steps(method, range(warm, warm + len(times[method]))).items():
            each = [times[method][k - warm] for k in rounds]
            over[name] = ratio(each, [times["checkpointed"][k - warm] for k in rounds])
            seconds[name] = median(each)
    return Race(over, seconds)


def kinds_of_steps(method: str, steps: range) -> dict[str, list[int]]:
    """The numbers of a method's steps, by the names that a ``Race`` gives them. Names with one step are left out."""
    every = EVERY.get(method, 1)
    found: dict[str, list[int]] = {}
    for step in steps:
        found.setdefault(method + WITH_JVP if every > 1 and step % every == 0 else method, []).append(step)
    return {name: each for name, each in found.items() if len(each) > 1}


# --- under a limit ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limited:
    """How far a method came under the limit: steps, losses, and the error that ended it (empty: none)."""

    steps: int
    losses: list[float]
    error: str


LIMITED_STEPS = 3
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def limited(method: str, settings: Settings) -> Limited:
    """A few steps in a process that may map no more than ``settings.budget`` bytes. Not counted are the parameters, the
    optimizer's state, and the memory of a first step with eight examples."""
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
