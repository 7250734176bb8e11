"""The memory and scaling experiments, their baselines, and training under a limit."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from benchmarks import memory
from benchmarks.baselines import MeZO
from benchmarks.measure import peaks
from benchmarks.memory_cases import METHODS, Settings
from benchmarks.memory_measures import LIMITED_STEPS, limited
from benchmarks.problems import relu_mlp
from benchmarks.training import Backprop

from .test_benchmarks import result


def test_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LIMITED", ("w_perp_stream",))  # each takes a process of a process
    figures = result("memory", tmp_path, "--problems", "mlp12", "mlp24")["figures"]
    for name in ("mlp12", "mlp24"):
        for method in METHODS:
            found = figures[f"{name} {method}"]["peaks"]
            assert found["peak"] >= found["kept"] >= found["state"] + found["gradients"]
            assert figures[f"{name} {method}"]["seconds"] > 0
        state = figures[f"{name} backprop"]["peaks"]["state"]
        assert state >= 2 * figures[f"{name} backprop"]["parameters"]
        peak = {method: figures[f"{name} {method}"]["peaks"]["peak"] for method in METHODS}
        assert peak["w_perp_replay"] < peak["w_perp_store"] and peak["mezo"] < peak["w_perp_stream"]
    alive = figures["between"]
    assert alive["live"] == alive["loss"] + alive["derivatives"] + alive["random"]  # nothing else
    shown = capsys.readouterr().out
    assert "Alive between replay's passes" in shown and "largest / smallest" in shown
    main_again = result("memory", tmp_path, "--problems", "mlp12", "mlp24")["figures"]
    assert main_again == figures  # taken from the file
    assert "finished measurements" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="limits on the address space are set and read as Linux has them")
def test_stream_trains_where_backprop_has_no_room() -> None:
    settings = Settings(True, "cpu", 1, 1, 1, 1, width=128, depth=40, batch=1024, budget=10 * 2**20)
    died = limited("backprop", settings)
    assert died.steps == 0 and "can't allocate" in died.error
    lived = limited("w_perp_stream", settings)
    assert lived.steps == LIMITED_STEPS and lived.error == ""
    assert len(set(lived.losses)) > 1  # the parameters moved


def test_baselines_update_as_backprop_does() -> None:
    x, y = torch.randn(16, 12), torch.randint(4, (16,))
    found = []
    for name in ("backprop", "checkpointed", "in_backward"):
        torch.manual_seed(0)
        model = relu_mlp(8, 3, inputs=12, classes=4)
        own = METHODS[name].learner(model, 1e-2)
        for _ in range(3):
            own.step(x, y)
        found.append([p.detach() for p in model.parameters()])
    assert all(p.grad is None for p in model.parameters())  # the optimizer in the backward frees each
    for one, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(one, other)


def test_mezo_follows_its_formula() -> None:
    """``p -= lr (L(p + eps z) - L(p - eps z)) / (2 eps) z``, with the same dropout mask in both passes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    x, y = torch.randn(8, 5).double(), torch.randint(2, (8,))
    optimizer = MeZO(model.parameters(), lr=0.1, eps=1e-4)
    before = [p.detach().clone() for p in model.parameters()]

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(model(x), y)

    torch.manual_seed(3)
    optimizer.step(loss)
    torch.manual_seed(3)
    zs = [z for *_, z in optimizer.directions(int(torch.randint(2**62, ())))]
    state = torch.get_rng_state()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, b, z in zip(model.parameters(), before, zs, strict=True):
                p.copy_(b + sign * 1e-4 * z)
        torch.set_rng_state(state)
        losses.append(loss().item())
    slope = (losses[0] - losses[1]) / 2e-4
    torch.manual_seed(3)
    with torch.no_grad():
        for p, b in zip(model.parameters(), before, strict=True):
            p.copy_(b)
    optimizer.step(loss)
    for p, b, z in zip(model.parameters(), before, zs, strict=True):
        torch.testing.assert_close(p, b - 0.1 * slope * z, rtol=1e-9, atol=1e-12)


def test_mezo_cosine_and_training() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    y = (x[:, 0] > 0).long()
    own = METHODS["mezo"].learner(nn.Sequential(nn.Linear(4, 2)), lr=0.05)
    before = [p.detach().clone() for p in own.model.parameters()]
    assert own.cosine(x, y) > 0  # a slope times its direction never points uphill
    for p, b in zip(own.model.parameters(), before, strict=True):
        torch.testing.assert_close(p, b, rtol=0, atol=1e-6)
    first = own.loss(x, y).item()
    for _ in range(100):
        own.step(x, y)
    assert own.loss(x, y).item() < 0.7 * first


def test_peaks_count_what_a_method_keeps() -> None:
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 10, bias=False))
    x, y = torch.randn(32, 100), torch.randint(10, (32,))
    made = []

    class Hoarder(Backprop):
        def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
            super().step(x, y)
            made.append(torch.zeros(1000))

    models = [copy.deepcopy(model), model]
    plain, hoarding = (
        peaks(lambda m=m, own=own: m(own, torch.optim.AdamW(own.parameters(), lr=0.0)), x, y, 3, lambda _: 0)
        for m, own in zip((Backprop, Hoarder), models, strict=True)
    )
    assert plain.gradients == sum(p.nbytes for p in model.parameters())
    assert hoarding.kept - plain.kept == 3 * 4000
    assert hoarding.peak > plain.peak


@pytest.mark.slow
def test_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--axes", "depth", "parameters", "--methods", "backprop", "w_perp_replay")
    figures = result("scaling", tmp_path, *options)["figures"]
    assert len(figures) == 8 and all(cell["time"]["ratio"] > 0 for cell in figures.values())
    for axis, (small, large) in {"depth": (2, 8), "parameters": (2, 4)}.items():
        for method in ("backprop", "w_perp_replay"):
            assert (
                figures[f"{axis} {large} {method}"]["peaks"]["peak"]
                > figures[f"{axis} {small} {method}"]["peaks"]["peak"]
            )
    assert "peak in MB above parameters and state" in " ".join(capsys.readouterr().out.split())
