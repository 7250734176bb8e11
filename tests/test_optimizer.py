"""GuessGradOptimizer behaves as the optimizers of torch.optim do. These tests use its public interface.

"Our reading" marks a test of behaviour that the specification leaves open.
"""

import copy
import io
import random
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from guessopt import ActivationPerturbation, ClosureError, GuessGradOptimizer, GuessWarning, WPerp, WTranspose
from tests.problems import seeded

ESTIMATORS = ["directional_descent", "activation_perturbation", "w_transpose", "w_perp"]
ENGINES = ["fast", "dual", "func"]
Closure = Callable[[], Tensor]

torch.manual_seed(0)
X = torch.randn(12, 5, dtype=torch.float64)
LABELS = torch.arange(12) % 4
TARGETS = torch.randn(12, 4, dtype=torch.float64)


def mlp(*, dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    middle: list[nn.Module] = [nn.BatchNorm1d(8)] if norm else []
    layers = [nn.Linear(5, 8), *middle, nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)]
    return nn.Sequential(*layers).double()


def mean_loss(model: nn.Module) -> Closure:
    return lambda: F.cross_entropy(model(X), LABELS)


def example_losses(model: nn.Module) -> Closure:
    return lambda: F.cross_entropy(model(X), LABELS, reduction="none")


