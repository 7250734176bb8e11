"""State: loading is all or nothing, copies of optimizers, files. Resuming bit for bit is in test_contracts.py."""

import copy
import inspect
import io
import json
import math
import os
import pickle
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.multiprocessing
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import guessopt
from benchmarks.reliability_resume import (
    ESTIMATORS,
    GUESSES,
    VARIANTS,
    WAYS,
    Case,
    cases,
    resume_mismatches,
    resumed,
    small,
    stopped,
)
from guessopt import GuessGradOptimizer, GuessWarning, saving
from guessopt.cache import SiteCache
from guessopt.estimators import estimator_names, make_estimator
from guessopt.rng import NoiseSource
from guessopt.state import VERSION, placement
from guessopt.step.mode import MODES

from .test_bad_input import assert_same, snapshot

X, Y = torch.linspace(-1, 1, 30).reshape(6, 5), torch.arange(6) % 3
Closure = Callable[[], Tensor]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def loss_of(model: nn.Module) -> Closure:
    return lambda: F.cross_entropy(model(X), Y)


def used(estimator: Any = "w_perp", steps: int = 2, base: Any = torch.optim.AdamW, **options: Any) -> Any:
    """A model and its optimizer after ``steps`` steps."""
    model = net()
    opt = GuessGradOptimizer(model.named_parameters(), base, estimator, **{"lr": 0.01, **options})
    for _ in range(steps):
        opt.step(loss_of(model))
    return model, opt


def train(model: nn.Module, opt: GuessGradOptimizer) -> list[Any]:
    """Losses and weights of three steps. The global random state is put back."""
    random_state = torch.get_rng_state()
    try:
        losses = [float(opt.step(loss_of(model))) for _ in range(3)]
    finally:
        torch.set_rng_state(random_state)
    return [losses, [p.tolist() for p in model.parameters()]]


# ------------------------------------------------------------------------------------------------ resuming, bit for bit


def test_every_registered_estimator_is_in_the_matrix() -> None:
    shipped = {name for name in estimator_names() if type(make_estimator(name)).__module__.startswith("guessopt.")}
    found = {(case.estimator["name"], case.memory, case.guesses) for case in cases()}
    assert found >= {(name, memory, guesses) for name in shipped for memory in MODES for guesses in GUESSES}


HANDFUL = [
    Case(small("w_perp"), "replay", 3, "frozen middle layer"),
    Case(small("learned_feedback"), network="residual"),
    Case(small("w_perp_ns"), guesses=3, options={"orthogonal": True}),
    Case(small("directional_descent"), "stream", base="NAdam"),
]


def test_resumed_in_another_process() -> None:
    assert resume_mismatches(HANDFUL) == []


@pytest.mark.slow
def test_the_whole_matrix_in_another_process() -> None:
    assert resume_mismatches() == []


def test_automatic_memory_goes_on_from_what_was_learned() -> None:
    """The first step after loading measures the modes again. The loaded state must not change. Results are equal up
    to rounding, for another mode may be the fastest."""
    model, opt = used("learned_feedback", memory="auto")
    saved = copy.deepcopy((model.state_dict(), opt.state_dict(), torch.get_rng_state()))
    expected = train(model, opt)
    model, opt = used("learned_feedback", steps=0, memory="auto")
    model.load_state_dict(saved[0])
    opt.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    assert train(model, opt)[0] == pytest.approx(expected[0], rel=1e-5)


def test_another_state_of_the_guesses_is_noticed(tmp_path: Path) -> None:
    """The comparison of the resume tests can fail."""
    expected = stopped(HANDFUL[0], tmp_path)
    saved = torch.load(tmp_path / "pt", weights_only=True)
    saved["optimizer"]["guessopt"]["noise"]["generators"] = {}
    torch.save(saved, tmp_path / "pt")
    assert resumed(HANDFUL[0], tmp_path, WAYS[0]) != expected


@pytest.mark.parametrize("order", ["optimizer first", "random states first"])
@pytest.mark.parametrize("reseeded", [False, True], ids=["", "manual_seed between the last step and saving"])
def test_the_global_seed_may_come_back_before_or_after(reseeded: bool, order: str) -> None:
    model, opt = used()
    if reseeded:
        torch.manual_seed(77)  # the next step starts a new stream
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    state = torch.get_rng_state()
    expected = train(model, opt)
    torch.manual_seed(1234)
    model, opt = used(steps=0)
    if order == "random states first":
        torch.set_rng_state(state)
    model.load_state_dict(saved[0])
    opt.load_state_dict(saved[1])
    torch.set_rng_state(state)
    assert train(model, opt) == expected


