"""Which trial comes next: the cells of a grid, the draws of a search, the finals of what it chose.

Everything follows from the card, the tables and the checkpoints. A desk that is set up anew, after whatever happened
to the last one, goes on where that one stood: there is no other record of a sweep.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from harness.config import Trial, trial_id
from harness.space import Group, Search, apply, draw, score
from harness.summary import final

Row = Mapping[str, Any]
Stage = Literal["", "search", "final"]


@dataclass(frozen=True)
class Job:
    """A cell to run. until: rounds after which it comes back, its last one or sooner. number: of a search's draws."""

    cell: Trial
    until: int
    stage: Stage = ""
    group: Group | None = None
    number: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The id of the cell."""
        return trial_id(self.cell)

    @property
    def origin(self) -> str | None:
        """The column `search`: whose draw this is."""
        if self.group is None:
            return None
        number = {"number": self.number} if self.stage == "search" else {}
        return json.dumps({"group": self.group.key, **number, "settings": dict(self.settings)})


@dataclass(frozen=True)
class Result:
    """What became of a trial. steps: of clients and server. rounds: its rows, where a search has to look at them."""

    status: str
    reason: str
    steps: int
    rounds: Sequence[Row] = ()


class Book(Protocol):
    """What is known of trials, by id."""

    def result(self, name: str) -> Result | None:
        """Of a trial that has ended."""

    def curve(self, name: str) -> Sequence[Row]:
        """Rows of the rounds of a trial that rests on a checkpoint, or has ended."""

    def reached(self, name: str) -> int:
        """Rounds that the newest good checkpoint of a trial holds; 0 without one."""

    def adopt(self, donor: str, heir: str) -> None:
        """The donor's newest checkpoint becomes the heir's."""

    def close(self, job: Job, reason: str) -> None:
        """Books a resting trial as stopped."""


class Source(Protocol):
    """Where jobs come from."""

    @property
    def over(self) -> bool:
        """Whether no further job will come."""

    @property
    def found(self) -> int:
        """Trials that needed no run, because they had a row before."""

    @property
    def problem(self) -> str:
        """What went wrong, if anything did."""

    def next(self) -> Job | None:
        """The next one; None: nothing at the moment, or nothing any more."""

    def expected(self) -> list[tuple[Trial, int]]:
        """Cells that still have to run, one of each kind with their number: for the display."""


def _settled(book: Book, job: Job) -> bool:
    result = book.result(job.name)
    return result is not None and final(result.status, result.reason, job.stage)


class Grid:
    """Cells that are known ahead."""

    problem = ""

    def __init__(self, jobs: Sequence[Job], book: Book) -> None:
        self.jobs = deque(job for job in jobs if not _settled(book, job))
        self.found = len(jobs) - len(self.jobs)

    @property
    def over(self) -> bool:
        """Whether every job was given out."""
        return not self.jobs

    def next(self) -> Job | None:
        """In their order."""
        return self.jobs.popleft() if self.jobs else None

    def expected(self) -> list[tuple[Trial, int]]:
        """All that are left."""
        return [(job.cell, 1) for job in self.jobs]


class Hunt:
    """The search of one group: as many draws as everybody has, then the finals of the best on fresh seeds.

    A draw may learn from the results of all but the last `ahead` ones. So what is drawn does not depend on which
    trial was faster, and a search that was killed draws the same again.
    """

    def __init__(self, group: Group, how: Search, book: Book) -> None:
        self.group, self.how, self.book = group, how, book
        self.drawn: list[Job] = []
        self.ready: Job | None = None  # drawn, and not given out
        self.enough = False
        self.finals: deque[Job] | None = None
        self.problem = ""
        self._advance()
        self.found = len(self.drawn) - (self.ready is not None) + self._finals_found()

    @property
    def over(self) -> bool:
        """Whether every draw and every final was given out."""
        return self.finals is not None and not self.finals

    def next(self) -> Job | None:
        """A draw, or a final once all draws have ended."""
        self._advance()
        if self.ready is not None:
            job, self.ready = self.ready, None
            return job
        return self.finals.popleft() if self.finals else None

    def expected(self) -> list[tuple[Trial, int]]:
        """Draws without a result, and the finals."""
        there = sum(self.book.result(job.name) is not None for job in self.drawn)
        left = len(self.group.seeds) - self._finals_found() if self.finals is None else len(self.finals)
        draws = (len(self.drawn) if self.enough else self.how.trials) - there
        return [(self.group.prototype, draws), (self.group.prototype, left)]

    def _finals_found(self) -> int:
        return len(self.group.seeds) - len(self.finals) if self.finals is not None and not self.problem else 0

    def _advance(self) -> None:
        """To the next draw that has no result, or to the finals."""
        while self.ready is None and not self.enough and (job := self._draw()) is not None:
            if self.book.result(job.name) is None and job.name not in {j.name for j in self.drawn[:-1]}:
                self.ready = job
        if self.finals is None and self.enough and all(self.book.result(job.name) for job in self.drawn):
            self.finals = deque(self._finals())

    def _draw(self) -> Job | None:
        """The next draw; None while it has to wait, and when there are enough."""
        number, settled = len(self.drawn), len(self.drawn) - self.how.ahead + 1
        waits = self.how.sampler == "optuna" or self.how.steps
        if number == self.how.trials:
            self.enough = True
            return None
        known = [(job, self.book.result(job.name)) for job in self.drawn[: max(0, settled)]] if waits else []
        if not all(result for _, result in known):
            return None
        if self.how.steps and known and self._projected(known, number + 1) > self.how.steps:
            self.enough = True
            return None
        told = [(j.number, j.settings, score(r.rounds, self.how)) for j, r in known if r is not None]
        settings = draw(self.group, self.how, number, [(n, s, v) for n, s, v in told if v is not None])
        cell = apply(self.group.prototype, settings, self.how.seed)
        self.drawn.append(Job(cell, cell.rounds, "search", self.group, number, settings))
        return self.drawn[-1]

    @staticmethod
    def _projected(known: Sequence[tuple[Job, Result | None]], trials: int) -> float:
        """Steps that so many trials would take, if the rest are as those known."""
        return sum(r.steps for _, r in known if r is not None) * trials / len(known)

    def _finals(self) -> Iterator[Job]:
        """The best draw on the fresh seeds. Only one that went through to its end can be chosen."""
        scored = []
        for job in self.drawn:
            result = self.book.result(job.name)
            value = score(result.rounds, self.how) if result is not None and result.status == "done" else None
            if value is not None:
                scored.append((value, -job.number, job))
        if not scored:
            self.problem = f"search of {self.group.key}: no draw went through, so nothing was chosen"
            return
        best = max(scored, key=lambda s: s[:2])[2]
        yield from finals(best, self.group, self.book)


def finals(best: Job, group: Group, book: Book) -> Iterator[Job]:
    """The chosen settings on the fresh seeds, as far as they are missing."""
    for seed in group.seeds:
        cell = best.cell.model_copy(update={"seed": seed})
        job = Job(cell, cell.rounds, "final", group, best.number, best.settings)
        if not _settled(book, job):
            yield job


class Desk:
    """Gives jobs out, takes them back, and gives those of a process that was lost out again.

    parallel: jobs out at a time; 0: any number. retries: times that a job is given again after its process was lost.
    """

    def __init__(self, sources: Sequence[Source], parallel: int = 0, retries: int = 1) -> None:
        self.sources, self.limit, self.retries = list(sources), parallel, retries
        self.again: deque[Job] = deque()
        self.out: dict[str, Job] = {}
        self.lost: Counter[str] = Counter()

    @property
    def over(self) -> bool:
        """Whether there is nothing to do and nothing to wait for."""
        return not self.out and not self.again and all(source.over for source in self.sources)

    def next(self) -> Job | None:
        """A job that nobody has; None: not now, or, if the desk is over, no more."""
        if self.limit and len(self.out) >= self.limit:
            return None
        job = self.again.popleft() if self.again else self._fresh()
        if job is not None:
            self.out[job.name] = job
        return job

    def back(self, job: Job) -> None:
        """A job has come back: its trial has ended, or rests."""
        self.out.pop(job.name, None)

    def crashed(self, job: Job, limit: int = 0) -> bool:
        """The process of a job was lost. Returns whether it is tried again. limit: jobs out at a time from now on."""
        self.limit = min(self.limit or limit, limit) if limit else self.limit
        self.back(job)
        self.lost[job.name] += 1
        if self.lost[job.name] > self.retries:
            return False
        self.again.append(job)
        return True

    def expected(self) -> tuple[int, int]:
        """Trials and rounds that are still to come, as far as that can be known."""
        kinds = [kind for source in self.sources for kind in source.expected()]
        return sum(n for _, n in kinds), sum(cell.rounds * n for cell, n in kinds)

    def _fresh(self) -> Job | None:
        for source in self.sources:
            while not source.over and (job := source.next()) is not None:
                if job.name not in self.out:  # the same cell can be wanted twice
                    return job
            # nothing now: the next source
        return None
