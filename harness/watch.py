"""Pools that watch, ship and reorder what passes through them, and hosts whose hooks get a bounded bench."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from harness.batches import Rows
from harness.evaluate import Counts
from harness.fit import Workbench
from harness.host import ClientHost
from harness.inline import InlinePool
from harness.trees import Tree, parcel
from harness.work import Answer, Event, Order, Personal, Setup, Shard, WorkFailed

FIT_STEPS = 3  # the most of any `Bench.fit`: numbers do not matter here, only what they depend on


def prints(value: Any, at: str = "") -> dict[str, str]:
    """Path -> fingerprint of everything in nested dicts and lists: types, shapes and bits."""
    if isinstance(value, Mapping):
        return {path: mark for key, part in value.items() for path, mark in prints(part, f"{at}/{key}").items()}
    if isinstance(value, list | tuple):
        return {path: mark for i, part in enumerate(value) for path, mark in prints(part, f"{at}/{i}").items()}
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return {at: f"{value.dtype} {tuple(value.shape)} {hashlib.blake2b(raw.data, digest_size=12).hexdigest()}"}
    return {at: repr(value)}


def difference(a: Mapping[str, str], b: Mapping[str, str]) -> str:
    """The first path where two sets of fingerprints differ; empty if nowhere."""
    return next((path.lstrip("/") for path in {**a, **b} if a.get(path) != b.get(path)), "")


def weigh(value: Any, numbers: bool) -> int:
    """Bytes of everything that travels in a tree, whatever it hides in: lists, arrays. numbers: plain ones, too."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(weigh(part, numbers) for part in value.values())
    if isinstance(value, list | tuple | set):
        return sum(weigh(part, True) for part in value)
    return len(value) if isinstance(value, bytes) else 8 * (numbers and isinstance(value, int | float))


@dataclass
class Passed:
    """A visit as it was seen to pass. down, up: bytes; changed: what its hooks changed of what they were given."""

    order: Order
    down: int
    up: int
    changed: str
    payload: Tree
    marks: dict[str, str]  # of the payload
    read_proxy: bool


def bounded(bench: Workbench, needs: frozenset[str]) -> Workbench:
    """The same bench, of few steps, and without the rows that the method did not ask for."""
    whole = bench.fit

    def fit(p: Tree, loss: Any, draw: Any, steps: int, **how: Any) -> Tree:
        return whole(p, loss, draw, min(steps, FIT_STEPS), **how)

    def guarded(name: str, read: Callable[[], Rows]) -> Callable[[], Rows]:
        def refuse() -> Rows:
            raise RuntimeError(f'reading {name} rows takes needs = frozenset({{"{name}"}})')

        return refuse if name == "validation" and name not in needs else read

    bench.fit = fit  # type: ignore[method-assign]
    bench.sources = {name: guarded(name, read) for name, read in bench.sources.items()}
    return bench


class BoundedHost(ClientHost):
    """A host whose hooks get a bounded bench."""

    read_proxy = False  # in the last visit

    def _bench(self, order: Order) -> Workbench:
        bench = bounded(super()._bench(order), self.method.needs)
        self.read_proxy, read = False, bench.sources["proxy"]

        def noted() -> Rows:
            self.read_proxy = True
            return read()

        bench.sources = {**bench.sources, "proxy": noted}
        return bench


class BoundedPool(InlinePool):
    """The inline pool of such a host. watches: logs what passes and looks for what hooks change of it."""

    def __init__(self, watches: bool = False) -> None:
        self.host: BoundedHost = BoundedHost()
        self.events = []
        self.watches = watches
        self.log: list[Passed] = []
        self.kept = ""  # what `keeps` changed of a memory

    def visit(self, order: Order, parts: Sequence[Tree], memory: Tree | None) -> Answer | WorkFailed:
        """A visit, with fingerprints before and after."""
        if not self.watches:
            return super().visit(order, parts, memory)
        given = {"inbox": [*parts], "memory": memory or {}}
        before = prints(given)
        report, payload, after = self.host.visit(order, parts, memory)
        changed = difference(before, prints(given))
        down, up = sum(weigh(part, False) for part in parts), weigh(payload, True)
        self.log.append(Passed(order, down, up, changed, payload, prints(payload), self.host.read_proxy))
        return report, payload, after

    def score(self, what: Shard | Personal, params: Tree) -> Counts:
        """The same for models."""
        before = prints(params) if self.watches else {}
        counts = super().score(what, params)
        if self.watches:
            self.kept = self.kept or difference(before, prints(params))
        return counts


@dataclass
class Ticket:
    """Work that waits."""

    order: Order
    parts: list[Any]
    memory: Any | None
    answer: tuple[Any, Any, Any] | None = None


@dataclass
class FarPool:
    """Hosts that lie elsewhere, played in this process. Work is done when it is asked for, in another order.

    ships: every order, tree and answer goes through bytes and each visit is done by a fresh host, as under Ray.
    """

    brisk: ClassVar[bool] = True  # as no other pool here: who is sent off when must not matter
    ships: bool = True
    waiting: list[Ticket] = field(default_factory=list)

    def load(self, setup: Setup) -> None:
        """Begins a trial."""
        self.setup, self.host = setup, self._fresh(setup)

    def _fresh(self, setup: Setup) -> BoundedHost:
        host = BoundedHost()
        host.load(setup)
        return host

    def put(self, tree: Tree) -> Any:
        """A handle, which is bytes when trees are shipped."""
        return pickle.dumps(parcel(tree)) if self.ships else tree

    def fetch(self, handle: Any) -> Tree:
        """The tree behind a handle: an own copy when trees are shipped."""
        tree: Tree = pickle.loads(handle).open() if self.ships else handle
        return tree

    def visit(self, order: Order, parts: Sequence[Any], memory: Any | None) -> Ticket:
        """Queues a visit."""
        self.waiting.append(Ticket(order, list(parts), memory))
        return self.waiting[-1]

    def answer(self, ticket: Ticket) -> tuple[Any, Tree, Any]:
        """Does all that waits, last come first served, then answers."""
        while self.waiting:
            self._work(self.waiting.pop())
        assert ticket.answer is not None
        report, payload, memory = ticket.answer
        return report, self.fetch(payload), memory

    def _work(self, one: Ticket) -> None:
        order = pickle.loads(pickle.dumps(one.order))
        if self.ships:
            self.host = self._fresh(self.setup)
        memory = None if one.memory is None else self.fetch(one.memory)
        report, payload, after = self.host.visit(order, [self.fetch(part) for part in one.parts], memory)
        one.answer = pickle.loads(pickle.dumps(report)), self.put(payload), self.put(after)

    def score(self, what: Shard | Personal, params: Any) -> Counts:
        """A piece of the evaluation."""
        return self.host.score(what, self.fetch(params))

    def counts(self, ticket: Counts) -> Counts:
        """What it found."""
        return ticket

    def drain(self) -> list[Event]:
        """Nothing: what a hook raises is raised at once."""
        return []
