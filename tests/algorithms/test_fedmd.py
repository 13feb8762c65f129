from __future__ import annotations

from typing import Any

import pytest
import torch

from algorithms.fedmd import FedMD
from harness import config, work
from harness.host import proxy_rows
from harness.protocol import Batch, Phase

FAST = {"public_epochs": 2, "private_epochs": 1, "alignment": 24}


def server_of(lab: Any, hyper: dict[str, Any], **trial: Any) -> Any:
    basics: dict[str, Any] = {"method": "fedmd", "hyper": hyper, "net": "mlp", "clients": 4, "rounds": 3}
    basics |= {"local": {"epochs": 1, "batch": 16, "lr": 0.1}, "holdout": {"test": 0.2}}
    basics |= {"proxy": {"source": "train", "rows": 40}, **trial}
    return lab.server(work.make_setup(config.resolve(basics), lab.arrays(200))[0])


def finish(server: Any) -> Any:
    while not server.done:
        server.step()
    return server


@pytest.mark.parametrize(("how", "value"), [("absolute", 2.5 / 3), ("squared", 0.75)])
def test_digest_is_the_mean_error_of_logits(lab: Any, how: Any, value: float) -> None:
    """Logits (2, .5, -1), consensus (1, 1, 0), the second row of two: (1 + .5 + 1) / 3 and (1 + .25 + 1) / 3.
    The derivative of the first is the sign over 3.
    """
    p, inbox = {"logits": torch.tensor([[2.0, 0.5, -1.0]])}, {"consensus": torch.tensor([[9.0, 9, 9], [1.0, 1, 0]])}
    row = Batch(torch.tensor([0]), torch.tensor([-1]), {"row": torch.tensor([1])}, phase="digest")
    found, grads, _ = lab.step(FedMD(digest_loss=how), lab.Table(), p, row, inbox)
    assert found == pytest.approx(value)
    if how == "absolute":
        assert torch.allclose(grads["logits"], torch.tensor([[1.0, -1, -1]]) / 3)


@pytest.mark.parametrize("phase", ["public", "private", "revisit"])
def test_other_phases_learn_from_labels(lab: Any, phase: str) -> None:
    """-ln softmax(2, .5, -1)[0] = .241312."""
    p, row = {"logits": torch.tensor([[2.0, 0.5, -1.0]])}, Batch(torch.tensor([0]), torch.tensor([0]), phase=phase)
    assert lab.step(FedMD(), lab.Table(), p, row, {"consensus": torch.ones(1, 3)})[0] == pytest.approx(
        0.241312, abs=1e-6
    )


def test_the_phases_of_a_visit(lab: Any) -> None:
    method, world, rows = FedMD(revisit_epochs=4, digest_lr_factor=0.1), lab.world(), torch.tensor([3, 1])
    names = [
        [phase.name for phase in method.plan(world, inbox, memory)]
        for inbox in ({}, {"consensus": rows})
        for memory in ({}, {"met": 1})
    ]
    assert names == [["public", "private"], [], ["public", "private", "digest", "revisit"], ["digest", "revisit"]]
    public, private, digest, revisit = method.plan(world, {"consensus": rows, "rows": rows}, {})
    assert (public.source, public.epochs, private.source, private.epochs) == ("proxy", 20, "private", 25)
    assert (digest.source, digest.epochs, digest.lr_factor, digest.rows is rows) == ("proxy", 1.0, 0.1, True)
    assert revisit == Phase("revisit", 4)
    assert FedMD().plan(world, {"consensus": rows}, {"met": 1})[1].epochs is None, "the trial's own number"


