"""Ensemble distillation."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from algorithms.feddf import FedDf
from harness.batches import Rows
from harness.descent import divergence
from harness.refusal import Refused
from harness.server import Server
from harness.trees import stream

if TYPE_CHECKING:
    from tests.conftest import Lab

PROXY = {"source": "train", "rows": 16}


def run(lab: Lab, hyper: dict[str, Any], levels: tuple[int, ...] = (), **trial: Any) -> Server:
    """A trial with 16 proxy rows, and with levels if they are given."""
    setup = lab.setup("feddf", hyper, proxy=PROXY, **trial)
    arrays = lab.arrays(16)
    split = replace(setup.split, levels=levels) if levels else setup.split
    server = lab.server(replace(setup, proxy=(arrays.x_train, arrays.y_train), split=split))
    while not server.done:
        server.step()
    return server


def logits(*row: float) -> dict[str, Any]:
    return {"params": {"logits": torch.tensor([row], dtype=torch.float32)}}


def bench(lab: Lab, net: Any, label: int = 0) -> Any:
    rows = Rows(torch.zeros(1, dtype=torch.int64), torch.tensor([label]), None)
    return lab.bench(lab.world(net=net, proxy_rows=1), proxy=rows)


def test_the_ensemble_is_the_mean_of_logits(lab: Lab) -> None:
    """Clients (2, 0) and (0, 1): softmax(1, .5) = (.622459, .377541), at a divergence of .030300 from (0, 0)."""
    net, method = lab.Table(classes=2), FedDf(proxy_steps=1, proxy_batch=1)
    state = method.init(lab.world(net=net), stream("test"))
    updates = [lab.update(0, logits(2, 0)), lab.update(1, logits(0, 1))]
    batch = method._lessons(state, updates, bench(lab, net))(1, stream("draw"))
    assert batch.extra["target"][0].tolist() == pytest.approx([0.622459, 0.377541], abs=1e-6)
    value = divergence(batch.extra["target"], torch.zeros(1, 2), 1.0, tau_squared=False)
    assert value.item() == pytest.approx(0.030300, abs=1e-6)


def test_distillation_starts_at_the_weighted_mean(lab: Lab) -> None:
    """Sizes 100 and 300: mean of (2, 0) and (0, 1) is (.5, .75). The ensemble's answer, uniform in the clients, is
    (1, .5): class 0 must rise and class 1 fall, and Adam's first step is the rate: (.6, .65). A second round's
    optimizer is fresh: the same again.
    """
    net, method = lab.Table(classes=2), FedDf(proxy_steps=1, proxy_batch=1, proxy_lr=0.1)
    state = method.init(lab.world(net=net), stream("test"))
    updates = [lab.update(0, logits(2, 0), samples=100), lab.update(1, logits(0, 1), samples=300)]
    for _ in range(2):
        state = method.merge(state, updates, bench(lab, net))
        assert state["params"]["global"]["logits"][0].tolist() == pytest.approx([0.6, 0.65], abs=1e-6)


def test_many_steps_reach_the_ensemble(lab: Lab) -> None:
    """The rate falls to zero, so the end is the minimum: softmax(1, .5)."""
    net, method = lab.Table(classes=2), FedDf(proxy_steps=400, proxy_batch=1, proxy_lr=0.05)
    state = method.init(lab.world(net=net), stream("test"))
    state = method.merge(state, [lab.update(0, logits(2, 0)), lab.update(1, logits(0, 1))], bench(lab, net))
    assert state["params"]["global"]["logits"][0].softmax(-1).tolist() == pytest.approx(
        [0.622459, 0.377541], abs=1e-4
    )


@pytest.mark.parametrize(
    ("label", "target"),
    [(0, (0.880797, 0.119203)), (1, (0.268941, 0.731059))],
)
def test_clients_no_better_than_chance_are_left_out(lab: Lab, label: int, target: tuple[float, float]) -> None:
    """One row: the client (2, 0) is right for label 0, (0, 1) for label 1. Alone: softmax(2, 0), softmax(0, 1)."""
    net, method = lab.Table(classes=2), FedDf(proxy_steps=1, proxy_batch=1, drop_worst=True)
    state = method.init(lab.world(net=net), stream("test"))
    updates = [lab.update(0, logits(2, 0)), lab.update(1, logits(0, 1))]
    batch = method._lessons(state, updates, bench(lab, net, label))(1, stream("draw"))
    assert batch.extra["target"][0].tolist() == pytest.approx(target, abs=1e-6)


def test_if_nobody_is_better_than_chance_all_stay(lab: Lab) -> None:
    net, method = lab.Table(classes=2), FedDf(proxy_steps=1, proxy_batch=1, drop_worst=True)
    state = method.init(lab.world(net=net), stream("test"))
    updates = [lab.update(0, logits(2, 0)), lab.update(1, logits(4, 1))]
    batch = method._lessons(state, updates, bench(lab, net, label=1))(1, stream("draw"))
    assert batch.extra["target"][0].tolist() == pytest.approx(torch.tensor([3, 0.5]).softmax(-1).tolist(), abs=1e-6)


def test_what_it_needs_follows_its_options(lab: Lab) -> None:
    assert FedDf().needs == {"proxy"}
    assert FedDf(drop_worst=True).needs == {"labelled_proxy"}
    with pytest.raises(Refused, match="data on the server"):
        lab.setup("feddf")
    assert lab.same(lab.model(lab.run("feddf", {"proxy_steps": 0})), lab.model(lab.run("fedavg")))


def test_each_net_has_a_mean_of_its_own_and_learns_from_all(lab: Lab) -> None:
    """Without steps each model is the mean of its clients; with them both change, and the steps are charged."""
    fleet = {"nets": ["mlp", "lenet5"]}
    still, moved = (run(lab, {"proxy_steps": n}, (0, 1, 0, 1), fleet=fleet, rounds=1) for n in (0, 3))
    assert list(moved.method.models(moved.state)) == ["mlp", "lenet5"]
    for name in ("mlp", "lenet5"):
        assert not lab.close(still.state["params"][name], moved.state["params"][name], atol=1e-6)
        visits = [sent for sent in still.pool.log if sent.order.visit.role == name]  # type: ignore[attr-defined]
        assert {sent.order.visit.client for sent in visits} == ({0, 2} if name == "mlp" else {1, 3})
    assert [sum(row["server_steps"] for row in server.rounds) for server in (still, moved)] == [0, 6]
