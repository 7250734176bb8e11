"""Each diagnostic against a slow reference: explicit matrices of a small float64 MLP, one example at a time."""

import csv
import itertools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import ActivationPerturbation, GuessGradOptimizer, LearnedFeedback, WPerp, WTranspose
from guessopt import diagnostics as d
from guessopt.estimators import make_estimator

from .problems import Problem, build, labels

EVERY: dict[str, Callable[[GuessGradOptimizer, d.Closure], Any]] = {
    **d.METRICS,
    "true_gradient": d.true_gradient,
    "true_cotangents": d.true_cotangents,
    "estimated_gradient": d.estimated_gradient,
    "cosine_matched": lambda opt, closure: d.CosineMatched(0.5).gradient(opt, closure),
}


class Mlp:
    """4-6-5-3 with ReLU; ``g[i]``, ``m[i]``: cotangents and masks by layer; ``w[i]``: weights; of 7 examples."""

    def __init__(self, estimator: Any = "w_transpose", **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
        self.x = torch.randn(7, 4, dtype=torch.float64)
        self.opt = GuessGradOptimizer(self.model.named_parameters(), torch.optim.SGD, estimator, lr=0.1, **options)
        self.w = [self.model[k].weight.detach() for k in (0, 2, 4)]
        s, inputs = [], [self.x]
        for k in (0, 2, 4):
            s.append(self.model[k](inputs[-1]))
            s[-1].retain_grad()
            inputs.append(F.relu(s[-1]))
            inputs[-1].retain_grad()
        F.cross_entropy(s[-1], labels(7, 3)).backward()
        self.g = [t.grad for t in s]
        self.m = [(t > 0).double() for t in s]
        self.inputs = inputs
        self.true = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        self.model.zero_grad()

    def closure(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), labels(7, 3))

    def jacobian(self, i: int, n: int) -> Tensor:
        """``W~ = W_{i+1} M_n``."""
        return self.w[i + 1] @ torch.diag(self.m[i][n])

    def covariance(self, i: int, n: int, name: str) -> Tensor:
        size = self.g[i].shape[1]
        if i == 2 or name == "activation_perturbation":
            return torch.eye(size, dtype=torch.float64)
        if name == "w_transpose":
            return self.jacobian(i, n).T @ self.jacobian(i, n)
        v = torch.linalg.svd(self.w[i + 1])[2][:2].T  # w_perp, k = 2, shared
        return torch.diag(self.m[i][n]) @ v @ v.T @ torch.diag(self.m[i][n])

    def variances(self, i: int, name: str) -> tuple[float, float]:
        """Wang eq. 18 in closed form for normal guesses, with the square inside and outside of the mean.

        ``g^ = D y``, ``D = <g, y> + rest``: ``E g^ g^^T = (g^T C g) C + 2 C g g^T C + Var(rest) C``.
        """
        inside = torch.tensor(0.0)
        outside = torch.tensor(0.0)
        for n in range(7):
            c, g = self.covariance(i, n, name), self.g[i][n]
            rest = sum(self.g[j][n] @ self.covariance(j, n, name) @ self.g[j][n] for j in range(3) if j != i)
            second = (g @ c @ g + rest) * c + 2 * torch.outer(c @ g, c @ g)
            spread = torch.trace(second) - (c @ g).square().sum()
            inside = inside + spread / 7
            outside = outside + spread / 49  # examples are guessed independently
        return float(inside), float(outside)


SITES = ["0.weight", "2.weight", "4.weight"]
NAMES = ["activation_perturbation", "w_transpose", "w_perp"]


def spec(name: str) -> Any:
    return WPerp(k=2) if name == "w_perp" else name


# --- gradients and cosines --------------------------------------------------------------------------------------------


