"""The networks that the experiments train."""

from __future__ import annotations

from torch import nn


def relu_mlp(width: int, depth: int = 3, *, inputs: int = 40, classes: int = 10) -> nn.Sequential:
    """`depth` hidden ReLU layers of `width` units and a linear head, with torch's default initialisation."""
    layers: list[nn.Module] = []
    for fan_in in [inputs] + [width] * (depth - 1):
        layers += [nn.Linear(fan_in, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))
