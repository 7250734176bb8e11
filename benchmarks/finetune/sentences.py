"""Sentence classification with a frozen language model: LoRA, and a linear head on the mean of its hidden states."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.finetune.problem import Problem, Settings, split
from benchmarks.finetune.stories import Encode, language_model

TITLE = "Sentences, Llama with LoRA and a head"
SETTINGS = Settings(passes=600, batch=16, train=2000, validation=300, test=500)
QUICK = Settings(passes=6, batch=4, train=24, validation=8, test=8, looks=1, grid=(-6, -5))
TOKENS = 32
"""Where longer sentences are cut."""


class Classifier(nn.Module):
    """Reads tokens ``[N, T]``, -1 after a sentence's end. No mask is needed: no token sees a later one."""

    def __init__(self, backbone: Any, classes: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbone.config.hidden_size, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        there = (tokens >= 0).unsqueeze(-1)
        hidden = self.backbone(tokens.clamp_min(0), use_cache=False).last_hidden_state
        out: Tensor = self.head((hidden * there).sum(1) / there.sum(1))
        return out


def problem(args: argparse.Namespace, settings: Settings) -> Problem:
    torch.manual_seed(0)
    language, encode = language_model(args.data_root, args.model)
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(language.model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    test = read(args.data_root / f"{args.data}_test.tsv")[: settings.test]
    lines = read(args.data_root / f"{args.data}_train.tsv") + test
    x, y = torch.stack([tokens(encode, text) for _, text in lines]), torch.tensor([label for label, _ in lines])
    model = Classifier(adapted.base_model.model, int(y.max()) + 1).eval()
    pairs = split(x, y, Settings(**{**vars(settings), "test": len(test)}))
    note = f"{args.data.upper()}, {args.model or 'Llama of 260K parameters (TinyStories)'}, LoRA of rank 4 on q and v."
    return Problem(model, lambda m: m.backbone.layers, *pairs, note, "head")


def read(path: Path) -> list[tuple[int, str]]:
    """Label and sentence of each line after the first."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [(int(label), text) for label, text in (line.split("\t") for line in lines)]


def tokens(encode: Encode, text: str) -> Tensor:
    found = torch.tensor(encode(text)[:TOKENS])
    return nn.functional.pad(found, (0, TOKENS - len(found)), value=-1)
