"""`Server`: the round, the state, and the server-side training. A plain class; where it runs is not its business.

It owns everything that outlives a visit: the method's state, the clients' memories, the counters. Replies are
resolved in the order of the visits, never in the order in which they came.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any, Literal

import numpy as np
import torch
from torch import Generator

from harness import registry
from harness.evaluate import Counts, metrics, own_label_metrics, tail_classes
from harness.fit import Optimizer, descend
from harness.host import Order, Pool, Report, Setup, Shard, make_world
from harness.protocol import Batch, Broadcast, Cohort, Role, ServerLoss, State, Update, Visit, World
from harness.trees import Tree, bytes_by_kind, finite, numpy_stream, stream, to

Row = dict[str, Any]


class Diverged(RuntimeError):
    """A number that is not finite where training needs one. A result, not a crash."""


@dataclass
class Bench:
    """What a method's `merge` works with: implements `protocol.Server` and counts what is spent."""

    world: World
    round: int
    seed: int
    device: torch.device
    steps: int = 0

    def rng(self, purpose: str) -> Generator:
        """A stream of (seed, round, purpose)."""
        return stream(self.seed, "server", self.round, purpose, device=self.device)

    def fit(
        self,
        p: Tree,
        loss: ServerLoss,
        draw: Callable[[int], Batch],
        steps: int,
        *,
        optimizer: Literal["sgd", "adam"] = "adam",
        lr: float,
        weight_decay: float = 0.0,
    ) -> Tree:
        """`steps` steps on `loss` from `p`."""
        self.steps += steps
        batches = (draw(step) for step in range(steps))
        rule = Optimizer(optimizer, lr, weight_decay=weight_decay)
        return descend(p, lambda tree, batch: (loss(tree, batch), {}), batches, rule).tree


@dataclass
class Cost:
    """What a pool of clients spent in a round."""

    up_kinds: dict[str, int] = field(default_factory=dict)
    down_kinds: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    samples: int = 0
    loss: float = 0.0  # summed over visits, weighted by rows
    rows: int = 0

    def row(self) -> Row:
        """The columns of the table of rounds."""
        return {
            "up_bytes": sum(self.up_kinds.values()),
            "down_bytes": sum(self.down_kinds.values()),
            "up_kinds": dict(self.up_kinds),
            "down_kinds": dict(self.down_kinds),
            "steps": self.steps,
            "samples": self.samples,
            "train_loss": self.loss / self.rows if self.rows else None,
        }


def draw_cohort(seed: int, round: int, roles: Mapping[str, Role], clients: int, participation: float) -> Cohort:
    """Who takes part: drawn without replacement, from the seed, the round and the role's name alone."""
    visits: list[Visit] = []
    for name, role in roles.items():
        eligible = np.arange(clients) if role.clients is None else np.array(sorted(role.clients))
        size = min(len(eligible), role.cohort or max(1, int(len(eligible) * participation + 1e-9)))
        picked = numpy_stream(seed, "cohort", round, name).choice(eligible, size, replace=False)
        visits += [Visit(int(client), name) for client in picked]
    return Cohort(round, tuple(sorted(visits)))


