"""Population-based training (Jaderberg et al. 2017), so that it can be repeated bit for bit.

All members train one generation of rounds from the same seed. Then the worst take over the state of the best and go
on with changed settings. What a member has become is its lineage: the trial whose schedule holds those changes. So
every row of a population is an ordinary trial, which gives the same numbers when it is run by itself, and the best
lineage can be run again on fresh seeds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from harness import config
from harness.config import Trial
from harness.desk import Book, Job, finals
from harness.schedule import Change
from harness.space import Group, Search, apply, draw, mutate, score, score_at
from harness.trees import numpy_stream


class Population:
    """The search of one group by a population. Who is replaced, by whom and how follows from the scores alone."""

    def __init__(self, group: Group, how: Search, book: Book) -> None:
        self.group, self.how, self.book = group, how, book
        drawn = [draw(group, how, number, []) for number in range(how.trials)]
        self.members = [self._job(apply(group.prototype, s, how.seed), m, s, 0) for m, s in enumerate(drawn)]
        self.generation, self.found, self.problem = 0, 0, ""
        self.ready: deque[Job] = deque()
        self.finals: deque[Job] | None = None
        self._issue()
        self._advance()
        self.found = sum(book.result(job.name) is not None for job in self.members)
        if self.finals is not None and not self.problem:
            self.found += len(group.seeds) - len(self.finals)

    @property
    def over(self) -> bool:
        """Whether every leg and every final was given out."""
        return self.finals is not None and not self.finals

    def next(self) -> Job | None:
        """A member's next leg, or a final once the population is through."""
        self._advance()
        if self.ready:
            return self.ready.popleft()
        return self.finals.popleft() if self.finals else None

    def expected(self) -> list[tuple[Trial, int]]:
        """Members on their way, and the finals."""
        going = sum(self.book.result(job.name) is None for job in self.members)
        left = len(self.group.seeds) if self.finals is None else len(self.finals)
        return [(self.group.prototype, going), (self.group.prototype, left)]

    def _job(self, cell: Trial, member: int, settings: Mapping[str, Any], generation: int) -> Job:
        until = min((generation + 1) * self.how.interval, cell.rounds)
        return Job(cell, until, "search", self.group, member, settings)

    def _issue(self) -> None:
        """Puts out the legs of this generation that were not run yet; members may share a lineage."""
        legs = {job.name: job for job in self.members if not self._through(job)}
        self.ready = deque(legs.values())

    def _through(self, job: Job) -> bool:
        return self.book.result(job.name) is not None or self.book.reached(job.name) >= job.until

    def _advance(self) -> None:
        while self.finals is None and not self.ready and all(self._through(job) for job in self.members):
            if self.members[0].until == self.members[0].cell.rounds:
                self.finals = deque(self._choose())
            else:
                self._evolve()
                if self.finals is None:
                    self._issue()

    def _evolve(self) -> None:
        """The worst, and all that came to an end too soon, take over from the best."""
        until, count = self.members[0].until, max(1, int(len(self.members) * self.how.quantile))
        ranked = self._ranked(until)
        if not ranked:
            self.problem = f"population of {self.group.key}: no member got to round {until}"
            self.finals = deque()
            return
        dead = [m for m in range(len(self.members)) if m not in ranked]
        worst = ranked[len(ranked) - max(0, count - len(dead)) :] if len(ranked) > count else []
        kept, donors = list(self.members), ranked[: min(count, len(ranked) - len(worst))]
        for member in sorted([*dead, *worst]):
            rng = numpy_stream(self.how.seed, "population", self.group.key, self.generation, member)
            kept[member] = self._heir(self.members[donors[int(rng.integers(len(donors)))]], member)
        old, self.members = self.members, kept
        self.generation += 1
        self.members = [self._job(j.cell, j.number, j.settings, self.generation) for j in kept]
        for job in old:
            if job.name not in {j.name for j in self.members} and self.book.result(job.name) is None:
                self.book.close(job, f"stopped: replaced in its population after round {until}")

    def _heir(self, donor: Job, member: int) -> Job:
        settings = mutate(self.group, self.how, donor.settings, member, self.generation)
        heir = Job(after(donor.cell, donor.until, settings), donor.until, "search", self.group, member, settings)
        # If the donor has gone on already, its heir is trained from the start, through the same schedule.
        if not self._through(heir) and self.book.reached(donor.name) == donor.until:
            self.book.adopt(donor.name, heir.name)
        return heir

    def _ranked(self, until: int) -> list[int]:
        """The members that have trained so many rounds, best first."""
        scored = []
        for member, job in enumerate(self.members):
            rounds = self.book.curve(job.name)
            value = score_at(rounds, self.how, until)
            if value is not None and max(row["round"] for row in rounds) + 1 >= until:
                scored.append((-value, member))
        return [member for _, member in sorted(scored)]

    def _choose(self) -> list[Job]:
        scored = []
        for member, job in enumerate(self.members):
            result = self.book.result(job.name)
            value = score(result.rounds, self.how) if result is not None and result.status == "done" else None
            if value is not None:
                scored.append((-value, member))
        if not scored:
            self.problem = f"population of {self.group.key}: no member went through, so nothing was chosen"
            return []
        return list(finals(self.members[min(scored)[1]], self.group, self.book))


def after(cell: Trial, round: int, settings: Mapping[str, Any]) -> Trial:
    """The trial that runs with these settings from a round on, counted from 0."""
    schedule = [*cell.schedule, str(Change(round, settings))]
    return config.resolve(cell.model_dump() | {"schedule": schedule})
