"""MLflow: a projection of the tables, for looking at runs side by side. The only place of mlflow.

One parent run per sweep and results folder, one child run per trial. The tables are the truth: whatever MLflow lacks,
holds half-written or out of date, or holds of trials that are gone, is set right from them.
"""

from __future__ import annotations

import getpass
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

from harness import portrait
from harness.durable import write
from harness.record import Row, Store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "fedstill"
KIND = "custom_model_development"  # MLflow's pages are those for training then, not those for prompts
BATCH = 1000  # metrics a call: what MLflow takes at most
ENVIRONMENT = {  # what the user has set stays
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would write into the live display
    # MLflow's own 7 retries block each call to a dead server for four minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class Changes(NamedTuple):
    """What was done to MLflow, in runs."""

    written: int
    removed: int


class Mark(NamedTuple):
    """A trial's run, as far as it tells whether it is the right one."""

    run: str
    parent: str
    status: str
    digest: str


class Projection:
    """What MLflow holds of one results folder. Calls block, and raise MLflow's errors.

    uri: MLflow's tracking URI. sweep: the one that is under way; None: none is. store: the tables that are projected.
    look: change nothing, and let what is missing be missing.
    A sweep's parent run is found again by sweep, folder and user, its children by trial id.
    """

    def __init__(self, uri: str, sweep: str | None, store: Store, look: bool = False) -> None:
        self._client = _connect(uri)
        self._store, self._sweep = store, sweep
        self._folder = store.path.resolve().name
        # Beside the database a folder's name is its own; on a server others may have one of the same name.
        self._token = "" if beside(uri, store.path) else _token(store.path, make=not look)
        self._experiment = self._find_experiment(uri, look)
        self._parents: defaultdict[str, list[Run]] = defaultdict(list)  # by sweep, the oldest last
        self._children: defaultdict[str, list[Mark]] = defaultdict(list)  # by trial id
        for parent in self._search("tags.`fedstill.sweep` LIKE '%'"):
            if self._ours(parent.data.tags):
                self._parents[parent.data.tags["fedstill.sweep"]].append(parent)
        for parent in (run for runs in self._parents.values() for run in runs):
            for run in self._search(f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"):
                tags = run.data.tags
                mark = Mark(run.info.run_id, parent.info.run_id, run.info.status, tags.get("fedstill.digest", ""))
                self._children[tags.get("fedstill.trial_id", "")].append(mark)

    def put(self, trial: Row, rounds: Sequence[Row]) -> bool:
        """Make the trial's run hold this row and these rounds. Returns whether anything had to be written."""
        if self.holds(trial):
            return False
        trial_id, digest, status = trial["trial_id"], portrait.digest(trial), portrait.STATUS[trial["status"]]
        self._remove(trial_id)  # MLflow's parameters can't be changed, its metrics not taken back
        parent = self._open(self._sweep_of(trial))
        start = portrait.milliseconds(trial.get("started"))
        run = self._client.create_run(
            self._experiment,
            start_time=start,
            tags=portrait.tags(trial) | {"mlflow.parentRunId": parent, "mlflow.user": _user()},
            run_name=f"{trial['method']} seed={trial.get('seed')} {trial_id}",
        )
        self._log(run.info.run_id, trial, rounds, start)
        self._name_data(run.info.run_id, trial)
        # The digest comes when all else is there, the status last: a run cut short is recognised by either.
        self._client.set_tag(run.info.run_id, "fedstill.digest", digest)
        end = start + int(1000 * (trial.get("seconds") or 0))
        self._client.set_terminated(run.info.run_id, status, end_time=end)
        self._children[trial_id] = [Mark(run.info.run_id, parent, status, digest)]
        return True

    def holds(self, trial: Row) -> bool:
        """Whether MLflow has exactly one run of this trial, complete, of just this row, under its sweep."""
        parents = self._parents.get(self._sweep_of(trial), [])[-1:]
        right = [(parent.info.run_id, portrait.STATUS[trial["status"]], portrait.digest(trial)) for parent in parents]
        return bool(right) and [mark[1:] for mark in self._children.get(trial["trial_id"], [])] == right

    def reconcile(self) -> Changes:
        """Bring MLflow to what the tables hold, and end the parent runs."""
        rows = self._store.rows("trials")
        gone = self._children.keys() - {row["trial_id"] for row in rows}
        behind = [row for row in rows if not self.holds(row)]
        removed = sum(map(self._remove, gone)) + sum(len(self._children.get(row["trial_id"], ())) for row in behind)
        for row in behind:
            self.put(row, self._store.rows("rounds", row["trial_id"]))
        for sweep, parents in list(self._parents.items()):
            needed = sweep == self._sweep or any(self._sweep_of(row) == sweep for row in rows)
            for spare in parents[:-1] if needed else parents:
                self._client.delete_run(spare.info.run_id)
                removed += 1
            if needed and parents[-1].info.status == "RUNNING":
                self._client.set_terminated(parents[-1].info.run_id)
            self._parents[sweep] = [self._client.get_run(parents[-1].info.run_id)] if needed else []
        return Changes(len(behind), removed)

    def attach(self, files: Sequence[Path]) -> None:
        """Gives every parent run these files as artifacts, in place of those of the same names."""
        for parents in self._parents.values():
            for file in files if parents else ():
                self._client.log_artifact(parents[-1].info.run_id, str(file))

    @property
    def empty(self) -> bool:
        """Whether MLflow has never heard of the folder."""
        return not self._parents

    def differences(self) -> Iterator[tuple[str, str]]:
        """Trial id and what is wrong with its run, for every trial whose run is not what `reconcile` would leave."""
        rows = self._store.rows("trials")
        for row in rows:
            marks = self._children.get(row["trial_id"], [])
            if not marks:
                yield row["trial_id"], "has no run"
            elif len(marks) > 1:
                yield row["trial_id"], f"has {len(marks)} runs: {', '.join(mark.run for mark in marks)}"
            elif not self.holds(row):
                yield row["trial_id"], f"its run {marks[0].run} is not of this row, or not complete"
        for trial_id in sorted(self._children.keys() - {row["trial_id"] for row in rows}):
            for mark in self._children[trial_id]:
                yield trial_id, f"the trial of run {mark.run} has no row"

    def _sweep_of(self, trial: Row) -> str:
        return str(trial.get("sweep") or self._sweep or self._folder)

    def _ours(self, tags: Mapping[str, str]) -> bool:
        owner = {"fedstill.results": self._folder, "mlflow.user": _user()}
        return owner.items() <= tags.items() and tags.get("fedstill.folder", "") == self._token

    def _remove(self, trial_id: str) -> int:
        """Takes a trial's runs away; says how many there were."""
        marks = self._children.pop(trial_id, [])
        for mark in marks:
            self._client.delete_run(mark.run)
        return len(marks)

    def _open(self, sweep: str) -> str:
        """The id of a sweep's parent run, which is RUNNING from the first trial written until the tables are met."""
        tags = {"fedstill.sweep": sweep, "fedstill.results": self._folder, "mlflow.user": _user()}
        tags |= {"fedstill.folder": self._token} if self._token else {}
        name = sweep if self._folder == sweep else f"{sweep} ({self._folder})"
        parents = self._parents[sweep]
        if not parents:
            parents.append(self._client.create_run(self._experiment, tags=tags, run_name=name))
        run_id = str(parents[-1].info.run_id)
        if parents[-1].info.status != "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
            parents[-1] = self._client.get_run(run_id)
        return run_id

    def _find_experiment(self, uri: str, look: bool) -> str:
        found = self._client.get_experiment_by_name(EXPERIMENT)
        if look:
            return str(found.experiment_id) if found is not None and found.lifecycle_stage != "deleted" else ""
        if found is None:
            # MLflow would put a local store's artifacts into whatever folder the command was called from.
            beside = (self._store.path.resolve().parent / "mlflow-artifacts").as_uri()
            place = beside if uri.startswith("sqlite:") else None
            return str(self._client.create_experiment(EXPERIMENT, place, {"mlflow.experimentKind": KIND}))
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _search(self, condition: str) -> Iterator[Run]:
        token: str | None = None
        while self._experiment:
            page = self._client.search_runs([self._experiment], condition, max_results=BATCH, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _log(self, run_id: str, trial: Row, rounds: Sequence[Row], start: int) -> None:
        from mlflow.entities import Metric, Param

        params = [Param(*item) for item in portrait.params(trial).items()]
        for at in range(0, len(params), 100):
            self._client.log_batch(run_id, params=params[at : at + 100])
        metrics = [Metric(*point) for point in portrait.metrics(trial, rounds, start)]
        for at in range(0, len(metrics), BATCH):
            self._client.log_batch(run_id, metrics=metrics[at : at + BATCH])

    def _name_data(self, run_id: str, trial: Row) -> None:
        """The data set as MLflow's own input of a run, with what the deal made of it."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        told = portrait.data(trial)
        if told is not None:
            tag = InputTag("mlflow.data.context", "training")
            self._client.log_inputs(run_id, [DatasetInput(Dataset(**told), [tag])])


def default_uri(results: Path | str) -> str:
    """The SQLite file `mlflow.db` beside the results folder; several sweeps share it."""
    return f"sqlite:///{Path(results).resolve().parent / 'mlflow.db'}"


def beside(uri: str, results: Path) -> bool:
    """Whether a URI means the database beside the results, however it is spelled."""
    path = uri.removeprefix("sqlite:///")
    return path != uri and Path(path).resolve() == Path(default_uri(results).removeprefix("sqlite:///"))


def _token(results: Path, make: bool) -> str:
    """A name of the folder that no other folder has, kept in it."""
    file = results / ".folder"
    with suppress(FileNotFoundError):
        return file.read_text().strip()
    if not make:
        return ""
    token = uuid4().hex
    write(file, token.encode())
    return token


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
