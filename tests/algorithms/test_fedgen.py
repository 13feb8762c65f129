"""FedGen: both clients' terms, the generator's losses and training, and every flag."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from algorithms.fedgen import FedGen
from harness import config, nets, trees, work
from harness.losses import by_label, crowding, label_prior, teaching
from harness.protocol import Batch, Cohort
from harness.refusal import Refused
from harness.settings import Unfit
from harness.trees import Tree

if TYPE_CHECKING:
    from harness.server import Server
    from tests.conftest import Lab

LN3 = math.log(3)
SMALL: dict[str, Any] = {"generator_steps": 6, "generator_batch": 8, "hidden": 16, "noise_width": 4}
NET = nets.build("mlp", (1, 8, 8), 4)
OTHER = nets.build("fedgen-cnn", (1, 8, 8), 4)


# ---- the losses


def test_the_diversity_term_by_hand() -> None:
    """Mean squares of eps (0,0), (1,0), (0,1): 1/2, 1/2, 1 for the pairs 12, 13, 23; distances of G 1/3, 4/3, 5/3.
    Each pair counts twice and the three of a row with itself are 0: -(1/6 + 4/6 + 5/3) * 2 / 9 = -.555556.
    """
    eps = torch.tensor([[0.0, 0], [1, 0], [0, 1]])
    made = torch.tensor([[0.0, 1, 0], [1, 1, 0], [0, 2, 3]])
    assert float(crowding(eps, made)) == pytest.approx(0.573753, abs=1e-6)
    assert float(crowding(eps, torch.ones(3, 3))) == 1.0


LOGITS = torch.tensor([[[LN3, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, LN3]]])  # [K, B, C]
LABELS = torch.tensor([0, 1])
COUNTS = torch.tensor([[2, 0], [0, 2]])


def test_the_generator_s_weighted_loss_by_hand() -> None:
    """1 + counts is (3, 1), (1, 3), so weights are 3/4 and 1/4. Cross-entropies: ln 4/3 = .287682 where a client has
    logit ln 3, else ln 2 = .693147. Each client: (.75 * .287682 + .25 * .693147) / 2 = .194524. With the shapes of
    the paper's code, [B] times [B, 1], all pairs would be averaged: 2 * .5 * .490415.
    """
    assert float(teaching(LOGITS, LABELS, COUNTS, "weighted_ce")) == pytest.approx(0.389049, abs=1e-6)


def test_the_generator_s_loss_of_the_paper_by_hand() -> None:
    """Mean logits (ln 3 / 2, 0) and (0, ln 3 / 2): ln(1 + 3^-.5) = .455746."""
    assert float(teaching(LOGITS, LABELS, COUNTS, "ce_of_mean_logits")) == pytest.approx(0.455746, abs=1e-6)


def test_priors_by_hand() -> None:
    """Rows by label 3 + 1, 0, 0 + 1 of 5."""
    counts = torch.tensor([[3, 0, 0], [1, 0, 1]])
    assert label_prior(counts, "uniform").tolist() == pytest.approx([0.5, 0, 0.5])
    assert label_prior(counts, "phat").tolist() == pytest.approx([0.8, 0, 0.2])


def test_sums_by_label() -> None:
    values = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    y = torch.tensor([2, 0, 2])
    assert by_label(values, y, 3).tolist() == [[3, 4, 1], [0, 0, 0], [6, 8, 2]]
    assert by_label(values, y, 3, torch.tensor([1, 1, 0])).tolist() == [[3, 4, 1], [0, 0, 0], [1, 2, 1]]


@pytest.mark.parametrize(
    ("latent", "kl", "expected"), [(2.0, 0.0, 0.863046), (0.0, 3.0, 0.719205), (2.0, 3.0, 1.294569)]
)
def test_the_client_s_loss_by_hand(lab: Lab, latent: float, kl: float, expected: float) -> None:
    """The row's logits are (ln 3, 0), label 0: ln 4/3 = .287682. The generated row (0, ln 3) passes the head, the
    identity, with label 1: .287682 again, times 2. For the row's own label the generator made (0, 0): target
    (1/2, 1/2) against (3/4, 1/4), .5 ln(2/3) + .5 ln 2 = .143841, times 3.
    """
    p = {"logits": torch.tensor([[LN3, 0.0]]), "head": torch.eye(2)}
    extra = {"made": torch.tensor([[0.0, LN3]]), "label": torch.tensor([1]), "same": torch.zeros(1, 2)}
    batch = Batch(torch.tensor([0]), torch.tensor([0]), extra)
    value, grads, seen = lab.step(FedGen(), lab.Table(2), p, batch, {"gen": latent, "kl": kl})
    assert value == pytest.approx(expected, abs=1e-6)
    assert bool(grads["head"].any()) == bool(latent)  # the target of the divergence is given, though it is the head's
    assert seen["drawn"].tolist() == [1, 0]


def test_more_generated_rows_weigh_more(lab: Lab) -> None:
    """B_G / B = 2: .287682 + 2 * .287682."""
    p = {"logits": torch.tensor([[LN3, 0.0]]), "head": torch.eye(2)}
    extra = {"made": torch.tensor([[0.0, LN3]] * 2), "label": torch.tensor([1, 1])}
    batch = Batch(torch.tensor([0]), torch.tensor([0]), extra)
    assert lab.step(FedGen(), lab.Table(2), p, batch, {"gen": 1.0})[0] == pytest.approx(0.863046, abs=1e-6)


# ---- sizes


def test_sizes_of_the_paper_s_nets() -> None:
    """42 * 256 + 256, twice 256 of BatchNorm, 256 * 32 + 32; the running statistics are 512 more."""
    net = nets.build("fedgen-cnn", (1, 28, 28), 10)
    assert trees.size(net.init(trees.stream(0))) == 26_434
    made = nets.generator(net, "latent", 32, 256, "fedgen").init(trees.stream(0))
    assert sum(x.numel() for path, x in trees.leaves(made) if "running" not in path) == 19_744


# ---- what travels, and when


def weights_at(lab: Lab, method: FedGen, round: int) -> dict[str, Any]:
    world = lab.world()
    state = method.init(world, trees.stream(0))
    state["drawn"][1, 2] = 5
    return method.broadcast(state, Cohort(round, ()), world).shared


@pytest.mark.parametrize(
    ("round", "expected"), [(1, 9.8), (10, 8.170728), (100, 1.326196), (569, 1.017741e-4), (600, 1e-4)]
)
def test_weights_decay(lab: Lab, round: int, expected: float) -> None:
    """10 * .98^t, from 1e-4 on constant: .98^570 is 9.96e-6."""
    sent = weights_at(lab, FedGen(lambda_kl=0.0, **SMALL), round)
    assert sent["gen"] == pytest.approx(expected, rel=1e-4)
    assert sent["kl"] == 0.0
    assert weights_at(lab, FedGen(decay=False, **SMALL), round)["kl"] == 10.0


def test_the_second_round_is_the_first_with_a_generator(lab: Lab) -> None:
    """Two epochs draw every row twice. mlp: 54,004 floats; 8 * 16 + 16 + 2 * 16 + 2 * 16 + 16 * 200 + 200 of G."""
    server = lab.run("fedgen", SMALL, rounds=2, local={"epochs": 2})
    first, second = server.pool.log[:4], server.pool.log[4:]  # type: ignore[attr-defined]
    assert all("generator" not in sent.inbox and "gen" not in sent.inbox for sent in first)
    assert all(sent.inbox["gen"] == pytest.approx(9.8) for sent in second)
    counts = server.setup.split.counts
    for sent in first + second:
        assert sent.payload["label_counts"].tolist() == (2 * counts[sent.order.visit.client]).tolist()
    assert [row["server_steps"] for row in server.rounds] == [6, 6]
    assert server.rounds[0]["down_kinds"] == {"params": 16 * 54_004}
    assert server.rounds[1]["down_kinds"] == {"params": 16 * 54_004, "generator": 16 * 3_608, "labels": 64}
    assert server.rounds[1]["up_kinds"] == {"params": 16 * 54_004, "label_counts": 4 * 4 * 8}


def test_without_its_terms_it_is_fedavg(lab: Lab) -> None:
    ours = lab.run("fedgen", {**FedGen.identity, **SMALL}, rounds=3, participation=0.5)
    plain = lab.run("fedavg", rounds=3, participation=0.5)
    assert lab.same(ours.state["params"], plain.state["params"])
    assert all(row["server_steps"] == 0 for row in ours.rounds)
    with_terms = lab.run("fedgen", SMALL, rounds=3, participation=0.5)
    assert not lab.same(with_terms.state["params"], plain.state["params"])


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_what_a_client_draws(lab: Lab, kind: Any) -> None:
    method = FedGen(noise=kind, generated_batch=500, **SMALL)
    inbox: dict[str, Any] = {"generator": nets.generator(NET, "latent", 4, 16, "fedgen").init(trees.stream(1))}
    inbox["labels"] = torch.tensor([0.5, 0.0, 0.5, 0.0])
    batch = Batch(torch.zeros(3, 1, 8, 8), torch.tensor([1, 1, 3]))
    drawn = method.draw(NET, batch, inbox, {}, trees.stream(2)).extra
    assert set(drawn["label"].tolist()) == {0, 2}
    assert drawn["made"].shape == (500, 200)
    assert drawn["same"].shape == (3, 200)
    z = trees.noise(1000, 4, kind, trees.stream(3))
    assert bool(((z >= 0) & (z < 1)).all()) == (kind == "uniform")
    assert float(z.mean()) == pytest.approx(0.5 if kind == "uniform" else 0.0, abs=0.1)


def test_a_visit_without_steps_drew_nothing(lab: Lab) -> None:
    p = NET.init(trees.stream(0))
    payload, memory = FedGen().reply(lab.trained(p, p, {}, {}, net=NET, steps=0))
    assert payload["label_counts"].tolist() == [0, 0, 0, 0]
    assert memory == {}


# ---- the generator's training


def asked(lab: Lab, method: FedGen, round: int = 0) -> dict[str, Any]:
    """The generator's training after a round of clients 0 and 2, caught before it runs."""
    world = lab.world((10, 30, 20))
    state = method.init(world, trees.stream(0))
    state["drawn"][1] = torch.tensor([0, 0, 0, 9])  # of an earlier round
    ends = [NET.init(trees.stream("end", k)) for k in range(2)]
    drawn = [torch.tensor([2, 0, 0, 0]), torch.tensor([4, 2, 0, 0])]
    payloads = [{"params": p, "label_counts": n} for p, n in zip(ends, drawn, strict=True)]
    updates = [lab.update(k, payload, samples=n) for k, payload, n in zip((0, 2), payloads, (10, 30), strict=True)]
    bench = lab.bench(world, round)
    found: dict[str, Any] = {}

    def fit(p: Tree, loss: Callable[..., Tensor], draw: Callable[[int], Batch], steps: int, **rule: Any) -> Tree:
        found.update(p=p, loss=loss, draw=draw, steps=steps, rule=rule, ends=ends, drawn=torch.stack(drawn))
        return p

    bench.fit = fit  # type: ignore[method-assign]
    after = method.merge(state, updates, bench)
    assert after["drawn"].tolist() == [[2, 0, 0, 0], [0, 0, 0, 9], [4, 2, 0, 0]]
    assert lab.close(after["params"], trees.mean(ends, [10, 30]))
    return found


