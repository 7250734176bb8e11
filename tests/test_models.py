"""Well-known models, unchanged: no parameter is missed, the gradient is exact, every fallback is listed."""

import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("tqdm")
pytest.importorskip("rich")

from benchmarks import zoo
from benchmarks.coverage import EXACT, LOW, backward, in_precision, survey
from benchmarks.exactness import exactness
from benchmarks.mezo import forward_mode, mezo
from benchmarks.mezo import problem as language_model
from benchmarks.zoo import Entry, Subject, entries
from guessopt import ClosureError, GuessGradOptimizer, GuessWarning, LearnedFeedback, preflight
from guessopt.diagnostics.reverse import Truth
from guessopt.estimators import estimator_names
from guessopt.layout import Layout
from guessopt.ops import MatrixRule

from .machine import skip_if_refused
from .problems import labels

pytestmark = [
    pytest.mark.filterwarnings("ignore::guessopt.GuessWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ENTRIES = entries()

#: Not left for -m slow: each family once.
QUICK = {
    "hf/bert eager", "hf/gpt2 sdpa", "hf/llama sdpa", "hf/gemma eager", "hf/t5 sdpa", "hf/vit sdpa", "hf/swin eager",
    "hf/mamba", "peft/LoRA", "peft/prefix tuning", "peft/LoRA on 4 bits (bitsandbytes)", "torchvision/resnet18",
    *(name for name in ENTRIES if name.startswith("torch/")),
}  # fmt: skip


def rows(names: Any = ENTRIES) -> list[Any]:
    def marks(name: str) -> list[Any]:
        library = ENTRIES[name].library
        absent = pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"needs {library}")
        return [absent] if name in QUICK else [absent, pytest.mark.slow]

    return [pytest.param(name, marks=marks(name)) for name in names]


@pytest.mark.parametrize("name", rows())
def test_it_runs_unchanged(name: str) -> None:
    entry = ENTRIES[name]
    found = survey(entry, entry.build(entry.dtype))
    assert found.complaints(EXACT) == []
    assert found.other_guess == []
    assert (found.fallbacks > 0) == bool(entry.fallbacks)


@pytest.mark.parametrize("mode", ["bfloat16", "float16", "autocast bfloat16"])
@pytest.mark.parametrize("name", rows(["torch/TransformerEncoder", "torch/LSTM", "hf/llama sdpa", "hf/t5 sdpa"]))
def test_16_bits(name: str, mode: str) -> None:
    skip_if_refused(lambda: backward(in_precision(ENTRIES[name], mode)), (name, mode))
    assert exactness(in_precision(ENTRIES[name], mode), draws=4).error < LOW


RESIDUAL = [
    "torch/TransformerEncoder", "torchvision/resnet18", "timm/convnext_atto", "hf/gpt2 sdpa", "hf/llama sdpa",
    "hf/swin eager", "hf/mamba", "peft/LoRA", "peft/LoRA on 4 bits (bitsandbytes)",
]  # fmt: skip


@pytest.mark.parametrize("name", rows(RESIDUAL))
def test_learned_feedback_keeps_a_block_or_runs_it_again(name: str) -> None:
    """Kept graphs and replayed calls give equal updates, with dropout and stochastic depth."""
    ends = []
    for memory in ("store", "replay"):
        torch.manual_seed(0)
        subject = ENTRIES[name].build(ENTRIES[name].dtype)
        opt = GuessGradOptimizer(subject.named(), torch.optim.SGD, LearnedFeedback(gamma=0), lr=0.01, memory=memory)
        torch.manual_seed(1)
        for _ in range(3):
            opt.step(subject.closure)
        assert opt.estimation.plans[0].graph.chain is not None and opt.estimation.plans[0].keeps_graphs
        ends.append([p.detach() for _, p in subject.named()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "name", rows(["torch/MultiheadAttention", "hf/bert eager", "hf/gpt2 sdpa", "hf/t5 sdpa", "hf/swin eager"])
)
def test_as_many_examples_as_tokens_and_heads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "N", 2)
    monkeypatch.setattr(zoo, "TOKENS", 2)
    entry = ENTRIES[name]
    found = survey(entry, entry.build(torch.float64))
    assert found.fallbacks == 0 and found.complaints(EXACT) == []


SEGMENTS = [
    "torch/TransformerEncoder", "hf/gpt2 sdpa", "hf/llama sdpa", "hf/vit sdpa", "hf/swin eager", "hf/mamba",
    "torchvision/resnet18", "peft/LoRA",
]  # fmt: skip


@pytest.mark.parametrize("name", rows(SEGMENTS))
def test_segments_lead_where_they_say(name: str) -> None:
    """A site's segment computes the next matrix site's input from the site's output, through attention, residuals
    and feature maps."""
    subject = ENTRIES[name].build(torch.float64)
    subject.model.eval()
    opt = GuessGradOptimizer(subject.named(), torch.optim.SGD, "w_transpose", lr=0.0)
    truth = Truth(opt, subject.closure)
    read = {saved.call.index: saved for saved in truth.record.saved_calls}
    checked = 0
    for site in truth.graph.sites:
        if site.segment is None or site.shares is not None:
            continue
        matrix = site.segment.matrices[0]
        saved = read.get(matrix.call.index)
        if saved is None:
            continue  # a frozen layer: its input is not kept
        rule = matrix.rule
        assert isinstance(rule, MatrixRule)
        x = rule.input(saved.args, saved.kwargs)
        torch.testing.assert_close(truth.contexts[site.index].next_input(), x, rtol=1e-5, atol=1e-6)
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("precision", ["float32", "autocast bfloat16"])
@pytest.mark.parametrize("estimator", [n for n in estimator_names() if n not in ("one_hot", "whisper")])
def test_every_estimator_on_attention_and_recurrence(estimator: str, precision: str) -> None:
    for name in ("torch/TransformerEncoder", "torch/LSTM"):
        skip_if_refused(partial(backward, in_precision(ENTRIES[name], precision)), (name, precision))
        subject = in_precision(ENTRIES[name], precision)
        opt = GuessGradOptimizer(subject.named(), torch.optim.SGD, estimator, lr=0.0, seed=0)
        for _ in range(2):
            opt.step(subject.closure)
        for parameter, p in subject.named():
            assert p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any()), parameter


