"""SCAFFOLD: the corrected gradient, option II, and the server's two means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms.fedavg import FedAvg
from algorithms.scaffold import Scaffold, effective_steps
from harness import nets, trees
from harness.batches import normalise
from harness.protocol import Batch, Visit
from harness.trees import Tree

if TYPE_CHECKING:
    from tests.conftest import Lab


def one(value: float) -> Tree:
    return {"w": torch.tensor([value])}


# ---- steps under momentum


def test_effective_steps_by_hand() -> None:
    """K 50, rho .9: .9^50 = .00515378; (50 - .9 * .99484622 / .1) / .1 = (50 - 8.95361600) / .1 = 410.4638.

    K 2, rho .5: a constant gradient moves 1 + 1.5 steps.
    """
    assert effective_steps(50, 0.9) == pytest.approx(410.4638, abs=5e-5)
    assert effective_steps(2, 0.5) == pytest.approx(2.5)
    assert effective_steps(7, 0.0) == 7


@given(st.integers(1, 200), st.floats(0, 0.99))
@settings(max_examples=50)
def test_effective_steps_are_what_heavy_ball_moves(steps: int, rho: float) -> None:
    """v = rho v + 1, x += v, K times."""
    velocity = position = 0.0
    for _ in range(steps):
        velocity = rho * velocity + 1
        position += velocity
    assert effective_steps(steps, rho) == pytest.approx(position, rel=1e-6)


# ---- the client


def test_the_gradient_is_corrected_by_c_minus_c_i(lab: Lab) -> None:
    """In every leaf: grad - c_i + c."""
    net = nets.build("lenet5", (1, 8, 8), 4)
    p, c, c_i = (net.init(trees.stream(i)) for i in range(3))
    batch = Batch(torch.randn(6, 1, 8, 8, generator=trees.stream(3)), torch.arange(6) % 4)
    _, plain, _ = lab.step(FedAvg(), net, p, batch)
    _, grads, _ = lab.step(Scaffold(), net, p, batch, {"params": p, "c": c}, {"c_i": c_i})
    assert lab.close(grads, trees.add(trees.sub(plain, c_i), c), atol=1e-6)


def test_option_two_by_hand(lab: Lab) -> None:
    """theta_g 1, w .4, K 5, lr .1, c_i .2, c .5: c_i' = .2 - .5 + .6 / .5 = .9, a change of .7."""
    trained = lab.trained(one(1.0), one(0.4), {"c": one(0.5)}, {"c_i": one(0.2)}, steps=5, lr=0.1)
    payload, memory = Scaffold().reply(trained)
    assert memory["c_i"]["w"].item() == pytest.approx(0.9)
    assert payload["c_delta"]["w"].item() == pytest.approx(0.7)
    assert payload["params"]["w"].item() == pytest.approx(0.4)


def test_option_two_with_momentum_by_hand(lab: Lab) -> None:
    """K 2, rho .5 count as 2.5 steps: c_i' = .2 - .5 + .6 / (2.5 * .1) = 2.1."""
    trained = lab.trained(one(1.0), one(0.4), {"c": one(0.5)}, {"c_i": one(0.2)}, steps=2, momentum=0.5)
    assert Scaffold().reply(trained)[1]["c_i"]["w"].item() == pytest.approx(2.1)


def test_k_counts_steps_and_not_epochs(lab: Lab) -> None:
    """20 rows in batches of 8, 2 epochs: 6 steps. From c = c_i = 0: c_i' = (theta_g - w) / (6 * .05)."""
    server = lab.run("scaffold", sizes=(20,), rounds=1, local={"epochs": 2, "lr": 0.05})
    start = server.world.net("mlp").init(trees.stream(0, "init"))
    expected = trees.scale(trees.sub(start, lab.model(server)), 1 / (6 * 0.05))
    assert lab.close(server.memories[Visit(0, "global")]["c_i"], expected, atol=1e-5)
    assert lab.close(server.state["c"], expected, atol=1e-5)  # the only client


# ---- the server


