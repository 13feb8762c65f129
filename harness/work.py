"""What passes between a server and its hosts: trials, orders, reports, and the pool that takes work."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

import numpy as np
import torch

from harness import registry, schedule
from harness.batches import Rows, ready
from harness.cohorts import Trace
from harness.config import Trial
from harness.data import Arrays, Inputs, Labels, card
from harness.evaluate import Counts
from harness.nets import build
from harness.partitions import Split, divide, halves
from harness.protocol import Algorithm, Visit, World
from harness.refusal import Refused
from harness.trees import Tree, numpy_stream

Mixes = np.ndarray[Any, np.dtype[np.float64]]
Held = Literal["test", "validation"]  # rows that models are measured on


@dataclass(frozen=True)
class Setup:
    """All that a host needs to know of a trial.

    proxy: inputs and labels of the server's data, if it has any. domains: name -> rows of the test set, if it has
    several domains; they cover it.
    """

    trial: Trial
    arrays: Arrays
    split: Split
    proxy: tuple[Inputs, Labels] | None = None
    trace: Trace | None = None
    domains: Mapping[str, Labels] = field(default_factory=dict)


@dataclass(frozen=True, order=True)
class Chunk:
    """Visits of a round whose means may be taken at once (see `averages`): of which role, and how many they are."""

    role: str
    number: int
    size: int


@dataclass(frozen=True)
class Order:
    """One visit as a piece of work. `inboxes` are the keys of the parts of its inbox, for reuse within a round."""

    visit: Visit
    round: int
    net: str
    lr: float
    inboxes: tuple[str, ...]
    work: float = 1.0  # share of its epochs that it does
    chunk: Chunk | None = None


@dataclass(frozen=True)
class Report:
    """What a visit cost and showed. samples: rows of the client; seen: rows passed through training steps."""

    visit: Visit
    samples: int
    steps: int  # all that were taken; of these `extra` on the bench, beyond the phases
    seen: int
    metrics: dict[str, float]
    up_kinds: dict[str, int]
    seconds: float
    finite: bool
    read_proxy: bool = False
    extra: int = 0
    alone: str = ""  # why it was trained by itself, where visits are trained together


@dataclass(frozen=True)
class Shard:
    """A slice of the test set to score, or of a domain's part of it, or of all clients' validation rows in a row.

    nets: of the members of the model, whose logits are averaged.
    """

    nets: tuple[str, ...]
    model: str  # key of the parameters, for reuse between shards
    start: int
    stop: int
    domain: str = ""
    of: Held = "test"


@dataclass(frozen=True)
class Personal:
    """A client's own model to score on its own test or validation rows."""

    visit: Visit
    net: str
    round: int
    of: Held = "test"


@dataclass(frozen=True)
class Stage:
    """A trial between two changes of its schedule: its settings, method and world as they are then."""

    trial: Trial
    method: Algorithm
    world: World


class Stages:
    """The stages of a trial, each made once."""

    def __init__(self, setup: Setup) -> None:
        registry.pin(setup.trial.method, setup.trial.source)
        self.setup = setup
        self.starts = tuple(schedule.parse(text).round for text in setup.trial.schedule)
        self._made: dict[int, Stage] = {}

    def at(self, round: int) -> Stage:
        """The one that a round belongs to."""
        number = bisect_right(self.starts, round)
        if number not in self._made:
            trial = self.setup.trial.at(round)
            method = registry.make(trial.method, trial.hyper)
            world = make_world(replace(self.setup, trial=trial), method.needs)
            self._made[number] = Stage(trial, method, world)
        return self._made[number]


Answer = tuple[Report, Tree, Tree]
Asked = tuple[
    Order, Sequence[Any], Any | None
]  # an order, the parts of its inbox, its client's memory: trees or handles
Event = dict[str, Any]  # a row of the table of events


class WorkFailed(RuntimeError):
    """A piece of work from which nothing will come: it raised, hung, or lost its host time and again."""


