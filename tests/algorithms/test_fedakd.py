"""Attention on the features, and distillation from the clients' models."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from algorithms.fedakd import FedAkd, shares
from harness import nets
from harness.batches import Rows
from harness.layers import Attention, compiled
from harness.protocol import Batch
from harness.refusal import Refused
from harness.server import Server
from harness.trees import leaves, size, stream, sub

if TYPE_CHECKING:
    from tests.conftest import Lab

PROXY = {"source": "train", "rows": 16}


def run(lab: Lab, method: str, hyper: dict[str, Any], **trial: Any) -> Server:
    """A trial with 16 labelled proxy rows."""
    setup = lab.setup(method, hyper, proxy=PROXY, **trial)
    arrays = lab.arrays(16)
    server = lab.server(replace(setup, proxy=(arrays.x_train, arrays.y_train)))
    while not server.done:
        server.step()
    return server


def bench(lab: Lab, net: Any, label: int, **more: Any) -> Any:
    """A server whose proxy is one row of this label."""
    rows = Rows(torch.zeros(1, dtype=torch.int64), torch.tensor([label]), None)
    return lab.bench(lab.world(net=net, proxy_rows=1, **more), proxy=rows)


def logits(*row: float) -> dict[str, Any]:
    return {"params": {"logits": torch.tensor([row], dtype=torch.float32)}}


# ---- attention


@pytest.mark.parametrize(
    ("rescale", "wanted"), [(True, (0.734185, 3.991446, 0.0)), (False, (0.244728, 1.330482, 0.0))]
)
def test_attention_by_hand(rescale: bool, wanted: tuple[float, ...]) -> None:
    """f = (1, 2, 0), W = I: a = softmax(1, 2, 0) = (.244728, .665241, .090031); a f, and three times that."""
    layer = Attention(3, rescale)
    features, weight = torch.tensor([[1.0, 2.0, 0.0]]), torch.eye(3)
    op = compiled(layer, "attention.")
    assert op({"attention.weight": weight}, features, True)[0].tolist() == pytest.approx(wanted, abs=1e-5)
    layer.weight.data = weight
    assert layer(features)[0].tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", ["mlp", "lenet5", "kdia-lenet", "resnet8", "fedgen-cnn-bn"])
def test_a_net_with_attention_starts_as_the_net_without(name: str) -> None:
    """Bit for bit, whatever the width (200, 84, 256, 64, 32): same parameters, same logits; W has width^2 numbers."""
    plain, attended = (nets.build(n, (1, 28, 28), 10) for n in (name, f"{name}+attention"))
    p, q = plain.init(stream("init")), attended.init(stream("init"))
    weight = q["latent"].pop("attention.weight")
    assert weight.shape == (plain.latent_width, plain.latent_width) and not weight.any()
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(leaves(p), leaves(q), strict=True))
    q["latent"]["attention.weight"] = weight
    x = torch.randn(5, 1, 28, 28, generator=stream("x"))
    assert torch.equal(plain.frozen(p, x), attended.frozen(q, x))
    assert attended.latent_width == plain.latent_width
    assert torch.equal(attended.classify(q, attended.embed(q, x, train=False), train=False), attended.frozen(q, x))


def test_large_scores_do_not_overflow() -> None:
    out = compiled(Attention(2))({"weight": 1000 * torch.eye(2)}, torch.tensor([[1.0, 0.5]]), True)
    assert out[0].tolist() == [2.0, 0.0]


def test_an_unknown_addition_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(Refused, match=r"Did you mean 'mlp\+attention'"):
        nets.build("mlp+attension", (1, 8, 8), 10)
    with pytest.raises(Refused, match="unknown net"):
        nets.build("nonet+attention", (1, 8, 8), 10)


def test_any_method_can_train_a_net_with_attention(lab: Lab) -> None:
    """A card may name it: then it is part of the trial, and of every model that is evaluated."""
    server = lab.run("fedavg", net="mlp+attention", rounds=1)
    assert lab.model(server)["latent"]["attention.weight"].any()


def test_the_first_step_of_round_0_is_fedavgs_but_for_the_attention(lab: Lab) -> None:
    """W = 0: a does not depend on f, so all gradients but W's are those of the plain net. One step per client."""
    local, off = {"batch": 20}, {"variant": "server_unlabelled", "lambda_kd": 0.0}
    plain = lab.model(lab.run("fedavg", rounds=1, local=local))
    attended = lab.model(lab.run("fedakd", off, rounds=1, local=local))
    assert attended["latent"].pop("attention.weight").any()
    assert lab.same(plain, attended)


def test_without_attention_and_server_it_is_fedavg_to_the_end(lab: Lab) -> None:
    off = lab.run("fedakd", dict(FedAkd.identity or {}))
    assert lab.same(lab.model(off), lab.model(lab.run("fedavg")))