@pytest.mark.parametrize("precision", ["float32", "autocast bfloat16"])
@pytest.mark.parametrize("estimator", ["w_perp", "w_transpose", "learned_feedback", "downstream"])
def test_convolutions_with_every_kind_of_guess(estimator: str, precision: str) -> None:
    """With hard activations, whose backward cannot be differentiated."""

    def build(dtype: torch.dtype) -> Subject:
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Hardswish(), nn.Conv2d(4, 4, 3, groups=2), nn.Hardsigmoid(), nn.Conv2d(4, 4, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        ).to(dtype)  # fmt: skip
        x = torch.randn(4, 3, 8, 8, dtype=dtype)
        return Subject(model, lambda: F.cross_entropy(model(x), labels(4, 3)))

    subject = in_precision(Entry("torch", build), precision)
    skip_if_refused(lambda: backward(subject), ("convolutions", precision))
    opt = GuessGradOptimizer(subject.named(), torch.optim.SGD, estimator, lr=0.0, seed=0)
    for _ in range(2):
        opt.step(subject.closure)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any()) for _, p in subject.named())


# --- a fallback that nobody listed ------------------------------------------------------------------------------------


def test_an_unlisted_fallback_is_complained_of() -> None:
    def build(dtype: torch.dtype) -> Subject:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
        x = torch.randn(5, 3, dtype=dtype)
        return Subject(model, lambda: F.cross_entropy(model(x), labels(5, 2)))

    listed, unlisted = (Entry("torch", build, fallbacks) for fallbacks in ({"*": "batch norm"}, {}))
    found = survey(listed, build(torch.float64))
    assert found.complaints(EXACT) == [] and found.fallbacks == 1 and found.reason == "batch norm"
    assert any("unlisted" in what for what in survey(unlisted, build(torch.float64)).complaints(EXACT))
    found = survey(unlisted, build(torch.float64), batch_norm="frozen_statistics")
    assert found.fallbacks == 0


