"""FedProto: prototypes of classes, the distance to them, and the nearest one as an answer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithms.fedproto import FedProto, nearest
from harness import config, nets, trees, work
from harness.batches import Rows
from harness.protocol import Batch
from harness.settings import Unfit

if TYPE_CHECKING:
    from harness.server import Server
    from tests.conftest import Lab

LN3 = math.log(3)


def run(lab: Lab, hyper: dict[str, Any] | None = None, **trial: Any) -> Server:
    basics = {"method": "fedproto", "hyper": hyper or {}, "net": "mlp", "clients": 4, "rounds": 2}
    basics |= {"local": {"epochs": 1, "batch": 8, "lr": 0.1}, "holdout": {"test": 0.2}, "partition": {"kind": "iid"}}
    server = lab.server(work.make_setup(config.resolve({**basics, **trial}), lab.arrays(80))[0])
    while not server.done:
        server.step()
    return server


@pytest.mark.parametrize(("weight", "expected"), [(0.0, 0.287682), (1.0, 2.787682), (2.0, 5.287682)])
def test_the_loss_by_hand(lab: Lab, weight: float, expected: float) -> None:
    """Logits (ln 3, 0) and (0, ln 3) for labels 0 and 1: ln 4/3 = .287682 each. Latent vectors are the logits. The
    first row's is (1, 3) away from its prototype: (1 + 9) / 2 = 5. Class 1 has none: 0, so the mean is 5 / 2.
    """
    p = {"latent": torch.tensor([[LN3, 0.0], [0.0, LN3]]), "head": torch.eye(2)}
    batch = Batch(torch.tensor([0, 1]), torch.tensor([0, 1]))
    inbox = {"prototypes": torch.tensor([[LN3 + 1, 3], [9, 9]]), "there": torch.tensor([True, False])}
    value, grads, _ = lab.step(FedProto(lambda_proto=weight), lab.Table(2), p, batch, inbox)
    assert value == pytest.approx(expected, abs=1e-6)
    # d/dz of the distance: 2 (z - c) / (Z B) = (-.5, -1.5) for the first row, nothing for the second.
    plain = lab.step(FedProto(), lab.Table(2), p, batch)[1]
    far = (grads["latent"] - plain["latent"]).tolist()
    assert far[0] == pytest.approx([-0.5 * weight, -1.5 * weight], abs=1e-6)
    assert far[1] == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize(("weighting", "expected"), [("clients", 3.0), ("rows", 4.0)])
def test_the_mean_of_prototypes_by_hand(lab: Lab, weighting: Any, expected: float) -> None:
    """Class 0: 1 from 10 rows and 5 from 30: 3, or (10 + 150) / 40 = 4. Class 1: only the second, 7, whose zeros from
    the first do not count. Class 2 nobody has: it keeps what it had, and stays away if it had nothing.
    """
    method, world = FedProto(weighting=weighting), lab.world()
    state = {"prototypes": torch.full((4, 1), 8.0), "there": torch.tensor([False, False, True, False])}
    own = [torch.tensor([[1.0], [0], [0], [0]]), torch.tensor([[5.0], [7], [0], [0]])]
    counts = [torch.tensor([10.0, 0, 0, 0]), torch.tensor([30.0, 3, 0, 0])]
    payloads = [{"prototypes": p, "label_counts": n} for p, n in zip(own, counts, strict=True)]
    merged = method.merge(state, [lab.update(k, payload) for k, payload in enumerate(payloads)], lab.bench(world))
    assert merged["prototypes"][:3, 0].tolist() == [expected, 7, 8]
    assert merged["there"].tolist() == [True, True, True, False]


def test_prototypes_by_hand() -> None:
    """c = (1, 2) and (0, 3): weights 2 c, biases -5 and -9; a class that is not there never wins."""
    found = nearest(torch.tensor([[1.0, 2], [0, 3], [9, 9]]), torch.tensor([True, True, False]))
    assert found.tolist() == [2, 4, 0, 6, 0, 0, -5, -9, -1e6]


numbers = st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4)


@given(st.lists(numbers, min_size=2, max_size=6), numbers)
def test_the_largest_logit_is_the_nearest_prototype(rows: list[list[float]], row: list[float]) -> None:
    prototypes, z = torch.tensor(rows).double(), torch.tensor(row).double()
    vector = nearest(prototypes, torch.ones(len(rows), dtype=torch.bool))
    logits = vector[: prototypes.numel()].view_as(prototypes) @ z + vector[prototypes.numel() :]
    far = (prototypes - z).square().sum(1)
    assert float(far[logits.argmax()]) == pytest.approx(float(far.min()), abs=1e-9)


def test_prototypes_are_the_means_of_the_trained_model(lab: Lab) -> None:
    """In evaluation mode on the client's rows. Classes 1 and 3 it does not have; 0 was received, 2 was not."""
    net = nets.build("mlp", (1, 8, 8), 4)
    end, x = net.init(trees.stream(0)), torch.randn(7, 1, 8, 8, generator=trees.stream(1))
    y = torch.tensor([0, 2, 0, 2, 2, 0, 2])
    inbox = {"prototypes": torch.full((4, 200), 9.0), "there": torch.tensor([True, True, False, False])}
    trained = lab.trained(end, end, inbox, {}, net=net, bench=lab.bench(private=Rows(x, y)))
    payload, memory = FedProto().reply(trained)
    assert payload["label_counts"].tolist() == [3, 0, 4, 0]
    for label in (0, 2):
        mean = net.embed(end, x[y == label], train=False).mean(0)
        assert torch.allclose(payload["prototypes"][label], mean, atol=1e-6)
    assert not payload["prototypes"][[1, 3]].any()
    assert torch.equal(memory["prototypes"][2], payload["prototypes"][2])
    assert memory["prototypes"][0].unique().tolist() == [9]
    kept = FedProto().keeps(net, memory)
    z = net.embed(end, x, train=False)
    far = torch.stack([(z - memory["prototypes"][c]).square().sum(1) for c in (0, 2)], 1)
    assert net.frozen(kept, x).argmax(1).tolist() == [(0, 2)[i] for i in far.argmin(1).tolist()]
    assert FedProto(answer="head").keeps(net, memory) is memory["params"]


