"""FedProx: the squared norm, its gradient, and what mu = 0 means."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from algorithms.fedavg import FedAvg
from algorithms.fedprox import FedProx
from harness import nets, trees
from harness.protocol import Batch

if TYPE_CHECKING:
    from tests.conftest import Lab


def test_loss_and_gradient_by_hand(lab: Lab) -> None:
    """w = (ln 2, 0, 0) are the logits of the only row, of class 0: p = (1/2, 1/4, 1/4), CE = ln 2.

    theta_g = (0, 0, 2), mu = .5.
    ||w - theta_g||^2 = ln^2 2 + 4, times mu / 2: + (.480453 + 4) / 4 = 1.120113.
    Gradient p - (1, 0, 0) + .5 (ln 2, 0, -2) = (-.5 + .346574, .25, .25 - 1).
    """
    p = {"logits": torch.tensor([[math.log(2), 0.0, 0.0]])}
    inbox = {"params": {"logits": torch.tensor([[0.0, 0.0, 2.0]])}}
    batch = Batch(torch.tensor([0]), torch.tensor([0]))
    value, grads, _ = lab.step(FedProx(mu=0.5), lab.Table(), p, batch, inbox)
    assert value == pytest.approx(math.log(2) + 1.120113, abs=1e-6)
    assert grads["logits"][0].tolist() == pytest.approx([-0.153426, 0.25, -0.75], abs=1e-6)


@pytest.mark.parametrize("mu", [0.01, 1.0])
def test_the_term_adds_mu_times_the_distance_to_the_gradient(lab: Lab, mu: float) -> None:
    """Of every leaf of a real net; the global model gets no gradient."""
    net = nets.build("lenet5", (1, 8, 8), 4)
    p, center = net.init(trees.stream(0)), net.init(trees.stream(1))
    batch = Batch(torch.randn(6, 1, 8, 8, generator=trees.stream(2)), torch.arange(6) % 4)
    plain, plain_grads, _ = lab.step(FedAvg(), net, p, batch)
    value, grads, _ = lab.step(FedProx(mu=mu), net, p, batch, {"params": center})
    distance = trees.sub(p, center)
    assert value - plain == pytest.approx(mu / 2 * float(trees.flat(distance).square().sum()), rel=1e-4)
    assert lab.close(grads, trees.add(plain_grads, distance, mu), atol=1e-5)
    assert not any(x.requires_grad for _, x in trees.leaves(center))


def test_mu_zero_is_fedavg_bit_for_bit(lab: Lab) -> None:
    settings: dict[str, Any] = {"rounds": 4, "participation": 0.5, "local": {"momentum": 0.9, "epochs": 2}}
    plain = lab.run("fedavg", **settings)
    assert lab.same(lab.model(lab.run("fedprox", {"mu": 0.0}, **settings)), lab.model(plain))
    assert not lab.same(lab.model(lab.run("fedprox", {"mu": 0.1}, **settings)), lab.model(plain))


def test_a_large_mu_holds_clients_back(lab: Lab) -> None:
    """At lr * mu = 1 each step starts again from the global model: a client ends one step away from it."""
    held = lab.run("fedprox", {"mu": 10.0}, sizes=(40,), rounds=1, local={"lr": 0.1, "epochs": 3})
    free = lab.run("fedavg", sizes=(40,), rounds=1, local={"lr": 0.1, "epochs": 3})
    start = held.world.net("mlp").init(trees.stream(0, "init"))
    moved = [float(trees.sq_distance(lab.model(server), start)) for server in (held, free)]
    assert moved[0] < moved[1] / 4
