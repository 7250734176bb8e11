"""The quick versions of the experiments, end to end on made-up data: files have the declared keys and finite
numbers."""

import io
import json
import math
import warnings
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from benchmarks import step_times
from benchmarks.__main__ import experiments, main
from benchmarks.coverage import complain
from benchmarks.measure import Stopwatch
from benchmarks.methods import METHODS
from benchmarks.problems import causal_lm, cnn, layers, relu_mlp, vit
from benchmarks.report import print_table
from benchmarks.speed_phases import PHASES
from benchmarks.speed_steps import PROBLEMS
from benchmarks.training import Learner, fit
from guessopt import ClosureError

CURVE = {"epochs", "train", "test"}


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """A small stand-in for MNIST-1D: ten prototypes and noise."""
    rng = np.random.default_rng(0)
    y, y_test = np.arange(600) % 10, np.arange(100) % 10
    prototypes = rng.normal(size=(10, 40))
    x, x_test = (prototypes[labels] + 0.3 * rng.normal(size=(len(labels), 40)) for labels in (y, y_test))
    folder = tmp_path / "data"
    folder.mkdir()
    np.savez(folder / "mnist1d.npz", x=x, y=y, x_test=x_test, y_test=y_test)
    return folder


def result(name: str, out: Path, *options: str) -> dict[str, Any]:
    main([name, "--quick", "--out", str(out), *options])
    content: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    assert set(content) == {"command", "seeds", "settings", "environment", "figures"}
    assert content["command"].startswith(f"python -m benchmarks {name} --quick")
    assert str(out) not in json.dumps(content)
    assert content["environment"]["torch"] == torch.__version__
    assert all(math.isfinite(number) for number in numbers(content))
    assert (out / f"{name}.png").stat().st_size > 0
    return content


def numbers(node: Any) -> Iterator[float]:
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from numbers(item)
    elif isinstance(node, (int, float)):
        yield float(node)


def test_demo(data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = result("demo", tmp_path, "--data-root", str(data_root))
    assert set(content["figures"]) == {"backprop", "w_perp", "w_transpose", "activation_perturbation"}
    for column in content["figures"].values():
        assert set(column) == {"histories", "time", "peak_bytes"}
        assert set(column["time"]) == {"ratio", "low", "high"}
        assert set(column["histories"][0]) == CURVE | {"cosine", "cosine_epochs"}
        assert column["peak_bytes"] > 0
    assert content["figures"]["backprop"]["histories"][0]["cosine"][-1] == 1
    assert "activation perturbation" in capsys.readouterr().out


def test_mnist1d(data_root: Path, tmp_path: Path) -> None:
    content = result("mnist1d", tmp_path, "--data-root", str(data_root), "--methods", "backprop", "w_perp")
    assert [(cell["width"], cell["method"], cell["seed"]) for cell in content["figures"]] == [
        (128, "backprop", 0),
        (128, "w_perp", 0),
    ]
    assert all(set(cell["history"]) >= CURVE for cell in content["figures"])


def check_speed(content: dict[str, Any], problems: list[str]) -> None:
    assert list(content["figures"]) == problems
    for row in content["figures"].values():
        assert set(row["over_backprop"]) == set(row["over_checkpointed"]) == set(row["seconds"])
        assert {"backprop", "checkpointed", "w_perp, dual", "w_transpose, dual"} <= set(row["seconds"])
        assert row["over_backprop"]["backprop"]["ratio"] == 1
        assert all(value["ratio"] > 0 for value in row["over_checkpointed"].values())
        shares = row["long_run"]["breakdown"]
        assert tuple(shares) == PHASES
        assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
        # The instrumentation still finds the package's inside: what every W-perp step must do took time.
        for phase in PHASES:
            if phase not in ("interception", "tangents", "probe"):  # differences, and a rare event
                assert shares[phase] > 0, phase


def test_speed(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    content = result("speed", tmp_path, "--problems", "mlp12x32", "--reference")
    check_speed(content, ["mlp12x32"])
    assert "w_perp, func" in content["figures"]["mlp12x32"]["seconds"]
    assert content["environment"]["threads"] == 1
    assert torch.get_num_threads() == before


def test_times_of_single_steps() -> None:
    asked = [["ordinary", "LSTM", "w_perp", False, 2], ["audited", "LSTM", "w_perp", True, 1]]
    answers = io.StringIO()
    with warnings.catch_warnings():
        step_times.serve(io.StringIO("\n".join(map(json.dumps, asked))), answers)
    plain, audits = map(json.loads, answers.getvalue().splitlines())
    assert len(plain) == 2 and len(audits) == len(step_times.AUDITED)
    assert min(audits) > min(plain) > 0  # an audit runs the closure more often


@pytest.mark.slow
def test_the_cost_of_guesses(tmp_path: Path) -> None:
    main(["speed", "--quick", "--guesses", "4", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "guesses.json").read_text())
    assert content["settings"] == {"guesses": 4}
    for costs in content["figures"].values():
        assert all(0 < cost["over_in_turn"] < 1.2 for cost in costs.values())


@pytest.mark.slow
def test_speed_on_every_problem(tmp_path: Path) -> None:
    check_speed(result("speed", tmp_path), list(PROBLEMS))


def test_every_experiment_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"demo", "mnist1d", "speed"} <= set(experiments())
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "where a W-perp step's time goes" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", [name for name in METHODS if name != "head"])
def test_every_method_of_the_table_trains(name: str) -> None:
    torch.manual_seed(0)
    model, x, y = relu_mlp(32, 2, inputs=32, classes=3), torch.randn(16, 32), torch.arange(16) % 3
    before = [p.detach().clone() for p in model.parameters()]
    learner = METHODS[name].learner(model)
    for _ in range(2):
        learner.step(x, y)
    assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_the_head_alone_trains_nothing_else() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
    before = [p.detach().clone() for p in model.parameters()]
    METHODS["head"].learner(model, head="1").step(torch.randn(6, 4), torch.arange(6) % 3)
    assert [torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)] == [True, True, False, False]