def test_cotangents_and_gradients_are_autograds() -> None:
    mlp = Mlp()
    found = d.true_cotangents(mlp.opt, mlp.closure)
    assert list(found) == SITES
    for name, g in zip(SITES, mlp.g, strict=True):
        torch.testing.assert_close(found[name], g)
    for name, g in d.true_gradient(mlp.opt, mlp.closure).items():
        torch.testing.assert_close(g, mlp.true[name])


def test_cosine_per_site_and_parameter() -> None:
    mlp = Mlp("activation_perturbation", seed=3)
    found = d.cosine(mlp.opt, mlp.closure)
    again = Mlp("activation_perturbation", seed=3)
    estimate = d.estimated_gradient(again.opt, again.closure)
    for name, value in found.per_parameter.items():
        expected = torch.cosine_similarity(estimate[name].flatten(), mlp.true[name].flatten(), dim=0)
        assert value == pytest.approx(float(expected), rel=1e-9)
    # A bias's gradient is the sum of the cotangents: the estimate at a site and that of its bias come from one draw.
    assert list(found.per_site) == SITES
    flat = [torch.cat([t[name].flatten() for name in mlp.true]) for t in (estimate, mlp.true)]
    assert found.total == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)), rel=1e-9)
    exact = Mlp(exact_last=True)
    assert d.cosine(exact.opt, exact.closure).per_site["4.weight"] == pytest.approx(1)


def test_cosine_of_several_guesses_rises_and_is_of_their_mean() -> None:
    few, many = (Mlp("activation_perturbation", guesses=k, seed=0) for k in (1, 400))
    assert d.cosine(few.opt, few.closure).per_site["2.weight"] < 0.9
    assert min(d.cosine(many.opt, many.closure).per_site.values()) > 0.6


def test_cosine_by_guesses_saturates_at_the_bias() -> None:
    """The running mean's cosine tends to ``cos(E g^, g)``: 1 for an unbiased estimator, less for a biased one."""
    for name in NAMES:
        mlp = Mlp(spec(name), seed=1)
        expected = d.expected_gradient(mlp.opt, mlp.closure)
        flat = [torch.cat([t[key].flatten() for key in mlp.true]) for t in (expected, mlp.true)]
        limit = float(torch.cosine_similarity(*flat, dim=0))
        found = d.cosine_by_guesses(mlp.opt, mlp.closure, (1, 16, 900))
        assert found.guesses == (1, 16, 900)
        assert abs(found.cosine[-1] - limit) < 0.05
        assert found.cosine[0] < found.cosine[-1]
    with pytest.raises(ValueError, match="at least 1"):
        d.cosine_by_guesses(mlp.opt, mlp.closure, ())


# --- bias, variance, covariance ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_bias(name: str) -> None:
    mlp = Mlp(spec(name))
    found = d.bias(mlp.opt, mlp.closure)
    for i, site in enumerate(SITES):
        off = torch.stack([mlp.covariance(i, n, name) @ mlp.g[i][n] - mlp.g[i][n] for n in range(7)]).mean(0)
        assert found.per_site[site] == pytest.approx(float(off.norm()), rel=1e-9, abs=1e-12)
        assert found.relative[site] == pytest.approx(float(off.norm() / mlp.g[i].mean(0).norm()), rel=1e-9, abs=1e-9)
    squares = sum(
        float((mlp.true[name_] - expected).square().sum())
        for name_, expected in d.expected_gradient(mlp.opt, mlp.closure).items()
    )
    norm = sum(float(g.square().sum()) for g in mlp.true.values())
    assert found.total == pytest.approx((squares / norm) ** 0.5, rel=1e-9, abs=1e-9)
    assert all(found.declared.values()) and found.draws == 0


