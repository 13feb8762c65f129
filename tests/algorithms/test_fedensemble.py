"""FedEnsemble: FedAvg's training, and the answer of all users' models together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from algorithms.fedensemble import FedEnsemble
from harness import trees
from harness.data import card
from harness.latest import update_rows
from harness.protocol import Ensemble

if TYPE_CHECKING:
    from tests.conftest import Lab


def test_the_latest_trees_of_owners() -> None:
    """Owner 3 comes first, then 1; 3 again replaces its row."""
    owners: list[int] = []
    rows = update_rows(torch.zeros(0, 2), owners, {3: {"w": torch.tensor([1.0, 2])}})
    rows = update_rows(rows, owners, {1: {"w": torch.tensor([3.0, 4])}, 3: {"w": torch.tensor([5.0, 6])}})
    assert owners == [3, 1]
    assert rows.tolist() == [[5, 6], [3, 4]]


def test_the_training_is_fedavg(lab: Lab) -> None:
    ours, plain = lab.run("fedensemble", rounds=3, participation=0.5), lab.run("fedavg", rounds=3, participation=0.5)
    assert lab.same(ours.state["params"], plain.state["params"])
    both = [[row for row in ours.rounds if row["role"] == "global"], plain.rounds]
    kinds = ("accuracy", "loss", "up_kinds", "down_kinds", "steps")
    assert [[row[k] for k in kinds] for row in both[0]] == [[row[k] for k in kinds] for row in both[1]]


def test_every_user_answers_with_its_latest_model(lab: Lab) -> None:
    """Two of four take part in a round; by the fifth all were seen. Members are in the order of the clients."""
    server = lab.server(lab.setup("fedensemble", rounds=5, participation=0.5))
    latest = {}
    while not server.done:
        server.step()
        log = server.pool.log  # type: ignore[attr-defined]
        latest.update({sent.order.visit.client: sent.payload["params"] for sent in log[-2:]})
        whole = server.method.models(server.state)["ensemble"]
        assert isinstance(whole, Ensemble)
        assert len(whole.members) == len(latest)
        for (net, member), client in zip(whole.members, sorted(latest), strict=True):
            assert net == "mlp"
            assert lab.same(member, latest[client])
    assert len(latest) > 2
    assert next(iter(server.method.models(server.state))) == "ensemble"


def test_the_answer_is_that_of_the_summed_logits(lab: Lab) -> None:
    server = lab.run("fedensemble", rounds=1)
    net, arrays, about = server.world.net("mlp"), server.setup.arrays, card("digits")
    x = (torch.tensor(arrays.x_test) / 255 - about.mean[0]) / about.std[0]
    members = server.method.models(server.state)["ensemble"].members  # type: ignore[union-attr]
    summed = torch.stack([net.frozen(p, x) for _, p in members]).sum(0)
    hits = int((summed.argmax(1) == torch.tensor(arrays.y_test)).sum())
    row = next(row for row in server.rounds if row["role"] == "ensemble")
    assert row["accuracy"] == pytest.approx(hits / len(x))


def test_as_the_code_does_it(lab: Lab) -> None:
    """Who sits out answers with the model that the round began with: 2 trained ones and twice that one."""
    server = lab.server(lab.setup("fedensemble", {"absent": "global"}, rounds=3, participation=0.5))
    while not server.done:
        begin = trees.clone(server.state["params"])
        server.step()
        members = server.method.models(server.state)["ensemble"].members  # type: ignore[union-attr]
        sent = sorted(server.pool.log[-2:], key=lambda one: one.order.visit)  # type: ignore[attr-defined]
        assert [lab.same(p, begin) for _, p in members] == [False, False, True, True]
        assert all(lab.same(p, one.payload["params"]) for (_, p), one in zip(members, sent, strict=False))


def test_before_anybody_was_seen_the_first_model_answers(lab: Lab) -> None:
    method = FedEnsemble()
    state = method.init(lab.world(), trees.stream(0))
    whole = method.models(state)["ensemble"]
    assert isinstance(whole, Ensemble)
    assert [lab.same(p, state["params"]) for _, p in whole.members] == [True]
