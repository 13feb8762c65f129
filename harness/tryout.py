"""A few real rounds of a cell, to see what they cost."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from harness.checkpoint import pack
from harness.cohorts import Trace
from harness.config import Trial
from harness.data import Arrays
from harness.inline import InlinePool
from harness.parquet import Row, TableName, encode
from harness.server import Server
from harness.summary import headline
from harness.trees import Tree, nbytes
from harness.work import Answer, Asked, Order, Setup, WorkFailed, make_setup

MOST_ROUNDS = 24  # that are measured
MOST_ROWS = 2000  # that a table's size is told from
CONTEXT = 512 * 2**20  # bytes of a CUDA context where it can't be measured


@dataclass(frozen=True)
class Task:
    """A cell to try. seconds: for it, beside making its server. device: where its clients train."""

    cell: Trial
    seconds: float
    device: str = "cpu"


@dataclass(frozen=True)
class Visited:
    """A visit that was trained. load: rows that passed, over all epochs."""

    role: str
    load: float
    seconds: float


@dataclass(frozen=True)
class Round:
    """A round as it was run. cold: it was the first of all, and slower for it; due: its models were evaluated.

    rest_s: all but the visits. rows: in the table of rounds. sent, came: visits, and those of them that were not
    lost. up, down: bytes, without proxy data.
    """

    number: int
    cold: bool
    due: bool
    rest_s: float
    visits: tuple[Visited, ...]
    rows: int
    sent: int
    came: int
    up: int
    down: int


@dataclass(frozen=True)
class Sample:
    """What a trial has shown so far. memory: peak of a process's own, bytes; device_memory: on a GPU."""

    setup_s: float
    rounds: tuple[Round, ...] = ()
    proxy_bytes: int = 0  # that every client gets once
    fixed_bytes: int = 0  # of a checkpoint without what clients remember
    memory_bytes: float = 0.0  # that a client remembers
    table_bytes: Mapping[str, float] | None = (
        None  # of a row in each table on the disk; trials: with all files' heads
    )
    memory: int = 0
    device_memory: int = 0
    device_room: int = 0  # bytes of that GPU
    error: str = ""


class BriefPool(InlinePool):
    """The inline pool, which trains no more than `allowance` seconds of visits a round: others answer as the last."""

    allowance = 0.0

    def load(self, setup: Setup) -> None:
        """Begins a trial."""
        super().load(setup)
        self.setup = setup
        self.seen: list[Visited] = []
        self.last: dict[str, Answer] = {}
        self.spent = 0.0

    def visit(self, order: Order, parts: Sequence[Tree], memory: Tree | None) -> Answer | WorkFailed:
        """A visit, or the answer of another one in its role."""
        role, rows = order.visit.role, self._rows(order)
        if self.spent > self.allowance and role in self.last:
            report, payload, kept = self.last[role]
            return replace(report, visit=order.visit, samples=rows), payload, kept
        started = time.perf_counter()
        answer = super().visit(order, parts, memory)
        seconds = time.perf_counter() - started
        self.spent += seconds
        if not isinstance(answer, WorkFailed):
            self.last[role] = answer
            self._book(order, seconds)
        return answer

    def visits(self, asked: Sequence[Asked]) -> list[Answer | WorkFailed]:
        """Visits that are trained together, always all of them."""
        started = time.perf_counter()
        answers = super().visits(asked)
        seconds = time.perf_counter() - started
        self.spent += seconds
        for (order, _, _), answer in zip(asked, answers, strict=True):
            if not isinstance(answer, WorkFailed):
                self._book(order, seconds / len(asked))
        return answers

    def _rows(self, order: Order) -> int:
        return len(self.setup.split.clients[order.visit.client])

    def _book(self, order: Order, seconds: float) -> None:
        load = self._rows(order) * order.work * self.setup.trial.local.epochs
        self.seen.append(Visited(order.visit.role, load, seconds))


