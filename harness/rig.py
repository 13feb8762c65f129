"""The tiny trial in memory that `check` runs methods on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from harness import config, registry
from harness.data import Arrays, card
from harness.fit import Workbench
from harness.partitions import Split
from harness.server import Server
from harness.trees import numpy_stream
from harness.watch import BoundedPool, bounded, difference, prints
from harness.work import Setup

DATASET = "digits"
# Batches hold 8 rows: a last batch of one row, a client of one class, a client smaller than a batch, two plain ones.
SIZES = (17, 9, 3, 14, 12)
ONE_CLASS = 1  # the client
HELD, PROXY, TEST = 4, 24, 20  # rows
LOCAL = {"epochs": 1, "batch": 8, "lr": 0.05, "momentum": 0.5}
FLEET, SAME_LATENT = ("mlp", "lenet5"), ("fedgen-cnn", "fedgen-cnn-bn")


def tiny(
    method: str,
    hyper: Mapping[str, Any],
    needs: frozenset[str],
    *,
    rounds: int = 3,
    participation: float = 0.8,
    fleet: bool = True,
    even: bool = False,
) -> Setup:
    """A trial of five clients that supplies what is needed and nothing else.

    fleet: two nets, if the method can; even: clients of one size with labels of all classes.
    """
    arrays, split, proxy = _rows(needs, even)
    raw: dict[str, Any] = {"method": method, "hyper": dict(hyper), "dataset": DATASET, "net": "mlp", "local": LOCAL}
    raw |= {"clients": len(SIZES), "rounds": rounds, "participation": participation, "evaluation": {"every": rounds}}
    raw["holdout"] = {"test": 0.2 * ("private_test" in needs), "validation": 0.2 * ("validation" in needs)}
    if proxy is not None:
        raw["proxy"] = {"source": "train", "rows": PROXY}
    if fleet and "one_net" not in needs:
        raw["fleet"] = {"nets": SAME_LATENT if "same_latent" in needs else FLEET}
        raw["net"] = raw["fleet"]["nets"][0]
        split = replace(split, levels=tuple(k % 2 for k in range(len(SIZES))))
    if "pooled" in needs:
        split = split.pooled()
    return Setup(config.resolve(raw), arrays, split, proxy)


def _rows(needs: frozenset[str], even: bool) -> tuple[Arrays, Split, tuple[Any, Any] | None]:
    """Noise with a bright row per class, dealt in order: each client's own rows, then what it holds out."""
    rng, about = numpy_stream("rig"), card(DATASET)
    shape, classes = about.shape, about.classes
    sizes = np.full(len(SIZES), sum(SIZES) // len(SIZES)) if even else np.array(SIZES)
    ends = np.cumsum(sizes + 2 * HELD)
    owner = np.repeat(np.arange(len(SIZES)), sizes + 2 * HELD)
    y = np.arange(len(owner)) % classes if even else rng.integers(0, classes, len(owner))
    y = np.where(owner == ONE_CLASS, 3, y) if not even else y
    y = np.concatenate([y, np.arange(PROXY) % classes])

    def images(labels: Any) -> Any:
        x = rng.integers(0, 120, (len(labels), *shape), dtype=np.uint8)
        x[np.arange(len(labels)), :, labels % shape[1]] += 100
        return x

    cuts = zip(ends - sizes - 2 * HELD, ends, sizes, strict=True)
    dealt = [np.split(np.arange(start, end), [size, size + HELD]) for start, end, size in cuts]
    train, validation, test = (tuple(part) for part in zip(*dealt, strict=True))
    empty = tuple(rows[:0] for rows in train)
    y_test = np.arange(TEST) % classes
    split = Split(
        train,
        np.empty(0, np.int64),
        np.stack([np.bincount(y[rows], minlength=classes) for rows in train]),
        "rig",
        {},
        validation if "validation" in needs else empty,
        test if "private_test" in needs else empty,
    )
    x = images(y)
    proxy = (x[-PROXY:], y[-PROXY:]) if needs & {"proxy", "labelled_proxy"} else None
    return Arrays(x, y, images(y_test), y_test), split, proxy


@contextmanager
def luck(seed: int) -> Iterator[None]:
    """All global generators seeded so, and as they were again afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class RigServer(Server):
    """A server whose merge gets a bounded bench, and must leave the updates as they are."""

    meddled = ""  # the first payload that a merge changed

    def _bench(self) -> Workbench:
        return bounded(super()._bench(), self.method.needs)

    def step(self) -> None:
        """One round."""
        super().step()
        for seen in self.pool.log if isinstance(self.pool, BoundedPool) else ():
            if seen.order.round == self.round - 1 and not self.meddled:
                self.meddled = difference(seen.marks, prints(seen.payload))

    def marks(self) -> dict[str, str]:
        """Fingerprints of all that training left behind."""
        memories = {f"{v.client}:{v.role}": self.pool.fetch(handle) for v, handle in sorted(self.memories.items())}
        return prints({"state": self.state, "memory": memories})


def server(setup: Setup, pool: Any = None) -> RigServer:
    """The server of a trial in round 0, on a plain inline pool unless another is given."""
    pool = pool or BoundedPool()
    pool.load(setup)
    return RigServer(setup, pool)


def run(setup: Setup, pool: Any = None, seed: int = 1) -> RigServer:
    """A whole trial. seed: of the global generators, which must not matter."""
    with luck(seed):
        done = server(setup, pool)
        while not done.done:
            done.step()
    return done


def altered(setup: Setup, rows: Any) -> Setup:
    """The same trial with some training rows as negatives of themselves."""
    x = setup.arrays.x_train.copy()
    x[rows] = 255 - x[rows]
    return replace(setup, arrays=replace(setup.arrays, x_train=x))


def untested(setup: Setup) -> Setup:
    """The same trial with other test rows, shared and private."""
    own = np.concatenate([*setup.split.test, np.empty(0, np.int64)]).astype(np.int64)
    arrays = altered(setup, own).arrays
    rng = numpy_stream("rig", "other test rows")
    x, y = rng.integers(0, 255, arrays.x_test.shape, dtype=np.uint8), rng.permutation(arrays.y_test)
    return replace(setup, arrays=replace(arrays, x_test=x, y_test=y))


@contextmanager
def declaring(method: str, needs: frozenset[str]) -> Iterator[None]:
    """The method as if it needed nothing else."""
    owner, own = registry.load(method), vars(registry.load(method)).get("needs")
    setattr(owner, "needs", needs)  # noqa: B010 - it may be a property, which is replaced
    try:
        yield
    finally:
        if own is None:
            del owner.needs
        else:
            setattr(owner, "needs", own)  # noqa: B010
