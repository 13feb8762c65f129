"""The round: who takes part, what is charged to whom, when models are measured, and that nothing else matters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from algorithms.fedavg import FedAvg
from harness import cohorts, trees
from harness.batches import normalise
from harness.checkpoint import pack, unpack
from harness.cohorts import draw_cohort
from harness.evaluate import count, metrics, tail_classes
from harness.losses import cross_entropy
from harness.nets import Net
from harness.protocol import Algorithm, Batch, Broadcast, Cohort, Inbox, Role, State, Trained, Update, Visit, World
from harness.server import Diverged, NoUpdates, Server
from harness.trees import Tree
from harness.work import Setup, WorkFailed

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


# ---- what a trial may live with


@dataclass(frozen=True)
class Unlucky(FedAvg):
    """Client 1, of 20 rows, has an update that is not finite in the rounds `at`, or a visit that raises."""

    at: tuple[int, ...] = (1,)
    raises: bool = False

    def reply(self, trained: Trained) -> tuple[Tree, Tree]:
        payload, memory = super().reply(trained)
        if trained.visit.client == 1 and trained.round in self.at:
            if self.raises:
                raise ValueError("bad\nluck")
            payload = {**payload, "params": trees.tree_map(lambda x: x * math.nan, trained.end)}
        return payload, {"visits": memory.get("visits", torch.zeros(())) + 1}


def told(server: Server) -> list[tuple[str, int | None, int | None]]:
    return [(e["kind"], e["round"], e["client"]) for e in server.events]


def test_an_update_that_is_not_finite_can_be_skipped(lab: Lab) -> None:
    """Round 1 is merged from the other three; the visit's costs count, and it is not remembered."""
    whole = lab.run("fedavg", rounds=3)
    server = lab.run(Unlucky(), rounds=3, faults={"nonfinite": "skip"})
    assert told(server) == [("client_skipped", 1, 1)]
    assert server.events[0]["detail"] == "its update is not finite"
    costs = ("up_bytes", "down_bytes", "steps", "samples", "train_loss")
    assert [{k: r[k] for k in costs} for r in server.rounds[:2]] == [
        {k: r[k] for k in costs} for r in whole.rounds[:2]
    ]
    visits = [float(memory["visits"]) for _, memory in sorted(server.memories.items())]
    assert visits == [3, 2, 3, 3]
    log = server.pool.log  # type: ignore[attr-defined]
    others = [s for s in log if s.order.round == 1 and s.order.visit.client != 1]
    merged = trees.mean((s.payload["params"] for s in sorted(others, key=lambda s: s.order.visit)), [12, 8, 16])
    received = next(s.inbox["params"] for s in log if s.order.round == 2)
    assert lab.same(received, merged)


def test_a_loss_that_is_not_finite_stays_out_of_the_tables(lab: Lab) -> None:
    """Every update of round 0 is skipped: no loss, and no model was changed. NaN would be no JSON."""
    faults = {"nonfinite": "skip", "empty_rounds": 0}
    server = lab.run("fedavg", rounds=2, local={"lr": 1e30, "epochs": 3}, faults=faults)
    assert [row["train_loss"] for row in server.clients] == [None] * 8
    assert [row["train_loss"] for row in server.rounds] == [None] * 2
    assert server.rounds[0]["accuracy"] == server.rounds[1]["accuracy"]
    assert server.rounds[0]["up_bytes"] > 0


def test_a_visit_that_raises_ends_the_trial(lab: Lab) -> None:
    """With the client and the round; the round before is booked."""
    server = lab.server(lab.setup(Unlucky(raises=True)))
    with pytest.raises(WorkFailed, match=r"^client 1 in round 1: ValueError: bad luck$"):
        while not server.done:
            server.step()
    assert told(server) == [("client_failed", 1, 1)]
    assert [row["round"] for row in server.rounds] == [0]


def test_a_visit_that_raises_can_be_skipped(lab: Lab) -> None:
    """Its work is lost, what it received is counted."""
    server = lab.run(Unlucky(raises=True), rounds=3, faults={"client": "skip"})
    assert told(server) == [("client_skipped", 1, 1)]
    own = [row for row in server.clients if row["client"] == 1]
    assert [(row["steps"], row["up_bytes"] > 0) for row in own] == [(3, True), (0, False), (3, True)]
    assert len({row["down_bytes"] for row in own}) == 1
    assert [float(memory["visits"]) for _, memory in sorted(server.memories.items())] == [3, 2, 3, 3]


def test_each_policy_is_for_its_own_fault(lab: Lab) -> None:
    with pytest.raises(Diverged, match="update of client 1 in round 1"):
        lab.run(Unlucky(), faults={"client": "skip"})
    with pytest.raises(WorkFailed, match="client 1 in round 1"):
        lab.run(Unlucky(raises=True), faults={"nonfinite": "skip"})


def test_a_fault_says_in_which_role(lab: Lab) -> None:
    """Clients 1 and 3 can do both roles."""

    class Half(Pair):
        def loss(self, net: Net, *rest: Any) -> Any:
            if net.name == "lenet5":
                raise ValueError("no")
            return super().loss(net, *rest)

    with pytest.raises(WorkFailed, match="client 1 in round 0: as large: ValueError: no"):
        lab.run(Half())


