"""Fits the Newton-Schulz polynomials of ``WPerpNS``: ``python -m benchmarks.newton_schulz [--quick]``.

For each ``sigma_k`` = 0.1, ..., 0.9 an odd polynomial of degree seven, ``p(x) = a x + b x^3 + c x^5 + d x^7``, is
fitted so that five compositions of it come near the step that is 0 on ``[0, sigma_k]`` and 1 on ``(sigma_k, 1]`` (Wang
3.2 and 4.2: "via gradient descent"; their N and coefficients are not given). What is fitted is the whole composition,
in the mean square, on ``[0, 1.02]``: a spectral norm that is estimated a little too low must not blow up.

Gradient descent finds many local minima, so a few hundred starts run side by side; the best is kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

COMPOSITIONS = 5
STEPS = tuple(k / 10 for k in range(1, 10))
#: The fitted range ends a little beyond the largest singular value.
END = 1.02
#: Half-width of the ramp around the step that no smooth function can follow; left out of the maximum error.
MARGIN = 0.05
OUT = Path(__file__).parent.parent / "guessopt" / "estimators" / "newton_schulz.json"


def compose(coefficients: Tensor, x: Tensor) -> Tensor:
    """``p(p(...p(x)))`` for coefficients ``[R, 4]`` and points ``[X]``: ``[R, X]``. Kept from overflowing."""
    a, b, c, d = coefficients[:, :, None].unbind(1)
    for _ in range(COMPOSITIONS):
        x2 = x * x
        x = (x * (a + x2 * (b + x2 * (c + x2 * d)))).clamp(-3, 3)
    return x


def starts(step: float, count: int, generator: torch.Generator) -> Tensor:
    """Polynomials with ``p(t) = t``, ``p(1) = 1``, ``p'(1) = 0`` and a random slope above 1 at ``t``, shaken; ``[R,
    4]``."""
    found = []
    powers = torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.float64)
    for _ in range(count):
        t = step + 0.05 * float(torch.rand((), generator=generator))
        slope = 1 + 2 * float(torch.rand((), generator=generator))
        rows = [t**powers, torch.ones(4, dtype=torch.float64), powers, powers * t ** (powers - 1)]
        right = torch.tensor([t, 1.0, 0.0, slope], dtype=torch.float64)
        found.append(torch.linalg.solve(torch.stack(rows), right))
    shaken = torch.stack(found)
    return shaken * (1 + 0.05 * torch.randn(shaken.shape, dtype=torch.float64, generator=generator))


def fit(step: float, *, count: int = 256, iterations: int = 3000, seed: int = 0) -> tuple[list[float], float, float]:
    """The best coefficients, their root mean square error, and their largest error off the ramp."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(0, END, 511, dtype=torch.float64)
    target = (x > step).double()
    coefficients = starts(step, count, generator).requires_grad_()
    adam = torch.optim.Adam([coefficients], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, iterations)
    best, best_loss = coefficients.detach()[0].clone(), float("inf")
    for _ in range(iterations):
        adam.zero_grad()
        losses = (compose(coefficients, x) - target).square().mean(1)
        lowest = int(losses.argmin())
        if (loss := float(losses[lowest].detach())) < best_loss:
            best, best_loss = coefficients.detach()[lowest].clone(), loss
        losses.sum().backward()
        with torch.no_grad():
            g = coefficients.grad
            assert g is not None
            g.div_(g.norm(dim=1, keepdim=True).clamp_min(1.0))
        adam.step()
        schedule.step()
    error = (compose(best[None], x)[0] - target).abs()
    return best.tolist(), best_loss**0.5, float(error[(x - step).abs() > MARGIN].max())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer starts and iterations; writes nothing")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    size = {"count": 16, "iterations": 100} if options.quick else {}
    fitted = []
    for step in STEPS:
        coefficients, rms, largest = fit(step, **size)
        print(f"sigma_k {step:.1f}: rms error {rms:.3f}, max {largest:.3f} beyond {MARGIN} of the step", flush=True)
        fitted.append({"sigma_k": step, "coefficients": coefficients, "rms_error": rms, "max_error": largest})
    if not options.quick:
        data = {"compositions": COMPOSITIONS, "made_by": "python -m benchmarks.newton_schulz", "polynomials": fitted}
        options.out.write_text(json.dumps(data, indent=1) + "\n")
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
