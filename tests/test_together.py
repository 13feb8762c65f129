"""Visits trained at once are those trained one by one, up to rounding; and who is trained with whom never depends on
where or when.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from algorithms.fedavg import FedAvg
from harness import config, nets, registry, rig, together, trees
from harness.config import Execution
from harness.fit import Fitted, Optimizer, Training
from harness.fit import train as plainly
from harness.inline import InlinePool
from harness.losses import cross_entropy
from harness.nets import Net
from harness.pool import RayPool
from harness.protocol import Batch, Broadcast, Inbox, Phase
from harness.server import Server
from harness.settings import Unfit
from harness.trees import Tree
from harness.watch import BoundedPool, difference, prints
from harness.work import Answer, Asked, Setup, WorkFailed

CLOCKS = {"seconds", "server_seconds"}
# Hyper-parameters with which methods show by round 3 what they do later.
AWAKE = {"codist": {"mode": "periodic", "period": 1}, "fedcog": {"start_round": 1, "input_steps": 2}}
AWAKE["groupmd"] = {"warm_rounds": 1, "patience": 1}
# Sizes of the groups that five clients make in each of three rounds, where it is not one of all or of each net.
ALL, BY_NET = [5], [3, 2]
APART: dict[str, tuple[str, list[list[int]]]] = {
    "central": ("there is one client", [[], [], []]),
    "codist": ("the small net is for all, the large one for some", [[5], [2]] * 3),
    "fedcog": (
        "made inputs are as many as a client lacks, and the share of real rows is a number of the client",
        [[5], [1] * 5, [1] * 5],
    ),
    "fedproto": ("the second net of one latent width has running statistics", [[3], [1, 1]] * 3),
    "groupmd": (
        "clients have other teachers by name, and weights that are numbers",
        [[3], [2], *[[1] * 3, [1] * 2] * 2],
    ),
}


class Log:
    """What became of every group: its size, and why it was not trained together if it was not."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.groups: list[list[int]] = []
        self.trained: list[int] = []
        self.apart: list[str] = []
        sort, train = together.groups, together.train

        def sorted_(trainings: Sequence[Training]) -> list[list[int]]:
            found = sort(trainings)
            self.groups.append([len(group) for group in found])
            return found

        def watched(group: Sequence[Training], *how: Any) -> list[Fitted]:
            try:
                done = train(group, *how)
            except Exception as error:
                self.apart.append(f"{type(error).__name__}: {error}")
                raise
            self.trained.append(len(group))
            return done

        patch.setattr(together, "groups", sorted_)
        patch.setattr(together, "train", watched)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    return Log(monkeypatch)


@pytest.fixture(autouse=True)
def _float_mode() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)  # hosts turn it on


def near(a: Mapping[str, Any], b: Mapping[str, Any], rtol: float = 1e-4, atol: float = 1e-5) -> bool:
    left, right = list(trees.leaves(a)), dict(trees.leaves(b))
    return [path for path, _ in left] == list(right) and all(
        x.dtype == right[path].dtype and torch.allclose(x, right[path], rtol=rtol, atol=atol) for path, x in left
    )


def alike(plain: Answer, stacked: Answer | WorkFailed) -> bool:
    """All that a visit answers, but for its clock."""
    assert not isinstance(stacked, WorkFailed), stacked
    one, other = plain[0], stacked[0]
    same = replace(one, metrics={}, seconds=0.0) == replace(other, metrics={}, seconds=0.0, alone="")
    metrics = one.metrics.keys() == other.metrics.keys() and other.metrics == pytest.approx(one.metrics, 1e-4, 1e-5)
    return same and metrics and near(plain[1], stacked[1]) and near(plain[2], stacked[2])


class Twice(BoundedPool):
    """Does visits one by one, which is how the trial goes on, and together."""

    def visits(self, asked: Sequence[Asked]) -> list[Answer | WorkFailed]:
        plain = [self.host.visit(*one) for one in asked]
        assert all(map(alike, plain, self.host.visits(asked)))
        return [*plain]


