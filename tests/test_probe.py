"""The probe finds the dimension of the examples, and the calls in which they interact.

A layout is right if ``D_n`` equals autograd's derivative for example n, summed over the sites that keep examples apart.
"""

import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import GuessGradOptimizer, GuessWarning
from guessopt.diagnostics.reverse import Truth, measuring
from guessopt.estimators import Estimator
from guessopt.layout import Layout
from guessopt.step.runs import forward

from .problems import Attention, Problem, Recurrent, Rotary, labels, of
from .test_exactness import sum_over_one_hots
from .test_hostile import Lambda, assert_gradient, net, randn


class Apart(Estimator):
    """Noise at the sites that keep the examples apart, zeros at the others."""

    name: ClassVar[str] = "apart"
    per_example_parameters: ClassVar[bool] = False

    def sample(self, state: Any, local: Any) -> Tensor:
        y = torch.randn(local.s.shape, dtype=local.s.dtype)
        return torch.zeros_like(y) if local.site.layout is Layout.COUPLED else y

    def options(self) -> dict[str, Any]:
        return {}


def optimizer(problem: Problem, **options: Any) -> GuessGradOptimizer:
    return GuessGradOptimizer(
        problem.named, torch.optim.SGD, "activation_perturbation", exact_last=False, lr=0.0, seed=0, **options
    )


def check_layouts_of(opt: GuessGradOptimizer, problem: Problem) -> tuple[Tensor, Tensor]:
    """``D_n`` of guesses at the sites that keep the examples apart: from a pass, and from autograd."""
    own, opt.estimation.estimators = opt.estimation.estimators, [Apart()] * len(problem.named)
    opt.estimation.plans[0].assignments = None
    truth = Truth(opt, problem.closure)
    with measuring(opt) as transaction:
        plan, record = forward(opt.estimation, problem.closure, transaction)
    opt.estimation.estimators, plan.assignments = own, None
    n = plan.graph.batch
    expected = torch.zeros(n, dtype=torch.float64)
    for index, y in record.guesses.items():
        site = plan.graph.sites[index]
        if site.layout is not Layout.COUPLED:
            expected += site.layout.sum_examples(truth.g[index] * y, n)
    return record.d, expected if len(record.d) == n else expected.sum().reshape(1)


def check_layouts(problem: Problem) -> tuple[int, int, int]:
    """Check that the layouts are right. Returns N, the number of coupled sites, and the number of sites."""
    opt = optimizer(problem)
    opt.estimate(problem.closure)
    return checked_layouts(opt, problem)


def checked_layouts(opt: GuessGradOptimizer, problem: Problem) -> tuple[int, int, int]:
    """``check_layouts`` of an optimizer that has estimated."""
    found, expected = check_layouts_of(opt, problem)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    graph = opt.estimation.plans[0].graph
    own = [site for site in graph.sites if site.shares is None]
    return graph.batch, sum(site.layout is Layout.COUPLED for site in own), len(own)


# ------------------------------------------------------------------------------------------------- models by name


class Positions(nn.Module):
    """As in nanoGPT: learned positions by index, causal blocks."""

    def __init__(self, d: int = 4, heads: int = 2, tokens: int = 32) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(7, d), nn.Embedding(tokens, d)
        self.blocks = net(*(nn.TransformerEncoderLayer(d, heads, d, 0.0, batch_first=True) for _ in range(2)))
        self.head = nn.Linear(d, 7, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        t = ids.shape[1]
        h = self.wte(ids) + self.wpe(torch.arange(t))
        for block in self.blocks:
            h = block(h, nn.Transformer.generate_square_subsequent_mask(t, dtype=h.dtype), is_causal=True)
        return self.head(h)


def nanogpt(n: int, tokens: int) -> Problem:
    ids = torch.randint(7, (n, tokens))

    def closure(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(ids).view(-1, 7), ids.roll(-1, 1).view(-1), ignore_index=3)

    return of(Positions(), closure)


def llama(n: int, tokens: int, heads: int = 2, d: int = 4) -> Problem:
    ids = torch.randint(7, (n, tokens))
    model = net(nn.Embedding(7, d), Rotary(d, heads), Rotary(d, heads), nn.RMSNorm(d), nn.Linear(d, 7, bias=False))
    return of(model, lambda m: F.cross_entropy(m(ids).flatten(0, 1), ids.roll(-1, 1).flatten()))


def t5(n: int = 2) -> Problem:
    """N = heads = 2: a relative bias for each head, added to scores ``[N, heads, T, T]``."""
    parts = {"q": nn.Linear(4, 4), "k": nn.Linear(4, 4), "v": nn.Linear(4, 4), "o": nn.Linear(4, 3)}
    parts["bias"] = nn.Embedding(5, 2)  # by distance
    x, distance = randn(n, 3, 4), (torch.arange(3)[:, None] - torch.arange(3)).clamp(-2, 2) + 2

    def forward(m: Any) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (m.q, m.k, m.v))
        scores = q @ k.mT + m.bias(distance).permute(2, 0, 1)
        return F.cross_entropy(m.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)).mean(1), labels(n, 3))

    return of(Lambda(forward, **parts), lambda m: m())


