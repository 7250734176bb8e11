"""Several guesses a step: in one pass or in turn, averaged or projected."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import GuessGradOptimizer, GuessWarning, LearnedFeedback
from guessopt.diagnostics import estimated_gradient, true_gradient
from guessopt.engine.jvp.stacked import StackedEngine
from guessopt.estimator import Estimator
from guessopt.estimators import estimator_names
from guessopt.registry import ESTIMATORS
from guessopt.step import modes, runs
from guessopt.tracing.context import SiteContext
from tests.problems import PROBLEMS, Problem, labels, of

K = 3


class Given(Estimator):
    """Fixed guesses: the k-th guess at site i is always equal."""

    name = "given"
    per_example_parameters = False
    seen: ClassVar[dict[int, int]] = {}
    #: What to do with a guess, by site and number.
    change: ClassVar[Callable[[Tensor, int, int], Tensor]] = staticmethod(lambda y, site, k: y)

    def sample(self, state: Any, local: SiteContext) -> Tensor:
        index = local.site.index
        k = Given.seen[index] = Given.seen.get(index, -1) + 1
        generator = torch.Generator().manual_seed(1000 * index + k)
        y = torch.randn(local.s.shape, dtype=local.s.dtype, generator=generator)
        return Given.change(y, index, k)


@pytest.fixture(autouse=True)
def _given() -> Iterator[None]:
    ESTIMATORS["given"], Given.seen = Given, {}
    yield
    del ESTIMATORS["given"]
    Given.change = staticmethod(lambda y, site, k: y)


def batch_norm(train: bool) -> Problem:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2), nn.GELU(),
        nn.Flatten(), nn.Linear(8, 3),
    ).train(train)  # fmt: skip
    x = torch.randn(6, 1, 5, 5, dtype=torch.float64)
    return of(model, lambda m: F.cross_entropy(m(x), labels(6, 3)))


def dropout() -> Problem:
    layers = [nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.4), nn.Linear(6, 5), nn.Dropout(0.2, inplace=True)]
    model = nn.Sequential(*layers, nn.SiLU(inplace=True), nn.Linear(5, 3))
    x = torch.randn(7, 4, dtype=torch.float64)
    return of(model, lambda m: F.cross_entropy(m(x), labels(7, 3)))


def encoder() -> Problem:
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True), nn.Linear(4, 2))
    x, y = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(5, 3, 2, dtype=torch.float64)
    return of(model, lambda m: F.mse_loss(m(x), y))


class Cube(torch.autograd.Function):
    """``x ** 3`` without ``setup_context``: ``vmap`` refuses it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_forward(x)
        return x**3

    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * dx


def custom_function() -> Problem:
    first, last = nn.Linear(4, 6), nn.Linear(6, 3)
    x = torch.randn(7, 4, dtype=torch.float64)
    return of(nn.ModuleList([first, last]), lambda m: F.cross_entropy(m[1](Cube.apply(m[0](x))), labels(7, 3)))


class Indexed(nn.Module):
    """Several outputs, data-dependent choices, and writes into memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        top, where = h.topk(3, dim=1)
        out = torch.zeros(x.shape[0], 4, dtype=x.dtype)
        out[:, :3] = top.sort(dim=1).values * torch.where(where > 2, 2.0, 1.0)
        out += torch.cat([h.amax(1, keepdim=True), h.split(3, 1)[1]], 1).clamp_(-1, 1)
        logits: Tensor = self.last(out.contiguous())
        return logits


def indexed() -> Problem:
    x = torch.randn(7, 4, dtype=torch.float64)
    return of(Indexed(), lambda m: F.cross_entropy(m(x), labels(7, 3)))


class SharedMemory(nn.Module):
    """Writes through one name, and reads through another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        left = h[:, :3]
        left.mul_(2)
        logits: Tensor = self.last(torch.tanh(h))
        return logits


def shared_memory() -> Problem:
    x = torch.randn(7, 4, dtype=torch.float64)
    return of(SharedMemory(), lambda m: F.cross_entropy(m(x), labels(7, 3)))


