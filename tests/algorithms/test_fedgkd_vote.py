"""FedGKD-VOTE: who gets how much of a vote, from which loss, and that students learn from it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from algorithms.fedgkd_vote import FedGkdVote
from harness import trees
from harness.batches import Rows
from harness.protocol import Batch, Cohort

if TYPE_CHECKING:
    from harness.server import Server
    from tests.conftest import Lab

CE = math.log(math.e**2 + math.e**0.5 + 1 / math.e) - 2  # of (2, .5, -1), class 0: .241311


def run(lab: Lab, method: str, hyper: dict[str, Any] | None = None, **more: Any) -> Server:
    """A trial with 40 labelled rows on the server."""
    setup = lab.setup(method, hyper, proxy={"source": "train", "rows": 40}, **more)
    server = lab.server(replace(setup, proxy=(setup.arrays.x_test, setup.arrays.y_test)))
    while not server.done:
        server.step()
    return server


def test_loss_by_hand(lab: Lab) -> None:
    """Student (2, .5, -1); teachers (1, 1, 0) with vote .25 and the received model (2, .5, -1) with .75.

    .1 (.25 * .323519 + .75 * 0) = .008088. The gradient is .1 * .25 * (softmax(student) - softmax(teacher)) beside
    that of cross-entropy: in the authors' code it is zero.
    """
    p, other = ({"logits": torch.tensor([row])} for row in ((2.0, 0.5, -1.0), (1.0, 1.0, 0.0)))
    inbox = {"params": p, "past": {"0": other}, "vote": torch.tensor([0.25, 0.75])}
    batch = Batch(torch.tensor([0]), torch.tensor([0]))
    value, grads, _ = lab.step(FedGkdVote(), lab.Table(), p, batch, inbox)
    _, plain, _ = lab.step(FedGkdVote(), lab.Table(), p, batch, {"params": p})
    assert value == pytest.approx(CE + 0.1 * 0.25 * 0.323519, abs=1e-6)
    apart = p["logits"].softmax(1) - other["logits"].softmax(1)
    assert torch.allclose(grads["logits"] - plain["logits"], 0.025 * apart, atol=1e-7)
    tau3 = lab.step(FedGkdVote(gamma=1.0, tau=3.0), lab.Table(), p, batch, inbox)[0]
    assert tau3 == pytest.approx(CE + 9 * 0.25 * 0.040817, abs=1e-5)


def test_the_vote_by_hand(lab: Lab) -> None:
    """Models whose only proxy row, of class 0, has logits (ln k, 0, 0), k = 1, 2, 4: losses ln((k + 2) / k).

    = ln 3, ln 2, ln 1.5. softmax of their negatives at T 1: 1/3 : 1/2 : 2/3 = 2 : 3 : 4 ninths; at T .5 squared,
    4 : 9 : 16 of 29; with M 2 the last two, 3 : 4 of 7. Two rounds of state and more.
    """
    world, rows = lab.world((10,), net=lab.Table()), Rows(torch.tensor([0]), torch.tensor([0]))
    for changes, expected in (
        ({}, [2 / 9, 3 / 9, 4 / 9]),
        ({"loss_tau": 0.5}, [4 / 29, 9 / 29, 16 / 29]),
        ({"buffer": 2}, [3 / 7, 4 / 7]),
    ):
        method = FedGkdVote(**changes)  # type: ignore[arg-type]
        state = method.init(world, trees.stream(0))
        models = [{"logits": torch.tensor([[math.log(k), 0.0, 0.0]])} for k in (1, 2, 4)]
        for t, model in enumerate(models):
            state = method.merge(state, [lab.update(0, {"params": model})], lab.bench(world, t, proxy=rows))
        sent = method.broadcast(state, Cohort(3, ()), world).shared
        assert sent["vote"].tolist() == pytest.approx(expected)
        assert lab.same(sent["params"], models[-1])
        assert [lab.same(a, b) for a, b in zip(sent["past"].values(), models[-len(expected) : -1], strict=True)]


def test_the_loss_is_a_mean_over_all_proxy_rows(lab: Lab) -> None:
    """Whatever the batches: three rows in batches of two, losses ln 3, ln 3 and ln 1.5."""
    world, y = lab.world((10,), net=lab.Table()), torch.zeros(3, dtype=torch.int64)
    params = {"logits": torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [math.log(4), 0.0, 0.0]])}
    bench = replace(lab.bench(world, proxy=Rows(torch.arange(3), y)), batch=2)
    state = FedGkdVote().merge(FedGkdVote().init(world, trees.stream(0)), [lab.update(0, {"params": params})], bench)
    assert state["losses"] == pytest.approx([(2 * math.log(3) + math.log(1.5)) / 3])


def test_what_travels(lab: Lab) -> None:
    """In round t min(M, t) - 1 models beside the received one, and as many weights as teachers, 4 bytes each."""
    server = run(lab, "fedgkd-vote", {"buffer": 3}, rounds=5)
    size = trees.nbytes(lab.model(server))
    for t, row in enumerate(server.rounds):
        teachers = min(3, t)
        kinds = {"params": 4 * size, "past": 4 * size * (teachers - 1), "vote": 4 * 4 * teachers}
        assert row["down_kinds"] == {key: n for key, n in kinds.items() if n > 0}


def test_students_learn_from_it_and_gamma_zero_is_fedavg(lab: Lab) -> None:
    """Bit for bit. Round 0 has nobody to learn from; from round 1 on the term changes models."""
    settings: dict[str, Any] = {"rounds": 3, "participation": 0.5, "local": {"momentum": 0.9, "epochs": 2}}
    plain = lab.run("fedavg", **settings)
    assert lab.same(lab.model(run(lab, "fedgkd-vote", {"gamma": 0.0}, **settings)), lab.model(plain))
    on = run(lab, "fedgkd-vote", **settings)
    for a, b in zip(plain.pool.log, on.pool.log, strict=True):  # type: ignore[attr-defined]
        if b.order.round <= 1:
            assert lab.same(a.payload["params"], b.payload["params"]) == (b.order.round == 0)