def rnn(n: int, tokens: int) -> Problem:
    x = randn(tokens, n, 2)
    return of(Recurrent(), lambda m: F.cross_entropy(m(x), labels(n, 2)))


def tokens_first(n: int, tokens: int) -> Problem:
    """Losses ``[T, N]``."""
    x, y = randn(tokens, n, 3), randn(tokens, n)
    parts = {"first": nn.GRU(3, 3), "cell": nn.GRU(3, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 1)}

    def forward(m: Any) -> Tensor:
        return F.mse_loss(m.head(m.norm(m.cell(m.first(x)[0])[0]))[..., 0], y, reduction="none").mean()

    return of(Lambda(forward, **parts), lambda m: m())


def vit(n: int, patches: int = 4) -> Problem:
    parts: dict[str, Any] = {"patch": nn.Conv2d(3, 4, 2, 2), "blocks": net(Attention(4, 2), Attention(4, 2))}
    parts |= {"token": torch.randn(1, 1, 4), "position": torch.randn(1, patches + 1, 4), "head": nn.Linear(4, 3)}
    x = randn(n, 3, 4, 4)

    def forward(m: Any) -> Tensor:
        h = torch.cat([m.token.expand(n, -1, -1), m.patch(x).flatten(2).mT], 1) + m.position
        return F.cross_entropy(m.head(m.blocks(h)[:, 0]), labels(n, 3))

    return of(Lambda(forward, **parts), lambda m: m())


def unet(n: int, channels: int) -> Problem:
    c = channels
    parts = {"down": nn.Conv2d(c, c, 3, 2, 1), "norm": nn.GroupNorm(1, c), "mid": nn.Conv2d(c, c, 3, 1, 1)}
    parts |= {"up": nn.ConvTranspose2d(c, c, 2, 2), "out": nn.Conv2d(2 * c, 1, 1)}
    x, y = randn(n, c, 4, 4), randn(n, 1, 4, 4)

    def forward(m: Any) -> Tensor:
        h = torch.tanh(m.mid(torch.tanh(m.norm(m.down(x)))))
        return F.mse_loss(m.out(torch.cat([torch.tanh(m.up(h)), x], 1)), y)

    return of(Lambda(forward, **parts), lambda m: m())


def deep_sets(n: int, members: int) -> Problem:
    parts = {"a": nn.Linear(4, 5), "b": nn.Linear(5, 5), "c": nn.Linear(5, 3)}
    x = randn(n, members, 4)
    return of(
        Lambda(lambda m: F.cross_entropy(m.c(torch.relu(m.b(m.a(x).sum(1)))), labels(n, 3)), **parts), lambda m: m()
    )


def gnn() -> Problem:
    """Three graphs of 2, 3 and 4 nodes in one batch: the data tell the place of an example."""
    graph = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])
    near = (graph[:, None] == graph).double() / 3
    parts, x = {"a": nn.Linear(4, 5), "b": nn.Linear(5, 5), "head": nn.Linear(5, 3)}, randn(9, 4)

    def forward(m: Any) -> Tensor:
        h = torch.tanh(near @ m.b(torch.tanh(near @ m.a(x))))
        return F.cross_entropy(m.head(torch.zeros(3, 5).to(h).index_add(0, graph, h)), labels(3, 3))

    return of(Lambda(forward, **parts), lambda m: m())


