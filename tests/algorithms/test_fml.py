from __future__ import annotations

from typing import Any

import pytest
import torch

from algorithms.fml import FML
from harness import config, work
from harness.protocol import Batch
from harness.refusal import Refused
from harness.trees import mean, size, stream

PRIVATE, SHARED = torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([[1.0, 1.0, 0.0]])
ROW = Batch(torch.tensor([0]), torch.tensor([0]))


def run(lab: Any, hyper: dict[str, Any] | None = None, **trial: Any) -> Any:
    basics: dict[str, Any] = {"method": "fml", "hyper": hyper or {}, "net": "mlp", "clients": 4, "rounds": 3}
    basics |= {"local": {"epochs": 1, "batch": 16, "lr": 0.1}, "holdout": {"test": 0.2}, **trial}
    server = lab.server(work.make_setup(config.resolve(basics), lab.arrays(160))[0])
    while not server.done:
        server.step()
    return server


@pytest.mark.parametrize(("a", "b", "value"), [(0.5, 0.5, 0.853175), (1.0, 1.0, 1.103307), (0.2, 0.9, 1.110826)])
def test_both_losses(lab: Any, a: float, b: float, value: float) -> None:
    """Private logits (2, .5, -1), shared (1, 1, 0), y = 0: CE .241312 and .861995, KL(shared || private) .323519,
    KL(private || shared) .279523. a = b = .5: (.241312 + .323519 + .861995 + .279523) / 2 = .853175;
    a = .2, b = .9: .2 * .241312 + .8 * .323519 + .9 * .861995 + .1 * .279523 = 1.110826.
    """
    net, p = lab.Table(), {"private": {"logits": PRIVATE}, "shared": {"logits": SHARED}}
    found, _, seen = lab.step(FML(alpha=a, beta=b), net, p, ROW, {"net": "table"})
    assert found == pytest.approx(value, abs=2e-6)
    assert float(seen["private_ce"]) == pytest.approx(0.241312, abs=1e-6)
    assert float(seen["shared_ce"]) == pytest.approx(0.861995, abs=1e-6)


def test_each_takes_the_other_as_given(lab: Any) -> None:
    """d/dz [.5 CE + .5 KL(t || softmax z)] = .5 (p - y) + .5 (p - t): the other's loss moves nothing here."""
    net, p = lab.Table(), {"private": {"logits": PRIVATE}, "shared": {"logits": SHARED}}
    _, grads, _ = lab.step(FML(), net, p, ROW, {"net": "table"})
    own, other, y = PRIVATE.softmax(1), SHARED.softmax(1), torch.tensor([[1.0, 0.0, 0.0]])
    assert torch.allclose(grads["private"]["logits"], (own - y + own - other) / 2, atol=1e-6)
    assert torch.allclose(grads["shared"]["logits"], (other - y + other - own) / 2, atol=1e-6)


@pytest.mark.parametrize(("weighting", "value"), [("uniform", 0.8), ("samples", 0.7)])
def test_the_mean_of_the_shared_models(lab: Any, weighting: Any, value: float) -> None:
    """(.6 + 1) / 2 = .8; with 30 and 10 rows (3 * .6 + 1) / 4 = .7."""
    updates = [
        lab.update(0, {"shared": {"w": torch.tensor([0.6])}}, 30),
        lab.update(2, {"shared": {"w": torch.tensor([1.0])}}, 10),
    ]
    state = {"net": "mlp", "params": {"w": torch.zeros(1)}}
    merged = FML(weighting=weighting).merge(state, updates, lab.bench())
    assert float(merged["params"]["w"]) == pytest.approx(value)


def test_two_rounds_private_models_stay_and_shared_ones_travel(lab: Any) -> None:
    server = run(lab, rounds=2)
    log = sorted(server.pool.log, key=lambda s: (s.order.round, s.order.visit))
    first, second = log[:4], log[4:]
    for before, after in zip(first, second, strict=True):
        assert set(before.payload) == {"shared"} and set(before.inbox) == {"shared", "net"}
        assert before.memory is None and after.memory is not None
        assert not lab.same(after.memory["params"], before.payload["shared"])
    updates = {s.order.visit: s for s in second}
    assert lab.same(server.state["params"], mean([updates[v].payload["shared"] for v in sorted(updates)]))
    row = server.rounds[-1]
    assert row["role"] == "personal" and row["up_bytes"] == row["down_bytes"] > 0


def test_private_models_start_apart(lab: Any) -> None:
    net, method = lab.world().net("mlp"), FML()
    one, two = (method.remember(net, {}, stream("visit", k)) for k in (0, 1))
    assert not lab.same(one, two)


def test_private_nets_may_differ_and_the_shared_one_is_chosen(lab: Any) -> None:
    server = run(lab, {"shared_net": "lenet5"}, fleet={"nets": ["mlp", "lenet5"]})
    assert server.state["net"] == "lenet5"
    assert {row["role"] for row in server.rounds} == {"shared", "personal-mlp", "personal-lenet5"}
    sizes = {s.order.net: size(s.payload["shared"]) for s in server.pool.log}
    assert len(sizes) == 2 and len(set(sizes.values())) == 1


def test_an_unknown_shared_net_is_refused_at_once() -> None:
    with pytest.raises(Refused, match="lenet5"):
        FML(shared_net="lenet")
