"""Central training: all rows in one place, a cohort's budget of samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from harness import config, trees
from harness.batches import normalise
from harness.data import card
from harness.inline import InlinePool
from harness.server import Server
from harness.work import make_setup

if TYPE_CHECKING:
    from tests.conftest import Lab

TRIAL: dict[str, Any] = {
    "net": "mlp",
    "clients": 5,
    "rounds": 2,
    "partition": {"kind": "iid"},
    "local": {"epochs": 2, "batch": 8, "lr": 0.1},
}


def run(lab: Lab, method: str = "central", **changes: Any) -> Server:
    setup, mixes = make_setup(config.resolve({**TRIAL, **changes, "method": method}), lab.arrays(160))
    pool = InlinePool()
    pool.load(setup)
    server = Server(setup, pool, mixes=mixes)
    while not server.done:
        server.step()
    return server


def test_all_rows_are_at_one_client(lab: Lab) -> None:
    server = run(lab)
    assert [row["client"] for row in server.clients] == [0, 0]
    assert {row["samples"] for row in server.clients} == {160}
    assert [row["role"] for row in server.rounds] == ["global", "global"]


@pytest.mark.parametrize("participation", [1.0, 0.6, 0.2])
def test_a_round_sees_as_many_samples_as_a_cohort(lab: Lab, participation: float) -> None:
    """160 rows, 2 epochs: 320, 192 and 64 samples; a cohort of 5, 3 or 1 clients with 32 rows each sees as many."""
    server, plain = (run(lab, method, participation=participation) for method in ("central", "fedavg"))
    assert [row["samples"] for row in server.rounds] == [round(320 * participation)] * 2
    assert [row["samples"] for row in plain.rounds] == [row["samples"] for row in server.rounds]


def test_a_trial_is_plain_descent(lab: Lab) -> None:
    """Two rounds of .6 epochs, written down: 12 of 20 batches of 8, in an order that is new in every round."""
    server = run(lab, local={"epochs": 1, "batch": 8, "lr": 0.1}, participation=0.6)
    host, net = server.pool.host, server.world.net("mlp")  # type: ignore[attr-defined]
    about = card("digits")
    like = net.init(trees.stream(0, "init"))
    w = trees.flat(like)
    rows = torch.from_numpy(server.setup.split.clients[0])
    x, y = normalise(host.x_train[rows], about.mean, about.std), host.y_train[rows]
    for t in range(2):
        order = torch.randperm(160, generator=trees.stream(0, "visit", t, 0, "global", "order"))
        for index in order.split(8)[:12]:
            leaf = w.clone().requires_grad_()
            F.cross_entropy(net(trees.unflat(leaf, like), x[index]), y[index]).backward()  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            w = w - 0.1 * leaf.grad
    assert torch.allclose(trees.flat(lab.model(server)), w, atol=1e-6)


def test_the_partition_does_not_matter(lab: Lab) -> None:
    """However rows are dealt, the pool is the same, and so is the model."""
    skewed = {"kind": "shards", "shards_per_client": 2}
    assert lab.same(lab.model(run(lab)), lab.model(run(lab, partition=skewed)))
    assert run(lab, rounds=6).rounds[-1]["accuracy"] > 0.9
