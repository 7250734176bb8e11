"""The reliability experiment: its tasks, its report, and that it resumes."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("tqdm")

from benchmarks import reliability_resume, reliability_tasks
from benchmarks.__main__ import main
from benchmarks.reliability import figures_of, results_of, shorten
from benchmarks.reliability_page import page, snippet, summary
from benchmarks.reliability_tasks import soak
from guessopt import GuessGradOptimizer
from guessopt.step import modes

pytestmark = pytest.mark.filterwarnings("ignore")


def wrong_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every estimate is 1% too long."""
    right = modes.estimate

    def estimate(*args: Any) -> Any:
        loss, gradients = right(*args)
        return loss, {k: g * 1.01 for k, g in gradients.items()}

    monkeypatch.setattr(modes, "estimate", estimate)


def test_a_wrong_answer_becomes_a_short_snippet_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_networks(monkeypatch)
    found = reliability_tasks.networks(0, 2)
    assert found["cases"] == 2 and found["counts"]["wrong"] >= 2
    kind = next(kind for kind in found["kinds"].values() if (kind["oracle"], kind["kind"]) == ("exact", "wrong"))
    short = shorten(kind)
    assert len(short["network"]) <= len(kind["network"])
    said: list[Any] = []
    exec(snippet(short), {"print": said.append})
    assert said[0][0].kind == "wrong"


def test_faults_and_interrupts_are_counted() -> None:
    assert reliability_tasks.faults("store", "operation", "closure", 2)["tried"] >= 12
    found = reliability_tasks.interrupts("stream", 1)
    assert found["tried"] == 3 and set(found) == {"tried", "lost", "examples"}


def test_growth_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    step = GuessGradOptimizer.step

    def leaking(self: Any, closure: Any = None) -> Any:
        kept.append((torch.zeros(3), bytes(10_000)))
        return step(self, closure)

    calm = soak(200)
    monkeypatch.setattr(GuessGradOptimizer, "step", leaking)
    found = soak(200)
    assert found["tensors"] >= calm["tensors"] + 160
    assert found["python_bytes"] > calm["python_bytes"] + 9_000 * found["python_steps"]


def test_shapes_and_audit_say_what_they_ran() -> None:
    assert reliability_tasks.shapes(12)["shapes"] == 12
    assert reliability_tasks.audit(3)["ratio"] > 0


def test_resume_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reliability_resume, "resume_mismatches", lambda: ["w_perp, store"])
    assert reliability_tasks.resume() == {"mismatches": 1, "examples": ["w_perp, store"]}


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    tasks = {"audit 1": partial(reliability_tasks.audit, 1)}
    path.write_text(json.dumps({"audit 1": {"ratio": 1.5}}))
    assert results_of(tasks, path, 1, fresh=False) == {"audit 1": {"ratio": 1.5}}


def test_a_task_that_starts_a_process_runs_outside_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = reliability_resume.cases()[0]
    monkeypatch.setattr(reliability_resume, "cases", lambda: [case])
    tasks = {"resume": reliability_tasks.resume, "audit 1": partial(reliability_tasks.audit, 1)}
    found = results_of(tasks, tmp_path / "progress.json", 2, fresh=False)
    assert found["resume"] == {"mismatches": 0, "examples": []} and found["audit 1"]["ratio"] > 0


def test_the_page_says_what_was_found_and_what_was_not_run() -> None:
    kind = {"oracle": "exact", "kind": "wrong", "message": "off by 1e-1", "where": "", "count": 2, "seed": 1}
    networks = {"cases": 20, "counts": {"right": 100, "wrong": 2}, "kinds": {"a": {**kind, "network": "Network()"}}}
    lost = {"tried": 10, "lost": 1, "examples": ["step 1, function 3 of 9: buffer"]}
    figures = figures_of(
        {"networks 0 20": networks, "faults store, function, update, 3": lost, "audit 5": {"error": "x"}}
    )
    assert figures["errors"] == {"audit 5": "x"}
    rows = dict(summary(figures))
    assert (
        rows["wrong answers"] == "2"
        and rows["errors put in"] == "10"
        and rows["mismatches after resuming"] == "not run"
    )
    text = page({"command": "python -m benchmarks reliability", "figures": figures, "environment": {"torch": "2"}})
    assert "print(check(Network(), 'exact'))" in text and "1 of 10" in text and "not run" in text


@pytest.mark.slow
def test_the_command_end_to_end(tmp_path: Path) -> None:
    options = ["--parts", "networks", "audit", "--networks", "2", "--workers", "1"]
    main(["reliability", "--quick", "--out", str(tmp_path), *options])
    content = json.loads((tmp_path / "reliability.json").read_text())
    assert content["figures"]["networks"]["cases"] == 2 and content["figures"]["soak"] == "not run"
    assert (tmp_path / "reliability.md").read_text().startswith("# Reliability")
