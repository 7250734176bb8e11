"""LoRA on a causal language model: TinyStories' Llama, tuned to Shakespeare; next-token accuracy."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.finetune.problem import Problem, Settings, split
from benchmarks.finetune.stories import language_model

TITLE = "LoRA, Llama from TinyStories to Shakespeare"
SETTINGS = Settings(passes=600, batch=8, train=2000, validation=100, test=100)
QUICK = Settings(passes=6, batch=4, train=8, validation=4, test=4, looks=1, grid=(-6, -5))
TOKENS = 48


class Scores(nn.Module):
    """A causal language model's scores of the next token, ``[N, vocabulary, T]``, as cross-entropy takes them."""

    def __init__(self, language: Any) -> None:
        super().__init__()
        self.language = language

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.language(tokens, use_cache=False).logits.transpose(1, 2)
        return out


def problem(args: argparse.Namespace, settings: Settings) -> Problem:
    torch.manual_seed(0)
    language, encode = language_model(args.data_root, args.model)
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(language, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"]))
    model = Scores(adapted.base_model.model).eval()
    count = settings.train + settings.validation + settings.test
    text = (args.data_root / "tinyshakespeare.txt").read_text()[: 4 * TOKENS * count]  # at most 4 characters a token
    windows = torch.tensor(encode(text))[: (TOKENS + 1) * count]
    windows = windows[: len(windows) // (TOKENS + 1) * (TOKENS + 1)].view(-1, TOKENS + 1)
    pairs = split(windows[:, :-1], windows[:, 1:], settings)
    name = args.model or "Llama of 260K parameters (TinyStories)"
    note = f"{name}, LoRA of rank 4 on q, v and o, on windows of {TOKENS} tokens of tinyshakespeare."
    return Problem(model, lambda m: m.language.model.layers, *pairs, note)
