"""KDIA: weights of the teacher, both added losses, the generator, and the order of a round."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.fedavg import FedAvg
from algorithms.kdia import Kdia, diversity, teacher_weights
from harness import nets, trees
from harness.protocol import Batch, Cohort
from harness.trees import Tree

if TYPE_CHECKING:
    from harness.server import Server
    from tests.conftest import Lab

CE = math.log(math.e**2 + math.e**0.5 + 1 / math.e) - 2  # of logits (2, .5, -1) and class 0: .241311
SMALL: dict[str, Any] = {"generator_epochs": 2, "generator_iterations": 5, "generator_batch": 8}
NET = nets.build("kdia-lenet", (1, 8, 8), 4)


def literal(t: int, last: list[int], visits: list[int], sizes: list[int]) -> Tensor:
    """The code's formula word for word, for gaps that do not underflow: cube roots of three frequencies."""
    gaps = torch.tensor([math.exp(-(t - k)) for k in last], dtype=torch.float64)
    part, size = torch.tensor(visits, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
    mixed = (gaps / gaps.sum() * part / part.sum() * size / size.sum()) ** (1 / 3)
    return mixed / mixed.sum()


# ---- weights of the teacher


def test_weights_by_hand() -> None:
    """t = 4, last visits (4, 4, 2, never), counts (3, 1, 2, 0), sizes (100, 200, 50, 650).

    Cubes, up to a common factor: 1 * 3 * 100 = 300, 1 * 1 * 200 = 200, e^-2 * 2 * 50 = 13.533528, 0; their roots
    6.694330, 5.848035, 2.383077, 0 over the sum 14.925442: (.448518, .391817, .159665, 0).
    """
    found = teacher_weights(4, [4, 4, 2, -1], [3, 1, 2, 0], [100, 200, 50, 650], "geometric")
    assert found.tolist() == pytest.approx([0.448518, 0.391817, 0.159665, 0.0], abs=1e-6)
    assert float(found[3]) == 0.0


def test_arithmetic_weights_by_hand() -> None:
    """Means of the frequencies (.466837, .466837, .063180, .003146), (1/2, 1/6, 1/3, 0), (.1, .2, .05, .65) are
    (.355612, .277835, .148838, .217715). The unseen client's share would be random weights: without it, over .782285:
    (.454581, .355158, .190260, 0).
    """
    found = teacher_weights(4, [4, 4, 2, -1], [3, 1, 2, 0], [100, 200, 50, 650], "arithmetic")
    assert found.tolist() == pytest.approx([0.454581, 0.355158, 0.190260, 0.0], abs=2e-6)
    assert float(found[3]) == 0.0


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20), st.integers(1, 500)), min_size=1, max_size=8))
@settings(max_examples=60)
def test_the_log_form_is_the_literal_one(clients: list[tuple[int, int, int]]) -> None:
    last = [k if c else -1 for k, c, _ in clients]
    visits, sizes = [c for _, c, _ in clients], [n for _, _, n in clients]
    if not any(visits):
        return
    found = teacher_weights(9, last, visits, sizes, "geometric")
    assert torch.allclose(found, literal(9, last, visits, sizes))
    assert all(float(w) == 0 for w, c in zip(found, visits, strict=True) if c == 0)


@pytest.mark.parametrize("how", ["geometric", "arithmetic"])
def test_long_absences_do_not_underflow(how: str) -> None:
    """After 10,000 rounds exp(-gap) is 0 in double precision. Equal absences weigh the same."""
    found = teacher_weights(10_000, [0, 0, -1], [1, 1, 0], [10, 10, 10], how)
    assert found.tolist() == pytest.approx([0.5, 0.5, 0.0])


def test_a_round_of_absence_costs_a_third_of_a_nat() -> None:
    first, second = teacher_weights(7, [7, 6], [1, 1], [5, 5], "geometric").tolist()
    assert second / first == pytest.approx(math.exp(-1 / 3))


