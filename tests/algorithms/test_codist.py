"""Codistillation between pools."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from algorithms.codist import Codist
from algorithms.fedadam import FedAdam
from harness.batches import Rows
from harness.checkpoint import pack, unpack
from harness.fit import Workbench
from harness.protocol import Role, World
from harness.refusal import Refused
from harness.server import Server
from harness.trees import Tree, clone, stream

if TYPE_CHECKING:
    from tests.conftest import Lab

LEVELS = (0, 1, 0, 1)
TRIAL = {"proxy": {"source": "train", "rows": 16}, "fleet": {"nets": ["mlp", "lenet5"]}}


def begin(lab: Lab, method: Any, hyper: dict[str, Any] | None = None, **trial: Any) -> Server:
    """A trial of two pools, "mlp" for all four clients and "lenet5" for clients 1 and 3, with 16 proxy rows."""
    setup, arrays = lab.setup(method, hyper, **{**TRIAL, **trial}), lab.arrays(16)
    split = replace(setup.split, levels=LEVELS)
    return lab.server(replace(setup, proxy=(arrays.x_train, arrays.y_train), split=split))


def run(lab: Lab, method: Any, hyper: dict[str, Any] | None = None, **trial: Any) -> Server:
    server = begin(lab, method, hyper, **trial)
    while not server.done:
        server.step()
    return server


@dataclass(frozen=True)
class FedAdamAs(FedAdam):
    """FedAdam whose one role has the name, the net and the clients of a pool, and so the same random streams."""

    needs: ClassVar[frozenset[str]] = frozenset()

    pool: str = "mlp"

    def roles(self, world: World) -> dict[str, Role]:
        return {self.pool: Role(self.pool, None if self.pool == "mlp" else (1, 3), 4)}


@dataclass
class Moved(Workbench):
    """A bench whose training always ends at the same place."""

    def fit(self, p: Tree, *rest: Any, **more: Any) -> Tree:
        return {"logits": torch.full_like(p["logits"], 0.7)}


# ---- the formulas


@pytest.mark.parametrize(("alpha", "wanted"), [(0.0, 1.071429), (0.3, 0.912121), (1.0, 0.903226)])
def test_merged_by_hand(lab: Lab, alpha: float, wanted: float) -> None:
    """theta = 1, clients .8 (n = 100) and 1.1 (n = 300): mean 1.025, delta D = .025; distilled .7: E = -.3. lr .1.

    g = (1 - alpha) D + alpha E; Adam's first step is .1 * .1 g / (.1 |g| + .001).
    alpha 0: .1 * .0025 / .0035 = .071429. alpha .3: g = .0175 - .09 = -.0725, -.1 * .00725 / .00825 = -.087879.
    alpha 1: -.1 * .03 / .031 = -.096774.
    """
    net, method = lab.Table(classes=1), Codist(alpha=alpha)
    world = lab.world(net=net, nets=("table", "table"), levels=LEVELS, proxy_rows=1)
    state = method.init(world, stream("test"))
    state["params"] = {pool: {"logits": torch.ones(1, 1)} for pool in state["params"]}
    assert list(state["params"]) == ["table", "table-1"]
    updates = [
        lab.update(0, {"params": {"logits": torch.tensor([[0.8]])}}, samples=100, role="table"),
        lab.update(1, {"params": {"logits": torch.tensor([[1.1]])}}, samples=300, role="table"),
    ]
    plain = lab.bench(world, proxy=Rows(torch.tensor([0]), torch.tensor([-1]), None))
    merged = method.merge(state, updates, Moved(**vars(plain)))
    assert merged["params"]["table"]["logits"].item() == pytest.approx(wanted, abs=1e-6)


def test_moments_go_on_over_rounds(lab: Lab) -> None:
    """FedAdam's vector: deltas .5 and -.2 from 0 at lr .1 give .098039 and .143811; the other pool stays at 0."""
    net, method = lab.Table(classes=1), Codist(mode="separate")
    world = lab.world(net=net, nets=("table", "table"), levels=LEVELS)
    state = method.init(world, stream("test"))
    for round, (delta, wanted) in enumerate([(0.5, 0.098039), (-0.2, 0.143811)]):
        end = state["params"]["table"]["logits"] + delta
        update = lab.update(0, {"params": {"logits": end}}, role="table")
        state = method.merge(state, [update], lab.bench(world, round))
        assert state["params"]["table"]["logits"].item() == pytest.approx(wanted, abs=1e-6)
        assert state["params"]["table-1"]["logits"].item() == 0


