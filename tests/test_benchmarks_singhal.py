"""The first paper's figures in their quick versions; the page of results."""

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from PIL import Image

from benchmarks import results_page, singhal
from benchmarks.__main__ import experiments, main
from benchmarks.data import cifar10

from .test_benchmarks import data_root, numbers

__all__ = ["data_root"]  # the fixture
optimi = importlib.util.find_spec("optimi")
RESULTS = Path(singhal.__file__).parent / "results"


@pytest.fixture
def images(data_root: Path) -> Path:
    """A stand-in for CIFAR-10 and MNIST-1D: strips of 50 noisy images, class after class."""
    rng, arrays = np.random.default_rng(0), {}
    for part, strips in (("train", 10), ("test", 10)):
        encoded = [io.BytesIO() for _ in range(strips)]
        for buffer in encoded:
            pixels = rng.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels.reshape(1600, 32, 3)).save(buffer, "WEBP", lossless=True)
        sizes = [0, *(len(buffer.getvalue()) for buffer in encoded)]
        joined = b"".join(buffer.getvalue() for buffer in encoded)
        arrays[f"{part}_webp"] = np.frombuffer(joined, dtype=np.uint8)
        arrays[f"{part}_offsets"] = np.cumsum(sizes)
        arrays[f"{part}_labels"] = np.arange(50 * strips) % 10
    np.savez(data_root / "cifar10_lossless.npz", **arrays)
    return data_root


def content(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "singhal.json").read_text())
    return found


def test_cifar10_reads_so_many_images(images: Path) -> None:
    few, all_ = cifar10(images, 60, 10), cifar10(images)
    assert few.x.shape == (60, 3072) and few.x_test.shape == (10, 3072) and all_.x.shape == (500, 3072)
    assert torch.equal(few.x, all_.x[:60]) and torch.equal(few.y, torch.arange(60) % 10)
    assert few.x.dtype is torch.float32 and -3 < float(few.x.min()) < -1 < 1 < float(few.x.max()) < 3


def test_singhal(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["singhal", "--quick", "--out", str(tmp_path), "--data-root", str(images)])
    found, shown = content(tmp_path), capsys.readouterr().out
    assert list(found["figures"]) == list(singhal.PARTS) == list(found["settings"])
    assert str(tmp_path) not in json.dumps(found) and all(np.isfinite([*numbers(found)]))
    for name, part in singhal.PARTS.items():
        cells = found["figures"][name]["cells"]
        there = {cell["method"] for cell in cells}
        assert there == set(part.methods) or (name == "table2" and not optimi)
        assert part.title.split(":")[0] in shown and (tmp_path / f"singhal_{name}.png").stat().st_size > 0
    four = {cell["method"]: cell for cell in found["figures"]["figure4"]["cells"]}
    assert all(cell["guesses"] == [2**e for e in range(1, 9)] for cell in four.values())
    assert four["activation_perturbation"]["limit"] == pytest.approx(1, abs=1e-4)
    assert four["w_transpose"]["limit"] < 0.999 and four["downstream"]["limit"] < 0.999
    five = {cell["method"]: cell for cell in found["figures"]["figure5"]["cells"]}["self_sharpening"]
    assert five["steps"][0] == 0 and five["steps"][-1] == 8
    assert all(len(ranks) == 7 for ranks in five["weights"]) and all(len(ranks) == 6 for ranks in five["activations"])


def test_singhal_resumes_and_adds_parts(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--out", str(tmp_path), "--data-root", str(images), "--images", "50", "--width", "8", "--epochs", "1"]
    main(["singhal", *options, "--parts", "table2", "--methods", "backprop"])
    first = content(tmp_path)["figures"]["table2"]["cells"]
    main(["singhal", *options, "--parts", "table2", "--methods", "backprop", "w_perp"])
    second = content(tmp_path)["figures"]["table2"]["cells"]
    assert [cell["method"] for cell in second] == ["w_perp", "backprop"] and second[1] == first[0]
    main(["singhal", *options, "--parts", "figure5", "--methods", "w_transpose", "--steps", "2"])
    both = content(tmp_path)
    assert both["figures"]["table2"]["cells"] == second and len(both["figures"]["figure5"]["cells"]) == 1
    assert "1 finished runs" in capsys.readouterr().out
    options[-1] = "2"  # other settings: nothing of the old ones is left beside the new
    main(["singhal", *options, "--parts", "table2", "--methods", "backprop"])
    assert [cell["method"] for cell in content(tmp_path)["figures"]["table2"]["cells"]] == ["backprop"]


def test_the_page_of_results_is_the_one_that_the_committed_files_give(tmp_path: Path) -> None:
    committed = (RESULTS.parents[1] / "docs" / "results.md").read_text()
    assert committed == results_page.page(RESULTS, experiments())
    for path in RESULTS.glob("*.png"):
        assert f"](../benchmarks/results/{path.name})" in committed, path.name


def test_the_page_takes_in_new_results_and_leaves_out_unknown_ones(images: Path, tmp_path: Path) -> None:
    data = ["--quick", "--out", str(tmp_path), "--data-root", str(images)]
    main(["mnist1d", *data, "--methods", "backprop"])
    main(["wang", *data, "--tables", "2", "3", "--widths", "128", "--methods", "w_transpose", "backprop"])
    (tmp_path / "unheard_of.json").write_text("{}")
    page = results_page.page(tmp_path, experiments())
    assert "## mnist1d" in page and "## wang" in page and "unheard" not in page
    assert "`python -m benchmarks wang --quick" in page and str(tmp_path) not in page
    assert "Table 2: layer 1" in page and "Table 5" not in page  # no runs for the latter
    rows = [line for line in page.splitlines() if line.startswith("| 128 W^T")]
    assert rows and all(line.count("|") > 5 for line in rows)
    assert "![wang](../benchmarks/results/wang.png)" in page