class _Run:
    """A trial that is tried: the sample grows round by round."""

    def __init__(self, task: Task, sets: Mapping[str, Arrays], traces: Mapping[str, Trace]) -> None:
        started, cell = time.perf_counter(), task.cell
        # Rounds with and without evaluation are both seen, but for trials that evaluate every round.
        every = min(2, cell.evaluation.every)
        cell = cell.model_copy(update={"evaluation": cell.evaluation.model_copy(update={"every": every})})
        trace = traces.get(cell.availability.trace)
        self.setup, self.mixes = make_setup(cell, sets[cell.dataset], sets.get(cell.proxy.source), trace)
        self.pool, self.device, self.every = BriefPool(task.device), task.device, every
        self.pool.allowance = task.seconds / 6
        self.rounds: list[Round] = []
        self._begin()
        self.sample = Sample(time.perf_counter() - started)

    def _begin(self) -> None:
        self.pool.load(self.setup)
        self.server = Server(self.setup, self.pool, self.device, self.mixes)

    def round(self) -> None:
        """Runs the next one; after the last the first again."""
        if self.server.done:
            self._begin()
        server, number = self.server, self.server.round
        self.pool.seen, self.pool.spent, rounds, clients = [], 0.0, len(server.rounds), len(server.clients)
        started = time.perf_counter()
        server.step()
        server.flush()
        seconds = time.perf_counter() - started
        own, visits = list(server.rounds)[rounds:], list(server.clients)[clients:]
        proxy = sum(row["down_kinds"].get("proxy", 0) for row in own)
        ran = Round(
            number,
            not self.rounds,
            server.done or server.round % self.every == 0,
            max(0.0, seconds - self.pool.spent),
            tuple(self.pool.seen),
            len(own),
            len(visits),
            sum(row["steps"] > 0 for row in visits),
            sum(row["up_bytes"] for row in own),
            sum(row["down_bytes"] for row in own) - proxy,
        )
        self.rounds.append(ran)

    def skip(self) -> None:
        """To the middle of the trial: what a method or a schedule does later costs, too."""
        self.server.round = max(self.server.round, self.setup.trial.rounds // 2)

    def measured(self) -> Sample:
        """All that can be told by now."""
        server = self.server
        kept = sum(nbytes(tree) for tree in server.memories.values())
        read = any("proxy" in row["down_kinds"] for row in server.rounds)
        parts = vars(self.setup.arrays).values()
        shared = sum(part.nbytes for part in parts if part is not None)  # between all processes of a sweep
        return replace(
            self.sample,
            rounds=tuple(self.rounds),
            proxy_bytes=sum(part.nbytes for part in self.setup.proxy or ()) if read else 0,
            fixed_bytes=len(pack(server.snapshot())) - kept,
            memory_bytes=kept / max(1, len(server.memories)),
            table_bytes=_table_bytes(self.setup.trial, list(server.rounds), list(server.clients)),
            memory=max(0, _own_peak() - shared),
            device_memory=_device_peak() if self.device == "cuda" else 0,
            device_room=torch.cuda.mem_get_info()[1] if self.device == "cuda" else 0,
        )


def samples(task: Task, sets: Mapping[str, Arrays], traces: Mapping[str, Trace]) -> Iterator[Sample]:
    """Samples of a cell, each with a round more."""
    run = _Run(task, sets, traces)
    run.round()
    found = run.measured()
    yield found
    ends = time.monotonic() + task.seconds
    while len(run.rounds) <= MOST_ROUNDS and (time.monotonic() < ends or len(run.rounds) < 3):
        if len(run.rounds) == 1 + MOST_ROUNDS // 2 or time.monotonic() > ends - task.seconds / 2:
            run.skip()
        run.round()
        found = replace(found, rounds=tuple(run.rounds))
        yield found
    yield run.measured()


def _table_bytes(cell: Trial, rounds: list[Row], clients: list[Row]) -> dict[str, float]:
    """Bytes of a row on the disk, as in a whole trial: with other numbers in each."""
    luck = random.Random(0)

    def varied(value: Any) -> Any:
        if isinstance(value, list):
            return [varied(x) for x in value]
        return value * (1 + luck.random() / 100) if isinstance(value, float) else value

    found: dict[str, float] = {}
    heads, tables = 0, {"rounds": rounds, "clients": clients}
    for table, rows in tables.items():
        texts = [{k: str(v) if isinstance(v, dict) else v for k, v in row.items()} for row in rows]
        many = [{k: varied(v) for k, v in row.items()} for row in islice(cycle(texts), MOST_ROWS)]
        one = _size(table, many[:1])
        heads += one
        found[table] = (_size(table, many) - one) / MOST_ROWS
    row = {"trial_id": "", "config": cell.model_dump_json(), **headline(rounds)}
    return {**found, "trials": heads + 1.2 * _size("trials", [row])}


def _size(table: Any, rows: Sequence[Row]) -> int:
    name: TableName = table
    return int(encode(name, [{"trial_id": "0" * 16, **row} for row in rows]).size)


def _own_peak() -> int:
    """Peak memory of this process that it shares with none, bytes: without the libraries' code and shared memory."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak, files, shared = (int(lines[name].split()[0]) for name in ("VmHWM", "RssFile", "RssShmem"))
    except (OSError, KeyError, ValueError):
        return 0
    return (peak - files - shared) * 1024


_context = 0


def enter_device() -> None:
    """Opens the GPU, and measures what that alone takes."""
    global _context
    before = _used()
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    more = total - free - before if before is not None else 0
    _context = more if 0 < more < 8 * CONTEXT else CONTEXT


def _used() -> int | None:
    """Bytes of the GPU in use, asked without opening it."""
    if (ask := shutil.which("nvidia-smi")) is None:
        return None
    query = [ask, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", _number()]
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        return int(subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout) * 2**20
    return None


def _number() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"


def _device_peak() -> int:
    """Peak memory of this process on the GPU, bytes: what torch took for its tensors, and the context."""
    return int(torch.cuda.max_memory_reserved()) + _context