def sgd(model: nn.Module, lr: float = 0.1, seed: int | None = 0, **options: Any) -> GuessGradOptimizer:
    return GuessGradOptimizer(model.parameters(), torch.optim.SGD, lr=lr, seed=seed, **options)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def grads(model: nn.Module) -> list[Tensor]:
    assert all(p.grad is not None for p in model.parameters())
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def equal(left: Iterable[Tensor], right: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def assert_near(left: Iterable[Tensor], right: Iterable[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------- construction


def test_is_a_torch_optimizer() -> None:
    assert issubclass(GuessGradOptimizer, torch.optim.Optimizer)
    optimizer = GuessGradOptimizer(mlp().parameters())
    assert optimizer.defaults["lr"] == torch.optim.AdamW(mlp().parameters()).defaults["lr"]


PARAMS: dict[str, Callable[[nn.Sequential], Any]] = {
    "generator": lambda m: m.parameters(),
    "list": lambda m: list(m.parameters()),
    "named": lambda m: m.named_parameters(),
    "groups": lambda m: [{"params": m[0].parameters()}, {"params": list(m[1:].parameters())}],
    "named groups": lambda m: [{"params": m[0].named_parameters("a")}, {"params": m[1:].named_parameters("b")}],
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_every_way_to_hand_over_parameters_gives_the_same_step(params: Callable[[nn.Sequential], Any]) -> None:
    model = mlp()
    reference = copy.deepcopy(model)
    GuessGradOptimizer(params(model), torch.optim.SGD, lr=0.1, seed=0).step(mean_loss(model))
    sgd(reference).step(mean_loss(reference))
    assert equal(values(model), values(reference))


def test_names_of_parameters_reach_the_groups() -> None:
    model = mlp()
    optimizer = GuessGradOptimizer(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]


def test_groups_keep_their_own_learning_rate() -> None:
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[1:].parameters()}]
    optimizer = GuessGradOptimizer(groups, torch.optim.SGD, lr=0.5, seed=0)
    before = values(model)
    optimizer.step(mean_loss(model))
    assert_near(values(model), [p - lr * g for p, g, lr in zip(before, grads(model), [0, 0, *[0.5] * 4], strict=True)])
    assert not equal(before[2:], values(model)[2:])


@pytest.mark.parametrize("own", [True, False], ids=["own estimator", "default estimator"])
def test_groups_keep_their_own_estimator(own: bool) -> None:
    """In a linear network W-perp with k = 1 guesses along one direction: the top right singular vector of the next
    weight."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 4)).double()
    first: dict[str, Any] = {"params": model[0].parameters()} | ({"estimator": WPerp(k=1)} if own else {})
    groups = [first, {"params": model[1:].parameters()}]
    optimizer = GuessGradOptimizer(groups, estimator=ActivationPerturbation(), seed=0)
    optimizer.estimate(mean_loss(model))
    direction = torch.linalg.svd(values(model)[2])[2][0]
    gradient = grads(model)[1]
    assert (abs(F.cosine_similarity(direction, gradient, dim=0)) > 1 - 1e-9) == own


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.items() for part in item for leaf in leaves(part)]
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, list | tuple) else [value]


def test_groups_store_the_estimator_as_name_and_options() -> None:
    model = mlp()
    groups = [{"params": model[0].parameters(), "estimator": WPerp(k=3)}, {"params": model[1:].parameters()}]
    optimizer = GuessGradOptimizer(groups, estimator=WTranspose)
    own, default = (leaves(group["estimator"]) for group in optimizer.param_groups)
    assert "w_perp" in own and "k" in own and 3 in own
    assert "w_transpose" in default
    assert all(leaf is None or isinstance(leaf, str | int | float | bool) for leaf in own + default)


ESTIMATOR_SPELLINGS = {"name": "w_perp", "class": WPerp, "instance": WPerp(), "instance with options": WPerp(k=10)}


@pytest.mark.parametrize("estimator", ESTIMATOR_SPELLINGS.values(), ids=ESTIMATOR_SPELLINGS)
def test_estimator_as_name_class_or_instance(estimator: Any) -> None:
    model = mlp()
    reference = copy.deepcopy(model)
    sgd(model, estimator=estimator).estimate(mean_loss(model))
    sgd(reference).estimate(mean_loss(reference))
    assert equal(grads(model), grads(reference))


def test_estimators_differ_from_each_other() -> None:
    model = mlp()
    seen: list[list[Tensor]] = []
    for estimator in ESTIMATORS:
        model.zero_grad()
        sgd(model, estimator=estimator).estimate(mean_loss(model))
        assert not any(equal(grads(model), other) for other in seen)
        seen.append(grads(model))


BASES: dict[str, Callable[[nn.Module], GuessGradOptimizer]] = {
    "class": lambda m: GuessGradOptimizer(m.parameters(), torch.optim.SGD, seed=0, lr=0.1, momentum=0.9),
    "callable": lambda m: GuessGradOptimizer(
        m.parameters(), lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9), seed=0
    ),
    "built": lambda m: GuessGradOptimizer(
        m.parameters(), torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), seed=0
    ),
}


@pytest.mark.parametrize("build", BASES.values(), ids=BASES)
def test_base_as_class_callable_or_built_optimizer(build: Callable[[nn.Module], GuessGradOptimizer]) -> None:
    """Each updates as a plain SGD that gets equal gradients."""
    model = mlp()
    reference = copy.deepcopy(model)
    plain = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    optimizer = build(model)
    assert optimizer.param_groups[0]["momentum"] == 0.9
    for _ in range(3):
        optimizer.step(mean_loss(model))
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            q.grad = p.grad
        plain.step()
    assert equal(values(model), values(reference))


def test_reads_the_objects_of_the_base() -> None:
    model = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = GuessGradOptimizer(model.parameters(), base, seed=0)
    for moment in ("built", "stepped", "loaded"):
        if moment == "stepped":
            optimizer.step(mean_loss(model))
        if moment == "loaded":
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert optimizer.param_groups is base.param_groups, moment
        assert optimizer.state is base.state, moment
        assert optimizer.defaults["momentum"] == 0.9, moment
    assert "momentum_buffer" in optimizer.state[model[0].weight]


def test_a_built_base_keeps_its_own_settings_and_its_own_parameters() -> None:
    """Our reading: settings beside a built base, or a base of other parameters, raise an error."""
    model = mlp()
    with pytest.raises((TypeError, ValueError)):
        GuessGradOptimizer(model.parameters(), torch.optim.SGD(model.parameters(), lr=0.1), lr=0.2)
    with pytest.raises((TypeError, ValueError)):
        GuessGradOptimizer(model.parameters(), torch.optim.SGD(mlp().parameters(), lr=0.1))


LBFGS: dict[str, Callable[[nn.Module], Any]] = {
    "class": lambda m: torch.optim.LBFGS,
    "callable": lambda m: lambda groups: torch.optim.LBFGS(groups),
    "built": lambda m: torch.optim.LBFGS(m.parameters()),
}


@pytest.mark.parametrize("base", LBFGS.values(), ids=LBFGS)
def test_a_base_that_needs_a_closure_is_refused_by_name(base: Callable[[nn.Module], Any]) -> None:
    model = mlp()
    with pytest.raises((TypeError, ValueError), match="LBFGS"):
        GuessGradOptimizer(model.parameters(), base(model))


# ------------------------------------------------------------------------------------- groups, zero_grad, hooks


def test_a_changed_learning_rate_acts() -> None:
    model = mlp()
    optimizer = sgd(model, lr=0.1)
    optimizer.step(mean_loss(model))
    optimizer.param_groups[0]["lr"] = 0.03
    before = values(model)
    optimizer.step(mean_loss(model))
    assert_near(values(model), [p - 0.03 * g for p, g in zip(before, grads(model), strict=True)])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    model = mlp()
    optimizer = sgd(model)
    optimizer.estimate(mean_loss(model))
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.step(mean_loss(model))  # nothing is pending any more


def test_add_param_group() -> None:
    model = mlp()
    optimizer = GuessGradOptimizer(model[0].parameters(), torch.optim.SGD, lr=0.1, seed=0)
    optimizer.step(mean_loss(model))
    assert model[3].weight.grad is None
    optimizer.add_param_group({"params": model[3].parameters(), "lr": 0.0})
    optimizer.add_param_group({"params": list(model[5].parameters())})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.0, 0.1]
    assert all("w_perp" in leaves(group["estimator"]) for group in optimizer.param_groups)
    before = values(model)
    optimizer.step(mean_loss(model))
    moved = [not torch.equal(p, q) for p, q in zip(before, values(model), strict=True)]
    assert moved == [True, True, False, False, True, True] and all(g.any() for g in grads(model))
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": [model[0].weight]})


@pytest.mark.parametrize("split", [False, True], ids=["step(closure)", "estimate then step()"])
@pytest.mark.parametrize("everywhere", [False, True], ids=["own hooks", "global hooks"])
def test_step_hooks_fire_once_with_the_wrapper(split: bool, everywhere: bool) -> None:
    model = mlp()
    optimizer = sgd(model)
    seen: list[tuple[str, object]] = []
    pre = register_optimizer_step_pre_hook if everywhere else optimizer.register_step_pre_hook
    post = register_optimizer_step_post_hook if everywhere else optimizer.register_step_post_hook
    handles = [pre(lambda o, a, k: seen.append(("pre", o))), post(lambda o, a, k: seen.append(("post", o)))]
    try:
        for _ in range(2):
            seen.clear()
            if split:
                optimizer.zero_grad()
                optimizer.estimate(mean_loss(model))
                optimizer.step()
            else:
                optimizer.step(mean_loss(model))
            assert [name for name, _ in seen] == ["pre", "post"]
            assert all(who is optimizer for _, who in seen)
    finally:
        for handle in handles:
            handle.remove()


class Recorder(torch.optim.SGD):
    """Records the arguments of its ``step``."""

    calls: list[tuple[Any, ...]]

    def step(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        self.calls = [*getattr(self, "calls", []), (*args, *kwargs.values())]
        return super().step(*args, **kwargs)


def test_the_closure_is_never_forwarded_to_the_base() -> None:
    model = mlp()
    base = Recorder(model.parameters(), lr=0.1)
    optimizer = GuessGradOptimizer(model.parameters(), base, seed=0)
    optimizer.step(mean_loss(model))
    optimizer.estimate(mean_loss(model))
    optimizer.step()
    assert len(base.calls) == 2 and all(argument is None for call in base.calls for argument in call)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: lrs.StepLR(o, 2),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 4]),
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda epoch: 0.9),
    "ConstantLR": lambda o: lrs.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lrs.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.5, total_steps=8),
    "SequentialLR": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, total_iters=2), lrs.ExponentialLR(o, 0.5)], [2]),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.LinearLR(o, total_iters=2), lrs.ExponentialLR(o, 0.5)]),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.filterwarnings("error:Detected call of")
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("build", SCHEDULERS.values(), ids=SCHEDULERS)
def test_learning_rate_schedulers(build: Callable[[torch.optim.Optimizer], Any], base: Any) -> None:
    settings = {"lr": 0.1, "momentum": 0.9} if base is torch.optim.SGD else {"lr": 0.1}

    def sequence(optimizer: torch.optim.Optimizer, step: Callable[[], Any]) -> list[tuple[float, Any]]:
        scheduler, seen = build(optimizer), []
        for _ in range(6):
            step()
            scheduler.step(1.0) if isinstance(scheduler, lrs.ReduceLROnPlateau) else scheduler.step()
            group = optimizer.param_groups[0]
            seen.append((group["lr"], group.get("momentum", group.get("betas"))))
        return seen

    model = mlp()
    plain = base(mlp().parameters(), **settings)
    guessing = GuessGradOptimizer(model.parameters(), base, seed=0, **settings)
    expected = sequence(plain, lambda: plain.step())
    assert sequence(guessing, lambda: guessing.step(mean_loss(model))) == expected


class Strict(torch.optim.SGD):
    """Refuses unknown keys in groups, and has ``train`` and ``eval``."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        params = list(params)
        for group in params:
            self.check(group)
        super().__init__(params, lr=lr)
        self.mode = "train"

    @staticmethod
    def check(group: Any) -> None:
        if isinstance(group, dict) and not group.keys() <= {"params", "lr"}:
            raise ValueError(f"unknown keys {sorted(group)}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.check(param_group)
        super().add_param_group(param_group)

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"


def test_a_base_that_refuses_keys_of_groups() -> None:
    model = mlp()
    groups = [{"params": list(model[0].parameters()), "estimator": WPerp(k=3)}]
    optimizer = GuessGradOptimizer(groups, Strict, "w_transpose", seed=0)
    optimizer.step(mean_loss(model))
    optimizer.add_param_group({"params": list(model[3].parameters()), "lr": 0.2})
    optimizer.add_param_group({"params": model[5].weight, "estimator": "activation_perturbation"})
    names = [group["estimator"]["name"] for group in optimizer.param_groups]
    assert names == ["w_perp", "w_transpose", "activation_perturbation"]
    optimizer.step(mean_loss(model))
    assert all(p.grad is not None for p in [*model[0].parameters(), *model[3].parameters(), model[5].weight])


def test_muon_and_its_like() -> None:
    model = mlp()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    for memory in ("store", "stream"):
        optimizer = GuessGradOptimizer(matrices, torch.optim.Muon, lr=0.01, seed=0, memory=memory)
        before = values(model)
        for _ in range(2):
            optimizer.step(mean_loss(model))
        moved = [not torch.equal(p, q) for p, q in zip(before, values(model), strict=True)]
        assert moved == [True, False] * 3


def test_what_the_base_offers_is_reachable() -> None:
    model = mlp()
    optimizer = GuessGradOptimizer(model.parameters(), Strict, seed=0)
    optimizer.eval()
    assert optimizer.base.mode == optimizer.mode == "eval"
    optimizer.train()
    assert optimizer.mode == "train"
    plain = sgd(model)
    assert not hasattr(plain, "train") and not hasattr(plain, "_step_supports_amp_scaling")
    with pytest.raises(AttributeError, match="nowhere"):
        _ = plain.nowhere


def test_assigned_groups_are_those_of_the_base() -> None:
    model = mlp()
    optimizer = sgd(model, lr=0.5)
    optimizer.step(mean_loss(model))
    kept = {key: value for key, value in optimizer.param_groups[0].items() if key not in ("params", "estimator")}
    optimizer.param_groups = [{**kept, "params": list(model[0].parameters()), "lr": 0.25}]
    assert optimizer.base.param_groups is optimizer.param_groups
    before = values(model)
    optimizer.step(mean_loss(model))
    after = values(model)
    assert equal(before[2:], after[2:])
    assert_near(after[:2], [p - 0.25 * q.grad for p, q in zip(before, model[0].parameters(), strict=False)])
    with pytest.raises(ValueError, match="given twice"):
        optimizer.param_groups = [{**kept, "params": [model[0].weight, model[0].weight]}]


@pytest.mark.parametrize("memory", ["store", "replay", "stream"])
def test_a_replaced_parameter_is_trained(memory: str) -> None:
    model = mlp()
    optimizer = sgd(model, memory=memory)
    for _ in range(2):
        optimizer.step(mean_loss(model))
    old = model[3].weight
    model[3].weight = new = nn.Parameter(old.detach().clone())
    optimizer.param_groups[0]["params"][2] = new
    before, stays = new.detach().clone(), old.detach().clone()
    optimizer.step(mean_loss(model))
    assert not torch.equal(new, before) and torch.equal(old, stays)


def test_a_parameter_that_the_model_has_replaced_is_named() -> None:
    model = mlp()
    optimizer = GuessGradOptimizer(model.named_parameters(), torch.optim.SGD, lr=0.1, seed=0)
    for _ in range(3):
        optimizer.step(mean_loss(model))
    model[3].weight = nn.Parameter(model[3].weight.detach().clone())
    with pytest.warns(GuessWarning, match=r"does not depend on 3\.weight"):
        optimizer.step(mean_loss(model))


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused: bool) -> None:
    """``scaler.step`` unscales the estimate of a scaled loss. If it is not finite, no parameter changes."""
    model, twin = mlp().float(), mlp().float()
    twin.load_state_dict(model.state_dict())
    optimizer = GuessGradOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01, seed=0, fused=fused)
    reference = GuessGradOptimizer(twin.parameters(), torch.optim.AdamW, lr=0.01, seed=0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    x = X.float()
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.estimate(lambda: scaler.scale(F.cross_entropy(model(x), LABELS)))
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        reference.zero_grad()
        reference.estimate(lambda: F.cross_entropy(twin(x), LABELS))
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        reference.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    before = values(model)
    optimizer.zero_grad()
    optimizer.estimate(mean := lambda: scaler.scale(F.cross_entropy(model(x), LABELS)))
    assert model[0].weight.grad is not None
    model[0].weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert equal(before, values(model)) and scaler.get_scale() == 512.0
    optimizer.zero_grad()
    optimizer.estimate(mean)
    scaler.step(optimizer)
    assert not equal(before, values(model))


@pytest.mark.parametrize("warm", [0, 5])
@pytest.mark.parametrize("memory", ["store", "replay", "stream"])
def test_a_scaled_loss_is_refused_where_nobody_unscales(memory: str, warm: int) -> None:
    model = mlp()
    optimizer = sgd(model, memory=memory)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    for _ in range(warm):
        optimizer.step(mean_loss(model))
    before = values(model)
    with pytest.raises(ClosureError, match=r"GradScaler\.scale.*scaler\.step"):
        optimizer.step(lambda: scaler.scale(mean_loss(model)()))
    assert equal(before, values(model))
    off = torch.amp.GradScaler("cpu", enabled=False)
    optimizer.step(lambda: off.scale(mean_loss(model)()))
    assert float(scaler.scale(torch.ones(()))) == 65536


@pytest.mark.parametrize("memory", ["store", "replay", "stream"])
def test_averaged_weights_and_their_schedule(memory: str) -> None:
    model = mlp()
    optimizer = sgd(model, memory=memory)
    average = torch.optim.swa_utils.AveragedModel(model)
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
    seen = [values(model)]
    average.update_parameters(model)
    for _ in range(3):
        optimizer.step(mean_loss(model))
        average.update_parameters(model)
        schedule.step()
        seen.append(values(model))
    assert_near(average.module.parameters(), [sum(ps) / 4 for ps in zip(*seen, strict=True)], 1e-9)  # type: ignore[misc]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


# --------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
def test_resumed_training_equals_uninterrupted(at: int) -> None:
    """Bit for bit, whatever the age of the bases, in a process seeded differently."""

    def build(model: nn.Module) -> GuessGradOptimizer:
        return GuessGradOptimizer(model.parameters(), lr=0.05, estimator=WPerp(k=2, refresh=3))

    model, resumed = mlp(), mlp()
    optimizer = build(model)
    for _ in range(at):
        optimizer.step(mean_loss(model))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    losses = [float(optimizer.step(mean_loss(model))) for _ in range(5)]

    torch.manual_seed(99)
    saved = torch.load(file, weights_only=True)
    again = build(resumed)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    assert [float(again.step(mean_loss(resumed))) for _ in range(5)] == losses
    assert equal(values(model), values(resumed))


MISMATCHES: dict[str, Callable[[nn.Sequential], Any]] = {
    "fewer parameters": lambda m: m[:3].parameters(),
    "more groups": lambda m: [{"params": m[0].parameters()}, {"params": m[1:].parameters()}],
}


@pytest.mark.parametrize("params", MISMATCHES.values(), ids=MISMATCHES)
def test_a_state_dict_that_does_not_fit_is_refused(params: Callable[[nn.Sequential], Any]) -> None:
    model = mlp()
    state = GuessGradOptimizer(params(mlp()), torch.optim.SGD, lr=9.0, momentum=0.5).state_dict()
    optimizer = GuessGradOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, seed=0)
    optimizer.step(mean_loss(model))
    with pytest.raises(ValueError):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.1 and len(optimizer.state) == 6
    optimizer.step(mean_loss(model))


def test_loading_a_state_dict_brings_back_the_settings_of_the_groups() -> None:
    model = mlp()
    optimizer = sgd(model, lr=0.1)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 7.0
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.1


# --------------------------------------------------------------------------------- what estimate and step return


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("losses", [mean_loss, example_losses], ids=["mean", "per example"])
@pytest.mark.parametrize("method", ["step", "estimate"])
def test_the_loss_is_that_of_the_closure_before_the_update(
    method: str, losses: Callable[[nn.Module], Closure], estimator: str
) -> None:
    model = mlp()
    optimizer = sgd(model, lr=0.5, estimator=estimator)
    for _ in range(3):
        optimizer.zero_grad()
        expected = losses(model)().mean().detach()
        loss = getattr(optimizer, method)(losses(model))
        assert float(loss) == pytest.approx(float(expected), rel=1e-12)
        assert not isinstance(loss, Tensor) or (loss.shape == () and not loss.requires_grad)


def test_estimate_adds_to_grad_and_moves_nothing() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, other = sgd(model), sgd(twin)
    before = values(model)
    optimizer.estimate(mean_loss(model))
    first = grads(model)
    optimizer.zero_grad()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.25)
    optimizer.estimate(mean_loss(model))
    second = [g - 0.25 for g in grads(model)]
    assert not equal(first, second)  # another step of the stream of guesses
    assert equal(before, values(model)) and not optimizer.state
    other.estimate(mean_loss(twin))
    other.estimate(mean_loss(twin))
    assert_near(grads(twin), [a + b for a, b in zip(first, second, strict=True)])


