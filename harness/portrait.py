"""What MLflow shows of a trial: its tags, its parameters, its metrics by round. Knows rows, not MLflow."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import datetime
from numbers import Real

from harness.record import SCHEMAS, Row, flatten

STATUS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
TAGS = ("method", "dataset", "alpha", "participation", "seed", "net", "commit", "config_hash", "sweep", "reason")
COSTS = ("up_bytes", "down_bytes", "steps", "server_steps", "samples", "seconds", "server_seconds")
TOTALS = (*COSTS[:-1], "rounds_done", "peak_memory_bytes")
VERSION = 2  # of what runs look like: those of an older one are written anew
PRIMARY = ("accuracy", "balanced_accuracy", "loss")  # of the first model, under names that all methods share
HEADLINES = ("accuracy_last10", "accuracy_best", "balanced_accuracy_last10")
SKEW = ("partition_hash", "partition_js", "partition_classes", "partition_size_cv")
Point = tuple[str, float, int, int]  # a metric's name, its value, milliseconds since 1970, the round


def digest(trial: Row) -> str:
    """Of a trials row and of how it is shown; the same as it was handed over and as it is read back, with other
    methods' columns.
    """
    plain: dict[str, float | str] = {"portrait": VERSION} | {
        name: float(value) if isinstance(value, Real) else str(value)
        for name, value in trial.items()
        if value is not None
    }
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def params(trial: Row) -> dict[str, str]:
    """Every setting by its full key."""
    config = flatten(json.loads(trial.get("config") or "{}"))
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in config.items()}


def tags(trial: Row) -> dict[str, str]:
    """What runs are found, grouped and compared by."""
    named = {name: str(trial[name])[:5000] for name in TAGS if trial.get(name) is not None}
    return named | {"fedstill.trial_id": str(trial["trial_id"])}


def data(trial: Row) -> dict[str, str] | None:
    """The data set of a trial as MLflow's Dataset takes it; its profile is how the rows were dealt."""
    if not trial.get("data_hash"):
        return None
    name, dealt = str(trial["dataset"]), {key: trial.get(key) for key in ("clients", *SKEW)}
    origin = {"digest": str(trial["data_hash"])[:36], "source_type": "fedstill", "source": f"datasets/{name}"}
    return {"name": name, **origin, "profile": json.dumps(dealt)}


def milliseconds(started: str | None) -> int:
    """Of a trial's start since 1970; fixed where it is unknown, so that writing twice gives the same run."""
    return int(1000 * datetime.fromisoformat(started).timestamp()) if started else 0


def metrics(trial: Row, rounds: Sequence[Row], start: int) -> Iterator[Point]:
    """Qualities as `<role>/<metric>` and costs as `cost/<name>` (over all roles) by round; totals; the headline.

    Those of the first model also go by `all/<metric>`, so that methods whose models have other names share a chart,
    and that is the first one: MLflow sorts them.
    """
    clock, first = 0.0, _first(rounds)
    by_round: defaultdict[int, list[Row]] = defaultdict(list)
    for row in rounds:
        by_round[row["round"]].append(row)
    for step, rows in sorted(by_round.items()):
        costs = {name: sum(row.get(name) or 0 for row in rows) for name in COSTS}
        clock += costs["seconds"]
        values = {f"cost/{name}": value for name, value in costs.items()}
        for row in rows:
            values |= {f"{row['role']}/{name}": value for name, value in _numbers(row) if name not in COSTS}
        for row in rows:
            if row["role"] == first:
                values |= {f"all/{name}": float(row[name]) for name in PRIMARY if row.get(name) is not None}
        for name, value in values.items():
            yield _plain(name), float(value), start + int(1000 * clock), step
    end = start + int(1000 * (trial.get("seconds") or 0))
    for name, value in _numbers(trial):
        if name in TOTALS or name not in SCHEMAS["trials"].names:
            yield _plain(f"total/{name}" if name in TOTALS else name), float(value), end, 0
    for name in HEADLINES:
        if (found := trial.get(f"{first}_{name}")) is not None:
            yield name, float(found), end, 0
    if trial.get("peak_memory_bytes"):  # where MLflow looks for such numbers
        yield "system/peak_memory_megabytes", trial["peak_memory_bytes"] / 1e6, end, 0


def _first(rounds: Sequence[Row]) -> str:
    """The role of a trial's first model: on its rows the time of whole rounds is booked. Rows may have any order."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for row in rounds:
        seconds[row["role"]] += row.get("seconds") or 0
    return min(seconds, key=lambda role: (-seconds[role], role), default="")


def _plain(name: str) -> str:
    """A name as MLflow takes it on every system; roles may hold "@" and "+"."""
    return re.sub(r"[^/\w.\- ]", ".", name)


def _numbers(row: Row) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, Real) and not isinstance(value, bool) and name != "round":
            yield name, float(value)
