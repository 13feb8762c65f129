"""Leaderboards, from the tables only: mean, standard deviation and 95 % interval over seeds, per setting."""

from __future__ import annotations

import html
import math
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from harness.plots import grouped
from harness.record import Row, Store
from harness.refusal import Refused, unknown

HEADLINE = "accuracy_last10"
CONFIDENCE = 0.95
FEW = 5  # seeds below which an interval deserves a warning
MARK = "_accuracy_auc"  # every role has this column, and no other column ends so


@dataclass(frozen=True)
class Metric:
    """How a column of the table `trials` is shown: its value times `scale`, in `unit`."""

    title: str
    unit: str
    scale: float = 1.0
    by_role: bool = True
    high: bool = True  # whether more is better
    digits: int = 2
    absent: str = "not measured"  # what a finished trial without a value is called


METRICS = {
    HEADLINE: Metric("Accuracy, mean over the last 10 rounds", "%", 100),
    "accuracy_last": Metric("Accuracy after the last round", "%", 100),
    "accuracy_best": Metric("Best accuracy of any round (chosen on the test set)", "%", 100),
    "accuracy_auc": Metric("Accuracy, mean over the rounds (area under the curve)", "%", 100),
    "balanced_accuracy_last10": Metric("Balanced accuracy, mean over the last 10 rounds", "%", 100),
    "own_label_accuracy_last10": Metric("Own-label accuracy, mean over the last 10 rounds", "%", 100),
    "up_bytes": Metric("Traffic up, all rounds", "MB", 1e-6, by_role=False, high=False),
    "down_bytes": Metric("Traffic down, all rounds", "MB", 1e-6, by_role=False, high=False),
    "steps": Metric("Local steps, all rounds", "steps", by_role=False, high=False, digits=0),
    "server_steps": Metric("Server steps, all rounds", "steps", by_role=False, high=False, digits=0),
    "seconds": Metric("Wall-clock time", "s", by_role=False, high=False, digits=1),
}


@dataclass(frozen=True)
class Cell:
    """One row at one setting. values: one per seed, in the metric's unit; the other trials are counted."""

    values: tuple[float, ...] = ()
    failed: int = 0
    stopped: int = 0
    missing: int = 0
    how: Metric = METRICS[HEADLINE]

    @property
    def mean(self) -> float | None:
        """Over seeds; None without a finished trial."""
        return fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation (n - 1); None below two seeds."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """mean -/+ t(0.975, n - 1) * deviation / sqrt(n); None below two seeds."""
        if self.mean is None or self.deviation is None:
            return None
        from scipy.stats import t

        n = len(self.values)
        half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * self.deviation / math.sqrt(n)
        return self.mean - half, self.mean + half

    def __str__(self) -> str:
        counts = ((self.missing, self.how.absent), (self.failed, "failed"), (self.stopped, "stopped"))
        rest = [f"{count} {word}" for count, word in counts if count]
        if self.mean is None:
            return ", ".join(rest) or "-"
        digits, text = self.how.digits, f"{self.mean:.{self.how.digits}f}"
        if self.interval is not None:
            low, high = self.interval
            text += f" ± {self.deviation:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
        return f"{text} ({', '.join([f'n={len(self.values)}', *rest])})"


@dataclass(frozen=True)
class Board:
    """One leaderboard. rows: methods, best first; columns: settings; cells[row][column]; notes: what to know."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...]


def table(results: Path | str, metric: str = HEADLINE) -> Board:
    """The leaderboard of one metric: a key of METRICS, or rounds_to_<t> or bytes_to_<t> for a target t.

    A method with several model roles has a row for each. Raises Refused for no trials and for an unknown metric.
    """
    trials = _trials(results)
    if metric not in (allowed := _present(trials)) and metric != HEADLINE:
        raise unknown("metric", metric, allowed)
    return _board(trials, metric)