def test_bias_without_a_declared_moment_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """W^T without its declared second moment: the sampled bias and variance are near the declared ones."""
    mlp = Mlp(seed=2)
    declared, spread = d.bias(mlp.opt, mlp.closure), d.variance(mlp.opt, mlp.closure, 300)
    monkeypatch.setattr(WTranspose, "second_moment", lambda self, state, local, g: None)
    found = d.bias(mlp.opt, mlp.closure, 1000)
    assert found.draws == 1000 and not any(found.declared.values())
    for site in SITES[:2]:
        noise = (spread.of_mean[site] / 1000) ** 0.5
        assert abs(found.per_site[site] - declared.per_site[site]) < 5 * noise
    sampled = d.variance(mlp.opt, mlp.closure, 1000)
    for site in SITES:
        assert abs(sampled.per_site[site] - mlp.variances(SITES.index(site), "w_transpose")[0]) < 5 * max(
            sampled.errors[site], 1e-12
        )


@pytest.mark.parametrize("name", NAMES)
def test_variance_is_that_of_a_normal_guess(name: str) -> None:
    mlp = Mlp(spec(name), seed=4)
    found = d.variance(mlp.opt, mlp.closure, 1000)
    for i, site in enumerate(SITES):
        inside, outside = mlp.variances(i, name)
        assert abs(found.per_site[site] - inside) < 5 * found.errors[site]
        assert abs(found.of_mean[site] - outside) < 5 * found.mean_errors[site]
        assert found.errors[site] < 0.15 * inside  # the test has power
    draws = [d.estimated_gradient(mlp.opt, mlp.closure) for _ in range(1000)]
    expected = d.expected_gradient(mlp.opt, mlp.closure)
    norm = sum(float(g.square().sum()) for g in mlp.true.values())
    each = torch.tensor([sum(float((one[k] - e).square().sum()) for k, e in expected.items()) for one in draws]) / norm
    error = float((each.var() / len(draws)) ** 0.5 + found.total_error)
    assert abs(found.total - float(each.mean())) < 5 * error


@pytest.mark.parametrize("name", NAMES)
def test_covariance_norm(name: str) -> None:
    mlp = Mlp(spec(name))
    exact = d.covariance_norm(mlp.opt, mlp.closure)
    assert exact.entries == {"0.weight": 6, "2.weight": 5, "4.weight": 3}
    for i, site in enumerate(SITES):
        size = mlp.g[i].shape[1]
        norms = [(mlp.covariance(i, n, name) - torch.eye(size)).norm() / size for n in range(7)]
        assert exact.per_site[site] == pytest.approx(float(torch.stack(norms).mean()), rel=1e-9, abs=1e-12)
        probed = d.covariance_norm(mlp.opt, mlp.closure, probes=3000).per_site[site]
        assert probed == pytest.approx(exact.per_site[site], rel=0.05, abs=1e-12)
    first = d.covariance_norm(mlp.opt, mlp.closure, examples=1).per_site["0.weight"]
    assert first == pytest.approx(float((mlp.covariance(0, 0, name) - torch.eye(6)).norm() / 6), abs=1e-12)


def test_the_papers_top_10_at_width_128_by_definition() -> None:
    """``||I_10 - I||_F / 128 = sqrt(118) / 128 = .085`` (Wang Table 2)."""
    model = nn.Sequential(nn.Linear(4, 128), nn.Identity(), nn.Linear(128, 64)).double()
    opt = GuessGradOptimizer(model.named_parameters(), torch.optim.SGD, WPerp(k=10), lr=0.1)
    x = torch.randn(3, 4, dtype=torch.float64)
    found = d.covariance_norm(opt, lambda: model(x).square().mean())
    assert found.per_site["0.weight"] == pytest.approx(118**0.5 / 128)


def test_parameters_that_are_guessed_themselves_have_no_site_figures() -> None:
    mlp = Mlp("directional_descent", seed=0)
    assert d.cosine(mlp.opt, mlp.closure).per_site == {}
    found = d.variance(mlp.opt, mlp.closure, 400)
    assert found.per_site == {} and d.bias(mlp.opt, mlp.closure).per_site == {}
    assert d.covariance_norm(mlp.opt, mlp.closure).per_site == {}
    # E ||D v||^2 = (P + 2) ||g||^2, less ||g||^2
    parameters = sum(p.numel() for p in mlp.model.parameters())
    assert abs(found.total - (parameters + 1)) < 5 * found.total_error