def test_consensus_is_the_plain_mean_and_rows_move_on(lab: Any) -> None:
    """((1, 0) + (2, 4)) / 2 = (1.5, 2), whatever the clients' rows; then, in the next round, (3, 3)."""
    method, world = FedMD(alignment=2), lab.world(proxy_rows=6)
    state = method.init(world, torch.Generator().manual_seed(0))
    before = state["next"]
    said = [torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 4.0]])]
    state = method.merge(
        state, [lab.update(k, {"logits": z}, 10 + 90 * k) for k, z in enumerate(said)], lab.bench(world)
    )
    assert state["consensus"].tolist() == [[1.5, 2.0]]
    assert torch.equal(state["rows"], before) and state["next"].unique().numel() == 2
    following = state["next"]
    state = method.merge(state, [lab.update(0, {"logits": torch.full((1, 2), 3.0)})], lab.bench(world, round=1))
    assert state["consensus"].tolist() == [[3.0, 3.0]] and torch.equal(state["rows"], following)


@pytest.mark.parametrize("alignment", [0, 40, 99])
def test_no_row_numbers_travel_where_all_rows_are_used(lab: Any, alignment: int) -> None:
    server = finish(server_of(lab, FAST | {"alignment": alignment}, rounds=2))
    assert [set(s.inbox) for s in server.pool.log] == [set()] * 4 + [{"consensus"}] * 4
    assert all(s.payload["logits"].shape == (40, 10) for s in server.pool.log)


def test_two_rounds(lab: Any) -> None:
    """Round 0 pre-trains and answers; round 1 digests the answers. Bytes: 24 rows of 10 logits, row numbers."""
    server = finish(server_of(lab, FAST, rounds=2))
    first, second = server.pool.log[:4], server.pool.log[4:]
    assert all(set(s.inbox) == {"next"} and s.memory is None for s in first)
    said = {s.order.visit: s.payload["logits"] for s in first}
    consensus = torch.stack([said[v] for v in sorted(said)]).mean(0)
    for s in second:
        assert torch.equal(s.inbox["consensus"], consensus)
        assert torch.equal(s.inbox["rows"], first[0].inbox["next"])
    proxy = proxy_rows(server.setup, server.method.needs, torch.device("cpu"))
    net = server.world.net("mlp")
    for visit, memory in server.memories.items():
        logits = net.frozen(memory["params"], proxy.x[second[0].inbox["next"]])
        assert torch.equal(logits, next(s.payload["logits"] for s in second if s.order.visit == visit))
    assert [row["role"] for row in server.rounds] == ["personal"] * 2
    first_row, second_row = server.rounds
    assert first_row["up_kinds"] == second_row["up_kinds"] == {"logits": 4 * 24 * 10 * 4}
    assert first_row["down_kinds"]["next"] == 4 * 24 * 8
    assert second_row["down_kinds"] == {"consensus": 3840, "next": 768, "rows": 768}


def test_who_digests_its_own_opinion_does_not_move(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One client alone: the consensus is what it said, so that the square error's derivative is 0 up to rounding on
    all rows; this holds only if each row meets its own consensus.
    """
    plan = FedMD.plan
    monkeypatch.setattr(FedMD, "plan", lambda *a: tuple(phase for phase in plan(*a) if phase.name != "revisit"))
    server = server_of(lab, FAST | {"digest_loss": "squared"}, clients=1, partition={"kind": "iid"})
    server.step()
    (before,) = [memory["params"] for memory in server.memories.values()]
    server.step()
    (after,) = [memory["params"] for memory in server.memories.values()]
    assert server.clients[-1]["steps"] == 2, "24 rows in batches of 16"
    assert lab.close(before, after, atol=1e-6, rtol=0)


def test_latecomers_pretrain_at_their_first_visit_and_nets_differ(lab: Any) -> None:
    server = finish(server_of(lab, FAST, clients=6, cohort=2, rounds=4, fleet={"nets": ["mlp", "lenet5"]}))
    met: set[Any] = set()
    log = sorted(server.pool.log, key=lambda s: (s.order.round, s.order.visit))
    for s, row in zip(log, server.clients, strict=True):
        late = s.order.visit not in met
        assert (s.memory is None) == late
        assert row["steps"] >= 6 if late else row["steps"] >= 3, "two passes over 40 public rows in batches of 16"
        met.add(s.order.visit)
    assert {row["role"] for row in server.rounds} == {"personal-mlp", "personal-lenet5"}