def merged(lab: Lab, **changes: Any) -> float:
    """The teacher in the situation of `test_weights_by_hand`: latest models 1, 2 (new) and 4; before 10.

    Sizes are those there; clients 0 and 1 take part in round 4.
    """
    method = Kdia(lambda_gen=0.0, **changes)
    state: dict[str, Any] = {
        "net": "table",
        "params": {"logits": torch.tensor([9.0])},
        "teacher": {"logits": torch.tensor([10.0])},
        "latest": torch.tensor([[4.0], [7.0]]),
        "rows": [2, 0],
        "last": [1, -1, 2, -1],
        "visits": [2, 0, 2, 0],
    }
    world = lab.world((100, 200, 50, 650), net=lab.Table())
    updates = [
        lab.update(k, {"params": {"logits": torch.tensor([value])}}, samples=rows)
        for k, value, rows in ((0, 1.0, 100), (1, 2.0, 200))
    ]
    state = method.merge(state, updates, lab.bench(world, round=4))
    assert (state["visits"], state["last"]) == ([3, 1, 2, 0], [4, 4, 2, -1])
    assert dict(zip(state["rows"], state["latest"].flatten().tolist(), strict=True)) == {2: 4.0, 0: 1.0, 1: 2.0}
    assert method.models(state)["student"][1]["logits"].item() == pytest.approx(5 / 3)
    return float(method.models(state)["teacher"][1]["logits"])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1.870812),  # .448518 * 1 + .391817 * 2 + .159665 * 4
        ({"frequencies": "arithmetic"}, 1.925937),  # .454581 * 1 + .355158 * 2 + .190260 * 4
        ({"teacher": "uniform"}, 7 / 3),  # (1 + 2 + 4) / 3
        ({"teacher": "size"}, 2.0),  # (100 * 1 + 200 * 2 + 50 * 4) / 350
        ({"teacher": "participants"}, 5 / 3),  # the student, (100 * 1 + 200 * 2) / 300
        ({"teacher": "ema"}, 7.641667),  # .717 * 10 + .283 * 5/3
        ({"teacher": "ema", "ema_decay": 0.5}, 5.833333),
    ],
)
def test_every_teacher_by_hand(lab: Lab, changes: dict[str, Any], expected: float) -> None:
    assert merged(lab, **changes) == pytest.approx(expected, abs=1e-5)


# ---- the local objective


@pytest.mark.parametrize(
    ("changes", "term"),
    [
        ({}, 0.5 * 0.089492),
        ({"tau": 1.0}, 0.5 * 0.279523),
        ({"tau": 3.0}, 0.5 * 0.041272),
        ({"kd_direction": "teacher_first", "tau": 1.0}, 0.5 * 0.323519),
        ({"kd_direction": "teacher_first"}, 0.5 * 0.090391),
        ({"kd_direction": "teacher_first", "tau": 3.0}, 0.5 * 0.040817),
        ({"lambda_kd": 3.0}, 3 * 0.089492),
        ({"lambda_kd": 0.0}, 0.0),
    ],
)
def test_distillation_by_hand(lab: Lab, changes: dict[str, Any], term: float) -> None:
    """Student (2, .5, -1), teacher (1, 1, 0): the divergences of `test_losses`, weighted, without a tau^2."""
    student, teacher = ({"logits": torch.tensor([row])} for row in ((2.0, 0.5, -1.0), (1.0, 1.0, 0.0)))
    batch = Batch(torch.tensor([0]), torch.tensor([0]))
    method = Kdia(lambda_gen=0.0, **changes)
    value, _, _ = lab.step(method, lab.Table(), student, batch, {"params": student, "teacher": teacher})
    assert value == pytest.approx(CE + term, abs=1e-6)


def test_generated_features_train_the_classifier_alone(lab: Lab) -> None:
    """lambda_gen CE(h(G(z, y~)), y~), one uniform label per real row; G is frozen and in evaluation mode."""
    method, plain = Kdia(lambda_kd=0.0, lambda_gen=0.7), FedAvg()
    make = nets.generator(NET, "features", 100, style="kdia")
    p, g = NET.init(trees.stream(0)), make.init(trees.stream(1))
    batch = Batch(torch.randn(6, 1, 8, 8, generator=trees.stream(2)), torch.arange(6) % 4)
    value, grads, _ = lab.step(method, NET, p, batch, {"params": p, "generator": g})
    before, plain_grads, _ = lab.step(plain, NET, p, batch)
    drawn = method.draw(NET, batch, {}, {}, trees.stream("lab")).extra  # the lab's own stream
    logits = NET.classify(p, make(g, drawn["z"], drawn["label"], train=False), "features")
    assert value == pytest.approx(before + 0.7 * float(F.cross_entropy(logits, drawn["label"])), abs=1e-5)
    assert lab.same(grads["features"], plain_grads["features"])
    assert not lab.close(grads["latent"], plain_grads["latent"], atol=1e-4)
    assert not lab.close(grads["head"], plain_grads["head"], atol=1e-4)
    assert lab.same(g, make.init(trees.stream(1)))  # no gradient, and no running statistics either