# --- subspaces and spectra --------------------------------------------------------------------------------------------


def test_overlap() -> None:
    mlp = Mlp()
    found = d.overlap(mlp.opt, mlp.closure).per_site
    assert set(found) == {"0.weight", "2.weight"}  # the last site has no W~
    for i, site in enumerate(SITES[:2]):
        for k in range(1, len(found[site]) + 1):
            each = []
            for n in range(7):
                v = torch.linalg.svd(mlp.jacobian(i, n))[2][:k].T
                g = mlp.g[i][n]
                each.append(float((v @ v.T @ g).norm() / g.norm()))
            assert found[site][k - 1] == pytest.approx(sum(each) / 7, rel=1e-9)
        assert found[site][-1] == pytest.approx(1)  # the gradient lies in the image of W~^T
        assert len(found[site]) == min(mlp.w[i + 1].shape)
    first = d.overlap(mlp.opt, mlp.closure, examples=1).per_site["0.weight"][0]
    v, g = torch.linalg.svd(mlp.jacobian(0, 0))[2][0], mlp.g[0][0]
    assert first == pytest.approx(float((v @ g).abs() / g.norm()))


def test_effective_rank() -> None:
    mlp = Mlp()
    found = d.effective_rank(mlp.opt, mlp.closure).per_parameter
    assert set(found) == set(SITES)
    s = torch.linalg.svdvals(mlp.w[1])
    p = s / s.sum()
    assert found["2.weight"] == pytest.approx(float(torch.exp(-(p * p.log()).sum())))
    assert d.effective_rank_of(torch.zeros(3, 3)) == 1
    assert d.effective_rank_of(torch.diag(torch.tensor([1.0, 1.0, 0.0]))) == pytest.approx(2)


def test_jacobian_spectra() -> None:
    mlp = Mlp()
    found = d.jacobian_spectra(mlp.opt, mlp.closure, examples=None).per_site
    assert {name: len(spectra) for name, spectra in found.items()} == {"0.weight": 2, "2.weight": 1}

    def reference(i: int, layers: int) -> Tensor:
        each = []
        for n in range(7):
            j = torch.diag(mlp.m[i][n])
            for step in range(1, layers + 1):
                j = mlp.w[i + step] @ j
                if i + step < 2:
                    j = torch.diag(mlp.m[i + step][n]) @ j
            each.append(torch.linalg.svdvals(j))
        return torch.stack(each).mean(0)

    for i, layers in [(0, 1), (0, 2), (1, 1)]:
        torch.testing.assert_close(torch.tensor(found[SITES[i]][layers - 1]).double(), reference(i, layers))
    assert len(d.jacobian_spectra(mlp.opt, mlp.closure, layers=1).per_site["0.weight"]) == 1


def test_activation_overlap() -> None:
    mlp = Mlp()
    found = d.activation_overlap(mlp.opt, mlp.closure, k=[1, 2, 9])
    for i, site in enumerate(SITES):
        x = mlp.inputs[i].detach()
        size = x.shape[1]
        assert found.k[site] == (1, 2, size)  # clipped
        u = mlp.g[i] @ mlp.w[i]  # dL/dx_i
        if i:
            torch.testing.assert_close(u, mlp.inputs[i].grad)
        vectors = torch.linalg.eigh(torch.cov(x.T))[1].flip(1)
        for j, k in enumerate((1, 2)):
            v = vectors[:, :k]
            cosines = [float((v @ v.T @ row).norm() / row.norm()) for row in u]
            assert found.principal[site][j] == pytest.approx(sum(cosines) / 7, rel=1e-6)
        assert found.random[site][-1] == pytest.approx(1)
        assert 0 < found.random[site][0] < found.random[site][1] < 1


