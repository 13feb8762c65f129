"""FedDyn: the dynamic regulariser, the clients' h_i, the server's drift, and why no a gives FedAvg."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from algorithms.fedavg import FedAvg
from algorithms.feddyn import FedDyn
from harness import nets, trees
from harness.protocol import Batch, Cohort, Visit
from harness.trees import Tree

if TYPE_CHECKING:
    from tests.conftest import Lab


def one(value: float) -> Tree:
    return {"w": torch.tensor([value])}


def test_h_over_two_rounds_by_hand(lab: Lab) -> None:
    """h_i .2, a .1, w .7, theta_g 1: .2 - .1 (-.3) = .23. Then theta_g .8, w .9: .23 - .1 (.1) = .22."""
    method, memory = FedDyn(a=0.1), {"h": one(0.2)}
    for start, end, expected in ((1.0, 0.7, 0.23), (0.8, 0.9, 0.22)):
        payload, memory = method.reply(lab.trained(one(start), one(end), {"params": one(start)}, memory))
        assert memory["h"]["w"].item() == pytest.approx(expected)
        assert payload["params"]["w"].item() == pytest.approx(end)
        assert list(payload) == ["params"]


def test_loss_and_gradient_by_hand(lab: Lab) -> None:
    """w = (ln 2, 0, 0), class 0: p = (1/2, 1/4, 1/4), CE ln 2. theta_g = (0, 0, 2), h = (1, 2, 0), a = .5.

    - <h, w> = -ln 2; a / 2 ||w - theta_g||^2 = (.480453 + 4) / 4 = 1.120113: 1.120113 in all.
    Gradient: p - (1, 0, 0) - (1, 2, 0) + .5 (ln 2, 0, -2) = (-1.153426, -1.75, -.75).
    """
    p, center, h = (
        {"logits": torch.tensor([row])} for row in ((math.log(2), 0.0, 0.0), (0.0, 0.0, 2.0), (1.0, 2.0, 0.0))
    )
    batch = Batch(torch.tensor([0]), torch.tensor([0]))
    value, grads, _ = lab.step(FedDyn(a=0.5), lab.Table(), p, batch, {"params": center}, {"h": h})
    assert value == pytest.approx(1.120113, abs=1e-6)
    assert grads["logits"][0].tolist() == pytest.approx([-1.153426, -1.75, -0.75], abs=1e-6)


def test_the_gradient_in_every_leaf(lab: Lab) -> None:
    """grad - h_i + a (w - theta_g)."""
    net = nets.build("lenet5", (1, 8, 8), 4)
    p, center, h = (net.init(trees.stream(i)) for i in range(3))
    batch = Batch(torch.randn(6, 1, 8, 8, generator=trees.stream(3)), torch.arange(6) % 4)
    _, plain, _ = lab.step(FedAvg(), net, p, batch)
    _, grads, _ = lab.step(FedDyn(a=0.3), net, p, batch, {"params": center}, {"h": h})
    assert lab.close(grads, trees.add(trees.sub(plain, h), trees.sub(p, center), 0.3), atol=1e-5)


@pytest.mark.parametrize("a", [0.1, 0.01])
def test_the_server_over_two_rounds_by_hand(lab: Lab, a: float) -> None:
    """N 4, two of them a round, plain means. theta_g 1: w .4, .8. h = -(a / 4)(-.6 - .2) = .2 a; .6 - .2 = .4.

    Then w .5, 1.1 from .4: h = .2 a - (a / 4)(.1 + .7) = 0; theta_g = .8 - 0 = .8. a cancels.
    """
    method, world = FedDyn(a=a), lab.world((10, 90, 10, 10))
    state = {"net": "mlp", "params": one(1.0), "average": one(1.0), "drift": one(0.0)}
    for t, (models, average, expected) in enumerate((((0.4, 0.8), 0.6, 0.4), ((0.5, 1.1), 0.8, 0.8))):
        updates = [lab.update(i, {"params": one(w)}, samples=[10, 90][i]) for i, w in enumerate(models)]
        state = method.merge(state, updates, lab.bench(world, t))
        seen = {name: model["w"].item() for name, (_, model) in method.models(state).items()}
        assert seen == pytest.approx({"global": expected, "average": average})


def test_h_is_the_sum_of_all_drifts(lab: Lab) -> None:
    """The server's drift is -(1 / N) sum_i h_i / a over all clients, those who never came with h_i = 0."""
    server = lab.run("feddyn", {"a": 0.1}, rounds=4, participation=0.5)
    held = [memory["h"] for memory in server.memories.values()]
    total = held[0]
    for h in held[1:]:
        total = trees.add(total, h)
    assert lab.close(server.state["drift"], trees.scale(total, -1 / (4 * 0.1)), atol=1e-5)
    assert all(set(sent.payload) == {"params"} for sent in server.pool.log)  # type: ignore[attr-defined]


