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

from harness.batches import Rows
from harness.books import Cost, Row, bytes_down, client_row, lost, merge_costs, merge_counts
from harness.cohorts import Roster, draw_cohort, draw_roster
from harness.evaluate import Counts, Vector, metrics, own_label_metrics, recall_of, spread, tail_classes, validated
from harness.fit import Workbench
from harness.protocol import Ensemble, Role, State, Update, Visit
from harness.refusal import Refused
from harness.trees import Tree, finite, stream, to
from harness.work import Order, Personal, Pool, Report, Setup, Shard, Stages, proxy_rows


class Diverged(RuntimeError):
    """A number that is not finite where training needs one. A result, not a crash."""


@dataclass(frozen=True)
class Tickets:
    """The pieces of one model's evaluation that are under way."""

    test: list[Any] = field(default_factory=list)
    validation: list[Any] = field(default_factory=list)


class Server:
    """Runs a trial round by round, on a pool that the trial was loaded into.

    mixes: [N, C] the label mixes behind the own-label metrics; None: those of the setup's clients.
    """

    def __init__(self, setup: Setup, pool: Pool, device: str = "cpu", mixes: Vector | None = None) -> None:
        self.setup, self.trial, self.pool, self.device = setup, setup.trial, pool, torch.device(device)
        self.stages = Stages(setup)
        self._enter(0)
        self.roles = dict(self.method.roles(self.world))
        for now in map(self.stages.at, self.stages.starts):
            if dict(now.method.roles(now.world)) != self.roles:
                raise Refused("schedule: a change may not make other roles, nets or cohorts than there were")
        self.state: State = to(self.method.init(self.world, stream(self.trial.seed, "init")), self.device)
        self.memories: dict[Visit, Any] = {}
        self.round = 0
        self.rounds: list[Row] = []
        self.clients: list[Row] = []
        self.proxy_holders: list[int] = []
        self._proxy_bytes = 0 if setup.proxy is None else sum(part.nbytes for part in setup.proxy)
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
        self._enter(self.round)
        costs = {name: Cost() for name in self.roles}
        updates = self._train(self._roster(), costs)
        merging = time.perf_counter()
        bench = self._bench()
        if updates:  # a round from which nothing came back changes nothing
            self.state = self.method.merge(self.state, updates, bench)
        models = {name: _members(model) for name, model in self.method.models(self.state).items()}
        for name, members in models.items():
            if not all(finite(params) for _, params in members):
                raise Diverged(f"diverged: the {name} model is not finite after round {self.round}")
        server = {"server_steps": bench.steps, "server_seconds": time.perf_counter() - merging}
        last = self.round + 1 == self.trial.rounds
        due = last or (self.round + 1) % self.trial.evaluation.every == 0
        tickets = {**self._score(models), **self._score_personal()} if due else {}
        names = list(dict.fromkeys([*models, *self._personal_names(), *tickets]))
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
        tables = {"rounds": self.rounds, "clients": self.clients, "proxy_holders": self.proxy_holders}
        return {"round": self.round, "state": self.state, "memories": memories, **tables}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Goes back to a snapshot of the same trial."""
        self.round, self.state = snapshot["round"], to(snapshot["state"], self.device)
        self.memories = {Visit(client, role): self.pool.put(tree) for client, role, tree in snapshot["memories"]}
        self.rounds, self.clients = list(snapshot["rounds"]), list(snapshot["clients"])
        self.proxy_holders = list(snapshot["proxy_holders"])

    def _enter(self, round: int) -> None:
        """Takes the method and the world of a round; their settings may change on the way."""
        now = self.stages.at(round)
        self.method, self.world, self._local = now.method, now.world, now.trial.local

    def _roster(self) -> Roster:
        trial, how = self.trial, self.trial.availability
        share, sizes, trace = trial.participation, self.world.sizes, self.setup.trace
        cohort = draw_cohort(trial.seed, self.round, self.roles, self.world.clients, share, how, sizes, trace)
        return draw_roster(trial.seed, cohort, how)

    def _train(self, roster: Roster, costs: dict[str, Cost]) -> list[Update]:
        """Sends the cohort off and collects its updates in order."""
        broadcast = self.method.broadcast(self.state, roster.cohort, self.world)
        sent = {"shared": self.pool.put(broadcast.shared)}
        sent |= {f"role/{name}": self.pool.put(inbox) for name, inbox in broadcast.by_role.items()}
        lr = self._local.lr * self._local.lr_decay**self.round
        tickets: dict[Visit, Any] = {}
        for visit in sorted(roster.cohort.visits, key=lambda v: -self.world.sizes[v.client]):  # longest work first
            if visit in roster.dropped:
                continue
            parts = {key: sent[key] for key in ("shared", f"role/{visit.role}") if key in sent}
            if visit in broadcast.personal:
                parts[f"visit/{visit.client}/{visit.role}"] = self.pool.put(broadcast.personal[visit])
            order = Order(visit, self.round, self.roles[visit.role].net, lr, tuple(parts), roster.work[visit])
            tickets[visit] = self.pool.visit(order, list(parts.values()), self.memories.get(visit))
        updates = []
        for visit in roster.cohort.visits:
            down = bytes_down(broadcast, visit)
            if visit in roster.dropped:
                self._book_client(lost(visit), down, costs[visit.role])
            else:
                updates.append(self._collect(visit, tickets.pop(visit), down, costs[visit.role]))
        return updates

    def _collect(self, visit: Visit, ticket: Any, down: dict[str, int], cost: Cost) -> Update:
        report, payload, memory = self.pool.answer(ticket)
        if not report.finite:
            raise Diverged(f"diverged: the update of client {visit.client} in round {self.round} is not finite")
        self.memories[visit] = memory
        if report.read_proxy and visit.client not in self.proxy_holders:  # it had to be sent, once
            self.proxy_holders.append(visit.client)
            down = merge_counts(down, {"proxy": self._proxy_bytes})
        self._book_client(report, down, cost)
        return Update(visit, report.samples, report.steps - report.extra, payload, report.metrics)

    def _book_client(self, report: Report, down: dict[str, int], cost: Cost) -> None:
        cost.add(report, down)
        self.clients.append({"round": self.round, **client_row(report, self.roles[report.visit.role].net, down)})

    def _bench(self) -> Workbench:
        @cache
        def proxy() -> Rows:
            return proxy_rows(self.setup, self.method.needs, self.device)

        zeros = torch.zeros(self.world.classes, dtype=torch.int64, device=self.device)
        key = (self.trial.seed, "server", self.round)
        return Workbench(key, self.device, zeros, {"proxy": proxy}, self.world, round=self.round)

    def _score(self, models: Mapping[str, Members]) -> dict[str, Tickets]:
        """Sends the evaluation off, in shards whose size does not depend on the number of hosts.

        With several domains there is also a row MODEL@DOMAIN for each, from the same shards.
        """
        tickets: dict[str, Tickets] = {}
        size, domains = self.trial.evaluation.batch, self.setup.domains
        rows = {name: len(own) for name, own in domains.items()} or {"": len(self.setup.arrays.y_test)}
        held = sum(len(own) for own in self.setup.split.validation)
        for name, members in models.items():
            sent = self.pool.put({str(i): params for i, (_, params) in enumerate(members)})
            nets, key = tuple(net for net, _ in members), f"model/{self.round}/{name}"
            validation = [Shard(nets, key, at, min(at + size, held), "", "validation") for at in range(0, held, size)]
            tickets[name] = Tickets(validation=[self.pool.score(shard, sent) for shard in validation])
            for domain, n in rows.items():
                shards = [Shard(nets, key, at, min(at + size, n), domain) for at in range(0, n, size)]
                own = [self.pool.score(shard, sent) for shard in shards]
                tickets[name].test.extend(own)
                if domain:
                    tickets[f"{name}@{domain}"] = Tickets(own)
        return tickets

    def _score_personal(self) -> dict[str, Tickets]:
        """The same for the models of all clients that were ever visited, each on its own rows."""
        tickets = {name: Tickets() for name in self._personal_names()}
        for visit, memory in sorted(self.memories.items()) if tickets else ():
            own, net = tickets[_personal(visit.role, self.roles)], self.roles[visit.role].net
            own.test.append(self.pool.score(Personal(visit, net, self.round), memory))
            if self.trial.holdout.validation:
                own.validation.append(self.pool.score(Personal(visit, net, self.round, "validation"), memory))
        return {name: found for name, found in tickets.items() if found.test}

    def _personal_names(self) -> list[str]:
        return [_personal(role, self.roles) for role in self.roles] if "private_test" in self.method.needs else []

    def _booking(
        self,
        round: int,
        names: Sequence[str],
        tickets: Mapping[str, Tickets],
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
                spent = reduce(merge_costs, own, Cost())
                first = {**server, "seconds": seconds} if i == 0 else dict.fromkeys([*server, "seconds"], 0)
                seen = self._metrics(name, tickets[name]) if name in tickets else {}
                self.rounds.append({"round": round, "role": name, **seen, **spent.row(), **first})

        return book

    def _row_of(self, role: str, names: Sequence[str]) -> str:
        return next((n for n in (role, _personal(role, self.roles)) if n in names), names[0])

    def _metrics(self, name: str, tickets: Tickets) -> Row:
        counts: list[Counts] = [self.pool.counts(ticket) for ticket in tickets.test]
        validation: list[Counts] = [self.pool.counts(ticket) for ticket in tickets.validation]
        total = reduce(add, counts)
        found = metrics(total, self._tail) | (validated(reduce(add, validation)) if validation else {})
        if name in self._personal_names():
            return {**found, **spread(np.array([c.hits.sum() / c.rows.sum() for c in counts if c.rows.sum()]))}
        return {**found, **own_label_metrics(recall_of(total), self._mixes)}


Members = tuple[tuple[str, Tree], ...]


def _members(model: tuple[str, Tree] | Ensemble) -> Members:
    return model.members if isinstance(model, Ensemble) else (model,)


def _personal(role: str, roles: Mapping[str, Role]) -> str:
    """What the clients' own models of a role are called in the table of rounds."""
    return "personal" if len(roles) == 1 else f"personal-{role}"