MORE: dict[str, Callable[[], Problem]] = {
    "batch norm, training": lambda: batch_norm(True),
    "batch norm, evaluation": lambda: batch_norm(False),
    "dropout": dropout,
    "encoder": encoder,
    "custom function": custom_function,
    "indexed": indexed,
}
ALL = {**PROBLEMS, **MORE}


def build(name: str) -> Problem:
    torch.manual_seed(0)
    return {**ALL, "shared memory": shared_memory}[name]()


def sgd(problem: Problem, estimator: Any = "given", **options: Any) -> GuessGradOptimizer:
    return GuessGradOptimizer(problem.named, torch.optim.SGD, estimator, lr=0.1, **options)


def estimate(opt: GuessGradOptimizer, problem: Problem) -> dict[str, Tensor]:
    """The estimate from the first guesses of ``Given``, in the second step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GuessWarning)
        estimated_gradient(opt, problem.closure)
        Given.seen = {}
        torch.manual_seed(7)
        return estimated_gradient(opt, problem.closure)


def mean_of_single_passes(problem: Problem, **options: Any) -> dict[str, Tensor]:
    opt = sgd(problem, **options)
    found = [estimate(opt, problem)]
    for _ in range(K - 1):
        torch.manual_seed(7)
        found.append(estimated_gradient(opt, problem.closure))
    return {name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert a.keys() == b.keys() and any(bool(t.any()) for t in a.values())
    for name, t in a.items():
        torch.testing.assert_close(t, b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# --- one pass is as good as several -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_one_pass_with_k_guesses_is_the_mean_of_k_passes(name: str) -> None:
    problem = build(name)
    opt = sgd(problem, guesses=K, stack_guesses=True)
    assert_close(estimate(opt, problem), mean_of_single_passes(problem))
    assert opt.estimation.plans[0].stacks


@pytest.mark.parametrize("name", ["mlp", "batch norm, training", "transformer", "dropout"])
@pytest.mark.parametrize("estimator", [name for name in estimator_names() if name not in ("learned_feedback", "given")])
@pytest.mark.parametrize("orthogonal", [False, True], ids=["mean", "orthogonal"])
def test_the_same_guesses_in_one_pass_and_in_turn(name: str, estimator: str, orthogonal: bool) -> None:
    problem = build(name)
    options = {"guesses": K, "seed": 3, "orthogonal": orthogonal}
    together = estimate(sgd(problem, estimator, stack_guesses=True, **options), problem)
    assert_close(together, estimate(sgd(problem, estimator, stack_guesses=False, **options), problem), 1e-8)


@pytest.mark.parametrize("options", [{"batch_norm": "frozen_statistics"}, {"exact_last": True}, {"memory": "store"}])
def test_the_same_guesses_with_other_options(options: dict[str, Any]) -> None:
    problem = build("batch norm, training")
    found = [
        estimate(sgd(problem, "w_transpose", guesses=K, seed=3, stack_guesses=so, **options), problem)
        for so in (True, False)
    ]
    assert_close(*found)


def test_debiased_guesses_in_one_pass_and_in_turn() -> None:
    problem = build("gelu mlp")
    estimator = {"name": "w_transpose", "debias": True}
    found = [estimate(sgd(problem, estimator, guesses=K, seed=3, stack_guesses=so), problem) for so in (True, False)]
    assert_close(*found)


def test_estimators_by_name_patterns_share_a_pass() -> None:
    problem = build("mlp")
    mixed = {"0.*": "directional_descent", "2.weight": "w_perp", "*": "activation_perturbation"}
    found = [estimate(sgd(problem, mixed, guesses=K, seed=3, stack_guesses=so), problem) for so in (True, False)]
    assert_close(*found)


def test_under_autocast_one_pass_is_close_to_several() -> None:
    problem = build("mlp")
    for p in problem.parameters():
        p.data = p.data.float()
    x = torch.randn(7, 4)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x).float(), labels(7, 3))

    low = Problem(list(model.named_parameters()), closure)
    found = [estimate(sgd(low, "w_transpose", guesses=K, seed=3, stack_guesses=so), low) for so in (True, False)]
    assert_close(*found, tolerance=3e-2)


def test_the_closure_runs_once_for_all_guesses() -> None:
    problem, runs = build("mlp"), count()

    def counted() -> Tensor:
        next(runs)
        return problem.closure()

    opt = sgd(problem, "w_perp", guesses=4)
    for _ in range(10):
        opt.step(counted)
    before = next(runs)
    opt.step(counted)
    assert next(runs) == before + 2


def test_one_guess_knows_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One guess needs no stack and no second noise stream. It equals the first of several guesses."""
    monkeypatch.setattr(runs, "StackedEngine", None)
    problem = build("mlp")
    one = sgd(problem, "activation_perturbation", seed=3)
    first = estimated_gradient(one, problem.closure)
    assert list(one.state_dict()["guessopt"]["noise"]["generators"]) == ["cpu"]
    monkeypatch.undo()
    lane = sgd(problem, "activation_perturbation", seed=3, guesses=2)
    once = modes._store_once
    monkeypatch.setattr(modes, "_store_once", lambda *a: (*once(*a)[:2], 2))
    lane.stack_guesses = False
    assert_close(first, estimated_gradient(lane, problem.closure), 0)


