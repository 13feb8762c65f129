"""Statistics of a leaderboard, from rows only: intervals, paired differences, ranks, letters, and what to beware of.

summary = summarise(store.rows("trials"))
summary.cells[0][0].mean, summary.cells[0][0].interval, summary.notes
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from harness.caveats import caveats
from harness.cells import Cell, Difference, Grid, Line, fill
from harness.inference import Interval, Ranking, holm, improvement, interval, iqm, letters, paired, ranking
from harness.metrics import HEADLINE, Metric
from harness.places import competing, grouped
from harness.record import Row
from harness.refusal import unknown

__all__ = ["ALPHA", "Cell", "Difference", "Line", "Pooled", "Summary", "summarise"]
ALPHA = 0.05  # differences with a corrected p below it are told apart
USUAL = "fedavg"  # the baseline where none is named


@dataclass(frozen=True)
class Pooled:
    """One line over all settings, each of which counts the same. n: values in all.

    better: the chance that one of its runs beats one of the baseline's at the same setting.
    """

    n: int
    mean: float
    interval: Interval | None
    iqm: float
    iqm_interval: Interval | None
    better: float | None = None
    better_interval: Interval | None = None


@dataclass(frozen=True)
class Summary:
    """A leaderboard with its statistics. cells[line][setting], the best line first; pooled as lines.

    pooled: None for a line without a value at every setting, and where there is one setting only.
    ranking: over the settings, of the lines in `ranked`; None with fewer than two of either.
    """

    metric: str
    how: Metric
    lines: tuple[Line, ...]
    settings: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]
    baseline: Line | None
    pooled: tuple[Pooled | None, ...]
    ranked: tuple[Line, ...]
    ranking: Ranking | None
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """The metric with its unit."""
        return f"{self.how.title} ({self.how.unit})"

    @property
    def comparisons(self) -> Iterator[tuple[Line, Cell, Difference]]:
        """Every difference to the baseline."""
        for line, cells in zip(self.lines, self.cells, strict=True):
            for cell in cells:
                if cell.difference is not None:
                    yield line, cell, cell.difference


def summarise(
    trials: Sequence[Row],
    rounds: Sequence[Row] = (),
    metric: str = HEADLINE,
    baseline: str | None = None,
) -> Summary:
    """The leaderboard of one metric.

    trials: rows of that table; those of a search take no part. rounds: rows of that table, needed where
    `metrics.wants_rounds`. baseline: the method, or the name of a line, that all are compared to; by default fedavg,
    if it has one line. Raises Refused for an unknown metric or baseline.
    """
    kept = competing(trials)
    places = grouped(kept)
    grid = fill(kept, rounds, metric, places)
    against = _baseline(grid, baseline)
    cells = _lettered(_compared(grid.cells, grid, against), grid.how)
    complete = [at for at, line in enumerate(cells) if all(cell.mean is not None for cell in line)]
    scores = np.array([[cell.mean for cell in cells[at]] for at in complete], float)
    return Summary(
        *(metric, grid.how, grid.lines, grid.settings, cells, against),
        pooled=_pooled(cells, grid, against, complete),
        ranked=tuple(grid.lines[at] for at in complete),
        ranking=ranking(scores.T, grid.how.high) if complete else None,
        notes=caveats(len(trials) - len(kept), kept, places, replace(grid, cells=cells), against),
    )


def _baseline(grid: Grid, wanted: str | None) -> Line | None:
    names = {line.name: line for line in grid.lines}
    lines = [names[wanted]] if wanted in names else [ln for ln in grid.lines if ln.method == (wanted or USUAL)]
    if len(lines) == 1 or wanted is None:
        return lines[0] if len(lines) == 1 else None
    raise unknown("baseline", wanted, [ln.name for ln in lines] or names)


def _compared(cells: tuple[tuple[Cell, ...], ...], grid: Grid, against: Line | None) -> tuple[tuple[Cell, ...], ...]:
    """Every cell with its difference to the baseline's, p corrected over the whole table."""
    if against is None:
        return cells
    theirs = cells[grid.lines.index(against)]
    found = {
        (row, column): _difference(cell, theirs[column], against.name)
        for row, line in enumerate(cells)
        for column, cell in enumerate(line)
        if grid.lines[row] != against and cell.n and theirs[column].n
    }
    for (place, made), p in zip(found.items(), holm([made.paired.p for made in found.values()]), strict=True):
        found[place] = replace(made, p=p)
    return tuple(
        tuple(replace(cell, difference=found.get((row, column))) for column, cell in enumerate(line))
        for row, line in enumerate(cells)
    )


def pairs(one: Cell, other: Cell) -> list[tuple[float, float]]:
    """The values of the seeds that both have, dealt the same rows to the same clients."""
    both = [seed for seed in one.values if seed in other.values]
    same = [seed for seed in both if one.partitions.get(seed) == other.partitions.get(seed)]
    return [(one.values[seed], other.values[seed]) for seed in same]


def _difference(ours: Cell, theirs: Cell, name: str) -> Difference:
    matched = pairs(ours, theirs)
    unpaired = len(set(ours.values) | set(theirs.values)) - len(matched)
    return Difference(name, paired([a - b for a, b in matched]), unpaired=unpaired)


def _lettered(cells: tuple[tuple[Cell, ...], ...], how: Metric) -> tuple[tuple[Cell, ...], ...]:
    """Every cell with its letters among those of its column that have two values or more."""
    changed = [list(line) for line in cells]
    for column in range(len(cells[0]) if cells else 0):
        rows = [row for row, line in enumerate(cells) if line[column].n > 1]
        rows.sort(key=lambda row: (cells[row][column].mean or 0.0) * (-1 if how.high else 1))
        if len(rows) < 2:
            continue
        places = list(combinations(range(len(rows)), 2))
        tested = [pairs(cells[rows[i]][column], cells[rows[j]][column]) for i, j in places]
        differs = np.zeros((len(rows), len(rows)), bool)
        for (i, j), p in zip(places, holm([paired([a - b for a, b in t]).p for t in tested]), strict=True):
            differs[i, j] = differs[j, i] = p is not None and p < ALPHA
        for row, text in zip(rows, letters(differs), strict=True):
            changed[row][column] = replace(changed[row][column], letters=text)
    return tuple(map(tuple, changed))


def _pooled(
    cells: Sequence[Sequence[Cell]], grid: Grid, against: Line | None, complete: Sequence[int]
) -> tuple[Pooled | None, ...]:
    if len(grid.settings) < 2:
        return (None,) * len(cells)
    strata = {at: [list(cell.values.values()) for cell in cells[at]] for at in complete}
    base = grid.lines.index(against) if against is not None else -1
    found: list[Pooled | None] = []
    for at in range(len(cells)):
        if at not in strata:
            found.append(None)
            continue
        flat = [value for values in strata[at] for value in values]
        means = [cell.mean for cell in cells[at] if cell.mean is not None]
        one = Pooled(len(flat), sum(means) / len(means), interval(strata[at]), iqm(flat), interval(strata[at], "iqm"))
        if base in strata and base != at:
            ours, theirs = (strata[at], strata[base]) if grid.how.high else (strata[base], strata[at])
            chance, between = improvement(ours, theirs)
            one = replace(one, better=chance, better_interval=between)
        found.append(one)
    return tuple(found)