def test_a_to_zero_is_fedavg_at_the_clients_but_not_at_the_server(lab: Lab) -> None:
    """a = 1e-30 is lost in rounding: the clients' first models are FedAvg's bit for bit.

    The server adds the drift whatever a is: with everybody present and equal it goes twice as far.
    """
    sizes = (16, 16, 16)
    plain, server = (lab.run(*what, sizes=sizes, rounds=1) for what in (["fedavg"], ["feddyn", {"a": 1e-30}]))
    for a, b in zip(plain.pool.log, server.pool.log, strict=True):  # type: ignore[attr-defined]
        assert lab.same(a.payload["params"], b.payload["params"])
    assert lab.close(server.state["average"], lab.model(plain), atol=1e-6)
    start = server.world.net("mlp").init(trees.stream(0, "init"))
    twice = trees.add(lab.model(plain), trees.sub(lab.model(plain), start))
    assert lab.close(lab.model(server), twice, atol=1e-6)


def test_per_rows_divides_a_by_the_share_of_rows(lab: Lab) -> None:
    """Sizes 10 and 30, mean 20: factors 2 and 2/3, so a = .1 is .2 and .0667. h_i: .2 times .3 = .06."""
    method, world = FedDyn(a=0.1, per_rows=True), lab.world((10, 30))
    visits = tuple(Visit(k, "global") for k in range(2))
    sent = method.broadcast(method.init(world, trees.stream(0)), Cohort(0, visits), world).personal
    assert [sent[visit]["factor"].item() for visit in visits] == pytest.approx([2.0, 2 / 3])
    inbox = {"params": one(1.0), **sent[visits[0]]}
    _, memory = method.reply(lab.trained(one(1.0), one(0.7), inbox, {"h": one(0.0)}))
    assert memory["h"]["w"].item() == pytest.approx(0.06)
    equal = [lab.run("feddyn", {"per_rows": on}, sizes=(16, 16), rounds=2) for on in (False, True)]
    assert lab.same(lab.model(equal[0]), lab.model(equal[1]))
    assert equal[1].rounds[0]["down_bytes"] - equal[0].rounds[0]["down_bytes"] == 2 * 4


def test_running_statistics_are_averaged(lab: Lab) -> None:
    """A drift beside them could make a variance negative: 1 -> .3 and 1 -> .1 would give .2 - .8 = -.6."""
    world, names = lab.world((10, 10)), ("w", "norm.running_var")
    state = {
        "net": "mlp",
        "params": dict.fromkeys(names, torch.ones(1)),
        "drift": dict.fromkeys(names, torch.zeros(1)),
    }
    updates = [lab.update(i, {"params": dict.fromkeys(names, torch.tensor([v]))}) for i, v in enumerate((0.3, 0.1))]
    params = FedDyn().merge(state, updates, lab.bench(world))["params"]
    assert params["norm.running_var"].item() == pytest.approx(0.2)
    assert params["w"].item() == pytest.approx(-0.6)
