"""FedAvg: its mean, and the training beneath it, which is plain SGD."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from algorithms.fedavg import FedAvg
from harness import trees
from harness.layers import channels_last
from harness.protocol import Cohort

if TYPE_CHECKING:
    from tests.conftest import Lab


def test_the_mean_weighs_by_rows(lab: Lab) -> None:
    """10 rows at 1 and 30 rows at 5: (10 * 1 + 30 * 5) / 40 = 4. Numbers of steps do not count."""
    method, world = FedAvg(), lab.world((10, 30))
    models = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([5.0])}]
    updates = [
        lab.update(0, {"params": models[0]}, samples=10, steps=9),
        lab.update(1, {"params": models[1]}, samples=30, steps=2),
    ]
    state = method.merge({"net": "mlp", "params": models[0]}, updates, lab.bench(world))
    assert state["params"]["w"].tolist() == [4.0]
    assert method.models(state)["global"] == ("mlp", state["params"])


def test_only_models_travel(lab: Lab) -> None:
    method, world = FedAvg(), lab.world()
    state = method.init(world, trees.stream(0))
    sent = method.broadcast(state, Cohort(0, ()), world)
    assert lab.same(sent.shared, {"params": state["params"]})
    assert not sent.by_role and not sent.personal
    end = trees.scale(state["params"], 2.0)
    payload, memory = method.reply(lab.trained(state["params"], end, sent.shared))
    assert lab.same(payload, {"params": end})
    assert memory == {}


@pytest.mark.parametrize("net", ["mlp", "lenet5"])
def test_one_client_is_plain_sgd_bit_for_bit(lab: Lab, net: str) -> None:
    """Three rounds of a single client are a module, torch's optimizer and a loop over shuffled rows.

    The optimizer starts anew in every round, and the rate falls by .9.
    """
    local = {"lr": 0.05, "lr_decay": 0.9, "momentum": 0.9, "weight_decay": 1e-3, "epochs": 2}
    server = lab.run("fedavg", sizes=(30,), net=net, rounds=3, local=local)
    setup = lab.setup("fedavg", sizes=(30,), net=net)
    rows = setup.split.clients[0]
    card = server.pool.host.card  # type: ignore[attr-defined]
    # (x - 255 mean) / (255 std), in float32
    mean, std = torch.tensor(card.mean[0]) * 255, torch.tensor(card.std[0]) * 255
    x = (torch.tensor(setup.arrays.x_train[rows]).float() - mean) / std
    y = torch.tensor(setup.arrays.y_train[rows])
    start = server.world.net(net).init(trees.stream(0, "init"))
    module = server.world.net(net).module()
    module.load_state_dict({path.replace("/", "."): leaf for path, leaf in trees.leaves(start)})
    for t in range(3):
        rule = torch.optim.SGD(module.parameters(), lr=0.05 * 0.9**t, momentum=0.9, weight_decay=1e-3)
        order = trees.stream(0, "visit", t, 0, "global", "order")
        for _ in range(2):
            for index in torch.randperm(30, generator=order).split(8):
                rule.zero_grad()
                F.cross_entropy(module(channels_last(x[index])), y[index]).backward()
                rule.step()
    expected: dict[str, Tensor] = module.state_dict()
    found = {path.replace("/", "."): leaf for path, leaf in trees.leaves(server.state["params"])}
    assert list(found) == list(expected)
    assert all(torch.equal(leaf, expected[path]) for path, leaf in found.items())


def test_one_step_on_all_rows_is_a_step_on_the_pool(lab: Lab) -> None:
    """FedSGD: the mean of one step per client, weighted by rows, is one step on all rows together."""
    local = {"batch": 100, "lr": 0.3}
    apart = lab.run("fedavg", sizes=(12, 20, 8, 16), rounds=1, local=local)
    pooled = lab.run("fedavg", sizes=(56,), rounds=1, local=local)
    assert lab.close(apart.state["params"], pooled.state["params"], atol=1e-6)
