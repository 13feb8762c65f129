"""The round: who takes part, what is charged to whom, when models are measured, and that nothing else matters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from harness import trees
from harness.batches import normalise
from harness.cohorts import draw_cohort
from harness.evaluate import count, metrics, tail_classes
from harness.losses import cross_entropy
from harness.nets import Net
from harness.protocol import Algorithm, Batch, Broadcast, Cohort, Inbox, Role, State, Trained, Update, Visit, World
from harness.server import Diverged, Server
from harness.trees import Tree

if TYPE_CHECKING:
    from tests.conftest import Lab

SIZES = (12, 20, 8, 16)
CLOCKS = ("seconds", "server_seconds")


@dataclass(frozen=True)
class Pair(Algorithm):
    """Two roles with a model each; clients 1 and 3 can do both. Everybody counts its visits in its memory."""

    poison: int = -1  # the round after which the large model is not finite

    def roles(self, world: World) -> Mapping[str, Role]:
        return {"small": Role("mlp"), "large": Role("lenet5", clients=(1, 3))}

    def init(self, world: World, rng: Generator) -> State:
        return {name: world.net(role.net).init(rng) for name, role in self.roles(world).items()}

    def broadcast(self, state: State, cohort: Cohort, world: World) -> Broadcast:
        own = {visit: {"hello": torch.zeros(visit.client)} for visit in cohort.visits}
        return Broadcast({"note": torch.zeros(5)}, {name: {"params": p} for name, p in state.items()}, own)

    def remember(self, net: Net, inbox: Inbox, rng: Generator) -> Tree:
        return {"visits": torch.zeros(1)}

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        return cross_entropy(net(p, batch.x), batch.y), {}

    def reply(self, trained: Trained) -> tuple[Tree, Tree]:
        return {"params": trained.end, "thanks": torch.zeros(3)}, {"visits": trained.memory["visits"] + 1}

    def merge(self, state: State, updates: Sequence[Update], server: Any) -> State:
        assert [u.visit for u in updates] == sorted(u.visit for u in updates)
        merged = {
            name: trees.mean(u.payload["params"] for u in updates if u.visit.role == name)
            for name in ("small", "large")
        }
        if server.round == self.poison:
            merged["large"]["head"]["fc3.bias"][0] = math.inf
        return merged

    def models(self, state: State) -> dict[str, tuple[str, Tree]]:
        return {"small": ("mlp", state["small"]), "large": ("lenet5", state["large"])}


def timeless(server: Server) -> list[dict[str, Any]]:
    """All rows without the clocks."""
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in (*server.rounds, *server.clients)]


# ---- cohorts


@given(st.integers(1, 60), st.floats(0.01, 1), st.integers(0, 9), st.integers(0, 50))
@settings(max_examples=60)
def test_a_cohort_is_a_set_of_the_right_size(clients: int, share: float, seed: int, round: int) -> None:
    cohort = draw_cohort(seed, round, {"global": Role("mlp")}, clients, share)
    drawn = [visit.client for visit in cohort.visits]
    assert len(set(drawn)) == len(drawn) == max(1, int(clients * share + 1e-9))
    assert drawn == sorted(drawn)
    assert set(drawn) <= set(range(clients))
    assert cohort == draw_cohort(seed, round, {"global": Role("mlp")}, clients, share)


@pytest.mark.parametrize(("clients", "share", "expected"), [(100, 0.29, 29), (10, 0.1, 1), (3, 0.5, 1), (7, 1.0, 7)])
def test_rounding_loses_no_client(clients: int, share: float, expected: int) -> None:
    """100 * .29 is 28.999999999999996 in doubles."""
    assert len(draw_cohort(0, 0, {"global": Role("mlp")}, clients, share).visits) == expected


def test_a_role_has_its_own_clients_and_size() -> None:
    """Drawn apart from the other roles, so that a method with one more role does not change their schedule."""
    small = Role("mlp", cohort=3)
    both = draw_cohort(0, 4, {"small": small, "large": Role("mlp", clients=(9, 2, 5), cohort=8)}, 10, 0.5).visits
    assert [v.client for v in both if v.role == "large"] == [2, 5, 9]  # no more than there are
    alone = draw_cohort(0, 4, {"small": small}, 10, 0.5).visits
    assert tuple(v for v in both if v.role == "small") == alone
    assert len(alone) == 3
    half = draw_cohort(0, 4, {"large": Role("mlp", clients=(9, 2, 5, 7))}, 10, 0.5).visits
    assert len(half) == 2  # the ratio is of those who are eligible


def test_everybody_is_drawn_equally_often() -> None:
    """3 of 10 in 1,000 rounds: 300 visits each, with a standard deviation of 14.5. Seeds give other schedules."""
    rounds = [draw_cohort(0, r, {"global": Role("mlp")}, 10, 0.3) for r in range(1000)]
    seen = Counter(visit.client for cohort in rounds for visit in cohort.visits)
    assert max(abs(seen[client] - 300) for client in range(10)) < 60
    assert [c.visits for c in rounds[:20]] != [
        draw_cohort(1, r, {"global": Role("mlp")}, 10, 0.3).visits for r in range(20)
    ]


# ---- costs


def test_fedavg_costs_by_hand(lab: Lab) -> None:
    """mlp on 8x8 with 4 classes: 64 * 200 + 200 + 200 * 200 + 200 + 200 * 4 + 4 = 54,004 floats, down and up.

    Batches of 8 and 2 epochs: 2 * (2 + 3 + 1 + 2) = 16 steps on 2 * (12 + 20 + 8 + 16) = 112 rows.
    """
    server = lab.run("fedavg", sizes=SIZES, rounds=2, local={"epochs": 2})
    for row in server.rounds:
        assert row["up_kinds"] == row["down_kinds"] == {"params": 4 * 4 * 54_004}
        assert row["up_bytes"] == row["down_bytes"] == 4 * 4 * 54_004
        assert (row["steps"], row["samples"], row["server_steps"]) == (16, 112, 0)
    assert [(c["client"], c["samples"], c["steps"]) for c in server.clients[:4]] == [
        (0, 12, 4),
        (1, 20, 6),
        (2, 8, 2),
        (3, 16, 4),
    ]
    assert all(c["up_bytes"] == c["down_bytes"] == 4 * 54_004 for c in server.clients)


def test_the_training_loss_weighs_clients_by_rows(lab: Lab) -> None:
    server = lab.run("fedavg", sizes=SIZES, rounds=1)
    losses = [c["train_loss"] for c in server.clients]
    assert server.rounds[0]["train_loss"] == pytest.approx(np.average(losses, weights=SIZES))


def test_costs_are_booked_once_and_where_they_arose(lab: Lab) -> None:
    """Two roles with a model each: what the rows of a round add up to is what its clients add up to, role by role."""
    server = lab.run(Pair(), sizes=SIZES, rounds=3)
    assert [row["role"] for row in server.rounds] == ["small", "large"] * 3
    for row in server.rounds:
        own = [c for c in server.clients if (c["round"], c["role"]) == (row["round"], row["role"])]
        assert len(own) == {"small": 4, "large": 2}[row["role"]]
        assert {c["arch"] for c in own} == {{"small": "mlp", "large": "lenet5"}[row["role"]]}
        for cost in ("up_bytes", "down_bytes", "steps"):
            assert row[cost] == sum(c[cost] for c in own)
        assert row["up_bytes"] == sum(row["up_kinds"].values())
        assert row["down_bytes"] == sum(row["down_kinds"].values())
    seconds = [[row[clock] > 0 for row in server.rounds[:2]] for clock in CLOCKS]
    assert seconds == [[True, False]] * 2


def test_shared_role_and_personal_parts_are_charged_per_visit(lab: Lab) -> None:
    """A note of 5 floats to everybody and a greeting of k floats to client k: for the small role 4 * 5 and
    0 + 1 + 2 + 3 floats down; 3 floats of thanks from each of 4 up.
    """
    server = lab.run(Pair(), sizes=SIZES, rounds=1)
    small, large = server.rounds
    params = trees.nbytes(server.state["small"])
    assert small["down_kinds"] == {"note": 4 * 4 * 5, "hello": 4 * 6, "params": 4 * params}
    assert small["up_kinds"] == {"params": 4 * params, "thanks": 4 * 4 * 3}
    assert large["down_kinds"]["hello"] == 4 * (1 + 3)


def test_two_models_of_one_role_share_one_bill(lab: Lab) -> None:
    """KDIA's clients train one model and two are evaluated: the second row costs nothing."""
    hyper = {"generator_epochs": 2, "generator_iterations": 3, "generator_batch": 4}
    server = lab.run("kdia", hyper, net="kdia-lenet", sizes=SIZES, rounds=2)
    student, teacher = server.rounds[:2]
    assert (student["role"], teacher["role"]) == ("student", "teacher")
    assert student["server_steps"] == 6
    assert student["steps"] == sum(c["steps"] for c in server.clients if c["round"] == 0) > 0
    costs = ("up_bytes", "down_bytes", "steps", "samples", "server_steps", "seconds")
    assert [teacher[cost] for cost in costs] == [0] * len(costs)
    assert teacher["accuracy"] is not None


