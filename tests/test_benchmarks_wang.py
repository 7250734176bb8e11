"""The estimators table and the second paper's tables, in their quick versions."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from benchmarks import wang, wang_parts
from benchmarks.__main__ import main
from guessopt.estimators import estimator_names

from .test_benchmarks import data_root, result

__all__ = ["data_root"]  # the fixture


def test_estimators(data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = result("estimators", tmp_path, "--data-root", str(data_root))["figures"]["rows"]
    assert {"w_perp", "w_transpose", "directional_descent", "self_sharpening"} <= set(rows) <= set(estimator_names())
    shown = capsys.readouterr().out
    for name, row in rows.items():
        assert name in shown
        assert row["time"]["ratio"] > 0 and row["peak_bytes"] > 0 and -1 <= row["cosine"] <= 1 and row["variance"] > 0
    assert rows["activation_perturbation"]["bias"] == 0
    assert rows["w_perp"]["variance"] < rows["activation_perturbation"]["variance"]
    assert rows["directional_descent"].get("site_bias") is None


def figures(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "wang.json").read_text())["figures"]
    return found


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
def test_wang(data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = result("wang", tmp_path, "--data-root", str(data_root))["figures"]
    wanted = {method for part in wang_parts.PARTS.values() for method in part.methods} - set(wang_parts.SLOW)
    assert {cell["method"] for cell in cells} == wanted
    assert len(cells) == len(wanted)  # a run serves every table that has it
    measured = {cell["method"] for cell in cells if cell["looks"]}
    assert measured == {"w_transpose", "w_perp_bottom", "w_perp", "w_preconditioned"}
    by_method = {cell["method"]: cell for cell in cells}
    look = by_method["w_perp"]["looks"][-1]
    assert set(look["bias"]) == {"0.weight", "2.weight", "4.weight", "6.weight"}
    assert set(look["overlap"]) == {"0.weight", "2.weight", "4.weight"}
    assert look["overlap"]["4.weight"][-1] == pytest.approx(1, abs=1e-3)
    # The null space: nothing of the gradient is expected, so the bias is the gradient itself.
    assert by_method["w_perp_bottom"]["looks"][-1]["relative_bias"]["0.weight"] == pytest.approx(1, abs=1e-3)
    assert by_method["w_preconditioned"]["looks"][-1]["relative_bias"]["0.weight"] == pytest.approx(0, abs=1e-3)
    shown = capsys.readouterr().out
    for number in range(1, 6):
        assert f"Table {number}" in shown
    assert "Figure 1" in shown
    assert (tmp_path / "wang_overlap.png").stat().st_size > 0


def test_wang_resumes_cell_by_cell(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The benchmark stops in its third run and has saved two. It goes on with the third."""
    settings = wang.Settings(epochs=2)
    monkeypatch.setattr(wang, "Settings", lambda **_: settings)
    options = ["--data-root", str(data_root), "--out", str(tmp_path), "--tables", "2", "--widths", "128"]
    options += ["--methods", "w_transpose", "w_perp_bottom", "--seeds", "2"]
    trained, train = list[Any](), wang.train

    def counting(*args: Any) -> Any:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(args[:3])
        return train(*args)

    monkeypatch.setattr(wang, "train", counting)
    with pytest.raises(KeyboardInterrupt):
        main(["wang", *options])
    before = figures(tmp_path)
    assert len(before) == 2 and all(cell["looks"] for cell in before)
    trained.clear()
    main(["wang", *options])
    assert len(trained) == 2 and len(figures(tmp_path)) == 4
    assert all(cell in figures(tmp_path) for cell in before)
    trained.clear()
    main(["wang", *options])
    assert not trained
    assert "4 finished runs" in capsys.readouterr().out


def test_wang_estimates_without_running(data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data-root", str(data_root), "--out", str(tmp_path), "--methods", "backprop", "w_transpose"]
    main(["wang", "--estimate", "--widths", "64", "--seeds", "1", *options])
    assert "2 runs" in capsys.readouterr().out and not (tmp_path / "wang.json").exists()


def test_wang_says_when_nothing_is_chosen() -> None:
    with pytest.raises(SystemExit, match="nothing to run"):
        main(["wang", "--tables", "5", "--widths", "64"])
