"""Fine-tuning: the quick versions of the four tasks on made-up models and data, and their shared parts."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("rich")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from PIL import Image
from safetensors.torch import save_file
from torch import nn

from benchmarks import finetune, results_page
from benchmarks.__main__ import main
from benchmarks.baselines import MeZO
from benchmarks.finetune import corrupted, prompts, report, runs, stories, tables_of
from benchmarks.finetune.problem import METHODS, Problem, Settings
from benchmarks.finetune.runs import Cost, Results, Run, best_level
from benchmarks.measure import Ratio
from benchmarks.methods import METHODS as TABLE

from .test_benchmarks import numbers

CONFIG = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
BYTES_FROM = 3
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), " ", "a", "b", "ab", " a", "bb"]
SCORES = [0.0] * 259 + [0.0, 0.0, 0.0, -1.0, -2.0, -3.0]


@pytest.fixture
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for every file. Pretrained weights are random."""
    rng, arrays = np.random.default_rng(0), {}
    for part, strips in (("train", 4), ("test", 1)):
        encoded = [io.BytesIO() for _ in range(strips)]
        for buffer in encoded:
            pixels = rng.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels.reshape(1600, 32, 3)).save(buffer, "WEBP", lossless=True)
        values = [buffer.getvalue() for buffer in encoded]
        arrays[f"{part}_webp"] = np.frombuffer(b"".join(values), dtype=np.uint8)
        arrays[f"{part}_offsets"] = np.cumsum([0, *map(len, values)])
        arrays[f"{part}_labels"] = np.arange(50 * strips) % 10
    folder = tmp_path / "data"
    folder.mkdir()
    np.savez(folder / "cifar10_lossless.npz", **arrays)
    weights = corrupted.ResNet20().state_dict()
    save_file({k: v for k, v in weights.items() if "num_batches" not in k}, folder / "resnet20_cifar10.safetensors")
    for part, lines in (("train", 40), ("test", 12)):
        text = "".join(f"{k % 6}\tab a bb{' a' * k}\n" for k in range(lines))
        (folder / f"trec_{part}.tsv").write_text(f"label\tsentence\n{text}")
    (folder / "tinyshakespeare.txt").write_text("ab a bb, baba. " * 400)
    (folder / "stories260k_config.json").write_text(json.dumps(CONFIG))
    tokenizer = {"pieces": PIECES, "scores": SCORES, "byte_token_offset": BYTES_FROM}
    (folder / "stories260k_tokenizer.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr(prompts, "SCRATCH", tmp_path / "scratch")
    return folder


def llama_weights(folder: Path) -> None:
    """As in the original file, the tied output is left out."""
    llama = stories.architecture(folder)
    save_file(
        {k: v for k, v in llama.state_dict().items() if k != "lm_head.weight"}, folder / "stories260k.safetensors"
    )


def result(task: str, root: Path, out: Path, *options: str) -> dict[str, Any]:
    main(["finetune", "--quick", "--tasks", task, "--data-root", str(root), "--out", str(out), *options])
    content: dict[str, Any] = json.loads((out / f"finetune_{task}.json").read_text())
    assert content["command"].startswith("python -m benchmarks finetune --quick") and str(out) not in str(content)
    assert all(math.isfinite(number) for number in numbers(content))
    assert (out / f"finetune_{task}.png").stat().st_size > 0
    return content


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize("task", ["sentences", "lora", "prompts", pytest.param("corrupted", marks=pytest.mark.slow)])
def test_task(task: str, data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if task in ("sentences", "lora"):
        pytest.importorskip("transformers")
        pytest.importorskip("peft")
        llama_weights(data_root)
    content = result(task, data_root, tmp_path)
    figures = content["figures"]
    wanted = set(METHODS) - ({"head"} if task == "lora" else set())
    assert set(figures["costs"]) == wanted
    leaders = {m for m in wanted if METHODS[m].follows is None}
    assert set(figures["levels"]) == {run["method"] for run in figures["runs"]} == leaders
    assert all(0 <= share <= 1 for run in figures["runs"] for share in run["test"])
    costs = figures["costs"]
    assert costs["checkpointed"]["peak_bytes"] < costs["backprop"]["peak_bytes"]
    assert costs["mezo"]["peak_bytes"] < costs["w_perp"]["peak_bytes"]
    assert costs["w_perp_stream"]["steps"] < costs["w_perp"]["steps"]
    (table,) = tables_of(content)
    assert len(table.rows) == len(wanted)
    assert "learned feedback" in capsys.readouterr().out
    page = results_page.page(tmp_path, {"finetune": finetune})
    assert f"## finetune_{task}" in page and all(f"| {row[0]} | {row[1]} |" in page for row in table.rows)


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
def test_what_is_finished_is_not_run_again(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prompts, "SETTINGS", prompts.QUICK)
    options = ["--tasks", "prompts", "--data-root", str(data_root), "--out", str(tmp_path), "--seeds", "2"]
    trained, tune = list[Any](), runs.tune

    def counting(problem: Problem, method: str, level: int, seed: int, settings: Settings) -> Run:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append((method, level, seed))
        return tune(problem, method, level, seed, settings)

    monkeypatch.setattr(runs, "tune", counting)
    with pytest.raises(KeyboardInterrupt):
        main(["finetune", *options, "--methods", "backprop", "mezo"])
    before = trained.copy()
    assert [run["method"] for run in json.loads((tmp_path / "finetune_prompts.json").read_text())["figures"]["runs"]]
    trained.clear()
    main(["finetune", *options, "--methods", "backprop", "mezo"])
    assert len(trained) == 3 and not set(trained) & set(before)
    trained.clear()
    main(["finetune", *options, "--methods", "backprop", "mezo"])
    main(["finetune", *options, "--methods", "backprop", "mezo", "--estimate"])
    assert not trained and "about 0 min" in capsys.readouterr().out


def test_the_sweep_finds_the_best_rate_without_trying_all() -> None:
    for wanted in range(-12, -1):
        asked: list[int] = []

        def score(level: int) -> float:
            asked.append(level)  # noqa: B023 (called here)
            return -abs(level - wanted)  # noqa: B023

        assert best_level(score, -16, 0) == wanted
        assert len(asked) == len(set(asked)) <= 9
    assert best_level(lambda level: float(level), -16, 0) == 0
    assert best_level(lambda level: -abs(level + 13) if level < -8 else -10.0, -16, 0) == -13  # the others dead
    assert best_level(lambda level: float(level), -6, -5) == -5


def test_a_run_is_read_between_its_looks() -> None:
    run = Run("mezo", -6, 0, 0.5, [0, 10, 20], [0.0, 0.4, 0.6], [2.0, 1.5, 1.0])
    assert [run.at(step) for step in (0, 5, 10, 15, 20, 30)] == pytest.approx([0, 0.2, 0.4, 0.5, 0.6, 0.6])


def test_budgets_are_the_same_passes() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 12, bias=False))
    model[0].requires_grad_(False)
    pair = torch.randn(2, 4), torch.zeros(2, dtype=torch.int64)
    problem = Problem(model, list, pair, pair, pair, "")
    assert problem.tuned == 0.75
    settings = Settings(passes=330, batch=2, train=2, validation=2, test=2)
    steps = {name: method.steps(settings, problem) for name, method in METHODS.items()}
    assert steps["mezo"] == steps["directional_descent"] == 165
    assert steps["backprop"] == steps["w_perp"] == 120 and steps["checkpointed"] == 88
    assert steps["learned_feedback"] == 69  # 330 / (4 + 0.75)