def packed(lengths: list[int]) -> Problem:
    parts, x = {"embed": nn.Linear(3, 4), "cell": nn.GRU(4, 5), "head": nn.Linear(5, 2)}, randn(sum(lengths), 3)
    sizes = torch.tensor([sum(length > t for length in lengths) for t in range(max(lengths))])

    def forward(m: Any) -> Tensor:
        rows = nn.utils.rnn.PackedSequence(torch.tanh(m.embed(x)), sizes)
        return F.cross_entropy(m.head(m.cell(rows)[1][-1]), labels(len(lengths), 2))

    return of(Lambda(forward, **parts), lambda m: m())


def contrastive() -> Problem:
    model, one, two = net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), randn(4, 3), randn(4, 3)
    return of(model, lambda m: F.cross_entropy(F.normalize(m(one)) @ F.normalize(m(two)).T / 0.2, torch.arange(4)))


def penalised(couple: Callable[[Tensor], Tensor], n: int = 6) -> Problem:
    """The loss and the network both read a layer's output. In the network the examples then interact."""
    x = randn(n, 3)

    def forward(m: Any) -> Tensor:
        z = m.a(x)
        return F.cross_entropy(m.h(torch.tanh(couple(z))), labels(n, 2)) + 0.1 * z.square().mean()

    return of(Lambda(forward, a=nn.Linear(3, 4), h=nn.Linear(4, 2)), lambda m: m())


def batch_norm(z: Tensor) -> Tensor:
    return F.batch_norm(z, None, None, training=True)


def mixup(lam: float = 0.5, n: int = 6) -> Problem:
    parts, x = {"a": nn.Linear(3, 4), "b": nn.Linear(4, 4), "h": nn.Linear(4, 2)}, randn(n, 3)

    def forward(m: Any) -> Tensor:
        z = torch.tanh(m.a(x))
        return F.cross_entropy(m.h(torch.tanh(m.b(lam * z + (1 - lam) * z.flip(0)))), labels(n, 2))

    return of(Lambda(forward, **parts), lambda m: m())


def merged(n: int, tokens: int, time_major: bool) -> Problem:
    """Every layer gets ``[N*T, d]``, or ``[T*N, d]``. Only attention separates N and T."""
    parts = {name: nn.Linear(4, 4) for name in ("a", "q", "b")} | {"h": nn.Linear(4, 3)}
    lead = (tokens, n) if time_major else (n, tokens)
    x = randn(n * tokens, 4)

    def forward(m: Any) -> Tensor:
        h = torch.tanh(m.a(x))
        q = m.q(h).view(*lead, 4)
        q = q.transpose(0, 1) if time_major else q
        a = (q @ q.mT).softmax(-1) @ q
        a = (a.transpose(0, 1) if time_major else a).reshape(n * tokens, 4)
        return F.cross_entropy(m.h(torch.tanh(m.b(a + h))), labels(n * tokens, 3))

    return of(Lambda(forward, **parts), lambda m: m())


def normalised_last() -> Problem:
    """Batch norm in the loss couples nothing: the errors at its input are exact."""
    x = randn(6, 3)
    model = net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return of(model, lambda m: F.cross_entropy(batch_norm(m(x)), labels(6, 2)))


def losses_of_tokens(n: int = 3, tokens: int = 4) -> Problem:
    """The closure returns losses of shape ``[N*T]``, more than examples."""
    ids = torch.randint(7, (n, tokens))
    model = net(nn.Embedding(7, 4), Rotary(4, 2), nn.Linear(4, 7))
    y = ids.roll(-1, 1).flatten()
    return of(model, lambda m: F.cross_entropy(m(ids).flatten(0, 1), y, reduction="none"))


def without_forward(n: int = 3) -> Problem:
    """``grid_sample`` has no forward derivative: each guess goes through its backward."""
    parts, x = {"a": nn.Conv2d(2, 2, 1), "h": nn.Linear(2, 3)}, randn(n, 2, 4, 4)
    grid = torch.rand(n, 4, 4, 2, dtype=torch.float64)

    def forward(m: Any) -> Tensor:
        h = F.grid_sample(torch.tanh(m.a(x)), grid, align_corners=False)
        return F.cross_entropy(m.h(h.mean((2, 3))), labels(n, 3))

    return of(Lambda(forward, **parts), lambda m: m())


