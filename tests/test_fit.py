"""The hot path against torch's own modules and optimizers, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
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
from harness.fit import Kind, Optimizer, Streams, Weights, descend, visit_batches
from harness.layers import BUFFERS
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


def plain(net: Net, start: Tree, data: list[Batch], optimizer: str, **settings: float) -> Tree:
    """The same training as anybody would write it: a module, an optimizer of torch's, a loop."""
    module = net.module()
    module.load_state_dict({path.replace("/", "."): x for path, x in trees.leaves(start)}, strict=False)
    make: Any = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    rule = make(module.parameters(), foreach=False, **settings)
    for batch in data:
        rule.zero_grad()
        F.cross_entropy(module(batch.x), batch.y).backward()
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
    ],
)
def test_descending_is_torchs_optimizer_bit_for_bit(name: str, kind: Kind, settings: dict[str, float]) -> None:
    net, start = made(name)
    loss = lambda p, batch: (F.cross_entropy(net(p, batch.x), batch.y), {})  # noqa: E731
    fitted = descend(start, loss, batches(12), Optimizer(kind, **settings))
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


def visited(how: Augment | None, phase: Phase | None = None, rows: int = 21) -> tuple[Taught, Net, Tree, list[Batch]]:
    net, teacher = made("lenet5")
    rng = trees.stream("rows")
    own = Rows(torch.randn(rows, 1, 8, 8, generator=rng), torch.arange(rows) % 4, how)
    method = Taught(([],))
    streams = Streams(*(trees.stream(name) for name in ("order", "augment", "draw")))
    made_of: Iterator[Batch] = iter(
        visit_batches(
            method, net, {"teacher": teacher}, {}, phase or Phase(), own, streams, batch=8, epochs=2, drop_last=False
        )
    )
    return method, net, teacher, list(made_of)


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


@pytest.mark.parametrize("how", [None, Augment(flip=True)])
def test_a_client_without_rows_takes_no_step(how: Augment | None) -> None:
    assert visited(how, rows=0)[3] == []
