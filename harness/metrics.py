"""What a leaderboard can rank by: columns of the tables, and what is worked out from the rounds."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from harness.record import Row
from harness.refusal import unknown
from harness.summary import WINDOW

HEADLINE = "accuracy_last10"
MARK = "_accuracy_auc"  # every role has this column, and no other column ends so
_TARGET = re.compile(r"(rounds|bytes|seconds)_to_(0?\.[0-9]+)")
# Columns of the table `rounds` whose mean over the last 10 rounds is no column of `trials`: title, unit, scale, high.
_WINDOWED: dict[str, tuple[str, str, float, bool]] = {
    "macro_f1": ("Macro-F1", "%", 100, True),
    "worst_recall": ("Recall of the worst class", "%", 100, True),
    "tail_recall": ("Recall of the classes with the fewest rows", "%", 100, True),
    "loss": ("Loss", "nats", 1, False),
    "ece": ("Expected calibration error", "%", 100, False),
    "own_label_worst_decile": ("Own-label accuracy of the worst tenth of the clients", "%", 100, True),
    "own_label_std": ("Own-label accuracy, standard deviation over clients", "%", 100, False),
    "validation_balanced_accuracy": ("Balanced accuracy on validation rows", "%", 100, True),
    "validation_loss": ("Loss on validation rows", "nats", 1, False),
}


@dataclass(frozen=True)
class Metric:
    """How a value is shown: times `scale`, in `unit`."""

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
    "validation_accuracy_last10": Metric("Accuracy on validation rows, mean over the last 10 rounds", "%", 100),
    "up_bytes": Metric("Traffic up, all rounds", "MB", 1e-6, by_role=False, high=False),
    "down_bytes": Metric("Traffic down, all rounds", "MB", 1e-6, by_role=False, high=False),
    "steps": Metric("Local steps, all rounds", "steps", by_role=False, high=False, digits=0),
    "server_steps": Metric("Server steps, all rounds", "steps", by_role=False, high=False, digits=0),
    "seconds": Metric("Wall-clock time", "s", by_role=False, high=False, digits=1),
}


def roles(row: Row) -> list[str]:
    """The model roles that a trial was evaluated in; none if it failed before the first evaluation."""
    return [name.removesuffix(MARK) for name, value in row.items() if name.endswith(MARK) and value is not None]


def present(trials: Sequence[Row]) -> list[str]:
    """The metrics that some trial's row has, targets included, in the order of METRICS."""
    found = {name for row in trials for name, value in row.items() if value is not None}
    suffixes = {name.removeprefix(f"{role}_") for row in trials for role in roles(row) for name in found}
    targets = sorted(name for name in suffixes if _TARGET.fullmatch(name))
    return [metric for metric, how in METRICS.items() if metric in (suffixes if how.by_role else found)] + targets


def describe(metric: str, trials: Sequence[Row] = ()) -> Metric:
    """How a metric is shown. Raises Refused for one that there is not, naming those that the trials have."""
    if metric in METRICS:
        return METRICS[metric]
    if target := _TARGET.fullmatch(metric):
        what, unit, scale = {
            "rounds": ("Rounds", "rounds", 1.0),
            "bytes": ("Traffic up and down", "MB", 1e-6),
            "seconds": ("Wall-clock time", "s", 1.0),
        }[target[1]]
        title = f"{what} until accuracy {float(target[2]):g}"
        return Metric(title, unit, scale, high=False, digits=1, absent="not reached")
    column = metric.removesuffix("_last10")
    if column in _WINDOWED and column != metric:
        title, unit, scale, high = _WINDOWED[column]
        return Metric(f"{title}, mean over the last {WINDOW} rounds", unit, scale, high=high)
    more = [f"{what}_to_0.7" for what in ("rounds", "bytes", "seconds")] + [f"{name}_last10" for name in _WINDOWED]
    raise unknown("metric", metric, [*(present(trials) or METRICS), *more])


def wants_rounds(metric: str, trials: Sequence[Row]) -> bool:
    """Whether the rows of `trials` do not tell, so that the table `rounds` has to be read."""
    return describe(metric, trials).by_role and metric not in METRICS and metric not in present(trials)


def values(metric: str, trials: Sequence[Row], rounds: Sequence[Row] = ()) -> dict[tuple[str, str], float | None]:
    """(trial id, role) -> the metric's value in its unit; None where it was not measured or not reached.

    A metric of the whole trial has the role "". rounds: needed where `wants_rounds`.
    """
    how = describe(metric, trials)
    found: dict[tuple[str, str], float | None] = {}
    by_trial: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rounds if wants_rounds(metric, trials) else ():
        by_trial[str(row["trial_id"])].append(row)
    for row in trials:
        name = str(row["trial_id"])
        for role in roles(row) if how.by_role else [""]:
            column = f"{role}_{metric}" if role else metric
            value = row.get(column) if not by_trial else _from_rounds(metric, role, by_trial[name])
            found[name, role] = None if value is None or value != value else float(value) * how.scale
    return found


def _from_rounds(metric: str, role: str, rounds: Sequence[Row]) -> float | None:
    """As `record.headline` has it, for what is no column of `trials`."""
    target = _TARGET.fullmatch(metric)
    column = "accuracy" if target else metric.removesuffix("_last10")
    own = [row for row in rounds if row["role"] == role and row.get(column) is not None]
    curve = sorted((int(row["round"]), float(row[column])) for row in own)
    if not target:
        return fmean(value for at, value in curve if at > curve[-1][0] - WINDOW) if curve else None
    hit = next((at for at, value in curve if value >= float(target[2])), None)
    if hit is None or target[1] == "rounds":
        return None if hit is None else hit + 1
    columns = ("up_bytes", "down_bytes") if target[1] == "bytes" else ("seconds",)
    return sum(_number(row, column) for row in rounds if int(row["round"]) <= hit for column in columns)


def _number(row: Mapping[str, float | None], column: str) -> float:
    return float(row.get(column) or 0)
