"""From settings to trials: the cells of a grid, and what is refused about them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any, Protocol

from harness import config, registry
from harness.config import Partition, Trial
from harness.overrides import Setting, Target
from harness.refusal import Refused
from harness.settings import Unfit
from harness.space import Dimension

MOST_CELLS = 100_000
Ranges = Mapping[tuple[str, str], Dimension]


class Placed(Protocol):
    """What was written somewhere."""

    @property
    def source(self) -> str:
        """Where."""


@dataclass(frozen=True)
class Plan:
    """A sweep before its cells are built.

    settings: full key -> values, in the order they were written. ranges: (a method's label, or "" for all; full key)
    -> what a search draws from. named: the keys of the card's grid: they name a group even with one value each, so
    that a search of one grid point is a part of the search of all.
    """

    methods: Setting
    seeds: Setting
    settings: Mapping[str, Setting]
    known: Mapping[str, Target]
    ranges: Ranges = field(default_factory=dict)
    named: frozenset[str] = frozenset()

    def scope(self, name: str) -> dict[str, Setting]:
        """The settings of a scope: "trial", "execution", "search"."""
        return {key: s for key, s in self.settings.items() if self.known[key].scope == name}

    def own(self, method: str) -> dict[str, Setting]:
        """A method's hyper-parameters."""
        return {key: s for key, s in self.settings.items() if self.known[key].method == method}

    def dimensions(self, method: str) -> dict[str, Dimension]:
        """What is searched for with a method, by key in a trial. A method's own range goes before that of all."""
        label, found = registry.label(method), {}
        for (owner, key), one in self.ranges.items():
            if owner == label or (owner == "" and (label, key) not in self.ranges):
                found[key if self.known[key].scope == "trial" else f"hyper.{self.known[key].path[0]}"] = one
        return found

    def places(self, method: str) -> dict[str, Placed]:
        """Where a method's settings were written, by key; a range's place counts before that of what it replaces."""
        dimensions = self.dimensions(method)
        return {**dimensions, **self.scope("trial"), **self.own(method), "seed": self.seeds, **dimensions}


def cells(plan: Plan) -> Iterator[Trial]:
    """Every trial that is known ahead, settings first, then seeds, then methods: a sweep that is stopped has whole
    comparisons. Methods that something is searched for with have none.
    """
    check_size(plan)
    methods = [method for method in plan.methods.values if not plan.dimensions(method)]
    for chosen in choices(plan.scope("trial")):
        for seed, method in product(plan.seeds.values, methods):
            for hypers in choices(plan.own(method)):
                yield resolved(plan, method, {**chosen, **hypers}, seed)


def check_size(plan: Plan, more: int = 0) -> None:
    """Refuses a sweep without cells or with too many. more: trials of a grid point beside those of the seeds."""
    if not plan.methods.values or not plan.seeds.values:
        raise Refused(f"{(plan.seeds if plan.methods.values else plan.methods).source}: at least one is needed")
    variants = sum(prod(len(s.values) for s in plan.own(method).values()) for method in plan.methods.values)
    points = prod(len(s.values) for s in plan.scope("trial").values()) * variants
    if points * (len(plan.seeds.values) + more) > MOST_CELLS:
        what = "seeds, methods, axes and search.trials" if more else "seeds, methods and axes"
        raise Refused(f"{what} make more than {MOST_CELLS} trials, the most of a sweep: split it")


def choices(settings: Mapping[str, Setting]) -> Iterator[dict[str, Any]]:
    """One value of each setting, in every combination."""
    for values in product(*(s.values for s in settings.values())):
        yield dict(zip(settings, values, strict=True))


def resolved(
    plan: Plan, method: str, point: Mapping[str, Any], seed: Any, drawn: Mapping[str, Any] | None = None
) -> Trial:
    """The trial of a grid point. drawn: settings by key in a trial. Raises Refused, saying where."""
    raw: dict[str, Any] = {"method": method, "seed": seed, "hyper": {}}
    paths = [(plan.known[key].path, value) for key, value in point.items() if plan.known[key].scope == "trial"]
    paths += [(("hyper", *plan.known[key].path), v) for key, v in point.items() if plan.known[key].scope == "hyper"]
    for (*table, name), value in [*paths, *((key.split("."), value) for key, value in (drawn or {}).items())]:
        (raw.setdefault(table[0], {}) if table else raw)[name] = value  # no setting lies deeper than that
    try:
        return config.resolve(raw)
    except Unfit as error:
        raise located(error, plan.places(method)) from error


def located(error: Unfit, places: Mapping[str, Placed]) -> Refused:
    """The refusal with the place where the key was set. Without a key of its own (a method's check): by its words."""
    inside = [key for key in places if key.startswith(f"{error.key}.")]
    if inside and error.key != "hyper":
        named = [key for key in inside if re.search(rf"\b{re.escape(key)}\b", str(error))]
        sources = [places[key].source for key in named or inside]
    elif error.key == "hyper" or error.key.startswith("hyper."):
        words = [error.key.removeprefix("hyper.")] if "." in error.key else re.findall(r"\w+", str(error))
        sources = [s.source for key, s in places.items() if key.rpartition(".")[2] in words]
    else:
        sources = [places[error.key].source] if error.key in places else []
    return Refused(": ".join((*sources[:1], str(error))))


def refuse_unread(settings: Mapping[str, Setting], cells: Sequence[Trial]) -> None:
    """A partition field that is set although no cell's kind reads it is a mistake, not a setting."""
    for key, setting in settings.items():
        table, _, name = key.partition(".")
        if table == "partition" and all(name in cell.partition.unread() for cell in cells):
            kinds = ", ".join(sorted({cell.partition.kind for cell in cells}))
            readers = Partition.READ_BY.get(name, ("any kind, with partition.shift=rotation or noise",))
            raise Refused(
                f"{setting.source}: {key} changes nothing with {kinds}; read by {', '.join(sorted(readers))}"
            )


def axes_of(plan: Plan, cells: Sequence[Trial]) -> tuple[str, ...]:
    """The keys with several values that differ in the cells after all is resolved."""

    def differs(key: str) -> bool:
        target, seen = plan.known[key], set()
        for cell in cells:
            settings = cell.model_dump(mode="json")
            if target.scope == "hyper":
                if registry.label(cell.method) != registry.label(target.method):
                    continue
                settings = settings["hyper"]
            for part in target.path:
                settings = settings[part]
            seen.add(json.dumps(settings))
        return len(seen) > 1

    return tuple(key for key, s in plan.settings.items() if len(s.values) > 1 and differs(key))
