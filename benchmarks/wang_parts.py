"""Tables and figures of Wang et al. 2025: their methods, their figures, and the runs that ours are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from benchmarks.methods import METHODS as TABLE
from benchmarks.methods import Method
from benchmarks.training import History

_OWN = {name: TABLE[name] for name in ("backprop", "activation_perturbation", "w_transpose", "w_preconditioned")}
#: The paper's W-perp has one basis for each example. The package's default is one basis that all examples share.
METHODS: dict[str, Method] = {
    **_OWN,
    "directional_descent": TABLE["directional_descent"].variant("weight perturbation"),
    "w_perp": TABLE["w_perp_example"].variant("W-perp k=10"),
    # k is the width. For a square W the image of (W M)^T is that of M, so all of V, masked, has the same law and needs
    # no bases of the examples. (Before the narrower head the shared rows are masked, not orthonormal.)
    "w_perp_rank": TABLE["w_perp"].variant("W-perp k=rank"),
    "w_perp_25": TABLE["w_perp_example_25"].variant("W-perp k=25"),
    "w_perp_1": TABLE["w_perp_example_1"].variant("W-perp k=1"),
    "w_perp_bottom": TABLE["w_perp_bottom"].variant("W-perp bottom"),
    "w_perp_ns": TABLE["w_perp_ns_example"].variant("W-perp-NS"),
    "w_perp_shared": TABLE["w_perp"].variant("W-perp shared k=10"),
    "w_perp_ns_shared": TABLE["w_perp_ns"].variant("W-perp-NS shared"),
}
"""By the names that the JSON has."""
SLOW = ("w_perp_ns",)
"""Run only if ``--methods`` names it: the paper's form, a Newton-Schulz product per example (2 h at width 128)."""
LABELS = {name: own.label for name, own in METHODS.items()}
WIDTHS = (64, 128, 256, 512)


@dataclass(frozen=True)
class Part:
    """A table or figure; ``measured``: it needs measurements during the training."""

    title: str
    widths: tuple[int, ...]
    methods: tuple[str, ...]
    measured: bool = False


_PAPER_METHODS = ("directional_descent", "activation_perturbation", "w_transpose", "w_perp", "backprop")
PARTS = {
    "1": Part(
        "Table 1: train accuracy by k", (128,), ("w_transpose", "w_perp_rank", "w_perp_25", "w_perp", "w_perp_1")
    ),
    "2": Part(
        "Table 2: layer 1 along each method's own trajectory", (128,), ("w_transpose", "w_perp_bottom", "w_perp"), True
    ),
    "3": Part("Table 3: train accuracy by width", WIDTHS, (*_PAPER_METHODS, "w_perp_shared")),
    "4": Part(
        "Table 4: accuracy and time",
        (512, 128),
        ("w_perp_ns", "w_perp", "w_transpose", "w_perp_ns_shared", "w_perp_shared"),
    ),
    "5": Part(
        "Table 5: layer 1 along each method's own trajectory",
        (256,),
        ("w_perp", "w_preconditioned", "w_transpose"),
        True,
    ),
    "figure1": Part("Figure 1: overlap of the gradient with the top k directions", (128, 512), ("w_perp",), True),
    "figure2": Part("Figure 2: train accuracy by width", WIDTHS, (*_PAPER_METHODS, "w_perp_shared")),
}
PAPER_1 = {"w_transpose": 0.312, "w_perp_rank": 0.311, "w_perp_25": 0.323, "w_perp": 0.324, "w_perp_1": 0.275}
# Variance (18), bias (17) and covariance norm of layer 1, in Tables 2 and 5 (the latter has no norm).
PAPER_MOMENTS: dict[str, dict[str, tuple[float, ...]]] = {
    "2": {
        "w_transpose": (1.50e-4, 2.75e-4, 0.084),
        "w_perp_bottom": (1.30e-5, 2.83e-4, 0.085),
        "w_perp": (1.03e-5, 2.86e-5, 0.085),
    },
    "5": {"w_perp": (6.33e-6, 3.63e-5), "w_preconditioned": (1.75e-4, 1.35e-8), "w_transpose": (7.04e-5, 1.68e-4)},
}
PAPER_5 = {"w_perp": (0.433, 0.383), "w_preconditioned": (0.367, 0.314), "w_transpose": (0.375, 0.316)}
PAPER_4 = {
    (512, "w_perp_ns"): (0.594, 0.477, "6 h"),
    (512, "w_perp"): (0.581, 0.498, "40 h"),
    (512, "w_transpose"): (0.486, 0.438, "26 min"),
    (128, "w_perp_ns"): (0.326, 0.291, "9 min"),
    (128, "w_perp"): (0.324, 0.283, "1 h"),
    (128, "w_transpose"): (0.312, 0.277, "5 min"),
}
LAYER_1 = "0.weight"
LAYERS = ("0.weight", "2.weight", "4.weight")


@dataclass(frozen=True)
class Look:
    """Measurements at one moment of a training run, on a fixed batch, by layer.

    Attributes:
        variance: Wang eq. 18 as its text has it; ``variance_of_mean``: as its formula has it (see
            ``diagnostics.Variance``).
        bias: eq. 17; ``relative_bias``: the bias over the norm of the mean gradient.
        overlap: eq. 19 for k = 1, 2, ...
    """

    epoch: int
    variance: dict[str, float]
    variance_of_mean: dict[str, float]
    bias: dict[str, float]
    relative_bias: dict[str, float]
    covariance_norm: dict[str, float]
    overlap: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        seconds: of the updates alone, as ``training.Outcome`` has them; None: not measured.
        looks: measurements during the training.
    """

    width: int
    method: str
    seed: int
    history: History
    seconds: float | None
    looks: list[Look] = field(default_factory=list)

    @property
    def key(self) -> tuple[int, str, int]:
        return self.width, self.method, self.seed


def of(cells: Iterable[Cell], width: int, method: str) -> list[Cell]:
    return [cell for cell in cells if (cell.width, cell.method) == (width, method)]
