"""ResNet-20, pretrained on CIFAR-10, adapted to corrupted images: all weights, running statistics frozen."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.data import CIFAR10_MEAN, CIFAR10_STD, cifar10
from benchmarks.finetune.problem import Problem, Settings, split

TITLE = "ResNet-20 on corrupted CIFAR-10"
SETTINGS = Settings(passes=300, batch=16, train=2000, validation=300, test=400)
QUICK = Settings(passes=6, batch=4, train=16, validation=8, test=8, looks=1, grid=(-6, -5))
KINDS = ("gaussian noise", "blur", "contrast")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What the pretrained network's images were normalised with."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut strides and pads with zero channels (option A)."""

    def __init__(self, fan_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, width, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.stride, self.extra = stride, (width - fan_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(out + x)


class ResNet20(nn.Module):
    """For 32x32 images: three stages of three blocks with 16, 32 and 64 channels."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = self._stage(16, 16), self._stage(16, 32), self._stage(32, 64)
        self.linear = nn.Linear(64, classes)

    def _stage(self, fan_in: int, width: int) -> nn.Sequential:
        first = BasicBlock(fan_in, width, 1 if fan_in == width else 2)
        return nn.Sequential(first, BasicBlock(width, width, 1), BasicBlock(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = self.linear(x.mean((2, 3)))
        return out


def corrupt(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (RGB in 0 to 1, ``[N, 3, H, W]``) in one of ``KINDS``, drawn at random: noise of standard deviation
    0.15, a Gaussian blur of 1.2 pixels, or a fifth of the contrast."""
    kind = torch.randint(len(KINDS), (len(images), 1, 1, 1), generator=generator)
    noisy = images + 0.15 * torch.randn(images.shape, generator=generator)
    taps = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / (2 * 1.2**2))
    kernel = (torch.outer(taps, taps) / taps.sum() ** 2).expand(3, 1, 7, 7)
    blurred = F.conv2d(F.pad(images, (3, 3, 3, 3), mode="reflect"), kernel, groups=3)
    mean = images.mean((1, 2, 3), keepdim=True)
    faint = mean + 0.2 * (images - mean)
    return torch.where(kind == 0, noisy, torch.where(kind == 1, blurred, faint)).clamp(0, 1)


def problem(args: argparse.Namespace, settings: Settings) -> Problem:
    model = ResNet20()
    model.load_state_dict(load_file(args.data_root / "resnet20_cifar10.safetensors"), strict=False)  # no counters there
    model.eval()  # running statistics stay as they were learned: examples do not act on each other
    data = cifar10(args.data_root, settings.train + settings.validation, settings.test)
    pixels = torch.cat([data.x, data.x_test]).unflatten(1, (3, 32, 32)) * _column(CIFAR10_STD) + _column(CIFAR10_MEAN)
    x = (corrupt(pixels, torch.Generator().manual_seed(0)) - _column(MEAN)) / _column(STD)
    pairs = split(x, torch.cat([data.y, data.y_test]), settings)
    note = f"CIFAR-10 ({data.source}), each image with one of: {', '.join(KINDS)}; {settings.train} images to train on."
    return Problem(model, lambda m: [*m.layer1, *m.layer2, *m.layer3], *pairs, note, "linear")


def _column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)
