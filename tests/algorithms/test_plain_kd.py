"""The control that distils from the model of the round's start."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from algorithms.plain_kd import PlainKd
from harness.protocol import Batch

if TYPE_CHECKING:
    from tests.conftest import Lab

STUDENT, TEACHER = [2.0, 0.5, -1.0], [1.0, 1.0, 0.0]
# -ln softmax(2, .5, -1)[0] = ln(1 + e^-1.5 + e^-3)
CE = 0.241311


@pytest.mark.parametrize(
    ("direction", "tau", "divergence"),
    [
        ("student_first", 1.0, 0.279523),
        ("teacher_first", 1.0, 0.323519),
        ("student_first", 2.0, 0.089492),
        ("teacher_first", 2.0, 0.090391),
        ("student_first", 3.0, 0.041272),
        ("teacher_first", 3.0, 0.040817),
    ],
)
def test_the_loss_by_hand(lab: Lab, direction: str, tau: float, divergence: float) -> None:
    """CE + .5 KL, no tau^2. tau 1: student (.785597, .175291, .039112), teacher (.422319, .422319, .155362); student
    first: .785597 ln(1.860198) + .175291 ln(.415068) + .039112 ln(.251747) = .279523. The others alike.
    """
    method = PlainKd(lambda_kd=0.5, tau=tau, kd_direction=direction)  # type: ignore[arg-type]
    batch = Batch(torch.tensor([0]), torch.tensor([0]))
    inbox = {"params": {"logits": torch.tensor([TEACHER])}}
    value, grads, _ = lab.step(method, lab.Table(), {"logits": torch.tensor([STUDENT])}, batch, inbox)
    assert value == pytest.approx(CE + 0.5 * divergence, abs=2e-6)
    assert grads["logits"].abs().sum() > 0


def test_the_first_step_is_fedavgs_and_the_second_is_not(lab: Lab) -> None:
    """At the start of a round student and teacher are one: the divergence and its gradient vanish."""
    one_step, two_steps = {"batch": 20}, {"batch": 20, "epochs": 2}
    plain, taught = (lab.run(method, rounds=1, local=one_step) for method in ("fedavg", "plain-kd"))
    assert lab.close(lab.model(plain), lab.model(taught), atol=1e-6)
    plain, taught = (lab.run(method, rounds=1, local=two_steps) for method in ("fedavg", "plain-kd"))
    assert not lab.close(lab.model(plain), lab.model(taught), atol=1e-6)


def test_nothing_more_travels_than_with_fedavg(lab: Lab) -> None:
    runs = [lab.run(method, rounds=1) for method in ("fedavg", "plain-kd")]
    assert [r["down_kinds"] for r in runs[0].rounds] == [r["down_kinds"] for r in runs[1].rounds]
    assert [r["up_kinds"] for r in runs[0].rounds] == [r["up_kinds"] for r in runs[1].rounds]
