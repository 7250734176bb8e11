"""Times of single steps of small networks, for two versions of the package; and the cost of audits in 1,000 steps.

As a script it serves one version, the one on ``PYTHONPATH``. Each line of its input names a step and a number of steps;
the answer is a line with their times. The script also runs with older versions, so it uses only names that they have.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.problems import causal_lm, relu_mlp, vit
from guessopt import GuessGradOptimizer

#: Steps before the first one that is timed. By then tracing, early probes and updates with copies are over.
FIRST = 20
#: Steps of a run, and the steps that are audited.
STEPS = 1000
AUDITED = [2**k for k in range(10)]


class Recurrent(nn.Module):
    """An LSTM and a linear head on its last output."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(inputs, hidden, batch_first=True), nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x)[0][:, -1])
        return out


def _mlp(width: int, depth: int, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    return relu_mlp(width, depth, inputs=width), torch.randn(batch, width), torch.randint(10, (batch,))


def _cnn() -> tuple[nn.Module, Tensor, Tensor]:
    layers: list[nn.Module] = []
    for fan_in, fan_out in ((3, 8), (8, 8), (8, 16)):
        layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.BatchNorm2d(fan_out), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    return model, torch.randn(8, 3, 8, 8), torch.randint(10, (8,))


def _lm() -> tuple[nn.Module, Tensor, Tensor]:
    ids = torch.randint(65, (2, 17))
    return causal_lm(dim=32, depth=2, heads=2, hidden=64, tokens=16), ids[:, :-1], ids[:, 1:]


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
    "MLP 12x32": lambda: _mlp(32, 12, 64),
    "MLP 3x128": lambda: _mlp(128, 3, 512),
    "MLP 6x1024": lambda: _mlp(1024, 6, 64),
    "CNN, BatchNorm": _cnn,
    "ViT": lambda: (vit(dim=32, depth=2, heads=2), torch.randn(4, 3, 32, 32), torch.randint(10, (4,))),
    "Llama-like LM": _lm,
    "LSTM": lambda: (Recurrent(8, 32, 10), torch.randn(8, 12, 8), torch.randint(10, (8,))),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "w_perp": {"estimator": "w_perp"},
    "activation_perturbation": {"estimator": "activation_perturbation"},
    "directional_descent": {"estimator": "directional_descent"},
    "learned_feedback": {"estimator": "learned_feedback"},
    "w_perp, replay": {"estimator": "w_perp", "memory": "replay"},
    "w_perp, guesses=4": {"estimator": "w_perp", "guesses": 4},
}


def build(network: str, options: str, audit: bool) -> tuple[GuessGradOptimizer, Callable[[], object]]:
    """The optimizer, and its step. ``audit`` is passed on if this version has that option."""
    torch.manual_seed(0)
    model, x, y = NETWORKS[network]()
    more: dict[str, Any] = dict(OPTIONS[options])
    if "audit" in inspect.signature(GuessGradOptimizer).parameters:
        more["audit"] = audit
    opt = GuessGradOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-4, **more)

    def closure() -> Tensor:
        return F.cross_entropy(model(x), y)

    return opt, lambda: opt.step(closure)


def timed(step: Callable[[], object]) -> float:
    start = process_time()
    step()
    return process_time() - start


def ordinary(opt: GuessGradOptimizer, step: Callable[[], object], count: int) -> list[float]:
    """The times of so many steps, without the steps in which a probe or an audit may be due."""
    found: list[float] = []
    while len(found) < count:
        uses = opt.estimation.plans[0].uses if opt.estimation.plans else 0
        due = any(n & (n - 1) == 0 for n in (uses, uses + 1))
        if uses < FIRST or due:
            step()
        else:
            found.append(timed(step))
    return found


def audited(opt: GuessGradOptimizer, step: Callable[[], object]) -> list[float]:
    """The times of the steps in which an audit is due. Later steps in between are skipped."""
    found: list[float] = []
    for number in range(1, AUDITED[-1] + 1):
        if number > FIRST:
            if number & (number - 1):
                continue
            opt.estimation.plans[0].uses = number - 1
        seconds = timed(step)
        if number in AUDITED:
            found.append(seconds)
    return found


def serve(lines: IO[str], answers: IO[str]) -> None:
    """Answer each line of the input."""
    warnings.simplefilter("ignore")
    made: dict[tuple[Any, ...], tuple[GuessGradOptimizer, Callable[[], object]]] = {}
    for line in lines:
        what, network, options, audit, count = json.loads(line)
        if what == "audited":
            found = audited(*build(network, options, audit))
        else:
            key = network, options, audit
            if key not in made:
                made.clear()
                made[key] = build(*key)
            found = ordinary(*made[key], count)
        print(json.dumps(found), file=answers, flush=True)


class Side:
    """A process with one version of the package."""

    def __init__(self, root: Path) -> None:
        root = root.resolve()
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env=environment,
        )  # fmt: skip

    def ask(self, *what: Any) -> list[float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"no times for {what}: the process has ended (its error stands above)")
        found: list[float] = json.loads(answer)
        return found

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass(frozen=True)
class Times:
    """Times of one case.

    Attributes:
        now: milliseconds of the quickest step; ``before``: of the other version's; ``over``: their ratio.
        audits: share of the audits in the time of a thousand steps.
    """

    now: float
    before: float | None
    over: float | None
    audits: float | None


def measured(
    network: str, options: str, now: Side, before: Side | None, blocks: int, count: int, audits: bool = True
) -> Times:
    """Blocks of ``count`` steps of both versions, in turn."""
    times: dict[Side, list[float]] = {side: [] for side in (now, before) if side is not None}
    for _ in range(blocks):
        for side, found in times.items():
            found.append(min(side.ask("ordinary", network, options, False, count)))
    least = {side: min(found) for side, found in times.items()}
    over = None if before is None else least[now] / least[before]
    share = None
    if audits:
        now.ask("audited", network, options, True, 1)  # the first audit of a process takes longer
        runs = [
            [min(each) for each in zip(*(now.ask("audited", network, options, a, 1) for _ in range(2)), strict=True)]
            for a in (True, False)
        ]
        share = (sum(runs[0]) - sum(runs[1])) / (sum(runs[1]) + (STEPS - len(AUDITED)) * least[now])
    return Times(1e3 * least[now], None if before is None else 1e3 * least[before], over, share)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(sys.stdin, sys.stdout)
