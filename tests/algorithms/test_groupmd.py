from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from algorithms.groupmd import GroupMD
from harness import config, work
from harness.losses import trade_off
from harness.mixes import complementarity, mixes, scores, similarity, uniformity
from harness.peers import peer_weights
from harness.protocol import Batch, Cohort, Visit
from harness.trees import mean, stream

STUDENT, TEACHER = torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([[1.0, 1.0, 0.0]])
ROW = Batch(torch.tensor([0]), torch.tensor([0]))
HOLDOUT = {"test": 0.2, "validation": 0.1}
PLAIN = {"tradeoff": "fixed", "alpha_max": 0.0, "gamma": 0.0}


def server_of(lab: Any, method: str = "groupmd", hyper: dict[str, Any] | None = None, **trial: Any) -> Any:
    basics: dict[str, Any] = {"method": method, "hyper": hyper or {}, "net": "mlp", "clients": 5, "rounds": 4}
    basics |= {"local": {"epochs": 1, "batch": 16, "lr": 0.1}, "holdout": HOLDOUT, **trial}
    return lab.server(work.make_setup(config.resolve(basics), lab.arrays(200))[0])


def run(lab: Any, method: str = "groupmd", hyper: dict[str, Any] | None = None, **trial: Any) -> Any:
    server = server_of(lab, method, hyper, **trial)
    while not server.done:
        server.step()
    return server


# ---- matching


@pytest.mark.parametrize(
    ("teacher", "alike", "even", "other"),
    [((0.1, 0.2, 0.3, 0.4), 0.460163, 0.923220, 0.7), ((0.25, 0.25, 0.25, 0.25), 0.668308, 1.0, 0.5)],
)
def test_the_parts_of_the_score(teacher: tuple[float, ...], alike: float, even: float, other: float) -> None:
    """q_S = (.7, .3, 0, 0). First teacher: middle (.4, .25, .15, .2), JS = H(middle) - (H(q_S) + H(q_T)) / 2 =
    .374186, 1 - JS / ln 2 = .460163; H(q_T) / ln 4 = 1.279854 / 1.386294; classes 2 and 3 are all missing: .3 + .4.
    """
    s, t = np.array([0.7, 0.3, 0, 0]), np.array(teacher)
    assert float(similarity(s, t)) == pytest.approx(alike, abs=1e-6)
    assert float(uniformity(t)) == pytest.approx(even, abs=1e-6)
    assert float(complementarity(s, t)) == pytest.approx(other, abs=1e-6)
    assert scores(np.stack([s, t]), (1 / 3,) * 3)[0, 1] == pytest.approx((alike + even + other) / 3, abs=1e-6)


def state_of(lab: Any, method: GroupMD, counts: list[list[int]], **world: Any) -> tuple[Any, Any]:
    """A world of clients with these label counts, and the state with a model for each of them: its number."""
    n = len(counts)
    around = lab.world((10,) * n, lab.Table(), counts=np.array(counts), levels=world.pop("levels", (0,) * n), **world)
    state = method.init(around, stream("init"))
    state["models"] |= {str(k): {"w": torch.tensor([float(k)])} for k in range(n)}
    return state, around


def teachers_of(method: GroupMD, state: Any, world: Any, clients: tuple[int, ...]) -> dict[int, list[str]]:
    cohort = Cohort(1, tuple(Visit(k, "global") for k in clients))
    return {
        visit.client: [*inbox["teacher"]] for visit, inbox in method.broadcast(state, cohort, world).personal.items()
    }


def test_weights_decide_who_teaches(lab: Any) -> None:
    """Client 0 has classes 0 and 1 as 3:1. For similarity its best is 1 (even on both), for uniformity 3 (even on
    all three), for complementarity 2, which has most of the missing class: .25 / 12 + 10 / 12 = .854.
    """
    counts = [[9, 3, 0], [6, 6, 0], [1, 1, 10], [4, 4, 4]]
    for weights, wanted in (((1.0, 0.0, 0.0), "1"), ((0.0, 1.0, 0.0), "3"), ((0.0, 0.0, 1.0), "2")):
        method = GroupMD(weights=weights, students_per_teacher=4)
        assert teachers_of(method, *state_of(lab, method, counts), (0,)) == {0: [wanted]}


