"""Trees: arithmetic against plain vectors, parcels bit for bit, and means whose bits depend on the order alone."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness import trees
from harness.trees import Tree

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=3)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int, turned: bool) -> Tensor:
    x = torch.randn(shape, generator=trees.stream(seed)).mul(100).to(dtype)
    return x.transpose(0, -1) if turned and x.dim() > 1 else x


LEAVES = st.builds(drawn, SHAPES, st.sampled_from(DTYPES), st.integers(0, 99), st.booleans())
FLOATS = st.builds(drawn, SHAPES, st.just(torch.float32), st.integers(0, 99), st.booleans())
PLAIN = st.one_of(st.integers(), st.text(max_size=3), st.booleans(), st.none(), st.tuples(st.integers()))


def nested(leaf: st.SearchStrategy[Any]) -> st.SearchStrategy[Tree]:
    return st.recursive(
        st.dictionaries(NAMES, leaf, max_size=4),
        lambda inner: st.dictionaries(NAMES, leaf | inner, max_size=3),
        max_leaves=4,
    )


def same(a: Any, b: Any) -> bool:
    """Equal with keys in the same order, types, shapes and bits."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def model(seed: int, scale: float = 1.0) -> Tree:
    """A small nested tree of floats."""
    rng = trees.stream("model", seed)
    draw = lambda *shape: scale * torch.randn(*shape, generator=rng)  # noqa: E731
    return {"a": {"weight": draw(5, 3), "bias": draw(5)}, "b": draw(7), "c": {"d": {"e": draw(2, 1, 3)}}}


def pair(first: float) -> Tree:
    return {"x": torch.tensor([float(first)]), "y": {"z": torch.tensor([first + 1.0])}}


# ---- parcels


@given(nested(LEAVES | PLAIN))
def test_a_parcel_opens_to_the_same_tree(tree: Tree) -> None:
    assert same(trees.parcel(tree).open(), tree)


@given(nested(LEAVES | PLAIN))
def test_a_parcel_survives_the_wire(tree: Tree) -> None:
    """Ray ships the skeleton pickled and the buffer beside it, read-only."""
    sent = pickle.loads(pickle.dumps(trees.parcel(tree)))
    sent.buffer.flags.writeable = False
    assert same(sent.open(), tree)


def test_an_open_parcel_shares_nothing() -> None:
    """Its buffer may lie in memory that other hosts read: writing to what was opened must not reach it."""
    tree = model(0)
    before = trees.clone(tree)
    box = trees.parcel(tree)
    opened = box.open()
    for _, x in trees.leaves(opened):
        x.add_(1)
    assert same(tree, before)
    assert same(box.open(), before)


def test_a_parcel_keeps_bits_that_do_not_equal_themselves() -> None:
    """NaN, infinities, minus zero and the smallest number, compared as integers."""
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    opened = trees.parcel({"x": x}).open()["x"]
    assert torch.equal(opened.view(torch.int32), x.view(torch.int32))


def test_a_parcel_drops_gradients() -> None:
    x = torch.ones(3, requires_grad=True)
    assert not trees.parcel({"x": x * 2}).open()["x"].requires_grad


# ---- means


def by_hand(items: list[Tree], weights: list[float]) -> np.ndarray[Any, Any]:
    rows = np.stack([trees.flat(tree).double().numpy() for tree in items])
    return np.average(rows, axis=0, weights=weights)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
@settings(max_examples=30)
def test_mean_is_the_weighted_mean(weights: list[float]) -> None:
    items = [model(i) for i in range(len(weights))]
    found = trees.flat(trees.mean(items, weights)).double().numpy()
    np.testing.assert_allclose(found, by_hand(items, weights), atol=1e-5)


@given(st.integers(1, 20), st.integers(-8, 8))
@settings(max_examples=30)
def test_the_bits_of_a_mean_depend_on_the_order_alone(count: int, power: int) -> None:
    """Not on the container, the memory layout, the unit of the weights, or on what else was averaged before."""
    items, weights = [model(i) for i in range(count)], [float(1 + i % 5) for i in range(count)]
    expected = trees.mean(items, weights)
    assert same(trees.mean(iter(items), weights), expected)
    assert same(trees.mean([trees.parcel(tree).open() for tree in items], weights), expected)
    strided = [trees.tree_map(lambda x: torch.stack([x, x], -1)[..., 0], tree) for tree in items]
    assert same(trees.mean(strided, weights), expected)
    assert same(trees.mean(items, [w * 2.0**power for w in weights]), expected)