def test_the_server_s_step_by_hand(lab: Lab) -> None:
    """Two of N = 4 clients, from 1 to .4 and to .8, with changes .7 and .1; plain means, whatever the sizes.

    theta_g = 1 + mean(-.6, -.2) = .6, with eta_g = .5 instead .8; c = .5 + 2/4 * mean(.7, .1) = .7.
    """
    world = lab.world((10, 90, 10, 10))
    for rate, expected in ((1.0, 0.6), (0.5, 0.8)):
        state = {"net": "mlp", "params": one(1.0), "c": one(0.5), "clients": 4}
        updates = [
            lab.update(0, {"params": one(0.4), "c_delta": one(0.7)}, samples=10),
            lab.update(1, {"params": one(0.8), "c_delta": one(0.1)}, samples=90),
        ]
        merged = Scaffold(lr_server=rate).merge(state, updates, lab.bench(world))
        assert merged["params"]["w"].item() == pytest.approx(expected)
        assert merged["c"]["w"].item() == pytest.approx(0.7)


def test_the_first_round_is_fedavg_for_equal_sizes(lab: Lab) -> None:
    """c = c_i = 0: the clients' updates are FedAvg's bit for bit, their mean up to rounding. Later rounds differ."""
    sizes = (16, 16, 16)
    plain, corrected = (lab.run(name, sizes=sizes, rounds=1, local={"epochs": 2}) for name in ("fedavg", "scaffold"))
    for a, b in zip(plain.pool.log, corrected.pool.log, strict=True):  # type: ignore[attr-defined]
        assert lab.same(a.payload["params"], b.payload["params"])
    assert lab.close(lab.model(corrected), lab.model(plain), atol=1e-6)
    later = [lab.run(name, sizes=sizes, rounds=3, local={"epochs": 2}) for name in ("fedavg", "scaffold")]
    assert not lab.close(lab.model(later[0]), lab.model(later[1]), atol=1e-3)


def test_a_trial_is_algorithm_1(lab: Lab) -> None:
    """Three rounds with half of four clients each, against the algorithm written down as in the paper."""
    server = lab.run("scaffold", sizes=(12, 16, 8, 16), rounds=3, participation=0.5)
    setup, host = lab.setup("scaffold", sizes=(12, 16, 8, 16)), server.pool.host  # type: ignore[attr-defined]
    net = server.world.net("mlp")
    like = net.init(trees.stream(0, "init"))
    x, c = trees.flat(like), torch.zeros(trees.size(like))
    c_i = {client: torch.zeros_like(x) for client in range(4)}
    for t in range(3):
        cohort = sorted(s.order.visit.client for s in server.pool.log if s.order.round == t)  # type: ignore[attr-defined]
        moves, changes = [], []
        for client in cohort:
            rows = setup.split.clients[client]
            images, labels = (
                normalise(host.x_train[rows], host.card.mean, host.card.std),
                torch.tensor(setup.arrays.y_train[rows]),
            )
            y, order = x.clone(), trees.stream(0, "visit", t, client, "global", "order")
            batches = torch.randperm(len(rows), generator=order).split(8)
            for index in batches:
                leaf = y.clone().requires_grad_()
                F.cross_entropy(net(trees.unflat(leaf, like), images[index]), labels[index]).backward()
                assert leaf.grad is not None
                y = y - 0.1 * (leaf.grad - c_i[client] + c)
            new = c_i[client] - c + (x - y) / (len(batches) * 0.1)
            moves.append(y - x)
            changes.append(new - c_i[client])
            c_i[client] = new
        x, c = x + torch.stack(moves).mean(0), c + len(cohort) / 4 * torch.stack(changes).mean(0)
    assert torch.allclose(trees.flat(lab.model(server)), x, atol=1e-5)
    assert torch.allclose(trees.flat(server.state["c"]), c, atol=1e-4)


def test_control_variates_double_the_traffic_and_stay_with_clients(lab: Lab) -> None:
    plain, server = lab.run("fedavg", rounds=2), lab.run("scaffold", rounds=2)
    for own, other in zip(server.rounds, plain.rounds, strict=True):
        assert own["down_kinds"] == {"params": other["down_bytes"], "c": other["down_bytes"]}
        assert own["up_kinds"] == {"params": other["up_bytes"], "c_delta": other["up_bytes"]}
    assert {key for sent in server.pool.log for key in sent.memory or {}} == {"c_i"}  # type: ignore[attr-defined]