def test_paths_capacity_and_who_was_never_visited(lab: Any) -> None:
    """Levels 0, 0, 1, 2. All are alike, so scores tie and lower numbers come first. Client 2, of the next level, has
    room for one student: 0 takes it. 1 is left without: 0 does not rank above it, and 3 is two levels up.
    """
    method = GroupMD(students_per_teacher=1)
    state, world = state_of(lab, method, [[5, 5, 5]] * 4, levels=(0, 0, 1, 2), nets=("table",) * 3)
    assert teachers_of(method, state, world, (0, 1, 2, 3)) == {0: ["1"], 1: ["2"], 2: ["3"], 3: []}
    del state["models"]["1"], state["models"]["3"]
    assert teachers_of(method, state, world, (0, 1, 2, 3)) == {0: ["2"], 1: [], 2: [], 3: []}


def test_random_matching_draws_anew_and_keeps_to_the_paths(lab: Any) -> None:
    method = GroupMD(matching="random", students_per_teacher=9)
    state, world = state_of(lab, method, [[5, 5, 5]] * 30)
    found = []
    for round in range(2):
        pairs = teachers_of(method, state, world, (0, 1, 2, 3, 4, 5))
        assert all(int(t) > s for s, (t,) in pairs.items()), "equal mixes: only larger numbers teach"
        found.append(pairs)
        state = method.merge(state, [], lab.bench(world, round=round))
    by_score = GroupMD(students_per_teacher=9)
    found.append(teachers_of(by_score, *state_of(lab, by_score, [[5, 5, 5]] * 30), (0, 1, 2, 3, 4, 5)))
    assert found[0] != found[1] and found[2] not in found[:2]


# ---- losses


@pytest.mark.parametrize(
    ("order", "tau", "value"),
    [("own_first", 1.0, 0.899380), ("target_first", 1.0, 0.894980), ("own_first", 2.0, 0.938131)],
)
def test_both_losses(lab: Any, order: Any, tau: float, value: float) -> None:
    """Student logits (2, .5, -1), teacher (1, 1, 0), y = 0, alpha .3, beta .4: CE .241312 and .861995.
    KL(S || T) .279523, KL(T || S) .323519; at tau 2 .089492 and .090391, times 4.
    Own first: .7 * .241312 + .3 * .279523 + .6 * .861995 + .4 * .323519 = .899380. Target first: with the two
    divergences exchanged .894980. At tau 2: .168918 + .3 * .357968 + .517197 + .4 * .361564 = .938131.
    """
    p = {"student": {"logits": STUDENT}, "teacher": {"7": {"logits": TEACHER}}}
    inbox = {"nets": {"7": "table"}, "alpha": 0.3, "beta": 0.4, "omega": {}, "peers": {}}
    found, _, seen = lab.step(GroupMD(kl_order=order, tau=tau), lab.Table(), p, ROW, inbox)
    assert found == pytest.approx(value, abs=3e-6)
    assert float(seen["student_ce"]) == pytest.approx(0.241312, abs=1e-6)
    assert float(seen["teacher_ce"]) == pytest.approx(0.861995, abs=1e-6)


def test_each_takes_the_other_as_given(lab: Any) -> None:
    """d/dz [(1 - a) CE + a KL(t || softmax z)] = (1 - a) (p - y) + a (p - t), for both."""
    p = {"student": {"logits": STUDENT}, "teacher": {"7": {"logits": TEACHER}}}
    inbox = {"nets": {"7": "table"}, "alpha": 0.3, "beta": 0.4, "omega": {}, "peers": {}}
    _, grads, _ = lab.step(GroupMD(kl_order="target_first"), lab.Table(), p, ROW, inbox)
    own, other, y = STUDENT.softmax(1), TEACHER.softmax(1), torch.tensor([[1.0, 0.0, 0.0]])
    assert torch.allclose(grads["student"]["logits"], 0.7 * (own - y) + 0.3 * (own - other), atol=1e-6)
    assert torch.allclose(grads["teacher"]["7"]["logits"], 0.6 * (other - y) + 0.4 * (other - own), atol=1e-6)