#: The problem, N, the coupled sites.
MODELS: dict[str, tuple[Callable[[], Problem], int, int]] = {
    "nanoGPT, T = 4N": (partial(nanogpt, 2, 8), 2, 0),
    "nanoGPT, T = 16N": (partial(nanogpt, 2, 32), 2, 0),
    "nanoGPT, N = T": (partial(nanogpt, 5, 5), 5, 0),
    "nanoGPT, N = T = heads": (partial(nanogpt, 2, 2), 2, 0),
    "nanoGPT, N = d = T": (partial(nanogpt, 4, 4), 4, 0),
    "nanoGPT, N = d, T = 8": (partial(nanogpt, 4, 8), 4, 0),
    "nanoGPT, T prime": (partial(nanogpt, 3, 7), 3, 0),
    "llama, N = 2, T = 8": (partial(llama, 2, 8), 2, 0),
    "llama, N = T = heads": (partial(llama, 2, 2), 2, 0),
    "T5, N = heads": (t5, 2, 0),
    "RNN, T first": (partial(rnn, 5, 4), 5, 0),
    "RNN, T first, N = T": (partial(rnn, 3, 3), 3, 0),
    "RNN, T first, N = 2": (partial(rnn, 2, 6), 2, 0),
    "losses [T, N]": (partial(tokens_first, 3, 6), 3, 0),
    "losses [T, N], N = T": (partial(tokens_first, 4, 4), 4, 0),
    "losses [N*T]": (losses_of_tokens, 3, 0),
    "ViT": (partial(vit, 3), 3, 0),
    "ViT, N = patches + 1": (partial(vit, 5), 5, 0),
    "UNet": (partial(unet, 3, 2), 3, 0),
    "UNet, N = channels": (partial(unet, 2, 2), 2, 0),
    "operation without forward derivative": (without_forward, 3, 0),
    "DeepSets": (partial(deep_sets, 4, 5), 4, 0),
    "DeepSets, N = members": (partial(deep_sets, 4, 4), 4, 0),
    "graphs in one batch": (gnn, 3, 2),
    "packed sequences, one length": (partial(packed, [3, 3, 3]), 3, 0),
    "packed sequences": (partial(packed, [4, 3, 2]), 3, 1),
    "contrastive loss": (contrastive, 4, 0),
    "batch norm + penalty": (partial(penalised, batch_norm), 6, 1),
    "batch norm by hand + penalty": (partial(penalised, lambda z: (z - z.mean(0)) / z.std(0)), 6, 1),
    "flipped batch + penalty": (partial(penalised, lambda z: z + z.flip(0)), 6, 1),
    "nothing coupled + penalty": (partial(penalised, torch.sin), 6, 0),
    "batch norm in the loss": (normalised_last, 6, 0),
    "mixup": (mixup, 6, 1),
    "mixup, N = 2": (partial(mixup, 0.5, 2), 2, 1),
    "[N*T, d]": (partial(merged, 3, 4, False), 3, 0),
    "[N*T, d], N = T": (partial(merged, 3, 3, False), 3, 0),
    "[T*N, d]": (partial(merged, 3, 4, True), 3, 0),
    "[T*N, d], N = 2": (partial(merged, 2, 6, True), 2, 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_examples_are_found(name: str) -> None:
    """The layouts are right, every site is reached, and no warning comes where the examples are apart."""
    torch.manual_seed(0)
    make, n, coupled = MODELS[name]
    problem = make()
    opt = optimizer(problem)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GuessWarning)
        opt.estimate(problem.closure)
    warned = [str(w.message) for w in caught if issubclass(w.category, GuessWarning)]
    assert coupled or not warned
    assert opt.estimation.plans[0].alive
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GuessWarning)
        assert checked_layouts(opt, problem)[:2] == (n, coupled)


# ------------------------------------------------------------------------------------------------ random networks


