"""FedCOG: which inputs are made, how, from when on, and what is learned from them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from algorithms.fedcog import FedCog, agreement, missing
from harness import nets, trees
from harness.protocol import Batch

if TYPE_CHECKING:
    from harness.fit import Workbench
    from tests.conftest import Lab

COUNTS = torch.tensor([8, 4, 0, 4])
NET = nets.build("mlp", (1, 8, 8), 4)


def bench(lab: Lab, counts: torch.Tensor = COUNTS) -> Workbench:
    return replace(lab.bench(), label_counts=counts)


def test_what_is_missing_by_hand(lab: Lab) -> None:
    """Counts (8, 4, 0, 4) lack (0, 4, 8, 4): 10 inputs are 0, 2.5, 5, 2.5, downwards 0, 2, 5, 2. r = 16 / 32."""
    assert missing(COUNTS).tolist() == [0, 4, 8, 4]
    params = NET.init(trees.stream(0))
    asked: list[list[int]] = []

    class Spy:
        label_counts = COUNTS
        rng = staticmethod(bench(lab).rng)

        def fit(self, p: Any, loss: Any, draw: Any, steps: int, **how: Any) -> Any:
            asked.append(draw(0).y.tolist())
            assert (steps, how) == (7, {"lr": 0.01, "betas": (0.5, 0.9)})
            return p

    inbox = FedCog(inputs=10, input_steps=7).prepare(NET, {"params": params, "round": 50}, {}, Spy())  # type: ignore[arg-type]
    assert asked == [[1, 1, 2, 2, 2, 2, 2, 3, 3]]
    assert inbox["real"] == 0.5
    assert inbox["synthetic"]["x"].shape == (9, 1, 8, 8)


def test_agreement_by_hand() -> None:
    """P = (.75, .25), Q = (.25, .75), M = (.5, .5): KL(M || P) = KL(M || Q) = .5 ln(2/3) + .5 ln 2 = .143841.

    The same logits agree fully. Opposite certainties are clamped to .99 and .01:
    KL = .5 ln(.5 / .99) + .5 ln(.5 / .01) = 1.614463, which is cut to 1.
    """
    p, q = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, math.log(3)]])
    assert agreement(p, q).item() == pytest.approx(1 - 0.143841, abs=1e-6)
    assert agreement(p, p).item() == pytest.approx(1)
    sure = torch.tensor([[50.0, 0.0]])
    assert agreement(sure, -sure).item() == 0
    both = (torch.cat([p, p]), torch.cat([q, p]))
    assert agreement(*both).item() == pytest.approx(1 - 0.143841 / 2, abs=1e-6)


def test_inputs_follow_adam(lab: Lab) -> None:
    """Three steps with betas .5 and .9 from the same noise, on CE + .1 (1 - JS); the nets stay as they are."""
    params, local = NET.init(trees.stream(0)), NET.init(trees.stream(1))
    before = trees.clone(params), trees.clone(local)
    work = bench(lab)
    method = FedCog(inputs=12, input_steps=3)
    inbox = method.prepare(NET, {"params": params, "round": 50}, {"local": local}, work)
    y = torch.tensor([1] * 3 + [2] * 6 + [3] * 3)
    x = torch.randn(12, 1, 8, 8, generator=work.rng("inputs")).requires_grad_()
    adam = torch.optim.Adam([x], lr=0.01, betas=(0.5, 0.9))
    for _ in range(3):
        adam.zero_grad()
        logits = NET(params, x, train=False)
        (F.cross_entropy(logits, y) + 0.1 * agreement(NET(local, x, train=False), logits)).backward()  # type: ignore[no-untyped-call]
        adam.step()
    assert torch.allclose(inbox["synthetic"]["x"], x.detach(), atol=1e-6)
    assert torch.equal(inbox["synthetic"]["teacher"], NET.frozen(params, inbox["synthetic"]["x"]))
    assert (work.steps, work.samples) == (3, 36)  # charged
    assert lab.same(params, before[0])
    assert lab.same(local, before[1])


def test_inputs_become_what_they_shall_be(lab: Lab) -> None:
    """With 500 steps an untrained net takes them for their classes."""
    params = NET.init(trees.stream(0))
    made = FedCog(inputs=16).prepare(NET, {"params": params, "round": 50}, {}, bench(lab))["synthetic"]
    assert made["teacher"].argmax(1).tolist() == [1] * 4 + [2] * 8 + [3] * 4


def test_disagreement_sets_the_models_apart(lab: Lab) -> None:
    """A large weight makes inputs on which global and local model differ more than without."""
    params, local = NET.init(trees.stream(0)), NET.init(trees.stream(1))
    js = []
    for weight in (0.0, 10.0):
        method = FedCog(inputs=16, input_steps=100, input_lr=0.1, disagreement=weight)
        x = method.prepare(NET, {"params": params, "round": 50}, {"local": local}, bench(lab))["synthetic"]["x"]
        js.append(1 - agreement(NET.frozen(local, x), NET.frozen(params, x)).item())
    assert js[1] > js[0] + 0.1


@pytest.mark.parametrize(("round", "counts"), [(49, COUNTS), (50, torch.tensor([5, 5, 5, 5])), (0, COUNTS)])
def test_when_nothing_is_made(lab: Lab, round: int, counts: torch.Tensor) -> None:
    """Before round 50, from 0; and where no class is rarer than another."""
    inbox = {"params": NET.init(trees.stream(0)), "round": round}
    work = bench(lab, counts)
    assert FedCog().prepare(NET, inbox, {}, work) is inbox
    assert work.steps == 0


def test_loss_by_hand(lab: Lab) -> None:
    """r .75; real logits (ln 2, 0, 0) of class 0: CE ln 2. Synthetic student (2, .5, -1), teacher (1, 1, 0).

    .75 ln 2 + .25 * .323519 = .600740; at tau 3 .25 * 9 * .040817 instead: .611699.
    """
    p = {"logits": torch.tensor([[math.log(2), 0.0, 0.0], [2.0, 0.5, -1.0]])}
    made = {"x": torch.tensor([1]), "teacher": torch.tensor([[1.0, 1.0, 0.0]])}
    batch, inbox = Batch(torch.tensor([0]), torch.tensor([0])), {"params": p, "synthetic": made, "real": 0.75}
    value, grads, seen = lab.step(FedCog(), lab.Table(), p, batch, inbox)
    assert value == pytest.approx(0.600740, abs=1e-6)
    assert seen["distillation"].item() == pytest.approx(0.323519, abs=1e-6)
    assert (grads["logits"].abs().sum(1) > 0).all()
    assert lab.step(FedCog(tau=3.0), lab.Table(), p, batch, inbox)[0] == pytest.approx(0.611699, abs=5e-6)


def test_every_step_draws_as_many_synthetic_rows_as_real_ones() -> None:
    """Teacher and input of the same row; all rows are reached."""
    made = {"x": torch.arange(5), "teacher": 10 * torch.arange(5)}
    batch = Batch(torch.zeros(300), torch.zeros(300, dtype=torch.int64))
    extra = FedCog().draw(NET, batch, {"synthetic": made}, {}, trees.stream(0)).extra
    assert extra["synthetic"].shape == (300,)
    assert torch.equal(extra["teacher"], 10 * extra["synthetic"])
    assert set(extra["synthetic"].tolist()) == set(range(5))


def test_it_is_fedavg_until_the_start_round(lab: Lab) -> None:
    """Bit for bit. From then on clients who lack something make inputs, which is charged.

    The 12 rows of client 0 are three of each class: it lacks nothing, trains as ever. The memory is the last model.
    """
    hyper = {"start_round": 2, "input_steps": 5, "inputs": 16}
    plain, server = lab.run("fedavg", rounds=3), lab.run("fedcog", hyper, rounds=3)
    lacking = [bool(row.max() > row.min()) for row in server.setup.split.counts]
    assert lacking == [False, True, True, True]
    assert [b["steps"] - a["steps"] for a, b in zip(plain.rounds, server.rounds, strict=True)] == [0, 0, 3 * 5]
    for a, b in zip(plain.pool.log, server.pool.log, strict=True):  # type: ignore[attr-defined]
        made = a.order.round == 2 and lacking[a.order.visit.client]
        assert lab.same(a.payload["params"], b.payload["params"]) != made
        assert bool(b.memory) == (b.order.round > 0)
    for visit, memory in server.memories.items():
        last = [s for s in server.pool.log if s.order.visit == visit][-1]  # type: ignore[attr-defined]
        assert lab.same(memory["local"], last.payload["params"])


def test_a_start_that_never_comes_is_fedavg_bit_for_bit(lab: Lab) -> None:
    settings: dict[str, Any] = {"rounds": 3, "participation": 0.5, "local": {"momentum": 0.9}}
    off = lab.run("fedcog", dict(FedCog.identity or {}), **settings)
    assert lab.same(lab.model(off), lab.model(lab.run("fedavg", **settings)))
