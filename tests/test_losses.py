"""Any loss: per-example derivatives come from the network's output, so the optimizer needs no list of losses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import GuessGradOptimizer, GuessWarning

from .problems import labels, of
from .test_exactness import sum_over_one_hots

N, C = 6, 4
Y = labels(N, C)
torch.manual_seed(1)
TARGET = torch.rand(N, C, dtype=torch.float64)
SIGN = (labels(N, 2) * 2 - 1).double()
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64)

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda o: F.cross_entropy(o, Y),
    "cross_entropy, sum": lambda o: F.cross_entropy(o, Y, reduction="sum"),
    "cross_entropy, weight, ignore_index, smoothing": lambda o: F.cross_entropy(
        o, Y, weight=WEIGHT, ignore_index=1, label_smoothing=0.1
    ),
    "cross_entropy, probabilities": lambda o: F.cross_entropy(o, TARGET / TARGET.sum(1, keepdim=True)),
    "cross_entropy, per example": lambda o: F.cross_entropy(o, Y, reduction="none"),
    "nll_loss": lambda o: F.nll_loss(torch.log_softmax(o, 1), Y, weight=WEIGHT),
    "mse_loss": lambda o: F.mse_loss(o, TARGET),
    "mse_loss, sum": lambda o: F.mse_loss(o, TARGET, reduction="sum"),
    "l1_loss": lambda o: F.l1_loss(o, TARGET),
    "smooth_l1_loss": lambda o: F.smooth_l1_loss(o, TARGET, beta=0.3),
    "huber_loss": lambda o: F.huber_loss(o, TARGET, delta=0.3),
    "binary_cross_entropy": lambda o: F.binary_cross_entropy(torch.sigmoid(o), TARGET),
    "binary_cross_entropy_with_logits": lambda o: F.binary_cross_entropy_with_logits(o, TARGET, pos_weight=WEIGHT),
    "kl_div, batchmean": lambda o: F.kl_div(torch.log_softmax(o, 1), TARGET, reduction="batchmean"),
    "poisson_nll_loss": lambda o: F.poisson_nll_loss(o, TARGET),
    "gaussian_nll_loss": lambda o: F.gaussian_nll_loss(o[:, 0], TARGET[:, 0], o[:, 1].exp()),
    "multi_margin_loss": lambda o: F.multi_margin_loss(o, Y),
    "multilabel_soft_margin_loss": lambda o: F.multilabel_soft_margin_loss(o, TARGET.round()),
    "soft_margin_loss": lambda o: F.soft_margin_loss(o[:, 0], SIGN),
    "hinge_embedding_loss": lambda o: F.hinge_embedding_loss(o[:, 0], SIGN),
    "cosine_embedding_loss": lambda o: F.cosine_embedding_loss(o, TARGET, SIGN),
    "margin_ranking_loss": lambda o: F.margin_ranking_loss(o[:, 0], o[:, 1], SIGN, margin=0.2),
    "triplet_margin_loss": lambda o: F.triplet_margin_loss(o, TARGET, TARGET.flip(0)),
    "contrastive, over the batch": lambda o: F.cross_entropy(
        F.normalize(o) @ F.normalize(TARGET).T / 0.3, torch.arange(N)
    ),
    "by hand, mean": lambda o: ((o - TARGET) ** 2).mean(),
    "by hand, sum over a count": lambda o: (o - TARGET).abs().pow(1.5).sum() / N,
    "perplexity": lambda o: F.cross_entropy(o, Y).exp(),
    "several, weighted": lambda o: 0.3 * F.cross_entropy(o, Y) - 2 * F.mse_loss(o, TARGET) / 7 + 1,
    "root of a mean": lambda o: o.pow(2).mean().sqrt(),
}  # fmt: skip


@pytest.mark.filterwarnings("error::guessopt.GuessWarning")
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_exact_and_keeps_the_examples_apart(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, C))
    x = torch.randn(N, 3, dtype=torch.float64)
    problem = of(model, lambda m: LOSSES[name](m(x)), N)
    total, opt = sum_over_one_hots(problem, "fast")
    loss = problem.closure()
    reference = torch.autograd.grad(loss.mean(), problem.parameters())
    assert opt.estimation.plans[0].graph.batch == N
    for (parameter, _), g in zip(problem.named, reference, strict=True):
        torch.testing.assert_close(total[parameter], g, rtol=1e-9, atol=1e-9 * float(g.abs().max()), msg=parameter)


#: The loss writes into a view of the network's output. Nothing else holds the output any longer.
WRITES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "a transpose": lambda m, x: F.cross_entropy(m(x).T.mul_(2).T, Y),
    "some columns": lambda m, x: m(x)[:, 1:].mul_(3).square().sum(),
    "dropout": lambda m, x: F.dropout(m(x).view(-1), 0.0, inplace=True).square().sum(),
    "a rectifier": lambda m, x: F.relu(m(x).reshape(-1), inplace=True).mean(),
}


@pytest.mark.parametrize("engine", ["fast", "dual", "func"])
@pytest.mark.parametrize("name", WRITES)
def test_a_loss_may_write_into_a_view_of_its_input(name: str, engine: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, C))
    x = torch.randn(N, 3, dtype=torch.float64)
    problem = of(model, lambda m: WRITES[name](m, x), N)
    total, _ = sum_over_one_hots(problem, engine)
    for (parameter, _), g in zip(
        problem.named, torch.autograd.grad(problem.closure(), problem.parameters()), strict=True
    ):
        torch.testing.assert_close(total[parameter], g, rtol=1e-9, atol=1e-9 * float(g.abs().max()), msg=parameter)


def test_ctc_over_sequences() -> None:
    """Time is the first dimension. The loss has no forward derivative and needs none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, C))
    x, lengths = torch.randn(7, N, 3, dtype=torch.float64), torch.full((N,), 7)

    def closure(m: nn.Module) -> Tensor:
        targets = torch.randint(1, C, (N, 2), generator=torch.Generator().manual_seed(0))
        return F.ctc_loss(torch.log_softmax(m(x), -1), targets, lengths, torch.full((N,), 2))

    problem = of(model, closure)
    total, _ = sum_over_one_hots(problem, "fast")
    for (name, _), g in zip(problem.named, torch.autograd.grad(problem.closure(), problem.parameters()), strict=True):
        torch.testing.assert_close(total[name], g, rtol=1e-9, atol=1e-9 * float(g.abs().max()), msg=name)