def test_buffers_and_random_states_move_once() -> None:
    for name in ("batch norm, training", "dropout"):
        found = []
        for guesses in (1, K):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.ReLU(), nn.Linear(5, 2))
            x = torch.randn(6, 4)
            opt = GuessGradOptimizer(model.parameters(), torch.optim.SGD, guesses=guesses, lr=0.0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", GuessWarning)
                losses = [opt.step(lambda m=model, x=x: F.cross_entropy(m(x), labels(6, 2))) for _ in range(3)]
            found.append([*model.buffers(), torch.get_rng_state(), torch.stack(losses)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), name


# --- where guesses cannot share a pass --------------------------------------------------------------------------------


def test_an_operation_that_vmap_refuses_goes_in_turn_by_itself() -> None:
    problem = build("custom function")
    opt = sgd(problem, guesses=K)
    estimate(opt, problem)
    assert opt.estimation.plans[0].stacks and sum(opt.estimation.plans[0].ways.values()) == 1


def test_writes_into_shared_memory_go_in_turn() -> None:
    problem = build("shared memory")
    opt = sgd(problem, guesses=K)
    with pytest.warns(GuessWarning, match="memory that other tensors share"):
        estimated_gradient(opt, problem.closure)
    assert opt.estimation.plans[0].stacks is False
    assert_close(estimate(opt, problem), mean_of_single_passes(problem))
    with pytest.raises(ValueError, match=r"stack_guesses: .* memory that other tensors share"):
        estimate(sgd(problem, guesses=K, stack_guesses=True), problem)


@pytest.mark.parametrize(("options", "why"), [({"engine": "dual"}, "engine='dual'"), ({}, "learns")])
def test_what_carries_one_guess_goes_in_turn_without_a_warning(options: dict[str, Any], why: str) -> None:
    problem = build("mlp")
    estimator = LearnedFeedback() if why == "learns" else "w_perp"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = sgd(problem, estimator, guesses=2, **options)
        opt.step(problem.closure)
    assert opt.estimation.plans[0].stacks is False
    with pytest.raises(ValueError, match=f"stack_guesses: .*{why}"):
        sgd(problem, estimator, guesses=2, stack_guesses=True, **options).step(problem.closure)


def state_of(opt: GuessGradOptimizer, model: nn.Module) -> list[Tensor]:
    noise = opt.state_dict()["guessopt"]["noise"]["generators"]
    tensors = [*model.parameters(), *model.buffers(), torch.get_rng_state(), *noise.values()]
    return [t.detach().clone() for t in tensors]


def fragile() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(6, 4)
    return model, lambda: F.cross_entropy(model(x), labels(6, 2))


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
def test_a_failed_attempt_to_share_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate and the state after the step equal those of guesses in turn."""

    def refuse(self: StackedEngine, *args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("no such batching rule")

    found = []
    for stack_guesses in (None, False):
        model, closure = fragile()
        opt = GuessGradOptimizer(
            model.named_parameters(), torch.optim.SGD, guesses=K, stack_guesses=stack_guesses, lr=0.1
        )
        with monkeypatch.context() as patch:
            patch.setattr(StackedEngine, "cut", refuse)
            if stack_guesses is None:
                with pytest.warns(GuessWarning, match="in turn.*no such batching rule"):
                    opt.step(closure)
            opt.step(closure)
        if stack_guesses is False:
            opt.step(closure)
        else:
            assert opt.estimation.plans[0].stacks is False
        found.append(state_of(opt, model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
def test_out_of_memory_goes_in_turn_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, closure = fragile()
    opt = GuessGradOptimizer(model.named_parameters(), torch.optim.SGD, guesses=K, lr=0.1)
    opt.step(closure)

    def full(self: StackedEngine, *args: Any, **kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StackedEngine, "cut", full)
    with pytest.warns(GuessWarning, match="out of memory"):
        opt.step(closure)
    assert opt.estimation.plans[0].stacks is False


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize("stack_guesses", [None, False])
@pytest.mark.parametrize("when", [0, 2])
def test_a_failed_step_leaves_everything_as_it_was(
    stack_guesses: bool | None, when: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last guess of the last site fails, in the first or a later step. The next steps equal those of a run
    without the failure."""
    found = []
    for fails in (True, False):
        model, closure = fragile()
        options: dict[str, Any] = {"guesses": K, "stack_guesses": stack_guesses, "lr": 0.1}
        opt = GuessGradOptimizer(model.named_parameters(), torch.optim.SGD, "activation_perturbation", **options)
        for _ in range(when):
            opt.step(closure)
        if fails:
            before = state_of(opt, model)
            draw = SiteContext.noise

            def noise(self: SiteContext, *args: Any, draw: Any = draw, opt: GuessGradOptimizer = opt) -> Tensor:
                if opt.estimation.noise.guess_index == K - 1 and self.s.shape[-1] == 2:
                    raise RuntimeError("broken")
                return draw(self, *args)

            with monkeypatch.context() as patch:
                patch.setattr(SiteContext, "noise", noise)
                with pytest.raises(RuntimeError, match="broken"):
                    opt.step(closure)
            after = state_of(opt, model)
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            assert opt.estimation.noise.guess_index == 0
        for _ in range(2):
            opt.step(closure)
        found.append(state_of(opt, model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- what users rely on -----------------------------------------------------------------------------------------------


def test_a_seed_fixes_every_guess_and_each_differs() -> None:
    problem = build("mlp")
    options: dict[str, Any] = {"guesses": 4, "seed": 11}
    a, b = (estimate(sgd(problem, "w_transpose", **options), problem) for _ in range(2))
    assert_close(a, b, 0)
    ys: list[Tensor] = []
    opt = sgd(problem, "activation_perturbation", **options)
    combined = modes.combined
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modes, "combined", lambda r, *rest: (ys.extend(r.guesses.values()), combined(r, *rest))[1])
        estimated_gradient(opt, problem.closure)
    assert all(not torch.equal(y[k], y[j]) for y in ys for k in range(4) for j in range(k))


@pytest.mark.parametrize("orthogonal", [False, True])
def test_the_last_site_may_be_exact(orthogonal: bool) -> None:
    problem = build("mlp")
    opt = sgd(problem, "w_perp", guesses=K, exact_last=True, orthogonal=orthogonal)
    found, truth = estimated_gradient(opt, problem.closure), true_gradient(opt, problem.closure)
    for name in ("4.weight", "4.bias"):
        torch.testing.assert_close(found[name], truth[name], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found["0.weight"], truth["0.weight"])


# --- orthogonal -------------------------------------------------------------------------------------------------------


def joint_guesses(opt: GuessGradOptimizer, problem: Problem) -> tuple[Tensor, Tensor]:
    """``Y`` ``[N, K, d]``, all sites joined, and ``D`` ``[K, N]`` of the pass that ``estimate`` makes."""
    kept: list[Any] = []
    combined = modes.combined
    with pytest.MonkeyPatch.context() as patch:

        def keep(record: Any, *rest: Any) -> Any:
            kept.append(([y.clone() for y in record.guesses.values()], record.d.clone()))
            return combined(record, *rest)

        patch.setattr(modes, "combined", keep)
        estimate(opt, problem)
    ys, d = kept[-1]
    return torch.cat([y.transpose(0, 1).flatten(2) for y in ys], 2), d


def assert_projection(opt: GuessGradOptimizer, problem: Problem, tolerance: float) -> None:
    """``c Y (Y^T Y)^+ D`` by a pseudo-inverse, where a bias sums it over the examples."""
    found = estimate(opt, problem)
    y, d = joint_guesses(opt, problem)
    assert tuple(y.shape) == (7, opt.guesses, 6 + 5 + 3)
    c = y.square().sum(2).mean(1) / opt.guesses
    g = c[:, None] * (torch.linalg.pinv(y, rtol=1e-6) @ d.T[..., None])[..., 0]
    whole = torch.cat([found[f"{layer}.bias"] for layer in (0, 2, 4)])
    torch.testing.assert_close(g.sum(0), whole, rtol=tolerance, atol=tolerance)


def test_orthogonal_is_the_scaled_projection() -> None:
    problem = build("mlp")
    assert_projection(sgd(problem, guesses=K, orthogonal=True), problem, 1e-9)


def test_orthogonal_guesses_of_one_length_give_the_mean() -> None:
    """Guess k is nonzero at unit k of each layer only."""

    def unit(y: Tensor, site: int, k: int) -> Tensor:
        return F.one_hot(torch.tensor(k % K), y.shape[-1]).to(y.dtype).expand(y.shape).contiguous()

    Given.change = staticmethod(unit)
    problem = build("mlp")
    mean, projected = (estimate(sgd(problem, guesses=K, orthogonal=o), problem) for o in (False, True))
    assert_close(mean, projected)


def test_guesses_that_depend_on_each_other_project_on_what_they_span() -> None:
    """The third guess equals the first, and the fourth is zero: the span has two dimensions."""
    Given.change = staticmethod(lambda y, site, k: [y, y, first(y, site), 0 * y][k % 4])

    def first(y: Tensor, site: int) -> Tensor:
        return torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1000 * site))

    problem = build("mlp")
    assert_projection(sgd(problem, guesses=4, orthogonal=True), problem, 1e-5)


@pytest.mark.parametrize("name", ["mlp", "batch norm, training"])
def test_orthogonal_is_unbiased_for_isotropic_guesses(name: str) -> None:
    """The mean of many estimates is the gradient within five standard errors, per tensor."""
    problem = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GuessWarning)
        opt = sgd(problem, "activation_perturbation", guesses=K, orthogonal=True, seed=1)
        truth = true_gradient(opt, problem.closure)
        draws = [estimated_gradient(opt, problem.closure) for _ in range(600)]
    for key, g in truth.items():
        each = torch.stack([one[key] for one in draws])
        error = (each.mean(0) - g).norm()
        assert float(error) < 5 * float((each.var(0).sum() / len(draws)).sqrt()), key


