"""A sweep: finds what is missing, runs it under Ray Tune, and writes every ended trial once."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import TuneError

from harness import cluster, lock
from harness.archive import Archive
from harness.axes import Sweep
from harness.checkpoint import Shelf, unpack
from harness.cohorts import read_trace
from harness.config import Execution, Trial, trial_id
from harness.data import Arrays, card, load
from harness.desk import Book, Desk, Grid, Hunt, Job, Source
from harness.errands import Errands
from harness.ledger import Ledger
from harness.population import Population
from harness.record import Store, flatten
from harness.referee import Referee
from harness.refusal import Refused
from harness.room import at_once, bundles
from harness.scribe import Outcome, Scribe, Watcher, command_of
from harness.space import curve
from harness.summary import final
from harness.tracking import Tracker
from harness.trial import DRIFTED, WAYS_ON, FederatedTrial, drift, versions
from harness.work import make_setup

MOST_PENDING = 64  # trials that are asked for ahead
__all__ = ["Outcome", "Watcher", "command_of", "run"]


def run(sweep: Sweep, results: Path, watcher: Watcher, fresh: bool = False) -> Outcome:
    """Runs the cells that have no row yet. Raises Refused before anything is written if it can't be done.

    A cell whose row says that it failed is tried again, except when it diverged: that would only repeat itself.
    A Ray that this process has started already is used, and left running. fresh: rows and checkpoints of this sweep
    are thrown away first, and the watcher is told how many.
    """
    how, mine, tracker, outcome = sweep.execution, not ray.is_initialized(), None, Outcome(results)
    try:
        if mine and cluster.address(how):
            watcher.note(cluster.start(how, known_cells(sweep)))
        cluster.check_room(how, cluster.supply())
        store = _opened(results) if results.exists() else None
        for note in store.quarantine() if store is not None else ():  # first: what is damaged runs again
            watcher.note(note)
        sets = check_data(known_cells(sweep) if fresh else undone(sweep, results), how)
        store = store or _opened(results)
        for note in (*(_discard(sweep, store) if fresh else ()), *_strangers(sweep, store)):
            watcher.note(note)
        tracker = Tracker(None, sweep.name, results) if how.mlflow else None
        scribe = Scribe(sweep, store, tracker, watcher, outcome, sets)
        sources = sources_of(sweep, scribe)
        scribe.desk = Desk(sources, how.parallel, how.retries)
        check_drift(sweep, scribe.ledger)
        trials, rounds = scribe.desk.expected()
        outcome.already = sum(source.found for source in sources)
        watcher.begin(trials, rounds, outcome.already)
        if not scribe.desk.over:
            cluster.start(how, known_cells(sweep))
            _tune(sweep, sets, scribe)
        outcome.problems += [source.problem for source in sources if source.problem]
    finally:
        if mine and ray.is_initialized():
            cluster.stop()
        problems = tracker.close() if tracker is not None else []
        lock.give_back(results)
    outcome.problems += problems
    outcome.tracked = tracker is not None and not problems
    return outcome


def _opened(results: Path) -> Store:
    """The folder's tables, with the lock in this process's hands."""
    store = Store(results)
    lock.take(results)
    return store


@contextmanager
def visited(how: Execution, cells: Iterable[Trial] = ()) -> Iterator[str]:
    """The cluster that a sweep would join, to look at; where it would start a Ray, nothing is started.

    Yields what the user should know of it.
    """
    mine = not ray.is_initialized()
    try:
        yield cluster.start(how, cells) if mine and cluster.address(how) else ""
    finally:
        if mine and ray.is_initialized():
            cluster.stop()


def known_cells(sweep: Sweep) -> list[Trial]:
    """Every cell that is known ahead, and one for each group of a search."""
    groups = sweep.search.groups if sweep.search is not None else ()
    return [*sweep.cells, *(group.prototype for group in groups)]


def undone(sweep: Sweep, results: Path) -> list[Trial]:
    """The cells whose data will be needed. What is there is only read."""
    if sweep.search is not None or not results.exists():
        return known_cells(sweep)
    rows = Store(results, writable=False).rows("trials")
    over = {row["trial_id"] for row in rows if final(row["status"], row["reason"] or "", "")}
    return [cell for cell in sweep.cells if trial_id(cell) not in over]


def sources_of(sweep: Sweep, book: Book) -> list[Source]:
    """The grid of a sweep, and a hunt or a population for every group of its search."""
    plan = sweep.search
    sources: list[Source] = [Grid([Job(cell, cell.rounds, "final" if plan else "") for cell in sweep.cells], book)]
    if plan is not None:
        kind = Population if plan.how.scheduler == "pbt" else Hunt
        sources += [kind(group, plan.how, book) for group in plan.groups if group.dimensions]
    return sources


def _discard(sweep: Sweep, store: Store) -> list[str]:
    """Throws away what this sweep has left, and says what that was."""
    cells = {trial_id(cell) for cell in sweep.cells}
    names = [r["trial_id"] for r in store.rows("trials") if r["sweep"] == sweep.name or r["trial_id"] in cells]
    shelf = Shelf(store.path)
    resting = [name for name in shelf.names() if sweep.search or name in cells]
    store.discard(names)
    for name in resting:
        shelf.drop(name)
    return [f"--fresh: {len(names)} rows of trials and the checkpoints of {len(resting)} were thrown away"]


def _strangers(sweep: Sweep, store: Store) -> list[str]:
    """Says so if the folder has rows of this sweep with other settings: a card that was changed in between."""
    cells = {trial_id(cell): cell for cell in sweep.cells}
    rows = [row for row in store.rows("trials") if row["sweep"] == sweep.name and row["trial_id"] not in cells]
    if not rows or not cells or sweep.search is not None or sweep.name.startswith("run-"):
        return []
    theirs = flatten(json.loads(rows[0]["config"]))
    alike = max(cells.values(), key=lambda cell: (cell.method == theirs["method"], cell.seed == theirs["seed"]))
    changed = {k: v for k, v in flatten(alike.model_dump(mode="json")).items() if theirs.get(k) != v}
    said = ", ".join(f"{key} = {theirs.get(key)!r} there, {value!r} now" for key, value in [*changed.items()][:4])
    return [f"{len(rows)} rows of other settings stay in {store.path} (such as {said}): --fresh throws them away"]


def check_drift(sweep: Sweep, ledger: Ledger) -> None:
    """Refuses to go on from checkpoints of another torch, say: the numbers would be those of neither."""
    for cell in sweep.cells if not sweep.execution.allow_drift else ():
        content = ledger.content(trial_id(cell))
        changed = drift(unpack(content)["made_by"], versions()) if content is not None else None
        if changed:
            raise Refused(f"trial {trial_id(cell)}: {DRIFTED}: {changed}; {WAYS_ON}")


def check_data(cells: Sequence[Trial], how: Execution, download: bool = True) -> dict[str, Arrays]:
    """The data sets of the cells; also deals them out once per setting, so that impossible ones are refused here."""
    folder = Path(how.data) if how.data else None
    if folder is not None and not folder.is_dir():
        raise Refused(f"execution.data = {how.data!r} is not a folder: give the one that the data sets lie in")
    wanted = [name for cell in cells for name in (cell.dataset, cell.proxy.source)]
    sets = {
        name: load(card(name), folder, download) for name in dict.fromkeys(wanted) if name not in ("none", "train")
    }
    settings = {json.dumps([cell.dataset, *_deal(cell)]): cell for cell in reversed(cells)}
    for cell in settings.values():
        make_setup(cell, sets[cell.dataset], sets.get(cell.proxy.source))
    return sets


def _deal(cell: Trial) -> list[Any]:
    """What decides whether the rows can be dealt, beside the seed."""
    return [cell.clients, *(part.model_dump() for part in (cell.partition, cell.holdout, cell.proxy, cell.fleet))]


def traces_of(cells: Sequence[Trial]) -> set[tuple[str, int]]:
    return {(cell.availability.trace, cell.clients) for cell in cells if cell.availability.trace}


def _tune(sweep: Sweep, sets: Mapping[str, Arrays], scribe: Scribe) -> None:
    how, plan, archive = sweep.execution, sweep.search, Archive()
    arrays = {name: ray.put(own) for name, own in sets.items()}
    traces = {path: read_trace(path, clients)[0] for path, clients in traces_of(known_cells(sweep))}
    data = {"execution": how.model_dump(mode="json"), "arrays": arrays, "archive": archive.address, "traces": traces}
    # As many trials as there is room for are asked for ahead: Tune would start a large cluster one by one.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(at_once(how, cluster.supply(), MOST_PENDING))
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial that fails is a row with a reason
    room = tune.PlacementGroupFactory(bundles(how))
    scratch = tempfile.mkdtemp(prefix="fedstill-")  # Tune's own state is disposable
    scribe.lookout = cluster.Lookout(how)
    try:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(FederatedTrial, data=data), room),
            tune_config=tune.TuneConfig(
                search_alg=Errands(scribe, archive),
                scheduler=Referee(plan.how if plan else None, scribe.jobs, _known(scribe) if plan else {}),
                num_samples=-1,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                name=sweep.name,
                storage_path=scratch,
                verbose=0,
                callbacks=[scribe],
                # At the end Tune would save a checkpoint, for which all nodes had to share this machine's files.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        with cluster.patient():
            tuner.fit()
    except TuneError:
        if scribe.trouble is not None:  # Tune makes a text of it
            raise scribe.trouble from None
        raise
    finally:
        archive.close()
        shutil.rmtree(scratch, ignore_errors=True)


def _known(scribe: Scribe) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """The curves of what has ended in a search before, by group and trial: stopping rules start from them."""
    known: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in scribe.store.rows("trials"):
        if row["stage"] == "search" and scribe.sweep.search is not None:
            rounds = scribe.ledger.curve(row["trial_id"])
            own = known.setdefault(json.loads(row["search"])["group"], {})
            own[row["trial_id"]] = curve(rounds, scribe.sweep.search.how)
    return known