def test_draws_are_normal_noise_and_uniform_labels() -> None:
    """4,000 rows: labels 1,000 each with a standard deviation of 27; the mean of 400,000 normals within .01."""
    batch = Batch(torch.zeros(4000, 1, 8, 8), torch.zeros(4000, dtype=torch.long))
    extra = Kdia().draw(NET, batch, {}, {}, trees.stream("draw")).extra
    assert extra["z"].shape == (4000, 100)
    assert abs(float(extra["z"].mean())) < 0.01
    assert float(extra["z"].std()) == pytest.approx(1, abs=0.01)
    assert (extra["label"].bincount(minlength=4) - 1000).abs().max() < 140
    assert Kdia(noise=7).draw(NET, batch, {}, {}, trees.stream("draw")).extra["z"].shape == (4000, 7)
    assert not Kdia(lambda_gen=0.0).draw(NET, batch, {}, {}, trees.stream("draw")).extra


# ---- the generator


def test_diversity_by_hand() -> None:
    """Halves of a batch of four: d_z = (|0-1| + |1-1| + |2-0| + |0-0|) / 4 = .75, d_G = (.2 + .4 + .4 + 0) / 4 = .25:
    1 / (1/3 + 1e-5) = 2.999910. A fifth row has no partner.
    """
    z = torch.tensor([[0.0, 1], [2, 0], [1, 1], [0, 0]])
    features = torch.tensor([[0.1, 0.2], [0.5, 0.5], [0.3, 0.6], [0.9, 0.5]])
    assert float(diversity(z, features)) == pytest.approx(2.999910, abs=2e-6)
    more = (torch.cat([part, torch.full((1, 2), 50.0)]) for part in (z, features))
    assert float(diversity(*more)) == pytest.approx(2.999910, abs=2e-6)


def test_sizes_and_bytes_on_cifar(lab: Lab) -> None:
    """Ten classes at 3x32x32. Net 92,626. Generator: codes 10 * 10; 2x2 kernels 4 * (110 * 512 + 512 * 256 +
    256 * 128 + 128 * 16); norms 2 * (512 + 256 + 128): 890,724, and 1,792 running statistics that travel too.

    Down 2 * 92,626 + 890,724 + 1,792 = 1,077,768 floats, up as FedAvg.
    """
    net = nets.build("kdia-lenet", (3, 32, 32), 10)
    world = lab.world(net=net, default_net="kdia-lenet")
    state = Kdia().init(world, trees.stream(0))
    trained = [x for path, x in trees.leaves(state["generator"]) if "running" not in path]
    assert sum(x.numel() for x in trained) == 890_724
    inbox = Kdia().broadcast(state, Cohort(0, ()), world).shared
    assert trees.bytes_by_kind(inbox) == {"params": 370_504, "teacher": 370_504, "generator": 4 * 892_516}
    payload, memory = Kdia().reply(lab.trained(state["params"], state["params"], inbox))
    assert trees.bytes_by_kind(payload) == {"params": 370_504}
    assert memory == {}


class Caught(Exception):
    """Carries what `merge` asked the server to fit."""


def asked(lab: Lab, method: Kdia) -> dict[str, Any]:
    """The generator's training after a round of two clients with 10 and 30 rows, caught before it runs."""
    world = lab.world((10, 30), net="kdia-lenet")
    state = method.init(world, trees.stream(0))
    ends = [trees.scale(NET.init(trees.stream("end", k)), 2.0) for k in range(2)]
    updates = [lab.update(k, {"params": p}, samples=n) for k, (p, n) in enumerate(zip(ends, (10, 30), strict=True))]
    bench = lab.bench(world)
    found: dict[str, Any] = {}

    def fit(p: Tree, loss: Callable[..., Tensor], draw: Callable[[int], Batch], steps: int, **rule: Any) -> Tree:
        found.update(p=p, loss=loss, draw=draw, steps=steps, rule=rule, ends=ends)
        return p

    bench.fit = fit  # type: ignore[method-assign]
    before = trees.clone(state["generator"])
    method.merge(state, updates, bench)
    assert not found or lab.same(found["p"], before)  # its weights persist: training goes on from them
    return found