def event(kind: str, detail: str, round: int | None = None, client: int | None = None) -> Event:
    """What happened just now. round, client: None where it does not belong to one."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return {"time": now, "kind": kind, "round": round, "client": client, "detail": detail}


def said(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Pool(Protocol):
    """Hosts to give work to. Handles stand for trees that may lie on another machine; tickets for work under way."""

    @property
    def brisk(self) -> bool:
        """Whether visits are so short that they had better be sent off chunk by chunk, however few they are."""

    def put(self, tree: Tree) -> Any:
        """Makes a tree available to the hosts; returns its handle."""

    def fetch(self, handle: Any) -> Tree:
        """The tree behind a handle."""

    def visit(self, order: Order, parts: Sequence[Any], memory: Any | None) -> Any:
        """Sends a client's work off; returns a ticket. `parts`, `memory`: handles."""

    def visits(self, asked: Sequence[Asked]) -> Sequence[Any]:
        """The same for visits that are done by one host, at once; returns a ticket for each.

        They stay together whatever happens: who trains with whom is part of the bits.
        """

    def answer(self, ticket: Any) -> tuple[Report, Tree, Any]:
        """Waits for a visit: its report, its payload and the handle of the client's next memory.

        Raises WorkFailed if nothing came of it.
        """

    def score(self, what: Shard | Personal, params: Any) -> Any:
        """Sends a piece of the evaluation off, to be done when no client waits; returns a ticket."""

    def counts(self, ticket: Any) -> Counts:
        """Waits for a piece of the evaluation."""

    def drain(self) -> list[Event]:
        """What happened to hosts and their work since the last call."""


def make_setup(
    trial: Trial, arrays: Arrays, other: Arrays | None = None, trace: Trace | None = None
) -> tuple[Setup, Mixes]:
    """Deals the rows of a trial; also the label mixes [N, C] of its clients before any pooling.

    other: the data set that the proxy rows come from where that is another one: drawn from its training rows.
    """
    registry.pin(trial.method, trial.source)
    split = divide(arrays.y_train, card(trial.dataset).classes, trial, arrays.domains_train)
    proxy = None
    if other is not None:
        if trial.proxy.rows > len(other.y_train):
            there = f"{trial.proxy.source} has {len(other.y_train)} training rows"
            raise Refused(f"proxy.rows = {trial.proxy.rows} is more than there are: {there}")
        picked = np.sort(numpy_stream(trial.seed, "proxy").permutation(len(other.y_train))[: trial.proxy.rows])
        proxy = (other.x_train[picked], other.y_train[picked])
    elif len(split.proxy):
        proxy = (arrays.x_train[split.proxy], arrays.y_train[split.proxy])
    counts = split.counts[split.counts.sum(1) > 0]
    if "pooled" in registry.make(trial.method, trial.hyper).needs:
        split = split.pooled()
    setup = Setup(trial, arrays, split, proxy, trace, _test_domains(trial, arrays))
    return setup, counts / counts.sum(1, keepdims=True)


def _test_domains(trial: Trial, arrays: Arrays) -> dict[str, Labels]:
    """The test rows of each domain: the data set's own, or the halves of the classes if rows are dealt by them."""
    about, domain = card(trial.dataset), arrays.domains_test
    names = about.domains
    if trial.partition.domains == "halves":
        names, domain = ("lower", "upper"), halves(arrays.y_test, about.classes)
    if domain is None or len(names) < 2:
        return {}
    return {name: np.flatnonzero(domain == i) for i, name in enumerate(names)}


def make_world(setup: Setup, needs: frozenset[str]) -> World:
    """What the method may know of a trial."""
    trial, split = setup.trial, setup.split
    shape, classes = setup.arrays.x_train.shape[1:], split.counts.shape[1]
    return World(
        clients=len(split.clients),
        classes=classes,
        rounds=trial.rounds,
        sizes=tuple(len(rows) for rows in split.clients),
        batch=trial.local.batch,
        epochs=trial.local.epochs,
        lr=trial.local.lr,
        momentum=trial.local.momentum,
        net=lambda name: build(name, shape, classes),
        default_net=trial.net,
        participation=trial.participation,
        nets=trial.fleet.nets,
        levels=split.levels or (0,) * len(split.clients),
        proxy_rows=0 if setup.proxy is None else len(setup.proxy[1]),
        counts=split.counts if "label_counts" in needs else None,
    )


def proxy_rows(setup: Setup, needs: frozenset[str], device: torch.device) -> Rows:
    """The proxy data on a device; labels are -1 unless the method declared that it needs them."""
    if setup.proxy is None or not needs & {"proxy", "labelled_proxy"}:
        raise RuntimeError('reading proxy data takes needs = frozenset({"proxy"}) or "labelled_proxy"')
    about = card(setup.trial.dataset)
    x, y = (torch.tensor(part, device=device) for part in setup.proxy)
    return Rows(ready(x, about), y if "labelled_proxy" in needs else torch.full_like(y, -1))