# ---- what travels


def test_inboxes_have_all_their_parts_and_memories_come_back(lab: Lab) -> None:
    server = lab.run(Pair(), sizes=SIZES, rounds=3)
    for sent in server.pool.log:  # type: ignore[attr-defined]
        visit = sent.order.visit
        assert set(sent.inbox) == {"note", "params", "hello"}
        assert sent.inbox["hello"].shape == (visit.client,)
        assert sent.order.net == {"small": "mlp", "large": "lenet5"}[visit.role]
        assert (sent.memory is None) == (sent.order.round == 0)
    assert {v: float(m["visits"]) for v, m in server.memories.items()} == {
        **{Visit(client, "small"): 3.0 for client in range(4)},
        **{Visit(client, "large"): 3.0 for client in (1, 3)},
    }


def test_the_longest_work_goes_first(lab: Lab) -> None:
    """Sizes 12, 20, 8, 16. Updates still come to `merge` in the order of the clients, which `Pair` asserts."""
    server = lab.run(Pair(), sizes=SIZES, rounds=1)
    assert [s.order.visit.client for s in server.pool.log] == [1, 1, 3, 3, 0, 2]  # type: ignore[attr-defined]


def test_the_learning_rate_decays_by_rounds(lab: Lab) -> None:
    server = lab.run("fedavg", rounds=3, local={"lr": 0.1, "lr_decay": 0.5})
    rates = {sent.order.round: sent.order.lr for sent in server.pool.log}  # type: ignore[attr-defined]
    assert rates == pytest.approx({0: 0.1, 1: 0.05, 2: 0.025})


