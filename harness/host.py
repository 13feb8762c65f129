"""`ClientHost` visits clients, one at a time. It holds nothing that matters: killing it changes no number."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from harness import registry
from harness.batches import Rows, normalise, rotate
from harness.config import Trial
from harness.data import Arrays, card
from harness.evaluate import Counts, count
from harness.fit import Fitted, Optimizer, Streams, descend, visit_batches
from harness.nets import Net, build
from harness.partitions import Split, shift
from harness.protocol import Inbox, Phase, Trained, Visit, World
from harness.trees import Parcel, Tree, bytes_by_kind, finite, numpy_stream, stream, to


@dataclass(frozen=True)
class Setup:
    """All that a host needs to know of a trial."""

    trial: Trial
    arrays: Arrays
    split: Split


@dataclass(frozen=True)
class Order:
    """One visit as a piece of work. `inboxes` are the keys of the parts of its inbox, for reuse within a round."""

    visit: Visit
    round: int
    net: str
    lr: float
    inboxes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What a visit cost and showed. samples: rows of the client; seen: rows passed through training steps."""

    visit: Visit
    samples: int
    steps: int
    seen: int
    metrics: dict[str, float]
    up_kinds: dict[str, int]
    seconds: float
    finite: bool


@dataclass(frozen=True)
class Shard:
    """A slice of the test set to score."""

    net: str
    model: str  # key of the parameters, for reuse between shards
    start: int
    stop: int


Answer = tuple[Report, Tree, Tree]


class Pool(Protocol):
    """Hosts to give work to. Handles stand for trees that may lie on another machine; tickets for work under way."""

    def put(self, tree: Tree) -> Any:
        """Makes a tree available to the hosts; returns its handle."""

    def fetch(self, handle: Any) -> Tree:
        """The tree behind a handle."""

    def visit(self, order: Order, parts: Sequence[Any], memory: Any | None) -> Any:
        """Sends a client's work off; returns a ticket. `parts`, `memory`: handles."""

    def answer(self, ticket: Any) -> tuple[Report, Tree, Any]:
        """Waits for a visit: its report, its payload and the handle of the client's next memory."""

    def score(self, shard: Shard, params: Any) -> Any:
        """Sends a shard of the evaluation off, to be done when no client waits; returns a ticket."""

    def counts(self, ticket: Any) -> Counts:
        """Waits for a shard."""


def make_world(trial: Trial, arrays: Arrays, split: Split, needs: frozenset[str]) -> World:
    """What the method may know of a trial."""
    shape, classes = arrays.x_train.shape[1:], split.counts.shape[1]
    return World(
        clients=trial.clients,
        classes=classes,
        rounds=trial.rounds,
        sizes=tuple(len(rows) for rows in split.clients),
        batch=trial.local.batch,
        epochs=trial.local.epochs,
        lr=trial.local.lr,
        momentum=trial.local.momentum,
        net=lambda name: build(name, shape, classes),
        default_net=trial.net,
        counts=split.counts if "label_counts" in needs else None,
    )