@given(st.integers(1, 30), st.randoms())
@settings(max_examples=30)
def test_the_mean_of_a_chunk_may_be_computed_anywhere(count: int, shuffled: Any) -> None:
    """Means of chunks of 8, in any order of completion, averaged in theirs by their weights, give the mean's bits."""
    items, weights = [model(i) for i in range(count)], [float(1 + i % 3) for i in range(count)]
    chunks = list(range(0, count, 8))
    found: dict[int, tuple[Any, float]] = {}
    for start in shuffled.sample(chunks, len(chunks)):
        own = weights[start : start + 8]
        found[start] = (trees.mean(items[start : start + 8], own), sum(own))
    whole = trees.mean([found[start][0] for start in chunks], [found[start][1] for start in chunks])
    assert torch.equal(trees.flat(trees.mean(items, weights)), trees.flat(whole))


def test_the_mean_is_that_of_double_precision() -> None:
    """21 models, three chunks, the weights of the second all zero: 0 + 13 models with weights 1, 2, 3, 1, ..."""
    items = [model(i) for i in range(21)]
    weights = [0.0 if 8 <= i < 16 else 1.0 + i % 3 for i in range(21)]
    rows = torch.stack([trees.flat(item).double() for item in items])
    shares = torch.tensor(weights).double()
    expected = (shares[:, None] * rows).sum(0) / shares.sum()
    torch.testing.assert_close(trees.flat(trees.mean(items, weights)).double(), expected, rtol=1e-5, atol=1e-6)


@given(st.floats(1e-6, 1e6))
def test_a_mean_of_one_is_that_one(weight: float) -> None:
    assert same(trees.mean([model(3)], [weight]), model(3))


def test_equal_weights_are_the_default() -> None:
    items = [model(i) for i in range(11)]
    assert same(trees.mean(iter(items)), trees.mean(items, [7.0] * 11))


def test_a_weight_of_zero_leaves_a_tree_out() -> None:
    assert same(trees.mean([model(0), model(1)], [1.0, 0.0]), model(0))


@pytest.mark.parametrize("weights", [[0.0, 0.0], [float("nan"), 1.0], [1.0, -1.0]])
def test_a_mean_needs_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="more than zero"):
        trees.mean([model(0), model(1)], weights)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0]])
def test_a_mean_needs_one_weight_per_tree(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"zip\(\)"):
        trees.mean([model(0), model(1)], weights)


@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_mean_changes_nothing_that_it_is_given(count: int) -> None:
    items = [model(i) for i in range(count)]
    result = trees.mean(items)
    for _, x in trees.leaves(result):
        x.add_(1)
    assert all(same(tree, model(i)) for i, tree in enumerate(items))


def test_one_tensor_in_two_places_is_two_leaves() -> None:
    """A tied weight: ( (1 + 3) / 2 = 2 in both places, not twice the sum ), and 2 * 2 numbers on the wire."""
    tied = [{"a": x, "b": {"c": x}} for x in (torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0]))]
    assert same(trees.mean(tied), {"a": torch.tensor([2.0, 2.0]), "b": {"c": torch.tensor([2.0, 2.0])}})
    assert trees.size(tied[0]) == 4
    opened, copied = trees.parcel(tied[0]).open(), trees.clone(tied[0])
    for tree in (opened, copied):
        tree["a"].add_(1)
        assert tree["b"]["c"].tolist() == [1.0, 1.0]


def test_means_by_name() -> None:
    """Each is the `mean` of its members, in order; by hand (1 * 1 + 3 * 5) / 4 = 4."""
    items = [("a", model(1), 1.0), ("b", model(2), 7.0), ("a", model(3), 3.0)]
    found = trees.means(items)
    assert list(found) == ["a", "b"]
    assert same(found["a"], trees.mean([model(1), model(3)], [1.0, 3.0]))
    assert same(found["b"], model(2))
    small = trees.means(("a", {"w": torch.tensor([w])}, n) for w, n in ((1.0, 1.0), (5.0, 3.0)))
    assert small["a"]["w"].item() == 4.0


# ---- vectors


@given(nested(FLOATS).filter(lambda tree: any(True for _ in trees.leaves(tree))))
def test_flat_and_unflat(tree: Tree) -> None:
    vector = trees.flat(tree)
    assert vector.shape == (trees.size(tree),)
    again = trees.unflat(vector, like=tree)
    assert same(again, tree)
    vector.zero_()  # views, not copies
    assert not trees.flat(again).any()


