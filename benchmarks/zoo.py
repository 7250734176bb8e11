"""Well-known models, small and with random weights, for the coverage matrix and its tests.

Importing this module needs torch alone. Each library is imported when one of its models is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data import declare_torchvision_schemas
from benchmarks.quantised import bitsandbytes, torchao

#: Examples, tokens, size of the vocabulary. No two sizes are equal, so that a wrong dimension is noticed.
N, TOKENS, WORDS = 3, 5, 17


@dataclass(frozen=True)
class Subject:
    """A model in training mode, and an ordinary training script's closure on one batch."""

    model: nn.Module
    closure: Callable[[], Tensor]

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """The trainable parameters."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]


Build = Callable[[torch.dtype], Subject]


@dataclass(frozen=True)
class Entry:
    """A row of the matrix.

    Attributes:
        library: the module that must be installed.
        build: makes parameters and inputs of a dtype.
        fallbacks: by patterns of parameter names, why their sites take the scalar derivative of the whole batch.
        dtype: of the exactness check; float64 unless the library computes in float32 somewhere.
    """

    library: str
    build: Build
    fallbacks: Mapping[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64


def _subject(model: nn.Module, dtype: torch.dtype | None, closure: Callable[[Any], Tensor]) -> Subject:
    if dtype is not None:
        model.to(dtype)
    model.train()
    for p in model.parameters():
        if p.requires_grad and not p.any():  # before a head that starts at zero all gradients are zero
            nn.init.normal_(p, std=0.1)
    return Subject(model, lambda: closure(model))


def _classes(classes: int) -> Tensor:
    return torch.arange(N) % classes


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def _pretrained(kind: str, task: str, attention: str, **config: Any) -> nn.Module:
    declare_torchvision_schemas()  # transformers imports torchvision where it is installed
    import transformers

    made = transformers.AutoConfig.for_model(kind, attn_implementation=attention, **config)
    cls = getattr(transformers, task)
    model: nn.Module = cls.from_config(made) if task.startswith("Auto") else cls(made)
    return model


def _text(kind: str, attention: str, task: str = "AutoModelForCausalLM", **config: Any) -> Build:
    """A language model's own loss on tokens, one example padded."""

    def build(dtype: torch.dtype) -> Subject:
        model = _pretrained(kind, task, attention, vocab_size=WORDS, pad_token_id=0, **config)
        ids = torch.randint(2, WORDS, (N, TOKENS))
        mask = torch.ones_like(ids)
        mask[-1, -1] = 0
        ids, labels = ids * mask, ids.masked_fill(mask == 0, -100)
        if "Sequence" in task:
            labels = _classes(2)
        return _subject(model, dtype, lambda m: m(input_ids=ids, attention_mask=mask, labels=labels).loss)

    return build


def _images(
    kind: str, attention: str, task: str = "AutoModelForImageClassification", *, size: int = 8, **config: Any
) -> Build:
    def build(dtype: torch.dtype) -> Subject:
        model = _pretrained(kind, task, attention, num_labels=4, image_size=size, **config)
        x = torch.randn(N, 3, size, size, dtype=dtype)
        return _subject(model, dtype, lambda m: m(pixel_values=x, labels=_classes(4)).loss)

    return build


def _t5(attention: str) -> Build:
    def build(dtype: torch.dtype) -> Subject:
        sizes = {"d_model": 8, "d_kv": 4, "d_ff": 10, "num_layers": 2, "num_heads": 2, "vocab_size": WORDS}
        model = _pretrained("t5", "AutoModelForSeq2SeqLM", attention, decoder_start_token_id=0, **sizes)
        ids, labels = torch.randint(2, WORDS, (N, TOKENS)), torch.randint(2, WORDS, (N, 4))
        return _subject(model, dtype, lambda m: m(input_ids=ids, labels=labels).loss)

    return build


def _whisper(attention: str) -> Build:
    def build(dtype: torch.dtype) -> Subject:
        sizes = {
            "d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 10, "decoder_ffn_dim": 10, "num_mel_bins": 6,
            "max_source_positions": 7, "max_target_positions": 6, "vocab_size": WORDS,
        }  # fmt: skip
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
        dropout = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}
        model = _pretrained("whisper", "AutoModelForSpeechSeq2Seq", attention, **sizes, **special, **dropout)
        sound, labels = torch.randn(N, 6, 14, dtype=dtype), torch.randint(2, WORDS, (N, TOKENS))
        return _subject(model, dtype, lambda m: m(input_features=sound, labels=labels).loss)

    return build


