"""Arithmetic on trees: nested dicts whose leaves are tensors. And the seeded streams that all randomness comes from.

Parameters, payloads and memories are trees. Sums run in the order of the arguments and in chunks of a fixed
size, so that their bits depend on neither the number of hosts nor on who answered first.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Tree: TypeAlias = dict[str, Any]  # str -> Tensor | Tree

CHUNK = 8  # clients per partial mean; part of the bits of every mean, so part of the rules' version
ALIGN = 64  # bytes; keeps every leaf of a parcel aligned for vector loads


def _hash(key: Sequence[object]) -> int:
    text = "/".join(str(k) for k in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def stream(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on nothing but its key, such as (seed, purpose, round, client)."""
    generator = torch.Generator(device)
    generator.manual_seed(_hash(key) >> 1)  # torch takes signed 64-bit seeds
    return generator


def numpy_stream(*key: object) -> np.random.Generator:
    """The same for numpy."""
    return np.random.Generator(np.random.Philox(key=_hash(key)))


def noise(rows: int, width: int, how: str, rng: torch.Generator) -> Tensor:
    """[rows, width], "uniform" on [0, 1) or "normal"."""
    make = torch.rand if how == "uniform" else torch.randn
    return make(rows, width, generator=rng, device=rng.device)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its path ("head/weight"), in the tree's own order. Other values are passed over."""
    for name, value in tree.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}/")


def tree_map(fn: Callable[..., Tensor], tree: Mapping[str, Any], *others: Mapping[str, Any]) -> Tree:
    """`fn` on every leaf (and the leaves at the same place in the others); other values are kept."""
    result: Tree = {}
    for name, value in tree.items():
        if isinstance(value, Tensor):
            result[name] = fn(value, *(other[name] for other in others))
        elif isinstance(value, Mapping):
            result[name] = tree_map(fn, value, *(other[name] for other in others))
        else:
            result[name] = value
    return result


def clone(tree: Mapping[str, Any]) -> Tree:
    """A copy that shares no memory."""
    return tree_map(lambda x: x.detach().clone(), tree)


def to(tree: Mapping[str, Any], device: torch.device | str) -> Tree:
    """The tree on a device, lists of trees included; leaves already there are not copied."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, Mapping):
            return {key: move(member) for key, member in value.items()}
        return [move(member) for member in value] if isinstance(value, list) else value

    return {key: move(value) for key, value in tree.items()}


def zeros(tree: Mapping[str, Any]) -> Tree:
    """Zeros of the same shapes."""
    return tree_map(torch.zeros_like, tree)


def add(a: Mapping[str, Any], b: Mapping[str, Any], scale: float = 1.0) -> Tree:
    """a + scale * b."""
    return tree_map(lambda x, y: torch.add(x, y, alpha=scale), a, b)


def sub(a: Mapping[str, Any], b: Mapping[str, Any]) -> Tree:
    """a - b. A delta is always end - start."""
    return tree_map(torch.sub, a, b)


def scale(tree: Mapping[str, Any], factor: float) -> Tree:
    """factor * tree."""
    return tree_map(lambda x: x * factor, tree)


def dot(a: Mapping[str, Any], b: Mapping[str, Any]) -> Tensor:
    """Inner product over all leaves, a scalar; differentiable in both."""
    other = dict(leaves(b))
    return torch.stack([(x * other[path]).sum() for path, x in leaves(a)]).sum()


def sq_distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> Tensor:
    """Squared Euclidean distance over all leaves, a scalar; differentiable in both."""
    other = dict(leaves(b))
    return torch.stack([(x - other[path]).square().sum() for path, x in leaves(a)]).sum()


def mean(trees: Iterable[Mapping[str, Any]], weights: Sequence[float] | None = None) -> Tree:
    """Weighted mean, in the order given; weights are normalised in double precision. Equal weights if None.

    It is the mean of the means of chunks of `CHUNK` trees, so its bits do not depend on where a chunk's mean was
    computed, and a chunk's does not depend on the other chunks. One tree of any weight comes back exactly, and so do
    equal trees up to rounding. Raises ValueError if the weights do not add up to more than zero.
    """
    items = list(trees) if weights is None else trees
    raw = [1.0] * len(items) if weights is None and isinstance(items, list) else list(weights or ())
    total = float(sum(raw))
    if not total > 0:
        raise ValueError("the weights of a mean must add up to more than zero")
    result: Tree | None = None
    pairs = zip(items, raw, strict=True)
    while chunk := list(islice(pairs, CHUNK)):  # so many trees are held at a time
        own = float(sum(weight for _, weight in chunk))
        if own > 0:
            result = _plus(result, _chunk_mean(chunk, own), own / total)
    assert result is not None
    return result


def _chunk_mean(chunk: Sequence[tuple[Mapping[str, Any], float]], total: float) -> Tree:
    result = scale(chunk[0][0], chunk[0][1] / total)
    for tree, weight in chunk[1:]:
        result = tree_map(lambda x, y, share=weight / total: x.add_(y, alpha=share), result, tree)
    return result


def means(items: Iterable[tuple[str, Mapping[str, Any], float]]) -> dict[str, Tree]:
    """The weighted mean of the trees of each name, of (name, tree, weight), in the order given."""
    found: dict[str, tuple[list[Mapping[str, Any]], list[float]]] = {}
    for name, tree, weight in items:
        members, shares = found.setdefault(name, ([], []))
        members.append(tree)
        shares.append(weight)
    return {name: mean(members, shares) for name, (members, shares) in found.items()}


def _plus(total: Tree | None, part: Tree, share: float) -> Tree:
    """total + share * part, in place."""
    if total is None:
        return part if share == 1 else tree_map(lambda x: x.mul_(share), part)
    return tree_map(lambda x, y: x.add_(y, alpha=share), total, part)


def stack(trees: Sequence[Mapping[str, Any]]) -> Tree:
    """Leaves stacked along a new first dimension: n trees of [..] give one of [n, ..]."""
    return tree_map(lambda *xs: torch.stack(xs), trees[0], *trees[1:])


def flat(tree: Mapping[str, Any]) -> Tensor:
    """All leaves as one vector [P], in the tree's order. A copy."""
    return flattened(x.detach() for _, x in leaves(tree))


