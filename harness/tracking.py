"""MLflow: a projection of the tables, for looking at runs side by side. The only place of mlflow.

One parent run per sweep and results folder, one child run per trial. The tables are the truth: whatever MLflow lacks,
or holds half-written or out of date, is written anew from them, so nothing here may stop or slow a sweep.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import os
import queue
import re
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from harness.record import SCHEMAS, Row, Store, flatten
from harness.refusal import masked

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

EXPERIMENT = "fedstill"
BATCH = 1000  # metrics a call: what MLflow takes at most
STATUS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
TAGS = ("method", "dataset", "alpha", "participation", "seed", "net", "commit", "config_hash", "sweep", "reason")
COSTS = ("up_bytes", "down_bytes", "steps", "server_steps", "samples", "seconds", "server_seconds")
TOTALS = (*COSTS[:-1], "rounds_done", "peak_memory_bytes")
ENVIRONMENT = {  # what the user has set stays
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would write into the live display
    # MLflow's own 7 retries block each call to a dead server for four minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class Projection:
    """What MLflow holds of one results folder. Calls block, and raise MLflow's errors.

    uri: MLflow's tracking URI. sweep: name of the parent run. store: the tables that are projected.
    The parent is found again by sweep, folder name and user, its children by trial id.
    """

    def __init__(self, uri: str, sweep: str, store: Store) -> None:
        self._client = _connect(uri)
        self._store, self._sweep = store, sweep
        owner = {"fedstill.sweep": sweep, "fedstill.results": store.path.resolve().name, "mlflow.user": _user()}
        self._experiment = self._find_experiment(uri)
        found = self._search(f"tags.`fedstill.sweep` = '{sweep}'")
        parents = [run for run in found if owner.items() <= run.data.tags.items()]
        name = sweep if owner["fedstill.results"] == sweep else f"{sweep} ({owner['fedstill.results']})"
        self._parent = (
            parents[-1] if parents else self._client.create_run(self._experiment, tags=owner, run_name=name)
        )
        self._children: defaultdict[str, list[tuple[str, str, str]]] = defaultdict(list)
        for run in self._search(f"tags.`mlflow.parentRunId` = '{self._parent.info.run_id}'"):
            tags = run.data.tags
            mark = (run.info.run_id, run.info.status, tags.get("fedstill.digest", ""))
            self._children[tags.get("fedstill.trial_id", "")].append(mark)

    def put(self, trial: Row, rounds: Sequence[Row]) -> bool:
        """Make the trial's run hold this row and these rounds. Returns whether anything had to be written."""
        if self.holds(trial):
            return False
        trial_id, digest, status = trial["trial_id"], _digest(trial), STATUS[trial["status"]]
        for run_id, _, _ in self._children.pop(trial_id, []):
            self._client.delete_run(run_id)  # MLflow's parameters can't be changed, its metrics not taken back
        self._open(True)
        start = _milliseconds(trial.get("started"))
        run = self._client.create_run(
            self._experiment,
            start_time=start,
            tags=_tags(trial) | {"mlflow.parentRunId": self._parent.info.run_id, "mlflow.user": _user()},
            run_name=f"{trial['method']} seed={trial.get('seed')} {trial_id}",
        )
        self._log(run.info.run_id, trial, rounds, start)
        # The digest comes when all else is there, the status last: a run cut short is recognised by either.
        self._client.set_tag(run.info.run_id, "fedstill.digest", digest)
        end = start + int(1000 * (trial.get("seconds") or 0))
        self._client.set_terminated(run.info.run_id, status, end_time=end)
        self._children[trial_id] = [(run.info.run_id, status, digest)]
        return True

    def holds(self, trial: Row) -> bool:
        """Whether MLflow has exactly one run of this trial, complete, of just this row."""
        marks = [mark[1:] for mark in self._children.get(trial["trial_id"], [])]
        return marks == [(STATUS[trial["status"]], _digest(trial))]

    def reconcile(self) -> int:
        """Bring MLflow to what the tables hold and end the parent run. Returns the number of runs written."""
        behind = [row for row in self._store.rows("trials") if not self.holds(row)]
        for row in behind:
            self.put(row, self._store.rows("rounds", row["trial_id"]))
        self._open(False)
        return len(behind)

    def _open(self, running: bool) -> None:
        """The parent's status: RUNNING from the first trial written until the tables are met."""
        run_id, status = self._parent.info.run_id, self._parent.info.status
        if running and status != "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
        elif not running and status == "RUNNING":
            self._client.set_terminated(run_id)
        self._parent = self._client.get_run(run_id)

    def _find_experiment(self, uri: str) -> str:
        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            # MLflow would put a local store's artifacts into whatever folder the command was called from.
            beside = (self._store.path.resolve().parent / "mlflow-artifacts").as_uri()
            return str(self._client.create_experiment(EXPERIMENT, beside if uri.startswith("sqlite:") else None))
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _search(self, condition: str) -> Iterator[Run]:
        token: str | None = None
        while True:
            page = self._client.search_runs([self._experiment], condition, max_results=BATCH, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _log(self, run_id: str, trial: Row, rounds: Sequence[Row], start: int) -> None:
        from mlflow.entities import Param

        config = flatten(json.loads(trial.get("config") or "{}"))
        params = [Param(key, value if isinstance(value, str) else json.dumps(value)) for key, value in config.items()]
        for at in range(0, len(params), 100):
            self._client.log_batch(run_id, params=params[at : at + 100])
        metrics = list(_metrics(trial, rounds, start))
        for at in range(0, len(metrics), BATCH):
            self._client.log_batch(run_id, metrics=metrics[at : at + BATCH])


class Tracker:
    """Feeds MLflow from one background thread, so that training never waits for it and never fails with it.

    uri: None for MLFLOW_TRACKING_URI, or else an SQLite file beside the results folder.
    What is missed on the way (a server down, slow or restarted) is made good from the tables by `close`.
    """

    def __init__(self, uri: str | None, sweep: str, results: Path | str) -> None:
        self._store, self._sweep = Store(results), sweep
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(results)
        self._queue: queue.Queue[tuple[Row, Sequence[Row]] | None] = queue.Queue(maxsize=64)
        self._closing = threading.Event()
        self._problems: list[str] = []
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def add(self, trial: Row, rounds: Sequence[Row]) -> None:
        """Hand over a trial that is in the tables. Returns at once, also when MLflow has fallen far behind."""
        with suppress(queue.Full):  # then it is read from the tables at the end
            self._queue.put_nowait((dict(trial), list(rounds)))

    def close(self, timeout: float = 120.0) -> list[str]:
        """Bring MLflow to what the tables hold, for at most `timeout` seconds. Returns what was left undone."""
        self._closing.set()
        with suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(timeout)
        late = [f"no answer for {timeout:g} s"] if self._thread.is_alive() else []
        ending = "the tables are complete; run the same command again, which completes MLflow"
        return [
            f"MLflow at {masked(self.uri)} is not up to date: {why}; {ending}" for why in (*self._problems, *late)
        ]

    def _work(self) -> None:
        projection: Projection | None = None
        with suppress(Exception):  # at once: creating MLflow's tables takes seconds. A server may come up later.
            projection = Projection(self.uri, self._sweep, self._store)
        while (item := self._queue.get()) is not None and not self._closing.is_set():
            try:
                projection = projection or Projection(self.uri, self._sweep, self._store)
                projection.put(*item)
            except Exception:
                projection = None  # a call that seemed to fail may have made a run: look again before the next
        try:
            (projection or Projection(self.uri, self._sweep, self._store)).reconcile()
        except Exception as problem:
            lines = str(problem).strip().splitlines() or [type(problem).__name__]
            self._problems.append(masked(lines[0])[:300])


def default_uri(results: Path | str) -> str:
    """The SQLite file `mlflow.db` beside the results folder; several sweeps share it."""
    return f"sqlite:///{Path(results).resolve().parent / 'mlflow.db'}"


def _connect(uri: str) -> MlflowClient:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "unknown"


def _digest(trial: Row) -> str:
    """Of a trials row; the same as it was handed over and as it is read back, with other methods' columns."""
    plain = {
        name: float(value) if isinstance(value, Real) else str(value)
        for name, value in trial.items()
        if value is not None
    }
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _tags(trial: Row) -> dict[str, str]:
    named = {name: str(trial[name])[:5000] for name in TAGS if trial.get(name) is not None}
    return named | {"fedstill.trial_id": str(trial["trial_id"])}


def _milliseconds(started: str | None) -> int:
    """Of a trial's start since 1970; fixed where it is unknown, so that writing twice gives the same run."""
    return int(1000 * datetime.fromisoformat(started).timestamp()) if started else 0


def _metrics(trial: Row, rounds: Sequence[Row], start: int) -> Iterator[Metric]:
    """Qualities as `<role>/<metric>` and costs as `cost/<name>` (over all roles) by round; totals; the headline."""
    from mlflow.entities import Metric

    clock = 0.0
    by_round: defaultdict[int, list[Row]] = defaultdict(list)
    for row in rounds:
        by_round[row["round"]].append(row)
    for step, rows in sorted(by_round.items()):
        costs = {name: sum(row.get(name) or 0 for row in rows) for name in COSTS}
        clock += costs["seconds"]
        values = {f"cost/{name}": value for name, value in costs.items()}
        for row in rows:
            values |= {f"{row['role']}/{name}": value for name, value in _numbers(row) if name not in COSTS}
        for name, value in values.items():
            yield Metric(_plain(name), float(value), start + int(1000 * clock), step)
    end = start + int(1000 * (trial.get("seconds") or 0))
    for name, value in _numbers(trial):
        if name in TOTALS or name not in SCHEMAS["trials"].names:
            yield Metric(_plain(f"total/{name}" if name in TOTALS else name), float(value), end, 0)


def _plain(name: str) -> str:
    """A name as MLflow takes it on every system; roles may hold "@" and "+"."""
    return re.sub(r"[^/\w.\- ]", ".", name)


def _numbers(row: Row) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, Real) and not isinstance(value, bool) and name != "round":
            yield name, float(value)
