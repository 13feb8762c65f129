"""What a sweep shows while it runs: one live picture on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from harness import axes, progress
from harness.config import Trial
from harness.progress import Display

CELLS = axes.run_sweep("kdia", ["rounds=10", "seeds=2", "tau=1,2"]).cells


class Clock:
    """Stands for the module `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def shown(display: Display) -> str:
    """The live picture, as text."""
    page = Console(file=io.StringIO(), width=100)
    page.print(display._picture())
    text = page.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


@pytest.fixture(params=[False, True], ids=["plain", "terminal"])
def display(request: pytest.FixtureRequest, clock: Clock) -> Iterator[Display]:
    page = Console(file=io.StringIO(), force_terminal=request.param, width=100)
    with Display(page, ("kdia.tau",)) as made:
        made.begin(len(CELLS), sum(cell.rounds for cell in CELLS), done=3)
        yield made


def said(display: Display) -> list[str]:
    display.live.stop()
    return str(display.console.file.getvalue()).splitlines()  # type: ignore[attr-defined]


def finish(display: Display, cell: Trial, **row: object) -> None:
    basics = {"status": "done", "reason": None, "seconds": 2.04, "method": "kdia"}
    display.end(cell, {**basics, "student_accuracy_last": 0.5, "teacher_accuracy_last": 0.625, **row})


def test_the_picture_follows_the_trials(display: Display, clock: Clock) -> None:
    """4 trials of 10 rounds. From the first report (5 rounds at second 100) on, 10 rounds took 20 s: 25 are left."""
    assert "0/4 trials done, 0 running, 0 failed" in shown(display)
    assert "round 0/40  starting" in shown(display)
    display.start(CELLS[0])
    display.start(CELLS[1])
    assert "kdia tau=1.0 seed=0  starting" in " ".join(shown(display).split("   "))
    clock.now = 100.0
    display.round(CELLS[0], 5, None)
    clock.now = 120.0
    display.round(CELLS[1], 5, 0.25)
    finish(display, CELLS[0])
    picture = shown(display)
    assert "1/4 trials done, 1 running, 0 failed" in picture
    assert "round 15/40  about 50 s left" in picture
    assert "round 5/10  accuracy 0.250" in picture
    assert "student 0.500, teacher 0.625" in picture
    for cell in CELLS[1:]:
        finish(display, cell)
    assert "4/4 trials done, 0 running, 0 failed" in shown(display)
    assert "left" not in shown(display)


def test_a_failure_is_always_said(display: Display) -> None:
    finish(display, CELLS[0], status="failed", reason="diverged: [bold]update")
    assert any("[1/4] kdia tau=1.0 seed=0: failed: diverged: [bold]update" in line for line in said(display))
    assert "1/4 trials done, 0 running, 1 failed" in shown(display)


def test_plain_output_has_a_line_for_each_trial_and_one_now_and_then(clock: Clock) -> None:
    page = Console(file=io.StringIO(), width=200)
    with Display(page, ("kdia.tau",)) as display:
        display.begin(len(CELLS), sum(cell.rounds for cell in CELLS), done=0)
        for at in range(1, 8):
            clock.now += 10
            display.round(CELLS[0], at, 0.1)
        finish(display, CELLS[0])
    assert said(display) == [
        "4 trials to run.",
        "0/4 trials done, 1 running, 0 failed, about 6 min 0 s left",
        "[1/4] kdia tau=1.0 seed=0: student 0.500, teacher 0.625 (2.0 s)",
    ]


def test_a_file_is_not_folded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    progress.console().print("word " * 100)
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (61, "1 min 1 s"), (7260, "2 h 1 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text