def test_each_learns_from_the_mean_probability_of_the_others_as_they_were(lab: Lab) -> None:
    """Three pools of one net with logits (2, 0), (0, 0), (-2, 0); p_0 = .880797, .5, .119203. The first learns from
    the mean of the last two, .309601, and so on. After a long pass each has what the others had: simultaneous.
    """
    net = lab.Table(classes=2)
    method = Codist(mode="periodic", period=1, proxy_steps=400, proxy_batch=1, proxy_lr=0.02, tau=1.0)
    world = lab.world(net=net, nets=("table",) * 3, levels=(0, 1, 2, 2), proxy_rows=1)
    state = method.init(world, stream("test"))
    for pool, logit in zip(state["params"], (2.0, 0.0, -2.0), strict=True):
        state["params"][pool] = {"logits": torch.tensor([[logit, 0.0]])}
    bench = lab.bench(world, proxy=Rows(torch.tensor([0]), torch.tensor([-1]), None))
    after = method.merge(state, [], bench)["params"]
    said = [p["logits"].softmax(-1)[0, 0].item() for p in after.values()]
    assert said == pytest.approx([0.309601, 0.5, 0.690399], abs=1e-3)
    assert bench.steps == 1200


# ---- whole trials


@pytest.mark.parametrize("pool", ["mlp", "lenet5"])
@pytest.mark.parametrize("hyper", [{"alpha": 0.0}, {"mode": "separate"}])
def test_without_distillation_each_pool_is_fedadam_bit_for_bit(lab: Lab, hyper: dict[str, Any], pool: str) -> None:
    server = begin(lab, "codist", hyper)
    start = {name: clone(p) for name, p in server.state["params"].items()}
    while not server.done:
        server.step()
    alone = begin(lab, FedAdamAs(pool=pool), net=pool)
    alone.state["params"] = start[pool]
    while not alone.done:
        alone.step()
    assert lab.same(server.state["params"][pool], lab.model(alone))


def test_one_pool_without_distillation_is_fedadam(lab: Lab) -> None:
    assert lab.same(lab.model(lab.run("codist", {"alpha": 0.0})), lab.model(lab.run("fedadam")))


def test_alpha_1_is_distillation_only(lab: Lab) -> None:
    """What clients do, here at another rate, changes nothing; with alpha .5 it does."""
    for alpha, equal in ((1.0, True), (0.5, False)):
        ends = [run(lab, "codist", {"alpha": alpha}, local={"lr": lr}).state["params"] for lr in (0.1, 0.01)]
        assert lab.same(*ends) is equal


def test_periodic_distils_every_p_rounds_only(lab: Lab) -> None:
    """p = 2, s = 3 in 3 rounds: after round 1, three steps for each of two pools. Until then it is FedAdam."""
    server, separate = (begin(lab, "codist", h) for h in ({"mode": "periodic", "period": 2, "proxy_steps": 3},
                                                          {"mode": "separate"}))  # fmt: skip
    for equal in (True, False, False):
        server.step()
        separate.step()
        assert lab.same(server.state["params"], separate.state["params"]) is equal
    assert [r["server_steps"] for r in server.rounds if r["role"] == "mlp"] == [0, 6, 0]


def test_budgets_of_the_modes_match_by_default(lab: Lab) -> None:
    """10 rounds: p = s = 2 and five passes of two steps, or one step in each of ten rounds; for each of two pools."""
    for mode, wanted in (("separate", 0), ("periodic", 20), ("merged", 20)):
        server = run(lab, "codist", {"mode": mode}, rounds=10)
        assert sum(row["server_steps"] for row in server.rounds) == wanted