def test_orthogonal_is_less_noisy_where_guesses_overlap() -> None:
    problem = build("mlp")
    spread = []
    for orthogonal in (False, True):
        opt = sgd(problem, "activation_perturbation", guesses=8, orthogonal=orthogonal, seed=1)
        draws = torch.stack([estimated_gradient(opt, problem.closure)["0.weight"].flatten() for _ in range(300)])
        spread.append(float(draws.var(0).sum()))
    assert spread[1] < 0.8 * spread[0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"orthogonal": True}, "orthogonal: takes at least 2 guesses"),
        ({"stack_guesses": "yes"}, "stack_guesses: 'yes' is not one of None, True, False"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        sgd(build("mlp"), "w_perp", **options)


@pytest.mark.parametrize("estimator", [LearnedFeedback(), {"name": "w_transpose", "debias": True}])
def test_orthogonal_is_refused_where_the_estimator_forms_the_estimate(estimator: Any) -> None:
    problem = build("mlp")
    opt = sgd(problem, estimator, guesses=2, orthogonal=True)
    with pytest.raises(ValueError, match="orthogonal: not with"):
        opt.step(problem.closure)


def test_more_guesses_than_dimensions_are_told_once_and_finite() -> None:
    model = nn.Linear(2, 3).double()
    x = torch.randn(5, 2, dtype=torch.float64)
    problem = of(model, lambda m: F.cross_entropy(m(x), labels(5, 3)))
    opt = sgd(problem, "activation_perturbation", guesses=5, orthogonal=True)
    with pytest.warns(GuessWarning, match="5 guesses in 3 dimensions"):
        opt.step(problem.closure)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
