"""How a page arranges the trials of a folder: entries, settings, and the groups of seeds that are averaged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.places import AVERAGED, SEARCHED, Place, config_of, grouped
from harness.record import Row
from harness.series import Floats, Seen, summary

# What statistics read of a row, beside its config and its metrics.
ORIGIN = (
    *("trial_id", "status", "reason", "seed", "method", "dataset", "stage", "search", "partition_hash"),
    *("steps", "server_steps", "rules_version", "started", "commit", "clean", "drift", "device"),
)


@dataclass(frozen=True)
class Group:
    """The trials of one entry at one setting, as numbers of the arrangement, and one model role of theirs."""

    entry: int
    setting: int
    role: str
    trials: tuple[int, ...]


@dataclass(frozen=True)
class Arrangement:
    """trials: by setting, entry and seed, those of searches at the end; models: what was seen of each.

    entries, settings: name and the keys that vary. at: entry and setting of each trial, -1 for a search's.
    """

    trials: list[Row]
    models: list[list[Seen]]
    entries: list[dict[str, Any]]
    settings: list[dict[str, Any]]
    at: list[tuple[int, int]]
    groups: list[Group]

    def head(self) -> dict[str, Any]:
        """What the page needs of it at once."""
        keys = dict.fromkeys(key for place in (*self.settings, *self.entries) for key in place["keys"])
        return {
            "entries": self.entries,
            "settings": self.settings,
            "places": [list(pair) for pair in self.at],
            "groups": {
                "entry": [group.entry for group in self.groups],
                "setting": [group.setting for group in self.groups],
                "role": [group.role for group in self.groups],
                "trials": [list(group.trials) for group in self.groups],
            },
            "axes": [key for key in keys if self._is_axis(key)],
        }

    def _is_axis(self, key: str) -> bool:
        """Whether something can be drawn over it: two numbers or more."""
        values = (place["keys"].get(key) for place in (*self.settings, *self.entries))
        return len({x for x in values if isinstance(x, int | float) and not isinstance(x, bool)}) > 1

    def measured(self, kind: str, metric: str) -> Iterator[bool]:
        """Whether each model of a kind (any: of all kinds) has a metric."""
        return (
            metric in model.values for own in self.models for model in own if kind in ("any", kind_of(model.role))
        )

    def targets(self) -> list[str]:
        """The columns of targets, without the role."""
        names = dict.fromkeys(name for row in self.trials for name in row if "_to_" in name)
        roles = {model.role for own in self.models for model in own}
        ends = {name.removeprefix(f"{role}_") for name in names for role in roles}
        return sorted(end for end in ends if end.startswith(("rounds_to_", "bytes_to_")))

    def values(self, trial: int, role: str, metric: str, high: bool) -> dict[str, float]:
        """The summaries of a metric; empty for a trial that is not done."""
        row = self.trials[trial]
        if row["status"] != "done":
            return {}
        if "_to_" in metric:
            value = row.get(f"{role}_{metric}")
            return {} if value is None else {"": float(value)}
        model = next((one for one in self.models[trial] if one.role == role), None)
        return summary(model, metric, high) if model else {}

    def plain_rows(self) -> list[dict[str, Any]]:
        """The rows as `statistics` wants them, those of searches left out, with the headline columns.

        Of the configs only what tells places apart is left: they are read again for every metric.
        """
        found = []
        for row, (entry, setting) in zip(self.trials, self.at, strict=True):
            if entry < 0:
                continue
            keys = {**self.settings[setting]["keys"], **self.entries[entry]["keys"]}
            kept = {name: row.get(name) for name in ORIGIN}
            kept |= {name: value for name, value in row.items() if "_accuracy_" in name or "_to_" in name}
            found.append({**kept, "config": json.dumps(keys)})
        return found

    def roles(self, trial: int) -> list[str]:
        """Of the models of a trial."""
        return [model.role for model in self.models[trial]]

    def recalls(self, group: int) -> list[Floats | None]:
        """Of the finished trials of a group."""
        own = self.groups[group]
        return [
            model.recall
            for at in own.trials
            for model in self.models[at]
            if model.role == own.role and self.trials[at]["status"] == "done"
        ]

    def done(self, group: int) -> list[Row]:
        """The finished trials of a group."""
        rows = (self.trials[at] for at in self.groups[group].trials)
        return [row for row in rows if row["status"] == "done"]

    def by_setting(self) -> list[list[Row]]:
        """The trials of each setting."""
        found: list[list[Row]] = [[] for _ in self.settings]
        for row, (_, setting) in zip(self.trials, self.at, strict=True):
            if setting >= 0:
                found[setting].append(row)
        return found


def kind_of(role: str) -> str:
    """What a model is measured on: the global test set, a domain of it, or its own client's rows."""
    if "@" in role:
        return "domain"
    return "personal" if role == "personal" or role.startswith("personal-") else "global"


