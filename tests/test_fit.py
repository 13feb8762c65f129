"""The hot path against torch's own modules and optimizers, bit for bit."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from algorithms.fedavg import FedAvg
from harness import nets, trees
from harness.batches import Rows
from harness.data import Augment
from harness.fit import Kind, Optimizer, Streams, Weights, Workbench, descend, visit_batches
from harness.layers import BUFFERS, channels_last
from harness.nets import Net
from harness.protocol import Batch, Inbox, Phase
from harness.trees import Tree

NETS = ("mlp", "lenet5", "resnet8", "fedgen-cnn-bn")


def same(a: Tree, b: Tree) -> bool:
    left, right = dict(trees.leaves(a)), dict(trees.leaves(b))
    return list(left) == list(right) and all(torch.equal(x, right[path]) for path, x in left.items())


def made(name: str) -> tuple[Net, Tree]:
    net = nets.build(name, (1, 8, 8), 4)
    return net, net.init(trees.stream("fit"))


def batches(count: int, rows: int = 6) -> list[Batch]:
    rng = trees.stream("batches")
    return [
        Batch(torch.randn(rows, 1, 8, 8, generator=rng), torch.randint(4, (rows,), generator=rng))
        for _ in range(count)
    ]


def plain(net: Net, start: Tree, data: list[Batch], optimizer: str, **settings: Any) -> Tree:
    """The same training written by hand: a module, images as convolutions like them, torch's optimizer."""
    module = net.module()
    module.load_state_dict({path.replace("/", "."): x for path, x in trees.leaves(start)}, strict=False)
    make: Any = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    rule = make(module.parameters(), foreach=False, **settings)
    for batch in data:
        rule.zero_grad()
        F.cross_entropy(module(channels_last(batch.x)), batch.y).backward()
        rule.step()
    named = iter([(path, module.state_dict()[path.replace("/", ".")]) for path, _ in trees.leaves(start)])
    return trees.tree_map(lambda x: next(named)[1], start)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("sgd", {"lr": 0.1}),
        ("sgd", {"lr": 0.05, "momentum": 0.9}),
        ("sgd", {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}),
        ("adam", {"lr": 1e-3, "weight_decay": 1e-2}),
        ("adam", {"lr": 1e-3, "betas": (0.5, 0.9)}),
    ],
)
def test_descending_is_torchs_optimizer_bit_for_bit(name: str, kind: Kind, settings: dict[str, Any]) -> None:
    net, start = made(name)
    fitted = descend(
        start, lambda p, b: (F.cross_entropy(net(p, b.x), b.y), {}), batches(12), Optimizer(kind, **settings)
    )
    assert same(fitted.tree, plain(net, start, batches(12), kind, **settings))
    assert (fitted.steps, fitted.samples) == (12, 72)


def test_heavy_ball_by_hand() -> None:
    """Loss 3 w, so that the gradient is 3; w 1, lr .1, momentum .5, decay 1.

    g = 3 + 1 = 4, v = 4, w = .6; g = 3 + .6 = 3.6, v = 2 + 3.6 = 5.6, w = .04.
    """
    data = [Batch(torch.zeros(1), torch.zeros(1))] * 2
    rule = Optimizer("sgd", lr=0.1, momentum=0.5, weight_decay=1.0)
    fitted = descend({"w": torch.tensor([1.0])}, lambda p, batch: (3 * p["w"].sum(), {}), data, rule)
    assert fitted.tree["w"].item() == pytest.approx(0.04)
    assert fitted.metrics["loss"].tolist() == pytest.approx([3.0, 1.8])


def test_a_fit_is_a_function_of_its_arguments() -> None:
    """It changes neither its start nor the batches, and its result has no gradients."""
    net, start = made("fedgen-cnn-bn")
    before, data = trees.clone(start), batches(3)
    fitted = descend(start, lambda p, b: (net(p, b.x).sum(), {}), data, Optimizer("sgd", lr=0.1))
    assert same(start, before)
    assert all(torch.equal(a.x, b.x) for a, b in zip(data, batches(3), strict=True))
    assert not any(x.requires_grad for _, x in trees.leaves(fitted.tree))
    assert not same(fitted.tree, start)


