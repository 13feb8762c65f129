"""The books: what visits cost, by client, pool and round."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch

from harness.protocol import Broadcast, Visit
from harness.trees import bytes_by_kind
from harness.work import Report

Row = dict[str, Any]


class Pages(Sequence[Row]):
    """Rows in the order in which they were booked. Only the last page is held as it is, the others packed.

    As Python objects the rows of some thousand rounds would weigh more than all that a small trial works with. Rows
    are what JSON can hold; those of packed pages come back as new objects.
    """

    PAGE = 256  # rows
    OPENED = 2  # packed pages that are held unpacked, too: those that were read last

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._pages: list[bytes] = []
        self._last: list[Row] = []
        self._opened: dict[int, list[Row]] = {}
        for row in rows:
            self.append(row)

    def append(self, row: Row) -> None:
        """Books a row."""
        self._last.append(row)
        if len(self._last) == self.PAGE:
            self._pages.append(zlib.compress(json.dumps(self._last).encode()))
            self._last = []

    def packed(self) -> dict[str, Any]:
        """For a checkpoint: pages as tensors of bytes, and the rows of the last one."""
        pages = [torch.frombuffer(bytearray(page), dtype=torch.uint8) for page in self._pages]
        return {"pages": pages, "last": list(self._last)}

    @classmethod
    def unpacked(cls, packed: Mapping[str, Any] | list[Row]) -> Pages:
        """The pages that were packed; a list is taken as it is."""
        if isinstance(packed, list):
            return cls(packed)
        made = cls(packed["last"])
        made._pages = [bytes(page.numpy()) for page in packed["pages"]]
        return made

    def __len__(self) -> int:
        return len(self._pages) * self.PAGE + len(self._last)

    @overload
    def __getitem__(self, at: int) -> Row: ...

    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...

    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        page, place = divmod(range(len(self))[at], self.PAGE)
        return self._page(page)[place]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def _page(self, number: int) -> list[Row]:
        if number == len(self._pages):
            return self._last
        if number not in self._opened:
            if len(self._opened) == self.OPENED:
                del self._opened[next(iter(self._opened))]
            self._opened[number] = json.loads(zlib.decompress(self._pages[number]))
        return self._opened[number]


def rows_in(snapshot: Mapping[str, Any], table: str) -> list[Row]:
    """The rows of a table that a server's snapshot holds."""
    return list(Pages.unpacked(snapshot.get(table, [])))


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


def bytes_down(broadcast: Broadcast) -> Callable[[Visit], dict[str, int]]:
    """What tells how many bytes a visit receives, by kind."""
    shared = bytes_by_kind(broadcast.shared)
    alike = {role: merge_counts(shared, bytes_by_kind(inbox)) for role, inbox in broadcast.by_role.items()}

    def of(visit: Visit) -> dict[str, int]:
        own = broadcast.personal.get(visit, {})
        return merge_counts(alike.get(visit.role, shared), bytes_by_kind(own))

    return of


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