def test_equal_time_reads_every_method_at_the_same_moment() -> None:
    ratios = {"backprop": 1.0, "mezo": 0.5}
    costs = {name: Cost(Ratio(value, value, value), 100, 10**6) for name, value in ratios.items()}
    made = [Run(name, -6, 0, 0.5, [0, 100], [0.0, 1.0], [1.0, 0.0]) for name in ratios]
    results = Results("t", "n.", 0.5, costs, dict.fromkeys(ratios, -6), {run.key: run for run in made})
    rows = {row[0]: row for row in report.table(results, {"passes": 7}).rows}
    assert rows["backprop"][2:4] == ["1.000", "0.500"] and rows["MeZO"][2:4] == ["1.000", "1.000"]


def test_checkpointing_blocks_changes_no_gradient() -> None:
    model, x, y = corrupted.ResNet20().eval(), torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])
    found = []
    blocks = [*model.layer1, *model.layer2, *model.layer3]
    for name, options in (("backprop", {}), ("checkpointed", {"blocks": blocks})):
        TABLE[name].learner(model, 0.0, **options).step(x, y)
        found.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_mezo_steps_along_its_direction() -> None:
    """On a quadratic the slope is exact: the step is ``-lr <g, z> z``, and nothing else moves."""
    start = torch.randn(5, dtype=torch.float64)
    p = nn.Parameter(start.clone())
    losses = []

    def loss() -> torch.Tensor:
        losses.append(p.detach().clone())
        return p.square().sum()

    MeZO([p], lr=0.1, eps=1e-3).step(loss)
    z = (losses[0] - losses[1]) / 2e-3
    torch.testing.assert_close((losses[0] + losses[1]) / 2, start)
    torch.testing.assert_close(p.detach(), start - 0.1 * (2 * start @ z) * z)


def test_mezo_learns() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    model = nn.Linear(3, 1)
    optimizer = MeZO(model.parameters(), lr=0.02)
    losses = [float(optimizer.step(lambda: F.mse_loss(model(x), x.sum(1, keepdim=True)))) for _ in range(300)]
    assert losses[-1] < 0.05 * losses[0]


def test_a_diverging_run_ends_with_figures() -> None:
    x = torch.randn(8, 3)
    pair = x, (x[:, 0] > 0).long()
    problem = Problem(nn.Linear(3, 2), list, pair, pair, pair, "")
    problem.model.weight.data.mul_(1e38)
    run = runs.tune(problem, "w_perp", 0, 0, Settings(9, 4, 8, 8, 8, looks=2))
    assert len(run.test) == 3 and all(map(math.isfinite, run.loss))


def test_corruptions() -> None:
    images = torch.rand(600, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = corrupted.corrupt(images, torch.Generator().manual_seed(0))
    assert found.shape == images.shape and found.min() >= 0 and found.max() <= 1
    ratio = found.std((1, 2, 3)) / images.std((1, 2, 3))
    contrast = (ratio - 0.2).abs() < 1e-4
    blur = (ratio < 0.5) & ~contrast
    noise = ratio > 0.9
    counts = [int(kind.sum()) for kind in (contrast, blur, noise)]
    assert sum(counts) == 600 and all(abs(count - 200) < 4 * (600 * 2 / 9) ** 0.5 for count in counts)


def test_encoding_merges_the_best_pair_first() -> None:
    encode = stories.encoder(PIECES, SCORES, BYTES_FROM)
    ids = {piece: index for index, piece in enumerate(PIECES)}
    assert encode("abb") == [ids[" "], ids["ab"], ids["b"]]
    assert encode("b a") == [ids[" "], ids["b"], ids[" a"]]
    assert encode("é") == [ids[" "], *(byte + BYTES_FROM for byte in "é".encode())]


def test_the_data_folder_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GUESSOPT_DATA", raising=False)
    with pytest.raises(SystemExit, match="GUESSOPT_DATA"):
        main(["finetune", "--quick"])