def test_flat_is_a_copy() -> None:
    tree = {"x": torch.ones(3)}
    trees.flat(tree).zero_()
    assert tree["x"].tolist() == [1.0, 1.0, 1.0]


def test_arithmetic_is_that_of_vectors() -> None:
    a, b = model(1), model(2)
    x, y = trees.flat(a), trees.flat(b)
    assert torch.equal(trees.flat(trees.add(a, b)), x + y)
    assert torch.equal(trees.flat(trees.add(a, b, scale=-0.25)), x - 0.25 * y)
    assert torch.equal(trees.flat(trees.sub(a, b)), x - y)
    assert torch.equal(trees.flat(trees.scale(a, 3.0)), 3 * x)
    assert torch.equal(trees.flat(trees.zeros(a)), torch.zeros_like(x))
    assert torch.allclose(trees.dot(a, b), x @ y)
    assert torch.allclose(trees.sq_distance(a, b), (x - y).square().sum())


def test_products_pair_leaves_by_name() -> None:
    """1 * 3 + 2 * 4, though the second tree has its leaves in another order; (1 - 3)^2 + (2 - 4)^2."""
    a = {"x": torch.tensor([1.0]), "y": torch.tensor([2.0])}
    b = {"y": torch.tensor([4.0]), "x": torch.tensor([3.0])}
    assert float(trees.dot(a, b)) == 11.0
    assert float(trees.sq_distance(a, b)) == 8.0


def test_products_have_gradients() -> None:
    """d<p, q>/dp = q and d|p - q|^2/dp = 2 (p - q)."""
    q = model(2)
    for fn, expected in ((trees.dot, trees.flat(q)), (trees.sq_distance, 2 * (trees.flat(model(1)) - trees.flat(q)))):
        p = trees.tree_map(lambda x: x.requires_grad_(), model(1))
        fn(p, q).backward()
        assert torch.allclose(trees.flat(trees.tree_map(lambda x: x.grad, p)), expected)


def test_stack_adds_a_first_dimension() -> None:
    stacked = trees.stack([model(0), model(1)])
    assert stacked["a"]["weight"].shape == (2, 5, 3)
    assert all(same(trees.tree_map(lambda x, i=i: x[i], stacked), model(i)) for i in range(2))


def test_maps_keep_what_is_not_a_tensor() -> None:
    tree: Tree = {"net": "mlp", "x": torch.ones(2), "deep": {"list": [1, 2], "y": torch.ones(1)}}
    assert same(trees.clone(tree), tree)
    assert [path for path, _ in trees.leaves(tree)] == ["x", "deep/y"]


def test_bytes_by_hand() -> None:
    """6 floats of 4 bytes and 3 of 2; 2 integers of 8; nothing for the plain value."""
    tree = {
        "params": {"w": torch.zeros(2, 3), "h": torch.zeros(3, dtype=torch.bfloat16)},
        "labels": torch.zeros(2, dtype=torch.int64),
        "round": 7,
        "nothing": {},
    }
    assert trees.nbytes(tree) == 46
    assert trees.bytes_by_kind(tree) == {"params": 30, "labels": 16}
    assert trees.size(tree) == 11


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finite_looks_into_every_leaf(bad: float) -> None:
    tree = model(0)
    assert trees.finite(tree)
    tree["c"]["d"]["e"][1, 0, 2] = bad
    assert not trees.finite(tree)


# ---- streams


def test_a_stream_depends_on_its_key_alone() -> None:
    def first(*key: object) -> list[float]:
        return [*torch.rand(3, generator=trees.stream(*key)).tolist(), *trees.numpy_stream(*key).random(3).tolist()]

    torch.manual_seed(1)
    np.random.seed(1)
    once = first(0, "visit", 3, 7)
    torch.manual_seed(2)
    assert first(0, "visit", 3, 7) == once
    others = [first(*key) for key in ((1, "visit", 3, 7), (0, "order", 3, 7), (0, "visit", 37), (0, "visit", 7, 3))]
    assert all(other[0] != once[0] and other[3] != once[3] for other in others)
    assert len({other[0] for other in others}) == len(others)


def test_streams_stay_as_they_are() -> None:
    """The numbers that published results were made with; changing them takes new rules (`harness.RULES_VERSION`).

    blake2b("0/init", 8 bytes) is d86b2afa9b31976c: little-endian 0x6c97319bfa2a6bd8, halved for torch's signed seeds.
    """
    assert trees.stream(0, "init").initial_seed() == 0x6C97319BFA2A6BD8 // 2
    assert trees.numpy_stream(0, "init").integers(2**32) == 1714936132