def test_buffers_and_integers_are_not_trained() -> None:
    """Weight decay 1 at lr 1 would make them 0. Running statistics move by their own rule, not by gradients."""
    start = {
        "w": torch.ones(2),
        "norm": {"norm1.running_mean": torch.ones(2), "norm1.running_var": torch.ones(2)},
        "count": torch.tensor([3]),
    }
    fitted = descend(start, lambda p, b: (p["w"].sum(), {}), batches(1), Optimizer("sgd", 1.0, weight_decay=1.0))
    assert fitted.tree["w"].tolist() == [-1.0, -1.0]
    assert all(torch.equal(fitted.tree["norm"][f"norm1.{name}"], torch.ones(2)) for name in BUFFERS)
    assert fitted.tree["count"].tolist() == [3]


def test_a_leaf_that_the_loss_does_not_use_feels_decay_alone() -> None:
    start = {"used": torch.ones(1), "idle": torch.ones(1)}
    fitted = descend(start, lambda p, b: (p["used"].sum(), {}), batches(1), Optimizer("sgd", 0.5, weight_decay=0.1))
    assert fitted.tree["idle"].item() == pytest.approx(1 - 0.5 * 0.1)


def test_one_tensor_in_two_places_is_trained_as_two() -> None:
    """Loss 2 a + 5 b at lr .1: a falls by .2 and b by .5, though both start as one tensor."""
    tied = torch.tensor([1.0])
    fitted = descend(
        {"a": tied, "b": tied}, lambda p, b: ((2 * p["a"] + 5 * p["b"]).sum(), {}), batches(1), Optimizer()
    )
    assert [fitted.tree["a"].item(), fitted.tree["b"].item()] == pytest.approx([0.98, 0.95])
    assert tied.item() == 1.0


def test_views_lie_in_the_tree_s_order() -> None:
    _, start = made("lenet5")
    weights = Weights(start)
    assert torch.equal(weights.vector, trees.flat(start))
    weights.vector.add_(1)
    assert same(weights.result(), trees.tree_map(lambda x: x + 1, start))


def test_no_batches_no_steps() -> None:
    _, start = made("mlp")
    fitted = descend(start, lambda p, b: (p["head"]["fc3.bias"].sum(), {}), [], Optimizer())
    assert same(fitted.tree, start)
    assert (fitted.steps, fitted.samples, fitted.metrics) == (0, 0, {})