@pytest.mark.parametrize("how", ["nobody there", "all drop out", "all skipped"])
def test_rounds_from_which_nothing_comes_back(lab: Lab, tmp_path: Path, how: str) -> None:
    """Rounds 1, 2 and 4 of 6 are empty: three events, and the model of round 0 is evaluated again in 1 and 2."""
    trial: dict[str, Any] = {"rounds": 6, "faults": {"empty_rounds": 3}}
    server = lab.server(empty(lab, tmp_path, how, {1, 2, 4}, **trial))
    while not server.done:
        server.step()
    assert [key for key in told(server) if key[0] == "empty_round"] == [("empty_round", r, None) for r in (1, 2, 4)]
    losses = [row["loss"] for row in server.rounds]
    assert losses[0] == losses[1] == losses[2] != losses[3] == losses[4] != losses[5]


@pytest.mark.parametrize("how", ["nobody there", "all drop out", "all skipped"])
def test_too_many_empty_rounds_end_the_trial(lab: Lab, tmp_path: Path, how: str) -> None:
    server = lab.server(empty(lab, tmp_path, how, {1, 3, 4}, rounds=6, faults={"empty_rounds": 2}))
    with pytest.raises(NoUpdates, match="no update came back in 2 rounds in a row, rounds 3 to 4"):
        while not server.done:
            server.step()
    assert [row["round"] for row in server.rounds] == [0, 1, 2, 3, 4]


def empty(lab: Lab, folder: Path, how: str, empty_ones: set[int], **trial: Any) -> Setup:
    """A trial of which these rounds are empty."""
    if how == "all skipped":
        trial["faults"] |= {"client": "skip"}

        class Never(FedAvg):
            def reply(self, trained: Trained) -> tuple[Tree, Tree]:
                if trained.round in empty_ones:
                    raise ValueError("no")
                return super().reply(trained)

        return lab.setup(Never(), **trial)
    if how == "all drop out":

        def roster(seed: int, cohort: Cohort, how: Any) -> cohorts.Roster:
            gone = cohort.visits if cohort.round in empty_ones else ()
            return cohorts.Roster(cohort, frozenset(gone), dict.fromkeys(cohort.visits, 1.0))

        lab.patch.setattr("harness.server.draw_roster", roster)
        return lab.setup("fedavg", **trial)
    there = [(r, k) for r in range(6) if r not in empty_ones for k in range(4)]
    pd.DataFrame(there, columns=["round", "client"]).to_parquet(folder / "trace.parquet")
    pattern = {"pattern": "trace", "trace": str(folder / "trace.parquet")}
    setup = lab.setup("fedavg", availability=pattern, **trial)
    return replace(setup, trace=cohorts.read_trace(folder / "trace.parquet", 4)[0])


def test_events_and_empty_rounds_go_on_from_a_snapshot(lab: Lab, tmp_path: Path) -> None:
    """Stopped after the first of two empty rounds in a row, the second one still ends the trial."""
    setup = empty(lab, tmp_path, "all skipped", {1, 2}, rounds=6, faults={"empty_rounds": 2})
    first = lab.server(setup)
    first.step()
    first.step()
    second = lab.server(setup)
    second.restore(unpack(pack(first.snapshot())))
    assert second.events == first.events != []
    with pytest.raises(NoUpdates):
        second.step()
    assert told(second)[-1] == ("empty_round", 2, None)


def test_events_say_when(lab: Lab) -> None:
    before = datetime.now(UTC)
    server = lab.run(Unlucky(), rounds=3, faults={"nonfinite": "skip"})
    (only,) = server.events
    assert list(only) == ["time", "kind", "round", "client", "detail"]
    assert before - timedelta(seconds=1) < datetime.fromisoformat(only["time"]) <= datetime.now(UTC)


# ---- clients with little to learn from


def test_clients_without_rows_are_never_picked(lab: Lab) -> None:
    """They have nothing to learn from, and no labels of their own to be measured on."""
    server = lab.run("fedavg", sizes=(12, 0, 8), rounds=2)
    assert [c["client"] for c in server.clients] == [0, 2, 0, 2]
    assert 0 <= server.rounds[-1]["own_label_accuracy"] <= 1


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_client_of_one_row_learns_from_it(lab: Lab, drop_last: bool) -> None:
    """Also with BatchNorm, for which a batch of one row has but the variance within its maps.

    Client 1's last batch has one row, too: drop_last leaves it out, but not one that is all there is.
    """
    local = {"drop_last": drop_last}
    server = lab.run("fedavg", net="fedgen-cnn-bn", sizes=(1, 9, 16), rounds=2, local=local)
    assert [c["steps"] for c in server.clients[:3]] == [1, 1 if drop_last else 2, 2]
    assert all(math.isfinite(row[key]) for row in server.rounds for key in ("loss", "train_loss"))


def test_a_client_of_one_class_is_one_of_many(lab: Lab) -> None:
    """Its own-label accuracy is the recall of its class."""
    setup = lab.setup("fedavg", sizes=(10, 10), rounds=1)
    labels = setup.arrays.y_train
    clients = tuple(np.flatnonzero(rows) for rows in (labels == 2, labels != 2))
    counts = np.stack([np.bincount(labels[rows], minlength=4) for rows in clients])
    server = lab.server(replace(setup, split=replace(setup.split, clients=clients, counts=counts)))
    server.step()
    (row,) = server.rounds
    other = np.average(row["recall"], weights=[5, 5, 0, 5])
    assert row["own_label_accuracy"] == pytest.approx((row["recall"][2] + other) / 2)
