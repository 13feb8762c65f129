"""FedDistill: mean logits by label, the divergence from them, and models that never travel."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from algorithms.feddistill import FedDistill, mean_logits
from harness import config, trees, work
from harness.protocol import Batch
from harness.settings import Unfit

if TYPE_CHECKING:
    from harness.server import Server
    from tests.conftest import Lab

LN3 = math.log(3)


def run(lab: Lab, hyper: dict[str, Any] | None = None, **trial: Any) -> Server:
    """Two rounds of 4 clients with 16 rows for training each."""
    basics = {"method": "feddistill", "hyper": hyper or {}, "net": "mlp", "clients": 4, "rounds": 2}
    basics |= {"local": {"epochs": 1, "batch": 8, "lr": 0.1}, "holdout": {"test": 0.2}, "partition": {"kind": "iid"}}
    server = lab.server(work.make_setup(config.resolve({**basics, **trial}), lab.arrays(80))[0])
    while not server.done:
        server.step()
    return server


def test_means_by_hand() -> None:
    """Two rows of label 0 sum up to (6, -3); counts start from 1: (2, -1). A label never seen has zeros."""
    assert mean_logits(torch.tensor([[6.0, -3, 2], [0, 0, 0]])).tolist() == [[2, -1], [0, 0]]


@pytest.mark.parametrize(("weight", "expected"), [(1.0, 0.431523), (2.0, 0.575364)])
def test_the_loss_by_hand(lab: Lab, weight: float, expected: float) -> None:
    """Logits (ln 3, 0), label 0: ln 4/3 = .287682. Z[0] = (0, 0) is (1/2, 1/2): .5 ln(2/3) + .5 ln 2 = .143841."""
    p, z = {"logits": torch.tensor([[LN3, 0.0]])}, torch.tensor([[0.0, 0], [5, -5]])
    batch = Batch(torch.tensor([0]), torch.tensor([0]))
    value, _, seen = lab.step(FedDistill(lambda_kd=weight), lab.Table(2), p, batch, {"logits": z})
    assert value == pytest.approx(expected, abs=1e-6)
    assert seen["seen"].flatten().tolist() == pytest.approx([LN3, 0, 1, 0, 0, 0])
    assert lab.step(FedDistill(), lab.Table(2), p, batch)[0] == pytest.approx(0.287682, abs=1e-6)


def test_the_mean_over_participants(lab: Lab) -> None:
    """Plain, whatever their rows: (1 + 3) / 2. Two rounds: the second replaces the first."""
    method, world = FedDistill(), lab.world()
    state = method.init(world, trees.stream(0))
    for round, (a, b) in enumerate([(1.0, 3.0), (5.0, 7.0)]):
        updates = [lab.update(k, {"logits": torch.full((4, 4), x)}, 10 + k) for k, x in ((0, a), (3, b))]
        state = method.merge(state, updates, lab.bench(world, round))
        assert state["logits"].unique().tolist() == [(a + b) / 2]
    assert (state["merged"], state["members"]) == (1, 2)


@pytest.mark.parametrize("history", ["all", "round"])
def test_what_a_client_tells(lab: Lab, history: Any) -> None:
    """Its sums go on from visit to visit, or start anew: (4 + 2) / (1 + 3) or 2 / (1 + 1) for label 0."""
    told = torch.tensor([[[2.0, 0, 1], [0, 0, 0]]])
    before = {"seen": torch.tensor([[4.0, 0, 2], [0, 0, 0]])}
    trained = lab.trained({}, {}, {}, before, metrics={"seen": told}, steps=1, round=3)
    payload, memory = FedDistill(history=history).reply(trained)
    assert payload["logits"][0, 0] == (1.5 if history == "all" else 1.0)
    assert memory["seen"][0].tolist() == ([6, 0, 3] if history == "all" else [2, 0, 1])
    assert memory["round"] == 3


def test_leaving_oneself_out_by_hand(lab: Lab) -> None:
    """The mean of 3 is 4, one's own is 2: the others' is (3 * 4 - 2) / 2 = 5. Only if one was among the three."""
    inbox = {"start": 0, "logits": torch.full((1, 1), 4.0), "members": 3, "merged": 6}
    memory = {"seen": torch.tensor([[4.0, 1.0]]), "round": 6}

    def told(method: FedDistill, **changes: Any) -> Any:
        return method.prepare(lab.Table(1), {**inbox, **changes}, memory, lab.bench()).get("logits")  # type: ignore[arg-type]

    assert float(told(FedDistill(leave_one_out=True))) == 5
    assert float(told(FedDistill(leave_one_out=True), merged=7)) == 4
    assert told(FedDistill(leave_one_out=True), members=1) is None
    assert float(told(FedDistill())) == 4


def test_two_rounds(lab: Lab) -> None:
    """Only logits travel, 10 classes of 10 floats per visit; every row was counted once per round."""
    server = run(lab)
    log = server.pool.log  # type: ignore[attr-defined]
    assert [row["up_kinds"] for row in server.rounds] == [{"logits": 1600}] * 2
    assert [row["down_kinds"] for row in server.rounds] == [{}, {"logits": 1600}]
    counts = server.setup.split.counts
    for sent in log[4:]:
        assert sent.memory["seen"][:, -1].tolist() == counts[sent.order.visit.client].tolist()
        assert sent.inbox["logits"].equal(torch.stack([first.payload["logits"] for first in log[:4]]).mean(0))
    start = [
        FedDistill().remember(server.world.net("mlp"), sent.inbox, trees.stream(k)) for k, sent in enumerate(log)
    ]
    assert all(lab.same(start[0]["params"], other["params"]) for other in start)


def test_its_weight_matters_and_zero_is_local_training(lab: Lab) -> None:
    first, second, none = (run(lab, {"lambda_kd": weight}) for weight in (1.0, 0.0, 0.0))
    models = [server.pool.log[-1].memory["params"] for server in (first, second, none)]  # type: ignore[attr-defined]
    assert lab.same(models[1], models[2])
    assert second.rounds[1]["down_kinds"] == {}
    ends = [trees.to(server.memories[max(server.memories)]["params"], "cpu") for server in (first, second)]
    assert not lab.same(*ends)


def test_personal_models_learn_on_different_nets(lab: Lab) -> None:
    server = run(lab, rounds=12, fleet={"nets": ["mlp", "lenet5"]}, local={"epochs": 4, "batch": 8, "lr": 0.1})
    assert {row["role"] for row in server.rounds} == {"personal-mlp", "personal-lenet5"}
    assert server.rounds[-2]["accuracy"] > 0.5


def test_it_needs_test_rows() -> None:
    with pytest.raises(Unfit, match="keeps a model per client"):
        config.resolve({"method": "feddistill"})
