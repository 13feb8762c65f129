"""The books: what visits cost, by client, pool and round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from harness.protocol import Broadcast, Visit
from harness.trees import bytes_by_kind
from harness.work import Report

Row = dict[str, Any]


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

    def add(self, report: Report, down: Mapping[str, int]) -> None:
        """Books one visit."""
        loss = report.metrics.get("loss")
        self.up_kinds = merge_counts(self.up_kinds, report.up_kinds)
        self.down_kinds = merge_counts(self.down_kinds, down)
        self.steps += report.steps
        self.samples += report.seen
        if loss is not None:
            self.loss += loss * report.samples
            self.rows += report.samples


def client_row(report: Report, arch: str, down: Mapping[str, int]) -> Row:
    """The columns of the table of clients."""
    return {
        "client": report.visit.client,
        "role": report.visit.role,
        "arch": arch,
        "samples": report.samples,
        "steps": report.steps,
        "train_loss": report.metrics.get("loss"),
        "up_bytes": sum(report.up_kinds.values()),
        "down_bytes": sum(down.values()),
        "seconds": report.seconds,
    }


def bytes_down(broadcast: Broadcast, visit: Visit) -> dict[str, int]:
    """Bytes that a visit receives, by kind."""
    parts = (broadcast.shared, broadcast.by_role.get(visit.role, {}), broadcast.personal.get(visit, {}))
    return reduce(merge_counts, map(bytes_by_kind, parts))


def lost(visit: Visit) -> Report:
    """The report of a visit that dropped out."""
    return Report(visit, samples=0, steps=0, seen=0, metrics={}, up_kinds={}, seconds=0.0, finite=True)


def merge_counts(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    """Sums by kind."""
    return {key: a.get(key, 0) + b.get(key, 0) for key in sorted({*a, *b})}


def merge_costs(a: Cost, b: Cost) -> Cost:
    """Two pools as one."""
    return Cost(
        merge_counts(a.up_kinds, b.up_kinds),
        merge_counts(a.down_kinds, b.down_kinds),
        a.steps + b.steps,
        a.samples + b.samples,
        a.loss + b.loss,
        a.rows + b.rows,
    )
