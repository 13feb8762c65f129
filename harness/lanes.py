"""Processes that try cells out, several at a time, each cut off when its time is over."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from harness.cohorts import Trace
from harness.data import Arrays
from harness.fit import settle
from harness.tryout import Sample, Task, enter_device, samples
from harness.work import said

START_S = 60.0  # for a process to import torch
FIRST_S = 15.0  # for a first round
GRACE_S = 1.0  # for what began before the time was over


def _serve(line: Any, sets: Mapping[str, Arrays], traces: Mapping[str, Trace]) -> None:
    """A process that tries cells as they are asked for."""
    import harness.trial  # noqa: F401 - so that it weighs what a trial's process does

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    settle()
    line.send(None)
    opened = False
    while (task := line.recv()) is not None:
        try:
            if task.device == "cuda" and not opened:
                opened = True
                enter_device()
            for sample in samples(task, sets, traces):
                line.send(sample)
        except Exception as error:  # what the trial itself would fail of
            line.send(Sample(0.0, error=said(error)))
        line.send(None)


class _Lane:
    """A process for one cell after another; a new one where a cell had to be cut off."""

    def __init__(self, sets: Mapping[str, Arrays], traces: Mapping[str, Trace]) -> None:
        self.sets, self.traces = sets, traces
        self.process: Any = None

    def run(self, task: Task, until: float) -> Sample | None:
        """What a cell has shown when its time was over. until: the end of all, on the monotonic clock."""
        if time.monotonic() > until:
            return None
        if self.process is None:
            here = multiprocessing.get_context("spawn")
            self.line, theirs = here.Pipe()
            self.process = here.Process(target=_serve, args=(theirs, self.sets, self.traces), daemon=True)
            self.process.start()
            theirs.close()
            self._next(time.monotonic() + START_S)
        found: Sample | None = None
        self.line.send(task)
        ends = min(until, time.monotonic() + FIRST_S + task.seconds)
        while (sample := self._next(ends)) is not None:
            if found is None:
                ends = min(until, time.monotonic() + 2 * task.seconds + GRACE_S)
            found = sample
        return found

    def _next(self, until: float) -> Sample | None:
        """What the process says next; None: it is ready for the next cell, or was ended because it took too long."""
        try:
            if self.line.poll(max(0.0, until - time.monotonic())):
                said: Sample | None = self.line.recv()
                return said
        except (EOFError, OSError):
            pass
        self.end()
        return None

    def end(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def try_out(
    tasks: Sequence[Task], sets: Mapping[str, Arrays], traces: Mapping[str, Trace], lanes: int, most_s: float
) -> list[Sample | None]:
    """A sample of each task, `lanes` of them at a time; None where the time was over before a round was."""
    until, crews = time.monotonic() + most_s, [_Lane(sets, traces) for _ in range(lanes)]
    free = list(crews)

    def run(task: Task) -> Sample | None:
        lane = free.pop()
        try:
            return lane.run(task, until)
        finally:
            free.append(lane)

    try:
        with ThreadPoolExecutor(lanes) as pool:
            return list(pool.map(run, tasks))
    finally:
        for lane in crews:
            lane.end()