def test_peers_by_their_weights(lab: Any) -> None:
    """CE .241312 + gamma .3 * (.75 * KL(S || (1, 1, 0)) .279523 + .25 * KL(S || S) 0) = .304205. No teacher: all of
    the cross-entropy counts.
    """
    peers = {"3": {"logits": TEACHER}, "5": {"logits": STUDENT}}
    inbox = {"nets": {"3": "table", "5": "table"}, "omega": {"3": 0.75, "5": 0.25}, "peers": peers}
    p = {"student": {"logits": STUDENT}, "teacher": {}}
    assert lab.step(GroupMD(), lab.Table(), p, ROW, inbox)[0] == pytest.approx(0.304205, abs=2e-6)


# ---- the trade-off


def test_the_dynamic_trade_off() -> None:
    """CE_S 1.2, CE_T .8, kappa .5: s(.8) = .689974, s(-.8) = .310026; in round 5 of 10 to warm half of .8 and .5."""
    lag = (1.2 - 0.8) / 0.5
    assert trade_off("dynamic", 1.0, lag, 10, 10, 100) == pytest.approx(0.689974, abs=1e-6)
    assert trade_off("dynamic", 0.8, lag, 5, 10, 100) == pytest.approx(0.275990, abs=1e-6)
    assert trade_off("dynamic", 0.5, -lag, 5, 10, 100) == pytest.approx(0.077506, abs=1e-6)
    assert trade_off("dynamic", 0.8, lag, 0, 10, 100) == 0
    assert trade_off("dynamic", 0.8, 1e4, 99, 10, 100) == 0.8, "no overflow"


@pytest.mark.parametrize(
    ("how", "values"),
    [("fixed", (0.8, 0.8, 0.8, 0.8)), ("linear", (0, 0.4, 0.8, 0.8)), ("cosine", (0.8, 0.682843, 0.4, 0.117157))],
)
def test_controls_of_the_trade_off(how: Any, values: tuple[float, ...]) -> None:
    """Rounds 0, 5, 10, 15 of 20, 10 to warm; .8 (1 + cos(pi / 4)) / 2 = .682843."""
    assert [trade_off(how, 0.8, 9.0, t, 10, 20) for t in (0, 5, 10, 15)] == pytest.approx(values, abs=1e-6)


def test_the_round_reads_the_running_losses_of_this_pair(lab: Any) -> None:
    method, memory = GroupMD(), {"ce": {"7": torch.tensor([1.2, 0.8])}, "revenue": {}}
    inbox = {"round": 5, "rounds": 100, "peers": {}, "teacher": {"7": {}}}
    made = method.prepare(lab.Table(), inbox, memory, lab.bench())
    assert (made["alpha"], made["beta"]) == pytest.approx((0.275990, 0.077506), abs=1e-6)
    first = method.prepare(lab.Table(), {**inbox, "teacher": {"8": {}}}, memory, lab.bench())
    assert (first["alpha"], first["beta"]) == pytest.approx((0.2, 0.125)), "nobody is ahead before they met"


def test_two_rounds_of_running_losses(lab: Any) -> None:
    """Student 1, 2: 1, 1.1; then 3: .9 * 1.1 + .1 * 3 = 1.29. Teacher .5, .5, then 1.5: .6. Other pairs stay."""
    p = {"student": {"w": torch.ones(1)}, "teacher": {"7": {"w": torch.ones(1)}}}
    memory: dict[str, Any] = {"ce": {"4": torch.tensor([9.0, 9.0])}, "revenue": {}}
    rounds = (([1.0, 2.0], [0.5, 0.5]), ([3.0], [1.5]))
    for own, other in rounds:
        metrics = {"student_ce": torch.tensor(own), "teacher_ce": torch.tensor(other)}
        trained = lab.trained(p, p, {"peers": {}, "teacher": p["teacher"]}, memory, metrics=metrics, steps=len(own))
        payload, memory = GroupMD().reply(trained)
    assert memory["ce"]["7"].tolist() == pytest.approx([1.29, 0.6])
    assert memory["ce"]["4"].tolist() == [9, 9]
    assert set(payload) == {"teacher", "dropped", "params"} and payload["dropped"] == {}


