"""One live display of a sweep on a terminal; plain lines where the output is none."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from harness.config import Trial, trial_id
from harness.registry import label

PLAIN_EVERY_S = 30.0


class Display:
    """Trials done, running and failed, the rounds of those that run, the time left. A `sweep.Watcher`."""

    def __init__(self, console: Console, axes: Sequence[str]) -> None:
        self.console, self.axes = console, axes
        self.todo = self.ended = self.failed = self.rounds = 0
        self.running: dict[str, tuple[str, int, int, float | None]] = {}
        self.booked = 0  # rounds of ended trials
        self.started = self.spoke = time.monotonic()
        bar = BarColumn(bar_width=32)
        self.bar = Progress(TextColumn("{task.description}"), bar, TextColumn("{task.fields[text]}"), console=console)
        self.task = self.bar.add_task("rounds", total=1, text="")
        self.live = Live(console=console, refresh_per_second=4, transient=True, get_renderable=self._picture)

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def begin(self, todo: Sequence[Trial], done: int) -> None:
        """Shows the size of the work."""
        self.todo, self.rounds = len(todo), sum(cell.rounds for cell in todo)
        self.started = time.monotonic()
        there = f", {done} already there" if done else ""
        self.console.print(f"{len(todo)} trials to run{there}.", highlight=False)
        if todo and self.console.is_terminal:
            self.live.start()

    def round(self, trial: Trial, rounds_done: int, accuracy: float | None) -> None:
        """Moves a trial on."""
        self.running[trial_id(trial)] = (self._name(trial), rounds_done, trial.rounds, accuracy)
        if not self.console.is_terminal and time.monotonic() - self.spoke > PLAIN_EVERY_S:
            self.spoke = time.monotonic()
            self.console.print(self._summary(), highlight=False)

    def end(self, trial: Trial, row: Mapping[str, Any]) -> None:
        """Takes a trial off; says why if it failed."""
        self.running.pop(trial_id(trial), None)
        self.ended += 1
        self.booked += trial.rounds
        if row["status"] == "failed":
            self.failed += 1
            self.console.print(f"failed: {self._name(trial)}: {row['reason']}", style="red", highlight=False)
        elif not self.console.is_terminal:
            found = [f"{k.removesuffix('_accuracy_last')} {v:.3f}" for k, v in row.items() if _is_last(k, v)]
            seconds = f"{row['seconds']:.1f} s"
            line = f"[{self.ended}/{self.todo}] {self._name(trial)}: {', '.join(found)} ({seconds})"
            self.console.print(line, highlight=False, markup=False)

    def _name(self, trial: Trial) -> str:
        return f"{label(trial.method)} {' '.join(self._axis(trial, key) for key in self.axes)} seed={trial.seed}"

    def _axis(self, trial: Trial, key: str) -> str:
        prefix, _, rest = key.partition(".")
        if prefix == label(trial.method) and rest in trial.hyper:
            return f"{rest}={trial.hyper[rest]}"
        value: Any = trial
        for part in key.split("."):
            value = getattr(value, part, None)
        return "" if value is None else f"{key.rpartition('.')[2]}={value}"

    def _summary(self) -> str:
        done = self.booked + sum(rounds for _, rounds, _, _ in self.running.values())
        spent = time.monotonic() - self.started
        left = spent / done * (self.rounds - done) if done else None
        ahead = "" if left is None else f", about {_duration(left)} left"
        return f"{self.ended}/{self.todo} trials done, {len(self.running)} running, {self.failed} failed{ahead}"

    def _picture(self) -> RenderableType:
        done = self.booked + sum(rounds for _, rounds, _, _ in self.running.values())
        self.bar.update(self.task, total=max(1, self.rounds), completed=done, text=f"{done}/{self.rounds}")
        lines = [
            Text(f"  {name}: round {at}/{of}" + ("" if accuracy is None else f", accuracy {accuracy:.3f}"))
            for name, at, of, accuracy in list(self.running.values())[:12]
        ]
        return Group(Text(self._summary()), self.bar, *lines)


def _is_last(column: str, value: object) -> bool:
    return column.endswith("_accuracy_last") and isinstance(value, float)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