class ClientHost:
    """Trains clients and scores models on one device. All results are functions of the arguments alone."""

    def __init__(self, device: str = "cpu", threads: int = 1) -> None:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)  # dying activations would otherwise slow training sevenfold
        self.device = torch.device(device)

    def load(self, setup: Setup) -> None:
        """Begins a trial. Data that is on the device already stays there."""
        self.trial, self.split = setup.trial, setup.split
        self.method = registry.make(setup.trial.method, setup.trial.hyper)
        self.world = make_world(setup.trial, setup.arrays, setup.split, self.method.needs)
        self.card = card(setup.trial.dataset)
        if getattr(self, "_arrays", None) is not setup.arrays:
            self._arrays = setup.arrays
            # A copy: arrays from the object store lie in shared memory that must not be written to.
            self.x_train = torch.tensor(setup.arrays.x_train, device=self.device)
            self.y_train = torch.tensor(setup.arrays.y_train, device=self.device)
            self.x_test = torch.tensor(setup.arrays.x_test, device=self.device)
            self.y_test = torch.tensor(setup.arrays.y_test, device=self.device)
        self.shifts = shift(setup.trial.partition, setup.trial.clients, setup.trial.seed)
        self._opened: dict[str, Tree] = {}
        self._round = -1

    def visit(self, order: Order, parts: Sequence[Tree | Parcel], memory: Tree | Parcel | None) -> Answer:
        """One client's round: inbox and memory in, report, payload and next memory out."""
        started = time.perf_counter()
        net, inbox = self.world.net(order.net), self._inbox(order, parts)
        key = (self.trial.seed, "visit", order.round, order.visit.client, order.visit.role)
        if memory is None:
            before = self.method.remember(net, inbox, stream(*key, "memory", device=self.device))
        else:
            before = self._tree(memory)
        rows = self._rows(order.visit.client)
        streams = Streams(*(stream(*key, name, device=self.device) for name in ("order", "augment", "draw")))
        start = self.method.start(net, inbox, before)
        fitted = Fitted(start, 0, 0, {})
        for phase in self.method.plan(self.world):
            fitted = _join(fitted, self._train(net, fitted.tree, inbox, before, phase, rows, streams, order.lr))
        trained = Trained(
            order.visit, order.round, net, start, fitted.tree, inbox, before,
            len(rows), fitted.steps, order.lr, self.trial.local.momentum, fitted.metrics,
        )  # fmt: skip
        payload, after = self.method.reply(trained)
        report = Report(
            order.visit,
            samples=len(rows),
            steps=fitted.steps,
            seen=fitted.samples,
            metrics={name: float(values.double().mean()) for name, values in fitted.metrics.items()},
            up_kinds=bytes_by_kind(payload),
            seconds=time.perf_counter() - started,
            finite=finite(payload) and finite(after),
        )
        return report, payload, after

    def score(self, shard: Shard, params: Tree | Parcel) -> Counts:
        """Counts of a model on a slice of the test set."""
        if shard.model not in self._opened:
            self._opened[shard.model] = self._tree(params)
        x = self._normal(self.x_test[shard.start : shard.stop])
        return count(self.world.net(shard.net), self._opened[shard.model], x, self.y_test[shard.start : shard.stop])

    def _train(
        self, net: Net, start: Tree, inbox: Inbox, memory: Tree, phase: Phase, rows: Rows, streams: Streams, lr: float
    ) -> Fitted:
        local = self.trial.local
        batches = visit_batches(
            self.method, net, inbox, memory, phase, rows, streams,
            batch=local.batch, epochs=local.epochs, drop_last=local.drop_last,
        )  # fmt: skip
        rule = Optimizer("sgd", lr * phase.lr_factor, local.momentum, local.weight_decay)
        return descend(start, lambda p, batch: self.method.loss(net, p, batch, inbox, memory), batches, rule)

    def _tree(self, tree: Tree | Parcel) -> Tree:
        return tree.open(self.device) if isinstance(tree, Parcel) else to(tree, self.device)

    def _inbox(self, order: Order, parts: Sequence[Tree | Parcel]) -> Inbox:
        if order.round != self._round:  # what is still held belongs to earlier rounds
            self._opened, self._round = {}, order.round
        inbox: Inbox = {"round": order.round}
        for key, part in zip(order.inboxes, parts, strict=True):
            if key not in self._opened:
                self._opened[key] = self._tree(part)
            inbox |= self._opened[key]
        return inbox

    def _normal(self, x: torch.Tensor) -> torch.Tensor:
        return normalise(x, self.card.mean, self.card.std)

    def _rows(self, client: int) -> Rows:
        index = torch.from_numpy(np.array(self.split.clients[client])).to(self.device)
        x = self._normal(self.x_train[index])
        level = float(self.shifts[client])
        if self.trial.partition.shift == "rotation" and level:
            x = rotate(x, level)
        elif self.trial.partition.shift == "noise" and level:
            noise = numpy_stream(self.trial.seed, "noise", client).standard_normal(tuple(x.shape), dtype=np.float32)
            spread = torch.tensor(self.card.std, device=self.device).view(-1, 1, 1)
            x = x + level / spread * torch.from_numpy(noise).to(self.device)
        how = self.card.augment
        wanted = self.trial.local.augment and (how.crop_pad or how.flip)
        return Rows(x, self.y_train[index], how if wanted else None)


def _join(first: Fitted, second: Fitted) -> Fitted:
    """Two stretches of training as one."""
    names = {**first.metrics, **second.metrics}
    empty = torch.empty(0)
    metrics: Mapping[str, torch.Tensor] = {
        n: torch.cat([f.metrics.get(n, empty).to(names[n].device) for f in (first, second)]) for n in names
    }
    return Fitted(second.tree, first.steps + second.steps, first.samples + second.samples, dict(metrics))


class InlinePool:
    """One host in this very process. Work is done when it is given."""

    def __init__(self, device: str = "cpu", threads: int = 1) -> None:
        self.host = ClientHost(device, threads)

    def load(self, setup: Setup) -> None:
        """Begins a trial."""
        self.host.load(setup)

    def put(self, tree: Tree) -> Tree:  # noqa: D102
        return tree

    def fetch(self, handle: Tree) -> Tree:  # noqa: D102
        return handle

    def visit(self, order: Order, parts: Sequence[Tree], memory: Tree | None) -> Answer:  # noqa: D102
        return self.host.visit(order, parts, memory)

    def answer(self, ticket: Answer) -> Answer:  # noqa: D102
        return ticket

    def score(self, shard: Shard, params: Tree) -> Counts:  # noqa: D102
        return self.host.score(shard, params)

    def counts(self, ticket: Counts) -> Counts:  # noqa: D102
        return ticket
