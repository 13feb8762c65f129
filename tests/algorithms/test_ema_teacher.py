"""The control with a moving average for a teacher."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from algorithms.ema_teacher import EmaTeacher
from harness import trees
from harness.protocol import Batch

if TYPE_CHECKING:
    from tests.conftest import Lab

CE = math.log(math.e**2 + math.e**0.5 + 1 / math.e) - 2  # of the row below, class 0: .241311


@pytest.mark.parametrize(
    ("changes", "term"),
    [
        ({}, 0.5 * 0.089492),
        ({"kd_direction": "teacher_first"}, 0.5 * 0.090391),
        ({"lambda_kd": 2.0}, 2 * 0.089492),
        ({"tau": 1.0}, 0.5 * 0.279523),
        ({"tau": 3.0, "kd_direction": "teacher_first"}, 0.5 * 0.040817),
    ],
)
def test_loss_by_hand(lab: Lab, changes: dict[str, Any], term: float) -> None:
    """Student (2, .5, -1), teacher (1, 1, 0): the divergences of `test_losses`, weighted, on top of cross-entropy."""
    student, teacher = ({"logits": torch.tensor([row])} for row in ((2.0, 0.5, -1.0), (1.0, 1.0, 0.0)))
    batch = Batch(torch.tensor([0]), torch.tensor([0]))
    method = EmaTeacher(**changes)
    value, grads, _ = lab.step(method, lab.Table(), student, batch, {"params": student, "teacher": teacher})
    assert value == pytest.approx(CE + term, abs=1e-6)
    assert teacher["logits"].grad is None
    assert grads["logits"].abs().sum() > 0


@pytest.mark.parametrize(("decay", "expected"), [(0.717, [0.283, 0.768911]), (0.5, [0.5, 1.25]), (0.0, [1.0, 2.0])])
def test_the_average_by_hand(lab: Lab, decay: float, expected: list[float]) -> None:
    """Models 1 and 2 after a start at 0: .283 * 1, then .717 * .283 + .283 * 2 = .768911; without decay the model."""
    method, world = EmaTeacher(decay=decay), lab.world((10,))
    state = {"net": "mlp", "params": {"w": torch.zeros(1)}, "teacher": {"w": torch.zeros(1)}}
    seen = []
    for model in (1.0, 2.0):
        state = method.merge(state, [lab.update(0, {"params": {"w": torch.tensor([model])}})], lab.bench(world))
        seen.append(method.models(state)["teacher"][1]["w"].item())
    assert seen == pytest.approx(expected)
    assert method.models(state)["student"][1]["w"].item() == 2.0


def test_the_default_decay_is_that_of_kdia_s_weights() -> None:
    """A third of a nat per round of absence: exp(-1/3)."""
    assert EmaTeacher().decay == pytest.approx(math.exp(-1 / 3), abs=5e-4)


def test_clients_learn_from_the_teacher_of_the_round_before(lab: Lab) -> None:
    """In round 0 from the initial model."""
    server = lab.server(lab.setup("ema-teacher", rounds=3))
    for t in range(3):
        teacher = trees.clone(server.state["teacher"])
        if t == 0:
            assert lab.same(teacher, server.world.net("mlp").init(trees.stream(0, "init")))
        server.step()
        sent = [s.inbox for s in server.pool.log if s.order.round == t]  # type: ignore[attr-defined]
        assert all(lab.same(inbox["teacher"], teacher) for inbox in sent)
    assert [row["role"] for row in server.rounds[:2]] == ["student", "teacher"]


def test_without_distillation_the_student_is_fedavg_bit_for_bit(lab: Lab) -> None:
    """And nothing is paid for a teacher that nobody listens to."""
    settings: dict[str, Any] = {"rounds": 4, "participation": 0.5, "local": {"momentum": 0.9, "epochs": 2}}
    plain, deaf = lab.run("fedavg", **settings), lab.run("ema-teacher", {"lambda_kd": 0.0}, **settings)
    assert lab.same(lab.model(deaf), lab.model(plain))
    assert {tuple(sent.inbox) for sent in deaf.pool.log} == {("params",)}  # type: ignore[attr-defined]
    assert not lab.same(lab.model(lab.run("ema-teacher", **settings)), lab.model(plain))