def test_the_generator_s_loss(lab: Lab) -> None:
    """Cross-entropy of the clients' mean logits, .25 and .75 for 10 and 30 rows, and the diversity, unweighted.

    The last layer is made strong, so that maps differ and neither term drowns the other, in value or in gradient.
    """
    found = asked(lab, Kdia(**SMALL))
    make, batch = nets.generator(NET, "features", 100, style="kdia"), found["draw"](0)
    strong = {key: x * 50 if key == "body.conv3.weight" else x for key, x in found["p"].items()}

    def by_hand(p: Tree, batch: Batch, shares: tuple[float, float] = (0.25, 0.75)) -> Tensor:
        features = make(p, batch.x, batch.y)
        said = [NET.classify(end, features, "features") for end in found["ends"]]
        return F.cross_entropy(shares[0] * said[0] + shares[1] * said[1], batch.y) + diversity(batch.x, features)

    def value_and_slope(loss: Callable[[Tree, Batch], Tensor]) -> tuple[float, Tree]:
        p = trees.clone(strong)
        trained = {key: x.requires_grad_() for key, x in p.items() if "running" not in key}
        value = loss(p, batch)
        slopes = torch.autograd.grad(value, list(trained.values()))
        return float(value.detach()), dict(zip(trained, slopes, strict=True))

    value, slope = value_and_slope(found["loss"])
    expected, expected_slope = value_and_slope(by_hand)
    assert value == pytest.approx(expected, abs=1e-4)
    assert lab.close(slope, expected_slope, atol=1e-4, rtol=1e-3)
    assert abs(value - float(by_hand(trees.clone(strong), batch, (0.5, 0.5)))) > 1e-2  # the shares do show
    assert value - float(diversity(batch.x, make(trees.clone(strong), batch.x, batch.y))) > 0.5


def test_the_generator_s_batches(lab: Lab) -> None:
    """A pool of labels per round, 5 batches of 8 here, in a new order in each epoch; fresh noise at each step."""
    draw = asked(lab, Kdia(**SMALL))["draw"]
    batches = [draw(step) for step in range(10)]
    assert {(tuple(b.x.shape), tuple(b.y.shape)) for b in batches} == {((8, 100), (8,))}
    epochs = [torch.cat([b.y for b in batches[at : at + 5]]) for at in (0, 5)]
    assert torch.equal(epochs[0].sort()[0], epochs[1].sort()[0])
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(batches[0].x, batches[5].x)


def test_the_generator_s_optimizer_and_its_settings(lab: Lab) -> None:
    """Adam, 1e-3, decay 1e-5, 20 * 100 steps on 64 rows; every field sets what it is called after."""
    usual = asked(lab, Kdia())
    assert (usual["steps"], len(usual["draw"](0).y)) == (2000, 64)
    assert {"optimizer": "adam", **usual["rule"]} == {"optimizer": "adam", "lr": 1e-3, "weight_decay": 1e-5}
    odd = asked(
        lab,
        Kdia(
            noise=9,
            generator_epochs=3,
            generator_iterations=7,
            generator_batch=5,
            generator_lr=0.2,
            generator_weight_decay=0.3,
        ),
    )
    assert odd["steps"] == 21
    assert odd["draw"](0).x.shape == (5, 9)
    assert (odd["rule"]["lr"], odd["rule"]["weight_decay"]) == (0.2, 0.3)
    assert asked(lab, Kdia(generator_epochs=0)) == {}  # stays as it was


def test_training_the_generator_lowers_its_loss(lab: Lab) -> None:
    method = Kdia(generator_epochs=4, generator_iterations=10, generator_batch=16)
    found = asked(lab, method)
    batch = found["draw"](0)
    trained = lab.bench().fit(found["p"], found["loss"], found["draw"], found["steps"], lr=1e-3)
    before, after = (float(found["loss"](trees.clone(p), batch).detach()) for p in (found["p"], trained))
    assert after < before


# ---- the round


def run(lab: Lab, rounds: int = 4, **hyper: Any) -> tuple[Server, list[dict[str, Tree]]]:
    """A trial with half of six clients a round, and copies of the server's trees before each round and at the end."""
    setup = lab.setup(
        "kdia", {**SMALL, **hyper}, sizes=(12, 20, 8, 16, 9, 30), net="kdia-lenet", rounds=rounds, participation=0.5
    )
    server = lab.server(setup)
    kept = []
    while True:
        kept.append(
            {key: trees.clone(x) for key, x in server.state.items() if key in ("params", "teacher", "generator")}
        )
        if server.done:
            return server, kept
        server.step()


