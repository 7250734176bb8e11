"""Truncated bases are orthonormal and hold nearly all the energy, also where singular values almost coincide."""

import pytest
import torch
from torch import Tensor

from guessopt.linalg import conjugate_gradients, masked_right_basis, refined_right_basis, right_singular_basis

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
    """A hard case: at initialisation the spectrum has almost no gap. At most 0.5% of the energy of the exact top 10
    is lost."""
    torch.manual_seed(0)
    w = torch.nn.Linear(256, 256).weight.detach()[None]
    rows = right_singular_basis(w, 20)
    moved = w + drift * torch.nn.Linear(256, 256).weight.detach()
    refreshed = refined_right_basis(moved, rows)[:, :10]
    assert energy(moved, refreshed) > 1 - (5e-3 if drift < 0.5 else 5e-2)
    torch.testing.assert_close(refreshed @ refreshed.mT, torch.eye(10)[None], rtol=0, atol=1e-5)


@pytest.mark.parametrize("active", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_a_basis_per_example_captures_the_energy_of_the_exact_one(width: int, active: float) -> None:
    """A hard case: the spectrum has almost no gap. At most 0.5% of the energy of the exact top 10 is lost."""
    torch.manual_seed(0)
    w = torch.nn.Linear(width, width).weight.detach()
    m = (torch.rand(6, width) < active).float()
    rows = masked_right_basis(w, m, right_singular_basis(w[None], 20)[0], 10)
    exact = torch.linalg.svdvals(w * m[:, None])[:, :10].square().sum(1)
    captured = ((w * m[:, None]) @ rows.mT).square().sum((1, 2))
    assert float((captured / exact).min()) > 1 - 5e-3
    torch.testing.assert_close(rows @ rows.mT, torch.eye(10).expand(6, 10, 10), rtol=0, atol=1e-4)
    assert float((rows * (1 - m[:, None])).abs().max()) == 0


SPECTRA = {
    "geometric": 0.8 ** torch.arange(128.0),
    "steep": 0.5 ** torch.arange(128.0),
    "harmonic": 1 / (1 + torch.arange(128.0)),
    "three spikes": torch.cat([torch.full((3,), 100.0), torch.linspace(2, 0, 125)]),
    "condition 1e4": torch.logspace(0, -4, 128),
    "ten spikes": torch.cat([torch.linspace(100, 10, 10), torch.linspace(2, 0, 118)]),
}


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("smooth", [False, True])
def test_a_basis_per_example_of_a_matrix_with_gaps(spectrum: Tensor, smooth: bool) -> None:
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(128, 128))[0] for _ in range(2))
    w = (u * spectrum) @ v.T
    m = torch.rand(6, 128) if smooth else (torch.rand(6, 128) < 0.5).float()
    rows = masked_right_basis(w, m, right_singular_basis(w[None], 20)[0], 10)
    exact = torch.linalg.svdvals((w * m[:, None]).double())[:, :10].square().sum(1)
    captured = ((w * m[:, None]) @ rows.mT).double().square().sum((1, 2))
    assert float((captured / exact).min()) > 1 - 5e-3
    torch.testing.assert_close(rows @ rows.mT, torch.eye(10).expand(6, 10, 10), rtol=0, atol=1e-3)


@pytest.mark.parametrize("k", [1, 10, 25])
@pytest.mark.parametrize("width", [64, 128, 512])
def test_a_basis_per_example_of_unequal_weights(width: int, k: int) -> None:
    """The weights are GELU's derivatives: hardly any is 0, some are above 1."""
    torch.manual_seed(0)
    w = torch.nn.Linear(width, width).weight.detach()
    x = torch.randn(12, width, requires_grad=True)
    (m,) = torch.autograd.grad(torch.nn.functional.gelu(x).sum(), x)
    m[0, : width // 2] = 0
    rows = masked_right_basis(w, m, right_singular_basis(w[None], k + 10)[0], k)
    exact = torch.linalg.svdvals(w * m[:, None])[:, :k].square().sum(1)
    captured = ((w * m[:, None]) @ rows.mT).square().sum((1, 2))
    assert float((captured / exact).min()) > 1 - 5e-3
    torch.testing.assert_close(rows @ rows.mT, torch.eye(k).expand(12, k, k), rtol=0, atol=1e-4)
    assert float(rows[0, :, : width // 2].abs().max()) == 0


@pytest.mark.parametrize("rank", [0, 3, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_basis_per_example_where_fewer_units_are_active_than_in_the_others(rank: int, dtype: torch.dtype) -> None:
    """Rows are orthonormal, no more than active units, and hold all the energy; also for weights of low rank."""
    torch.manual_seed(0)
    w = (torch.randn(96, rank, dtype=dtype) @ torch.randn(rank, 96, dtype=dtype)) if rank else torch.zeros(96, 96)
    w, counts = w.to(dtype), torch.tensor([60, 12, 4, 1, 0])
    m = (torch.arange(96) < counts[:, None]).to(dtype)
    rows = masked_right_basis(w, m, right_singular_basis(w[None], 20)[0], 10)
    assert rows.dtype is dtype
    squares = rows.square().sum(-1)
    assert bool(((squares - 1).abs().minimum(squares) < 1e-4).all())
    assert bool((squares.sum(1) < counts.clamp(max=10) + 1e-3).all())
    off = (rows @ rows.mT).masked_fill(torch.eye(10, dtype=torch.bool), 0)
    assert float(off.abs().max()) < 1e-4
    exact = torch.linalg.svdvals(w * m[:, None])[:, :10].square().sum(1)
    assert bool((((w * m[:, None]) @ rows.mT).square().sum((1, 2)) >= exact * (1 - 5e-3)).all())


@pytest.mark.parametrize("shape", [(10, 64), (64, 10), (40, 64), (64, 40)], ids=str)
def test_a_basis_per_example_with_hardly_any_active_units(shape: tuple[int, int]) -> None:
    """With fewer than k active units the rows beyond the rank are zero; without any, all rows are."""
    torch.manual_seed(0)
    w = torch.randn(shape)
    m = torch.zeros(3, shape[1])
    m[1, :3] = m[2, 2] = 1
    rows = masked_right_basis(w, m, right_singular_basis(w[None], 20)[0], 10)
    squares = rows.square().sum(-1)
    torch.testing.assert_close(squares.sum(1), torch.tensor([0.0, 3.0, 1.0]), rtol=0, atol=1e-3)


def test_conjugate_gradients_solve_many_systems() -> None:
    torch.manual_seed(0)
    half = torch.randn(5, 8, 6, dtype=torch.float64)
    a = half @ half.mT  # rank 6 of 8
    y = (a @ torch.randn(5, 8, 1, dtype=torch.float64))[..., 0]
    y[2] = 0
    found = conjugate_gradients(lambda v: (a @ v[..., None])[..., 0], y, lambda t: t.sum(-1, keepdim=True))
    torch.testing.assert_close(found, (torch.linalg.pinv(a, rtol=1e-9) @ y[..., None])[..., 0], rtol=1e-6, atol=1e-8)