def test_without_the_factor_features_shrink_by_their_number(lab: Lab) -> None:
    setup = {"sizes": (8,), "rounds": 1}
    servers = {a: lab.server(lab.setup("fedakd", {"attention": a, "variant": "client_side"}, **setup)) for a in
               ("rescaled", "plain", "off")}  # fmt: skip
    (role,) = servers["plain"].roles.values()
    assert role.net == "mlp+attention-plain"
    x, z = torch.randn(3, 1, 8, 8, generator=stream("x")), {}
    for name, server in servers.items():
        net = server.world.net(server.roles["global"].net)
        z[name] = net.embed(lab.model(server), x)
    assert torch.equal(z["rescaled"], z["off"])
    assert torch.allclose(z["plain"] * 200, z["off"], rtol=1e-5)
    assert size(lab.model(servers["plain"])) == size(lab.model(servers["off"])) + 200 * 200


# ---- distillation on the server


def test_the_servers_loss_by_hand() -> None:
    """q from (0, 0), y = 0: CE = ln 2 = .693147. tau 1, mixture (.622459, .377541): KL .030300; lambda 2."""
    batch = Batch(torch.zeros(1), torch.tensor([0]), {"target": torch.tensor([[0.622459, 0.377541]])})
    zero = torch.zeros(1, 2)
    for variant, lambda_kd, wanted in (
        ("server_labelled", 2.0, 0.753748),
        ("server_unlabelled", 2.0, 0.060601),
        ("server_labelled", 0.0, 0.693147),
    ):
        method = FedAkd(variant=variant, lambda_kd=lambda_kd, tau=1.0)  # type: ignore[arg-type]
        assert method.server_loss(zero, batch).item() == pytest.approx(wanted, abs=2e-6)


def test_the_gradient_is_the_literal_one_at_the_papers_temperature() -> None:
    """tau 2: d/dz tau^2 KL(m || softmax(z / tau)) = tau (q - m) = 2 (.5 - .622459) = -.244918 for class 0."""
    student = torch.zeros(1, 2, requires_grad=True)
    batch = Batch(torch.zeros(1), torch.tensor([-1]), {"target": torch.tensor([[0.622459, 0.377541]])})
    FedAkd(variant="server_unlabelled", tau=2.0).server_loss(student, batch).backward()
    assert student.grad is not None
    assert student.grad[0].tolist() == pytest.approx([-0.244918, 0.244918], abs=1e-6)


@pytest.mark.parametrize(
    ("omega", "label", "target"), [("uniform", 0, 0.5), ("per_label", 0, 0.75), ("per_label", 1, 0)]
)
def test_weights_of_the_teachers(lab: Lab, omega: str, label: int, target: float) -> None:
    """Client 0 is sure of class 0, client 1 of class 1. Uniform: one half. By label counts: 6 of 8 rows of class
    0 are client 0's, none of class 1.
    """
    net = lab.Table(classes=2)
    counts = torch.tensor([[6, 0], [2, 5], [100, 100]]).numpy()  # client 2 does not take part
    server = bench(lab, net, label, counts=counts)
    method = FedAkd(omega=omega, tau=1.0)  # type: ignore[arg-type]
    updates = [lab.update(0, logits(40, 0)), lab.update(1, logits(0, 40))]
    teach = method._teacher(net, updates, server)  # type: ignore[arg-type]
    said = teach(torch.tensor([0]), torch.tensor([label]))["target"]
    assert said[0].tolist() == pytest.approx([target, 1 - target], abs=1e-6)


def test_a_label_that_nobody_has_is_taught_by_all() -> None:
    weights = shares(torch.tensor([[1, 0], [3, 0]]), torch.tensor([0, 1]))
    assert weights.tolist() == [[0.25, 0.5], [0.75, 0.5]]


def test_two_rounds_of_the_servers_step(lab: Lab) -> None:
    """Mean of (2, 0) and (0, 0), sizes 1 to 1, is (1, 0); label 1. At tau 1 the mixture of (.880797, .5) and so on is
    (.690399, .309601), q = (.731059, .268941): the divergence lowers class 0, and so does CE. Adam's first step is
    the rate .1: (.9, .1), in each round anew.
    """
    net, method = lab.Table(classes=2), FedAkd(attention="off", tau=1.0, proxy_steps=1, proxy_batch=1, proxy_lr=0.1)
    state = method.init(lab.world(net=net), stream("test"))
    for _ in range(2):
        state = method.merge(state, [lab.update(0, logits(2, 0)), lab.update(1, logits(0, 0))], bench(lab, net, 1))
        assert state["params"]["logits"][0].tolist() == pytest.approx([0.9, 0.1], abs=1e-6)


