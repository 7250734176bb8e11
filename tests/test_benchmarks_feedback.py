"""The learned-feedback benchmark in its quick version, and how it resumes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from benchmarks import feedback, feedback_bench, feedback_runs, feedback_tables
from benchmarks.__main__ import main
from benchmarks.data import Dataset, mnist1d
from benchmarks.problems import relu_mlp

from .test_benchmarks import data_root, result

__all__ = ["data_root"]  # the fixture


def cells(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "feedback.json").read_text())["figures"]
    return found


def small_problem(steps: int) -> feedback_runs.Problem:
    return feedback_runs.Problem("small", lambda: relu_mlp(8, 2), mnist1d_of, steps, 32, "train", 1.0)


def mnist1d_of(root: Path | None, quick: bool) -> Dataset:
    return mnist1d(root)


def test_quick(data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result("feedback", tmp_path, "--data-root", str(data_root), "--problems", "mnist1d_64")["figures"]
    assert {cell["method"] for cell in found} == set(feedback_runs.DEFAULT)
    by_method = {cell["method"]: cell for cell in found}
    look = by_method["learned_feedback"]["looks"][-1]
    assert set(look["sites"]) == {"0.weight", "2.weight", "4.weight", "6.weight"}
    assert look["sites"]["4.weight"] == pytest.approx(1, abs=1e-5)  # passes the head, whose error is exact
    assert by_method["fixed_feedback"]["looks"][-1]["cosine"] > by_method["random_feedback"]["looks"][-1]["cosine"]
    assert by_method["backprop"]["looks"][-1]["cosine"] is None
    shown = capsys.readouterr().out
    assert all(label in shown for name, label in feedback_runs.LABELS.items() if name in feedback_runs.DEFAULT)


def test_resumes_cell_by_cell(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark stops in its fourth run and has saved three. Seed 1 then uses the rate that was best on seed 0."""
    small = small_problem(steps=4)
    monkeypatch.setitem(feedback_runs.PROBLEMS, "mnist1d_64", small)
    monkeypatch.setattr(feedback, "LRS", (1e-3, 1e-2))
    options = ["--data-root", str(data_root), "--out", str(tmp_path), "--problems", "mnist1d_64", "--seeds", "2"]
    options += ["--methods", "backprop", "learned_feedback"]
    trained, train = list[Any](), feedback_bench.Bench.train

    def counting(self: Any, key: Any) -> Any:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(key)
        return train(self, key)

    monkeypatch.setattr(feedback_bench.Bench, "train", counting)
    with pytest.raises(KeyboardInterrupt):
        main(["feedback", *options])
    before = cells(tmp_path)
    assert len(before) == 3
    trained.clear()
    main(["feedback", *options])
    assert len(trained) == 3 and len(cells(tmp_path)) == 6
    assert all(cell in cells(tmp_path) for cell in before)
    by_key = {(cell["method"], cell["lr"]): cell["looks"][-1]["train"] for cell in cells(tmp_path) if cell["seed"] == 0}
    for method in ("backprop", "learned_feedback"):
        (chosen,) = [cell["lr"] for cell in cells(tmp_path) if (cell["method"], cell["seed"]) == (method, 1)]
        assert by_key[method, chosen] == max(by_key[method, lr] for lr in (1e-3, 1e-2))
    trained.clear()
    main(["feedback", *options])
    assert not trained


def test_a_run_that_diverges_is_kept_as_such(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = small_problem(steps=30)
    monkeypatch.setitem(feedback_runs.PROBLEMS, "mnist1d_64", small)
    monkeypatch.setattr(feedback, "LRS", (1e-3, 1e30))
    options = ["--data-root", str(data_root), "--out", str(tmp_path), "--problems", "mnist1d_64", "--seeds", "1"]
    main(["feedback", *options, "--methods", "backprop", "learned_feedback"])
    assert {(cell["lr"], cell["failed"]) for cell in cells(tmp_path)} == {(1e-3, False), (1e30, True)}


def test_estimates_without_running(data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data-root", str(data_root), "--out", str(tmp_path), "--problems", "mnist1d_64"]
    main(["feedback", "--estimate", "--methods", "backprop", *options])
    assert "h in all" in capsys.readouterr().out and not (tmp_path / "feedback.json").exists()


def test_time_to_a_figure_and_tables_from_a_file(data_root: Path, tmp_path: Path) -> None:
    looks = [feedback_runs.Look(step, train, 0.5, 1.0) for step, train in ((10, 0.2), (20, 0.6), (40, 0.7))]
    cell = feedback_runs.Cell("mnist1d_64", "backprop", 1e-3, 0, {"steps": 40}, looks, seconds=8.0)
    assert cell.reaches("train", 0.4) == pytest.approx(15)  # half way from step 10 to step 20
    assert cell.reaches("train", 0.1) == pytest.approx(10)
    assert cell.reaches("train", 0.8) is None
    slow = replace(cell, method="w_perp", looks=[feedback_runs.Look(40, 0.7, 0.5, 1.0)])
    runs = feedback_runs.Runs((1e-3,), {}, {}, {"mnist1d_64": {"w_perp": 2.5}})
    steps = cell.reaches("train", 0.95 * 0.7)
    assert steps is not None and 20 < steps < 40
    assert feedback_tables.slowness(runs, "mnist1d_64", [slow], [cell]) == pytest.approx(2.5 * 40 / steps)

    text = "".join(chr(33 + k * k % 65) for k in range(20_000))
    (data_root / "tinyshakespeare.txt").write_text(text)
    options = ["--quick", "--data-root", str(data_root), "--out", str(tmp_path)]
    main(["feedback", *options, "--problems", "charlm", "--methods", "backprop", "learned_feedback"])
    (table,) = feedback.tables_of(json.loads((tmp_path / "feedback.json").read_text()))
    assert [row[0] for row in table.rows] == ["backprop", "learned feedback"] and table.rows[0][5] == "1.000"
