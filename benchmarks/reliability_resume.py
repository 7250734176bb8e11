"""Training that stops, is saved, and goes on in another process must equal training that never stopped, bit for bit."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import guessopt
from benchmarks.isolated import fresh
from guessopt import GuessGradOptimizer, GuessWarning
from guessopt.estimators import estimator_names, make_estimator
from guessopt.step.mode import MODES
from guessopt.tree import tensors_in

#: Steps before saving, and after.
BEFORE, AFTER = 3, 3
GUESSES = (1, 3)
#: Ways to load a state; they differ in when the global random states are restored.
WAYS = ("optimizer, then random states", "random states, then optimizer", "guessopt.load")


class Residual(nn.Module):
    """A residual stream of blocks with a norm, along which learned feedback works."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        out: Tensor = self.head(h)
        return out


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )  # fmt: skip


def frozen_middle() -> nn.Module:
    model = mlp()
    model[3].requires_grad_(False)  # type: ignore[index]
    return model


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 3),
        nn.ReLU(), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp, "frozen middle layer": frozen_middle, "cnn": cnn, "residual": Residual
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One run: its network, estimator, memory mode, guesses, and further options of the optimizer."""

    estimator: dict[str, Any]
    memory: Any = "store"
    guesses: int = 1
    network: str = "mlp"
    base: str = "AdamW"
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        about = ", ".join(f"{k}={v}" for k, v in {**self.estimator, **self.options}.items() if k != "name")
        return (
            f"{self.estimator['name']}{f' ({about})' if about else ''}, {self.memory}, {self.guesses} guesses, "
            f"{self.network}, {self.base}"
        )

    def start(self) -> tuple[nn.Module, GuessGradOptimizer, Callable[[], Tensor]]:
        """Model, optimizer and closure."""
        torch.manual_seed(3)
        x, y = torch.randn(6, 5), torch.arange(6) % 3
        model = NETWORKS[self.network]()
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        opt = GuessGradOptimizer(
            trained, getattr(torch.optim, self.base), self.estimator, memory=self.memory, guesses=self.guesses,
            **{"lr": 0.01, **self.options},
        )  # fmt: skip
        return model, opt, lambda: F.cross_entropy(model(x), y)


def small(name: str, **options: Any) -> dict[str, Any]:
    """An estimator that prepares again after a few steps, so that the age of the prepared state matters."""
    known = {f.name for f in fields(make_estimator(name))}  # type: ignore[arg-type]
    return {"name": name, **{k: v for k, v in {"refresh": 4, "k": 2}.items() if k in known}, **options}


#: Every registered estimator with its defaults; and options with which an estimator keeps other states.
ESTIMATORS = [small(name) for name in estimator_names()]
VARIANTS = [
    small("w_perp", basis="example"),
    small("w_perp", debias=True),
    small("w_perp_ns", basis="example"),
    small("learned_feedback", gamma=1),
    small("learned_feedback", gamma=0),
    small("learned_feedback", every=2, start="random"),
]


def cases() -> list[Case]:
    """The whole matrix."""
    every = [*ESTIMATORS, *VARIANTS]
    found = [Case(e, memory, guesses) for e in every for memory in MODES for guesses in GUESSES]
    found += [
        Case(e, memory, network=network)
        for e in every
        for memory in MODES
        for network in NETWORKS
        if network != "mlp"
    ]  # fmt: skip
    found += [Case(e, guesses=3, options={"orthogonal": True}) for e in ESTIMATORS]
    found += [Case(e, guesses=3, options={"seed": 5, "stack_guesses": False}) for e in ESTIMATORS]
    found += [Case(small("w_perp"), base=base) for base in ("SGD", "Adafactor", "ASGD", "NAdam", "RMSprop", "Rprop")]
    return found


def is_refused(case: Case) -> bool:
    """Whether the optimizer refuses this combination of options with a ``ValueError``."""
    try:
        _, opt, closure = case.start()
        opt.step(closure)
    except ValueError:
        return True
    return False


def trained(model: nn.Module, opt: GuessGradOptimizer, closure: Callable[[], Tensor]) -> tuple[list[float], str]:
    """The losses of the steps after saving, and a digest of model and optimizer."""
    losses = [float(opt.step(closure)) for _ in range(AFTER)]
    digest = hashlib.sha256()
    state = opt.state_dict()
    for part in (model.state_dict(), state["state"], state["guessopt"]["cache"], state["guessopt"]["noise"]):
        for tensor in tensors_in(part):
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return losses, digest.hexdigest()


def stopped(case: Case, folder: Path) -> tuple[list[float], str]:
    """Train, save into the folder, and train on."""
    model, opt, closure = case.start()
    for _ in range(BEFORE):
        opt.step(closure)
    torch.save(
        {"model": model.state_dict(), "optimizer": opt.state_dict(), "random": torch.get_rng_state()}, folder / "pt"
    )
    guessopt.save(folder / "safetensors", opt, model)
    return trained(model, opt, closure)


def resumed(case: Case, folder: Path, way: str) -> tuple[list[float], str]:
    """Continue training from the files of ``stopped``."""
    model, opt, closure = case.start()
    torch.manual_seed(torch.initial_seed() + 1)  # a new process has another seed
    if way == "guessopt.load":
        guessopt.load(folder / "safetensors", opt, model)
    else:
        saved = torch.load(folder / "pt", weights_only=True)
        if way.startswith("random"):
            torch.set_rng_state(saved["random"])
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        if way.startswith("optimizer"):
            torch.set_rng_state(saved["random"])
    return trained(model, opt, closure)


def _resumed_all(chosen: list[Case], folder: Path) -> list[dict[str, Any]]:
    warnings.simplefilter("ignore", GuessWarning)
    return [{way: _attempt(case, folder / str(k), way) for way in WAYS} for k, case in enumerate(chosen)]


def _attempt(case: Case, folder: Path, way: str) -> Any:
    try:
        return resumed(case, folder, way)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def resume_mismatches(chosen: Iterable[Case] | None = None) -> list[str]:
    """The runs that continue differently in a new process than without a stop. There should be none.

    Args:
        chosen: None: the whole matrix, about a minute.
    """
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as place:
        warnings.simplefilter("ignore", GuessWarning)
        run = [case for case in (cases() if chosen is None else chosen) if not is_refused(case)]
        expected = []
        for k, case in enumerate(run):
            (Path(place) / str(k)).mkdir()
            expected.append(stopped(case, Path(place) / str(k)))
        found = fresh(_resumed_all, run, Path(place))
    return [
        f"{case}, by {way}: {result if isinstance(result, str) else 'differs'}"
        for case, one, results in zip(run, expected, found, strict=True)
        for way, result in results.items()
        if result != one
    ]