def test_the_order_of_a_round(lab: Lab) -> None:
    """Sent: student, teacher and generator as the round before left them. Then the student from this round's
    participants, then the teacher with this round's weights from everybody's latest model, then the generator.
    """
    server, kept = run(lab)
    sizes, start = server.world.sizes, server.world.net("kdia-lenet").init(trees.stream(0, "init"))
    assert lab.same(kept[0]["teacher"], start) and lab.same(kept[0]["params"], start)
    latest: dict[int, Tree] = {}
    last, visits = [-1] * 6, [0] * 6
    for t in range(4):
        sent = sorted((s for s in server.pool.log if s.order.round == t), key=lambda s: s.order.visit)  # type: ignore[attr-defined]
        for visit in sent:
            assert {key: lab.same(visit.inbox[key], kept[t][key]) for key in kept[t]} == dict.fromkeys(kept[t], True)
            client = visit.order.visit.client
            latest[client], last[client], visits[client] = visit.payload["params"], t, visits[client] + 1
        ends = [visit.payload["params"] for visit in sent]
        rows = [float(sizes[visit.order.visit.client]) for visit in sent]
        assert lab.same(kept[t + 1]["params"], trees.mean(ends, rows))
        share = literal(t, last, visits, list(sizes))
        seen = [client for client in range(6) if visits[client]]
        expected = trees.mean([latest[client] for client in seen], [float(share[client]) for client in seen])
        assert lab.close(kept[t + 1]["teacher"], expected, atol=1e-6)
        assert not lab.same(kept[t + 1]["generator"], kept[t]["generator"])
    assert len(set(visits)) > 1  # the schedule is uneven, or the weights would not show


def test_round_0_sends_an_untrained_generator(lab: Lab) -> None:
    server, kept = run(lab, rounds=1)
    stream = trees.stream(0, "init")
    server.world.net("kdia-lenet").init(stream)
    fresh = nets.generator(server.world.net("kdia-lenet"), "features", 100, style="kdia").init(stream)
    assert lab.same(kept[0]["generator"], fresh)
    assert all(lab.same(sent.inbox["generator"], fresh) for sent in server.pool.log)  # type: ignore[attr-defined]


@pytest.mark.parametrize("teacher", ["triple", "uniform", "size"])
@pytest.mark.parametrize("frequencies", ["geometric", "arithmetic"])
def test_clients_that_were_never_seen_never_enter(lab: Lab, teacher: str, frequencies: str) -> None:
    """Only those who took part have a row among the latest models, whatever the weights."""
    server, _ = run(lab, rounds=1, teacher=teacher, frequencies=frequencies, lambda_gen=0.0)
    seen = sorted(sent.order.visit.client for sent in server.pool.log)  # type: ignore[attr-defined]
    assert sorted(server.state["rows"]) == seen
    assert len(server.state["latest"]) == len(seen) == 3


def test_student_and_teacher_are_both_evaluated(lab: Lab) -> None:
    server, _ = run(lab, rounds=2)
    assert [row["role"] for row in server.rounds] == ["student", "teacher"] * 2
    assert server.rounds[2]["loss"] != server.rounds[3]["loss"]


def test_without_its_losses_the_student_is_fedavg_bit_for_bit(lab: Lab) -> None:
    """Four rounds with momentum; the teacher is still looked at, but neither it nor a generator travels."""
    settings: dict[str, Any] = {
        "net": "kdia-lenet",
        "rounds": 4,
        "participation": 0.5,
        "local": {"momentum": 0.9, "epochs": 2},
    }
    plain, bare = lab.run("fedavg", **settings), lab.run("kdia", {"lambda_kd": 0.0, "lambda_gen": 0.0}, **settings)
    assert lab.same(lab.model(bare), lab.model(plain))
    assert {tuple(sent.inbox) for sent in bare.pool.log} == {("params",)}  # type: ignore[attr-defined]
    assert not lab.same(bare.state["teacher"], bare.state["params"])
    assert "generator" not in bare.state
    assert [r["server_steps"] for r in bare.rounds] == [0] * 8
    for hyper in ({"lambda_kd": 0.0}, {"lambda_gen": 0.0}):
        assert not lab.same(lab.model(lab.run("kdia", {**SMALL, **hyper}, **settings)), lab.model(plain))


@pytest.mark.parametrize(
    ("hyper", "kinds"),
    [
        ({"lambda_kd": 0.0}, {"params", "generator"}),
        ({"lambda_gen": 0.0}, {"params", "teacher"}),
        ({}, {"params", "teacher", "generator"}),
    ],
)
def test_only_what_is_used_travels(lab: Lab, hyper: dict[str, float], kinds: set[str]) -> None:
    server, _ = run(lab, rounds=1, **hyper)
    assert set(server.rounds[0]["down_kinds"]) == kinds
    assert set(server.rounds[0]["up_kinds"]) == {"params"}


def test_defaults_are_those_of_the_code() -> None:
    """run.sh: temper 2, lambda_kd .5, lambda_gen 1; the student's distribution first; noise of width 100."""
    method = Kdia()
    assert (method.tau, method.lambda_kd, method.lambda_gen, method.noise) == (2.0, 0.5, 1.0, 100)
    assert (method.kd_direction, method.teacher, method.frequencies) == ("student_first", "triple", "geometric")