# ---- groups


def test_revenue_decides_the_weights_of_peers() -> None:
    """exp(3), exp(1), exp(0) over their sum 23.803819."""
    records = {k: torch.tensor([r, 1, 0]) for k, r in (("1", 0.3), ("2", 0.1), ("3", -0.05))}
    assert [*peer_weights(records, ["1", "2", "3"], 0.1).values()] == pytest.approx(
        [0.843795, 0.114195, 0.042010], abs=1e-6
    )


def test_peers_are_sent_until_they_are_dropped(lab: Any) -> None:
    """A group of three; after 1 dropped 2 it gets 0 alone; others still get all, and gamma = 0 sends none."""
    method = GroupMD(group=3)
    state, world = state_of(lab, method, [[5, 5, 5]] * 4)
    state["params"] = {"global": {"w": torch.zeros(1)}}
    payload = {"teacher": {}, "params": {"w": torch.ones(1)}, "dropped": {"2": torch.tensor([-1.0, 3, 3])}}
    state = method.merge(state, [lab.update(1, payload)], lab.bench(world))
    cohort = Cohort(1, tuple(Visit(k, "global") for k in range(4)))
    sent = method.broadcast(state, cohort, world).personal
    assert [sorted(sent[visit]["peers"]) for visit in cohort.visits] == [["1", "2"], ["0"], ["0", "1"], []]
    silent = GroupMD(group=3, gamma=0.0).broadcast(state, cohort, world).personal
    assert all(inbox["peers"] == {} for inbox in silent.values())


# ---- the server


def test_copies_of_a_teacher_and_students_are_averaged_by_rows(lab: Any) -> None:
    """2 has 30 rows and comes home as 1; copies of it come from 0 (10 rows) as 5 and from 1 (20 rows) as 3: its model
    is (30 + 50 + 60) / 60 = 7/3. The level: (10 * 8 + 20 * 9 + 30 * 1) / 60 = 29/6. In the next round only 0 comes,
    with a copy as 6: the model of 2 is 6.
    """
    method = GroupMD(gamma=0.0)
    state, world = state_of(lab, method, [[5, 5, 5]] * 3)
    state["params"] = {"global": {"w": torch.zeros(1)}}

    def update(client: int, rows: int, own: float, copies: dict[str, float]) -> Any:
        tree = {name: {"w": torch.tensor([w])} for name, w in copies.items()}
        return lab.update(client, {"teacher": tree, "dropped": {}, "params": {"w": torch.tensor([own])}}, rows)

    updates = [update(0, 10, 8.0, {"2": 5.0}), update(1, 20, 9.0, {"2": 3.0}), update(2, 30, 1.0, {})]
    state = method.merge(state, updates, lab.bench(world))
    assert float(state["models"]["2"]["w"]) == pytest.approx(7 / 3)
    assert [float(state["models"][k]["w"]) for k in "01"] == [8, 9]
    assert float(state["params"]["global"]["w"]) == pytest.approx(29 / 6)
    assert state["changed"] == ["2"]
    state = method.merge(state, [update(0, 10, 4.0, {"2": 6.0})], lab.bench(world, round=1))
    assert float(state["models"]["2"]["w"]) == 6 and float(state["params"]["global"]["w"]) == 4
    assert state["changed"] == ["2"]
    state = method.merge(state, [update(2, 10, 5.0, {})], lab.bench(world, round=2))
    assert state["changed"] == [] and float(state["models"]["2"]["w"]) == 5


