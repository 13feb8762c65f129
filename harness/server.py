"""`Server`: the round, the state, and the server-side training. A plain class; where it runs is not its business.

It owns everything that outlives a visit: the method's state, the clients' memories, the counters. Replies are
resolved in the order of the visits, never in the order in which they came.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, reduce
from typing import Any, Literal

import numpy as np
import torch

from harness.batches import Rows
from harness.books import Cost, Pages, Row, bytes_down, client_row, lost, merge_costs, merge_counts
from harness.cohorts import Roster, draw_cohort, draw_roster
from harness.evaluate import Vector
from harness.fit import Workbench
from harness.protocol import State, Update, Visit
from harness.refusal import Refused
from harness.scoring import Scoring, Tickets, members_of
from harness.trees import CHUNK, finite, stream, to
from harness.work import Chunk, Event, Order, Pool, Report, Setup, Stages, WorkFailed, event, proxy_rows

MANY = 3 * CHUNK  # visits from which on a cohort is sent off in chunks


class Diverged(RuntimeError):
    """A number that is not finite where training needs one. A result, not a crash."""


class NoUpdates(RuntimeError):
    """Too many rounds in a row from which nothing came back."""


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
        self.rounds = Pages()
        self.clients = Pages()
        self.events: list[Event] = []
        self.proxy_holders: list[int] = []
        self._sizes = np.asarray(self.world.sizes)  # as an array, for cohorts of very many clients
        self._proxy_bytes = 0 if setup.proxy is None else sum(part.nbytes for part in setup.proxy)
        self.scoring = Scoring(setup, pool, self.roles, "private_test" in self.method.needs, mixes)
        self._empty = 0  # rounds in a row from which nothing came back
        self._late: Callable[[], None] | None = None  # books the round whose evaluation is under way

    @property
    def done(self) -> bool:
        """Whether every round was run."""
        return self.round >= self.trial.rounds

    def step(self) -> None:
        """One round. Its rows are booked when its evaluation is in, which is during the next round at the latest.

        Raises Diverged, WorkFailed or NoUpdates, as the trial's `faults` have it; the rounds before are booked then.
        """
        try:
            self._step()
        except Exception:
            with suppress(Exception):
                self.flush()
            raise
        finally:
            self.events += self.pool.drain()

    def _step(self) -> None:
        started = time.perf_counter()
        self._enter(self.round)
        costs = {name: Cost() for name in self.roles}
        updates = self._train(self._roster(), costs)
        self._count_empty(bool(updates))
        merging = time.perf_counter()
        bench = self._bench()
        if updates:  # a round from which nothing came back changes nothing
            self.state = self.method.merge(self.state, updates, bench)
        models = {name: members_of(model) for name, model in self.method.models(self.state).items()}
        for name, members in models.items():
            if not all(finite(params) for _, params in members):
                raise Diverged(f"diverged: the {name} model is not finite after round {self.round}")
        server = {"server_steps": bench.steps, "server_seconds": time.perf_counter() - merging}
        last = self.round + 1 == self.trial.rounds
        due = last or (self.round + 1) % self.trial.evaluation.every == 0
        tickets = self.scoring.send(self.round, models, self.memories) if due else {}
        names = list(dict.fromkeys([*models, *self.scoring.own_names, *tickets]))
        self.flush()
        self._late = self._booking(self.round, names, tickets, costs, server, started)
        self.round += 1
        if last:
            self.flush()
        most = self.trial.faults.empty_rounds
        if most and self._empty >= most:
            since = f"rounds {self.round - self._empty} to {self.round - 1}"
            raise NoUpdates(f"no update came back in {self._empty} rounds in a row, {since} (faults.empty_rounds)")

    def flush(self) -> None:
        """Books the round whose evaluation is still under way."""
        if self._late is not None:
            book, self._late = self._late, None
            book()

    def snapshot(self) -> dict[str, Any]:
        """All that a server needs to go on from here, bit for bit: what `checkpoint.pack` takes."""
        self.flush()
        memories = [[v.client, v.role, self.pool.fetch(handle)] for v, handle in sorted(self.memories.items())]
        self.events += self.pool.drain()
        rows = {"rounds": self.rounds.packed(), "clients": self.clients.packed(), "events": list(self.events)}
        more = {"proxy_holders": self.proxy_holders, "empty": self._empty}
        return {"round": self.round, "state": self.state, "memories": memories, **rows, **more}

    def tables(self) -> dict[str, list[Row]]:
        """All rows so far, by table."""
        self.events += self.pool.drain()
        return {"rounds": list(self.rounds), "clients": list(self.clients), "events": self.events}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Goes back to a snapshot of the same trial."""
        self.round, self.state = snapshot["round"], to(snapshot["state"], self.device)
        self.memories = {Visit(client, role): self.pool.put(tree) for client, role, tree in snapshot["memories"]}
        self.rounds, self.clients = Pages.unpacked(snapshot["rounds"]), Pages.unpacked(snapshot["clients"])
        self.events, self._empty = list(snapshot.get("events", [])), snapshot.get("empty", 0)
        self.proxy_holders = list(snapshot["proxy_holders"])

    def _enter(self, round: int) -> None:
        """Takes the method and the world of a round; their settings may change on the way."""
        now = self.stages.at(round)
        self.method, self.world, self._local = now.method, now.world, now.trial.local

    def _roster(self) -> Roster:
        trial, how, sizes = self.trial, self.trial.availability, self._sizes
        share, clients, trace = trial.participation, self.world.clients, self.setup.trace
        cohort = draw_cohort(trial.seed, self.round, self.roles, clients, share, how, sizes, trace)
        return draw_roster(trial.seed, cohort, how)

    def _train(self, roster: Roster, costs: dict[str, Cost]) -> list[Update]:
        """Sends the cohort off and collects its updates in order."""
        broadcast = self.method.broadcast(self.state, roster.cohort, self.world)
        sent = {"shared": self.pool.put(broadcast.shared)}
        sent |= {f"role/{name}": self.pool.put(inbox) for name, inbox in broadcast.by_role.items()}
        lr = self._local.lr * self._local.lr_decay**self.round
        tickets: dict[Visit, Any] = {}
        chunks = self._chunks(roster)
        for group in self._groups(chunks):
            asked = []
            for visit in group:
                parts = {key: sent[key] for key in ("shared", f"role/{visit.role}") if key in sent}
                if visit in broadcast.personal:
                    parts[f"visit/{visit.client}/{visit.role}"] = self.pool.put(broadcast.personal[visit])
                net, work = self.roles[visit.role].net, roster.work[visit]
                order = Order(visit, self.round, net, lr, tuple(parts), work, chunks[visit])
                asked.append((order, list(parts.values()), self.memories.get(visit)))
            given = self.pool.visits(asked) if len(asked) > 1 else [self.pool.visit(*asked[0])]
            tickets |= zip(group, given, strict=True)
        updates, received = [], bytes_down(broadcast)
        for visit in roster.cohort.visits:
            down = received(visit)
            if visit in roster.dropped:
                self._book_client(lost(visit), down, costs[visit.role])
            elif (update := self._collect(visit, tickets.pop(visit), down, costs[visit.role])) is not None:
                updates.append(replace(update, chunk=chunks[visit].number))
        return updates

    def _chunks(self, roster: Roster) -> dict[Visit, Chunk]:
        """Whose means may be taken before they are sent: of each role, so many at a time, in the cohort's order."""
        found: dict[Visit, Chunk] = {}
        for role in self.roles:
            own = [visit for visit in roster.cohort.visits if visit.role == role and visit not in roster.dropped]
            for number, start in enumerate(range(0, len(own), CHUNK)):
                members = own[start : start + CHUNK]
                found |= dict.fromkeys(members, Chunk(role, number, len(members)))
        return found

    def _groups(self, chunks: Mapping[Visit, Chunk]) -> list[list[Visit]]:
        """The visits as they are sent off, longest first; `together` of a role at a time, which makes their lengths
        alike. It follows from the settings alone, because who trains with whom is part of the bits.

        Of large cohorts, and of short visits, chunk by chunk, so that a host can have the whole of one.
        """
        groups: list[list[Visit]] = []
        filling: dict[str, list[Visit]] = {}
        sizes, many = self.world.sizes, self.trial.together == 1 and (len(chunks) >= MANY or self.pool.brisk)
        load = Counter[Chunk]()
        for visit, chunk in chunks.items() if many else ():
            load[chunk] += sizes[visit.client]
        for visit in sorted(chunks, key=lambda v: (-load[chunks[v]], chunks[v] if many else (), -sizes[v.client])):
            if len(filling.get(visit.role, ())) % self.trial.together == 0:
                filling[visit.role] = []
                groups.append(filling[visit.role])
            filling[visit.role].append(visit)
        return groups

    def _collect(self, visit: Visit, ticket: Any, down: dict[str, int], cost: Cost) -> Update | None:
        """An update, booked; None if nothing came of the visit, or nothing that may be merged."""
        try:
            report, payload, memory = self.pool.answer(ticket)
        except WorkFailed as error:
            why = str(error) if len(self.roles) == 1 else f"as {visit.role}: {error}"
            failure = WorkFailed(f"client {visit.client} in round {self.round}: {why}")
            self._give_up(visit, why, self.trial.faults.client, failure)
            self._book_client(lost(visit), down, cost)
            return None
        if not report.finite:
            what = f"diverged: the update of client {visit.client} in round {self.round} is not finite"
            self._give_up(visit, "its update is not finite", self.trial.faults.nonfinite, Diverged(what))
            report = replace(report, metrics={name: x for name, x in report.metrics.items() if math.isfinite(x)})
        if report.read_proxy and visit.client not in self.proxy_holders:  # it had to be sent, once
            self.proxy_holders.append(visit.client)
            down = merge_counts(down, {"proxy": self._proxy_bytes})
        self._book_client(report, down, cost)
        if report.alone and not any(one["kind"] == "trained_alone" for one in self.events):
            self._note("trained_alone", f"not together with others, here and where it is as here: {report.alone}")
        if not report.finite:
            return None
        self.memories[visit] = memory
        return Update(visit, report.samples, report.steps - report.extra, payload, report.metrics)

    def _give_up(self, visit: Visit, why: str, policy: Literal["fail", "skip"], failure: RuntimeError) -> None:
        """Leaves a visit out, or fails."""
        self._note("client_failed" if policy == "fail" else "client_skipped", why, visit.client)
        if policy == "fail":
            raise failure

    def _count_empty(self, came: bool) -> None:
        self._empty = 0 if came else self._empty + 1
        if not came:
            self._note("empty_round", f"nothing came back: round {self._empty} of its kind in a row")

    def _note(self, kind: str, detail: str, client: int | None = None) -> None:
        self.events += self.pool.drain()
        self.events.append(event(kind, detail, self.round, client))

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
                own = [cost for role, cost in costs.items() if name == self.scoring.row_of(role, names)]
                spent = reduce(merge_costs, own, Cost())
                first = {**server, "seconds": seconds} if i == 0 else dict.fromkeys([*server, "seconds"], 0)
                seen = self.scoring.read(name, tickets[name]) if name in tickets else {}
                self.rounds.append({"round": round, "role": name, **seen, **spent.row(), **first})

        return book