# ---- evaluation


@pytest.mark.parametrize(("every", "evaluated"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (5, [4]), (9, [4])])
def test_every_kth_round_is_evaluated_and_the_last_one(lab: Lab, every: int, evaluated: list[int]) -> None:
    server = lab.run("fedavg", rounds=5, evaluation={"every": every})
    assert [row["round"] for row in server.rounds] == [0, 1, 2, 3, 4]
    assert [row["round"] for row in server.rounds if "accuracy" in row] == evaluated


def test_what_is_booked_is_what_the_model_scores(lab: Lab) -> None:
    """The whole test set at once gives the numbers that shards of 7 rows gave."""
    server = lab.run("fedavg", rounds=2, evaluation={"batch": 7, "tail": 0.25})
    arrays, host = lab.setup("fedavg").arrays, server.pool.host  # type: ignore[attr-defined]
    x = normalise(torch.tensor(arrays.x_test), host.card.mean, host.card.std)
    counts = count(server.world.net("mlp"), server.state["params"], x, torch.tensor(arrays.y_test))
    rows = lab.setup("fedavg").split.counts.sum(0)
    expected = metrics(counts, tail_classes(rows, 0.25))
    found = {key: server.rounds[-1][key] for key in expected}
    assert found.pop("recall") == expected.pop("recall")
    assert found == pytest.approx(expected, abs=1e-6)


def test_own_label_accuracy_is_that_of_the_clients_mixes(lab: Lab) -> None:
    server = lab.run("fedavg", rounds=1)
    counts = lab.setup("fedavg").split.counts
    own = [np.average(server.rounds[0]["recall"], weights=mix) for mix in counts]
    assert server.rounds[0]["own_label_accuracy"] == pytest.approx(np.mean(own))
    assert server.rounds[0]["own_label_worst_decile"] == pytest.approx(min(own))


def test_evaluation_may_come_late(lab: Lab) -> None:
    """It is booked while the next round trains, on demand, and at the end."""
    server = lab.server(lab.setup("fedavg", rounds=3))
    server.step()
    assert server.rounds == []
    server.flush()
    assert [row["round"] for row in server.rounds] == [0]
    server.step()
    server.step()
    assert server.done
    assert [row["round"] for row in server.rounds] == [0, 1, 2]


# ---- what must not matter, and what must end a trial


def test_a_trial_is_deterministic(lab: Lab) -> None:
    torch.manual_seed(1)
    first = lab.run("fedavg", rounds=3, participation=0.5, local={"momentum": 0.9})
    torch.manual_seed(2)
    second = lab.run("fedavg", rounds=3, participation=0.5, local={"momentum": 0.9})
    assert timeless(first) == timeless(second)
    assert lab.same(first.state, second.state)
    other = lab.run("fedavg", rounds=3, participation=0.5, local={"momentum": 0.9}, seed=1)
    assert not lab.same(first.state, other.state)


def test_training_goes_somewhere(lab: Lab) -> None:
    """The made data are easy: chance is .25."""
    server = lab.run("fedavg", rounds=8, local={"epochs": 3})
    assert server.rounds[-1]["accuracy"] > 0.8
    assert server.rounds[-1]["train_loss"] < server.rounds[0]["train_loss"]


def test_an_update_that_is_not_finite_ends_the_trial(lab: Lab) -> None:
    server = lab.server(lab.setup("fedavg", rounds=5, local={"lr": 1e20, "epochs": 3}))
    with pytest.raises(Diverged, match=r"update of client \d in round \d"):
        while not server.done:
            server.step()


def test_a_model_that_is_not_finite_ends_the_trial(lab: Lab) -> None:
    server = lab.server(lab.setup(Pair(poison=1)))
    server.step()
    with pytest.raises(Diverged, match="the large model is not finite after round 1"):
        server.step()


def test_clients_without_rows_are_never_picked(lab: Lab) -> None:
    """They have nothing to learn from, and no labels of their own to be measured on."""
    server = lab.run("fedavg", sizes=(12, 0, 8), rounds=2)
    assert [c["client"] for c in server.clients] == [0, 2, 0, 2]
    assert 0 <= server.rounds[-1]["own_label_accuracy"] <= 1
