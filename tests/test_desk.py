"""What comes next in a sweep follows from the tables and checkpoints alone: here without Ray, on made-up results."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from harness import config
from harness.desk import Desk, Grid, Hunt, Job, Result, Source
from harness.population import Population
from harness.space import Dimension, Group, Search, curve, score

ROUNDS = 6
PROTOTYPE = config.resolve(
    {"method": "fedprox", "rounds": ROUNDS, "clients": 5, "seed": 1000, "holdout": {"validation": 0.1}}
)
GROUP = Group("fedprox", PROTOTYPE, {"hyper.mu": Dimension("uniform", (0.0, 1.0))}, (0, 1))


def quality(cell: config.Trial, round: int) -> float:
    """A made-up accuracy: best at mu = .3, growing with the rounds, by the settings of each round."""
    return sum(1 - abs(cell.at(r).hyper["mu"] - 0.3) for r in range(round + 1)) / ROUNDS  # type: ignore[operator]


@dataclass
class Shelf:
    """A `desk.Book` with made-up trials. `run` does a job as a process would."""

    broken: Callable[[config.Trial], bool] = lambda cell: False
    results: dict[str, Result] = field(default_factory=dict)
    resting: dict[str, tuple[int, list[dict[str, Any]]]] = field(default_factory=dict)
    trained: list[tuple[str, int, int]] = field(default_factory=list)  # id, from round, to round

    def result(self, name: str) -> Result | None:
        return self.results.get(name)

    def curve(self, name: str) -> Sequence[dict[str, Any]]:
        return self.results[name].rounds if name in self.results else self.resting.get(name, (0, []))[1]  # type: ignore[return-value]

    def reached(self, name: str) -> int:
        return 0 if name in self.results else self.resting.get(name, (0, []))[0]

    def adopt(self, donor: str, heir: str) -> None:
        self.resting[heir] = self.resting[donor]

    def close(self, job: Job, reason: str) -> None:
        self.results[job.name] = Result("stopped", reason, 10, self.resting.pop(job.name)[1])

    def run(self, job: Job) -> None:
        since = self.reached(job.name)
        rounds = [
            {"round": r, "role": "global", "validation_accuracy": quality(job.cell, r)} for r in range(job.until)
        ]
        assert self.resting.get(job.name, (0, []))[1] == rounds[:since], "a checkpoint holds what the trial would get"
        self.trained.append((job.name, since, job.until))
        if self.broken(job.cell):
            self.results[job.name] = Result("failed", "diverged: oh", 3, rounds[:1])
        elif job.until < job.cell.rounds:
            self.resting[job.name] = (job.until, rounds)
        else:
            self.resting.pop(job.name, None)
            self.results[job.name] = Result("done", "", 10 * job.until, rounds)


def work(desk: Desk, book: Shelf, slots: int = 1, seed: int = 0, jobs: int = 10**6) -> list[Job]:
    """Does what the desk gives out, so many at a time, and takes them back in any order."""
    rng, out, done = random.Random(seed), [], []
    while len(done) < jobs:
        while len(out) < slots and (job := desk.next()) is not None:
            out.append(job)
        if not out:
            break
        job = out.pop(rng.randrange(len(out)))
        book.run(job)
        desk.back(job)
        done.append(job)
    return done


def outcome(book: Shelf) -> dict[str, tuple[str, list[Any]]]:
    return {name: (r.status, list(r.rounds)) for name, r in book.results.items()}


def hunt(book: Shelf, **how: Any) -> Source:
    return Hunt(GROUP, Search(**{"trials": 6, **how}), book)


def population(book: Shelf, **how: Any) -> Source:
    return Population(GROUP, Search(**{"scheduler": "pbt", "trials": 4, "interval": 2, **how}), book)


SOURCES = {"random": hunt, "optuna": lambda book: hunt(book, sampler="optuna", ahead=2), "pbt": population}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("slots", [1, 3])
def test_a_search_that_is_killed_anywhere_ends_as_if_it_had_not_been(kind: str, slots: int) -> None:
    """A desk is thrown away after every number of jobs; a new one goes on with what the book says."""
    whole = Shelf()
    work(Desk([SOURCES[kind](whole)]), whole)
    for stop in range(1, len(whole.trained)):
        book = Shelf()
        work(Desk([SOURCES[kind](book)]), book, slots, seed=stop, jobs=stop)
        desk = Desk([SOURCES[kind](book)])
        work(desk, book, slots, seed=-stop)
        assert desk.over
        assert outcome(book) == outcome(whole)


@pytest.mark.parametrize("kind", SOURCES)
def test_nothing_is_left_to_do_for_a_desk_that_comes_after(kind: str) -> None:
    book = Shelf()
    work(Desk([SOURCES[kind](book)]), book)
    later = SOURCES[kind](book)
    assert Desk([later]).next() is None and Desk([later]).over
    assert later.found == len(book.results) - sum(r.status == "stopped" for r in book.results.values())
    assert sum(n for _, n in later.expected()) == 0


def test_the_best_draw_runs_again_on_the_fresh_seeds() -> None:
    book = Shelf()
    jobs = work(Desk([hunt(book)]), book)
    draws, finals = jobs[:6], jobs[6:]
    assert {job.cell.seed for job in draws} == {1000} and [job.stage for job in draws] == ["search"] * 6
    best = max(draws, key=lambda job: score(book.results[job.name].rounds, Search()) or 0)
    assert [(job.cell.seed, job.stage, job.cell.hyper) for job in finals] == [
        (seed, "final", best.cell.hyper) for seed in (0, 1)
    ]
    assert abs(best.cell.hyper["mu"] - 0.3) == min(abs(job.cell.hyper["mu"] - 0.3) for job in draws)  # type: ignore[operator]


def test_a_failed_draw_is_not_chosen_and_does_not_hold_the_search_up() -> None:
    book = Shelf(broken=lambda cell: abs(cell.hyper["mu"] - 0.3) < 0.2 and cell.seed == 1000)  # type: ignore[operator]
    jobs = work(Desk([hunt(book)]), book)
    assert any(r.status == "failed" for r in book.results.values())
    assert abs(jobs[-1].cell.hyper["mu"] - 0.3) >= 0.2  # type: ignore[operator]
    assert len(jobs) == 6 + 2


def test_a_search_in_which_all_fails_says_so() -> None:
    book = Shelf(broken=lambda cell: True)
    source = hunt(book)
    assert len(work(Desk([source]), book)) == 6
    assert "nothing was chosen" in source.problem and source.over


def test_a_budget_of_steps_ends_a_search_before_it_is_overdrawn() -> None:
    """Each trial takes 60 steps: 4 fit into 250. The first `ahead` = 2 are drawn without knowing what they take."""
    book = Shelf()
    jobs = work(Desk([hunt(book, steps=250, ahead=2, sampler="optuna")]), book)
    assert sum(job.stage == "search" for job in jobs) == 4
    assert sum(job.stage == "final" for job in jobs) == 2


def test_a_population_moves_to_better_settings_and_its_rows_can_be_repeated() -> None:
    """Every row is that of an ordinary trial: its curve is the one that its own schedule gives from the start."""
    book = Shelf()
    jobs = work(Desk([population(book, trials=8)]), book)
    cells = {job.name: job.cell for job in jobs}
    for name, result in book.results.items():
        got = curve(result.rounds, Search())
        assert got == [(r + 1, quality(cells[name], r)) for r in range(len(got))]
    replaced = [r for r in book.results.values() if r.status == "stopped"]
    assert len(replaced) == 2 * 2, "a quarter of eight, after rounds 2 and 4"
    best = [job for job in jobs if job.stage == "final"]
    assert len(best) == 2 and best[0].cell.schedule == best[1].cell.schedule
    alive = [score(book.results[j.name].rounds, Search()) for j in jobs if j.stage == "search" and j.until == ROUNDS]
    assert score(book.results[best[0].name].rounds, Search()) == max(alive)  # type: ignore[type-var]
    heirs = [(name, since) for name, since, _ in book.trained if since and cells[name].schedule]
    assert heirs, "heirs go on from the state that they took over"


def test_members_that_fail_are_replaced() -> None:
    book = Shelf(broken=lambda cell: cell.hyper["mu"] > 0.6 and not cell.schedule)  # type: ignore[operator]
    jobs = work(Desk([population(book, trials=8, resample=0.0)]), book)
    failed = sum(r.status == "failed" for r in book.results.values())
    assert failed > 2, "more than a quarter of the eight, which would be replaced anyway"
    assert {book.results[job.name].status for job in jobs if job.until == ROUNDS} == {"done"}
    assert max(Counter(job.until for job in jobs if job.stage == "search").values()) == 8


def test_a_population_that_dies_out_says_so() -> None:
    book = Shelf(broken=lambda cell: True)
    source = population(book)
    work(Desk([source]), book)
    assert "no member got to round 2" in source.problem and source.over


def test_the_same_cell_is_never_out_twice_and_at_most_so_many_at_a_time() -> None:
    jobs = [Job(PROTOTYPE.model_copy(update={"seed": seed}), ROUNDS) for seed in (0, 1, 1, 2)]
    desk = Desk([Grid(jobs, Shelf())], parallel=3)
    given = [desk.next() for _ in range(4)]
    assert [job.cell.seed if job else None for job in given] == [0, 1, 2, None]
    assert not desk.over


def test_a_crash_is_tried_again_for_want_of_memory_with_half_as_many() -> None:
    jobs = [Job(PROTOTYPE.model_copy(update={"seed": seed}), ROUNDS) for seed in range(6)]
    desk = Desk([Grid(jobs, Shelf())], retries=1)
    first, *_ = given = [desk.next() for _ in range(4)]
    assert first is not None and all(given)
    assert desk.crashed(first, limit=2)
    assert desk.next() is None, "three are out, and no more than two may be from now on"
    for job in given[1:]:
        assert job is not None
        desk.back(job)
    assert desk.next() == first, "what crashed comes first"
    assert not desk.crashed(first)
    assert desk.next() is not None and not desk.over


def test_what_failed_runs_again_and_what_diverged_does_not() -> None:
    book = Shelf()
    jobs = [Job(PROTOTYPE.model_copy(update={"seed": seed}), ROUNDS) for seed in range(4)]
    book.results = {
        jobs[0].name: Result("done", "", 1),
        jobs[1].name: Result("failed", "crashed: oh", 1),
        jobs[2].name: Result("failed", "diverged: oh", 1),
        jobs[3].name: Result("stopped", "stopped by asha", 1),
    }
    grid = Grid(jobs, book)
    assert (grid.found, [job.cell.seed for job in grid.jobs]) == (2, [1, 3])