@pytest.mark.parametrize("eta", [0.0, 2.0])
@pytest.mark.parametrize("how", ["weighted_ce", "ce_of_mean_logits"])
def test_the_generator_learns_from_the_clients_last_layers(lab: Lab, how: Any, eta: float) -> None:
    found = asked(lab, FedGen(generator_loss=how, diversity=eta, **SMALL))
    make = nets.generator(NET, "latent", 4, 16, "fedgen")
    batch = found["draw"](0)
    made = make(trees.clone(found["p"]), batch.x, batch.y)
    logits = torch.stack([NET.classify(p, made) for p in found["ends"]])
    expected = teaching(logits, batch.y, found["drawn"], how) + eta * crowding(batch.x, made)
    assert torch.allclose(found["loss"](trees.clone(found["p"]), batch), expected, atol=1e-5)


def test_the_generator_s_optimizer(lab: Lab) -> None:
    """3e-4 * .98^3 = 2.823576e-4."""
    found = asked(lab, FedGen(), 3)
    assert found["steps"] == 50
    assert found["draw"](0).x.shape == (32, 32)
    assert found["rule"]["lr"] == pytest.approx(2.823576e-4)
    assert found["rule"]["weight_decay"] == 1e-2


@pytest.mark.parametrize(
    ("prior", "expected"), [("uniform", {0: 0.5, 1: 0.5}), ("phat", {0: 6 / 17, 1: 2 / 17, 3: 9 / 17})]
)
def test_labels_for_the_generator(lab: Lab, prior: Any, expected: dict[int, float]) -> None:
    """uniform: what somebody in this round drew; phat: all rows seen, 6, 2, 0 and 9 of 17."""
    draw = asked(lab, FedGen(label_prior=prior, **{**SMALL, "generator_batch": 4000}))["draw"]
    share = torch.bincount(draw(0).y, minlength=4) / 4000
    assert share.tolist() == pytest.approx([expected.get(label, 0.0) for label in range(4)], abs=0.04)


