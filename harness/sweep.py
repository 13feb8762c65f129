"""A sweep: finds what is missing, runs it under Ray Tune, and writes every ended trial once."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune

from harness import RULES_VERSION
from harness.axes import Sweep
from harness.config import Execution, Trial, digest, resolve, trial_id
from harness.data import Arrays, card, load
from harness.record import Store, flatten, headline, provenance
from harness.refusal import Refused
from harness.registry import label
from harness.tracking import Tracker
from harness.trial import FederatedTrial, device_of
from harness.work import make_setup

Row = dict[str, Any]
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the tables are ours
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep, and the next command goes on
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class Watcher(Protocol):
    """Who is told how a sweep goes."""

    def begin(self, todo: Sequence[Trial], done: int) -> None:
        """Before the first trial: those to run, and how many were there already."""

    def round(self, trial: Trial, rounds_done: int, accuracy: float | None) -> None:
        """A trial has got on."""

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


def run(sweep: Sweep, results: Path, watcher: Watcher) -> Outcome:
    """Runs the cells that have no row yet. Raises Refused before anything is written if it can't be done.

    A cell whose row says that it failed is tried again, except when it diverged: that would only repeat itself.
    """
    sets = _check_data(sweep)
    if not sweep.execution.address:
        _check_room(sweep.execution, _machine())
    store = Store(results)
    over = {row["trial_id"] for row in store.rows("trials") if not _again(row)}
    todo = [cell for cell in sweep.cells if trial_id(cell) not in over]
    outcome = Outcome(results, already=len(sweep.cells) - len(todo))
    tracker = Tracker(None, sweep.name, results) if sweep.execution.mlflow else None
    watcher.begin(todo, outcome.already)
    try:
        if todo:
            _start_ray(sweep.execution)
            _tune(sweep, todo, sets, Scribe(sweep, store, tracker, watcher, outcome, todo, sets))
    finally:
        if ray.is_initialized():
            ray.shutdown()
        if tracker is not None:
            outcome.problems += tracker.close()
    return outcome


def command_of(trial: Trial) -> str:
    """The command that reproduces a trial: every setting that is not a default."""
    mine = flatten(trial.model_dump(mode="json"))
    usual = flatten(resolve({"method": trial.method, "dataset": trial.dataset}).model_dump(mode="json"))
    skip = {"method", "source"} | ({"participation"} if trial.cohort else {"cohort"})
    prefix = label(trial.method)
    changed = {k: v for k, v in mine.items() if k not in skip and (k not in usual or usual[k] != v)}
    words = [f"{k.replace('hyper.', f'{prefix}.', 1)}={_spelled(v)}" for k, v in changed.items()]
    return shlex.join(["fedstill", "run", trial.method, *words])


def _spelled(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ",".join(_spelled(v) for v in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _again(row: Mapping[str, Any]) -> bool:
    return row["status"] == "failed" and not str(row["reason"]).startswith("diverged")


def _check_data(sweep: Sweep) -> dict[str, Arrays]:
    """The data sets of a sweep; also deals them out once per setting, so that impossible ones are refused here."""
    folder = Path(sweep.execution.data) if sweep.execution.data else None
    wanted = [name for cell in sweep.cells for name in (cell.dataset, cell.proxy.source)]
    sets = {name: load(card(name), folder) for name in dict.fromkeys(wanted) if name not in ("none", "train")}
    settings = {json.dumps([cell.dataset, *_deal(cell)]): cell for cell in reversed(sweep.cells)}
    for cell in settings.values():
        make_setup(cell, sets[cell.dataset], sets.get(cell.proxy.source))
    return sets


def _deal(cell: Trial) -> list[Any]:
    """What decides whether the rows can be dealt, beside the seed."""
    return [cell.clients, *(part.model_dump() for part in (cell.partition, cell.holdout, cell.proxy, cell.fleet))]


def _machine() -> dict[str, float]:
    """What a local Ray would find here."""
    import torch

    return {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}


def _bundles(how: Execution) -> list[dict[str, float]]:
    """The resources of a trial's server and hosts. Without hosts the server trains, and has their share of a GPU."""
    server_gpus = how.gpus_per_server or (0.0 if how.hosts else how.gpus_per_host)
    server = {"CPU": how.server_cpus, "GPU": server_gpus}
    host = {"CPU": how.cpus_per_host, "GPU": how.gpus_per_host}
    return [{k: v for k, v in b.items() if v or k == "CPU"} for b in [server, *[host] * how.hosts]]


