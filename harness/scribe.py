"""The only writer: turns what trials report into rows. Lives in the driver, where Tune calls it."""

from __future__ import annotations

import json
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from ray import tune

from harness import RULES_VERSION
from harness.axes import Sweep
from harness.books import rows_in
from harness.checkpoint import Shelf, unpack
from harness.config import Trial, digest, hyper_fields
from harness.data import Arrays, card
from harness.desk import Desk, Job, Result
from harness.ledger import Ledger
from harness.overrides import hyper_prefix
from harness.record import Store, flatten, provenance
from harness.refusal import Refused
from harness.registry import label
from harness.summary import final, headline, rows_hash
from harness.tracking import Tracker

Row = dict[str, Any]
_BARE = re.compile(r"(?!(?:true|false|inf|nan)$)[A-Za-z_][\w./+-]*")  # texts that need no quotes in an override


class Watcher(Protocol):
    """Who is told how a sweep goes."""

    def note(self, text: str) -> None:
        """Something about the whole sweep that the user should know, such as where it runs."""

    def begin(self, trials: int, rounds: int, done: int) -> None:
        """Before the first trial: how many are to run, all their rounds, and how many were there already."""

    def start(self, trial: Trial) -> None:
        """A trial has got a process, or the room for one."""

    def round(self, trial: Trial, rounds_done: int, accuracy: float | None) -> None:
        """A trial has got on; accuracy: of its primary model, when that was last evaluated."""

    def rest(self, trial: Trial) -> None:
        """A trial has lost its process: it waits for another one, or for the rest of its population."""

    def end(self, trial: Trial, row: Mapping[str, Any]) -> None:
        """A trial has ended; its row was written."""


@dataclass
class Outcome:
    """How a sweep ended."""

    results: Path
    done: int = 0
    failed: int = 0
    stopped: int = 0
    already: int = 0
    tracked: bool = False  # whether MLflow has all of it
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


