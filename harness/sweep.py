"""A sweep: finds what is missing, runs it under Ray Tune, and writes every ended trial once."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune

from harness import cluster, lock
from harness.axes import Sweep
from harness.cohorts import read_trace
from harness.config import Execution, Trial, trial_id
from harness.data import Arrays, card, load
from harness.record import Store
from harness.refusal import Refused
from harness.scribe import Outcome, Scribe, Watcher, command_of, runs_again
from harness.tracking import Tracker
from harness.trial import FederatedTrial
from harness.work import make_setup

__all__ = ["Outcome", "Watcher", "command_of", "run"]


def run(sweep: Sweep, results: Path, watcher: Watcher) -> Outcome:
    """Runs the cells that have no row yet. Raises Refused before anything is written if it can't be done.

    A cell whose row says that it failed is tried again, except when it diverged: that would only repeat itself.
    A Ray that this process has started already is used, and left running.
    """
    how, mine, tracker = sweep.execution, not ray.is_initialized(), None
    try:
        if mine and cluster.address(how):
            watcher.note(cluster.start(how, sweep.cells))
        cluster.check_room(how, cluster.supply())
        over = _over(results)
        todo = [cell for cell in sweep.cells if trial_id(cell) not in over]
        outcome = Outcome(results, already=len(sweep.cells) - len(todo))
        sets = _check_data(todo, how)
        store = Store(results)
        lock.take(results)
        tracker = Tracker(None, sweep.name, results) if how.mlflow else None
        watcher.begin(todo, outcome.already)
        if todo:
            cluster.start(how)
            _tune(sweep, todo, sets, Scribe(sweep, store, tracker, watcher, outcome, todo, sets))
    finally:
        if mine and ray.is_initialized():
            ray.shutdown()
        problems = tracker.close() if tracker is not None else []
        lock.give_back(results)
    outcome.problems += problems
    return outcome


def _over(results: Path) -> set[str]:
    """The trials that need no other run. What is there is only read."""
    rows = Store(results, writable=False).rows("trials") if results.exists() else []
    return {row["trial_id"] for row in rows if not runs_again(row)}


def _check_data(cells: Sequence[Trial], how: Execution) -> dict[str, Arrays]:
    """The data sets of the cells; also deals them out once per setting, so that impossible ones are refused here."""
    folder = Path(how.data) if how.data else None
    if folder is not None and not folder.is_dir():
        raise Refused(f"execution.data = {how.data!r} is not a folder: give the one that the data sets lie in")
    wanted = [name for cell in cells for name in (cell.dataset, cell.proxy.source)]
    sets = {name: load(card(name), folder) for name in dict.fromkeys(wanted) if name not in ("none", "train")}
    settings = {json.dumps([cell.dataset, *_deal(cell)]): cell for cell in reversed(cells)}
    for cell in settings.values():
        make_setup(cell, sets[cell.dataset], sets.get(cell.proxy.source))
    return sets


def _deal(cell: Trial) -> list[Any]:
    """What decides whether the rows can be dealt, beside the seed."""
    return [cell.clients, *(part.model_dump() for part in (cell.partition, cell.holdout, cell.proxy, cell.fleet))]


def _traces(cells: Sequence[Trial]) -> set[tuple[str, int]]:
    return {(cell.availability.trace, cell.clients) for cell in cells if cell.availability.trace}


def _resume(cells: Sequence[Trial], scribe: Scribe) -> dict[int, Any]:
    """References of the checkpoints that cells can go on from, by the cell's number."""
    found = {}
    for number, cell in enumerate(cells):
        content, warnings = scribe.shelf.latest(trial_id(cell))
        scribe.outcome.problems += warnings
        if content is not None:
            found[number] = ray.put(content)
    return found


def _tune(sweep: Sweep, todo: Sequence[Trial], sets: Mapping[str, Arrays], scribe: Scribe) -> None:
    how = sweep.execution
    data = {
        "cells": [cell.model_dump_json() for cell in todo],
        "execution": how.model_dump(mode="json"),
        "arrays": {name: ray.put(arrays) for name, arrays in sets.items()},
        "resume": _resume(todo, scribe),
        "traces": {path: read_trace(path, clients)[0] for path, clients in _traces(todo)},
    }
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial that fails is a row with a reason
    room = tune.PlacementGroupFactory(cluster.bundles(how))
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
