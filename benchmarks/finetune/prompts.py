"""Visual prompt tuning (Jia et al. 2022) of a frozen ViT: learned tokens beside those of the patches, and the head."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.data import Dataset, cifar10, declare_torchvision_schemas
from benchmarks.finetune.problem import Problem, Settings, split
from benchmarks.methods import METHODS
from benchmarks.problems import vit
from benchmarks.report import SCRATCH
from benchmarks.training import batches_of, fit, steps_per_epoch

TITLE = "Visual prompt tuning"
SETTINGS = Settings(passes=600, batch=16, train=2000, validation=300, test=500)
QUICK = Settings(passes=6, batch=4, train=24, validation=8, test=8, looks=1, grid=(-6, -5))
PROMPTS = 8
OLD, NEW = range(5), range(5, 10)
"""The classes on which the small ViT is pretrained, and those to which its prompts are tuned."""


class Prompted(nn.Module):
    """``embed`` makes tokens ``[N, T, D]`` of images, ``layers`` transform them; the class token is the first."""

    def __init__(self, embed: nn.Module, layers: Iterable[nn.Module], dim: int, classes: int) -> None:
        super().__init__()
        self.embed, self.layers = embed.requires_grad_(False), nn.ModuleList(layers).requires_grad_(False)
        torch.manual_seed(0)  # the same with weights that were trained here and with weights that were read
        self.prompts = nn.Parameter(0.02 * torch.randn(PROMPTS, dim))
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images)
        tokens = torch.cat([tokens, self.prompts.expand(len(tokens), -1, -1)], dim=1)
        for layer in self.layers:
            tokens = layer(tokens)
        out: Tensor = self.head(tokens[:, 0])
        return out


def problem(args: argparse.Namespace, settings: Settings) -> Problem:
    torch.manual_seed(0)
    data = cifar10(args.data_root, 4 * (settings.train + settings.validation), 2 * settings.test)
    x, y = torch.cat([data.x, data.x_test]).unflatten(1, (3, 32, 32)), torch.cat([data.y, data.y_test])
    new = y >= NEW.start
    pairs = split(x[new], y[new] - NEW.start, Settings(**{**vars(settings), "test": int(new[len(data.x) :].sum())}))
    if args.vit == "vit_b_16":
        model, name = prompted_vit_b_16(), "torchvision's vit_b_16 (ImageNet) on images enlarged to 224"
    else:
        old = ~new[: len(data.x)]
        model = prompted_small_vit(x[: len(data.x)][old], y[: len(data.x)][old], epochs=1 if args.quick else 8)
        name = "ViT of dimension 64 and depth 4, pretrained here on five classes"
    note = f"{name}; {PROMPTS} prompts and the head tuned to five (other) classes of CIFAR-10 ({data.source})."
    return Problem(model.eval(), lambda m: m.layers, *pairs, note, "head")


def prompted_vit_b_16() -> Prompted:
    declare_torchvision_schemas()
    from torchvision.models import ViT_B_16_Weights, vit_b_16

    net = vit_b_16(weights=ViT_B_16_Weights.DEFAULT)
    return Prompted(Enlarged(net), [*net.encoder.layers, net.encoder.ln], net.hidden_dim, len(NEW))


class Enlarged(nn.Module):
    """Tokens of a torchvision ViT, positions added."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.project, self.cls, self.positions = net.conv_proj, net.class_token, net.encoder.pos_embedding

    def forward(self, images: Tensor) -> Tensor:
        patches = self.project(F.interpolate(images, size=224, mode="bilinear")).flatten(2).transpose(1, 2)
        out: Tensor = torch.cat([self.cls.expand(len(images), -1, -1), patches], dim=1) + self.positions
        return out


def prompted_small_vit(x: Tensor, y: Tensor, epochs: int) -> Prompted:
    """Pretrained on the old classes, once: the weights are kept in a scratch folder."""
    net = vit(64, 4, 2, patch=8, classes=len(OLD))
    path = SCRATCH / f"finetune_vit_{len(x)}_{epochs}.safetensors"
    if path.is_file():
        net.load_state_dict(load_file(path))
    else:
        data = Dataset(x, y, x[:0], y[:0], "")
        steps = epochs * steps_per_epoch(data, 128)
        learner = METHODS["backprop"].learner(net, 1e-3)
        fit(learner, batches_of(data, 128, torch.default_generator), steps, label="pretraining")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(net.state_dict(), path)
    return Prompted(net[0], [*net][1:-2], 64, len(NEW))