def test_adam_may_go_on_from_round_to_round(lab: Lab) -> None:
    kept, fresh = (lab.run("fedgen", {**SMALL, "fresh_adam": fresh}, rounds=2) for fresh in (False, True))
    assert float(kept.state["adam"]["step"]) == 12
    assert fresh.state["adam"] == {}
    assert not lab.same(kept.state["generator"], fresh.state["generator"])


def test_a_trained_generator_fools_the_clients(lab: Lab) -> None:
    """The loss of the mean logits falls below chance, ln 4."""
    server = lab.run("fedgen", {**SMALL, "generator_steps": 150, "generator_lr": 3e-3}, rounds=3, local={"epochs": 3})
    make = nets.generator(NET, "latent", 4, 16, "fedgen")
    y = torch.arange(4).repeat(50)
    made = make.frozen(server.state["generator"], trees.noise(200, 4, "uniform", trees.stream(0)), y)
    assert float(F.cross_entropy(NET.classify(server.state["params"], made), y)) < 0.5 * math.log(4)


# ---- what is shared


def deal(lab: Lab, hyper: dict[str, Any], **trial: Any) -> Server:
    """A trial of two rounds with test rows at its 4 clients."""
    basics = {"method": "fedgen", "hyper": hyper, "clients": 4, "rounds": 2, "partition": {"kind": "iid"}}
    basics |= {"local": {"epochs": 1, "batch": 8, "lr": 0.1}, "holdout": {"test": 0.2}}
    server = lab.server(work.make_setup(config.resolve({**basics, **trial}), lab.arrays(80))[0])
    while not server.done:
        server.step()
    return server


