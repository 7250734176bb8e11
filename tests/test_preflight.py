"""The report before training describes the step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from guessopt import ClosureError, DirectionalDescent, GuessGradOptimizer, GuessWarning, WPerp, preflight

from .problems import PROBLEMS, build


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_parameter_is_accounted_for(name: str) -> None:
    problem = build(name)
    report = preflight(problem.named, problem.closure)
    listed = {p for site in report.sites for p in site.parameters}
    alone = {"temperature"} if name == "functional" else set()  # read by the loss itself
    assert listed | alone == {n for n, _ in problem.named} and report.unread == ()
    assert report.batch == problem.batch
    assert all(site.batch != "coupled" for site in report.sites) and report.coupled == ()
    assert 1 < report.cost <= 3.01 and report.memory > 0


def test_a_transformer_reads_as_one_would_explain_it() -> None:
    problem = build("transformer")
    report = preflight(GuessGradOptimizer(problem.named, torch.optim.SGD, WPerp(k=3), lr=0.1), problem.closure)
    by_name = {site.parameters[0]: site for site in report.sites}
    qkv = by_name["block.qkv.weight"]
    assert qkv.operation == "linear" and qkv.shape == (5, 3, 12) and qkv.batch == "[N, ...]"
    assert qkv.next == "linear block.proj.weight" and "softmax" in qkv.path and qkv.guess == "w_perp k=3"
    assert by_name["block.up.weight"].path == "gelu"
    assert by_name["head.weight"].next == "the loss" and "last site" in by_name["head.weight"].guess
    assert by_name["embed.weight"].guess == "shares the next site's"
    text = str(report)
    assert "examples: 5" in text and all(name in text for name in by_name)


def test_unread_coupled_and_clipped_are_said() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2), nn.Linear(3, 3))
    x, y = torch.randn(6, 4), torch.arange(6) % 2
    groups = [{"params": model[:3].named_parameters("a")}, {"params": model[3:].named_parameters("b")}]
    report = preflight(groups, lambda: F.cross_entropy(model[:4](x), y))
    assert report.unread == ("b.4.weight", "b.4.bias")
    assert report.coupled == ("a.0.weight (linear)",)
    assert any("a.0.weight" not in note and "interact" in note for note in report.notes)
    assert report.sites[0].guess == "w_perp k=2"  # the head's rank


def test_each_group_shows_its_own_guess() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    groups = [
        {"params": model[0].parameters(), "estimator": "w_transpose"},
        {"params": model[2].parameters(), "estimator": DirectionalDescent()},
    ]
    report = preflight(groups, lambda: model(torch.ones(3, 4)).sum())
    assert [site.guess for site in report.sites] == ["w_transpose", "directional_descent (on the parameters)"]


def test_next_weights_that_are_no_parameters_are_named_by_kind_and_shape() -> None:
    first, frozen, tied = torch.nn.Linear(3, 5), torch.nn.Linear(5, 4).requires_grad_(False), torch.nn.Linear(5, 4)
    params, x = [*first.parameters(), *tied.parameters()], torch.randn(6, 3)
    report = preflight(params, lambda: frozen(torch.relu(first(x))).square().mean())
    assert report.sites[0].next == "linear a frozen weight [4, 5]"
    report = preflight(params, lambda: torch.nn.functional.linear(first(x), 2 * tied.weight).square().mean())
    assert report.sites[0].next == "linear an expression of parameters [4, 5]"


def test_auto_says_what_it_picks_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    """W-perp where it leaves something out, Downstream before few rows, the exact error where the loss reads."""
    model = nn.Sequential(
        nn.Embedding(9, 24), nn.LayerNorm(24), nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 32), nn.Tanh(),
        nn.Linear(32, 3), nn.Flatten(), nn.Softmax(-1),
    )  # fmt: skip
    ids = torch.randint(9, (6, 9))
    opt = GuessGradOptimizer(model.named_parameters(), torch.optim.SGD, "auto", lr=0.1)
    report = preflight(opt, lambda: model(ids).square().sum())
    assert [site.guess for site in report.sites] == [
        "auto: w_perp k=10", "auto: w_perp: each example's parameters", "auto: w_perp k=10", "auto: downstream",
        "none: exact error",
    ]  # fmt: skip
    assert "auto picked w_perp for 3 sites" in report.notes and "auto picked downstream for 1 site" in report.notes
    opt.step(lambda: model(ids).square().sum())
    assert not [w for w in recwarn if issubclass(w.category, GuessWarning)]


def test_auto_by_group_and_by_pattern() -> None:
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    x = torch.ones(3, 4)
    patterns = {"4.*": "w_transpose", "*": {"name": "auto", "k": 4}}
    groups = [
        {"params": model[:4].named_parameters(), "estimator": {"name": "auto", "k": 4}},
        {"params": model[4].named_parameters("4"), "estimator": "w_transpose"},
    ]
    expected = ["auto: w_perp k=4", "auto: downstream", "w_transpose: isotropic (last site)"]
    for opt in (
        GuessGradOptimizer(model.named_parameters(), torch.optim.SGD, patterns, lr=0.1),
        GuessGradOptimizer(groups, torch.optim.SGD, lr=0.1),
    ):
        assert [site.guess for site in preflight(opt, lambda: model(x).square().sum()).sites] == expected


def test_auto_takes_isotropic_noise_where_a_segment_is_blocked(recwarn: pytest.WarningsRecorder) -> None:
    first, second = nn.Linear(4, 6), nn.Linear(6, 2)

    def closure() -> torch.Tensor:
        h = first(torch.ones(3, 4))
        h[:, :2].mul_(2)
        return second(h).square().sum()

    named = [*first.named_parameters("first"), *second.named_parameters("second")]
    opt = GuessGradOptimizer(named, torch.optim.SGD, "auto", lr=0.1)
    assert preflight(opt, closure).sites[0].guess == (
        "auto: activation_perturbation: isotropic (mul writes into memory that other tensors share)"
    )
    opt.step(closure)
    assert not [w for w in recwarn if issubclass(w.category, GuessWarning)]


def test_it_changes_nothing_and_raises_as_a_step_would() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
    opt = GuessGradOptimizer(model.parameters(), lr=0.1, seed=0)
    x, y = torch.randn(6, 4), torch.arange(6) % 2
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    preflight(opt, lambda: F.cross_entropy(model(x), y))
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with pytest.warns(GuessWarning, match="interact"):  # the warning is still to come: preflight only told
        opt.step(lambda: F.cross_entropy(model(x), y))
    with pytest.raises(ClosureError, match="must return the loss"):
        preflight(opt, lambda: None)


@pytest.mark.parametrize(("name", "operation"), [("lstm", "lstm"), ("rotary language model", "scaled_dot_product")])
def test_operations_treated_in_another_way_are_named(name: str, operation: str) -> None:
    problem = build(name)
    assert any(
        operation in note and "no forward derivative" in note
        for note in preflight(problem.named, problem.closure).notes
    )