class Scribe(tune.Callback):
    """The only writer: turns what trials report into rows. Lives in the driver, where it is the desk's book."""

    def __init__(
        self,
        sweep: Sweep,
        store: Store,
        tracker: Tracker | None,
        watcher: Watcher,
        outcome: Outcome,
        sets: Mapping[str, Arrays],
    ) -> None:
        self.sweep, self.store, self.tracker, self.watcher, self.outcome = sweep, store, tracker, watcher, outcome
        self.ledger = Ledger(store, Shelf(store.path), outcome.problems)
        self.ledger.tidy()
        self.hashes = {name: arrays.checksum() for name, arrays in sets.items()}
        self.origin = provenance()
        self.jobs: dict[str, Job] = {}  # by Tune's id of the trial
        self.desk = Desk([])
        self.lookout: Callable[[bool], str | None] = lambda running: None  # says why nothing more can run
        self.trouble: OSError | None = None  # a row that could not be written
        self._running: set[str] = set()  # by Tune's id
        self._ended: list[Any] = []  # of Tune's trials, since the last step
        self._drafts: dict[str, bytes] = {}  # the last tables of those that a search watches, by Tune's id
        self._events: defaultdict[str, list[Row]] = defaultdict(list)  # that trials can't know of, by trial id

    def __reduce__(self) -> tuple[Any, ...]:
        return tune.Callback, ()  # Tune pickles its callbacks for its own restore, which is never used

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Ends a sweep that has lost the room for its trials. Raises Refused."""
        for ended in self._ended:  # Tune would hold statistics of every number of every trial to the end
            ended.run_metadata.metric_analysis.clear()
            ended.run_metadata.metric_n_steps.clear()
        self._ended.clear()
        if (why := self.lookout(bool(self._running))) is not None:
            raise Refused(why)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Shows that a trial is on its way."""
        self._running.add(trial.trial_id)
        self.watcher.start(self.jobs[trial.trial_id].cell)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Row, **_: Any) -> None:
        """Shows progress, keeps checkpoints, books a trial that has ended."""
        job = self.jobs[trial.trial_id]
        # Popped, or the driver would keep the last ones of every trial.
        tables, content = result.pop("tables", None), result.pop("checkpoint", None)
        self.watcher.round(job.cell, result["rounds_done"], result["accuracy"])
        if content is not None:
            self.ledger.keep(job.name, result["rounds_done"], content, needed=result["rests"])
        if result["rests"]:
            self._settle(trial.trial_id)
            self.watcher.rest(job.cell)
        elif tables is not None:
            self._drafts[trial.trial_id] = tables
            if result["rounds_done"] == job.cell.rounds or json.loads(tables)["summary"]["status"] == "failed":
                self._end(trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Books a trial that a rule has stopped; all others are booked by now."""
        self._ended.append(trial)
        if trial.trial_id in self.jobs:
            rule = self.sweep.search.how.scheduler if self.sweep.search else "a rule"
            self._end(trial.trial_id, f"stopped by {rule} after round {{rounds_done}} of {{rounds}}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Gives the job of a process that was lost out again, or books the failure."""
        if trial.trial_id not in self.jobs:
            return
        running, job = len(self._running), self._settle(trial.trial_id)
        why = str(trial.get_error() or "its process died").strip()
        last = why.splitlines()[-1][:500]
        memory = "OutOfMemory" in why or "low on memory" in why
        self._event(job, "out_of_memory" if memory else "trial_lost", last)
        if self.desk.crashed(job, limit=max(1, running // 2) if memory else 0):
            self.watcher.rest(job.cell)
            return
        self._book(job, {"summary": {"status": "failed", "reason": f"crashed: {last}"}})

    def result(self, name: str) -> Result | None:
        """See `desk.Book`, here and below."""
        return self.ledger.result(name)

    def curve(self, name: str) -> Sequence[Mapping[str, Any]]:  # noqa: D102
        return self.ledger.curve(name)

    def reached(self, name: str) -> int:  # noqa: D102
        return self.ledger.reached(name)

    def adopt(self, donor: str, heir: str) -> None:  # noqa: D102
        self.ledger.adopt(donor, heir)

    def close(self, job: Job, reason: str) -> None:  # noqa: D102
        content = self.ledger.content(job.name)
        kept = unpack(content) if content is not None else {"server": {}, "summary": {}}
        told = {table: rows_in(kept["server"], table) for table in ("rounds", "clients", "events")}
        self._book(job, {**told, "summary": {**kept["summary"], "status": "stopped", "reason": reason}})

    def resumed(self, job: Job) -> None:
        """A trial goes on from its checkpoint."""
        self._event(job, "trial_resumed", f"from round {self.ledger.reached(job.name)}")

    def _event(self, job: Job, kind: str, detail: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._events[job.name].append({"time": now, "kind": kind, "round": None, "client": None, "detail": detail})

    def _settle(self, tune_id: str) -> Job:
        """A process has no job any more."""
        self._drafts.pop(tune_id, None)
        self._running.discard(tune_id)
        job = self.jobs.pop(tune_id)
        self.desk.back(job)
        return job

    def _end(self, tune_id: str, stopped: str = "") -> None:
        told = json.loads(self._drafts[tune_id])
        job = self._settle(tune_id)
        if stopped:
            counts = {"rounds_done": told["summary"]["rounds_done"], "rounds": job.cell.rounds}
            told["summary"] |= {"status": "stopped", "reason": stopped.format(**counts)}
        self._book(job, told)

    def _book(self, job: Job, told: Mapping[str, Any]) -> None:
        name, rounds = job.name, [dict(row) for row in told.get("rounds", ())]
        for row in rounds:
            row.update({kind: json.dumps(row[kind], sort_keys=True) for kind in ("up_kinds", "down_kinds")})
        row = self._row(job, told["summary"], rounds) | {"rows_hash": rows_hash(rounds, told.get("clients", ()))}
        events = [*told.get("events", ()), *self._events.pop(name, ())]
        named = [[{"trial_id": name, **r} for r in part] for part in (rounds, told.get("clients", ()), events)]
        try:
            self.store.commit(row, *named)
        except OSError as error:
            self.trouble = error
            raise
        self.ledger.add(row, rounds if job.stage == "search" else ())
        if final(row["status"], row["reason"] or "", job.stage):
            self.ledger.shelf.drop(name)
        if self.tracker is not None:
            self.tracker.add(row, rounds)
        setattr(self.outcome, row["status"], getattr(self.outcome, row["status"]) + 1)
        self.watcher.end(job.cell, row)

    def _row(self, job: Job, summary: Row, rounds: Sequence[Row]) -> Row:
        cell, skew = job.cell, summary.get("skew", {})
        started = datetime.fromtimestamp(summary.get("started", datetime.now(UTC).timestamp()), UTC)
        kept = ("status", "reason", "seconds", "rounds_done", "peak_memory_bytes", "device", "threads", "drift")
        totals = ("up_bytes", "down_bytes", "steps", "server_steps", "samples")
        return {
            "trial_id": job.name,
            "sweep": self.sweep.name,
            "published": self.sweep.published or None,
            "stage": job.stage or None,
            "search": job.origin,
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
