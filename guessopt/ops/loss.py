"""Losses with the network's last layer in them: functions, and names of ``torch.autograd.Function``s (Liger's)."""

from __future__ import annotations

import torch.nn.functional as F

from guessopt.ops.base import Op, register

register(
    Op(
        (
            *([F.linear_cross_entropy] if hasattr(F, "linear_cross_entropy") else []),
            *("LinearCrossEntropyFunction", "FusedLinearCrossEntropyFunction"),
            *("LigerFusedLinearCrossEntropyFunction", "LigerFusedLinearJSDFunction"),
        ),
        is_loss=True,
    )
)