def test_order_of_the_pools_does_not_matter(lab: Lab) -> None:
    net = lab.Table(classes=2)
    method = Codist(alpha=1.0, proxy_steps=3, proxy_batch=1)
    world = lab.world(net=net, nets=("table", "table"), levels=LEVELS, proxy_rows=1)
    rows = Rows(torch.tensor([0]), torch.tensor([-1]), None)
    ends = []
    for order in (1, -1):
        state = method.init(world, stream("test"))
        values = {"table": {"logits": torch.tensor([[1.0, 0.0]])}, "table-1": {"logits": torch.tensor([[0.0, 3.0]])}}
        state["params"] = dict(list(values.items())[::order])
        ends.append(method.merge(state, [], lab.bench(world, proxy=rows))["params"])
    assert all(lab.same(ends[0][pool], ends[1][pool]) for pool in ends[0])


def test_kept_moments_change_the_second_pass_not_the_first(lab: Lab) -> None:
    fresh, kept = (begin(lab, "codist", {"fresh_adam": flag}) for flag in (True, False))
    for equal in (True, False):
        fresh.step()
        kept.step()
        assert lab.same(fresh.state["params"], kept.state["params"]) is equal
    assert kept.state["adam"]["mlp"]["step"].item() == 2


def test_what_is_kept_survives_a_checkpoint(lab: Lab) -> None:
    """Moments of FedAdam, and of the distillation where they are kept; empty before the first round."""
    server = begin(lab, "codist", {"fresh_adam": False})
    for _ in range(2):
        restored = unpack(pack(server.state))
        assert lab.same(restored, server.state)
        assert restored["adam"].keys() == server.state["adam"].keys()
        server.step()


# ---- who trains what


@pytest.mark.parametrize(
    ("pools", "cohort", "wanted"),
    [
        ("capacity", "equal", {"a": ((0, 1, 2, 3, 4, 5), 3), "b": ((1, 3, 5), 3), "a-2": ((5,), 3)}),
        ("domain", "equal", {"a": ((0, 2, 4), 3), "b": ((1, 3), 3), "a-2": ((5,), 3)}),
        ("domain", "share", {"a": ((0, 2, 4), None), "b": ((1, 3), None), "a-2": ((5,), None)}),
    ],
)
def test_pools(lab: Lab, pools: Any, cohort: Any, wanted: dict[str, Any]) -> None:
    """Six clients of levels 0, 1, 0, 1, 0, 2, half of them a round: capable ones may train smaller nets, too."""
    world = lab.world(sizes=(10,) * 6, nets=("a", "b", "a"), levels=(0, 1, 0, 1, 0, 2), participation=0.5)
    roles = Codist(pools=pools, cohort=cohort).roles(world)
    assert {name: (role.clients, role.cohort) for name, role in roles.items()} == wanted
    assert [role.net for role in roles.values()] == ["a", "b", "a"]


def test_a_capable_client_is_visited_for_both_nets(lab: Lab) -> None:
    server = run(lab, "codist", rounds=1)
    visits = {(sent.order.visit.client, sent.order.visit.role) for sent in server.pool.log}  # type: ignore[attr-defined]
    assert visits == {(k, "mlp") for k in range(4)} | {(1, "lenet5"), (3, "lenet5")}
    costs = {row["role"]: row["up_bytes"] for row in server.rounds}
    assert costs["mlp"] > 0 and costs["lenet5"] > 0


def test_what_it_needs_follows_the_mode(lab: Lab) -> None:
    assert Codist().needs == Codist(mode="periodic", alpha=0.0).needs == {"proxy", "fleet"}
    assert Codist(mode="separate").needs == Codist(alpha=0.0).needs == frozenset()
    with pytest.raises(Refused, match="data on the server"):
        lab.setup("codist", fleet=TRIAL["fleet"])
    with pytest.raises(Refused, match="two nets or more"):
        lab.setup("codist", proxy=TRIAL["proxy"])