def at_once(setup: Setup, size: int, **more: Any) -> Setup:
    """The same trial with so many visits together."""
    return replace(setup, trial=config.resolve({**setup.trial.model_dump(), "together": size, **more}))


def twice(setup: Setup) -> None:
    done = rig.server(setup, Twice())
    while not done.done:
        done.step()


# ---- the same numbers


@pytest.mark.parametrize("method", registry.names())
def test_every_method_gets_the_numbers_of_the_loop(method: str, log: Log) -> None:
    """Five clients of 17, 9, 3, 14 and 12 rows in batches of 8, momentum .5: ragged batches, other numbers of steps.

    Whoever falls back to the loop is listed here, with the reason: nobody does so unseen.
    """
    hyper = AWAKE.get(method, {})
    needs = registry.make(method, hyper).needs
    setup = rig.tiny(method, hyper, needs, participation=1.0)
    twice(at_once(setup, 5))
    usual = [BY_NET[:1], BY_NET[1:]] if setup.trial.fleet.nets else [ALL]
    _, expected = APART.get(method, ("", usual * 3))
    assert log.groups == [group for group in expected if group]
    assert log.trained == [size for group in expected for size in group if size > 1]
    assert log.apart == []


@pytest.mark.parametrize(
    ("method", "hyper", "more"),
    [
        ("fedavg", {}, {"net": "lenet5"}),
        (
            "scaffold",
            {},
            {"net": "fedgen-cnn", "local": {**rig.LOCAL, "weight_decay": 0.1, "clip": 0.5, "momentum": 0.9}},
        ),
        ("fedavg", {}, {"availability": {"stragglers": 0.5}, "local": {**rig.LOCAL, "epochs": 4}}),
        ("kdia", {}, {"net": "kdia-lenet"}),
        ("moon", {}, {"net": "lenet5+attention", "local": {**rig.LOCAL, "drop_last": True}}),
        ("fedakd", {"variant": "client_side"}, {}),
    ],
)
def test_other_nets_and_settings(method: str, hyper: dict[str, Any], more: dict[str, Any], log: Log) -> None:
    needs = registry.make(method, hyper).needs
    twice(at_once(rig.tiny(method, hyper, needs, participation=1.0), 5, **more))
    assert log.trained == [5] * 3


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16)])
@pytest.mark.parametrize("name", ["mlp", "lenet5", "resnet8", "mcmahan-cnn"])
@pytest.mark.parametrize(
    "rule",
    [
        Optimizer("sgd", 0.05),
        Optimizer("sgd", 0.05, 0.9, 1e-2),
        Optimizer("sgd", 0.05, 0.5, 1e-2, clip=0.5),
    ],
)
def test_every_rule_of_the_optimizer_is_one_visits_own(name: str, shape: tuple[int, ...], rule: Optimizer) -> None:
    """Each has a norm to clip and a velocity of its own. Two phases: the second begins without velocity.

    In double precision, where rounding turns no unit on or off that was near zero.
    """
    group = [training(nets.build(name, shape, 4), i, steps, torch.float64) for i, steps in enumerate((3, 1, 0, 2))]
    for one, stacked in zip(group, together.train(group, loss, rule), strict=True):
        plain = plainly(one, loss, rule)
        assert near(plain.tree, stacked.tree, 1e-9, 1e-11)
        assert near(plain.metrics, stacked.metrics, 1e-9, 1e-11)
        assert (plain.steps, plain.samples) == (stacked.steps, stacked.samples)


def test_tokens_are_trained_together() -> None:
    net = nets.build("gru-small", (6,), 20)
    group = [training(net, i, 2) for i in range(3)]
    done = together.train(group, loss, Optimizer("sgd", 0.1))
    assert all(
        near(plainly(one, loss, Optimizer("sgd", 0.1)).tree, f.tree) for one, f in zip(group, done, strict=True)
    )


