"""What the rows of a trial come to: the headline columns, their hash, and whether it is the last word."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from numbers import Real
from statistics import fmean
from typing import Any

Row = Mapping[str, Any]
WINDOW = 10  # rounds of the headline's mean
# The columns, of whatever table, that depend on the clock and the memory of the machine.
CLOCKS = frozenset({"seconds", "server_seconds", "peak_memory_bytes", "started", "time"})


def final(status: str, reason: str, stage: str) -> bool:
    """Whether a trial that ended in this way is not run again.

    A search has to come to a choice: what failed in it, or was stopped, stays so. Any other trial that failed is
    tried again by the next command, unless its numbers diverged, which would only repeat itself.
    """
    return stage == "search" or status == "done" or (status == "failed" and reason.startswith("diverged"))


def rows_hash(rounds: Iterable[Row], clients: Iterable[Row]) -> str:
    """sha256 (hex) over a trial's rows in these tables without clock columns: equal for equal numbers.

    Neither the order of the rows nor columns that are null count, and an integer is the float of its value: so it is
    the same for what is handed over and for what is read back beside other trials.
    """
    found = hashlib.sha256()
    for rows in (rounds, clients):
        lines = sorted(json.dumps(_plain(row), sort_keys=True) for row in rows)
        found.update("\n".join([*lines, ""]).encode())
        found.update(b"\0")
    return found.hexdigest()


def _plain(row: Row) -> dict[str, Any]:
    kept = ((k, v) for k, v in row.items() if v is not None and k != "trial_id" and k not in CLOCKS)
    return {k: [None if x is None else float(x) for x in v] if isinstance(v, list) else _number(v) for k, v in kept}


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, Real) else value


def headline(rounds: Iterable[Row], targets: Sequence[float] = ()) -> dict[str, float | int | None]:
    """The headline columns of a trial, from its rows of the table `rounds`; None where nothing was measured.

    For each role, over its evaluated rounds: `<role>_accuracy_last10` (mean over the last 10 rounds up to the last
    evaluated one; those of them that were evaluated), `_last`, `_best`, `_auc` (trapezoid over the rounds, divided
    by their span), `<role>_{balanced,own_label}_accuracy_last10`, `<role>_validation_accuracy_last10` where there
    are validation rows, and for each target t (a fraction) `<role>_rounds_to_<t>` (rounds trained when accuracy first
    reached t) and `<role>_bytes_to_<t>` (bytes up and down of all roles until the end of that round).
    """
    rows = sorted(rounds, key=lambda row: int(row["round"]))
    columns: dict[str, float | int | None] = {}
    for role in dict.fromkeys(str(row["role"]) for row in rows):
        own = [row for row in rows if row["role"] == role]
        curve = curve_of(own, "accuracy")
        columns |= {
            f"{role}_accuracy_last10": last_mean(curve),
            f"{role}_accuracy_last": curve[-1][1] if curve else None,
            f"{role}_accuracy_best": max(value for _, value in curve) if curve else None,
            f"{role}_accuracy_auc": _area(curve),
            f"{role}_balanced_accuracy_last10": last_mean(curve_of(own, "balanced_accuracy")),
            f"{role}_own_label_accuracy_last10": last_mean(curve_of(own, "own_label_accuracy")),
        }
        if (held := last_mean(curve_of(own, "validation_accuracy"))) is not None:
            columns[f"{role}_validation_accuracy_last10"] = held
        for target in targets:
            hit = next((at for at, value in curve if value >= target), None)
            spent = None if hit is None else sum(_traffic(row) for row in rows if int(row["round"]) <= hit)
            columns[f"{role}_rounds_to_{target:g}"] = None if hit is None else hit + 1
            columns[f"{role}_bytes_to_{target:g}"] = spent
    return columns


def curve_of(rows: Iterable[Row], metric: str) -> list[tuple[int, float]]:
    """(round, value) of the evaluated rounds; a value that is None or NaN (a null that passed pandas) was not."""
    pairs = ((int(row["round"]), row.get(metric)) for row in rows)
    return [(at, float(value)) for at, value in pairs if value is not None and value == value]


def last_mean(curve: Sequence[tuple[int, float]]) -> float | None:
    """The mean over the last rounds up to the last evaluated one; those of them that were evaluated."""
    return fmean(value for at, value in curve if at > curve[-1][0] - WINDOW) if curve else None


def _area(curve: Sequence[tuple[int, float]]) -> float | None:
    if len(curve) < 2:
        return curve[0][1] if curve else None
    area = sum((b - a) * (x + y) / 2 for (a, x), (b, y) in pairwise(curve))
    return area / (curve[-1][0] - curve[0][0])


def _traffic(row: Row) -> int:
    return int(row["up_bytes"] or 0) + int(row["down_bytes"] or 0)
