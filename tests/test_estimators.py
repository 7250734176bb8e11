"""Every registered estimator against its own declaration: mean, determinism, dtypes, and that none is another's
alias."""

import itertools
from functools import cache

import pytest
import torch
from torch import Tensor

from guessopt import GuessGradOptimizer, WPerp
from guessopt.diagnostics import cosine, estimated_gradient, expected_gradient, true_gradient
from guessopt.estimators import estimator_names, make_estimator

from .problems import build

#: Rows: a readable id, and what is handed to the optimizer. A new estimator is one more row.
ESTIMATORS: dict[str, dict[str, object]] = {
    "directional_descent": {"name": "directional_descent"},
    "directional_descent, rademacher": {"name": "directional_descent", "noise": "rademacher"},
    "directional_descent, scaled": {"name": "directional_descent", "scaled": True},
    "directional_descent, uniform": {"name": "directional_descent", "noise": "uniform"},
    "activation_perturbation": {"name": "activation_perturbation"},
    "activation_perturbation, uniform": {"name": "activation_perturbation", "noise": "uniform"},
    "activation_perturbation, masked": {"name": "activation_perturbation", "masked": True},
    "activation_perturbation, uniform_centred": {"name": "activation_perturbation", "noise": "uniform_centred"},
    "w_transpose": {"name": "w_transpose"},
    "w_transpose, rademacher": {"name": "w_transpose", "noise": "rademacher"},
    "w_perp": {"name": "w_perp", "k": 2},
    "w_perp, bottom": {"name": "w_perp", "k": 2, "select": "bottom"},
    "w_perp, masked": {"name": "w_perp", "k": 2, "basis": "masked"},
    "w_perp, example": {"name": "w_perp", "k": 2, "basis": "example"},
    "w_perp, example, bottom": {"name": "w_perp", "k": 2, "basis": "example", "select": "bottom"},
    "w_perp_ns": {"name": "w_perp_ns", "k": 2},
    "w_perp_ns, example": {"name": "w_perp_ns", "k": 2, "basis": "example"},
    "w_transpose, power 2": {"name": "w_transpose", "power": 2.0},
    "w_preconditioned": {"name": "w_preconditioned"},
    "w_preconditioned, shared": {"name": "w_preconditioned", "basis": "shared"},
    "downstream": {"name": "downstream"},
    "downstream, l 2": {"name": "downstream", "l": 2},
    "self_sharpening": {"name": "self_sharpening"},
    "learned_feedback": {"name": "learned_feedback", "gamma": 1},
    "auto": {"name": "auto"},  # Downstream on these narrow networks
    "auto, k 1": {"name": "auto", "k": 1},
    "activation_mixing": {"name": "activation_mixing"},
    "activation_mixing, raw": {"name": "activation_mixing", "normalise": False},
}
#: No closed form: its formula is checked against a slow reference in test_estimator_formulas.py.
UNDECLARED = ("activation_mixing",)
DECLARED = [name for name in ESTIMATORS if name not in UNDECLARED]
PROBLEMS = ["mlp", "gelu mlp", "cnn", "residual, batch norm in eval mode", "transformer", "functional", "prompts",
            "rotary language model"]  # fmt: skip
#: Draws, and guesses whose mean is one draw. On the MLP the statistics also tell estimators apart.
DRAWS = {"mlp": (64, 32)}
DRAWS_ELSEWHERE = (20, 12)


def test_every_registered_estimator_is_a_row() -> None:
    shipped = {name for name in estimator_names() if type(make_estimator(name)).__module__.startswith("guessopt.")}
    assert shipped == {row["name"] for row in ESTIMATORS.values()}