def markdown(results: Path | str) -> str:
    """All leaderboards of a results folder, the headline first, with the failures and the notes, as Markdown."""
    trials = _trials(results)
    parts = [f"# Leaderboard: {_escape(Path(results).resolve().name)}"]
    for metric in dict.fromkeys([HEADLINE, *_present(trials)]):
        board = _board(trials, metric)
        lines = [["method", *map(_escape, board.columns)], ["---"] + ["---:"] * len(board.columns)]
        lines += [[_escape(name), *map(str, cells)] for name, cells in zip(board.rows, board.cells, strict=True)]
        parts += [f"## {_escape(board.title)}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
        parts += ["\n".join(f"- {_escape(note)}" for note in board.notes)] if metric == HEADLINE else []
    return "\n\n".join(part for part in parts if part) + "\n"


def write(results: Path | str) -> Path:
    """Write `markdown` to <results>/leaderboard.md, whole or not at all; returns its path."""
    target = Path(results) / "leaderboard.md"
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    text = markdown(results)
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(target)
    except OSError as problem:
        with suppress(OSError):
            draft.unlink()
        raise Refused(f"{target} can't be written: {problem.strerror or problem}") from None
    return target


def _trials(results: Path | str) -> list[Row]:
    trials: list[Row] = list(Store(results, writable=False).rows("trials"))
    if not trials:
        raise Refused(f"{results} has no trials yet: `fedstill sweep CARD --results {results}` makes them")
    return trials


def _present(trials: Sequence[Row]) -> list[str]:
    """The metrics that some trial has, targets included."""
    found = {name for row in trials for name, value in row.items() if value is not None}
    suffixes = {name.removeprefix(f"{role}_") for row in trials for role in _roles(row) for name in found}
    targets = sorted(name for name in suffixes if name.startswith(("rounds_to_", "bytes_to_")))
    return [metric for metric, how in METRICS.items() if metric in (suffixes if how.by_role else found)] + targets


def _how(metric: str) -> Metric:
    if metric in METRICS:
        return METRICS[metric]
    what, target = metric.split("_to_")
    title, unit, scale = ("Rounds", "rounds", 1.0) if what == "rounds" else ("Traffic up and down", "MB", 1e-6)
    return Metric(f"{title} until accuracy {target}", unit, scale, high=False, digits=1, absent="not reached")


def _roles(row: Row) -> list[str]:
    """The model roles that a trial was evaluated in; none if it failed before the first evaluation."""
    return [name.removesuffix(MARK) for name, value in row.items() if name.endswith(MARK) and value is not None]


def _board(trials: Sequence[Row], metric: str) -> Board:
    how, places = _how(metric), grouped(trials)
    columns = tuple(dict.fromkeys(place.setting for place in places.values()))
    groups: defaultdict[str, defaultdict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(trials, key=lambda row: int(row["seed"])):
        place = places[row["trial_id"]]
        groups[place.entry][place.setting].append(row)
    lines: dict[str, tuple[Cell, ...]] = {}
    for entry, by_setting in groups.items():
        roles = sorted({role for rows in by_setting.values() for row in rows for role in _roles(row)})
        # Without roles (every trial failed early) the entry still has its line, which counts the failures.
        for role in (roles or [""]) if how.by_role else [""]:
            name = f"{entry} ({role})" if len(roles) > 1 and role else entry
            column = f"{role}_{metric}" if how.by_role else metric
            lines[name] = tuple(_cell(by_setting[setting], column, how) for setting in columns)
    rows = sorted(lines, key=lambda name: (*_standing(lines[name], how), name))
    cells = tuple(lines[name] for name in rows)
    return Board(f"{how.title} ({how.unit})", tuple(rows), columns, cells, _notes(trials, cells, how))


def _cell(rows: Sequence[Row], column: str, how: Metric) -> Cell:
    found = [row.get(column) for row in rows if row["status"] == "done"]
    values = tuple(float(value) * how.scale for value in found if value is not None)
    failed, stopped = (sum(row["status"] == status for row in rows) for status in ("failed", "stopped"))
    return Cell(values, failed, stopped, len(found) - len(values), how)


def _standing(cells: Sequence[Cell], how: Metric) -> tuple[int, float]:
    """Complete rows before those with gaps, whose mean is over fewer settings; then the best mean first."""
    means = [cell.mean for cell in cells if cell.mean is not None]
    average = fmean(means) if means else 0.0
    return len(cells) - len(means), -average if how.high else average


def _notes(trials: Sequence[Row], cells: Sequence[Sequence[Cell]], how: Metric) -> tuple[str, ...]:
    notes = [
        f"Cells ({how.unit}): mean ± standard deviation over n seeds; in brackets the mean's 95 % Student-t interval."
    ]
    sizes = {len(cell.values) for line in cells for cell in line if cell.values}
    if sizes and min(sizes) < FEW:
        notes.append(f"Fewer than {FEW} seeds (n = {min(sizes)}): the intervals are wide; differences may be chance.")
    if len(sizes) > 1:
        notes.append(f"The number of seeds differs between cells: from {min(sizes)} to {max(sizes)}.")
    places, lost = grouped(trials), defaultdict[str, list[str]](list)
    for row in trials:
        if row["status"] != "done":
            entry, setting = places[row["trial_id"]]
            lost[f"{entry} at {setting} {row['status']}: {row['reason'] or 'no reason recorded'}"].append(
                row["trial_id"]
            )
    notes += [
        f"{len(ids)} x {what} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})" for what, ids in lost.items()
    ]
    code = {(row["commit"], row["rules_version"]) for row in trials}
    if len(code) > 1:
        notes.append(f"The trials come from {len(code)} different versions of the code: see the column commit.")
    return tuple(notes)


def _escape(text: str) -> str:
    """For Markdown: names and reasons are data, and must neither break the table nor act as HTML or a link."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
