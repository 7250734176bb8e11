"""Diagnostics while training: every n steps, to any callable."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from guessopt.diagnostics.gradients import cosine, cosine_by_guesses
from guessopt.diagnostics.moments import bias, covariance_norm, variance
from guessopt.diagnostics.reverse import Closure
from guessopt.diagnostics.spectra import activation_overlap, effective_rank, jacobian_spectra, overlap
from guessopt.diagnostics.steps import effectiveness
from guessopt.optimizer import GuessGradOptimizer

Metric = Callable[[GuessGradOptimizer, Closure], Any]
Log = Callable[[int, dict[str, float]], Any]

METRICS: dict[str, Metric] = {
    "cosine": cosine,
    "cosine_by_guesses": cosine_by_guesses,
    "effectiveness": effectiveness,
    "bias": bias,
    "variance": variance,
    "covariance_norm": covariance_norm,
    "overlap": overlap,
    "effective_rank": effective_rank,
    "jacobian_spectra": jacobian_spectra,
    "activation_overlap": activation_overlap,
}
"""The diagnostics that a monitor knows by name."""


class Monitor:
    """Measures every ``every`` steps, before the update, and passes the figures to ``log``.

    Either call ``monitor.step(closure)`` instead of ``opt.step(closure)``; or call ``monitor.attach()``, and every
    ``opt.step(closure)`` measures, until you remove the returned handle.

    Args:
        opt: the optimizer.
        every: steps between measurements; the first step is measured.
        metrics: names from ``METRICS``, or functions ``(opt, closure)`` that return a number, a mapping or one of this
            package's results.
        log: called with the number of earlier steps, and the figures by name: ``CSVWriter``, ``TensorBoardWriter``, or
            any callable. Measurements change nothing but the stream of guesses.

    >>> import torch, guessopt
    >>> net = torch.nn.Linear(2, 1)
    >>> opt = guessopt.GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, lr=0.1, exact_last=True)
    >>> seen = []
    >>> monitor = Monitor(opt, every=2, metrics=["cosine"], log=lambda step, row: seen.append((step, sorted(row))))
    >>> for _ in range(3):
    ...     loss = monitor.step(lambda: net(torch.ones(3, 2)).square().mean())
    >>> seen[1]
    (2, ['cosine/per_parameter/bias', 'cosine/per_parameter/weight', 'cosine/per_site/weight', 'cosine/total'])
    """

    def __init__(
        self,
        opt: GuessGradOptimizer,
        every: int = 100,
        metrics: Sequence[str | Metric] = ("cosine",),
        log: Log | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every: steps between measurements must be at least 1, got {every}")
        self.opt, self.every, self.log = opt, every, log
        self.steps = 0
        self.metrics: dict[str, Metric] = {}
        for metric in metrics:
            if isinstance(metric, str):
                if metric not in METRICS:
                    raise ValueError(f"metrics: {metric!r} is not one of {', '.join(METRICS)}")
                self.metrics[metric] = METRICS[metric]
            else:
                self.metrics[getattr(metric, "__name__", type(metric).__name__)] = metric
        self.last: dict[str, float] = {}
        self._attached = False

    def step(self, closure: Closure) -> Any:
        """Measure if a measurement is due, then call ``opt.step(closure)``."""
        if not self._attached:
            self._before(closure)
        return self.opt.step(closure)

    def attach(self) -> Any:
        """Measure in later calls of ``opt.step(closure)``, until ``remove()`` of the returned handle. Steps without a
        closure count as steps, but are not measured."""
        self._attached = True
        handle = self.opt.register_step_pre_hook(self._hook)
        remove = handle.remove

        def detach() -> None:
            self._attached = False
            remove()

        handle.remove = detach  # type: ignore[method-assign]
        return handle

    def measure(self, closure: Closure) -> dict[str, float]:
        """Measure all metrics now. Returns flat figures by name."""
        self.last = {}
        for name, metric in self.metrics.items():
            self.last.update(figures(metric(self.opt, closure), name))
        return self.last

    def _hook(self, opt: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = args[1:] if args and args[0] is opt else args
        self._before(kwargs.get("closure", rest[0] if rest else None))

    def _before(self, closure: Closure | None) -> None:
        if closure is not None and self.steps % self.every == 0:
            found = self.measure(closure)
            if self.log is not None:
                self.log(self.steps, found)
        self.steps += 1


def figures(result: Any, name: str) -> dict[str, float]:
    """A result as flat figures, named ``name/field/key``. In a sequence, the key is the index.

    >>> figures({"a": 1.0, "b": (2.0, 3.0)}, "x")
    {'x/a': 1.0, 'x/b/0': 2.0, 'x/b/1': 3.0}
    """
    if is_dataclass(result):
        result = {field.name: getattr(result, field.name) for field in fields(result)}
    if isinstance(result, Mapping):
        items = [(str(key), value) for key, value in result.items()]
    elif isinstance(result, (list, tuple)):
        items = [(str(index), value) for index, value in enumerate(result)]
    else:
        return {name: float(result)}
    found: dict[str, float] = {}
    for key, value in items:
        found.update(figures(value, f"{name}/{key}"))
    return found


class CSVWriter:
    """Writes rows of a CSV file: the step, then a column per figure. A new figure gets a new column. An existing file
    is continued.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "log.csv"
    >>> write = CSVWriter(path)
    >>> write(0, {"cosine": 0.5})
    >>> write(10, {"cosine": 0.25, "bias": 1.0})
    >>> print(path.read_text().strip())
    step,cosine,bias
    0,0.5,
    10,0.25,1.0
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.columns: list[str] = []
        if self.path.is_file():
            with self.path.open(newline="") as file:
                self.columns = next(csv.reader(file), [])

    def __call__(self, step: int, row: dict[str, float]) -> None:
        new = [name for name in ("step", *row) if name not in self.columns]
        if new:
            self._widen(new)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow({"step": step, **row})

    def _widen(self, new: list[str]) -> None:
        kept: list[dict[str, str]] = []
        if self.columns:
            with self.path.open(newline="") as file:
                kept = list(csv.DictReader(file))
        self.columns += new
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)


class TensorBoardWriter:
    """Scalars for TensorBoard, by ``torch.utils.tensorboard`` (the package ``tensorboard`` must be installed).

    Args:
        writer: a ``SummaryWriter``, or the folder for a new one.
        prefix: the start of every tag.
    """

    def __init__(self, writer: Any, prefix: str = "guessopt/") -> None:
        if isinstance(writer, (str, Path)):
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(writer))
        self.writer, self.prefix = writer, prefix

    def __call__(self, step: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            self.writer.add_scalar(self.prefix + name, value, step)
