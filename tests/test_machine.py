"""Operations that torch refuses on this machine: the error names them, nothing changes, the coverage table lists
them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import handle_torch_function

from guessopt import ClosureError, GuessGradOptimizer
from guessopt.errors import refusal
from guessopt.ops import Rule

from .machine import refused, skip_if_refused
from .problems import labels

NO_LSTM = (
    "could not create a primitive descriptor for the LSTM forward propagation primitive. Run workload with "
    "environment variable ONEDNN_VERBOSE=all to get additional diagnostic information."
)


def refusing(name: str, message: str) -> Callable[..., Any]:
    """An operation that torch refuses, as a function mode sees it."""

    def operation(*args: Any, **kwargs: Any) -> Any:
        if torch._C._len_torch_function_stack():
            return handle_torch_function(operation, (), *args, **kwargs)
        raise RuntimeError(message)

    operation.__name__ = name
    return operation


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        out: Tensor = self.head(self.cell(x)[0].mean(1))
        return out


@pytest.mark.parametrize(
    "message",
    [
        NO_LSTM,
        "\"slow_conv2d_cpu\" not implemented for 'Half'",
        "No viable backend for scaled_dot_product_attention was found. This is likely ...",
        "No available kernel. Aborting execution.",
        "Unsupported dtype Half",
        "`fused=True` requires all the params to be floating point Tensors of supported devices: ['cuda'] but ...",
        "Torch not compiled with CUDA enabled",
        "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU",
    ],
)
def test_torchs_refusals_are_told_from_other_errors(message: str) -> None:
    assert refusal(RuntimeError(message)) == message.partition(". ")[0]
    assert refused(refusing("op", message)) == message.partition(". ")[0]
    assert refusal(RuntimeError("mat1 and mat2 shapes cannot be multiplied (5x3 and 4x2)")) is None
    with pytest.raises(RuntimeError, match="shapes"):
        refused(refusing("op", "mat1 and mat2 shapes cannot be multiplied"))


def test_torch_is_asked_once() -> None:
    asked: list[int] = []
    for _ in range(3):
        assert refused(lambda: asked.append(1), ("asked once",)) is None
    assert len(asked) == 1
    with pytest.raises(pytest.skip.Exception, match="torch refuses it on this machine: Unsupported dtype Half"):
        skip_if_refused(refusing("fft_fft", "Unsupported dtype Half"))


@pytest.mark.parametrize("memory", ["store", "replay", "stream"])
@pytest.mark.parametrize("after", [0, 1], ids=["from the start", "after a step"])
def test_the_package_passes_a_refusal_on_by_name(after: int, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Recurrent(), torch.randn(3, 5, 3)
    opt = GuessGradOptimizer(model.named_parameters(), torch.optim.SGD, lr=0.1, seed=0, memory=memory)

    def closure() -> Tensor:
        return F.cross_entropy(model(x), labels(3, 2))

    for _ in range(after):
        opt.step(closure)
    before = [t.clone() for t in model.state_dict().values()]
    monkeypatch.setattr(torch.nn.modules.rnn._VF, "lstm", refusing("lstm", NO_LSTM), raising=False)
    with pytest.raises(ClosureError, match=r"torch does not run lstm .* on this machine: could not create a primitive"):
        opt.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


def test_a_refused_backward_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise RuntimeError("could not create a primitive descriptor for a convolution backward weights primitive")

    model, x = nn.Sequential(nn.Bilinear(3, 3, 4), nn.Linear(4, 2)), torch.randn(5, 3)
    monkeypatch.setattr(Rule, "gradients", refuse)
    opt = GuessGradOptimizer(model.parameters(), lr=0.1)
    with pytest.raises(ClosureError, match=r"torch does not run bilinear .*its backward: could not create a primitive"):
        opt.step(lambda: F.cross_entropy(model[1](model[0](x, x)), labels(5, 2)))


def test_an_attention_backend_that_is_not_here() -> None:
    """Every processor refuses this backend."""
    layer, x = nn.Linear(8, 8), torch.randn(2, 1, 4, 8)

    def closure() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(layer(x), x, x).square().mean()

    with pytest.raises(ClosureError, match="torch does not run scaled_dot_product_attention"):
        GuessGradOptimizer(layer.parameters(), lr=0.1).step(closure)


def test_the_coverage_table_says_what_torch_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("tqdm")
    from benchmarks.coverage import MODES, complain, matrix_row, precision_row, tables_of
    from benchmarks.zoo import entries

    monkeypatch.setattr(torch.nn.modules.rnn._VF, "lstm", refusing("lstm", NO_LSTM), raising=False)
    name = "torch/LSTM"
    matrix, precision = matrix_row(entries()[name], 1), precision_row(entries()[name])
    figures = {"matrix": {name: matrix}, "precision": {name: precision}, "sized": {}, "mezo": {}}
    why = NO_LSTM.partition(". ")[0]
    assert matrix == {"refused": why} and precision == dict.fromkeys(MODES, why)
    assert list(complain(figures)) == []
    whole, low = tables_of({"figures": figures})
    assert whole.rows == [] and low.rows == [[name, *["refused"] * len(MODES)]]
    assert f"{name}: not run, torch refuses it on this machine: {why}." in whole.note
    assert f"{name}, {MODES[0]}: not run, torch refuses it on this machine: {why}." in low.note


def test_an_experiment_on_a_device_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("tqdm")
    from benchmarks import __main__ as command

    monkeypatch.setattr(command.torch, "zeros", refusing("zeros", "Torch not compiled with CUDA enabled"))
    with pytest.raises(SystemExit, match="--device cuda: torch refuses it on this machine: Torch not compiled"):
        command.main(["coverage", "--device", "cuda"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_fused_update_is_tried_before_it_is_chosen(dtype: torch.dtype) -> None:
    """The trial step uses parameters of its own, and calls none of the hooks that users set for all optimizers."""
    seen: list[Any] = []
    hook = register_optimizer_step_pre_hook(lambda *args: seen.append(args))
    p = nn.Parameter(torch.ones(2, dtype=dtype))
    try:
        opt = GuessGradOptimizer([p], torch.optim.AdamW, "activation_perturbation", lr=0.1, memory="stream")
    finally:
        hook.remove()
    fused = not refused(lambda: torch.optim.AdamW([p.detach().requires_grad_()], fused=True)) and not dtype.is_complex
    assert bool(opt.base.defaults["fused"]) is fused and seen == []
    opt.step(lambda: (p * torch.ones(3, 2)).abs().square().mean())
    assert bool((p != 1).all())
