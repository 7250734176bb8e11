"""Layers whose weights are kept in 8 or 4 bits, by the libraries that people use for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def torchao(layers: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(layers, Int8WeightOnlyConfig())


def bitsandbytes(bits: int) -> Callable[[nn.Module], None]:
    def quantise(layers: nn.Module) -> None:
        import bitsandbytes as bnb

        for parent in list(layers.modules()):
            for name, linear in list(parent.named_children()):
                if not isinstance(linear, nn.Linear):
                    continue
                sizes, weight = (linear.in_features, linear.out_features), linear.weight.data
                small: Any
                if bits == 4:
                    small = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
                    small.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
                else:
                    small = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
                    small.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
                setattr(parent, name, small.to("cpu"))

    return quantise
