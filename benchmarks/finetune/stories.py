"""The Llama of 260K parameters trained on TinyStories, from its file or, by name, any causal language model."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.data import declare_torchvision_schemas

Encode = Callable[[str], list[int]]


def language_model(root: Path, name: str | None) -> tuple[Any, Encode]:
    """A model of transformers, frozen, and its tokenizer's encoding, which begins with no special token."""
    if name is None:
        model, encode = _stories(root)
    else:
        transformers = _transformers()
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name)
        encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    return model.eval().requires_grad_(False), encode


def _stories(root: Path) -> tuple[Any, Encode]:
    model = architecture(root)
    model.load_state_dict(load_file(root / "stories260k.safetensors"), strict=False)  # the tied output is not there
    tokenizer = json.loads((root / "stories260k_tokenizer.json").read_text())
    return model, encoder(tokenizer["pieces"], tokenizer["scores"], tokenizer["byte_token_offset"])


def architecture(root: Path) -> Any:
    """The Llama of the configuration there, with random weights."""
    transformers, config = _transformers(), json.loads((root / "stories260k_config.json").read_text())
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def _transformers() -> Any:
    with contextlib.suppress(ModuleNotFoundError):
        declare_torchvision_schemas()  # transformers imports torchvision where there is one
    return importlib.import_module("transformers")


def encoder(pieces: list[str], scores: list[float], bytes_from: int) -> Encode:
    """Byte-pair encoding as llama2.c does it: the adjacent pair that makes the piece of highest score is merged first.

    No piece holds a space but in front, so words are encoded one by one.
    """
    ids = {piece: index for index, piece in enumerate(pieces)}

    @functools.cache
    def word(text: str) -> list[int]:
        found: list[int] = []
        for c in text:
            found += [ids[c]] if c in ids else [byte + bytes_from for byte in c.encode()]
        while True:
            pairs = [(ids.get(pieces[a] + pieces[b]), k) for k, (a, b) in enumerate(pairwise(found))]
            known = [(scores[piece], -k, piece) for piece, k in pairs if piece is not None]
            if not known:
                return found
            _, k, piece = max(known)
            found[-k : -k + 2] = [piece]

    def encode(text: str) -> list[int]:
        words = (" " + text).replace(" ", "\0 ").split("\0")
        return [token for each in words if each for token in word(each)]

    return encode