def loss(net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
    ce = cross_entropy(net(p, batch.x), batch.y, batch.mask)
    return ce + 0.1 * trees.sq_distance(p["head"], memory["head"]) * inbox["weight"], {"ce": ce.detach()}


def training(net: Net, client: int, steps: int, dtype: torch.dtype = torch.float32, **inbox: Any) -> Training:
    """Two phases of so many steps on noise, the last one of fewer rows. An inbox that is one object for all."""

    def begin() -> Any:
        rng = trees.stream("batches", client)

        def batch(rows: int, phase: Phase) -> Batch:
            shape = (rows, *net.input_shape)
            x = (
                torch.randint(20, shape, generator=rng)
                if len(shape) == 2
                else torch.randn(shape, generator=rng, dtype=dtype)
            )
            return Batch(x, torch.randint(4, (rows,), generator=rng), phase=phase.name)

        return lambda phase: [batch(6 if i + 1 < steps else 1 + client, phase) for i in range(steps)]

    start = trees.tree_map(lambda p: p.to(dtype), net.init(trees.stream("start", client)))
    memory = {"head": trees.scale(start["head"], 0.5)}
    phases = (Phase("first"), Phase("second", lr_factor=0.5))
    return Training(net, start, {"weight": SHARED, **inbox}, memory, phases, begin)


SHARED = torch.tensor(0.5)


# ---- who is trained with whom


def test_visits_of_one_kind_make_a_group() -> None:
    """Tensors may differ in their values, everything else may not; running statistics keep a visit apart."""
    mlp, lenet, norm = (nets.build(name, (1, 8, 8), 4) for name in ("mlp", "lenet5", "fedgen-cnn-bn"))
    a, b = training(mlp, 0, 1, t=torch.ones(2)), training(mlp, 1, 1, t=torch.zeros(2))
    longer, other = training(mlp, 2, 1, t=torch.ones(3)), training(mlp, 3, 1, t=torch.ones(2), tau=2.0)
    phase = replace(a, phases=(Phase("first"),))
    met = replace(a, memory={**a.memory, "met": 1})
    deep = replace(a, inbox={**a.inbox, "t": [torch.ones(2)]})
    kinds = [a, b, longer, other, phase, met, deep, training(lenet, 0, 1), training(norm, 0, 1), training(norm, 1, 1)]
    assert together.groups([*kinds, b]) == [[0, 1, 10], *([i] for i in range(2, 10))]


def test_a_loss_that_does_not_heed_its_mask_is_found() -> None:
    """With even batches it needs no mask."""

    def unmasked(net: Net, p: Tree, batch: Batch, *given: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return cross_entropy(net(p, batch.x), batch.y), {}

    net = nets.build("mlp", (1, 8, 8), 4)
    rule = Optimizer("sgd", 0.1)
    with pytest.raises(together.Apart, match="is another one"):
        together.train(
            [training(net, i, 2) for i in range(3)], unmasked, rule
        )  # the last batches: of 1, 2 and 3 rows
    even = [training(net, 3, 2), replace(training(net, 3, 2), start=net.init(trees.stream("other")))]
    for one, stacked in zip(even, together.train(even, unmasked, rule), strict=True):
        assert near(plainly(one, unmasked, rule).tree, stacked.tree)


def test_a_metric_that_does_not_heed_its_mask_is_found() -> None:
    def counted(net: Net, p: Tree, batch: Batch, *given: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return cross_entropy(net(p, batch.x), batch.y, batch.mask), {"rows": torch.ones_like(batch.y).sum()}

    net = nets.build("mlp", (1, 8, 8), 4)
    with pytest.raises(together.Apart):
        together.train([training(net, i, 2) for i in range(2)], counted, Optimizer("sgd", 0.1))


@dataclass(frozen=True)
class Unmasked(FedAvg):
    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        return cross_entropy(net(p, batch.x), batch.y), {}


@dataclass(frozen=True)
class Branching(FedAvg):
    """Python looks at a number, which vmap refuses."""

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        value, seen = super().loss(net, p, batch, inbox, memory)
        return (value if value.item() > 1 else 2 * value), seen


@pytest.mark.parametrize("method", [Unmasked(), Branching()])
def test_who_can_not_be_stacked_gets_the_bits_of_the_loop(lab: Any, log: Log, method: FedAvg) -> None:
    done = lab.run(method, together=4)
    assert marks(done) == marks(lab.run(method))
    assert len(log.apart) == 3
    assert [(e["kind"], e["round"]) for e in done.events] == [("trained_alone", 0)]
    assert log.apart[0][:60] in done.events[0]["detail"]


def test_running_statistics_get_the_bits_of_the_loop(lab: Any, log: Log) -> None:
    done = lab.run(net="fedgen-cnn-bn", together=4)
    assert marks(done) == marks(lab.run(net="fedgen-cnn-bn"))
    assert [e["kind"] for e in done.events] == ["trained_alone"]
    assert "no other visit is of its kind" in done.events[0]["detail"]
    assert log.groups == [[1] * 4] * 3


@dataclass(frozen=True)
class Raising(FedAvg):
    """Raises for the client of 8 rows."""

    where: str = "prepare"

    def prepare(self, net: Net, inbox: Inbox, memory: Tree, bench: Any) -> Inbox:
        if self.where == "prepare" and int(bench.label_counts.sum()) == 8:
            raise ValueError("bad luck")
        return inbox

    def draw(self, net: Net, batch: Batch, inbox: Inbox, memory: Tree, rng: torch.Generator) -> Batch:
        if self.where == "draw" and batch.extra["row"].numel() == 8:
            raise ValueError("bad luck")
        return batch

    def reply(self, trained: Any) -> tuple[Tree, Tree]:
        if self.where == "reply" and trained.samples == 8:
            raise ValueError("bad luck")
        return super().reply(trained)


@pytest.mark.parametrize(("where", "trained"), [("prepare", [3] * 3), ("draw", []), ("reply", [4] * 3)])
def test_what_one_visit_raises_is_its_own_failure(lab: Any, log: Log, where: str, trained: list[int]) -> None:
    """Client 2 is skipped; the others are trained, together or, where it raises in training, one by one."""
    how: Any = {"faults": {"client": "skip"}, "local": {"batch": 16}, "sizes": (3, 4, 8, 5)}
    server = lab.run(Raising(where=where), together=4, **how)
    skipped = [e for e in server.events if e["kind"] == "client_skipped"]
    assert [e["client"] for e in skipped] == [2] * 3
    assert "bad luck" in skipped[0]["detail"]
    assert len(server.events) - len(skipped) == (where == "draw")  # those that it would have been trained with
    assert log.trained == trained
    plain = lab.run(Raising(where=where), **how)
    assert near(server.state["params"], plain.state["params"])
    assert trained or marks(server) == marks(plain)


def test_a_shortage_of_memory_is_no_reason_for_other_numbers(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group is done once more, as the group that it was."""
    whole, left = together.train, [torch.cuda.OutOfMemoryError("no room")]

    def short(*how: Any) -> Any:
        if left:
            raise left.pop()
        return whole(*how)

    expected = marks(lab.run(together=4))
    monkeypatch.setattr(together, "train", short)
    server = lab.run(together=4)
    assert marks(server) == expected
    assert [e["kind"] for e in server.events] == ["out_of_memory"]


# ---- the setting


def test_the_setting_is_part_of_the_hash_where_it_is_set() -> None:
    base = {"method": "fedavg", "net": "mlp"}
    assert config.digest(config.resolve({**base, "together": 1})) == config.digest(config.resolve(base))
    assert config.digest(config.resolve({**base, "together": 4})) != config.digest(config.resolve(base))
    with pytest.raises(Unfit, match="together"):
        config.resolve({**base, "together": 0})


def test_groups_are_of_one_role_and_of_like_sizes(lab: Any) -> None:
    """Longest first, so that no group waits for one long visit; the last group of a role is what is left."""
    server = lab.server(lab.setup(sizes=(12, 20, 8, 16, 9), together=2))
    groups = server._groups(server._chunks(server._roster()))
    assert [[visit.client for visit in group] for group in groups] == [[1, 3], [0, 4], [2]]
    fleet: Any = {"nets": ["mlp", "lenet5"]}
    server = lab.server(lab.setup("codist", {"mode": "separate"}, sizes=(12, 20, 8, 16), together=3, fleet=fleet))
    groups = server._groups(server._chunks(server._roster()))
    assert all(len({visit.role for visit in group}) == 1 for group in groups)
    assert sorted(v for group in groups for v in group) == sorted(server._roster().cohort.visits)


# ---- the same bits, wherever


def marks(server: Server) -> dict[str, str]:
    """Fingerprints of all that training left behind, and of the books."""
    memories = {f"{v.client}:{v.role}": server.pool.fetch(handle) for v, handle in sorted(server.memories.items())}
    rows = [{k: v for k, v in row.items() if k not in CLOCKS} for row in (*server.rounds, *server.clients)]
    return prints({"state": server.state, "memory": memories, "rows": rows})


@dataclass(frozen=True)
class Anchored(FedAvg):
    """Clients remember a tensor of the inbox, and get personal ones that are one object where nothing is shipped."""

    def remember(self, net: Net, inbox: Inbox, rng: torch.Generator) -> Tree:
        return {"anchor": inbox["params"]["head"]}

    def broadcast(self, state: Any, cohort: Any, world: Any) -> Broadcast:
        mine = {"goal": state["params"]["latent"]}
        return Broadcast({"params": state["params"]}, {}, dict.fromkeys(cohort.visits, mine))

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        value, seen = super().loss(net, p, batch, inbox, memory)
        goals = {"head": memory["anchor"], "latent": inbox["goal"]}
        z = net.embed({**p, "latent": inbox["goal"]}, batch.x)
        far = trees.sq_distance({k: p[k] for k in goals}, goals)
        return value + far + cross_entropy(
            net.classify({**p, "head": memory["anchor"]}, z), batch.y, batch.mask
        ), seen


class Shipping(InlinePool):
    """Every visit gets copies of its own of what is not sent to all."""

    def visits(self, asked: Sequence[Asked]) -> list[Answer | WorkFailed]:
        def copy(tree: Any) -> Any:
            return None if tree is None else trees.parcel(tree).open()

        return super().visits(
            [
                (o, [copy(x) if k.startswith("visit") else x for k, x in zip(o.inboxes, parts, strict=True)], copy(m))
                for o, parts, m in asked
            ]
        )


def test_what_is_one_object_here_may_be_copies_there(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = lab.setup(Anchored(), together=4)
    here, there = (rig.server(setup, kind()) for kind in (InlinePool, Shipping))
    for server in (here, there):
        while not server.done:
            server.step()
    assert not difference(marks(here), marks(there))
    kinds: list[list[bool]] = []
    given = together._Given.__init__
    monkeypatch.setattr(together._Given, "__init__", lambda self, g: (given(self, g), kinds.append(self.personal))[0])
    for pool in (InlinePool(), Shipping()):
        rig.server(setup, pool).step()
    assert kinds[0] == kinds[1]
    assert any(kinds[0]) and not all(kinds[0])


class Killing(RayPool):
    """Kills the host that does the group of client 0 in round 1, once."""

    armed = True

    def visits(self, asked: Sequence[Asked]) -> Any:
        given = super().visits(asked)
        if self.armed and asked[0][0].round == 1:
            self.armed = False
            os.kill(self.pid(), signal.SIGKILL)
        return given

    def pid(self) -> int:
        import ray

        found: int = ray.get(self.hosts[0].__ray_call__.remote(lambda _: os.getpid()))
        return found


@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.parametrize("kind", [RayPool, Killing])
def test_hosts_change_no_bit(cluster: None, lab: Any, kind: type[RayPool]) -> None:
    """SCAFFOLD on 11 clients in groups of 4, inline, on two hosts, and on two of which one is killed."""
    import ray

    setup = lab.setup("scaffold", sizes=(12, 20, 8, 16, 9, 30, 5, 7, 21, 13, 3), net="lenet5", together=4)
    inline = InlinePool()
    inline.load(setup)
    far = kind(Execution(hosts=2), "cpu")
    far.load(setup, ray.put(setup.arrays))
    here, there = Server(setup, inline), Server(setup, far)
    for server in (here, there):
        while not server.done:
            server.step()
    for host in far.hosts:
        ray.kill(host)
    assert not difference(marks(here), marks(there))
    assert {e["kind"] for e in there.events} == ({"host_lost"} if kind is Killing else set())
