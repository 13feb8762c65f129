"""Where a trial stands on a leaderboard: which row, which column. From its config, never from its results."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from harness.record import Row, flatten

AVERAGED = ("method", "seed", "cohort")  # config keys that make no setting
# Settings that came later and count only where they are set: rows from before lack them.
LATER = {
    "schedule": [],
    "faults.nonfinite": "fail",
    "faults.client": "fail",
    "faults.empty_rounds": 10,
    "together": 1,
    "precision": "float32",
}
SEARCHED = "searched"  # stands for a value that a search has found


class Place(NamedTuple):
    """Where a trial stands on a leaderboard: its row (less the model role) and its column."""

    entry: str  # the method, with those of its hyper-parameters that vary within it
    setting: str  # the values of the other config keys that vary


class _Trial(NamedTuple):
    method: str
    config: Mapping[str, Any]  # flat, less what a search has found for it
    found: frozenset[str]  # the keys of that


def grouped(trials: Sequence[Row]) -> dict[str, Place]:
    """The place of each trial by its id, ordered by setting.

    Seeds are what is averaged over, and the cohort follows from the participation: neither makes a setting. Nor does
    what a search has found: it belongs to the method, whose row is then called "searched". Where no key varies the
    setting is called by the dataset.
    """
    known = {str(row["trial_id"]): _read(row) for row in trials}
    by_method: defaultdict[str, list[_Trial]] = defaultdict(list)
    for trial in known.values():
        by_method[trial.method].append(trial)
    tuned = {method: _varying(same, _own) for method, same in by_method.items()}
    varied = _varying(known.values(), lambda key: key not in AVERAGED and not _own(key))
    places = {}
    for row in sorted(trials, key=lambda row: [_rank(known[str(row["trial_id"])].config.get(key)) for key in varied]):
        trial = known[str(row["trial_id"])]
        setting = ", ".join(_spell(trial, varied)) or str(row["dataset"])
        words = [trial.method, *_spell(trial, [key for key in tuned[trial.method] if key not in trial.found])]
        places[str(row["trial_id"])] = Place(" ".join(words + [SEARCHED] * bool(trial.found)), setting)
    return places


def competing(trials: Sequence[Row]) -> list[Row]:
    """The rows that have a place on a leaderboard: in a search settings were only tried out."""
    return [row for row in trials if row.get("stage") != "search"]


def config_of(row: Row) -> dict[str, Any]:
    """A trial's config with dotted keys: {"local.lr": 0.1, ...}. A method's file counts by the start of its hash."""
    config = {**LATER, **flatten(json.loads(row["config"] or "{}"))}
    if source := config.get("source"):
        config["source"] = str(source)[:8]
    return config


def _read(row: Row) -> _Trial:
    config, found = config_of(row), set[str]()
    for value in json.loads(row.get("search") or "{}").values():
        if isinstance(value, Mapping):  # the drawn settings, by full key; the rest says which draw it was
            found |= set(value)
    if found:
        found.add("schedule")  # a population's settings change on the way
    kept = {key: value for key, value in config.items() if key not in found}
    return _Trial(str(row["method"]), kept, frozenset(found))


def _own(key: str) -> bool:
    """Whether a config key is a method's own matter: then it makes a row, not a column."""
    return key.startswith("hyper.") or key == "source"


def _varying(trials: Collection[_Trial], wanted: Callable[[str], bool]) -> list[str]:
    """The wanted keys with several values, or that only some have; less those that a search has found everywhere."""
    values: defaultdict[str, list[str]] = defaultdict(list)
    for trial in trials:
        for key in filter(wanted, trial.config):
            values[key].append(repr(trial.config[key]))
    there = {key: sum(key not in trial.found for trial in trials) for key in values}
    return [key for key, seen in values.items() if len(set(seen)) > 1 or len(seen) < there[key]]


def _spell(trial: _Trial, keys: Sequence[str]) -> list[str]:
    """`key=value`, with the last part of a dotted key, or all of it where two keys end alike."""
    ends = [key.rsplit(".", 1)[-1] for key in keys]
    names = [end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)]
    values = [SEARCHED if key in trial.found else trial.config.get(key) for key in keys]
    texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
    return [f"{name}={text}" for name, text in zip(names, texts, strict=True)]


def _rank(value: object) -> tuple[bool, float, str]:
    """Numbers in their order, then everything else by its text."""
    return (False, float(value), "") if isinstance(value, int | float) else (True, 0.0, str(value))
