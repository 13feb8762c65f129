"""FedGKD: the parameter mean of the last global models, and when it begins to teach."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from algorithms.fedgkd import FedGkd
from harness import trees
from harness.protocol import Batch, Cohort

if TYPE_CHECKING:
    from tests.conftest import Lab

CE = math.log(math.e**2 + math.e**0.5 + 1 / math.e) - 2  # of (2, .5, -1), class 0: .241311


@pytest.mark.parametrize(
    ("changes", "term"),
    [({}, 0.1 * 0.323519), ({"gamma": 2.0}, 2 * 0.323519), ({"gamma": 1.0, "tau": 3.0}, 9 * 0.040817)],
)
def test_loss_by_hand(lab: Lab, changes: dict[str, Any], term: float) -> None:
    """Student (2, .5, -1), teacher (1, 1, 0): KL(teacher || student) = .323519, at tau 3 .040817, times tau^2."""
    p, teacher = ({"logits": torch.tensor([row])} for row in ((2.0, 0.5, -1.0), (1.0, 1.0, 0.0)))
    batch, inbox = Batch(torch.tensor([0]), torch.tensor([0])), {"params": p, "teacher": teacher, "distil": True}
    value, grads, _ = lab.step(FedGkd(**changes), lab.Table(), p, batch, inbox)
    assert value == pytest.approx(CE + term, abs=5e-6)
    assert grads["logits"].abs().sum() > 0
    assert teacher["logits"].grad is None


def test_the_teacher_is_the_parameter_mean_of_the_last_m(lab: Lab) -> None:
    """M 3, global models 1, 2, 6, 10 after rounds 0 .. 3: teachers 1, 1.5, 3, and 6 without the first."""
    method, world = FedGkd(buffer=3), lab.world((10,))
    state = {"net": "mlp", "params": {"w": torch.zeros(1)}, "past": {}}
    seen = []
    for t, model in enumerate((1.0, 2.0, 6.0, 10.0)):
        state = method.merge(state, [lab.update(0, {"params": {"w": torch.tensor([model])}})], lab.bench(world, t))
        sent = method.broadcast(state, Cohort(t + 1, ()), world).shared
        seen.append(sent["teacher"]["w"].item())
        assert sent["params"]["w"].item() == model
    assert seen == pytest.approx([1.0, 1.5, 3.0, 6.0])


@pytest.mark.parametrize(("start", "first"), [(1, 1), (2, 2)])
def test_it_begins_in_the_start_round(lab: Lab, start: int, first: int) -> None:
    """Bit for bit FedAvg before it, which is round 0 by default, and not in it.

    Two epochs: in round 1 the first step of a client starts at its teacher, where the divergence has no gradient.
    """
    settings: dict[str, Any] = {"rounds": 3, "local": {"epochs": 2}}
    plain, server = lab.run("fedavg", **settings), lab.run("fedgkd", {"start_round": start}, **settings)
    for a, b in zip(plain.pool.log, server.pool.log, strict=True):  # type: ignore[attr-defined]
        assert ("teacher" in b.inbox) == (b.order.round >= first)
        if b.order.round <= first:
            assert lab.same(a.payload["params"], b.payload["params"]) == (b.order.round < first)


def test_teachers_in_a_trial(lab: Lab) -> None:
    """The mean of the models after the rounds before, two at most; the initial model is never among them."""
    server = lab.server(lab.setup("fedgkd", {"buffer": 2}, rounds=4))
    models = []
    for t in range(4):
        server.step()
        sent = [s.inbox for s in server.pool.log if s.order.round == t]  # type: ignore[attr-defined]
        if t:
            assert all(lab.same(inbox["teacher"], trees.mean(models[-2:])) for inbox in sent)
        models.append(trees.clone(lab.model(server)))


def test_a_buffer_of_one_costs_nothing(lab: Lab) -> None:
    """The teacher is then the model that travels anyway."""
    plain, one, five = (lab.run(*what, rounds=2) for what in (["fedavg"], ["fedgkd", {"buffer": 1}], ["fedgkd"]))
    assert one.rounds[1]["down_kinds"] == plain.rounds[1]["down_kinds"]
    assert five.rounds[1]["down_bytes"] == 2 * plain.rounds[1]["down_bytes"]
    assert lab.same(lab.model(one), lab.model(five))  # after one round the mean is of one model, too


def test_gamma_zero_is_fedavg_bit_for_bit(lab: Lab) -> None:
    settings: dict[str, Any] = {"rounds": 4, "participation": 0.5, "local": {"momentum": 0.9, "epochs": 2}}
    plain, off = lab.run("fedavg", **settings), lab.run("fedgkd", {"gamma": 0.0}, **settings)
    assert lab.same(lab.model(off), lab.model(plain))
    assert [row["down_bytes"] for row in off.rounds] == [row["down_bytes"] for row in plain.rounds]
    assert not lab.same(lab.model(lab.run("fedgkd", **settings)), lab.model(plain))