def random_problem(seed: int) -> Problem:
    """A dozen operations over ``[N, T, d]``, ``[T, N, d]``, ``[N*T, d]`` and ``[T*N, d]``, sizes often equal."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    n, t, d = (rng.choice((2, 2, 3, 4)) for _ in range(3))
    parts: dict[str, nn.Module] = {"first": nn.Linear(d, d)}
    steps: list[tuple[str, str]] = []
    kinds = ("linear", "norm", "tanh", "causal", "attend", "turn", "flat", "position", "residual")
    kinds += rng.choice(((), (), (), ("mean", "roll", "weigh"))) + rng.choice(((), ("penalty",)))
    for k in range(12):
        kind = rng.choice(kinds)
        made = {"linear": nn.Linear(d, d), "norm": nn.LayerNorm(d), "attend": nn.Linear(d, d),
                "position": nn.Embedding(t, d), "residual": nn.Linear(d, d)}.get(kind)  # fmt: skip
        if made is not None:
            parts[f"p{k}"] = made
        steps.append((kind, f"p{k}"))
    first, flat, x = rng.random() < 0.5, rng.random() < 0.5, randn(n, t, d)
    parts["head"] = nn.Linear(d, 3)
    y = labels(n * t, 3)[torch.randperm(n * t)].view(n, t)
    coupling = randn(n, n).softmax(-1)

    def forward(m: Any) -> Tensor:
        batch_first, penalty = first, torch.zeros((), dtype=torch.float64)
        h = m.first(x if first else x.transpose(0, 1))
        for kind, name in steps:
            part = getattr(m, name, None)
            of_time, of_batch = (1, 0) if batch_first else (0, 1)
            if kind in ("linear", "norm"):
                h = part(h)
            elif kind == "tanh":
                h = torch.tanh(h)
            elif kind == "causal":
                h = h.cumsum(of_time) / 2
            elif kind == "attend":
                q = part(h) if batch_first else part(h).transpose(0, 1)
                a = (q @ q.mT / 2).softmax(-1) @ q
                h = h + (a if batch_first else a.transpose(0, 1))
            elif kind == "turn":
                h, batch_first = h.transpose(0, 1), not batch_first
            elif kind == "flat":
                h = torch.sin(m.first(h.reshape(n * t, d))).view(h.shape)
            elif kind == "position":
                p = part(torch.arange(t))
                h = h + (p if batch_first else p[:, None])
            elif kind == "residual":
                h = h + torch.tanh(part(h))
            elif kind == "mean":
                h = h - h.mean(of_batch, keepdim=True) / 2
            elif kind == "roll":
                h = h + h.roll(1, of_batch) / 2
            elif kind == "weigh":
                h = torch.tensordot(coupling, h, ([1], [of_batch])).transpose(0, of_batch)
            elif kind == "penalty":
                penalty = penalty + h.square().mean()
        logits = m.head(h)
        target = y if batch_first else y.T
        if flat:
            return F.cross_entropy(logits.reshape(n * t, 3), target.reshape(-1)) + penalty / 10
        return -(logits.log_softmax(-1).gather(-1, target[..., None])).mean() + penalty / 10

    return of(Lambda(forward, **parts), lambda m: m())


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize(
    "start", [*range(0, 30, 10), *(pytest.param(start, marks=pytest.mark.slow) for start in range(30, 100, 10))]
)
def test_layouts_of_random_networks_are_right(start: int) -> None:
    apart = 0
    for seed in range(start, start + 10):
        n, coupled, sites = check_layouts(random_problem(seed))
        apart += n > 1 and coupled < sites
    assert apart == 10


# ------------------------------------------------------------------------------------------------ runs of the closure


def counted(problem: Problem) -> tuple[Problem, Iterator[int]]:
    runs = itertools.count()

    def closure() -> Tensor:
        next(runs)
        return problem.closure()

    return Problem(problem.named, closure), runs


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize(
    ("make", "first"),
    [
        (lambda: llama(3, 5), 3),  # trace, probe, pass
        (lambda: vit(3), 3),
        (lambda: unet(3, 2), 3),
        (lambda: penalised(torch.sin), 3),
        (lambda: penalised(batch_norm), 3),
        (lambda: rnn(5, 3), 3),
    ],
    ids=["llama", "ViT", "UNet", "penalty", "batch norm", "RNN"],
)
def test_runs_of_the_closure(make: Callable[[], Problem], first: int) -> None:
    torch.manual_seed(0)
    problem, runs = counted(make())
    opt = optimizer(problem)
    opt.audit = False
    found = []
    for _ in range(2):
        before = next(runs)
        opt.estimate(problem.closure)
        found.append(next(runs) - before - 1)
    assert found == [first, 2]  # the second: one half of a new split, and the pass


def test_lanes_that_do_not_go_together_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from guessopt.step import trace as planning

    class Refuses(planning.StackedEngine):
        def call(self, fn: Any, args: Any, kwargs: Any, *, writes: bool) -> Any:
            raise RuntimeError("no")

    for name in ("nanoGPT, T = 4N", "flipped batch + penalty"):
        torch.manual_seed(0)
        make, n, coupled = MODELS[name]
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore", GuessWarning)
            patch.setattr(planning, "StackedEngine", Refuses)
            assert check_layouts(make())[:2] == (n, coupled)


# ------------------------------------------------------------------------------------------- where nothing arrives yet


def gated(kind: str) -> tuple[Problem, Callable[[], None]]:
    """A network in which a gate is zero, and a function that opens it. Only the branch behind it separates N and T."""
    n = tokens = 3
    x, y = randn(tokens, n, 4), labels(n, 2)
    parts: dict[str, Any] = {"a": nn.Linear(4, 4), "mix": Attention(4, 2), "h": nn.Linear(4, 2)}
    state = {"weight": 0.0}
    if kind == "gate":
        parts["g"] = torch.zeros(1)
    elif kind in ("low rank", "adaLN"):
        parts |= {"down": nn.Linear(4, 2, bias=False), "up": nn.Linear(2, 4, bias=False)}

    def forward(m: Any) -> Tensor:
        z = m.a(x)  # [T, N, d]
        inner = m.mix(z.transpose(0, 1)).transpose(0, 1)  # over time
        if kind == "gate":
            z = z + m.g * inner
        elif kind == "low rank":
            z = z + m.up(m.down(inner))
        elif kind == "adaLN":
            z = z + m.up(m.down(z)) * inner
        elif kind == "number":
            z = z + state["weight"] * inner
        elif kind == "mixup":
            z = z + state["weight"] * z.flip(1)
        else:
            z = z + inner
        return F.cross_entropy(m.h(z.mean(0)), y)

    problem = of(Lambda(forward, **parts), lambda m: m())
    named = dict(problem.named)
    closed = {"gate": ["g"], "low rank": ["up.weight"], "adaLN": ["up.weight"], "head": ["h.weight"]}.get(kind, [])
    with torch.no_grad():
        for name in closed:
            named[name].zero_()

    def open_up() -> None:
        state["weight"] = 0.5
        with torch.no_grad():
            for name in closed:
                named[name].normal_()

    return problem, open_up


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize("kind", ["gate", "low rank", "adaLN", "number", "mixup", "head"])
def test_what_wakes_later_is_told_and_then_found(kind: str) -> None:
    torch.manual_seed(0)
    problem, open_up = gated(kind)
    opt = optimizer(problem)
    opt.estimate(problem.closure)
    plan = opt.estimation.plans[0]
    assert plan.found is not None and not plan.alive
    names = [opt.estimation.names[plan.graph.sites[k].params[0]] for k in plan.found.unproven]
    assert "a.weight" in names and not {"h.weight"} & set(names)
    opt.estimate(problem.closure)
    assert not plan.alive
    open_up()
    opt.estimate(problem.closure)
    assert plan.alive and plan.found.unproven == ()
    found, expected = check_layouts_of(opt, problem)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    first = next(site for site in plan.graph.sites if opt.estimation.names[site.params[0]] == "a.weight")
    assert first.layout is (Layout.COUPLED if kind == "mixup" else Layout.BATCH_SECOND)


# ------------------------------------------------------------------------------------------------ what users are told


def told(problem: Problem) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GuessWarning)
        optimizer(problem).estimate(problem.closure)
    return [str(w.message) for w in caught if issubclass(w.category, GuessWarning)]


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: penalised(batch_norm), "batch_norm"),
        (lambda: penalised(lambda z: z + z.flip(0)), "flip (its output: [6, 4])"),
        (lambda: penalised(lambda z: z - z.mean(0)), "mean (its output: [4])"),
        (lambda: penalised(lambda z: (z @ z.T).softmax(1) @ z), "matmul (its output: [6, 6])"),
        (mixup, "flip (its output: [6, 4])"),
    ],
    ids=["batch norm", "flip", "mean", "similarities", "mixup"],
)
def test_the_operation_in_which_examples_interact_is_named(make: Callable[[], Problem], cause: str) -> None:
    torch.manual_seed(0)
    (message,) = told(make())
    assert f"interact in {cause}" in message and "1 of" in message, message


#: One example, and several tokens, patches or channels.
ALONE: dict[str, Callable[[], Problem]] = {
    "nanoGPT": partial(nanogpt, 1, 6),
    "llama": partial(llama, 1, 5),
    "ViT": partial(vit, 1),
    "UNet": partial(unet, 1, 2),
    "RNN, T first": partial(rnn, 1, 4),
    "losses [T, 1]": partial(tokens_first, 1, 5),
}


@pytest.mark.parametrize("name", ALONE)
def test_one_example_alone(name: str) -> None:
    torch.manual_seed(0)
    problem = ALONE[name]()
    assert told(problem) == []
    check_layouts(problem)


# ---------------------------------------------------------------------------------------------- losses with parameters


class Fused(torch.autograd.Function):
    """As in Liger: the forward pass computes the gradients."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            leaves = [h.detach().requires_grad_(), w.detach().requires_grad_()]
            loss = F.cross_entropy(leaves[0] @ leaves[1].T, y)
            ctx.save_for_backward(*torch.autograd.grad(loss, leaves))
        return loss.detach(), None

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Any:
        return *(g * each for each in ctx.saved_tensors), None


