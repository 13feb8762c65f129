"""`Server`: the round, the state, and the server-side training. A plain class; where it runs is not its business.

It owns everything that outlives a visit: the method's state, the clients' memories, the counters. Replies are
resolved in the order of the visits, never in the order in which they came.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, reduce
from operator import add
from typing import Any

import numpy as np
import torch

from harness import registry
from harness.batches import Rows
from harness.evaluate import Counts, Vector, metrics, own_label_metrics, spread, tail_classes
from harness.fit import Workbench
from harness.protocol import Broadcast, Cohort, Ensemble, Role, State, Update, Visit
from harness.trees import Tree, bytes_by_kind, finite, numpy_stream, stream, to
from harness.work import Order, Personal, Pool, Report, Setup, Shard, make_world, proxy_rows

Row = dict[str, Any]


class Diverged(RuntimeError):
    """A number that is not finite where training needs one. A result, not a crash."""


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
    """Runs a trial round by round, on a pool that the trial was loaded into.

    mixes: [N, C] the label mixes behind the own-label metrics; None: those of the setup's clients.
    """

    def __init__(self, setup: Setup, pool: Pool, device: str = "cpu", mixes: Vector | None = None) -> None:
        self.setup, self.trial, self.pool, self.device = setup, setup.trial, pool, torch.device(device)
        self.method = registry.make(self.trial.method, self.trial.hyper)
        self.world = make_world(setup, self.method.needs)
        self.roles = dict(self.method.roles(self.world))
        self.state: State = to(self.method.init(self.world, stream(self.trial.seed, "init")), self.device)
        self.memories: dict[Visit, Any] = {}
        self.round = 0
        self.rounds: list[Row] = []
        self.clients: list[Row] = []
        counts = setup.split.counts
        held = counts[counts.sum(1) > 0]
        self._tail = tail_classes(counts.sum(0), self.trial.evaluation.tail)
        self._mixes = held / held.sum(1, keepdims=True) if mixes is None else mixes
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
        bench = self._bench()
        self.state = self.method.merge(self.state, updates, bench)
        models = {name: _members(model) for name, model in self.method.models(self.state).items()}
        for name, members in models.items():
            if not all(finite(params) for _, params in members):
                raise Diverged(f"diverged: the {name} model is not finite after round {self.round}")
        server = {"server_steps": bench.steps, "server_seconds": time.perf_counter() - merging}
        last = self.round + 1 == self.trial.rounds
        due = last or (self.round + 1) % self.trial.evaluation.every == 0
        names = [*models, *self._personal_names()]
        tickets = {**self._score(models), **self._score_personal()} if due else {}
        self.flush()
        self._late = self._booking(self.round, names, tickets, costs, server, started)
        self.round += 1
        if last:
            self.flush()

    def flush(self) -> None:
        """Books the round whose evaluation is still under way."""
        if self._late is not None:
            book, self._late = self._late, None
            book()

    def snapshot(self) -> dict[str, Any]:
        """All that a server needs to go on from here, bit for bit: what `checkpoint.pack` takes."""
        self.flush()
        memories = [[v.client, v.role, self.pool.fetch(handle)] for v, handle in sorted(self.memories.items())]
        kept = {"state": self.state, "memories": memories, "rounds": self.rounds, "clients": self.clients}
        return {"round": self.round, **kept}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Goes back to a snapshot of the same trial."""
        self.round, self.state = snapshot["round"], to(snapshot["state"], self.device)
        self.memories = {Visit(client, role): self.pool.put(tree) for client, role, tree in snapshot["memories"]}
        self.rounds, self.clients = list(snapshot["rounds"]), list(snapshot["clients"])

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

    def _bench(self) -> Workbench:
        @cache
        def proxy() -> Rows:
            return proxy_rows(self.setup, self.method.needs, self.device)

        zeros = torch.zeros(self.world.classes, dtype=torch.int64, device=self.device)
        key = (self.trial.seed, "server", self.round)
        return Workbench(key, self.device, zeros, {"proxy": proxy}, self.world, round=self.round)

    def _score(self, models: Mapping[str, Members]) -> dict[str, list[Any]]:
        """Sends the evaluation off, in shards whose size does not depend on the number of hosts."""
        tickets: dict[str, list[Any]] = {}
        size, rows = self.trial.evaluation.batch, len(self.setup.arrays.y_test)
        for name, members in models.items():
            sent = self.pool.put({str(i): params for i, (_, params) in enumerate(members)})
            nets, key = tuple(net for net, _ in members), f"model/{self.round}/{name}"
            shards = [Shard(nets, key, at, min(at + size, rows)) for at in range(0, rows, size)]
            tickets[name] = [self.pool.score(shard, sent) for shard in shards]
        return tickets

    def _score_personal(self) -> dict[str, list[Any]]:
        """The same for the models of all clients that were ever visited, each on its own test rows."""
        tickets: dict[str, list[Any]] = {name: [] for name in self._personal_names()}
        for visit, memory in sorted(self.memories.items()) if tickets else ():
            what = Personal(visit, self.roles[visit.role].net)
            tickets[_personal(visit.role, self.roles)].append(self.pool.score(what, memory))
        return {name: found for name, found in tickets.items() if found}

    def _personal_names(self) -> list[str]:
        return [_personal(role, self.roles) for role in self.roles] if "private_test" in self.method.needs else []

    def _booking(
        self,
        round: int,
        names: Sequence[str],
        tickets: dict[str, list[Any]],
        costs: dict[str, Cost],
        server: Row,
        started: float,
    ) -> Callable[[], None]:
        """What books a round: one row per model; costs on the row of the role they belong to, so that sums are right.

        A role has a model of its own name, or a personal one, or belongs to the first model.
        """
        seconds = time.perf_counter() - started

        def book() -> None:
            for i, name in enumerate(names):
                own = [cost for role, cost in costs.items() if name == self._row_of(role, names)]
                spent = reduce(_merge_costs, own, Cost())
                first = {**server, "seconds": seconds} if i == 0 else dict.fromkeys([*server, "seconds"], 0)
                seen = self._metrics(name, tickets[name]) if name in tickets else {}
                self.rounds.append({"round": round, "role": name, **seen, **spent.row(), **first})

        return book

    def _row_of(self, role: str, names: Sequence[str]) -> str:
        return next((n for n in (role, _personal(role, self.roles)) if n in names), names[0])

    def _metrics(self, name: str, tickets: list[Any]) -> Row:
        counts: list[Counts] = [self.pool.counts(ticket) for ticket in tickets]
        found = metrics(reduce(add, counts), self._tail)
        if name in self._personal_names():
            return {**found, **spread(np.array([c.hits.sum() / c.rows.sum() for c in counts if c.rows.sum()]))}
        return {**found, **own_label_metrics(np.array(found["recall"]), self._mixes)}


Members = tuple[tuple[str, Tree], ...]


def _members(model: tuple[str, Tree] | Ensemble) -> Members:
    return model.members if isinstance(model, Ensemble) else (model,)


def _personal(role: str, roles: Mapping[str, Role]) -> str:
    """What the clients' own models of a role are called in the table of rounds."""
    return "personal" if len(roles) == 1 else f"personal-{role}"


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