def arrange(trials: Sequence[Row], seen: Mapping[str, list[Seen]]) -> Arrangement:
    """The arrangement of a folder's trials. Those of a search (stage "search") have no place on the leaderboard."""
    ranked = [row for row in trials if row.get("stage") != "search"]
    places = grouped(ranked)
    setting_number = _numbers(place.setting for place in places.values())
    entry_number = _numbers(sorted({place.entry for place in places.values()}))

    def place_of(row: Row) -> tuple[int, int]:
        place = places[row["trial_id"]]
        return entry_number[place.entry], setting_number[place.setting]

    own = sorted(ranked, key=lambda row: (*reversed(place_of(row)), int(row["seed"])))
    searched = [row for row in trials if row.get("stage") == "search"]
    models = [seen.get(row["trial_id"], []) for row in (*own, *searched)]
    at = [place_of(row) for row in own]
    members: dict[tuple[int, int], list[int]] = {}
    for number, place in enumerate(at):
        members.setdefault(place, []).append(number)
    return Arrangement(
        trials=[*own, *searched],
        models=models,
        **_described(own, places),
        at=[*at, *[(-1, -1)] * len(searched)],
        groups=[
            group for place, numbers in members.items() for group in _groups(place, _newest(numbers, own), models)
        ],
    )


def _numbers(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def _newest(numbers: Sequence[int], rows: Sequence[Row]) -> list[int]:
    """One trial per seed: that of the newest rules, then the one started last, as on the leaderboard."""
    age = sorted(numbers, key=lambda at: (rows[at].get("rules_version") or 0, rows[at].get("started") or ""))
    return sorted({int(rows[at]["seed"]): at for at in age}.values())


def _groups(place: tuple[int, int], numbers: Sequence[int], models: Sequence[Sequence[Seen]]) -> list[Group]:
    """One for each model role; a place whose trials all failed early has one without a role."""
    roles = dict.fromkeys(model.role for number in numbers for model in models[number])
    return [Group(*place, role, tuple(numbers)) for role in (roles or [""])]


def _described(rows: Sequence[Row], places: Mapping[str, Place]) -> dict[str, list[dict[str, Any]]]:
    """The entries by name, the settings in their order; each with the config keys that tell it apart."""
    config = {row["trial_id"]: _searched_out(row) for row in rows}
    settings = {places[row["trial_id"]].setting: row for row in reversed(rows)}
    entries = {places[row["trial_id"]].entry: row for row in reversed(rows)}
    varied = _varied([config[row["trial_id"]] for row in settings.values()], own=False)
    by_method = {
        method: _varied([config[row["trial_id"]] for row in entries.values() if row["method"] == method], own=True)
        for method in {row["method"] for row in entries.values()}
    }

    def keys(row: Row, wanted: Sequence[str]) -> dict[str, Any]:
        return {key: config[row["trial_id"]].get(key) for key in wanted}

    return {
        "entries": [
            {"name": name, "method": row["method"], "keys": keys(row, by_method[row["method"]])}
            for name, row in sorted(entries.items())
        ],
        "settings": [
            {"name": name, "dataset": settings[name]["dataset"], "keys": keys(settings[name], varied)}
            for name in dict.fromkeys(place.setting for place in places.values())
        ],
    }


def _searched_out(row: Row) -> dict[str, Any]:
    """A trial's config with dotted keys, without what a search has found for it."""
    told = json.loads(row.get("search") or "{}").values()
    found = {key for value in told if isinstance(value, Mapping) for key in value}
    found |= {"schedule"} if found else set()
    return {key: SEARCHED if key in found else value for key, value in config_of(row).items()}


def _varied(configs: Sequence[Mapping[str, Any]], own: bool) -> list[str]:
    """The keys that differ between configs: a method's own, or all others that make a setting."""
    keys = dict.fromkeys(key for config in configs for key in config if key not in AVERAGED)
    wanted = [key for key in keys if (key.startswith("hyper.") or key == "source") == own]
    return [key for key in wanted if len({json.dumps(config.get(key)) for config in configs} - _FOUND) > 1]


_FOUND = {json.dumps(SEARCHED)}
