"""MLflow kept up with the tables: while a sweep runs, without holding it up, and at any time by `fedstill sync`."""

from __future__ import annotations

import os
import queue
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

from harness import lock
from harness.projection import Projection, default_uri
from harness.record import Row, Store
from harness.refusal import Refused, masked


class Tracker:
    """Feeds MLflow from one background thread, so that training never waits for it and never fails with it.

    uri: None for MLFLOW_TRACKING_URI, or else an SQLite file beside the results folder.
    What is missed on the way (a server down, slow or restarted) is made good from the tables by `close`.
    """

    def __init__(self, uri: str | None, sweep: str, results: Path | str) -> None:
        self._store, self._sweep = Store(results), sweep
        self.uri = uri or tracking_uri(results)
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
        ending = f"the tables are complete; run the same command again, or `fedstill sync {self._store.path}`"
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
            self._problems.append(first_line(problem))


def sync(results: Path) -> list[str]:
    """Rebuilds what MLflow holds of a results folder from its tables; says in a line or two what that took.

    Raises Refused if the folder is in use or MLflow can't be reached.
    """
    store, uri = Store(results, writable=False), tracking_uri(results)
    store.require_tables()  # a database would be made beside it
    with lock.held(results):
        aside = _put_aside(uri)
        try:
            done = Projection(uri, None, store).reconcile()
        except Refused:
            raise
        except Exception as problem:
            raise Refused(f"MLflow at {masked(uri)} can't be brought up to date: {first_line(problem)}") from None
    return [
        *aside,
        f"MLflow at {masked(uri)}: {done.written} run{'s' * (done.written != 1)} written, {done.removed} removed.",
    ]


def attach(results: Path, files: Sequence[Path]) -> list[str]:
    """Gives the runs of a folder's sweeps these files as artifacts. Returns what went wrong."""
    uri = tracking_uri(results)
    try:
        Projection(uri, None, Store(results, writable=False)).attach(files)
    except Exception as problem:
        return [
            f"MLflow at {masked(uri)} lacks the leaderboard: {first_line(problem)}; try `fedstill sync {results}`"
        ]
    return []


def tracking_uri(results: Path | str) -> str:
    """What MLFLOW_TRACKING_URI says, or else the database beside the results."""
    return os.environ.get("MLFLOW_TRACKING_URI") or default_uri(results)


def file_behind(uri: str) -> Path | None:
    """The SQLite file that a URI means, if it means one."""
    path = uri.removeprefix("sqlite:///")
    return Path(path) if path != uri else None


def first_line(problem: Exception) -> str:
    """Of what an error says, short, without credentials."""
    return masked((str(problem).strip().splitlines() or [type(problem).__name__])[0])[:300]


def _put_aside(uri: str) -> list[str]:
    """Renames a database that is damaged, or was made in part only: MLflow would not start on it. Says so."""
    path = file_behind(uri)
    if path is None or not path.is_file() or not (what := fault_of(path)):
        return []
    target = path.with_name(f".damaged-{path.name}")
    path.replace(target)
    for ending in ("-journal", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + ending).replace(target.with_name(target.name + ending))
    return [f"{path} {what}: put aside as {target.name}; other results beside it need `fedstill sync` as well."]


def fault_of(database: Path) -> str:
    """What is wrong with an SQLite file of MLflow's; empty if nothing is, or if that can't be told now."""
    try:
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=rw", uri=True)) as opened:
            if opened.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                return "is damaged"
            names = {name for (name,) in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            begun = bool(names) and "alembic_version" not in names
            if begun or any(name.startswith("_alembic_tmp") for name in names):
                return "was made in part only"
            if names and not opened.execute("SELECT count(*) FROM alembic_version").fetchone()[0]:
                return "was made in part only"
    except sqlite3.OperationalError:  # such as a lock: MLflow will say
        return ""
    except sqlite3.DatabaseError:
        return "is damaged"
    return ""
