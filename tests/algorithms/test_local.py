"""Local training: nothing travels, everybody keeps its own model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from harness import config
from harness.inline import InlinePool
from harness.protocol import Visit
from harness.refusal import Refused
from harness.server import Server
from harness.work import make_setup

if TYPE_CHECKING:
    from tests.conftest import Lab

TRIAL: dict[str, Any] = {
    "method": "local",
    "net": "mlp",
    "clients": 4,
    "rounds": 3,
    "holdout": {"test": 0.25},
    "partition": {"kind": "iid"},
    "local": {"epochs": 2, "batch": 8, "lr": 0.1},
}


def run(lab: Lab, **changes: Any) -> Server:
    setup, mixes = make_setup(config.resolve({**TRIAL, **changes}), lab.arrays(160))
    pool = InlinePool()
    pool.load(setup)
    server = Server(setup, pool, mixes=mixes)
    while not server.done:
        server.step()
    return server


def test_nothing_travels_and_models_learn(lab: Lab) -> None:
    """Four classes that a net learns in a few steps: personal accuracy ends far above chance."""
    server = run(lab, rounds=8)
    assert {row["role"] for row in server.rounds} == {"personal"}
    assert all(row["up_bytes"] == row["down_bytes"] == 0 and row["steps"] > 0 for row in server.rounds)
    assert server.rounds[-1]["accuracy"] > 0.6 > 0.5 > server.rounds[0]["accuracy"] - 0.25
    assert server.state == {}


def test_a_client_s_model_depends_on_nobody_else(lab: Lab) -> None:
    """Change the rows of client 3: the models of the others stay bit for bit the same, its own does not."""
    setup, _ = make_setup(config.resolve(TRIAL), lab.arrays(160))
    *others, last = setup.split.clients
    servers = []
    for rows in (last, np.sort(np.roll(last, 1)[:-6])):
        pool = InlinePool()
        pool.load(replace(setup, split=replace(setup.split, clients=(*others, rows))))
        servers.append(Server(pool.host.setup, pool))
        while not servers[-1].done:
            servers[-1].step()
    for k in range(4):
        first, second = (server.memories[Visit(k, "global")]["params"] for server in servers)
        assert lab.same(first, second) == (k < 3)


def test_training_goes_on_where_it_ended(lab: Lab) -> None:
    """A client's first model is its own; two rounds of one epoch differ from one round only by going on."""
    one, two = (run(lab, rounds=rounds).memories for rounds in (1, 2))
    assert not any(lab.same(one[visit]["params"], two[visit]["params"]) for visit in one)
    a, b = (one[Visit(k, "global")]["params"] for k in (0, 1))
    assert not lab.close(a, b, atol=1e-3)


def test_only_the_cohort_trains(lab: Lab) -> None:
    """Half of four clients a round: those never seen have no model, and cost nothing."""
    server = run(lab, rounds=1, participation=0.5)
    assert len(server.memories) == 2
    assert len(server.clients) == 2


def test_nets_may_differ(lab: Lab) -> None:
    """A role per net; every client keeps a model of its own net."""
    server = run(lab, fleet={"nets": ["mlp", "lenet5"]})
    assert {row["role"] for row in server.rounds} == {"personal-mlp", "personal-lenet5"}
    assert {visit.role for visit in server.memories} == {"mlp", "lenet5"}


def test_without_test_rows_of_the_clients_it_is_refused() -> None:
    with pytest.raises(Refused, match=r"holdout\.test"):
        config.resolve({**TRIAL, "holdout": {"test": 0.0}})