class Server:
    """Runs a trial round by round, on a pool that the trial was loaded into."""

    def __init__(self, setup: Setup, pool: Pool, device: str = "cpu") -> None:
        trial, arrays, split = setup.trial, setup.arrays, setup.split
        self.trial, self.pool, self.device = trial, pool, torch.device(device)
        self.method = registry.make(trial.method, trial.hyper)
        self.world = make_world(trial, arrays, split, self.method.needs)
        self.roles = dict(self.method.roles(self.world))
        self.state: State = to(self.method.init(self.world, stream(trial.seed, "init")), self.device)
        self.memories: dict[Visit, Any] = {}
        self.round = 0
        self.rounds: list[Row] = []
        self.clients: list[Row] = []
        self._test_rows = len(arrays.y_test)
        self._tail = tail_classes(split.counts.sum(0), trial.evaluation.tail)
        self._mixes = split.counts[split.counts.sum(1) > 0] / split.counts.sum(1, keepdims=True).clip(1)
        self._late: Callable[[], None] | None = None  # books the round whose evaluation is under way

    @property
    def done(self) -> bool:
        """Whether every round was run."""
        return self.round >= self.trial.rounds

    def step(self) -> None:
        """One round. Its rows are booked when its evaluation is in, which is during the next round at the latest."""
        started = time.perf_counter()
        cohort = draw_cohort(self.trial.seed, self.round, self.roles, self.trial.clients, self.trial.participation)
        costs = {name: Cost() for name in self.roles}
        updates = self._train(cohort, costs)
        merging = time.perf_counter()
        bench = Bench(self.world, self.round, self.trial.seed, self.device)
        self.state = self.method.merge(self.state, updates, bench)
        models = self.method.models(self.state)
        for name, (_, params) in models.items():
            if not finite(params):
                raise Diverged(f"diverged: the {name} model is not finite after round {self.round}")
        server = {"server_steps": bench.steps, "server_seconds": time.perf_counter() - merging}
        last = self.round + 1 == self.trial.rounds
        tickets = self._score(models) if last or (self.round + 1) % self.trial.evaluation.every == 0 else {}
        self.flush()
        self._late = self._booking(self.round, list(models), tickets, costs, server, started)
        self.round += 1
        if last:
            self.flush()

    def flush(self) -> None:
        """Books the round whose evaluation is still under way."""
        if self._late is not None:
            book, self._late = self._late, None
            book()

    def _train(self, cohort: Cohort, costs: dict[str, Cost]) -> list[Update]:
        """Sends the cohort off and collects its updates in order."""
        broadcast = self.method.broadcast(self.state, cohort, self.world)
        sent = {"shared": self.pool.put(broadcast.shared)}
        sent |= {f"role/{name}": self.pool.put(inbox) for name, inbox in broadcast.by_role.items()}
        lr = self.trial.local.lr * self.trial.local.lr_decay**self.round
        tickets: dict[Visit, Any] = {}
        for visit in sorted(cohort.visits, key=lambda v: -self.world.sizes[v.client]):  # the longest work first
            parts = {key: sent[key] for key in ("shared", f"role/{visit.role}") if key in sent}
            if visit in broadcast.personal:
                parts[f"visit/{visit.client}/{visit.role}"] = self.pool.put(broadcast.personal[visit])
            order = Order(visit, self.round, self.roles[visit.role].net, lr, tuple(parts))
            tickets[visit] = self.pool.visit(order, list(parts.values()), self.memories.get(visit))
        return [self._collect(visit, tickets.pop(visit), broadcast, costs[visit.role]) for visit in cohort.visits]

    def _collect(self, visit: Visit, ticket: Any, broadcast: Broadcast, cost: Cost) -> Update:
        report, payload, memory = self.pool.answer(ticket)
        if not report.finite:
            raise Diverged(f"diverged: the update of client {visit.client} in round {self.round} is not finite")
        self.memories[visit] = memory
        parts = (broadcast.shared, broadcast.by_role.get(visit.role, {}), broadcast.personal.get(visit, {}))
        down: dict[str, int] = {}
        for part in parts:
            down = _merge_counts(down, bytes_by_kind(part))
        self._book_client(report, down, cost)
        return Update(visit, report.samples, report.steps, payload, report.metrics)

    def _book_client(self, report: Report, down: dict[str, int], cost: Cost) -> None:
        loss = report.metrics.get("loss")
        cost.up_kinds = _merge_counts(cost.up_kinds, report.up_kinds)
        cost.down_kinds = _merge_counts(cost.down_kinds, down)
        cost.steps += report.steps
        cost.samples += report.seen
        if loss is not None:
            cost.loss += loss * report.samples
            cost.rows += report.samples
        self.clients.append(
            {
                "round": self.round,
                "client": report.visit.client,
                "role": report.visit.role,
                "arch": self.roles[report.visit.role].net,
                "samples": report.samples,
                "steps": report.steps,
                "train_loss": loss,
                "up_bytes": sum(report.up_kinds.values()),
                "down_bytes": sum(down.values()),
                "seconds": report.seconds,
            }
        )

    def _score(self, models: dict[str, tuple[str, Tree]]) -> dict[str, list[Any]]:
        """Sends the evaluation off, in shards whose size does not depend on the number of hosts."""
        tickets: dict[str, list[Any]] = {}
        size = self.trial.evaluation.batch
        for name, (net, params) in models.items():
            sent = self.pool.put(params)
            key = f"model/{self.round}/{name}"
            shards = [Shard(net, key, at, min(at + size, self._test_rows)) for at in range(0, self._test_rows, size)]
            tickets[name] = [self.pool.score(shard, sent) for shard in shards]
        return tickets

    def _booking(
        self,
        round: int,
        names: Sequence[str],
        tickets: dict[str, list[Any]],
        costs: dict[str, Cost],
        server: Row,
        started: float,
    ) -> Callable[[], None]:
        """What books a round: one row per model; costs on the row of the pool they belong to, so that sums are right.

        A pool has a model of its own name or belongs to the first model.
        """
        seconds = time.perf_counter() - started

        def book() -> None:
            for i, name in enumerate(names):
                own = [c for role, c in costs.items() if role == name or (i == 0 and role not in names)]
                spent = reduce(_merge_costs, own, Cost())
                first = {**server, "seconds": seconds} if i == 0 else dict.fromkeys([*server, "seconds"], 0)
                seen = self._metrics(tickets[name]) if name in tickets else {}
                self.rounds.append({"round": round, "role": name, **seen, **spent.row(), **first})

        return book

    def _metrics(self, tickets: list[Any]) -> Row:
        counts: list[Counts] = [self.pool.counts(ticket) for ticket in tickets]
        found = metrics(reduce(add, counts), self._tail)
        return {**found, **own_label_metrics(np.array(found["recall"]), self._mixes)}


def _merge_counts(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in sorted({*a, *b})}


def _merge_costs(a: Cost, b: Cost) -> Cost:
    return Cost(
        _merge_counts(a.up_kinds, b.up_kinds),
        _merge_counts(a.down_kinds, b.down_kinds),
        a.steps + b.steps,
        a.samples + b.samples,
        a.loss + b.loss,
        a.rows + b.rows,
    )
