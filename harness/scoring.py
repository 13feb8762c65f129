"""The evaluation half of a server: what is sent off to be scored after a round, and what is read from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from harness.books import Row
from harness.evaluate import Counts, Vector, metrics, own_label_metrics, recall_of, spread, tail_classes, validated
from harness.protocol import Ensemble, Role, Visit
from harness.trees import Tree
from harness.work import Personal, Pool, Setup, Shard

Members = tuple[tuple[str, Tree], ...]


@dataclass(frozen=True)
class Tickets:
    """The pieces of one model's evaluation that are under way."""

    test: list[Any] = field(default_factory=list)
    validation: list[Any] = field(default_factory=list)


class Scoring:
    """Scores models on a trial's pool. personal: clients keep models of their own; mixes: as the server has them."""

    def __init__(self, setup: Setup, pool: Pool, roles: Mapping[str, Role], personal: bool, mixes: Vector | None):
        counts = setup.split.counts
        held = counts[counts.sum(1) > 0]
        self.setup, self.pool, self.roles = setup, pool, roles
        self.own_names = [self._own_name(role) for role in roles] if personal else []
        self._tail = tail_classes(counts.sum(0), setup.trial.evaluation.tail)
        self._mixes = held / held.sum(1, keepdims=True) if mixes is None else mixes

    def send(self, round: int, models: Mapping[str, Members], memories: Mapping[Visit, Any]) -> dict[str, Tickets]:
        """Sends all models of a round off; returns their tickets by name."""
        return {**self._send_global(round, models), **self._send_own(round, memories)}

    def _send_global(self, round: int, models: Mapping[str, Members]) -> dict[str, Tickets]:
        """In shards whose size does not depend on the number of hosts.

        With several domains there is also a row MODEL@DOMAIN for each, from the same shards.
        """
        tickets: dict[str, Tickets] = {}
        size, domains = self.setup.trial.evaluation.batch, self.setup.domains
        rows = {name: len(own) for name, own in domains.items()} or {"": len(self.setup.arrays.y_test)}
        held = sum(len(own) for own in self.setup.split.validation)
        for name, members in models.items():
            sent = self.pool.put({str(i): params for i, (_, params) in enumerate(members)})
            nets, key = tuple(net for net, _ in members), f"model/{round}/{name}"
            validation = [Shard(nets, key, at, min(at + size, held), "", "validation") for at in range(0, held, size)]
            tickets[name] = Tickets(validation=[self.pool.score(shard, sent) for shard in validation])
            for domain, n in rows.items():
                shards = [Shard(nets, key, at, min(at + size, n), domain) for at in range(0, n, size)]
                own = [self.pool.score(shard, sent) for shard in shards]
                tickets[name].test.extend(own)
                if domain:
                    tickets[f"{name}@{domain}"] = Tickets(own)
        return tickets

    def _send_own(self, round: int, memories: Mapping[Visit, Any]) -> dict[str, Tickets]:
        """The models of all clients that were ever visited, each on its own rows."""
        tickets = {name: Tickets() for name in self.own_names}
        for visit, memory in sorted(memories.items()) if tickets else ():
            own, net = tickets[self._own_name(visit.role)], self.roles[visit.role].net
            own.test.append(self.pool.score(Personal(visit, net, round), memory))
            if self.setup.trial.holdout.validation:
                own.validation.append(self.pool.score(Personal(visit, net, round, "validation"), memory))
        return {name: found for name, found in tickets.items() if found.test}

    def read(self, name: str, tickets: Tickets) -> Row:
        """Waits for a model's tickets: the metrics of its row."""
        counts: list[Counts] = [self.pool.counts(ticket) for ticket in tickets.test]
        validation: list[Counts] = [self.pool.counts(ticket) for ticket in tickets.validation]
        total = reduce(add, counts)
        found = metrics(total, self._tail) | (validated(reduce(add, validation)) if validation else {})
        if name in self.own_names:
            return {**found, **spread(np.array([c.hits.sum() / c.rows.sum() for c in counts if c.rows.sum()]))}
        return {**found, **own_label_metrics(recall_of(total), self._mixes)}

    def row_of(self, role: str, names: Sequence[str]) -> str:
        """The row that bears a role's costs: of its model, or of its clients' own, or else the first."""
        return next((name for name in (role, self._own_name(role)) if name in names), names[0])

    def _own_name(self, role: str) -> str:
        """What the clients' own models of a role are called in the table of rounds."""
        return "personal" if len(self.roles) == 1 else f"personal-{role}"


def members_of(model: tuple[str, Tree] | Ensemble) -> Members:
    """(net, parameters) of all that answer together."""
    return model.members if isinstance(model, Ensemble) else (model,)
