"""Who is stopped early, by curves that are made up. Tune itself does not run: its rules do not look at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from harness.config import resolve
from harness.desk import Job
from harness.referee import Referee
from harness.space import Group, Search

CELL = resolve({"method": "fedavg", "rounds": 8})
GROUP = Group("a group", CELL, {}, (0,))
GOOD, BAD = (0.9, 0.9, 0.9, 0.9), (0.1, 0.1, 0.1, 0.1)


@dataclass(frozen=True)
class Running:
    """A trial as Tune has it."""

    trial_id: str


def curve(scores: tuple[float, ...]) -> list[tuple[int, float]]:
    return list(enumerate(scores, 1))


def referee(rule: str, known: dict[str, tuple[float, ...]], *running: str) -> Referee:
    how = Search(scheduler=rule, grace=2, reduction=2)  # type: ignore[arg-type]
    jobs = {name: Job(CELL, 8, "search", GROUP) for name in running}
    return Referee(how, jobs, {GROUP.key: {name: curve(scores) for name, scores in known.items()}})


def told(judge: Referee, name: str, scores: tuple[float, ...]) -> str:
    result: dict[str, Any] = {"curve": curve(scores), "done": False}
    return judge.on_trial_result(None, Running(name), result)


@pytest.mark.parametrize("rule", ["median", "asha"])
def test_what_was_worse_than_the_others_is_stopped(rule: str) -> None:
    """Two known trials at 0.9: 0.1 is below their median and their upper half, 0.95 above."""
    judge = referee(rule, {"a": GOOD, "b": GOOD}, "low", "high")
    assert told(judge, "low", BAD[:2]) == "STOP"
    assert told(judge, "high", (0.95, 0.95)) == "CONTINUE"


@pytest.mark.parametrize("rule", ["median", "asha"])
def test_the_past_is_remembered_and_not_judged_again(rule: str) -> None:
    """A known trial that today's rule would have stopped, and one that goes on from a checkpoint with rounds behind
    it in which it was the worst: neither is taken for a trial that reports although it was stopped.
    """
    judge = referee(rule, {"a": GOOD, "b": GOOD, "worst": BAD}, "late")
    assert told(judge, "late", (0.1, 0.1, 0.1, 0.95)) == "CONTINUE"


def test_all_that_a_known_trial_reported_counts_for_the_median() -> None:
    """Three known trials with running means 0.9, 0.9 and 0.1 up to round 4. Without the third, which the rule would
    have stopped in round 2, the median of round 4 were 0.9 as well; with two of its kind it is 0.1.
    """
    judge = referee("median", {"a": GOOD, "b": BAD, "c": BAD}, "middle")
    assert told(judge, "middle", (0.5, 0.5, 0.5, 0.5)) == "CONTINUE"
    judge = referee("median", {"a": GOOD, "b": GOOD, "c": BAD}, "middle")
    assert told(judge, "middle", (0.5, 0.5, 0.5, 0.5)) == "STOP"