def test_a_shared_predictor(lab: Lab) -> None:
    """The extractor starts alike everywhere, and stays; the last layer is averaged by rows."""
    method = FedGen(share="predictor", **SMALL)
    server = deal(lab, {"share": "predictor", **SMALL}, net="mlp")
    log = server.pool.log  # type: ignore[attr-defined]
    assert all(set(sent.payload["params"]) == {"head"} for sent in log)
    rows = [len(server.setup.split.clients[k]) for k in range(4)]
    mean = trees.mean([sent.payload["params"] for sent in log[:4]], rows)
    assert lab.same(log[4].inbox["params"], mean)
    before = log[4].memory["own"]
    net = server.world.net("mlp")
    begin = method.start(net, log[4].inbox, log[4].memory)
    assert lab.same({**begin, "head": 0}, {**before, "head": 0})
    assert lab.same(begin["head"], mean["head"])
    first = [method.remember(net, log[k].inbox, trees.stream(k))["own"] for k in range(2)]
    assert lab.same(first[0], first[1])
    assert {row["role"] for row in server.rounds} == {"personal"}
    assert method.models(server.state) == {}
    assert method.keeps(net, log[4].memory) is before


def test_last_layers_of_different_names() -> None:
    own = {"features": {"a": torch.zeros(3)}, "head": {"fc.weight": torch.zeros(2, 1), "fc.bias": torch.zeros(2)}}
    shared = {"head": {"fc2.weight": torch.tensor([[1.0], [2.0]]), "fc2.bias": torch.tensor([3.0, 4.0])}}
    found = trees.overlay(own, shared)
    assert list(found["head"]) == ["fc.weight", "fc.bias"]
    assert found["head"]["fc.weight"].tolist() == [[1], [2]]
    assert found["head"]["fc.bias"].tolist() == [3, 4]
    assert found["features"]["a"] is own["features"]["a"]