class Output(dict[str, Any]):
    """As model libraries return it: attributes and keys."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class LanguageModel(nn.Module):
    """``model(**batch).loss`` with shifted, flattened, masked tokens and a count given from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(9, 5), nn.Linear(5, 5), nn.Linear(5, 9, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor, num_items_in_batch: int | None = None) -> Output:
        h = torch.tanh(self.mix(self.embed(input_ids).cumsum(1)))
        logits = self.head(h)
        flat, wanted = logits[:, :-1].reshape(-1, 9), labels[:, 1:].reshape(-1)
        if num_items_in_batch is None:
            return Output(loss=F.cross_entropy(flat, wanted), logits=logits)
        loss = F.cross_entropy(flat, wanted, reduction="sum") / num_items_in_batch
        return Output(loss=loss, logits=logits)


@pytest.mark.parametrize("items", [None, 11])
def test_a_language_model_that_computes_its_own_loss(items: int | None) -> None:
    torch.manual_seed(0)
    ids = torch.randint(9, (4, 5))
    wanted = ids.masked_fill(torch.rand(4, 5) < 0.3, -100)
    problem = of(LanguageModel(), lambda m: m(input_ids=ids, labels=wanted, num_items_in_batch=items).loss, 4)
    total, opt = sum_over_one_hots(problem, "fast")
    assert opt.estimation.plans[0].graph.batch == 4
    for (name, _), g in zip(problem.named, torch.autograd.grad(problem.closure(), problem.parameters()), strict=True):
        torch.testing.assert_close(total[name], g, rtol=1e-9, atol=1e-9 * float(g.abs().max()), msg=name)


def test_examples_that_cannot_be_told_apart_are_announced() -> None:
    """The batch is the third dimension. The scalar derivative is used: it is right but noisy, and one warning says
    so."""
    torch.manual_seed(0)
    w1, w2 = (nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in ((3, 5), (5, 3)))
    x = torch.randn(3, 2, 4, dtype=torch.float64)

    def closure() -> Tensor:
        h = torch.einsum("itn,io->otn", x, w1).softmax(0).cumsum(1)
        return torch.einsum("otn,op->ptn", h, w2).square().sum()

    opt = GuessGradOptimizer([w1, w2], torch.optim.SGD, "activation_perturbation", lr=0.1)
    with pytest.warns(GuessWarning, match="interact|told apart"):
        opt.estimate(closure)
