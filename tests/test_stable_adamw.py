"""StableAdamW (Wortsman et al. 2023), from torch-optimi, works as a base without changes."""

import copy

import pytest
import torch
from torch import Tensor, nn

from guessopt import GuessGradOptimizer, SelfSharpening

optimi = pytest.importorskip("optimi")


def test_a_step_is_adamw_with_its_rate_over_the_update_s_rms() -> None:
    """Two steps by hand; the second gradient is 50 times the first, so that its update is clipped."""
    p, torque = nn.Parameter(torch.randn(4, 3)), torch.randn(4, 3)
    scale = [1.0, 50.0]
    opt = GuessGradOptimizer(
        [p],
        base=optimi.StableAdamW,
        estimator="directional_descent",
        lr=0.1,
        betas=(0.9, 0.99),
        weight_decay=0.2,
        seed=0,
    )
    expected, m, v, rates = p.detach().clone(), torch.zeros(4, 3), torch.zeros(4, 3), []
    for t in (1, 2):
        opt.step(lambda: (scale[t - 1] * torque * p).sum())  # noqa: B023 (called here)
        g = p.grad
        assert g is not None
        m = 0.9 * m + 0.1 * g
        v = 0.99 * v + 0.01 * g * g
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.99**t)
        rms = (g * g / v_hat.clamp_min(1e-12)).mean().sqrt()
        rates.append(0.1 / max(1.0, float(rms)))
        expected = (1 - rates[-1] * 0.2) * expected - rates[-1] * m_hat / (v_hat.sqrt() + 1e-6)
        torch.testing.assert_close(p.detach(), expected)
    assert rates[0] == pytest.approx(0.1) and rates[1] < 0.09


def test_it_trains_by_groups_and_resumes_bit_for_bit() -> None:
    x, y = torch.randn(32, 8), torch.arange(32) % 2

    def made() -> tuple[nn.Sequential, GuessGradOptimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 1e-3}]
        return net, GuessGradOptimizer(groups, optimi.StableAdamW, SelfSharpening(), lr=1e-2, seed=0)

    def losses(net: nn.Module, opt: GuessGradOptimizer, steps: int) -> list[Tensor]:
        return [opt.step(lambda: nn.functional.cross_entropy(net(x), y)) for _ in range(steps)]

    net, opt = made()
    first = losses(net, opt, 10)
    saved = copy.deepcopy((net.state_dict(), opt.state_dict()))
    rest = losses(net, opt, 30)
    assert rest[-1] < first[0]
    net, opt = made()
    net.load_state_dict(saved[0])
    opt.load_state_dict(saved[1])
    assert losses(net, opt, 30) == rest