def test_a_wrong_gradient_is_complained_of() -> None:
    """The check can fail: here a backward is not the derivative of its forward."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g

        @staticmethod
        def jvp(ctx: Any, t: Tensor) -> Tensor:
            return t.clone()

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    subject = Subject(model, lambda: F.cross_entropy(model[1](Wrong.apply(model[0](x))), labels(5, 2)))
    assert exactness(subject).derivatives > 0.1


# --- a model from none of the lists -----------------------------------------------------------------------------------


@torch.library.custom_op("guessopt_tests::gate", mutates_args=())
def gate(x: Tensor, w: Tensor) -> Tensor:
    return torch.from_numpy(np.square(x.detach().numpy() * w.detach().numpy()))


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gate_backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    x, w = ctx.saved_tensors
    return 2 * g * x * w * w, (2 * g * x * x * w).sum((0, 1))


gate.register_autograd(_gate_backward, setup_context=_keep)


@torch.library.custom_op("guessopt_tests::hidden", mutates_args=())
def hidden(x: Tensor) -> Tensor:
    return torch.from_numpy(np.square(x.detach().numpy()))


def _hidden_backward(ctx: Any, g: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return torch.from_numpy(2 * (g.detach() * x.detach()).numpy())


hidden.register_autograd(_hidden_backward, setup_context=_keep)


@torch.library.custom_op("guessopt_tests::bare", mutates_args=())
def bare(x: Tensor) -> Tensor:
    return x.clone()


class Odd(nn.Module):
    """Gated convolution over time, a shared memory of slots, tokens picked by index; written with an operation of its
    own."""

    def __init__(self, op: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, 6), nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.w, self.slots = nn.Parameter(torch.rand(6)), nn.Parameter(torch.randn(4, 6))
        self.norm, self.head, self.op = nn.LayerNorm(6), nn.Linear(6, 3), op

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        h = h + gate(self.mix(h.mT).mT.contiguous(), self.w)
        h = h + torch.einsum("ntk,kd->ntd", torch.softmax(h @ self.slots.T, -1), self.slots.type_as(h))
        h = self.norm(h if self.op is None else self.op(h))
        out: Tensor = self.head(h.gather(1, ids[:, :1, None].expand(-1, 1, 6) % h.shape[1])[:, 0])
        return out


def odd(op: Callable[..., Tensor] | None = None) -> Subject:
    model, ids = Odd(op).double(), torch.randint(11, (3, 5))
    return Subject(model, lambda: F.cross_entropy(model(ids), labels(3, 3)))


def test_a_model_from_none_of_the_lists() -> None:
    subject = odd()
    found = survey(Entry("torch", lambda dtype: subject), subject)
    assert found.complaints(1e-12) == [] and found.fallbacks == 0
    report = preflight(subject.named(), subject.closure)
    assert any("gate" in site.operation for site in report.sites)
    assert any("gate" in note and "backward" in note for note in report.notes)


@pytest.mark.parametrize("guesses", [1, 3])
@pytest.mark.parametrize("op", [hidden, bare])
def test_what_it_cannot_differentiate_is_named(op: Any, guesses: int) -> None:
    subject = odd(op)
    opt = GuessGradOptimizer(subject.named(), lr=0.1, guesses=guesses, audit=False)
    with pytest.raises(ClosureError, match=rf"{op._name.rpartition('::')[2]}.*no derivative in forward mode"):
        opt.step(subject.closure)
    opt = GuessGradOptimizer(subject.named(), lr=0.1, engine="func")  # which cannot go by the backward either
    with pytest.raises(ClosureError, match=r"(gate|hidden|bare).*no derivative in forward mode"):
        opt.step(subject.closure)


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_differences_of_losses_collapse_where_forward_mode_does_not(dtype: torch.dtype) -> None:
    skip_if_refused(lambda: language_model(dtype)[1]().backward(), ("language model", dtype))
    collapsed = mezo(dtype, eps=1e-4, lr=1e-3, steps=30)
    assert collapsed.zeros > 0.5 and collapsed.drift > 1e-3
    assert mezo(torch.float32, eps=1e-4, lr=1e-3, steps=10).zeros == 0
    low, full = (forward_mode(d, "directional_descent", lr=3e-3, steps=30) for d in (dtype, torch.float32))
    assert low.zeros == 0 and low.drift == 0
    assert full.last < full.first - 1e-2
    assert abs(low.last - full.last) < 0.3 * (full.first - full.last)


def _rounded(generator: torch.Generator, shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
    """Equal noise in both precisions."""
    return torch.randn(shape, generator=generator).half().to(dtype)


@pytest.mark.parametrize("scale", [1.0, 1e7])
def test_float16_cotangents_stay_within_range(scale: float) -> None:
    """Small inputs and a large loss: the cotangents exceed float16's range, the weight's gradient does not."""
    found = []
    for dtype in (torch.float16, torch.float32):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4)).half().to(dtype)
        x = (1e-3 * torch.randn(512, 8)).half().to(dtype)
        skip_if_refused(lambda m=model, x=x: m(x).sum().backward())  # type: ignore[misc]
        model.zero_grad()
        named = [("weight", model[0].weight)]
        opt = GuessGradOptimizer(named, torch.optim.SGD, "activation_perturbation", lr=0.0, seed=0)
        opt.estimation.noise.normal = partial(_rounded, torch.Generator().manual_seed(0))  # type: ignore[method-assign]
        opt.estimate(lambda m=model, x=x: F.cross_entropy(m(x).float(), labels(512, 4)) * scale)  # type: ignore[misc]
        found.append(model[0].weight.grad.float())
    half, single = found
    assert (half - single).norm() < 2e-2 * single.norm()


def test_parameters_read_for_their_dtype_alone_are_no_sites() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x.type_as(self.a.weight))
            h = F.dropout(torch.relu(h.to(self.b.weight)), 0.0)
            h = F.linear(h, self.b.weight.to(h.dtype), self.b.bias.contiguous()) + h.contiguous()
            out: Tensor = self.c(h)
            return out

    model, x = Casting().double(), torch.randn(5, 3)
    subject = Subject(model, lambda: F.cross_entropy(model(x), labels(5, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", GuessWarning)
        report = preflight(subject.named(), subject.closure)
    assert [site.operation for site in report.sites] == ["linear"] * 3
    assert [site.next for site in report.sites] == ["linear b.weight", "linear c.weight", "the loss"]
    assert all(site.batch == Layout.BATCH_FIRST.value for site in report.sites)
    assert exactness(subject).error < 1e-12