def test_metrics_are_recorded_step_by_step() -> None:
    def loss(p: Tree, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return p["w"].sum(), {"rows": torch.tensor(float(len(batch.y)))}

    data = [*batches(2, rows=6), *batches(1, rows=2)]
    fitted = descend({"w": torch.ones(1)}, loss, data, Optimizer("sgd", 0.5))
    assert fitted.metrics["rows"].tolist() == [6.0, 6.0, 2.0]
    assert fitted.metrics["loss"].tolist() == [1.0, 0.5, 0.0]


def test_long_gradients_are_cut_before_weight_decay() -> None:
    """Gradient (3, 4) of norm 5, cut to norm 1: (.6, .8); decay 1 adds w = (1, 1). A short one stays: (.3, .4)."""
    rule = Optimizer("sgd", lr=1.0, weight_decay=1.0, clip=1.0)
    for slope, expected in (([3.0, 4.0], [-0.6, -0.8]), ([0.3, 0.4], [-0.3, -0.4])):
        data = [Batch(torch.tensor(slope), torch.zeros(1))]
        fitted = descend({"w": torch.ones(2)}, lambda p, b: ((b.x * p["w"]).sum(), {}), data, rule)
        assert fitted.tree["w"].tolist() == pytest.approx(expected, abs=1e-5)


# ---- the bench


def bench(rows: int = 10, **changes: Any) -> Workbench:
    own = Rows(torch.arange(float(rows)), torch.arange(rows))
    basics: dict[str, Any] = {"key": (0, "visit", 3), "device": torch.device("cpu"), "world": None, "batch": 4}
    counts = torch.zeros(4, dtype=torch.int64)
    return Workbench(
        **{**basics, **changes}, label_counts=counts, sources={"private": lambda: own, "proxy": lambda: own}
    )


def test_a_scan_sees_every_row_once_and_in_order() -> None:
    at = bench()
    weight = torch.ones(1, requires_grad=True)
    found = at.scan(lambda x, y: (x * weight, y))
    assert [y.tolist() for _, y in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert not any(x.requires_grad for x, _ in found)
    assert (at.samples, at.steps) == (10, 0)


def test_a_sample_has_no_row_twice() -> None:
    at = bench()
    batch = at.sample(7, at.rng("a"))
    assert len(set(batch.y.tolist())) == 7
    assert torch.equal(batch.x, batch.y.float())
    assert torch.equal(at.sample(7, at.rng("a")).y, batch.y)
    assert not torch.equal(at.sample(7, at.rng("b")).y, batch.y)
    assert sorted(at.sample(99, at.rng("a")).y.tolist()) == list(range(10))  # no more than there are


def test_the_streams_of_a_bench_follow_its_key() -> None:
    first = [
        bench(key=key).rng("noise").initial_seed() for key in ((0, "visit", 3), (0, "visit", 4), (0, "visit", 3))
    ]
    assert first[0] == first[2] != first[1]


def test_a_fit_on_the_bench_is_torchs_adam_under_a_cosine() -> None:
    """Bit for bit, with the rate lr (1 + cos(pi s / S)) / 2 at step s of S; its steps and rows are counted."""
    net, start = made("mlp")
    data, at = batches(6), bench()
    fitted = at.fit(
        start,
        lambda p, b: F.cross_entropy(net(p, b.x), b.y),
        lambda s: data[s],
        6,
        lr=1e-3,
        weight_decay=0.1,
        cosine=True,
    )
    module = net.module()
    module.load_state_dict({path.replace("/", "."): x for path, x in trees.leaves(start)})
    rule = torch.optim.Adam(module.parameters(), weight_decay=0.1, foreach=False)
    for step, batch in enumerate(data):
        rule.param_groups[0]["lr"] = 1e-3 * (0.5 + 0.5 * math.cos(math.pi * step / 6))
        rule.zero_grad()
        F.cross_entropy(module(channels_last(batch.x)), batch.y).backward()
        rule.step()
    assert all(torch.equal(x, module.state_dict()[path.replace("/", ".")]) for path, x in trees.leaves(fitted))
    assert (at.steps, at.samples) == (6, 36)


def test_moments_carry_adam_from_fit_to_fit() -> None:
    """Twice three steps are six steps, bit for bit; without them the second fit starts anew."""
    net, start = made("mlp")
    data, at = batches(6), bench()

    def fit(p: Tree, first: int, steps: int, moments: Tree | None) -> Tree:
        loss = lambda p, b: F.cross_entropy(net(p, b.x), b.y)  # noqa: E731
        return at.fit(p, loss, lambda s: data[first + s], steps, lr=1e-2, betas=(0.5, 0.9), moments=moments)

    moments: Tree = {}
    whole = fit(start, 0, 6, {})
    assert same(fit(fit(start, 0, 3, moments), 3, 3, moments), whole)
    assert not same(fit(fit(start, 0, 3, None), 3, 3, None), whole)


def test_a_cosine_by_hand() -> None:
    """Slope 1 at lr .1 for two steps, factors 1 and (1 + cos(pi / 2)) / 2 = .5: 1 - .1 - .05."""
    start, one = {"w": torch.ones(1)}, batches(1)[0]
    fitted = bench().fit(start, lambda p, b: p["w"].sum(), lambda s: one, 2, optimizer="sgd", lr=0.1, cosine=True)
    assert fitted["w"].item() == pytest.approx(0.85)


# ---- the batches of a visit


@dataclass(frozen=True)
class Taught(FedAvg):
    """A method with a teacher and noise; counts how its hooks are called."""

    asked: tuple[list[int], ...] = ([],)

    def teach(self, net: Net, x: Tensor, inbox: Inbox, memory: Tree) -> dict[str, Tensor]:
        self.asked[0].append(len(x))
        return {"teacher": net.frozen(inbox["teacher"], x), "mean": x.mean((1, 2, 3))}

    def draw(self, net: Net, batch: Batch, inbox: Inbox, memory: Tree, rng: torch.Generator) -> Batch:
        return batch.with_extra(noise=torch.randn(len(batch.y), generator=rng))


def visited(
    how: Augment | None, phase: Phase | None = None, rows: int = 21, work: float = 1.0
) -> tuple[Taught, Net, Tree, list[Batch]]:
    net, teacher = made("lenet5")
    rng = trees.stream("rows")
    own = Rows(torch.randn(rows, 1, 8, 8, generator=rng), torch.arange(rows) % 4, how)
    method = Taught(([],))
    streams = Streams(*(trees.stream(name) for name in ("order", "augment", "draw")))
    amount: dict[str, Any] = {"batch": 8, "epochs": 2, "work": work, "drop_last": False}
    found = visit_batches(method, net, {"teacher": teacher}, {}, phase or Phase(), own, streams, **amount)
    return method, net, teacher, list(found)


@pytest.mark.parametrize("how", [None, Augment(flip=True, crop_pad=1)])
def test_what_teachers_say_belongs_to_the_rows_of_the_batch(how: Augment | None) -> None:
    """Computed once per visit where inputs stay the same, and at each step where they are augmented."""
    method, net, teacher, data = visited(how)
    assert [len(b.y) for b in data] == [8, 8, 5, 8, 8, 5]
    for batch in data:
        assert torch.equal(batch.extra["mean"], batch.x.mean((1, 2, 3)))
        assert torch.allclose(batch.extra["teacher"], net.frozen(teacher, batch.x), atol=1e-5)
        assert batch.extra["noise"].shape == batch.y.shape
    assert method.asked[0] == ([21] if how is None else [8, 8, 5, 8, 8, 5])


def test_the_streams_of_a_visit_are_independent() -> None:
    """Augmentation changes neither the order of the rows nor the method's own draws."""
    calm, wild = visited(None)[3], visited(Augment(flip=True))[3]
    for a, b in zip(calm, wild, strict=True):
        assert torch.equal(a.y, b.y)
        assert torch.equal(a.extra["noise"], b.extra["noise"])
    assert not all(torch.equal(a.x, b.x) for a, b in zip(calm, wild, strict=True))


def test_a_phase_has_its_own_passes_and_name() -> None:
    data = visited(None, Phase("digest", epochs=1))[3]
    assert [len(b.y) for b in data] == [8, 8, 5]
    assert {b.phase for b in data} == {"digest"}


def test_a_slow_client_does_a_share_of_the_batches() -> None:
    """Half of two passes of three batches is the first pass."""
    whole, half = visited(None)[3], visited(None, work=0.5)[3]
    assert [b.y.tolist() for b in half] == [b.y.tolist() for b in whole[:3]]


@pytest.mark.parametrize("how", [None, Augment(flip=True)])
def test_a_client_without_rows_takes_no_step(how: Augment | None) -> None:
    assert visited(how, rows=0)[3] == []


def test_a_visit_leaves_no_rows_behind(lab: Any) -> None:
    """Without waiting for Python's search for cycles: the rows of a client can be as large as the data set."""
    server = lab.server(lab.setup())
    host, seen = server.pool.host, []
    rows = host._rows
    host._rows = lambda *given: [seen.append(weakref.ref(found := rows(*given))), found][1]
    gc.disable()
    try:
        server.step()
        assert len(seen) == 4 and not any(ref() for ref in seen)
    finally:
        gc.enable()