_BERT: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 10}
_LLAMA: dict[str, Any] = {
    **_BERT,
    "num_key_value_heads": 1,
    "attention_dropout": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_VIT: dict[str, Any] = {**_BERT, "patch_size": 4, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}

#: By model type, the builder for an attention implementation.
_HUGGING_FACE: dict[str, Callable[[str], Build]] = {
    "bert": lambda a: _text("bert", a, "AutoModelForSequenceClassification", **_BERT),
    "roberta": lambda a: _text("roberta", a, "AutoModelForMaskedLM", **_BERT),
    "distilbert": lambda a: _text(
        "distilbert", a, "AutoModelForSequenceClassification", dim=8, n_layers=2, n_heads=2, hidden_dim=10
    ),
    "gpt2": lambda a: _text(
        "gpt2", a, n_embd=8, n_layer=2, n_head=2, n_positions=12, bos_token_id=1, eos_token_id=1
    ),
    "llama": lambda a: _text("llama", a, **_LLAMA),
    "mistral": lambda a: _text("mistral", a, **{**_LLAMA, "head_dim": 4}),
    "qwen2": lambda a: _text("qwen2", a, **_LLAMA),
    "phi": lambda a: _text(
        "phi", a, **{**_LLAMA, "num_key_value_heads": 2}, resid_pdrop=0.1, embd_pdrop=0.1
    ),
    "gemma": lambda a: _text("gemma", a, **_LLAMA, head_dim=4),
    "opt": lambda a: _text(
        "opt", a, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, ffn_dim=10, word_embed_proj_dim=8,
        attention_dropout=0.1, bos_token_id=1, eos_token_id=1,
    ),
    "t5": _t5,
    "vit": lambda a: _images("vit", a, **_VIT),
    "deit": lambda a: _images("deit", a, "DeiTForImageClassification", **_VIT),
    "swin": lambda a: _images(
        "swin", a, size=8, patch_size=2, embed_dim=4, depths=[2, 2], num_heads=[1, 2], window_size=2,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    ),
    "convnext": lambda a: _images(
        "convnext", a, size=16, hidden_sizes=[4, 8], depths=[1, 2], num_stages=2, patch_size=4,
        layer_scale_init_value=0.5, drop_path_rate=0.1,
    ),
    "whisper": _whisper,
    "mamba": lambda a: _text(
        "mamba", a, hidden_size=8, state_size=3, num_hidden_layers=2, time_step_rank=2, bos_token_id=1, eos_token_id=1
    ),
}  # fmt: skip

_ONE_ATTENTION = ("convnext", "mamba")  # no choice of attention


# --- timm and torchvision ---------------------------------------------------------------------------------------------

_BATCH_NORM = {"*": "batch normalisation in training mode makes the examples interact"}


def _timm(name: str, size: int = 32, **options: Any) -> Build:
    def build(dtype: torch.dtype) -> Subject:
        declare_torchvision_schemas()
        import timm

        model = timm.create_model(name, num_classes=4, **options)
        x = torch.randn(N, 3, size, size, dtype=dtype)
        return _subject(model, dtype, lambda m: F.cross_entropy(m(x), _classes(4)))

    return build


def _torchvision(name: str, size: int = 32, **options: Any) -> Build:
    def build(dtype: torch.dtype) -> Subject:
        declare_torchvision_schemas()
        import torchvision

        model = getattr(torchvision.models, name)(num_classes=4, **options)
        x = torch.randn(N, 3, size, size, dtype=dtype)
        return _subject(model, dtype, lambda m: F.cross_entropy(m(x), _classes(4)))

    return build


# --- torch itself -----------------------------------------------------------------------------------------------------


class _Recurrent(nn.Module):
    """A recurrent network that reads tokens, and a linear layer on its mean state."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 6)
        self.cell = cell(6, 4, num_layers=2, dropout=0.1, bidirectional=True, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.cell(self.embed(ids))[0].mean(1))
        return out


class _Encoder(nn.Module):
    """``nn.TransformerEncoder`` on tokens, of which it must not see the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 10, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(self.embed(ids), src_key_padding_mask=ids == 0).mean(1))
        return out