def test_two_rounds(lab: Lab) -> None:
    """10 classes of 200 floats up with 10 counts; down in the second round with 10 flags of a byte."""
    server = run(lab)
    assert [row["up_kinds"] for row in server.rounds] == [{"prototypes": 32_000, "label_counts": 160}] * 2
    assert [row["down_kinds"] for row in server.rounds] == [{}, {"prototypes": 32_000, "there": 40}]
    log = server.pool.log  # type: ignore[attr-defined]
    assert log[4].inbox["there"].tolist() == [True] * 4 + [False] * 6  # the data have four classes
    total = sum(sent.payload["prototypes"] for sent in log[:4])
    here = sum((sent.payload["label_counts"] > 0).float() for sent in log[:4])
    assert torch.allclose(log[4].inbox["prototypes"], total / here.clamp(min=1)[:, None], atol=1e-6)


def test_the_distance_changes_the_models(lab: Lab) -> None:
    models = [run(lab, {"lambda_proto": weight}).memories for weight in (0.0, 1.0)]
    first = min(models[0])
    assert not lab.same(models[0][first]["params"], models[1][first]["params"])


@pytest.mark.parametrize("answer", ["prototypes", "head"])
def test_personal_models_learn_on_different_nets(lab: Lab, answer: str) -> None:
    trial = {"fleet": {"nets": ["fedgen-cnn", "fedgen-cnn-bn"]}, "local": {"epochs": 5, "batch": 8, "lr": 0.1}}
    server = run(lab, {"answer": answer}, rounds=8, **trial)
    assert {row["role"] for row in server.rounds} == {"personal-fedgen-cnn", "personal-fedgen-cnn-bn"}
    assert sum(row["accuracy"] for row in server.rounds[-2:]) / 2 > 0.5


def test_its_needs() -> None:
    with pytest.raises(Unfit, match="one latent width"):
        config.resolve({"method": "fedproto", "holdout": {"test": 0.2}, "fleet": {"nets": ["mlp", "lenet5"]}})
