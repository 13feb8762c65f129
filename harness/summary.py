"""What the rounds of a trial come to: the headline columns of its row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

Row = Mapping[str, Any]
WINDOW = 10  # rounds of the headline's mean


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