def test_a_new_seed_after_loading_starts_a_new_stream() -> None:
    source, other = NoiseSource(None), NoiseSource(None)
    source.follow()
    source.normal((3,), torch.float32, torch.device("cpu"))
    other.load(source.state())
    torch.manual_seed(5)
    other.follow()
    fresh = NoiseSource(5)
    fresh.follow()
    draws = [s.normal((3,), torch.float32, torch.device("cpu")) for s in (other, fresh)]
    assert torch.equal(*draws)


# ----------------------------------------------------------------------------------------------- whole or not at all


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    *parents, last, value = path

    def change(state: dict[str, Any]) -> None:
        found: Any = state
        for key in parents:
            found = found[key]
        if value is None:
            del found[last]
        else:
            found[last] = value

    return change


def _first_param(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return _set("guessopt", "params", 0, key, value)


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no entry of ours": (_set("guessopt", None), "no 'guessopt' entry"),
    "no version": (_set("guessopt", "version", None), "no version"),
    "newer version": (_set("guessopt", "version", VERSION + 1), "newer guessopt; upgrade"),
    "no groups": (_set("param_groups", None), "no entry 'param_groups'"),
    "no base state": (_set("state", None), "no entry 'state'"),
    "no steps": (_set("guessopt", "steps", None), "no entry 'steps'"),
    "no noise": (_set("guessopt", "noise", None), "no entry 'noise'"),
    "no stream": (_set("guessopt", "noise", "stream", None), "no entry 'stream'"),
    "no cache": (_set("guessopt", "cache", None), "no entry 'cache'"),
    "steps of another type": (_set("guessopt", "steps", "3"), "expected int, got str"),
    "another base": (_set("guessopt", "base", "SGD"), "saved with the base SGD"),
    "more groups": (lambda s: s["param_groups"].append(s["param_groups"][0]), "2 parameter groups"),
    "fewer parameters": (lambda s: s["param_groups"][0]["params"].pop(), "has 5 parameters"),
    "fewer shapes": (lambda s: s["guessopt"]["params"].pop(), "5 entries for 6 parameters"),
    "another shape": (_first_param("shape", [8, 4]), r"0.weight had shape \[8, 4\] and has \[8, 5\]"),
    "a complex dtype": (_first_param("dtype", "complex64"), r"0.weight was complex64 and is float32: another model"),
    "no such device": (_first_param("device", "abacus"), "'abacus'"),
    "another name": (_set("param_groups", 0, "param_names", 1, "0.b"), "'0.b' of group 0.*'0.bias'"),
    "unknown estimator": (_set("param_groups", 0, "estimator", {"name": "w_prep"}), "did you mean 'w_perp'"),
    "no estimator": (_set("param_groups", 0, "estimator", None), "no entry 'estimator'"),
    "bad options": (_set("param_groups", 0, "estimator", {"name": "w_perp", "q": 1}), "cannot be made"),
    "an option is missing": (_set("param_groups", 0, "betas", None), "has no 'betas', which AdamW needs"),
    "no step count": (_set("state", 3, "step", None), "AdamW cannot load it .KeyError: 'step'"),
    "state of no parameter": (_set("state", 17, {"exp_avg": torch.ones(2)}), "entry 17"),
    "damaged generator": (_set("guessopt", "noise", "generators", "cpu", torch.zeros(7, dtype=torch.uint8)), "damaged"),
    "generator without a state": (_set("guessopt", "noise", "generators", "cpu", 3), "no state"),
    "damaged cache": (lambda s: next(iter(s["guessopt"]["cache"].values())).pop("step"), "no entry 'step'"),
    "learning in a mode that cannot": (
        _set("param_groups", 0, "estimator", {"name": "learned_feedback"}), "does not go with memory='replay'"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_a_refused_state_changes_nothing(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    options = {"memory": "replay", "guesses": 3} if "memory" in message else {}
    model, opt = used(**options)
    state = copy.deepcopy(opt.state_dict())
    opt.step(loss_of(model))
    change(state)
    before, plans, groups = snapshot(model, opt), opt.estimation.plans, opt.param_groups
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    assert_same(before, snapshot(model, opt))
    assert opt.estimation.plans is plans and opt.param_groups is groups
    opt.step(loss_of(model))


class Rude(torch.optim.AdamW):
    """``load_state_dict`` fails after it has changed everything in place."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.added = True
        for group in self.param_groups:
            group["lr"], group["params"][:] = 9.0, group["params"][:1]
        for entry in self.state.values():
            entry.pop("exp_avg")
        self.state.popitem()
        raise KeyboardInterrupt


def test_an_error_within_the_base_changes_nothing() -> None:
    model, opt = used(base=Rude)
    state = copy.deepcopy(opt.state_dict())
    opt.step(loss_of(model))
    before = snapshot(model, opt)
    with pytest.raises(KeyboardInterrupt):
        opt.load_state_dict(state)
    assert_same(before, snapshot(model, opt))
    assert not hasattr(opt.base, "added")
    opt.step(loss_of(model))


def test_an_error_in_a_hook_changes_nothing() -> None:
    model, opt = used()
    state = copy.deepcopy(opt.state_dict())
    opt.step(loss_of(model))
    before = snapshot(model, opt)

    def fail(opt: Any) -> None:
        raise RuntimeError("no")

    handle = opt.register_load_state_dict_post_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        opt.load_state_dict(state)
    assert_same(before, snapshot(model, opt))
    handle.remove()
    opt.load_state_dict(state)
    assert opt.estimation.steps == 2


def test_hooks_on_the_optimizer_and_what_a_base_adds_are_kept() -> None:
    class Counting(torch.optim.AdamW):
        count = 0

        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "count": self.count}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.count = state_dict["count"]
            super().load_state_dict(state_dict)

    (_, opt), (_, other) = used(base=Counting), used(base=Counting)
    opt.base.count = 7
    opt.register_state_dict_post_hook(lambda opt, state: {**state, "mine": 1})
    seen: list[Any] = []
    other.register_load_state_dict_pre_hook(lambda opt, state: seen.append(state["mine"]))
    other.load_state_dict(opt.state_dict())
    assert (other.base.count, seen) == (7, [1])


def test_loaded_state_has_memory_of_its_own() -> None:
    """If two optimizers shared moments, both would write into them."""
    (model, opt), (other, twin) = used(), used(steps=0)
    other.load_state_dict(model.state_dict())
    twin.load_state_dict(opt.state_dict())
    before = snapshot(model, opt)
    train(other, twin)
    assert_same(before, snapshot(model, opt))


def _tensor_state(opt: GuessGradOptimizer) -> list[Any]:
    return [
        (key, v.dtype, v.stride(), v.tolist())
        for entry in opt.base.state.values()
        for key, v in entry.items()
        if isinstance(v, Tensor)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("base", ["NAdam", "ASGD", "Adafactor"])
def test_state_keeps_its_own_dtype(base: str, dtype: torch.dtype) -> None:
    """torch casts all but ``step`` to the parameter's dtype, which rounds NAdam's ``mu_product``."""

    def start() -> tuple[nn.Parameter, GuessGradOptimizer]:
        p = nn.Parameter(torch.arange(6, dtype=dtype).reshape(2, 3))
        return p, GuessGradOptimizer([p], getattr(torch.optim, base), "activation_perturbation", lr=0.1, seed=0)

    p, opt = start()
    x = torch.ones(3, 4, dtype=dtype)
    for _ in range(3):
        opt.step(lambda: (p @ x).square().mean())
    _, again = start()
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert _tensor_state(again) == _tensor_state(opt)


def test_state_is_laid_out_like_its_parameter() -> None:
    """torch's fused updates need it."""
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    opt = GuessGradOptimizer(conv.parameters(), torch.optim.AdamW, "activation_perturbation", lr=0.1, fused=True)
    opt.step(lambda: conv(torch.ones(2, 3, 4, 4)).square().mean())
    state = copy.deepcopy(opt.state_dict())
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"].contiguous()
    expected = _tensor_state(opt)
    opt.load_state_dict(state)
    assert _tensor_state(opt) == expected


# ------------------------------------------------------------------------------------------------------ other devices


def _from_gpu(state: dict[str, Any]) -> dict[str, Any]:
    """A state as if saved on a GPU and read with ``map_location="cpu"``."""
    own = state["guessopt"]
    for param in own["params"]:
        param["device"] = "cuda:0"
    for entry in own["cache"].values():
        entry["device"] = entry["device"] and "cuda:0"
    own["noise"]["generators"] = {"cuda:0": torch.zeros(16, dtype=torch.uint8)}
    return state


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device must not be here")
@pytest.mark.parametrize("estimator", ["w_perp", "learned_feedback"])
def test_a_checkpoint_of_a_gpu_loads_on_a_cpu(estimator: str) -> None:
    model, opt = used(estimator)
    state = _from_gpu(copy.deepcopy(opt.state_dict()))
    again = GuessGradOptimizer(model.named_parameters(), torch.optim.AdamW, estimator, lr=0.01)
    with pytest.warns(GuessWarning, match="cuda:0, whose generator cannot go on here") as caught:
        again.load_state_dict(state)
        again.load_state_dict(state)
    assert len(caught) == 1
    assert _tensor_state(again) == _tensor_state(opt)
    assert {entry["device"] for entry in again.state_dict()["guessopt"]["cache"].values()} <= {"cpu", None}
    again.step(loss_of(model))
    assert list(again.state_dict()["guessopt"]["noise"]["generators"]) == ["cpu"]


def test_where_states_of_other_devices_go() -> None:
    """``meta`` stands for another device."""
    place = placement({"cpu": "meta", "cuda:3": "cpu"})
    assert [str(place(d)) for d in ("cpu", "cuda:3", "cuda:98")] == ["meta", "cpu", "meta"]
    cache, moved = SiteCache(), SiteCache()
    cache.put("a", 3, {"B": torch.ones(2), "n": 1})
    moved.load_state_dict(cache.state_dict(), place)
    assert moved.peek("a")["B"].is_meta
    source = NoiseSource(0)
    source.follow()
    source.normal((2,), torch.float32, torch.device("cpu"))
    assert NoiseSource(0).load(source.state(), {"cpu": "cuda:0"}) == ["cpu"]
    assert NoiseSource(0).load(source.state(), {"cpu": "cpu"}) == []


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize(("old", "new"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
@pytest.mark.parametrize("estimator", ["w_perp", "learned_feedback"])
def test_between_gpu_and_cpu(estimator: str, old: str, new: str, tmp_path: Path) -> None:
    def start(device: str) -> Any:
        model, x, y = net().to(device), X.to(device), Y.to(device)
        opt = GuessGradOptimizer(model.parameters(), torch.optim.AdamW, estimator, lr=0.01)
        return model, opt, lambda: F.cross_entropy(model(x), y)

    model, opt, closure = start(old)
    for _ in range(3):
        opt.step(closure)
    guessopt.save(tmp_path / "run", opt, model)
    expected = [float(opt.step(closure)) for _ in range(3)]
    model, opt, closure = start(new)
    guessopt.load(tmp_path / "run", opt, model)
    losses = [float(opt.step(closure)) for _ in range(3)]
    assert losses == expected if old == new else all(map(math.isfinite, losses))


# ------------------------------------------------------------------------------------------------------------- copies


def _through_pickle(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


def _through_torch(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": _through_pickle, "torch.save": _through_torch}


@pytest.mark.parametrize(("steps", "how"), [(0, "deepcopy"), (0, "pickle"), (1, "torch.save")])
def test_copies_keep_every_option(steps: int, how: str) -> None:
    options = {"guesses": 2, "stack_guesses": False, "orthogonal": True, "exact_last": True, "memory": "auto",
               "budget": "1GB", "seed": 4, "check_finite": False, "batch_norm": "frozen_statistics"}  # fmt: skip
    _, opt = used({"0.*": "w_transpose", "*": {"name": "w_perp", "k": 2}}, steps, lr=0.3, **options)
    opt.base.param_groups[0]["lr"] = 0.2
    again = COPIES[how](opt)
    every = inspect.signature(GuessGradOptimizer).parameters.keys() - {"params", "base", "base_kwargs"}
    assert every - opt.__reduce__()[1][2].keys() == {"seed"}, "an option is not kept as an attribute of its name"
    names = [name for name in options if name not in ("budget", "seed")]
    assert [getattr(again, name) for name in names] == [getattr(opt, name) for name in names]
    one, two = again.estimation, opt.estimation
    assert (one.noise.seed, one.estimators, one.engine) == (4, two.estimators, two.engine)
    assert opt.memory == ("store" if steps else "auto")  # the only mode that keeps all guesses, which orthogonal takes
    assert (again._default, again.estimation.steps) == (opt._default, opt.estimation.steps)
    assert again._budget == (opt._budget if opt.memory == "auto" else None)
    assert (
        again.param_groups[0]["lr"] == 0.2 and again.param_groups[0]["params"][0] is not opt.param_groups[0]["params"]
    )


def test_a_copy_alone_has_parameters_of_its_own() -> None:
    model, opt = used()
    again = copy.deepcopy(opt)
    mine = again.param_groups[0]["params"][0]
    assert mine is not model[0].weight and torch.equal(mine, model[0].weight)
    assert again.base is not opt.base and again.param_groups is again.base.param_groups


def test_a_copy_may_be_frozen_at_the_moment() -> None:
    model, opt = used()
    model.requires_grad_(False)
    twin, again = copy.deepcopy((model, opt))
    assert not any(p.requires_grad for p in twin.parameters())
    with pytest.raises(ValueError, match="all are frozen"):
        again.step(loss_of(twin))
    twin.requires_grad_(True)
    again.step(loss_of(twin))


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_scheduler_is_copied_along(copied: Callable[[Any], Any]) -> None:
    model, opt = used()
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    opt.step(loss_of(model))
    scheduler.step()
    twin, again, other = copied((model, opt, scheduler))
    assert other.optimizer is again
    again.step(loss_of(twin))
    other.step()
    assert (opt.param_groups[0]["lr"], again.param_groups[0]["lr"]) == (0.005, 0.0025)


def test_estimators_and_levels_pickle() -> None:
    for spec in [*ESTIMATORS, *VARIANTS]:
        estimator = make_estimator(spec)
        assert _through_pickle(estimator) == estimator == copy.deepcopy(estimator)
    _, opt = used(engine="dual", batch_norm="frozen_statistics")
    assert type(_through_pickle(opt.estimation.make_engine)()) is type(opt.estimation.make_engine())


def _train_elsewhere(pair: Any) -> Any:
    model, opt = pair
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return train(model, opt)[0]


def test_an_optimizer_passes_to_a_spawned_process() -> None:
    model, opt = used(steps=1)
    twin = copy.deepcopy((model, opt))
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(_train_elsewhere, ((model, opt),))
    assert found == _train_elsewhere(twin)


# -------------------------------------------------------------------------------------------------------------- files


def same(a: Any, b: Any) -> bool:
    """Equal in value, type, dtype and shape; NaN equals NaN."""
    if isinstance(a, Tensor):
        alike = isinstance(b, Tensor) and (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
        return alike and repr(a.tolist()) == repr(b.tolist())
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(x, b[key]) for key, x in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


T = torch.arange(6.0).reshape(2, 3)
VALUES: dict[str, Any] = {
    "none and bools": [None, True, False],
    "numbers": [0, -3, 2**70, 0.1, -0.0, math.inf, -math.inf, math.nan, 1e-320, 3 + 4j, complex(math.nan, -0.0)],
    "strings": ["", "ü \x00 \U0001f600", b"", b"\x00\xff"],
    "nested": {"a": [1, (2, [3, ()], {})], "b": {"c": {"d": None}}},
    "keys": {1: "int", "1": "str", None: "none", (1, "a"): "tuple", True + 1: "two", 0.5: "float"},
    "order of keys": {"b": 1, "a": 2},
    "like a tag": {"tensor": "no", "dict": [["a", 1]]},
    "torch": [torch.float32, torch.bfloat16, torch.Size([2, 3]), torch.device("cpu"), torch.device("cuda", 1)],
    "float": [T, T.double(), T.half(), T.bfloat16(), torch.tensor([math.nan, math.inf, -0.0])],
    "integer": [T.to(d) for d in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16)],
    "bool": T > 2,
    "complex": [torch.complex(T, -T), torch.complex(T, -T).to(torch.complex128), torch.complex(T, -T).conj()],
    "8 bits": T.to(torch.float8_e4m3fn),
    "0-dim": [torch.tensor(3.5), torch.tensor(2), torch.tensor(1 + 2j, dtype=torch.complex128), torch.tensor(True)],
    "empty": [torch.empty(0), torch.empty(0, 3), torch.empty(2, 0, dtype=torch.complex128), torch.empty(0).bool()],
    "not contiguous": [T.t(), T[:, 1:], T[:, ::2], T[0].expand(4, 3), T.flip(0)],
    "views of one": [T, T.view(-1), T[1], T[0]],
    "parameter": nn.Parameter(T),
    "names that coincide": {"a": {"b": T}, "a/b": T + 1, 3: T + 2, "3": T + 3},
    "numpy": [np.arange(6, dtype=np.uint32).reshape(2, 3), np.empty((0, 2)), np.array(1.5), np.arange(9)[::2]],
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_values_come_back_as_they_were(value: Any, tmp_path: Path) -> None:
    writer = saving._Writer()
    tree = json.loads(json.dumps(writer.encode(value, "value"), allow_nan=False))
    saving._replace(tmp_path / "values", writer.tensors, {"format": "test"})
    with safe_open(tmp_path / "values", framework="pt") as file:
        found = saving._decode(tree, file)
    expected = value.detach() if isinstance(value, Tensor) else value
    assert same(expected, found)


def test_layouts_come_back_and_one_memory_is_written_once(tmp_path: Path) -> None:
    writer = saving._Writer()
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tree = writer.encode([image, image, image.detach()], "v")
    assert len(writer.tensors) == 1
    saving._replace(tmp_path / "v", writer.tensors, {})
    with safe_open(tmp_path / "v", framework="pt") as file:
        assert saving._decode(tree, file)[0].stride() == image.stride()


REFUSED = {
    "function": lambda: print,
    "object": lambda: object(),
    "set": lambda: {1},
    "sparse": lambda: T.to_sparse(),
    "meta": lambda: T.to("meta"),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_is_no_plain_data_is_refused_by_its_place(make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match="save: optimizer/state/0/x is "):
        saving._Writer().encode({0: {"x": make()}}, "optimizer/state")


BASES = ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop",
         "SGD"]  # fmt: skip


@pytest.mark.parametrize("base", BASES)
def test_a_file_holds_the_state_of_every_base(base: str, tmp_path: Path) -> None:
    options = {"momentum": 0.9} if base == "SGD" else {"amsgrad": True} if base.startswith("Adam") else {}
    if base == "Adamax":
        options = {}
    _, opt = used(base=getattr(torch.optim, base), **options)
    guessopt.save(tmp_path / "run", opt)
    _, again = used(base=getattr(torch.optim, base), steps=0, **options)
    guessopt.load(tmp_path / "run", again)
    assert same(opt.state_dict(), again.state_dict())


def test_every_base_of_torch_is_a_row() -> None:
    known = {
        name for name, o in vars(torch.optim).items() if isinstance(o, type) and issubclass(o, torch.optim.Optimizer)
    }
    left = {"Optimizer", "LBFGS", "Muon", "SparseAdam"}  # the last two: only matrices, only sparse gradients
    assert known - left == set(BASES)


def test_all_random_states_come_back(tmp_path: Path) -> None:
    model, opt = used()
    guessopt.save(tmp_path / "run", opt, model)
    guessopt.save(tmp_path / "without", opt, model, rng=False)
    draw = lambda: (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random())  # noqa: E731
    expected = draw()
    guessopt.load(tmp_path / "run", opt, model)
    assert draw() == expected
    after = draw()
    guessopt.load(tmp_path / "run", opt, model)
    draw()
    guessopt.load(tmp_path / "without", opt, model)
    assert draw() == after
    draw()
    guessopt.load(tmp_path / "run", opt, model, rng=False)
    assert draw() not in (expected, after)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.b.weight = self.a.weight
        self.register_buffer("count", torch.tensor(0))
        self.note: Any = {"seen": (1, 2)}

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]


def test_tied_weights_and_extra_states(tmp_path: Path) -> None:
    model = Tied()
    opt = GuessGradOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    guessopt.save(tmp_path / "run", opt, model)
    with safe_open(tmp_path / "run", framework="pt") as file:
        assert [key for key in file.keys() if "weight" in key] == ["model/a.weight"]  # noqa: SIM118
    other = Tied()
    other.note = None
    guessopt.load(tmp_path / "run", GuessGradOptimizer(other.parameters(), torch.optim.SGD, lr=0.1), other)
    assert other.b.weight is other.a.weight and torch.equal(other.a.weight, model.a.weight)
    assert other.note == {"seen": (1, 2)}
    untied = Tied()
    untied.b.weight = nn.Parameter(untied.b.weight + 1)
    guessopt.save(tmp_path / "two", GuessGradOptimizer(untied.a.parameters(), torch.optim.SGD, lr=0.1), untied)
    with pytest.raises(ValueError, match=r"a.weight and b.weight are one tensor in the model, and two in"):
        guessopt.load(tmp_path / "two", GuessGradOptimizer(other.a.parameters(), torch.optim.SGD, lr=0.1), other)


def test_options_that_are_no_plain_data_are_left_out_with_a_warning(tmp_path: Path) -> None:
    model, opt = used()
    opt.param_groups[0]["schedule"] = math.sin
    with pytest.warns(GuessWarning, match="'schedule' of parameter group 0"):
        guessopt.save(tmp_path / "run", opt, model)
    opt.param_groups[0].update(schedule=math.cos, lr=5.0)
    guessopt.load(tmp_path / "run", opt, model)
    assert (opt.param_groups[0]["schedule"], opt.param_groups[0]["lr"]) == (math.cos, 0.01)


def test_a_model_in_the_file_that_is_not_loaded_is_said(tmp_path: Path) -> None:
    model, opt = used()
    guessopt.save(tmp_path / "run", opt, model)
    with pytest.warns(GuessWarning, match="pass the model"):
        guessopt.load(tmp_path / "run", opt)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """A model, its optimizer, and a file of an earlier step."""
    model, opt = used("learned_feedback")
    guessopt.save(tmp_path / "run.safetensors", opt, model)
    opt.step(loss_of(model))
    return model, opt, tmp_path / "run.safetensors"


def refused(run: Any, error: type[Exception] = ValueError, match: str = "") -> None:
    """``load`` raises and changes nothing."""
    model, opt, path = run
    before, state = snapshot(model, opt), opt.state_dict()
    with pytest.raises(error, match=match):
        guessopt.load(path, opt, model)
    assert same(state["guessopt"], opt.state_dict()["guessopt"])
    assert_same(before, snapshot(model, opt))


def test_a_file_cut_off_anywhere_is_refused(run: Any) -> None:
    content = run[2].read_bytes()
    before, state = snapshot(*run[:2]), copy.deepcopy(run[1].state_dict())
    for size in [*range(0, len(content), 64), len(content) - 1]:
        run[2].write_bytes(content[:size])
        with pytest.raises(ValueError, match="truncated"):
            guessopt.load(run[2], run[1], run[0])
    assert_same(before, snapshot(*run[:2]))
    assert same(state, run[1].state_dict())
    run[2].write_bytes(content)
    guessopt.load(run[2], run[1], run[0])


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any] = lambda tree: None, **metadata: str) -> None:
    """Rewrite the file with a changed tree or changed metadata."""
    with safe_open(path, framework="pt") as file:
        tensors, old = {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata()  # noqa: SIM118
    tree = json.loads(old["state"])
    change(tree)
    safetensors.torch.save_file(tensors, path, {**old, "state": json.dumps(tree), **metadata})


def entry(node: Any, *keys: Any) -> list[Any]:
    """The pair of key and value at a path in a tree of the file."""
    for key in keys[:-1]:
        node = entry(node, key)[1]
    return next(pair for pair in node["dict"] if pair[0] == keys[-1])  # type: ignore[no-any-return]


def drop(part: str, *keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(tree: dict[str, Any]) -> None:
        parent = entry(tree[part], *keys[:-1])[1] if len(keys) > 1 else tree[part]
        parent["dict"].remove(entry(parent, keys[-1]))

    return change


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "truncated"),
    "random bytes": (lambda p: p.write_bytes(bytes(range(256)) * 9), "of another kind"),
    "a pickle": (lambda p: torch.save({"a": 1}, p), "of another kind"),
    "one byte more": (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "damaged"),
    "weights alone": (lambda p: safetensors.torch.save_file({"w": T}, p), "not of guessopt.save.*load_file"),
    "another format": (lambda p: safetensors.torch.save_file({"w": T}, p, {"format": "pt"}), "format 'pt'"),
    "newer version": (lambda p: rewrite(p, version="2"), "newer guessopt; upgrade"),
    "no version": (lambda p: rewrite(p, version="x"), "no version number"),
    "tree is no JSON": (lambda p: rewrite(p, state="{"), "metadata of .* is damaged"),
    "tree is a list": (lambda p: rewrite(p, state="[]"), "metadata of .* is damaged"),
    "unknown kind": (lambda p: rewrite(p, lambda t: t["optimizer"].update(magic=1)), "damaged"),
    "a tensor is missing": (
        lambda p: rewrite(p, lambda t: entry(t["model"], "0.bias")[1]["tensor"].update(name="gone")), "gone"
    ),
    "a weight is missing": (lambda p: rewrite(p, drop("model", "0.bias")), "lacks 0.bias: it holds another model's"),
    "a weight too many": (
        lambda p: rewrite(p, lambda t: t["model"]["dict"].append(["zz", None])), "has zz: it holds another model's"
    ),
    "a weight of another shape": (
        lambda p: rewrite(p, lambda t: entry(t["model"], "0.bias")[1]["tensor"].update(name="model/5.bias")),
        r"0.bias in .* is \[3\] .*the model's is \[8\]",
    ),
    "no model": (lambda p: rewrite(p, lambda t: t.update(model=None)), "holds no model's state"),
    "no groups": (lambda p: rewrite(p, drop("optimizer", "param_groups")), "no entry 'param_groups'"),
    "no steps": (lambda p: rewrite(p, drop("optimizer", "guessopt", "steps")), "no entry 'steps'"),
    "newer state": (
        lambda p: rewrite(p, lambda t: entry(t["optimizer"], "guessopt", "version").__setitem__(1, 99)), "version 99"
    ),
    "no random state of python": (lambda p: rewrite(p, drop("random", "random")), "random states in .* are damaged"),
    "no random states of GPUs": (lambda p: rewrite(p, drop("random", "cuda")), "random states in .* are damaged"),
    "negative random state": (
        lambda p: rewrite(p, lambda t: entry(t["random"], "random")[1]["tuple"][1]["tuple"].__setitem__(0, -1)),
        "random states in .* are damaged",
    ),
    "damaged random state": (
        lambda p: rewrite(p, lambda t: entry(t["random"], "torch")[1]["tensor"].update(name="model/5.bias")),
        "random states in .* are damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), FILES.values(), ids=FILES)
def test_a_file_that_does_not_fit_changes_nothing(damage: Callable[[Path], Any], message: str, run: Any) -> None:
    damage(run[2])
    refused(run, match=message)


def test_another_models_file_and_other_arguments_are_refused(run: Any, tmp_path: Path) -> None:
    other = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    opt = GuessGradOptimizer(other.named_parameters(), torch.optim.AdamW, "learned_feedback", lr=0.01)
    refused((other, opt, run[2]), match="another model's state")
    with pytest.raises(ValueError, match="another model's state"):
        guessopt.load(run[2], opt)
    refused((run[0], run[1], tmp_path / "gone"), FileNotFoundError, "there is no file")
    with pytest.raises(TypeError, match="expected a GuessGradOptimizer, got AdamW"):
        guessopt.save(tmp_path / "x", torch.optim.AdamW(other.parameters()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got OrderedDict"):
        guessopt.save(tmp_path / "x", opt, other.state_dict())  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="folder"):
        guessopt.save(tmp_path / "no" / "x", opt)


def test_a_model_that_fails_to_load_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(5, 5), Tied())
    opt = GuessGradOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    guessopt.save(tmp_path / "run", opt, model)
    opt.step(loss_of(model))
    model[1].note = "later"
    before = snapshot(model, opt)

    def set_extra_state(self: Tied, state: Any) -> None:
        if state != "later":
            raise OSError("cannot")

    monkeypatch.setattr(Tied, "set_extra_state", set_extra_state)
    with pytest.raises(OSError, match="cannot"):
        guessopt.load(tmp_path / "run", opt, model)
    assert_same(before, snapshot(model, opt))


def _intact(run: Any, old: bytes, new: bytes | None = None) -> None:
    """The folder holds one file, which is the old one or the new one."""
    content = run[2].read_bytes()
    assert content in (old, new)
    assert os.listdir(run[2].parent) == [run[2].name]


CALLS = {"save_file": saving, "fsync": os, "replace": os}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["OSError", "KeyboardInterrupt"])
@pytest.mark.parametrize("call", CALLS)
def test_a_save_that_fails_leaves_one_whole_file(
    call: str, error: BaseException, when: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, owner = run[2].read_bytes(), CALLS[call]
    real = getattr(owner, call)

    def fail(*args: Any, **kwargs: Any) -> Any:
        if when == "after":
            real(*args, **kwargs)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, call, fail)
        with pytest.raises(type(error)):
            guessopt.save(run[2], run[1], run[0])
    new = None
    if (call, when) == ("replace", "after"):
        new = run[2].read_bytes()
        assert new != old
    _intact(run, old, new)
    guessopt.load(run[2], run[1], run[0])


def test_a_disk_that_fills_up_at_any_byte_leaves_the_old_file(run: Any) -> None:
    """The limit on a file's size makes the write fail that exceeds it."""
    old = run[2].read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    guessopt.save(run[2].with_name("new"), run[1], run[0])
    size = run[2].with_name("new").stat().st_size
    run[2].with_name("new").unlink()
    for limit in [*range(0, size, 256), size - 1]:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(OSError, match=r"could not be written, and is as it was"):
                guessopt.save(run[2], run[1], run[0])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        _intact(run, old)
    guessopt.save(run[2], run[1], run[0])
    assert run[2].stat().st_size == size


def test_a_link_stays_a_link(run: Any, tmp_path: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to(run[2])
    guessopt.save(link, run[1], run[0])
    assert link.is_symlink() and not run[2].is_symlink()
    guessopt.load(link, run[1], run[0])