def test_personal_models_come_back_only_if_others_trained_them(lab: Any) -> None:
    server = server_of(lab, hyper={"students": "personal", "gamma": 0.0}, clients=6, cohort=3, rounds=6)
    while not server.done:
        changed, models, seen = list(server.state["changed"]), dict(server.state["models"]), len(server.pool.log)
        server.step()
        for s in server.pool.log[seen:]:
            client = str(s.order.visit.client)
            assert ("params" in s.inbox) == (client in changed)
            if client not in changed and s.memory is not None:
                assert lab.same(models[client], s.memory["params"]), "what the server knows is what the client has"
    assert any("params" in s.inbox for s in server.pool.log) and any(s.inbox["teacher"] for s in server.pool.log)
    assert [row["role"] for row in server.rounds] == ["personal"] * 6


def test_levels_teach_upwards_through_the_whole_loop(lab: Any) -> None:
    server = run(lab, fleet={"nets": ["mlp", "lenet5", "kdia-lenet"]}, clients=9, rounds=3)
    levels, taught = server.world.levels, []
    for s in server.pool.log:
        assert s.inbox["teacher"] == {} or s.order.round > 0, "nobody has a model in round 0"
        for t in s.inbox["teacher"]:
            assert levels[int(t)] - levels[s.order.visit.client] in (0, 1)
            assert s.inbox["nets"][t] == server.world.nets[levels[int(t)]]
            taught.append((s.order.round, t))
        assert len(s.inbox["peers"]) <= 4
    assert taught and max(taught.count(pair) for pair in taught) <= 3
    roles = {row["role"] for row in server.rounds}
    assert roles == {f"{p}{net}" for p in ("", "personal-") for net in ("mlp", "lenet5", "kdia-lenet")}
    assert sum(sum(row["steps"] for row in server.clients if row["round"] == t) for t in range(3)) == sum(
        row["steps"] for row in server.rounds
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_fml_with_one_shared_teacher(lab: Any, momentum: float) -> None:
    """One level, one shared teacher, alpha = beta = .5 fixed, target first, personal students, no peers: after each
    round the shared model and every private one equal FML's (weighted by samples) bit for bit, and so do losses,
    accuracies and bytes of every row; clipping and momentum included.
    """
    local = {"epochs": 2, "batch": 16, "lr": 0.1, "momentum": momentum, "clip": 1.0, "weight_decay": 1e-3}
    basics = {"local": local, "cohort": 3}
    fixed = {"tradeoff": "fixed", "alpha_max": 0.5, "beta_max": 0.5, "gamma": 0.0, "kl_order": "target_first"}
    ours = server_of(lab, "groupmd", {"matching": "shared", "students": "personal", **fixed}, **basics)
    theirs = server_of(lab, "fml", {"weighting": "samples"}, **basics)
    while not ours.done:
        ours.step()
        theirs.step()
        assert lab.same(ours.state["models"]["shared"], theirs.state["params"])
        assert ours.memories.keys() == theirs.memories.keys()
        for visit, memory in ours.memories.items():
            assert lab.same(memory["params"], theirs.memories[visit]["params"])
    for mine, other in zip(ours.rounds, theirs.rounds, strict=True):
        same = ("role", "accuracy", "loss", "up_bytes", "down_bytes", "steps", "train_loss")
        assert {k: mine[k] for k in same if k in mine} == {k: other[k] for k in same if k in other}


def test_it_is_fedavg_without_soft_labels(lab: Any) -> None:
    """alpha = 0 and gamma = 0: what teachers learn on the side changes no student."""
    ours, theirs = run(lab, hyper=PLAIN, cohort=3), run(lab, "fedavg", cohort=3)
    assert any(s.inbox["teacher"] for s in ours.pool.log)
    assert lab.same(ours.state["params"]["global"], theirs.state["params"])


def test_the_level_is_the_mean_of_its_students(lab: Any) -> None:
    server = run(lab, cohort=3, rounds=3)
    last = sorted((s for s in server.pool.log if s.order.round == 2), key=lambda s: s.order.visit)
    rows = [float(server.world.sizes[s.order.visit.client]) for s in last]
    assert lab.same(server.state["params"]["global"], mean([s.payload["params"] for s in last], rows))
    assert mixes(server.world.label_counts).shape == (5, 10)
