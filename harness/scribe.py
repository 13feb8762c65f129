"""The only writer: turns what trials report into rows. Lives in the driver, where Tune calls it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from ray import tune

from harness import RULES_VERSION
from harness.axes import Sweep
from harness.checkpoint import Shelf
from harness.config import Trial, digest, hyper_fields, trial_id
from harness.data import Arrays, card
from harness.overrides import hyper_prefix
from harness.record import Store, flatten, provenance
from harness.registry import label
from harness.summary import headline
from harness.tracking import Tracker

Row = dict[str, Any]
_BARE = re.compile(r"(?!(?:true|false|inf|nan)$)[A-Za-z_][\w./+-]*")  # texts that need no quotes in an override


class Watcher(Protocol):
    """Who is told how a sweep goes."""

    def note(self, text: str) -> None:
        """Something about the whole sweep that the user should know, such as where it runs."""

    def begin(self, todo: Sequence[Trial], done: int) -> None:
        """Before the first trial: those to run, and how many were there already."""

    def start(self, trial: Trial) -> None:
        """A trial has got a process, or the room for one."""

    def round(self, trial: Trial, rounds_done: int, accuracy: float | None) -> None:
        """A trial has got on; accuracy: of its primary model, when that was last evaluated."""

    def end(self, trial: Trial, row: Mapping[str, Any]) -> None:
        """A trial has ended; its row was written."""


@dataclass
class Outcome:
    """How a sweep ended."""

    results: Path
    done: int = 0
    failed: int = 0
    already: int = 0
    problems: list[str] = field(default_factory=list)


def command_of(trial: Trial) -> str:
    """The command that reproduces a trial: every setting that is not a default."""
    usual = flatten(Trial(method=trial.method, net=card(trial.dataset).default_net).model_dump(mode="json"))
    for name, (_, default) in hyper_fields(trial.method).items():
        usual[f"hyper.{name}"] = list(default) if isinstance(default, tuple) else default
    mine = flatten(trial.model_dump(mode="json"))
    changed = {k: v for k, v in mine.items() if k not in ("method", "source", "cohort") and usual[k] != v}
    prefix = hyper_prefix(trial.method)
    words = [f"{re.sub('^hyper', prefix, key)}={_spelled(value)}" for key, value in changed.items()]
    return shlex.join(["fedstill", "run", trial.method, *words])


def _spelled(value: Any) -> str:
    """As an override is read back."""
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_spelled, value)) + "]"
    bare = not isinstance(value, bool | str) or (isinstance(value, str) and _BARE.fullmatch(value))
    return str(value) if bare else json.dumps(value, ensure_ascii=False)


def runs_again(row: Mapping[str, Any]) -> bool:
    """Whether a trial with this row is tried again: a failure that is not the numbers' own doing."""
    return row["status"] == "failed" and not str(row["reason"]).startswith("diverged")


class Scribe(tune.Callback):
    """The only writer: turns what trials report into rows. Lives in the driver."""

    def __init__(
        self,
        sweep: Sweep,
        store: Store,
        tracker: Tracker | None,
        watcher: Watcher,
        outcome: Outcome,
        todo: Sequence[Trial],
        sets: Mapping[str, Arrays],
    ) -> None:
        self.sweep, self.store, self.tracker, self.watcher = sweep, store, tracker, watcher
        self.outcome, self.todo = outcome, todo
        self.shelf = Shelf(store.path)
        self.hashes = {name: arrays.checksum() for name, arrays in sets.items()}
        self.origin = provenance()

    def __reduce__(self) -> tuple[Any, ...]:
        return tune.Callback, ()  # Tune pickles its callbacks for its own restore, which is never used

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Shows that a trial is on its way."""
        self.watcher.start(self.todo[trial.config["cell"]])

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Row, **_: Any) -> None:
        """Shows progress; books a trial that has ended."""
        cell = self.todo[trial.config["cell"]]
        tables, content = result.pop("tables", None), result.pop("checkpoint", None)
        for heavy in ("tables", "checkpoint"):  # or the driver would keep the last ones of every trial
            (trial.last_result or {}).pop(heavy, None)
        self.watcher.round(cell, result["rounds_done"], result["accuracy"])
        if content is not None:
            self._keep(cell, result["rounds_done"], content)
        if tables is not None:
            told = json.loads(tables)
            self._book(cell, told["summary"], told["rounds"], told["clients"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Books a trial whose process was lost."""
        why = str(trial.get_error() or "its process died").strip().splitlines()[-1][:500]
        self._book(self.todo[trial.config["cell"]], {"status": "failed", "reason": f"crashed: {why}"}, [], [])

    def _keep(self, cell: Trial, round: int, content: bytes) -> None:
        """Writes a checkpoint. One that can't be written is a worry for later: the one before it still stands."""
        try:
            self.shelf.put(trial_id(cell), round, content)
        except OSError as error:
            worry = f"no checkpoint could be written to {self.shelf.path}: {error.strerror or error}"
            if worry not in self.outcome.problems:
                self.outcome.problems.append(worry)

    def _book(self, cell: Trial, summary: Row, rounds: list[Row], clients: list[Row]) -> None:
        name = trial_id(cell)
        for row in rounds:
            row.update({kind: json.dumps(row[kind], sort_keys=True) for kind in ("up_kinds", "down_kinds")})
        row = self._row(cell, name, summary, rounds)
        self.store.commit(row, [{"trial_id": name, **r} for r in rounds], [{"trial_id": name, **c} for c in clients])
        if not runs_again(row):
            self.shelf.drop(name)
        if self.tracker is not None:
            self.tracker.add(row, rounds)
        self.outcome.done += row["status"] == "done"
        self.outcome.failed += row["status"] == "failed"
        self.watcher.end(cell, row)

    def _row(self, cell: Trial, name: str, summary: Row, rounds: Sequence[Row]) -> Row:
        skew = summary.get("skew", {})
        started = datetime.fromtimestamp(summary.get("started", datetime.now(UTC).timestamp()), UTC)
        kept = ("status", "reason", "seconds", "rounds_done", "peak_memory_bytes", "device", "threads")
        totals = ("up_bytes", "down_bytes", "steps", "server_steps", "samples")
        return {
            "trial_id": name,
            "sweep": self.sweep.name,
            **{key: summary.get(key) for key in kept},
            "method": label(cell.method),
            **{key: getattr(cell, key) for key in ("dataset", "net", "seed", "clients", "participation")},
            "alpha": cell.partition.alpha if "alpha" not in cell.partition.unread() else None,
            "config": cell.model_dump_json(),
            "config_hash": digest(cell),
            "partition_hash": skew.get("partition_hash"),
            **{key: skew.get(key) for key in ("partition_js", "partition_classes", "partition_size_cv")},
            "data_hash": self.hashes[cell.dataset],
            "rules_version": RULES_VERSION,
            **self.origin,
            "hosts": self.sweep.execution.hosts,
            "command": command_of(cell),
            "started": started.isoformat(timespec="milliseconds"),
            **{key: sum(row[key] for row in rounds) for key in totals},
            **headline(rounds, cell.evaluation.targets),
        }
