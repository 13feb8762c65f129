"""`ClientHost` visits clients, one at a time. It holds nothing that matters: killing it changes no number."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
import torch

from harness import together
from harness.averages import gathered, summed
from harness.batches import Rows, ready, rotate
from harness.data import Arrays, card
from harness.evaluate import Counts, count_logits
from harness.fit import Fitted, Optimizer, Streams, Training, VisitLoss, Workbench, settle, train, visit_batches
from harness.partitions import shift
from harness.precision import check, in_precision
from harness.protocol import Batch, Inbox, Phase, Trained, Visit
from harness.trees import Parcel, Tree, bytes_by_kind, finite, numpy_stream, to, tree_map
from harness.work import (
    Answer,
    Asked,
    Order,
    Personal,
    Report,
    Setup,
    Shard,
    Stages,
    WorkFailed,
    proxy_rows,
    said,
)

T = TypeVar("T")
SCORED = 128  # rows at a time
SHORT = (torch.cuda.OutOfMemoryError, MemoryError)


@dataclass(frozen=True)
class Begun:
    """A visit about to train. seconds: what it took so far."""

    order: Order
    bench: Workbench
    training: Training
    seconds: float


class ClientHost:
    """Trains clients and scores models on one device. All results are functions of the arguments alone."""

    def __init__(self, device: str = "cpu", threads: int = 1) -> None:
        settle(threads)
        self.device = torch.device(device)
        self._arrays: Arrays | None = None

    def load(self, setup: Setup) -> None:
        """Begins a trial. Data that is on the device already stays there."""
        self.setup, self.stages = setup, Stages(setup)
        self._enter(0)
        check(self.trial.precision, self.device)
        self.card = card(setup.trial.dataset)
        if self._arrays is not setup.arrays:
            self._arrays = setup.arrays
            # A copy: arrays from the object store lie in shared memory that must not be written to.
            self.x_train = torch.tensor(setup.arrays.x_train, device=self.device)
            self.y_train = torch.tensor(setup.arrays.y_train, device=self.device)
            self.x_test = torch.tensor(setup.arrays.x_test, device=self.device)
            self.y_test = torch.tensor(setup.arrays.y_test, device=self.device)
        self.domains = {name: torch.tensor(rows, device=self.device) for name, rows in setup.domains.items()}
        self.shifts = shift(setup.trial.partition, setup.trial.clients, setup.trial.seed)
        self._proxy: Rows | None = None
        self._opened: dict[str, Tree] = {}
        self._round = -1

    def visit(self, order: Order, parts: Sequence[Tree | Parcel], memory: Tree | Parcel | None) -> Answer:
        """One client's round: inbox and memory in, report, payload and next memory out."""
        begun = self._begin(order, parts, memory)
        started = time.perf_counter()
        fitted = train(begun.training, self._loss(), self._rule(order))
        return self._end(begun, fitted, time.perf_counter() - started)

    def visits(self, asked: Sequence[Asked]) -> list[Answer | WorkFailed]:
        """Several visits of a round and a role, those of one kind trained at once (see `together`).

        The answers are a function of all that is asked here, who raises included: what one visit raises before or
        behind its training leaves the others at theirs, and a group in whose training something raises is trained
        one by one. Only a shortage of memory, which would be another one elsewhere, is raised.
        """
        begun = [caught(partial(self._begin, *one)) for one in asked]
        ready = [one for one in begun if isinstance(one, Begun)]
        found: dict[Visit, Answer | WorkFailed] = {}
        for places in together.groups([one.training for one in ready]):
            group = [ready[at] for at in places]
            started = time.perf_counter()
            fitted, alone = self._train(group)
            seconds = (time.perf_counter() - started) / len(group)
            for one, done in zip(group, fitted, strict=True):
                end = done if isinstance(done, WorkFailed) else caught(partial(self._end, one, done, seconds, alone))
                found[one.order.visit] = end
        return [found[one.order.visit] if isinstance(one, Begun) else one for one in begun]

    def gathered(self, orders: Sequence[Order], answers: Sequence[Answer | WorkFailed]) -> list[Tree | None]:
        """What is sent of each answer's payload: of a whole chunk that went well one mean of each part that is only
        summed. None for what failed. On the CPU, as the server would do it, so that it makes no difference.
        """
        payloads = [None if isinstance(one, WorkFailed) else one[1] for one in answers]
        chunks: dict[Any, list[int]] = {}
        for at in sorted(range(len(orders)), key=lambda at: orders[at].visit):  # the cohort's order, as in `merge`
            chunks.setdefault(orders[at].chunk, []).append(at)
        parts = summed(self.method)
        for chunk, places in chunks.items():
            whole = [one for at in places if not isinstance(one := answers[at], WorkFailed) and one[0].finite]
            if parts and chunk is not None and 1 < len(whole) == chunk.size:
                lean = gathered([to(one[1], "cpu") for one in whole], [one[0].samples for one in whole], parts)
                for at, payload in zip(places, lean, strict=True):
                    payloads[at] = payload
        return payloads

    def _loss(self) -> VisitLoss:
        return in_precision(self.trial.precision, self.method.loss, self.device)

    def _train(self, group: Sequence[Begun]) -> tuple[list[Fitted | WorkFailed], str]:
        loss, rule, alone = self._loss(), self._rule(group[0].order), "no other visit is of its kind"
        if len(group) > 1:
            stacked = caught(partial(together.train, [one.training for one in group], loss, rule))
            if not isinstance(stacked, WorkFailed):
                return [*stacked], ""
            alone = str(stacked)
        return [caught(partial(train, one.training, loss, rule)) for one in group], alone

    def _begin(self, order: Order, parts: Sequence[Tree | Parcel], memory: Tree | Parcel | None) -> Begun:
        started = time.perf_counter()
        self._enter(order.round)
        net, received = self.world.net(order.net), self._inbox(order, parts)
        bench = self._bench(order)
        before = self._tree(self.method.remember(net, received, bench.rng("memory")) if memory is None else memory)
        start = self.method.start(net, received, before)
        inbox = self.method.prepare(net, received, before, bench)
        phases = self.method.plan(self.world, inbox, before)

        def begin() -> Callable[[Phase], Iterable[Batch]]:
            streams, local = Streams(*(bench.rng(name) for name in ("order", "augment", "draw"))), self.trial.local
            return lambda phase: visit_batches(
                self.method, net, inbox, before, phase, bench.sources[phase.source](), streams,
                batch=local.batch, epochs=local.epochs, work=order.work, drop_last=local.drop_last,
            )  # fmt: skip

        return Begun(order, bench, Training(net, start, inbox, before, phases, begin), time.perf_counter() - started)

    def _end(self, begun: Begun, fitted: Fitted, seconds: float, alone: str = "") -> Answer:
        """What a visit answers. seconds: that its training took; alone: why it was not stacked with others."""
        started = time.perf_counter()
        order, bench, one = begun.order, begun.bench, begun.training
        samples = len(self.setup.split.clients[order.visit.client])
        trained = Trained(
            order.visit, order.round, one.net, one.start, fitted.tree, one.inbox, one.memory,
            samples, fitted.steps, order.lr, self.trial.local.momentum, fitted.metrics, bench,
        )  # fmt: skip
        payload, after = self.method.reply(trained)
        report = Report(
            order.visit,
            samples=samples,
            steps=fitted.steps + bench.steps,
            seen=fitted.samples + bench.samples,
            metrics={name: float(m.double().mean()) for name, m in fitted.metrics.items() if m.dim() == 1},
            up_kinds=bytes_by_kind(payload),
            seconds=begun.seconds + seconds + time.perf_counter() - started,
            finite=finite(payload) and finite(after),
            read_proxy=bench.read_proxy,
            extra=bench.steps,
            alone=alone,
        )
        bench.sources = {}  # its rows refer back to it: without this, they would stay until Python looks for cycles
        return report, payload, after

    def score(self, what: Shard | Personal, params: Tree | Parcel) -> Counts:
        """Counts of a model on a slice of what it is measured on, or of a client's own on the client's own rows."""
        if isinstance(what, Personal):
            self._enter(what.round)
            net = self.world.net(what.net)
            own = self.method.keeps(net, self._tree(params))
            if own is None:
                raise RuntimeError('a method that needs "private_test" must define what a client keeps')
            rows = self._rows(what.visit.client, getattr(self.setup.split, what.of))
            return count_logits(net.frozen(own, rows.x), rows.y)
        if what.model not in self._opened:
            self._opened[what.model] = self._tree(params)
        x, y = self._shard(what)
        members = list(self._opened[what.model].values())
        # On CPUs in parts that stay in the cache; for nets of several layers that takes half the time.
        parts = [x] if x.is_cuda else x.split(SCORED)
        said = [
            torch.cat([self.world.net(name).frozen(p, rows) for rows in parts])
            for name, p in zip(what.nets, members, strict=True)
        ]
        logits = said[0] if len(said) == 1 else torch.stack(said).mean(0)
        return count_logits(logits, y)

    def _shard(self, what: Shard) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels of a slice. Validation rows come client by client, each as its client sees it."""
        part = slice(what.start, what.stop)
        if what.of == "test":
            index = self.domains[what.domain][part] if what.domain else part
            return ready(self.x_test[index], self.card), self.y_test[index]
        held = self.setup.split.validation
        ends = np.cumsum([len(own) for own in held])
        first, last = np.searchsorted(ends, [what.start, what.stop - 1], side="right")
        rows = [self._rows(client, held) for client in range(first, last + 1)]
        skip = what.start - int(ends[first]) + len(held[first])
        part = slice(skip, skip + what.stop - what.start)
        return torch.cat([own.x for own in rows])[part], torch.cat([own.y for own in rows])[part]

    def relax(self) -> None:
        """Lets go of memory that is only held to be quick."""
        self._opened = {}
        gc.collect()
        torch.cuda.empty_cache()

    def _enter(self, round: int) -> None:
        """Takes the settings of a round; they may change on the way."""
        now = self.stages.at(round)
        self.trial, self.method, self.world = now.trial, now.method, now.world

    def _bench(self, order: Order) -> Workbench:
        client = order.visit.client

        @cache
        def rows(source: str) -> Rows:
            if source != "proxy":
                return self._rows(client, getattr(self.setup.split, "clients" if source == "private" else source))
            bench.read_proxy = True
            if self._proxy is None:
                self._proxy = proxy_rows(self.setup, self.method.needs, self.device)
            return self._proxy

        bench = Workbench(
            (self.trial.seed, "visit", order.round, client, order.visit.role),
            self.device,
            torch.from_numpy(self.setup.split.counts[client].copy()).to(self.device),
            {name: partial(rows, name) for name in ("private", "validation", "proxy")},
            self.world,
            round=order.round,
        )
        return bench

    def _rule(self, order: Order) -> Optimizer:
        local = self.trial.local
        return Optimizer("sgd", order.lr, local.momentum, local.weight_decay, local.clip)

    def _tree(self, tree: Tree | Parcel) -> Tree:
        return tree.open(self.device) if isinstance(tree, Parcel) else to(tree, self.device)

    def _inbox(self, order: Order, parts: Sequence[Tree | Parcel]) -> Inbox:
        if order.round != self._round:  # what is still held belongs to earlier rounds
            self._opened, self._round = {}, order.round
        inbox: Inbox = {"round": order.round}
        for key, part in zip(order.inboxes, parts, strict=True):
            if key not in self._opened:
                opened = self._tree(part)
                # Personal tensors are objects of their own, as on hosts that get them one by one: see `together`.
                self._opened[key] = tree_map(lambda x: x.view_as(x), opened) if key.startswith("visit/") else opened
            inbox |= self._opened[key]
        return inbox

    def _rows(self, client: int, held: Sequence[Any]) -> Rows:
        index = torch.from_numpy(np.array(held[client])).to(self.device)
        x = ready(self.x_train[index], self.card)
        level = float(self.shifts[client]) if self.trial.partition.shift != "none" else 0.0
        if self.trial.partition.shift == "rotation" and level:
            x = rotate(x, level)
        elif level:
            noise = numpy_stream(self.trial.seed, "noise", client).standard_normal(tuple(x.shape), dtype=np.float32)
            spread = torch.tensor(self.card.std, device=self.device).view(-1, 1, 1)
            x = x + level / spread * torch.from_numpy(noise).to(self.device)
        how = self.card.augment
        wanted = held is self.setup.split.clients and self.trial.local.augment and (how.crop_pad or how.flip)
        return Rows(x, self.y_train[index], how if wanted else None)


def caught(work: Callable[[], T]) -> T | WorkFailed:
    """What work gives, or what it raised; a shortage of memory is raised."""
    try:
        return work()
    except SHORT:
        raise
    except Exception as error:
        return WorkFailed(said(error)).with_traceback(error.__traceback__)
