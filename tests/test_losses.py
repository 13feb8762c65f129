"""Losses against numbers worked out by hand, their gradients, and masks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness import trees
from harness.losses import Direction, cross_entropy, distill, kl

STUDENT, TEACHER = torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([[1.0, 1.0, 0.0]])


def logits(rows: int, classes: int, seed: int) -> Tensor:
    return torch.randn(rows, classes, generator=trees.stream("logits", seed), dtype=torch.float64) * 3


@pytest.mark.parametrize(
    ("tau", "student_first", "teacher_first"),
    [(1.0, 0.279523, 0.323519), (2.0, 0.089492, 0.090391), (3.0, 0.041272, 0.040817)],
)
def test_divergence_both_ways(tau: float, student_first: float, teacher_first: float) -> None:
    """Student (2, .5, -1), teacher (1, 1, 0). At tau = 1:

    p = (e^2, e^.5, e^-1) / 9.405657 = (.785597, .175290, .039113),
    q = (e, e, 1) / 6.436564 = (.422319, .422319, .155362);
    sum p ln(p / q) = .785597 * .620684 - .175290 * .879316 - .039113 * 1.379316 = .279523, and with the roles
    exchanged -.422319 * .620684 + .422319 * .879316 + .155362 * 1.379316 = .323519. tau divides both logits:
    (1, .25, -.5) and (.5, .5, 0) at 2, thirds at 3.
    """
    expected = {"student_first": student_first, "teacher_first": teacher_first}
    direction: Direction
    for direction in ("student_first", "teacher_first"):
        assert float(distill(STUDENT, TEACHER, tau, direction)) == pytest.approx(expected[direction], abs=1e-6)
    assert float(kl(STUDENT, TEACHER, tau)) == pytest.approx(student_first, abs=1e-6)
    assert float(kl(TEACHER, STUDENT, tau, tau_squared=True)) == pytest.approx(tau**2 * teacher_first, abs=1e-5)


def test_the_mean_is_over_rows() -> None:
    """Two rows, one of which agrees with its teacher: half of .279523, whatever the number of classes."""
    value = kl(torch.cat([STUDENT, TEACHER]), torch.cat([TEACHER, TEACHER]))
    assert float(value) == pytest.approx(0.279523 / 2, abs=1e-6)


@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 50), st.floats(0.25, 8))
@settings(max_examples=40)
def test_divergence_agrees_with_torch(rows: int, classes: int, seed: int, tau: float) -> None:
    """F.kl_div(input, target) is KL(target || input): the target's distribution is the first."""
    first, second = logits(rows, classes, seed), logits(rows, classes, seed + 1000)
    expected = F.kl_div(F.log_softmax(second / tau, 1), F.softmax(first / tau, 1), reduction="batchmean")
    assert torch.allclose(kl(first, second, tau), expected)
    assert float(kl(first, second, tau)) >= 0
    assert float(kl(first, first + 5, tau)) == pytest.approx(0, abs=1e-12)  # logits are known up to a constant


def test_the_gradient_of_usual_distillation() -> None:
    """d/dz KL(q || softmax(z / tau)) = (softmax(z / tau) - q) / tau; the teacher gets one too."""
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    kl(teacher, student, 2.0).backward()
    assert student.grad is not None
    assert torch.allclose(student.grad, ((STUDENT / 2).softmax(1) - (TEACHER / 2).softmax(1)) / 2, atol=1e-6)
    assert teacher.grad is not None


def test_extreme_logits_stay_finite() -> None:
    """Certain and wrong: KL = ln(e^1000) = 1000 nats to float precision; no 0 * inf."""
    value = kl(torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.0, 1000.0]]))
    assert float(value) == pytest.approx(1000.0)


def test_cross_entropy_by_hand() -> None:
    """-ln softmax((2, .5, -1))_0 = ln 9.405657 - 2 = .241311 and the same of class 2 = 3.241311; mean 1.741311."""
    value = cross_entropy(STUDENT.expand(2, 3), torch.tensor([0, 2]))
    assert float(value) == pytest.approx(math.log(math.e**2 + math.e**0.5 + 1 / math.e) - 0.5, abs=1e-6)


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.integers(0, 20))
@settings(max_examples=40)
def test_a_mask_is_a_choice_of_rows(mask: list[bool], seed: int) -> None:
    """Masked losses are those of the rows that are left; 0 if none is."""
    first, second = logits(len(mask), 4, seed), logits(len(mask), 4, seed + 1000)
    y, chosen = torch.arange(len(mask)) % 4, torch.tensor(mask)
    found = torch.stack(
        [cross_entropy(first, y, chosen.double()), kl(first, second, 2.0, mask=chosen.double(), tau_squared=True)]
    )
    if not chosen.any():
        assert torch.equal(found, torch.zeros_like(found))
        return
    kept = first[chosen], second[chosen]
    assert torch.allclose(found, torch.stack([cross_entropy(kept[0], y[chosen]), 4 * kl(*kept, 2.0)]))