def test_random_subspaces_follow_their_law() -> None:
    """``E cos^2 = k / d`` for a random subspace."""
    mlp = Mlp()
    squares = torch.tensor(
        [d.activation_overlap(mlp.opt, mlp.closure, [2], seed).random["0.weight"][0] ** 2 for seed in range(60)]
    )
    # the mean over examples of cosines, squared: at most the mean of squares, 2 / 4, and not far below it
    error = float(squares.std()) / 60**0.5
    assert 0.35 - 5 * error < float(squares.mean()) < 0.5 + 5 * error


@pytest.mark.parametrize("problem", ["cnn", "transformer", "rotary language model", "lstm", "prompts", "functional"])
def test_other_networks_are_measured_too(problem: str) -> None:
    made = build(problem)
    opt = GuessGradOptimizer(made.named, torch.optim.SGD, "w_transpose", lr=0.1, seed=0)
    for name, metric in EVERY.items():
        result = metric(opt, made.closure)
        if name in d.METRICS:
            assert all(value == value for value in d.monitor.figures(result, name).values())
    curves = d.overlap(opt, made.closure).per_site
    if problem in ("cnn", "transformer"):
        assert curves
        assert all(b >= a - 1e-9 for curve in curves.values() for a, b in itertools.pairwise(curve))


# --- steps ------------------------------------------------------------------------------------------------------------


def test_effectiveness() -> None:
    mlp = Mlp("activation_perturbation", seed=5)
    found = d.effectiveness(mlp.opt, mlp.closure, (1.0, 0.01), per_parameter=True)
    assert found.step_sizes == (0.01, 1.0)
    again = Mlp("activation_perturbation", seed=5)
    estimate = d.estimated_gradient(again.opt, again.closure)

    def reduction(gradients: dict[str, Tensor], size: float) -> float:
        copy = Mlp()
        with torch.no_grad():
            for name, p in copy.model.named_parameters():
                if name in gradients:
                    p -= size * gradients[name]
            return float(mlp.closure() - copy.closure())

    ours, theirs = ([reduction(g, size) for size in (0.01, 1.0)] for g in (estimate, mlp.true))
    assert found.reduction == pytest.approx(ours, rel=1e-9)
    assert found.true_reduction == pytest.approx(theirs, rel=1e-9)
    assert found.ratio == pytest.approx(max(ours) / max(theirs))
    alone = [[reduction({"0.bias": g["0.bias"]}, size) for size in (0.01, 1.0)] for g in (estimate, mlp.true)]
    assert found.per_parameter["0.bias"] == pytest.approx(max(alone[0]) / max(alone[1]))
    with pytest.raises(ValueError, match="positive"):
        d.effectiveness(mlp.opt, mlp.closure, (0.0,))


@pytest.mark.parametrize("cos", [0.03, -0.5, 1.0])
def test_cosine_matched(cos: float) -> None:
    mlp = Mlp()
    for norm, size in (("unit", 1.0), ("gradient", float(torch.cat([g.flatten() for g in mlp.true.values()]).norm()))):
        source = d.CosineMatched(cos, norm=norm, seed=1)
        found = source.gradient(mlp.opt, mlp.closure)
        flat = [torch.cat([t[name].flatten() for name in mlp.true]) for t in (found, mlp.true)]
        assert float(torch.cosine_similarity(*flat, dim=0)) == pytest.approx(cos, abs=1e-9)
        assert float(flat[0].norm()) == pytest.approx(size)
        if abs(cos) < 1:
            assert not torch.allclose(source.gradient(mlp.opt, mlp.closure)["0.weight"], found["0.weight"])