def test_step_without_closure_applies_what_grad_holds() -> None:
    """Two micro-batches and gradient clipping, as in common training loops."""
    model = mlp()
    optimizer = sgd(model, lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        for part in (slice(0, 6), slice(6, 12)):
            optimizer.estimate(lambda part=part: F.cross_entropy(model(X[part]), LABELS[part]) / 2)
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        before = values(model)
        optimizer.step()
        assert sum(float(g.pow(2).sum()) for g in grads(model)) == pytest.approx(1e-4, rel=1e-3)
        assert_near(values(model), [p - 0.5 * g for p, g in zip(before, grads(model), strict=True)])


def test_step_of_a_closure_equals_zero_grad_estimate_step() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, other = sgd(model), sgd(twin)
    for _ in range(3):
        optimizer.step(mean_loss(model))
        for p in model.parameters():
            p.grad = torch.ones_like(p)  # not estimated, so the next step(closure) just drops it
        other.zero_grad()
        other.estimate(mean_loss(twin))
        other.step()
    assert equal(values(model), values(twin))


def backward(optimizer: GuessGradOptimizer, model: nn.Module) -> None:
    mean_loss(model)().backward()


def estimate(optimizer: GuessGradOptimizer, model: nn.Module) -> None:
    optimizer.estimate(mean_loss(model))


def assign(optimizer: GuessGradOptimizer, model: nn.Module) -> None:
    for p, g in zip(model.parameters(), torch.autograd.grad(mean_loss(model)(), list(model.parameters())), strict=True):
        p.grad = g


def replace(optimizer: GuessGradOptimizer, model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = 0.5 * p.grad if p.grad is not None else None


def scale(optimizer: GuessGradOptimizer, model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad.div_(2)


def zeros(optimizer: GuessGradOptimizer, model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


def unscale(optimizer: GuessGradOptimizer, model: nn.Module) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)


Act = Callable[[GuessGradOptimizer, nn.Module], Any]


def zero_grad(optimizer: GuessGradOptimizer, model: nn.Module) -> None:
    optimizer.zero_grad()


def fill_zero(optimizer: GuessGradOptimizer, model: nn.Module) -> None:
    model.zero_grad(set_to_none=False)


def apply(optimizer: GuessGradOptimizer, model: nn.Module) -> None:
    optimizer.step()


def clip(optimizer: GuessGradOptimizer, model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


#: What happens before ``step()``, and whether the gradients are the optimizer's own.
ORIGINS: list[tuple[bool, list[Act]]] = [
    (False, [backward]),
    (False, [estimate, backward]),
    (False, [backward, estimate]),
    (False, [estimate, scale, backward]),
    (False, [estimate, fill_zero, backward]),
    (False, [estimate, zero_grad, backward]),
    (False, [estimate, apply, zero_grad, backward]),
    (False, [estimate, apply, backward]),
    (False, [assign]),
    (False, [assign, estimate]),
    (False, [estimate, apply, assign]),
    (True, [estimate]),
    (True, [estimate, estimate]),
    (True, [estimate, clip]),
    (True, [estimate, scale, estimate, replace, clip]),
    (True, [estimate, unscale]),
    (True, [zeros, estimate]),
    (True, [estimate, apply, fill_zero, estimate]),
    (True, [backward, fill_zero, estimate]),
    (True, [backward, zero_grad, estimate]),
    (True, [estimate, apply]),  # once more, as with any optimizer of torch
    (True, [estimate, replace, apply]),
]


@pytest.mark.parametrize(
    ("own", "acts"), ORIGINS, ids=[f"{own}: {' '.join(f.__name__ for f in acts)}" for own, acts in ORIGINS]
)
def test_step_applies_only_gradients_that_it_estimated(own: bool, acts: list[Act]) -> None:
    model, twin = mlp(), mlp()
    optimizer, allowing = sgd(model, lr=0.5), sgd(twin, lr=0.5, foreign_gradients="allow")
    for act in acts:
        act(optimizer, model)
        act(allowing, twin)
    before, held = values(model), grads(model)
    if not own:
        with pytest.raises(RuntimeError, match=r"gradient of parameter 0 .*step\(closure\).*foreign_gradients='allow'"):
            optimizer.step()
        assert equal(before, values(model)) and equal(held, grads(model))
        optimizer.step(mean_loss(model)) if not optimizer._pending else optimizer.zero_grad()
    else:
        optimizer.step()
        assert_near(values(model), [p - 0.5 * g for p, g in zip(before, held, strict=True)])
    allowing.step()


def test_copies_and_files_of_models_and_gradients() -> None:
    """The optimizer's check for ``backward()`` does not disturb copies or files of the model."""
    model = mlp()
    optimizer = sgd(model)
    optimizer.estimate(mean_loss(model))
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    mean_loss(twin)().backward()
    mean_loss(loaded)().backward()
    file = io.BytesIO()
    torch.save([p.grad for p in model.parameters()], file)
    file.seek(0)
    assert equal(torch.load(file, weights_only=True), grads(model))
    optimizer.step()  # what the copies did is not noticed here


def test_one_parameter_with_a_foreign_gradient_is_named() -> None:
    model = mlp()
    optimizer = GuessGradOptimizer(model.named_parameters(), torch.optim.SGD, lr=0.5)
    optimizer.estimate(mean_loss(model))
    F.linear(X, model[0].weight).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradient of 0\.weight that"):
        optimizer.step()


def test_gradients_share_no_memory() -> None:
    """Of ``a + b`` autograd makes one gradient for both: clipping must not scale it twice."""
    a, b = (nn.Parameter(torch.randn(4, 5, dtype=torch.float64)) for _ in range(2))
    optimizer = GuessGradOptimizer([a, b], torch.optim.SGD, lr=0.1, seed=0)
    optimizer.estimate(lambda: F.cross_entropy(F.linear(X, a + b), LABELS))
    assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)
    a.grad.mul_(2)
    assert not torch.equal(a.grad, b.grad)


CLEARED: dict[str, Callable[[GuessGradOptimizer, nn.Module], Any]] = {
    "optimizer.zero_grad()": lambda o, m: o.zero_grad(),
    "model.zero_grad()": lambda o, m: m.zero_grad(),  # our reading
    "step()": lambda o, m: o.step(),  # our reading: applied is no longer pending
}


@pytest.mark.parametrize("clear", CLEARED.values(), ids=CLEARED)
def test_pending_gradients_end_with(clear: Callable[[GuessGradOptimizer, nn.Module], Any]) -> None:
    model = mlp()
    optimizer = sgd(model)
    optimizer.estimate(mean_loss(model))
    with pytest.raises(RuntimeError, match=r"(?i)zero_grad|pending|estimate"):
        optimizer.step(mean_loss(model))
    clear(optimizer, model)
    optimizer.step(mean_loss(model))


# ---------------------------------------------------------------------------------- which gradient is estimated

WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
HOLES = LABELS.masked_fill(torch.arange(12) < 4, -100)
HELD = (HOLES >= 0).double()
Loss = Callable[[Tensor], Tensor]
#: name -> (scalar as scripts write it, per-example losses with the same mean)
PAIRS: dict[str, tuple[Loss, Loss]] = {
    "cross_entropy": (lambda o: F.cross_entropy(o, LABELS), lambda o: F.cross_entropy(o, LABELS, reduction="none")),
    "cross_entropy sum": (
        lambda o: F.cross_entropy(o, LABELS, reduction="sum"),
        lambda o: 12 * F.cross_entropy(o, LABELS, reduction="none"),
    ),
    "cross_entropy smoothed": (
        lambda o: F.cross_entropy(o, LABELS, label_smoothing=0.1),
        lambda o: F.cross_entropy(o, LABELS, label_smoothing=0.1, reduction="none"),
    ),
    "cross_entropy weight": (
        lambda o: F.cross_entropy(o, LABELS, WEIGHT),
        lambda o: F.cross_entropy(o, LABELS, WEIGHT, reduction="none") * 12 / WEIGHT[LABELS].sum(),
    ),
    "cross_entropy ignore_index": (
        lambda o: F.cross_entropy(o, HOLES),
        lambda o: F.cross_entropy(o, HOLES, reduction="none") * 12 / HELD.sum(),
    ),
    "CrossEntropyLoss module": (
        lambda o: nn.CrossEntropyLoss()(o, LABELS),
        lambda o: nn.CrossEntropyLoss(reduction="none")(o, LABELS),
    ),
    "cross_entropy / 2": (
        lambda o: F.cross_entropy(o, LABELS) / 2,
        lambda o: F.cross_entropy(o, LABELS, reduction="none") / 2,
    ),
    "mse": (lambda o: F.mse_loss(o, TARGETS), lambda o: (o - TARGETS).pow(2).mean(1)),
    "mse sum": (lambda o: F.mse_loss(o, TARGETS, reduction="sum"), lambda o: 12 * (o - TARGETS).pow(2).sum(1)),
}


@pytest.mark.filterwarnings("error::guessopt.GuessWarning")
@pytest.mark.parametrize(("scalar", "examples"), PAIRS.values(), ids=PAIRS)
def test_scalar_and_per_example_closures_agree(scalar: Loss, examples: Loss) -> None:
    """Equal guesses give equal gradients and losses; no warning comes."""
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, other = sgd(model), sgd(twin)
    for _ in range(2):
        loss = optimizer.step(lambda: scalar(model(X)))
        assert float(loss) == pytest.approx(float(other.step(lambda: examples(twin(X)))), rel=1e-12)
        assert_near(grads(model), grads(twin), 1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_agree(engine: str, estimator: str) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    sgd(model, engine=engine, estimator=estimator, guesses=3).estimate(mean_loss(model))
    sgd(twin, estimator=estimator, guesses=3).estimate(mean_loss(twin))
    assert_near(grads(model), grads(twin), 1e-10)


@pytest.mark.parametrize("losses", [mean_loss, example_losses], ids=["mean", "per example"])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_exact_last_site_has_the_true_gradient_of_the_mean(engine: str, losses: Any) -> None:
    model = mlp()
    expected = torch.autograd.grad(mean_loss(model)(), list(model[5].parameters()))
    sgd(model, exact_last=True, engine=engine).estimate(losses(model))
    assert_near(grads(model)[4:], expected, 1e-10)
    model.zero_grad()
    sgd(model, exact_last=False, engine=engine).estimate(losses(model))
    assert not torch.allclose(grads(model)[4], expected[0])


def test_a_loss_written_by_hand_is_as_good_as_a_built_in_one() -> None:
    """Per-example derivatives need no known loss, and no warning comes."""
    gradients = []
    for loss in (lambda o: F.mse_loss(o, TARGETS), lambda o: ((o - TARGETS) ** 2).sum() / TARGETS.numel()):
        model = mlp()
        model.load_state_dict({k: v * 0 + 0.1 for k, v in model.state_dict().items()})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sgd(model).estimate(lambda loss=loss, model=model: loss(model(X)))
        gradients.append(grads(model))
    assert_near(*gradients)


def test_coupled_examples_warn_once() -> None:
    model = mlp(norm=True)
    optimizer = sgd(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step(mean_loss(model))
    assert ["interact" in str(w.message) for w in caught if issubclass(w.category, GuessWarning)] == [True]
    assert all(g.any() for g in grads(model))


L2_LOSSES: dict[str, Loss] = {
    "mean": lambda o: F.cross_entropy(o, LABELS),
    "per example": lambda o: F.cross_entropy(o, LABELS, reduction="none"),
    "without shares": lambda o: o.pow(2).mean().sqrt(),
}


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("loss", L2_LOSSES.values(), ids=L2_LOSSES)
def test_terms_of_parameters_alone_are_differentiated_exactly(loss: Loss, estimator: str) -> None:
    """The guesses are equal with and without the L2 term, so the gradients differ by the gradient of this term."""
    model = mlp()
    plain, decayed = sgd(model, estimator=estimator), sgd(model, estimator=estimator)
    plain.estimate(lambda: loss(model(X)))
    without = grads(model)
    model.zero_grad()
    decayed.estimate(lambda: loss(model(X)) + 0.1 * sum(p.pow(2).sum() for p in model.parameters()))
    assert_near([a - b for a, b in zip(grads(model), without, strict=True)], [0.2 * p for p in values(model)], 1e-11)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_parameters_not_handed_over_are_constants(estimator: str) -> None:
    model = mlp()
    frozen = copy.deepcopy(model)
    frozen[0].requires_grad_(False)
    weight, bias = model[0].parameters()
    bias.grad = marker = torch.ones_like(bias)
    optimizer = GuessGradOptimizer(model[1:].parameters(), torch.optim.SGD, estimator, lr=0.1, seed=0)
    other = GuessGradOptimizer(frozen[1:].parameters(), torch.optim.SGD, estimator, lr=0.1, seed=0)
    for _ in range(2):
        optimizer.step(mean_loss(model))
        other.step(mean_loss(frozen))
    assert weight.grad is None and bias.grad is marker and bool((marker == 1).all())
    assert all(p.requires_grad for p in model.parameters())
    assert equal(values(model), values(frozen))


def test_unfreezing_a_layer_between_steps() -> None:
    """Our reading: as in torch, a parameter takes part as soon as it requires grad."""
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    optimizer.step(mean_loss(model))
    assert model[0].weight.grad is None
    model[0].requires_grad_(True)
    optimizer.step(mean_loss(model))
    assert all(g.any() for g in grads(model))


def test_a_parameter_that_the_closure_does_not_use_stays_as_it_is() -> None:
    model = mlp()
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = GuessGradOptimizer([*model.parameters(), unused], torch.optim.SGD, lr=0.1, seed=0)
    optimizer.step(mean_loss(model))
    assert unused.grad is None or not unused.grad.any()
    assert bool((unused == 1).all()) and all(g.any() for g in grads(model))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 6, dtype=torch.float64)
        self.mix = nn.Linear(6, 6, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = F.linear(torch.tanh(self.mix(self.embed(tokens))), self.embed.weight)
        return out


def test_tied_weights_get_both_shares() -> None:
    model = Tied()
    tokens = torch.arange(8) % 4

    def closure() -> Tensor:
        return F.cross_entropy(model(tokens), LABELS[:8].roll(1))

    expected = torch.autograd.grad(closure(), list(model.parameters()))
    sgd(model, estimator="activation_perturbation", guesses=1600).estimate(closure)
    for guess, true in zip(grads(model), expected, strict=True):
        assert F.cosine_similarity(guess.flatten(), true.flatten(), dim=0) > 0.9


# ------------------------------------------------------------------------------------------ randomness, buffers


def trained(seed: int | None, torch_seed: int, model: nn.Module) -> list[Tensor]:
    model = copy.deepcopy(model)
    torch.manual_seed(torch_seed)
    optimizer = sgd(model, seed=seed)
    for _ in range(2):
        optimizer.step(mean_loss(model))
    return values(model)


def test_without_seed_the_guesses_follow_torch_manual_seed() -> None:
    model = mlp()
    assert equal(trained(None, 3, model), trained(None, 3, model))
    assert not equal(trained(None, 3, model), trained(None, 4, model))


def test_a_seed_fixes_the_guesses() -> None:
    model = mlp()
    assert equal(trained(5, 3, model), trained(5, 4, model))
    assert not equal(trained(5, 3, model), trained(6, 3, model))


@pytest.mark.parametrize("seed", [0, None], ids=["seed=0", "seed=None"])
def test_every_step_has_new_guesses(seed: int | None) -> None:
    model = mlp()
    optimizer = sgd(model, seed=seed)
    seen: list[list[Tensor]] = []
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.estimate(mean_loss(model))
        assert not any(equal(grads(model), other) for other in seen)
        seen.append(grads(model))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", [0, None], ids=["seed=0", "seed=None"])
@pytest.mark.parametrize("warm", [0, 2], ids=["first step", "third step"])
def test_random_streams_move_as_under_a_plain_forward(warm: int, seed: int | None, engine: str) -> None:
    """torch (dropout), numpy and random. The loss is that of a plain forward with equal draws."""
    model = mlp(dropout=0.5)

    def closure() -> Tensor:
        return F.cross_entropy(model(X + np.random.rand() + random.random()), LABELS)

    optimizer = sgd(model, seed=seed, engine=engine)
    for _ in range(warm):
        optimizer.step(closure)
    seeded(5)
    expected = float(closure().detach()), torch.rand(1).item(), np.random.rand(), random.random()
    seeded(5)
    loss = float(optimizer.step(closure))
    assert loss == pytest.approx(expected[0], rel=1e-12)
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected[1:]


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["step", "estimate"])
def test_batch_norm_statistics_move_once_a_step(method: str, engine: str) -> None:
    model = mlp(norm=True)
    optimizer = sgd(model, engine=engine, lr=0.5)
    for _ in range(3):
        twin = copy.deepcopy(model)
        mean_loss(twin)()
        optimizer.zero_grad()
        getattr(optimizer, method)(mean_loss(model))
        for (name, buffer), expected in zip(model.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(buffer, expected, rtol=1e-12, atol=1e-12, msg=name)
    assert int(model.state_dict()["1.num_batches_tracked"]) == 3
    assert all(g.any() for g in (p.grad for p in model.parameters()) if g is not None)


# ---------------------------------------------------------------------------------------- estimators by name patterns


def test_estimators_by_patterns_of_parameter_names() -> None:
    """The first matching pattern decides. A site takes the estimator of its first parameter."""
    patterns = {"0.*": WTranspose(), "3.*": {"name": "w_perp", "k": 2}, "*": "activation_perturbation"}
    model, split = mlp(), mlp()
    split.load_state_dict(model.state_dict())
    groups = [
        {"params": split[0].parameters(), "estimator": WTranspose()},
        {"params": split[3].parameters(), "estimator": WPerp(k=2)},
        {"params": split[5].parameters(), "estimator": "activation_perturbation"},
    ]
    optimizer = GuessGradOptimizer(model.named_parameters(), torch.optim.SGD, patterns, lr=0.1, seed=0)
    reference = GuessGradOptimizer(groups, torch.optim.SGD, lr=0.1, seed=0)
    optimizer.estimate(mean_loss(model))
    reference.estimate(mean_loss(split))
    assert equal(grads(model), grads(split))
    again = GuessGradOptimizer(mlp().named_parameters(), torch.optim.SGD, "w_perp", lr=0.1)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert again.estimation.estimators == optimizer.estimation.estimators


def test_patterns_need_names_and_must_cover_every_parameter() -> None:
    with pytest.raises(ValueError, match="named_parameters"):
        GuessGradOptimizer(mlp().parameters(), estimator={"*": "w_perp"})
    with pytest.raises(ValueError, match=r"no pattern matches.*'3.weight'"):
        GuessGradOptimizer(mlp().named_parameters(), estimator={"0.*": "w_perp"})
    with pytest.raises(ValueError, match="w_perp"):
        GuessGradOptimizer(mlp().named_parameters(), estimator={"*": "w_prep"})