class Recorder(Learner):
    """Notes the rate of every step; the loss is no longer finite from one step on."""

    def __init__(self, last: int) -> None:
        super().__init__(torch.nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)], lr=1.0))
        self.last, self.rates = last, list[float]()

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        if len(self.rates) == self.last:
            raise ClosureError("the loss is not finite (nan)")
        self.rates.append(self.optimizer.param_groups[0]["lr"])

    def cosine(self, x: torch.Tensor, y: torch.Tensor) -> float:
        raise NotImplementedError


def test_the_loop_looks_sets_rates_and_stops_at_a_loss_that_is_not_finite() -> None:
    batch, looks = (torch.zeros(1), torch.zeros(1)), list[int]()
    learner = Recorder(last=4)
    outcome = fit(learner, repeat(batch), 6, looks=(0, 2, 4, 6), look=looks.append, rate=lambda step: 0.5**step)
    assert (outcome.steps, outcome.failed, looks) == (4, True, [0, 2, 4])
    assert learner.rates == [0.5, 0.25, 0.125, 0.0625]
    assert fit(Recorder(last=9), repeat(batch), 6).steps == 6
    with pytest.raises(ClosureError, match="elsewhere"):
        fit(Failing(), repeat(batch), 1)


class Failing(Recorder):
    def __init__(self) -> None:
        super().__init__(0)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        raise ClosureError("elsewhere")


def test_problems_have_the_declared_sizes() -> None:
    assert [m.weight.shape[0] for m in relu_mlp(1024, 6, inputs=1024) if isinstance(m, torch.nn.Linear)] == [
        *[1024] * 6,
        10,
    ]
    assert len(layers(relu_mlp(8, 6))) == 7
    assert sum(isinstance(m, torch.nn.Conv2d) for m in cnn()) == 4
    x = torch.randn(2, 3, 32, 32)
    assert cnn()(x).shape == vit()(x).shape == (2, 10)
    assert vit()[0](x).shape == (2, 65, 192)
    assert len(layers(vit())) == 9
    lm, ids = causal_lm(), torch.randint(65, (2, 64))
    logits = lm(ids)
    assert logits.shape == (2, 65, 64)
    ids[:, 40:] = 0
    torch.testing.assert_close(lm(ids)[:, :, :40], logits[:, :, :40])  # no token looks ahead


def test_stopwatch_gives_each_phase_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 5.0, 7.0, 7.0, 8.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    watch = Stopwatch("cpu", whole=("all",))
    with watch.phase("outer"), watch.phase("inner"):
        pass
    with watch.phase("all"), watch.phase("inner"):
        pass
    assert watch.lap() == {"outer": 3.0, "inner": 4.0, "all": 1.0}
    assert watch.lap() == {}


def test_coverage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["coverage", "--quick", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "coverage.json").read_text())
    figures = content["figures"]
    assert set(figures) == {"matrix", "precision", "sized", "mezo"} and figures["mezo"] and figures["precision"]
    assert {"torch/LSTM", "torch/TransformerEncoder"} <= set(figures["matrix"])
    assert all(row["missed"] == [] and row["time"]["ratio"] > 0 for row in figures["matrix"].values())
    assert all(math.isfinite(number) for number in numbers(content))
    assert "coupled" in capsys.readouterr().out

    figures["matrix"]["torch/LSTM"]["unlisted"] = ["head.weight"]
    figures["precision"]["torch/LSTM"]["bfloat16"] = 0.5
    assert [what.partition(":")[0] for what in complain(figures)] == ["torch/LSTM", "torch/LSTM"]


def test_a_narrow_screen_cuts_no_figure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    print_table("Title", ["method", "figure"], [["m" * 30, "1" * 30]])
    shown = capsys.readouterr().out
    assert "m" * 30 in shown and "1" * 30 in shown