def test_cosine_matched_is_unbiased_up_to_scale_and_steps() -> None:
    mlp = Mlp()
    source, g = d.CosineMatched(0.2, seed=0), torch.cat([g.flatten() for g in mlp.true.values()])
    draws = torch.stack(
        [torch.cat([t.flatten() for t in source.gradient(mlp.opt, mlp.closure).values()]) for _ in range(500)]
    )
    off = draws.mean(0) - 0.2 * g / g.norm()
    assert float(off.norm()) < 2 * float(draws.var(0).sum() / 500) ** 0.5
    before = mlp.model[0].weight.detach().clone()
    loss = source.step(mlp.opt, mlp.closure)
    assert float(loss) == pytest.approx(float(Mlp().closure()))
    torch.testing.assert_close(mlp.model[0].weight, before - 0.1 * mlp.model[0].weight.grad)
    with pytest.raises(ValueError, match="between -1 and 1"):
        d.CosineMatched(1.5)


def test_cosine_matched_is_no_registered_estimator() -> None:
    with pytest.raises(ValueError, match="no estimator"):
        make_estimator("cosine_matched")


# --- nothing is changed -----------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Dropout and batch statistics: a measurement must not change random states or buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.x = torch.randn(8, 4, dtype=torch.float64)

    def problem(self) -> Problem:
        self.double()
        return Problem(
            list(self.named_parameters()),
            lambda: F.cross_entropy(self.b(F.dropout(F.relu(self.norm(self.a(self.x))), 0.3)), labels(8, 3)),
        )


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("estimator", [WPerp(k=2, refresh=1), LearnedFeedback(), ActivationPerturbation()], ids=str)
def test_measuring_changes_nothing_but_the_guess_stream(name: str, estimator: Any) -> None:
    model = Noisy()
    problem = model.problem()
    opt = GuessGradOptimizer(problem.named, torch.optim.AdamW, estimator, lr=1e-2, seed=0)
    for _ in range(2):
        opt.step(problem.closure)

    def state() -> list[Any]:
        tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters()), torch.get_rng_state()]
        packed = opt.state_dict()
        own = {key: entry["step"] for key, entry in packed["guessopt"]["cache"].items()}
        moments = [t for entry in packed["state"].values() for t in entry.values()]
        return [[t.clone() for t in (*tensors, *moments)], packed["guessopt"]["steps"], own, opt.guesses]

    before = state()
    learned = {key: entry for key, entry in opt.estimation.cache.learned().items()}
    EVERY[name](opt, problem.closure)
    after = state()
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1] == after[1] and before[3] == after[3]
    assert set(before[2]) <= set(after[2])
    assert all(opt.estimation.cache.learned()[key] is entry for key, entry in learned.items())


@pytest.mark.parametrize("name", EVERY)
def test_training_goes_on_as_if_unmeasured(name: str) -> None:
    """If the guess stream is put back after a measurement, training gives equal parameters."""
    ends = []
    for measured in (False, True):
        mlp = Mlp(WPerp(k=2, refresh=3), seed=0)
        for _ in range(6):
            if measured:
                mlp.opt.estimation.noise.follow()
                noise = mlp.opt.estimation.noise.snapshot()
                EVERY[name](mlp.opt, mlp.closure)
                mlp.opt.estimation.noise.restore(noise)
            mlp.opt.step(mlp.closure)
        ends.append(mlp.model[0].weight.detach())
    assert torch.equal(*ends)


# --- plots and monitors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", d.METRICS)
def test_results_are_frozen_and_draw_themselves(name: str) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    mlp = Mlp()
    result = d.METRICS[name](mlp.opt, mlp.closure)
    field = next(iter(vars(result)))
    with pytest.raises(AttributeError):
        setattr(result, field, None)
    axes = result.plot()
    assert axes.lines or axes.patches
    given = plt.subplots()[1]
    assert result.plot(given) is given
    plt.close("all")


