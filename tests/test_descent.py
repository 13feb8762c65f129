"""Server optimizers and training on proxy data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from harness.batches import Rows
from harness.descent import Course, adam, consult, divergence, momentum, opinions, study
from harness.losses import kl
from harness.protocol import Batch
from harness.trees import Tree, stream, zeros

if TYPE_CHECKING:
    from tests.conftest import Lab


def scalar(value: float) -> Tree:
    return {"head": {"w": torch.tensor([value])}}


def test_momentum_goes_on_where_it_went() -> None:
    """Deltas .5 and -.2 at beta .9, lr 1 from 0: v = .5, position .5; v = -.2 + .45 = .25, position .75."""
    p, v = momentum(scalar(0), scalar(0), scalar(0.5), lr=1.0, beta=0.9)
    assert p["head"]["w"].item() == pytest.approx(0.5)
    p, v = momentum(p, v, scalar(-0.2), lr=1.0, beta=0.9)
    assert (v["head"]["w"].item(), p["head"]["w"].item()) == (pytest.approx(0.25), pytest.approx(0.75))


def test_adam_has_no_bias_correction() -> None:
    """lr .1, betas .9 and .99, eps 1e-3, deltas .5 and -.2 from 0.

    m = .05, v = .0025: .1 * .05 / (.05 + .001) = .098039. m = .045 - .02 = .025, v = .002475 + .0004 = .002875:
    .098039 + .1 * .025 / (.053619 + .001) = .143811.
    """
    p, m, v = scalar(0), scalar(0), scalar(0)
    for delta, wanted in ((0.5, (0.05, 0.0025, 0.098039)), (-0.2, (0.025, 0.002875, 0.143811))):
        p, m, v = adam(p, m, v, scalar(delta), lr=0.1, beta1=0.9, beta2=0.99, eps=1e-3)
        assert [x["head"]["w"].item() for x in (m, v, p)] == pytest.approx(wanted, abs=1e-6)


def test_running_statistics_are_averaged_whatever_the_optimizer() -> None:
    """Adam with lr 10 and a delta of -.5 would take a variance of 1 far below zero; its mean over clients is .5."""
    p = {"features": {"norm.running_var": torch.ones(2), "norm.weight": torch.ones(2)}}
    delta = {"features": {name: torch.full((2,), -0.5) for name in p["features"]}}
    stepped, _, _ = adam(p, zeros(p), zeros(p), delta, lr=10.0, beta1=0.9, beta2=0.99, eps=1e-3)
    pushed, _ = momentum(p, zeros(p), delta, lr=10.0, beta=0.9)
    for moved in (stepped, pushed):
        assert moved["features"]["norm.running_var"].tolist() == [0.5, 0.5]
        assert moved["features"]["norm.weight"].max() < -3


def test_divergence_from_the_mean_of_two_teachers() -> None:
    """Teachers' logits (2, 0) and (0, 1): mean (1, .5), softmax (.622459, .377541); student (.5, .5):

    .622459 ln(.622459 / .5) + .377541 ln(.377541 / .5) = .136363 - .106063 = .030300.
    """
    target = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).mean(0, keepdim=True).softmax(-1)
    assert target[0].tolist() == pytest.approx([0.622459, 0.377541], abs=1e-6)
    student = torch.zeros(1, 2)
    assert divergence(target, student, 1.0, tau_squared=False).item() == pytest.approx(0.030300, abs=1e-6)
    assert divergence(target, student, 3.0, tau_squared=True).item() == pytest.approx(9 * 0.030300, abs=1e-5)


def test_a_target_without_mass_on_a_class_is_no_trouble() -> None:
    """KL((1, 0) || (e, 1) / (e + 1)) = ln(1 + 1 / e) = .313262."""
    value = divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), 1.0, tau_squared=False)
    assert value.item() == pytest.approx(0.313262, abs=1e-6)


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_the_gradient_is_that_of_the_weighted_divergences_from_each_teacher(tau: float) -> None:
    """d/dz of sum_i w_i KL(p_i || q) is sum_i w_i (q - p_i) / tau = (q - sum_i w_i p_i) / tau, as for the mixture."""
    rng = stream("identity")
    teachers, student = torch.randn(3, 5, 4, generator=rng), torch.randn(5, 4, generator=rng)
    share = torch.tensor([0.5, 0.3, 0.2])
    apart, mixed = student.clone().requires_grad_(), student.clone().requires_grad_()
    literal = [w * kl(teacher, apart, tau, tau_squared=True) for w, teacher in zip(share, teachers, strict=True)]
    torch.stack(literal).sum().backward()
    target = torch.einsum("k,kbc->bc", share, (teachers / tau).softmax(-1))
    divergence(target, mixed, tau, tau_squared=True).backward()
    assert apart.grad is not None and mixed.grad is not None
    assert torch.allclose(apart.grad, mixed.grad, atol=1e-7)


def test_teachers_are_asked_once_about_a_row_or_about_a_batch_with_the_same_result(lab: Lab) -> None:
    """Of 10 rows 12 are drawn: all 10 are asked about, once. Of 4 drawn rows: those 4. The rows are the same."""
    rows = Rows(torch.arange(10), torch.arange(10) % 3, None)
    bench = lab.bench(lab.world(net=lab.Table(), proxy_rows=10), proxy=rows)
    asked: list[int] = []

    def teach(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        asked.extend(x.tolist())
        return {"answer": 2 * x + y}

    every, few = consult(bench, teach, wanted=12), consult(bench, teach, wanted=4)
    assert asked == list(range(10))
    first, second = every(4, stream("draw")), few(4, stream("draw"))
    assert len(asked) == 14
    assert first.x.tolist() == second.x.tolist() and len(set(first.x.tolist())) == 4
    for batch in (first, second):
        assert batch.extra["answer"].tolist() == (2 * batch.x + batch.x % 3).tolist()


def test_opinions_are_those_of_each_teacher_without_gradients(lab: Lab) -> None:
    net = lab.Table(classes=2)
    params = [{"logits": torch.eye(2).requires_grad_()}, {"logits": 3 * torch.eye(2)}]
    said = opinions([(net, p) for p in params], torch.tensor([1, 0]))  # type: ignore[misc]
    assert said.tolist() == [[[0, 1], [1, 0]], [[0, 3], [3, 0]]]
    assert not said.requires_grad


def test_a_course_is_charged_and_goes_on_from_given_moments(lab: Lab) -> None:
    """Two courses of one step with kept moments are one course of two; with fresh ones they are not."""
    net = lab.Table(classes=2)
    rows = Rows(torch.arange(2), torch.tensor([0, 1]), None)
    start = {"logits": torch.tensor([[0.0, 0.0], [1.0, -3.0]])}

    def train(p: Tree, steps: int, moments: Tree | None) -> Tree:
        bench = lab.bench(lab.world(net=net, proxy_rows=2), proxy=rows)
        draw = consult(bench, lambda x, y: {"target": torch.eye(2)[y]}, 2 * steps)

        def loss(p: Tree, batch: Batch) -> Tensor:
            return divergence(batch.extra["target"], net(p, batch.x), 1.0, tau_squared=False)

        after = study(bench, p, loss, draw, Course(steps, batch=2, lr=0.1), stream("rows"), moments)
        assert bench.steps == steps
        return after

    moments: Tree = {}
    whole = train(start, 2, None)
    parts = train(train(start, 1, moments), 1, moments)
    fresh = train(train(start, 1, None), 1, None)
    assert moments["step"].item() == 2
    assert lab.close(parts, whole, atol=1e-7)
    assert not lab.close(fresh, whole, atol=1e-5)