Fused.__name__ = "LigerFusedLinearCrossEntropyFunction"


def head(kind: str) -> Problem:
    if kind != "linear" and kind != "liger" and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch has no linear_cross_entropy")
    parts = {"e": nn.Embedding(5, 4), "a": nn.Linear(4, 4), "n": nn.LayerNorm(4)}
    parts["h"] = nn.Linear(4, 5, bias=kind == "bias")
    ids, options = torch.randint(5, (6, 3)), dict[str, Any]()
    if kind == "bias":
        options["label_smoothing"] = 0.1
    if kind == "chunked":
        from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

        options["options"] = LinearCrossEntropyOptions(batch_chunk_size=4, chunking_method=None)

    def forward(m: Any) -> Tensor:
        h = m.e(ids)
        h = m.n(h + torch.tanh(m.a(h)).cumsum(1)).flatten(0, 1)
        y, w = ids.roll(-1, 1).flatten(), m.e.weight if kind == "tied" else m.h.weight
        if kind == "linear":
            return F.cross_entropy(F.linear(h, w), y)
        if kind == "liger":
            return Fused.apply(h, w, y)[0]
        if kind == "expression":
            return F.linear_cross_entropy(h, w * 2, y) + w.square().mean()
        if kind == "losses":
            return F.linear_cross_entropy(h, w, y, reduction="none").view(6, 3).mean(1)
        return F.linear_cross_entropy(h, w, y, linear_bias=m.h.bias, **options)

    problem = of(Lambda(forward, **parts), lambda m: m(), 6)
    if kind == "tied":
        problem.named = [(name, p) for name, p in problem.named if name != "h.weight"]
    return problem


