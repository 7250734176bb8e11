"""Truncated bases: orthonormal, and rich enough in energy, also where singular values almost coincide."""

import pytest
import torch
from torch import Tensor

from guessopt.linalg import refined_right_basis, right_singular_basis

SHAPES = {
    "tall": (1, 40, 24),
    "wide": (1, 24, 40),
    "square": (1, 64, 64),
    "grouped": (3, 8, 12),
    "before a head": (1, 4, 64),
}


def energy(w: Tensor, rows: Tensor) -> float:
    return float((w @ rows.mT).square().sum() / torch.linalg.svdvals(w)[..., : rows.shape[1]].square().sum())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_top_basis(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w = torch.randn(shape, dtype=dtype)
    rows = right_singular_basis(w, 6)
    k = min(6, *shape[1:])
    torch.testing.assert_close(rows @ rows.mT, torch.eye(k, dtype=dtype).expand(shape[0], k, k), rtol=0, atol=1e-5)
    assert energy(w, rows) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bottom_basis_lies_where_the_matrix_is_smallest(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    w = torch.randn(shape, dtype=torch.float64)
    rows = right_singular_basis(w, 3, smallest=True)
    values = torch.linalg.svdvals(w)
    padded = torch.cat([values, values.new_zeros(shape[0], max(shape[2] - shape[1], 0))], -1)
    torch.testing.assert_close(
        (w @ rows.mT).square().sum((1, 2)), padded[:, -3:].square().sum(1), rtol=1e-9, atol=1e-12
    )


def test_a_rank_deficient_matrix_still_gives_an_orthonormal_basis() -> None:
    for w in (torch.zeros(1, 5, 8), torch.ones(1, 5, 8), torch.zeros(1, 8, 5)):
        rows = right_singular_basis(w, 4)
        torch.testing.assert_close(rows @ rows.mT, torch.eye(4)[None], rtol=0, atol=1e-5)


@pytest.mark.parametrize("drift", [0.01, 0.1, 0.5])
def test_a_refreshed_basis_captures_the_energy_of_the_moved_weights(drift: float) -> None:
    """At initialisation the spectrum has almost no gap: a hard case. The bar is 0.5% of the energy of the exact top
    10."""
    torch.manual_seed(0)
    w = torch.nn.Linear(256, 256).weight.detach()[None]
    rows = right_singular_basis(w, 20)
    moved = w + drift * torch.nn.Linear(256, 256).weight.detach()
    refreshed = refined_right_basis(moved, rows)[:, :10]
    assert energy(moved, refreshed) > 1 - (5e-3 if drift < 0.5 else 5e-2)
    torch.testing.assert_close(refreshed @ refreshed.mT, torch.eye(10)[None], rtol=0, atol=1e-5)