def flattened(parts: Iterable[Tensor]) -> Tensor:
    """Tensors of any shapes as one vector [P]. A copy."""
    return torch.cat([x.reshape(-1) for x in parts])


def unflat(vector: Tensor, like: Mapping[str, Any]) -> Tree:
    """The tree of views into `vector` [P] that has the shapes of `like`."""
    parts = iter(torch.split(vector, [x.numel() for _, x in leaves(like)]))
    return tree_map(lambda x: next(parts).view(x.shape), like)


def part(p: Mapping[str, Any], head: bool, statistics: bool) -> Tree:
    """What is shared of a net's parameters. head: the last layer alone; not statistics: no running statistics."""
    stages = {"head": p["head"]} if head else p
    kept = {name: {k: x for k, x in stage.items() if "running_" not in k} for name, stage in stages.items()}
    return dict(stages) if statistics else kept


def overlay(own: Mapping[str, Any], shared: Mapping[str, Any]) -> Tree:
    """A net's own parameters under a shared part. Last layers go by position: nets give them different names."""
    over = {**shared, "head": unflat(flat(shared["head"]), like=own["head"])}
    return {name: {**stage, **over.get(name, {})} for name, stage in own.items()}


def size(tree: Mapping[str, Any]) -> int:
    """How many numbers the tree holds."""
    return sum(x.numel() for _, x in leaves(tree))


def nbytes(tree: Mapping[str, Any]) -> int:
    """How many bytes its tensors take on the wire."""
    return sum(x.numel() * x.element_size() for _, x in leaves(tree))


def bytes_by_kind(tree: Mapping[str, Any]) -> dict[str, int]:
    """Bytes under each top-level key of an inbox or a payload; keys without tensors are left out."""
    kinds = {key: nbytes({key: value}) for key, value in tree.items()}
    return {key: n for key, n in kinds.items() if n}


def finite(tree: Mapping[str, Any]) -> bool:
    """Whether no leaf holds a NaN or an infinity."""
    # A sum is not finite if any member is not. It may also overflow, hence the second look.
    return all(
        math.isfinite(x.sum()) or bool(torch.isfinite(x).all()) for _, x in leaves(tree) if x.is_floating_point()
    )


@dataclass(frozen=True)
class Parcel:
    """A tree as one flat buffer, which is what Ray ships without copying; `skeleton` says what lies where."""

    skeleton: dict[str, Any]
    buffer: np.ndarray[Any, np.dtype[np.uint8]]

    def open(self, device: torch.device | str = "cpu") -> Tree:
        """The tree again. Always a copy: the buffer may lie in shared memory, which must never be written to."""
        raw = torch.from_numpy(self.buffer.copy()).to(device)

        def read(part: Mapping[str, Any]) -> Tree:
            return {k: read(v) if isinstance(v, Mapping) else leaf(v) for k, v in part.items()}

        def leaf(value: Any) -> Any:
            if not isinstance(value, _Slot):
                return value
            return raw[value.start : value.stop].view(getattr(torch, value.dtype)).view(value.shape)

        return read(self.skeleton)


@dataclass(frozen=True)
class _Slot:
    dtype: str
    shape: tuple[int, ...]
    start: int  # of its bytes
    stop: int


def parcel(tree: Mapping[str, Any]) -> Parcel:
    """Packs a tree, whatever its dtypes, and the plain values beside its tensors."""
    chunks: list[tuple[int, Tensor]] = []
    end = 0

    def skeleton(part: Mapping[str, Any]) -> dict[str, Any]:
        nonlocal end
        result: dict[str, Any] = {}
        for key, value in part.items():
            if isinstance(value, Tensor):
                x = value.detach().cpu().contiguous()
                stop = end + x.numel() * x.element_size()
                result[key] = _Slot(str(x.dtype).removeprefix("torch."), tuple(x.shape), end, stop)
                chunks.append((end, x))
                end = -(-stop // ALIGN) * ALIGN
            else:
                result[key] = skeleton(value) if isinstance(value, Mapping) else value
        return result

    shape = skeleton(tree)
    # An empty one has no stride, and no views of other types.
    buffer = np.empty(end, dtype=np.uint8) if end else np.zeros(1, dtype=np.uint8)
    for offset, x in chunks:
        raw = x.reshape(-1).view(torch.uint8).numpy()
        buffer[offset : offset + raw.size] = raw
        buffer[offset + raw.size : -(-(offset + raw.size) // ALIGN) * ALIGN] = 0  # equal trees, equal parcels
    return Parcel(shape, buffer)
