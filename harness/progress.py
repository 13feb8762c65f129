"""One live display of a sweep on a terminal; plain lines where the output is none."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from harness.config import Trial, trial_id
from harness.registry import label
from harness.terminal import console

__all__ = ["Display", "console"]

PLAIN_EVERY_S = 30.0
MOST_RUNNING = 12  # lines for running trials
MOST_ENDED = 4  # and for those that ended last


@dataclass
class Running:
    """Where a trial stands. accuracy: of its primary model when that was last evaluated."""

    trial: Trial
    rounds_done: int = 0
    accuracy: float | None = None


class Display:
    """Trials done, running and failed, the rounds of those that run, the time left. A `sweep.Watcher`."""

    def __init__(self, console: Console, axes: Sequence[str]) -> None:
        self.console, self.axes = console, axes
        self.todo = self.ended = self.failed = self.rounds = 0
        self.running: dict[str, Running] = {}
        self.last: deque[tuple[str, str]] = deque(maxlen=MOST_ENDED)
        self.booked = 0  # rounds of ended trials
        self.first: tuple[float, int] | None = None  # when the first rounds were reported, and how many they were
        self.spoke = time.monotonic()
        self.live = Live(console=console, refresh_per_second=4, transient=True, get_renderable=self._picture)

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def note(self, text: str) -> None:
        """Shows a line."""
        self.console.print(text, highlight=False, markup=False)

    def begin(self, trials: int, rounds: int, done: int) -> None:
        """Shows the size of the work."""
        self.todo, self.rounds = trials, rounds
        there = f", {done} already there" if done else ""
        self.console.print(f"{_count(trials, 'trial')} to run{there}.", highlight=False)
        if trials and self.console.is_terminal:
            self.live.start()

    def start(self, trial: Trial) -> None:
        """Puts a trial on."""
        self.running[trial_id(trial)] = Running(trial)

    def round(self, trial: Trial, rounds_done: int, accuracy: float | None) -> None:
        """Moves a trial on."""
        self.running[trial_id(trial)] = Running(trial, rounds_done, accuracy)
        now = time.monotonic()
        self.first = self.first or (now, self._rounds_done)
        if not self.console.is_terminal and now - self.spoke > PLAIN_EVERY_S:
            self.spoke = now
            self.console.print(self._summary(), highlight=False)

    def rest(self, trial: Trial) -> None:
        """Takes a trial off that will come back."""
        self.running.pop(trial_id(trial), None)

    def end(self, trial: Trial, row: Mapping[str, Any]) -> None:
        """Takes a trial off; says why if it failed."""
        self.running.pop(trial_id(trial), None)
        self.ended += 1
        self.booked += trial.rounds
        name = self._name(trial)
        at = f"[{self.ended}/{self.todo}]"
        if row["status"] == "failed":
            self.failed += 1
            self.console.print(f"{at} {name}: failed: {row['reason']}", style="red", highlight=False, markup=False)
            return
        found = ", ".join(f"{k.removesuffix('_accuracy_last')} {v:.3f}" for k, v in row.items() if _is_last(k, v))
        self.last.append((name, found))
        if not self.console.is_terminal:
            line = f"{at} {name}: {found} ({row['seconds']:.1f} s)"
            self.console.print(line, highlight=False, markup=False)

    @property
    def _rounds_done(self) -> int:
        return self.booked + sum(one.rounds_done for one in self.running.values())

    def _name(self, trial: Trial) -> str:
        found = (label(trial.method), *(self._axis(trial, key) for key in self.axes), f"seed={trial.seed}")
        return " ".join(filter(None, found))

    def _axis(self, trial: Trial, key: str) -> str:
        prefix, _, rest = key.partition(".")
        if prefix in (label(trial.method), "hyper") and rest in trial.hyper:
            return f"{rest}={trial.hyper[rest]}"
        value: Any = trial
        for part in key.split("."):
            value = getattr(value, part, None)
        return "" if value is None else f"{key.rpartition('.')[2]}={value}"

    def _left(self) -> str:
        """The time left at the pace since the first report: what came before it was spent on starting."""
        if self.first is None:
            return "starting"
        (since, before), done = self.first, self._rounds_done
        if done <= before or done >= self.rounds:
            return ""
        return f"about {duration((time.monotonic() - since) / (done - before) * (self.rounds - done))} left"

    def _counts(self) -> str:
        return f"{self.ended}/{self.todo} trials done, {len(self.running)} running, {self.failed} failed"

    def _summary(self) -> str:
        return ", ".join(filter(None, (self._counts(), self._left())))

    def _picture(self) -> RenderableType:
        done = self._rounds_done
        bar = Table.grid(padding=(0, 2))
        bar.add_row(ProgressBar(max(1, self.rounds), done, width=30), f"round {done}/{self.rounds}", self._left())
        lines = Table.grid(padding=(0, 2))
        lines.add_column(no_wrap=True, overflow="ellipsis")
        lines.add_column(no_wrap=True, justify="right")
        lines.add_column(no_wrap=True)
        for one in list(self.running.values())[:MOST_RUNNING]:
            score = "" if one.accuracy is None else f"accuracy {one.accuracy:.3f}"
            at = f"round {one.rounds_done}/{one.trial.rounds}" if one.rounds_done else "starting"
            lines.add_row(Text(f"  {self._name(one.trial)}"), at, score)
        for name, found in self.last:
            lines.add_row(Text(f"  {name}", "dim"), Text("done", "dim"), Text(found, "dim"))
        return Group(Text(self._counts()), bar, lines)


def _is_last(column: str, value: object) -> bool:
    return column.endswith("_accuracy_last") and isinstance(value, float)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """In words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