@pytest.mark.parametrize("memory", ["store", "replay"])
@pytest.mark.parametrize("kind", ["fused", "chunked", "bias", "tied", "liger", "expression", "losses"])
def test_a_fused_loss_is_the_head(kind: str, memory: str) -> None:
    """Exact gradients in expectation, N examples, and an exact gradient of the head in every draw."""
    torch.manual_seed(0)
    problem = head(kind)
    if memory == "store":
        found, opt = sum_over_one_hots(problem, "fast")
        assert_gradient(problem, found)
    else:
        opt = optimizer(problem, memory=memory)
        opt.estimate(problem.closure)
    graph = opt.estimation.plans[0].graph
    assert graph.batch == 6 and all(site.layout is Layout.BATCH_FIRST for site in graph.sites)
    if kind != "tied":
        opt = optimizer(problem, memory=memory)
        opt.zero_grad()
        opt.estimate(problem.closure)
        weight = dict(problem.named)["h.weight"]
        (true,) = torch.autograd.grad(problem.closure().mean(), [weight])
        torch.testing.assert_close(weight.grad, true)


class BeforeTheHead(Apart):
    """Fixed guesses at the first three sites, zeros at the head."""

    def sample(self, state: Any, local: Any) -> Tensor:
        generator = torch.Generator().manual_seed(local.site.index)
        y = torch.randn(local.s.shape, dtype=local.s.dtype, generator=generator)
        return torch.zeros_like(y) if local.site.index == 3 else y


@pytest.mark.parametrize("kind", ["fused", "chunked", "liger"])
def test_a_fused_loss_gives_the_derivatives_of_the_plain_one(kind: str) -> None:
    found = []
    for each in (kind, "linear"):
        torch.manual_seed(0)
        problem = head(each)
        opt = optimizer(problem)
        opt.estimation.estimators = [BeforeTheHead()] * len(problem.named)
        with measuring(opt) as transaction:
            opt.estimation.refresh()
            found.append(forward(opt.estimation, problem.closure, transaction)[1].d)
    assert found[0].shape == (6,)
    torch.testing.assert_close(*found)
