"""What a page tells of a metric: every cell with its interval, and what `statistics` makes of them together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from statistics import fmean, stdev
from typing import Any

import numpy as np

from harness import metrics
from harness.arrangement import Arrangement
from harness.inference import CONFIDENCE
from harness.places import grouped
from harness.record import Row
from harness.refusal import Refused
from harness.series import SUMMARIES, short
from harness.statistics import Cell, Pooled, Summary, summarise
from harness.verdicts import verdicts

Found = dict[str, Any]


def scored(
    plan: Arrangement, told: Mapping[str, Mapping[str, Any]], compared: Collection[str], baseline: str | None = None
) -> dict[str, Found]:
    """By metric and summary ("" where it has none): "cells" by group, and "stats" where leaderboards have them.

    told: metric -> its scale and whether more is better; compared: those that get stats. A cell is [mean, deviation,
    low, high, value of every trial, letters, difference], None without a value; letters and difference come with
    stats, without them the interval is Student's.
    """
    rows = plan.plain_rows()
    found: dict[str, Found] = {}
    for name, how in told.items():
        values = [
            {role: plan.values(at, role, name, bool(how["high"])) for role in plan.roles(at)}
            for at in range(len(rows))
        ]
        found[name] = {}
        for what in ("",) if "_to_" in name else SUMMARIES:
            one = [{role: each[what] for role, each in own.items() if what in each} for own in values]
            column = f"{name}_{what}" if what else name
            summary = _summary(rows, one, column, baseline) if name in compared else None
            found[name][what] = {
                "cells": _cells(plan, one, float(how["scale"]), summary),
                "stats": _stats(summary) if summary else None,
            }
    return found


def _summary(
    rows: Sequence[Row], values: Sequence[Mapping[str, float]], column: str, baseline: str | None
) -> Summary | None:
    """The statistics of a metric that leaderboards know; of others there is none. values: of the rows, by role."""
    try:
        metrics.describe(column)
    except Refused:
        return None
    with_it = [
        {**row, **{f"{role}_{column}": value for role, value in own.items()}}
        for row, own in zip(rows, values, strict=True)
    ]
    return summarise(with_it, metric=column, baseline=baseline) if rows else None


def _cells(
    plan: Arrangement, values: Sequence[Mapping[str, float]], scale: float, summary: Summary | None
) -> list[list[Any] | None]:
    known: dict[tuple[str, str, str], Cell] = {}
    for line, cells in zip(summary.lines, summary.cells, strict=True) if summary else ():
        known |= {(line.entry, line.role, cell.setting): cell for cell in cells}
    found: list[list[Any] | None] = []
    for group in plan.groups:
        own = [values[at].get(group.role) for at in group.trials]
        place = (plan.entries[group.entry]["name"], group.role, plan.settings[group.setting]["name"])
        found.append(_cell([None if value is None else value * scale for value in own], known.get(place)))
    return found


def _cell(values: Sequence[float | None], told: Cell | None) -> list[Any] | None:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None
    mean, deviation = fmean(numbers), stdev(numbers) if len(numbers) > 1 else None
    half = None if deviation is None else student()[len(numbers) - 1] * deviation / len(numbers) ** 0.5
    low, high = (None, None) if half is None else (mean - half, mean + half)
    if told is None:
        return [short(mean), short(deviation), short(low), short(high), list(map(short, values))]
    cell = [short(told.mean), short(told.sd), short(told.low), short(told.high), list(map(short, values))]
    return [*cell, told.letters, _difference(told)]


def _difference(cell: Cell) -> list[Any] | None:
    """[mean, low, high, corrected p, pairs]; None where nothing is compared."""
    if cell.difference is None or not cell.difference.paired.n:
        return None
    pair = cell.difference.paired
    low, high = (pair.interval.low, pair.interval.high) if pair.interval else (None, None)
    return [short(pair.mean), short(low), short(high), short(cell.difference.p), pair.n]


def _stats(summary: Summary) -> Found:
    """The baseline's name, the notes, every line over all settings, and the ranks."""
    found: Found = {
        "baseline": summary.baseline.name if summary.baseline else None,
        "notes": list(summary.notes),
        "pooled": {line.name: _pooled(one) for line, one in zip(summary.lines, summary.pooled, strict=True) if one},
    }
    if (ranking := summary.ranking) is not None:
        found["ranking"] = {
            "names": [line.name for line in summary.ranked],
            "ranks": list(map(short, ranking.ranks)),
            "settings": ranking.n,
            "p": short(ranking.p),
            "critical": short(ranking.critical),
            "cliques": [list(clique) for clique in ranking.cliques],
        }
    return found


def _pooled(one: Pooled) -> Found:
    ends = {"mean": one.interval, "iqm": one.iqm_interval, "better": one.better_interval}
    return {
        name: [short(getattr(one, name)), *((short(end.low), short(end.high)) if end else (None, None))]
        for name, end in ends.items()
    }


@lru_cache
def student(most: int = 1000) -> tuple[float, ...]:
    """Student's t by degrees of freedom, for a 95 % interval; 0 at none."""
    from scipy.special import stdtrit

    return 0.0, *(float(value) for value in stdtrit(np.arange(1, most), (1 + CONFIDENCE) / 2))


def beside(rows: Sequence[Row]) -> list[Found]:
    """Published values of these settings with ours: see `verdicts`. rows: of no search."""
    found = []
    for one in verdicts(rows, grouped(rows)):
        theirs, cell = one.theirs, one.cell
        found.append(
            {
                **{key: getattr(theirs, key) for key in ("source", "table", "read", "method", "role", "setting")},
                **{"value": short(theirs.value), "sd": short(theirs.sd), "finding": one.finding},
                **{"why": list(one.why), "name": one.name, "at": one.setting},
                "ours": [short(cell.mean), short(cell.low), short(cell.high)] if cell else None,
            }
        )
    return found
