"""A sweep: finds what is missing, runs it under Ray Tune, and writes every ended trial once."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import socket
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
from harness.config import Execution, Trial, digest, hyper_fields, trial_id
from harness.data import Arrays, card, load
from harness.overrides import hyper_prefix
from harness.record import Store, flatten, headline, provenance
from harness.refusal import Refused
from harness.registry import label
from harness.tracking import Tracker
from harness.trial import FederatedTrial, device_of
from harness.work import make_setup

Row = dict[str, Any]
KNOCK_S = 5.0
_BARE = re.compile(r"(?!(?:true|false|inf|nan)$)[A-Za-z_][\w./+-]*")  # texts that need no quotes in an override
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the tables are ours
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep, and the next command goes on
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent home
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class Watcher(Protocol):
    """Who is told how a sweep goes."""

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


def run(sweep: Sweep, results: Path, watcher: Watcher) -> Outcome:
    """Runs the cells that have no row yet. Raises Refused before anything is written if it can't be done.

    A cell whose row says that it failed is tried again, except when it diverged: that would only repeat itself.
    A Ray that this process has started already is used, and left running.
    """
    how, mine, tracker = sweep.execution, not ray.is_initialized(), None
    try:
        if mine and how.address:
            _start_ray(how)
        _check_room(how, ray.cluster_resources() if ray.is_initialized() else _machine())
        over = _over(results)
        todo = [cell for cell in sweep.cells if trial_id(cell) not in over]
        outcome = Outcome(results, already=len(sweep.cells) - len(todo))
        sets = _check_data(todo, how)
        store = Store(results)
        tracker = Tracker(None, sweep.name, results) if how.mlflow else None
        watcher.begin(todo, outcome.already)
        if todo:
            _start_ray(how)
            _tune(sweep, todo, sets, Scribe(sweep, store, tracker, watcher, outcome, todo, sets))
    finally:
        if mine and ray.is_initialized():
            ray.shutdown()
        problems = tracker.close() if tracker is not None else []
    outcome.problems += problems
    return outcome


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


def _over(results: Path) -> set[str]:
    """The trials that need no other run. What is there is only read."""
    rows = Store(results, writable=False).rows("trials") if results.exists() else []
    return {row["trial_id"] for row in rows if not _again(row)}


def _again(row: Mapping[str, Any]) -> bool:
    return row["status"] == "failed" and not str(row["reason"]).startswith("diverged")


def _check_data(cells: Sequence[Trial], how: Execution) -> dict[str, Arrays]:
    """The data sets of the cells; also deals them out once per setting, so that impossible ones are refused here."""
    folder = Path(how.data) if how.data else None
    wanted = [name for cell in cells for name in (cell.dataset, cell.proxy.source)]
    sets = {name: load(card(name), folder) for name in dict.fromkeys(wanted) if name not in ("none", "train")}
    settings = {json.dumps([cell.dataset, *_deal(cell)]): cell for cell in reversed(cells)}
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
    """Starts or finds Ray, if that was not done before."""
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    if ray.is_initialized():
        return
    where: dict[str, Any] = {"address": how.address} if how.address else {"include_dashboard": False}
    try:
        _knock(how.address)
        ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError) as error:
        raise Refused(f"no Ray cluster at execution.address = {how.address!r}: {error}") from None
    _check_room(how, ray.cluster_resources())


def _knock(address: str) -> None:
    """Raises an OSError at once where nobody listens: Ray would try for minutes, then kill this process."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()


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

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Shows that a trial is on its way."""
        self.watcher.start(self.todo[trial.config["cell"]])

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