def test_the_package_imports_no_plotting() -> None:
    import subprocess

    code = "import sys, guessopt.diagnostics; assert not {'matplotlib', 'tensorboard'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_monitor_measures_every_n_steps_before_the_update() -> None:
    mlp, seen = Mlp(seed=0), list[tuple[int, dict[str, float]]]()

    def loss_now(opt: GuessGradOptimizer, closure: d.Closure) -> float:
        return float(closure())

    monitor = d.Monitor(mlp.opt, 2, ["effective_rank", loss_now], lambda step, row: seen.append((step, row)))
    losses = [float(monitor.step(mlp.closure)) for _ in range(5)]
    assert [step for step, _ in seen] == [0, 2, 4]
    assert [row["loss_now"] for _, row in seen] == pytest.approx(losses[::2])
    assert seen[0][1]["effective_rank/per_parameter/0.weight"] > 1
    assert monitor.last == seen[-1][1]


def test_monitor_attaches_and_detaches() -> None:
    mlp, seen = Mlp(seed=0), list[int]()
    monitor = d.Monitor(mlp.opt, 2, log=lambda step, row: seen.append(step))
    handle = monitor.attach()
    for _ in range(3):
        mlp.opt.step(mlp.closure)
    monitor.step(mlp.closure)  # counted once
    mlp.opt.step(closure=mlp.closure)
    handle.remove()
    mlp.opt.step(mlp.closure)
    assert seen == [0, 2, 4] and monitor.steps == 5
    monitor.step(mlp.closure)
    assert monitor.steps == 6


def test_monitor_refuses_what_it_does_not_know() -> None:
    mlp = Mlp()
    with pytest.raises(ValueError, match="cosin"):
        d.Monitor(mlp.opt, metrics=["cosin"])
    with pytest.raises(ValueError, match="every"):
        d.Monitor(mlp.opt, every=0)


def test_csv_is_continued_and_widened(tmp_path: Path) -> None:
    path = tmp_path / "log" / "a.csv"
    d.CSVWriter(path)(0, {"a": 1.0})
    write = d.CSVWriter(path)
    write(5, {"a": 2.0, "b, c": 3.0})
    write(9, {"b, c": 4.0})
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"step": "0", "a": "1.0", "b, c": ""},
        {"step": "5", "a": "2.0", "b, c": "3.0"},
        {"step": "9", "a": "", "b, c": "4.0"},
    ]


def test_tensorboard_gets_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            seen.append(folder)

        def add_scalar(self, *args: Any) -> None:
            seen.append(args)

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    write = d.TensorBoardWriter(tmp_path)
    write(3, {"cosine/total": 0.5})
    assert seen == [str(tmp_path), ("guessopt/cosine/total", 0.5, 3)]
    own = SummaryWriter("own")
    d.TensorBoardWriter(own, prefix="")(1, {"x": 1.0})
    assert seen[-1] == ("x", 1.0, 1)


def test_cotangents_of_what_is_overwritten() -> None:
    """``relu(inplace=True)`` and ``+=`` overwrite a site's output. Its cotangent belongs to the value before the
    write."""
    found = []
    for inplace in (True, False):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.ReLU(inplace)).double()
        again, head = torch.nn.Conv2d(3, 3, 1).double(), torch.nn.Linear(3, 2).double()
        x = torch.randn(5, 2, 6, 6, dtype=torch.float64)

        def closure(
            net: Any = net, again: Any = again, head: Any = head, x: Any = x, inplace: bool = inplace
        ) -> Tensor:
            h = net(x)
            r = again(h)
            if inplace:
                r += h
            else:
                r = r + h
            return F.cross_entropy(head(net[2](r).mean((2, 3))), torch.arange(5) % 2)

        params = [*again.named_parameters("again"), *net.named_parameters(), *head.named_parameters("head")]
        opt = GuessGradOptimizer(params, torch.optim.SGD, "w_transpose", lr=0.1)
        found.append(d.true_cotangents(opt, closure))
    assert found[0].keys() == found[1].keys()
    for name, g in found[0].items():
        torch.testing.assert_close(g, found[1][name])
