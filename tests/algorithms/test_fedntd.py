"""FedNTD: the divergence over the classes that are not true."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms.fedntd import FedNtd, not_true
from harness import trees
from harness.protocol import Batch

if TYPE_CHECKING:
    from tests.conftest import Lab

CE = math.log(math.e**2 + math.e**0.5 + 1 / math.e) - 2  # of (2, .5, -1), class 0: .241311


@pytest.mark.parametrize(
    ("changes", "term"),
    [
        ({}, 0.022622),
        ({"tau": 3.0}, 0.030087),
        ({"beta": 0.3}, 0.3 * 0.022622),
        ({"beta": 2.0, "tau": 3.0}, 0.060174),
    ],
)
def test_loss_by_hand(lab: Lab, changes: dict[str, Any], term: float) -> None:
    """Local (2, .5, -1), global (1, 1, 0), class 0: without it (.5, -1) and (1, 0).

    tau 1: p = softmax(1, 0) = (.731059, .268941), q = softmax(.5, -1) = (.817574, .182426):
    .731059 ln(.731059 / .817574) + .268941 ln(.268941 / .182426) = .022622. tau 3: 9 * .003343 = .030087.
    """
    p, center = ({"logits": torch.tensor([row])} for row in ((2.0, 0.5, -1.0), (1.0, 1.0, 0.0)))
    batch = Batch(torch.tensor([0]), torch.tensor([0]))
    value, _, _ = lab.step(FedNtd(**changes), lab.Table(), p, batch, {"params": center})
    assert value == pytest.approx(CE + term, abs=2e-6)


def test_the_gradient_spares_the_true_class(lab: Lab) -> None:
    """tau 1: softmax - one-hot of cross-entropy, plus (0, q - p) = (0, .086515, -.086515)."""
    p, center = ({"logits": torch.tensor([row])} for row in ((2.0, 0.5, -1.0), (1.0, 1.0, 0.0)))
    batch = Batch(torch.tensor([0]), torch.tensor([0]))
    both, plain = (
        lab.step(FedNtd(beta=b), lab.Table(), p, batch, {"params": center})[1]["logits"] for b in (1.0, 0.0)
    )
    assert (both - plain)[0].tolist() == pytest.approx([0.0, 0.086515, -0.086515], abs=1e-6)
    assert center["logits"].grad is None


@given(st.integers(2, 7).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(0, c - 1), min_size=1))))
@settings(max_examples=40)
def test_exactly_the_true_class_is_dropped(drawn: tuple[int, list[int]]) -> None:
    classes, y = drawn
    logits = torch.arange(classes).expand(len(y), -1) + 10 * torch.arange(len(y))[:, None]
    kept = not_true(logits, torch.tensor(y)).tolist()
    assert kept == [
        [value for c, value in enumerate(row) if c != true] for row, true in zip(logits.tolist(), y, strict=True)
    ]


def test_clients_learn_from_the_model_that_they_received(lab: Lab) -> None:
    """Two rounds; the teacher is the round's own start, at no byte more than FedAvg."""
    net = lab.world().net("mlp")
    params = net.init(trees.stream(0))
    x = torch.randn(5, 1, 8, 8, generator=trees.stream(1))
    assert torch.equal(FedNtd().teach(net, x, {"params": params}, {})["teacher"], net.frozen(params, x))
    plain, server = lab.run("fedavg", rounds=2), lab.run("fedntd", rounds=2)
    for key in ("down_kinds", "up_kinds"):
        assert [row[key] for row in server.rounds] == [row[key] for row in plain.rounds]


def test_beta_zero_is_fedavg_bit_for_bit(lab: Lab) -> None:
    settings: dict[str, Any] = {"rounds": 4, "participation": 0.5, "local": {"momentum": 0.9, "epochs": 2}}
    plain = lab.run("fedavg", **settings)
    assert lab.same(lab.model(lab.run("fedntd", {"beta": 0.0}, **settings)), lab.model(plain))
    assert not lab.same(lab.model(lab.run("fedntd", **settings)), lab.model(plain))