def _check_room(how: Execution, supply: Mapping[str, float]) -> None:
    """Refuses what could never be placed: Ray would wait for ever without a word."""
    bundles = _bundles(how)
    for kind in ("CPU", "GPU"):
        demand, there = sum(b.get(kind, 0.0) for b in bundles), supply.get(kind, 0.0)
        if demand > there + 1e-9:
            raise Refused(
                f"a trial needs {demand:g} {kind}s ({how.hosts} hosts and a server), but there are {there:g}: lower "
                f"execution.hosts or the {kind.lower()}s_per_host and {kind.lower()}s_per_server"
            )
    if device_of(how) == "cuda" and not any(b.get("GPU") for b in bundles):
        raise Refused("execution.device = 'cuda' needs gpus_per_host (or gpus_per_server) greater than 0")


def _start_ray(how: Execution) -> None:
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    where: dict[str, Any] = {"address": how.address} if how.address else {"include_dashboard": False}
    ray.init(**where, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
    _check_room(how, ray.cluster_resources())


def _tune(sweep: Sweep, todo: Sequence[Trial], sets: Mapping[str, Arrays], scribe: Scribe) -> None:
    how = sweep.execution
    data = {
        "cells": [cell.model_dump(mode="json") for cell in todo],
        "execution": how.model_dump(mode="json"),
        "arrays": {name: ray.put(arrays) for name, arrays in sets.items()},
    }
    room = tune.PlacementGroupFactory(_bundles(how))
    scratch = tempfile.mkdtemp(prefix="fedstill-")  # Tune's own state is disposable
    try:
        tune.Tuner(
            tune.with_resources(tune.with_parameters(FederatedTrial, data=data), room),
            param_space={"cell": tune.grid_search(list(range(len(todo))))},
            tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=how.parallel or None),
            run_config=tune.RunConfig(name=sweep.name, storage_path=scratch, verbose=0, callbacks=[scribe]),
        ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
        self.hashes = {name: arrays.checksum() for name, arrays in sets.items()}
        self.origin = provenance()

    def __reduce__(self) -> tuple[Any, ...]:
        return tune.Callback, ()  # Tune pickles its callbacks for its own restore, which is never used

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Row, **_: Any) -> None:
        """Shows progress; books a trial that has ended."""
        cell = self.todo[trial.config["cell"]]
        tables = result.pop("tables", None)
        if trial.last_result:
            trial.last_result.pop("tables", None)  # or the driver would keep the rows of every trial
        self.watcher.round(cell, result["rounds_done"], result["accuracy"])
        if tables is not None:
            told = json.loads(tables)
            self._book(cell, told["summary"], told["rounds"], told["clients"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Books a trial whose process was lost."""
        why = str(trial.get_error() or "its process died").strip().splitlines()[-1][:500]
        self._book(self.todo[trial.config["cell"]], {"status": "failed", "reason": f"crashed: {why}"}, [], [])

    def _book(self, cell: Trial, summary: Row, rounds: list[Row], clients: list[Row]) -> None:
        name = trial_id(cell)
        for row in rounds:
            row.update({kind: json.dumps(row[kind], sort_keys=True) for kind in ("up_kinds", "down_kinds")})
        row = self._row(cell, name, summary, rounds)
        self.store.commit(row, [{"trial_id": name, **r} for r in rounds], [{"trial_id": name, **c} for c in clients])
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
