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
Point = tuple[str, float, int, int]  # a metric's name, its value, milliseconds since 1970, the round


def digest(trial: Row) -> str:
    """Of a trials row; the same as it was handed over and as it is read back, with other methods' columns."""
    plain = {
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


def milliseconds(started: str | None) -> int:
    """Of a trial's start since 1970; fixed where it is unknown, so that writing twice gives the same run."""
    return int(1000 * datetime.fromisoformat(started).timestamp()) if started else 0


def metrics(trial: Row, rounds: Sequence[Row], start: int) -> Iterator[Point]:
    """Qualities as `<role>/<metric>` and costs as `cost/<name>` (over all roles) by round; totals; the headline."""
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
            yield _plain(name), float(value), start + int(1000 * clock), step
    end = start + int(1000 * (trial.get("seconds") or 0))
    for name, value in _numbers(trial):
        if name in TOTALS or name not in SCHEMAS["trials"].names:
            yield _plain(f"total/{name}" if name in TOTALS else name), float(value), end, 0


def _plain(name: str) -> str:
    """A name as MLflow takes it on every system; roles may hold "@" and "+"."""
    return re.sub(r"[^/\w.\- ]", ".", name)


def _numbers(row: Row) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, Real) and not isinstance(value, bool) and name != "round":
            yield name, float(value)
