"""Random networks: right, or refused with a remedy.

``GUESSOPT_FUZZ=2000`` tries more networks than the usual number. ``python -m benchmarks reliability`` tries thousands.
"""

import os
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from guessopt.layout import Layout
from guessopt.step import modes
from guessopt.step.estimation import Estimation
from tests.fuzzing.networks import FAMILY_NAMES, LOSS_NAMES, Network, Op, alone, build, from_seed, networks
from tests.fuzzing.oracles import CHANGES, ORACLES, Finding, check, optimizer, seeded
from tests.fuzzing.parts import LOSSES, OPERATIONS

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, about losses and layers that people seldom use

NETWORKS = int(os.environ.get("GUESSOPT_FUZZ", "200"))
BLOCK = 10
OTHERS = tuple(name for name in ORACLES if name not in ("exact", "changes"))
TRIES = settings(
    max_examples=BLOCK,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


def wrong(network: Network, *names: str) -> list[Finding]:
    return [finding for finding in check(network, *names) if finding.kind in ("wrong", "obscure")]


@pytest.mark.parametrize("block", range(NETWORKS // BLOCK))
def test_networks(block: int) -> None:
    """Exactness and a change between steps for each network; one of the other oracles in turn."""

    @hypothesis.seed(block)
    @TRIES
    @given(networks())
    def right(network: Network) -> None:
        turn = network.seed + block
        names = ("exact", "changes", OTHERS[turn % len(OTHERS)])
        assert not wrong(network, *names), repr(network)

    right()


def test_no_value_between_network_and_loss() -> None:
    """No value lies between the network and the loss here: the search for a chain of blocks finds none."""
    network = Network(
        ops=(Op("pool_positions", "mean", 3), Op("residual", "pre", 2)),
        losses=("square",),
        inputs="tokens_padded",
        batch=1,
        width=2,
        seed=314,
    )
    assert not wrong(network, "engines")


def test_indices_that_the_closure_makes() -> None:
    """A table is looked up by indices alone. ``torch.func.jvp`` wraps indices that the closure makes itself."""
    network = Network(
        ops=(Op("embedding_bag", "offsets", 4), Op("gated_unit", "glu", 4)),
        losses=("cross_entropy_head_free",),
        batch=1,
        width=1,
        reduction="sum",
        seed=182,
    )
    assert not wrong(network, "engines")


def test_the_loss_reads_a_table_beside_a_chain_of_blocks() -> None:
    """A cut that is no value of the chain's head: a table of parameters, looked up by indices alone."""
    network = Network(
        ops=(
            Op("shared", "twice", 2),
            Op("multihead", "encoder_layer", 1),
            Op("custom_function", "cube", 1),
            Op("embedding", "lookup_padded", 1),
        ),
        losses=("square",),
        inputs="tokens",
        tokens=1,
        width=2,
        seed=586,
    )
    assert not wrong(network, "scaling", "modes")


# --- the fuzzer itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", OPERATIONS)
def test_every_operation_fits_some_network(family: str) -> None:
    assert family in FAMILY_NAMES
    for variant in OPERATIONS[family].variants:
        assert any(op[:2] == (family, variant) for op in alone(family, variant).ops)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_fits_some_network(name: str) -> None:
    assert name in LOSS_NAMES
    build(Network((Op("linear", "module"),), (name,)))


def test_there_are_enough_families() -> None:
    assert len(OPERATIONS) >= 40


def test_a_seed_makes_one_network_and_its_repr_makes_it_again() -> None:
    made = [from_seed(seed) for seed in range(30)]
    assert made == [from_seed(seed) for seed in range(30)]
    assert [eval(repr(network)) for network in made] == made
    assert len(set(made)) > 25


def off_by_a_little(monkeypatch: pytest.MonkeyPatch, when: Any) -> None:
    """Every estimate of an optimizer for which ``when`` is true is 1% too long."""
    right = modes.estimate

    def estimate(est: Estimation, *args: Any) -> Any:
        wrong = when(est)
        loss, gradients = right(est, *args)
        return loss, {k: g * 1.01 for k, g in gradients.items()} if wrong else gradients

    monkeypatch.setattr(modes, "estimate", estimate)


@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("exact", lambda est: True),
        ("engines", lambda est: est.engine == "func"),
        ("modes", lambda est: est.memory == "replay"),
        ("stacked", lambda est: est.stack_guesses is False),
        ("changes", lambda est: est.steps > 1),
        ("credit", lambda est: est.memory == "replay"),
        ("past", lambda est: len(est.plans) > 0),
    ],
)
def test_an_oracle_notices_a_wrong_estimate(monkeypatch: pytest.MonkeyPatch, name: str, when: Any) -> None:
    network = Network((Op("linear", "module"), Op("activation", "tanh")), ("mse",))
    assert check(network, name) == []
    off_by_a_little(monkeypatch, when)
    assert [finding.kind for finding in check(network, name)] == ["wrong"]


def test_the_oracles_of_scale_and_of_state_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network((Op("linear", "module"), Op("activation", "tanh")), ("mse",))
    assert check(network, "scaling", "plain") == []
    right, made = modes.estimate, []

    def estimate(*args: Any) -> Any:
        made.append(args)
        loss, gradients = right(*args)
        return loss + 1, {k: g + 0.1 for k, g in gradients.items()}

    monkeypatch.setattr(modes, "estimate", estimate)
    found = check(network, "scaling", "plain")
    assert made and [finding.oracle for finding in found] == ["scaling", "plain"]
    assert "the loss is" in found[1].message


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_met(name: str) -> None:
    applies = CHANGES[name][0]
    assert any(applies(build(from_seed(seed))) for seed in range(300))


@pytest.mark.parametrize("seed", [107, 164])
def test_every_memory_mode_finds_the_same_layouts(seed: int) -> None:
    """With every size 2, several layouts fit; which one is found depends on the probe's random numbers."""
    network = replace(from_seed(seed), batch=2, width=2, tokens=2)
    found: dict[str, list[Layout]] = {}
    for memory in ("store", "replay", "stream"):
        built = build(network, strict=False)
        opt = optimizer(built, "activation_perturbation", memory=memory)
        seeded(0)
        opt.step(built.closure)
        found[memory] = [site.layout for site in opt.estimation.plans[0].graph.sites]
    assert found["store"] == found["replay"] == found["stream"]
