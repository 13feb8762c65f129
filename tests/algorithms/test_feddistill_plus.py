"""FedDistill+: FedAvg with mean logits by label beside the model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from algorithms.feddistill_plus import FedDistillPlus
from harness.protocol import Batch

if TYPE_CHECKING:
    from tests.conftest import Lab

LN3 = math.log(3)


@pytest.mark.parametrize(("weight", "expected"), [(0.0, 0.287682), (1.0, 0.431523), (2.0, 0.575364)])
def test_the_loss_by_hand(lab: Lab, weight: float, expected: float) -> None:
    """Logits (ln 3, 0), label 0: ln 4/3 = .287682. Z[0] = (0, 0) is (1/2, 1/2): .5 ln(2/3) + .5 ln 2 = .143841."""
    p, z = {"logits": torch.tensor([[LN3, 0.0]])}, torch.tensor([[0.0, 0], [5, -5]])
    batch, inbox = Batch(torch.tensor([0]), torch.tensor([0])), {"logits": z} if weight else {}
    value, _, seen = lab.step(FedDistillPlus(lambda_kd=weight), lab.Table(2), p, batch, inbox)
    assert value == pytest.approx(expected, abs=1e-6)
    assert bool(seen) == bool(weight)


@pytest.mark.parametrize("history", ["all", "round"])
def test_what_a_client_tells(lab: Lab, history: Any) -> None:
    """Counts start from 1: (4 + 2) / (1 + 3) over both visits or 2 / (1 + 1) over this one, for label 0."""
    told = torch.tensor([[[2.0, 0, 1], [0, 0, 0]]])
    before = {"seen": torch.tensor([[4.0, 0, 2], [0, 0, 0]])}
    trained = lab.trained({}, {"w": torch.ones(1)}, {}, before, metrics={"seen": told}, steps=1)
    payload, memory = FedDistillPlus(history=history).reply(trained)
    assert payload["logits"][0, 0] == (1.5 if history == "all" else 1.0)
    assert payload["logits"][1].tolist() == [0, 0]
    assert set(payload) == {"params", "logits"}
    assert memory["seen"][0].tolist() == ([6, 0, 3] if history == "all" else [2, 0, 1])


def test_two_rounds(lab: Lab) -> None:
    """mlp: 54,004 floats; logits: 4 x 4. The mean of logits is plain though clients have 12, 20, 8 and 16 rows."""
    server = lab.run("feddistill-plus", rounds=2)
    log, size = server.pool.log, 16 * 54_004  # type: ignore[attr-defined]
    told = [first.payload["logits"] for first in sorted(log[:4], key=lambda sent: sent.order.visit)]
    assert [row["up_kinds"] for row in server.rounds] == [{"params": size, "logits": 256}] * 2
    assert [row["down_kinds"] for row in server.rounds] == [{"params": size}, {"params": size, "logits": 256}]
    for sent in log[4:]:
        assert sent.inbox["logits"].equal(torch.stack(told).mean(0))
        assert sent.memory["seen"][:, -1].tolist() == server.setup.split.counts[sent.order.visit.client].tolist()


def test_without_its_term_it_is_fedavg(lab: Lab) -> None:
    ours = lab.run("feddistill-plus", FedDistillPlus.identity, rounds=3, participation=0.5)
    plain = lab.run("fedavg", rounds=3, participation=0.5)
    assert lab.same(ours.state["params"], plain.state["params"])
    assert [row["up_kinds"] for row in ours.rounds] == [row["up_kinds"] for row in plain.rounds]
    with_term = lab.run("feddistill-plus", rounds=3, participation=0.5)
    assert not lab.same(with_term.state["params"], plain.state["params"])


def test_a_visit_without_steps_tells_nothing(lab: Lab) -> None:
    trained = lab.trained({}, {"w": torch.ones(1)}, {}, {"seen": torch.zeros(2, 3)}, steps=0)
    payload, memory = FedDistillPlus().reply(trained)
    assert payload["logits"].tolist() == [[0, 0], [0, 0]]
    assert not memory["seen"].any()
