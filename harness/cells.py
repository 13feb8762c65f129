"""The cells of a leaderboard: method and model role by setting, filled from rows; nothing in it is tested yet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev

from harness.inference import Interval, Paired, interval, iqm
from harness.metrics import Metric, describe, roles, values
from harness.places import Place
from harness.record import Row


@dataclass(frozen=True)
class Difference:
    """A cell less the baseline's at the same setting, over the seeds that both have with the same partition.

    p: Holm's, over all differences of the table. Below 0.05 the two are told apart. unpaired: seeds that only one of
    the two has, or that were dealt differently.
    """

    baseline: str
    paired: Paired
    p: float | None = None
    unpaired: int = 0


@dataclass(frozen=True)
class Cell:
    """One method and model role at one setting. values: seed -> value, in the metric's unit.

    The trials without a value are counted: failed (diverged ones apart), stopped, and done but absent: not measured,
    or the target not reached. letters: methods of this column that share one are not told apart.
    """

    method: str
    role: str
    setting: str
    values: Mapping[int, float] = field(default_factory=dict)
    partitions: Mapping[int, str | None] = field(default_factory=dict)  # seed -> partition hash
    trial_ids: tuple[str, ...] = ()  # all of the cell's trials
    failed: int = 0
    diverged: int = 0
    stopped: int = 0
    absent: int = 0
    steps: float | None = None  # of clients, median over the finished trials
    server_steps: float | None = None
    mean: float | None = None
    sd: float | None = None  # n - 1; None below two seeds
    iqm: float | None = None
    interval: Interval | None = None  # 95 %, of the mean; None below two seeds
    difference: Difference | None = None
    letters: str = ""

    @property
    def n(self) -> int:
        """Seeds with a value."""
        return len(self.values)

    @property
    def low(self) -> float | None:
        """The lower end of the 95 % interval."""
        return self.interval.low if self.interval else None

    @property
    def high(self) -> float | None:
        """The upper end of the 95 % interval."""
        return self.interval.high if self.interval else None


@dataclass(frozen=True)
class Line:
    """A row of a leaderboard. name: as shown; entry: the method with those of its settings that vary within it."""

    name: str
    entry: str
    method: str
    role: str


@dataclass(frozen=True)
class Grid:
    """The leaderboard of one metric, uncompared: cells[line][setting], the best line first.

    left_out: trials that were repeated by newer code.
    """

    metric: str
    how: Metric
    lines: tuple[Line, ...]
    settings: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]
    left_out: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The metric with its unit."""
        return f"{self.how.title} ({self.how.unit})"


def fill(trials: Sequence[Row], rounds: Sequence[Row], metric: str, places: Mapping[str, Place]) -> Grid:
    """The grid of one metric, from rows of `trials` (and `rounds`, where `metrics.wants_rounds`).

    places: `grouped(trials)`, which is the same for every metric.
    """
    how = describe(metric, trials)
    settings = tuple(dict.fromkeys(place.setting for place in places.values()))
    groups: defaultdict[str, defaultdict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(trials, key=lambda row: (int(row["seed"]), str(row["trial_id"]))):
        place = places[str(row["trial_id"])]
        groups[place.entry][place.setting].append(row)
    found, left_out = values(metric, trials, rounds), list[str]()
    lines: dict[Line, tuple[Cell, ...]] = {}
    for entry, by_setting in groups.items():
        for setting, rows in by_setting.items():
            by_setting[setting] = _newest(rows)
            left_out += [str(row["trial_id"]) for row in rows if row not in by_setting[setting]]
        every = [row for rows in by_setting.values() for row in rows]
        known = sorted({role for row in every for role in roles(row)})
        # Without roles (every trial failed early) the entry still has its line, which counts the failures.
        for role in (known or [""]) if how.by_role else [""]:
            line = Line(f"{entry} ({role})" if len(known) > 1 and role else entry, entry, _method(every), role)
            lines[line] = tuple(_cell(line, setting, by_setting[setting], found) for setting in settings)
    order = sorted(lines, key=lambda line: (*_standing(lines[line], how), line.name))
    return Grid(metric, how, tuple(order), settings, tuple(lines[line] for line in order), tuple(left_out))


def _method(rows: Sequence[Row]) -> str:
    return str(rows[0]["method"])


def _newest(rows: Sequence[Row]) -> list[Row]:
    """One trial per seed: that of the newest rules, then the one started last."""
    by_seed: dict[int, Row] = {}
    for row in sorted(rows, key=lambda row: (row.get("rules_version") or 0, row.get("started") or "")):
        by_seed[int(row["seed"])] = row
    return [by_seed[seed] for seed in sorted(by_seed)]


def _cell(line: Line, setting: str, rows: Sequence[Row], found: Mapping[tuple[str, str], float | None]) -> Cell:
    done = [row for row in rows if row["status"] == "done"]
    known = {int(row["seed"]): found.get((str(row["trial_id"]), line.role)) for row in done}
    seen = {seed: value for seed, value in known.items() if value is not None}
    failed = [row for row in rows if row["status"] == "failed"]
    diverged = sum(str(row.get("reason")).startswith("diverged") for row in failed)
    numbers = list(seen.values())
    return Cell(
        *(line.method, line.role, setting),
        values=seen,
        partitions={int(row["seed"]): row.get("partition_hash") for row in done},
        trial_ids=tuple(str(row["trial_id"]) for row in rows),
        failed=len(failed) - diverged,
        diverged=diverged,
        stopped=sum(row["status"] == "stopped" for row in rows),
        absent=len(known) - len(seen),
        steps=_median(done, "steps"),
        server_steps=_median(done, "server_steps"),
        mean=fmean(numbers) if numbers else None,
        sd=stdev(numbers) if len(numbers) > 1 else None,
        iqm=iqm(numbers) if numbers else None,
        interval=interval([numbers]),
    )


def _median(rows: Sequence[Row], column: str) -> float | None:
    known = [float(row[column]) for row in rows if row.get(column) is not None]
    return median(known) if known else None


def _standing(cells: Sequence[Cell], how: Metric) -> tuple[int, float]:
    """Complete rows before those with gaps, whose mean is over fewer settings; then the best mean first."""
    means = [cell.mean for cell in cells if cell.mean is not None]
    average = fmean(means) if means else 0.0
    return len(cells) - len(means), -average if how.high else average