def test_without_attention_and_divergence_it_is_the_control_bit_for_bit(lab: Lab) -> None:
    hyper = {"proxy_steps": 5, "proxy_batch": 8}
    ours = run(lab, "fedakd", {**hyper, "attention": "off", "lambda_kd": 0.0})
    control = run(lab, "fedavg-proxy", hyper)
    assert lab.same(lab.model(ours), lab.model(control))
    assert [row["server_steps"] for row in ours.rounds] == [5, 5, 5]


@pytest.mark.parametrize("attention", ["rescaled", "off"])
def test_each_part_of_the_loss_changes_the_model(lab: Lab, attention: str) -> None:
    """The grid of an ablation: attention, divergence and cross-entropy, each on or off; no two cells are equal."""
    models = [
        lab.model(
            run(lab, "fedakd", {"attention": attention, "variant": v, "lambda_kd": kd, "proxy_steps": 5}, rounds=1)
        )
        for v in ("server_labelled", "server_unlabelled")
        for kd in (0.0, 1.0)
    ]
    for i, one in enumerate(models):
        assert not any(lab.close(one, other, atol=1e-7) for other in models[:i])


# ---- distillation at the client


def test_a_client_learns_from_its_own_last_model(lab: Lab) -> None:
    """Round 0: CE alone, and the end is remembered. Round 1: + lambda tau^2 KL(last || now); tau 2, logits (1, 1, 0)
    against (2, .5, -1): .241311 + .5 * 4 * .090391 = .422093.
    """
    method, net = FedAkd(variant="client_side", lambda_kd=0.5), lab.Table()
    batch, now = Batch(torch.tensor([0]), torch.tensor([0])), {"logits": torch.tensor([[2.0, 0.5, -1.0]])}
    memory = method.remember(net, {}, stream("test"))  # type: ignore[arg-type]
    assert lab.step(method, net, now, batch, {}, memory)[0] == pytest.approx(0.241311, abs=1e-6)
    end = {"logits": torch.tensor([[1.0, 1.0, 0.0]])}
    payload, memory = method.reply(lab.trained(now, end, {}, memory))
    assert payload == {"params": end}
    value, grads, _ = lab.step(method, net, now, batch, {}, memory)
    assert value == pytest.approx(0.422093, abs=2e-6)
    assert grads["logits"].any()


def test_the_last_model_never_travels(lab: Lab) -> None:
    server = lab.run("fedakd", {"variant": "client_side"}, rounds=2)
    first, second = (row["up_kinds"] for row in server.rounds)
    assert first == second and set(first) == {"params"}
    assert all(set(memory) == {"last"} for memory in server.memories.values())


def test_client_side_differs_from_fedavg_from_round_1_on(lab: Lab) -> None:
    for rounds, equal in ((1, True), (2, False)):
        ours = lab.run("fedakd", {"variant": "client_side", "attention": "off"}, rounds=rounds)
        assert lab.same(lab.model(ours), lab.model(lab.run("fedavg", rounds=rounds))) is equal


def test_what_it_needs_follows_the_variant(lab: Lab) -> None:
    assert FedAkd().needs == {"one_net", "labelled_proxy"}
    assert FedAkd(omega="per_label").needs == {"one_net", "labelled_proxy", "label_counts"}
    assert FedAkd(variant="server_unlabelled").needs == {"one_net", "proxy"}
    assert FedAkd(variant="client_side").needs == {"one_net"}
    lab.setup("fedakd", {"variant": "client_side"})
    with pytest.raises(Refused, match="data on the server"):
        lab.setup("fedakd")


@pytest.mark.parametrize("variant", ["server_unlabelled", "client_side"])
def test_weights_by_label_without_labels_are_refused(lab: Lab, variant: str) -> None:
    with pytest.raises(Refused, match="per_label"):
        lab.setup("fedakd", {"omega": "per_label", "variant": variant}, proxy=PROXY)


def test_unlabelled_rows_have_no_labels(lab: Lab) -> None:
    """The same trial with other labels on its proxy rows is the same trial."""
    setup, arrays = (
        lab.setup("fedakd", {"variant": "server_unlabelled", "proxy_steps": 5}, proxy=PROXY),
        lab.arrays(16),
    )
    ends = []
    for labels in (arrays.y_train, arrays.y_train[::-1].copy()):
        server = lab.server(replace(setup, proxy=(arrays.x_train, labels)))
        while not server.done:
            server.step()
        ends.append(lab.model(server))
    assert lab.same(*ends)
    assert (
        float(sub(ends[0], lab.model(lab.run("fedavg", net="mlp+attention")))["head"]["fc3.weight"].abs().max()) > 0
    )