class _Attention(nn.Module):
    """``nn.MultiheadAttention`` by itself, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids).transpose(0, 1)
        out: Tensor = self.head(self.attention(h, h, h, need_weights=False)[0].mean(0))
        return out


def _tokens(make: Callable[[], nn.Module]) -> Build:
    def build(dtype: torch.dtype) -> Subject:
        ids = torch.randint(1, WORDS, (N, TOKENS))
        ids[-1, -1] = 0
        return _subject(make(), dtype, lambda m: F.cross_entropy(m(ids), _classes(4)))

    return build


def _bag() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(WORDS, 6), nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 4))


# --- peft -------------------------------------------------------------------------------------------------------------


def _peft(method: str, **options: Any) -> Build:
    """A frozen llama under an adapter."""

    def build(dtype: torch.dtype) -> Subject:
        declare_torchvision_schemas()
        import peft

        model = _pretrained("llama", "AutoModelForCausalLM", "sdpa", vocab_size=WORDS, pad_token_id=0, **_LLAMA)
        wrapped = peft.get_peft_model(model, getattr(peft, method)(task_type="CAUSAL_LM", **options))
        ids = torch.randint(2, WORDS, (N, TOKENS))
        mask = torch.ones_like(ids)
        return _subject(wrapped, dtype, lambda m: m(input_ids=ids, attention_mask=mask, labels=ids).loss)

    return build


# --- quantised weights ------------------------------------------------------------------------------------------------

#: A width that 4-bit blocks of 64 divide.
_WIDE: dict[str, Any] = {**_LLAMA, "hidden_size": 64, "intermediate_size": 64, "head_dim": 32}


def _quantised(quantise: Callable[[nn.Module], None]) -> Build:
    """LoRA on a llama whose linear layers are kept in 8 or 4 bits."""

    def build(dtype: torch.dtype) -> Subject:
        declare_torchvision_schemas()
        import peft

        model = _pretrained("llama", "AutoModelForCausalLM", "sdpa", vocab_size=WORDS, pad_token_id=0, **_WIDE)
        model.to(dtype).requires_grad_(False)
        quantise(model.get_submodule("model.layers"))
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.1, target_modules=targets)
        wrapped = peft.get_peft_model(model, config)
        ids = torch.randint(2, WORDS, (N, TOKENS))
        return _subject(wrapped, None, lambda m: m(input_ids=ids, labels=ids).loss)

    return build


def sized() -> dict[str, Callable[[], Subject]]:
    """Models of some size, by name, for timing: Hugging Face's own, in float32."""

    def llama() -> Subject:
        sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 688}
        model = _pretrained("llama", "AutoModelForCausalLM", "sdpa", vocab_size=1024, num_key_value_heads=4, **sizes)
        ids = torch.randint(1024, (8, 64))
        return _subject(model, torch.float32, lambda m: m(input_ids=ids, labels=ids).loss)

    def vit() -> Subject:
        sizes = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
        model = _pretrained(
            "vit", "AutoModelForImageClassification", "sdpa", num_labels=10, image_size=32, patch_size=4, **sizes
        )
        x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
        return _subject(model, torch.float32, lambda m: m(pixel_values=x, labels=y).loss)

    return {"hf/llama, 4 layers of 256": llama, "hf/vit, 6 layers of 192": vit}


def entries() -> dict[str, Entry]:
    """Every row of the matrix, by the name it has there."""
    found: dict[str, Entry] = {
        "torch/TransformerEncoder": Entry("torch", _tokens(_Encoder)),
        "torch/MultiheadAttention": Entry("torch", _tokens(_Attention)),
        "torch/LSTM": Entry("torch", _tokens(lambda: _Recurrent(nn.LSTM))),
        "torch/GRU": Entry("torch", _tokens(lambda: _Recurrent(nn.GRU))),
        "torch/EmbeddingBag": Entry("torch", _tokens(_bag)),
    }
    for kind, of in _HUGGING_FACE.items():
        for attention in ("eager",) if kind in _ONE_ATTENTION else ("eager", "sdpa"):
            name = f"hf/{kind}" if kind in _ONE_ATTENTION else f"hf/{kind} {attention}"
            found[name] = Entry("transformers", of(attention))
    found |= {
        "timm/vit_tiny": Entry("timm", _timm("vit_tiny_patch16_224", img_size=32, proj_drop_rate=0.1)),
        "timm/resnet18": Entry("timm", _timm("resnet18", drop_rate=0.1), _BATCH_NORM),
        "timm/efficientnet_b0": Entry("timm", _timm("efficientnet_b0", drop_rate=0.1), _BATCH_NORM),
        "timm/mixer_s16": Entry("timm", _timm("mixer_s16_224", img_size=32, proj_drop_rate=0.1)),
        "timm/convnext_atto": Entry("timm", _timm("convnext_atto", drop_path_rate=0.1)),
        "torchvision/resnet18": Entry("torchvision", _torchvision("resnet18"), _BATCH_NORM),
        "torchvision/vit_b_16": Entry("torchvision", _torchvision("vit_b_16", image_size=32, dropout=0.1)),
        "torchvision/mobilenet_v3_small": Entry("torchvision", _torchvision("mobilenet_v3_small"), _BATCH_NORM),
        "peft/LoRA": Entry("peft", _peft("LoraConfig", r=2, lora_dropout=0.1, target_modules="all-linear")),
        "peft/prompt tuning": Entry("peft", _peft("PromptTuningConfig", num_virtual_tokens=2)),
        "peft/prefix tuning": Entry("peft", _peft("PrefixTuningConfig", num_virtual_tokens=2)),
        "peft/IA3": Entry(
            "peft",
            _peft("IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        ),
    }
    single = torch.float32  # the dtype to which the weights are unpacked
    found |= {
        "peft/LoRA on 8 bits (torchao)": Entry("torchao", _quantised(torchao), dtype=single),
        "peft/LoRA on 8 bits (bitsandbytes)": Entry("bitsandbytes", _quantised(bitsandbytes(8)), dtype=single),
        "peft/LoRA on 4 bits (bitsandbytes)": Entry("bitsandbytes", _quantised(bitsandbytes(4)), dtype=single),
    }
    return found