@cache
def sampled(problem: str, estimator: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Draws ``[J, ...]`` of every tensor's estimate, the declared expectation, and the true gradient."""
    made = build(problem)
    spec = make_estimator(ESTIMATORS[estimator])
    draws, guesses = DRAWS.get(problem, DRAWS_ELSEWHERE)
    if spec.learns:  # its guesses do not share a pass
        draws, guesses = 4 * draws, 1
    opt = GuessGradOptimizer(made.named, torch.optim.SGD, spec, lr=0.1, seed=1, guesses=guesses)
    for _ in range(20 if spec.learns else 0):
        opt.estimate(made.closure)  # the draws then share what has been learned
    estimates = [estimated_gradient(opt, made.closure) for _ in range(draws)]
    stacked = {name: torch.stack([each[name] for each in estimates]) for name in estimates[0]}
    return stacked, expected_gradient(opt, made.closure), true_gradient(opt, made.closure)


def ratio(draws: Tensor, expected: Tensor, along: Tensor) -> tuple[float, float]:
    """``<mean g^, a> / <E, a>`` and its standard error, over draws; a = E gives the statistic of the contract."""
    each = (draws * along).reshape(len(draws), -1).sum(1) / (expected * along).sum()
    return float(each.mean()), float(each.std() / len(each) ** 0.5)


#: These run on fewer problems, for the time it takes: variants, and what adds no case of its own elsewhere.
EVERY_ESTIMATOR = ("mlp", "cnn", "transformer")
FEWER = ("example", "power", "l 2", "preconditioned", "_ns", "mixing")
#: These run on the other problems too; the rest are left for ``-m slow`` there.
PLAIN = ("directional_descent", "activation_perturbation", "w_transpose", "w_perp", "downstream", "learned_feedback")
CASES = [
    pytest.param(problem, name, marks=() if problem in EVERY_ESTIMATOR or name in PLAIN else pytest.mark.slow)
    for problem in PROBLEMS
    for name in DECLARED
    if problem in EVERY_ESTIMATOR or not any(word in name for word in FEWER)
]


@pytest.mark.parametrize(("problem", "estimator"), CASES)
def test_the_mean_is_the_declared_one(problem: str, estimator: str) -> None:
    draws, expected, true = sampled(problem, estimator)
    for name, each in draws.items():
        if not expected[name].any():
            assert float(each.abs().max()) < 1e-12, name  # nothing of the gradient lies in the guess's span
            continue
        for along in (expected[name], true[name]):
            mean, error = ratio(each, expected[name], along)
            assert abs(mean - 1) <= 5 * error + 1e-9, f"{name}: {mean} +- {error}"


@pytest.mark.parametrize("estimator", DECLARED)
def test_what_is_declared_unbiased_expects_the_gradient(estimator: str) -> None:
    _, expected, true = sampled("mlp", estimator)
    unbiased = make_estimator(ESTIMATORS[estimator]).unbiased
    # The span of this one holds W~^T g_{i+1}, which is all of the cotangent on a chain of layers.
    if unbiased or estimator == "w_preconditioned":
        for name, g in true.items():
            torch.testing.assert_close(expected[name], g, rtol=1e-9, atol=1e-12)
    elif "masked" not in estimator or "perp" in estimator:
        assert any(not torch.allclose(expected[name], g, rtol=0.05) for name, g in true.items())


DIFFERENT = [
    ("activation_perturbation", "w_transpose"),
    ("activation_perturbation", "w_perp"),
    ("w_transpose", "activation_perturbation"),
    ("w_transpose", "w_perp"),
    ("w_perp", "w_transpose"),
    ("w_perp", "w_perp, masked"),
    ("w_perp", "w_perp, bottom"),
    ("w_perp, masked", "w_perp"),
    ("w_perp, bottom", "w_perp"),
    ("w_perp, example", "w_perp"),
    ("w_perp, example", "w_perp, masked"),
    ("w_perp, example, bottom", "w_perp, example"),
    ("w_perp_ns", "w_transpose"),
    ("w_transpose, power 2", "w_transpose"),
    ("w_preconditioned", "w_perp"),
    ("w_preconditioned, shared", "w_preconditioned"),
    ("downstream", "w_transpose"),
    ("downstream, l 2", "downstream"),
    ("self_sharpening", "downstream"),
    ("activation_perturbation, uniform", "activation_perturbation"),
    ("activation_mixing, raw", "activation_perturbation"),
    ("activation_mixing, raw", "w_transpose"),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_no_estimator_passes_for_another(one: str, other: str) -> None:
    """The statistics have the power to tell them apart: draws of one fail against the other's declaration."""
    draws, own, true = sampled("mlp", one)
    _, expected, _ = sampled("mlp", other)
    off = []
    for name, each in draws.items():
        for along in (expected[name], true[name], own[name] - expected[name]):
            if (expected[name] * along).sum():
                mean, error = ratio(each, expected[name], along)
                off.append(abs(mean - 1) / max(error, 1e-12))
    assert max(off) > 5


def test_directional_descent_is_no_activation_perturbation() -> None:
    """Both are unbiased; the directional estimate is one number times noise on the parameters, so its mean squared
    cosine with the gradient is 1/P (within 5 standard errors), and the other's is far above."""
    cosines = {}
    for estimator in ("directional_descent", "activation_perturbation"):
        made = build("mlp")
        opt = GuessGradOptimizer(made.named, torch.optim.SGD, estimator, lr=0.1, seed=1)
        draws, true = [estimated_gradient(opt, made.closure) for _ in range(500)], true_gradient(opt, made.closure)
        g = torch.cat([t.flatten() for t in true.values()])
        each = torch.stack([torch.cat([draw[name].flatten() for name in true]) for draw in draws])
        cosines[estimator] = torch.cosine_similarity(each, g[None]).square()
    parameters = len(g)
    directional = cosines["directional_descent"]
    error = float(directional.std()) / len(directional) ** 0.5
    assert abs(float(directional.mean()) - 1 / parameters) < 5 * error
    assert float(cosines["activation_perturbation"].mean()) > 1 / parameters + 5 * error


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_seed_determines_the_estimate(estimator: str) -> None:
    def estimate(seed: int) -> list[Tensor]:
        made = build("cnn")
        opt = GuessGradOptimizer(made.named, torch.optim.SGD, ESTIMATORS[estimator], lr=0.1, seed=seed)
        opt.step(made.closure)  # learned feedback begins with an exact prediction, which no guess has to correct
        return list(estimated_gradient(opt, made.closure).values())

    assert all(torch.equal(a, b) for a, b in zip(estimate(1), estimate(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(estimate(1), estimate(2), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_dtypes(estimator: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).to(dtype)
    x = torch.randn(16, 4, dtype=dtype)
    opt = GuessGradOptimizer(net.parameters(), torch.optim.AdamW, ESTIMATORS[estimator], lr=1e-2)
    before = [p.detach().clone() for p in net.parameters()]
    opt.step(lambda: torch.nn.functional.cross_entropy(net(x), torch.arange(16) % 3))
    for p, old in zip(net.parameters(), before, strict=True):
        assert (
            p.grad is not None and p.grad.dtype is dtype and bool(p.grad.isfinite().all()) and not torch.equal(p, old)
        )


def test_the_last_site_gets_isotropic_noise_or_its_exact_error() -> None:
    for estimator in ESTIMATORS.values():
        made = build("mlp")
        if estimator["name"] == "learned_feedback":  # from the product of weights, exact in so short a network
            estimator = estimator | {"start": "zero"}
        opt = GuessGradOptimizer(made.named, torch.optim.SGD, estimator, exact_last=True, lr=0.1)
        estimate, true = estimated_gradient(opt, made.closure), true_gradient(opt, made.closure)
        if estimator["name"] == "directional_descent":
            continue
        torch.testing.assert_close(estimate["4.weight"], true["4.weight"], rtol=1e-9, atol=1e-12)
        assert not torch.allclose(estimate["0.weight"], true["0.weight"])


@pytest.mark.parametrize("problem", ["mlp", "cnn", "residual, batch norm in eval mode", "transformer", "prompts"])
def test_auto_points_closer_to_the_gradient_than_isotropic_noise(problem: str) -> None:
    """The mean cosine of 30 estimates, by more than 3 standard errors of the difference."""
    made, cosines = build(problem), {}
    for name in ("auto", "activation_perturbation"):
        opt = GuessGradOptimizer(made.named, torch.optim.SGD, name, exact_last=True, lr=0.1, seed=0)
        cosines[name] = torch.tensor([cosine(opt, made.closure).total for _ in range(30)])
    one, other = cosines.values()
    error = float((one.var() + other.var()) / 30) ** 0.5
    assert float(one.mean() - other.mean()) > 3 * error


def test_the_basis_is_refreshed_when_due_and_only_then() -> None:
    made = build("mlp")
    opt = GuessGradOptimizer(made.named, torch.optim.SGD, WPerp(k=2, refresh=3), lr=0.5, seed=0)
    bases = []
    for _ in range(7):
        opt.step(made.closure)
        bases.append([entry["state"][0] for entry in opt.state_dict()["guessopt"]["cache"].values()])
    for site in range(2):
        kept = [bases[t][site] is bases[t + 1][site] for t in range(6)]
        assert kept.count(False) == 2 and not any(a is b is False for a, b in itertools.pairwise(kept))


def test_more_guesses_average() -> None:
    """K guesses: the same mean, a K-th of the variance (a ratio of sample variances; bounds from its
    standard error)."""
    made = build("mlp")
    spread = {}
    for k in (1, 4):
        opt = GuessGradOptimizer(made.named, torch.optim.SGD, "activation_perturbation", guesses=k, lr=0.1, seed=5)
        draws = torch.stack([estimated_gradient(opt, made.closure)["0.weight"].flatten() for _ in range(400)])
        spread[k] = draws.var(0).sum()
    assert 2.5 < float(spread[1] / spread[4]) < 6.5