def test_local_running_statistics(lab: Lab) -> None:
    server = deal(lab, {"bn": "local", **SMALL}, net="fedgen-cnn-bn")
    log = server.pool.log  # type: ignore[attr-defined]
    for sent in log:
        assert not [path for path, _ in trees.leaves(sent.payload["params"]) if "running" in path]
        assert not [path for path, _ in trees.leaves(sent.inbox["params"]) if "running" in path]
    own = log[4].memory["own"]
    begin = FedGen(bn="local").start(OTHER, log[4].inbox, log[4].memory)
    assert torch.equal(begin["features"]["norm1.running_mean"], own["features"]["norm1.running_mean"])
    assert bool(own["features"]["norm1.running_mean"].any())
    assert not torch.equal(begin["features"]["conv1.weight"], own["features"]["conv1.weight"])


@pytest.mark.parametrize(
    ("bn", "share", "net"),
    [("groupnorm", "all", "fedgen-cnn-bn"), ("local", "all", "mlp"), ("averaged", "predictor", "fedgen-cnn-bn")],
)
def test_a_bn_that_does_nothing_is_refused(lab: Lab, bn: Any, share: Any, net: str) -> None:
    with pytest.raises(Refused, match=f"bn={bn} is not for {net}"):
        FedGen(bn=bn, share=share).init(lab.world(net=net), trees.stream(0))


@pytest.mark.parametrize(
    ("bn", "net"), [("averaged", "fedgen-cnn-bn"), ("groupnorm", "fedgen-cnn"), ("averaged", "mlp")]
)
def test_a_bn_that_fits(lab: Lab, bn: Any, net: str) -> None:
    assert FedGen(bn=bn).init(lab.world(net=net), trees.stream(0))["net"] == net


def test_needs() -> None:
    assert FedGen().needs == {"one_net"}
    assert FedGen(bn="local").needs == {"one_net", "private_test"}
    assert FedGen(share="predictor").needs == {"same_latent", "private_test"}
    with pytest.raises(Unfit, match="keeps a model per client"):
        config.resolve({"method": "fedgen", "hyper": {"share": "predictor"}})
    mixed = {"method": "fedgen", "holdout": {"test": 0.2}, "fleet": {"nets": ["fedgen-cnn", "mlp"]}}
    with pytest.raises(Unfit, match="one latent width"):
        config.resolve({**mixed, "hyper": {"share": "predictor"}})
    with pytest.raises(Unfit, match="one net"):
        config.resolve(mixed)
