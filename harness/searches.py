"""The [search] of a card: its settings, its ranges, and a plan of searches that can be run, judged and repeated."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

from harness import cards, config, overrides, registry
from harness.config import Trial
from harness.overrides import Setting, Target
from harness.plan import Placed, Plan, check_size, choices, located, resolved
from harness.refusal import Refused, unknown
from harness.schedule import LOCAL
from harness.settings import Unfit, check
from harness.space import Dimension, Group, Search, SearchPlan, apply, dimension

MOST_CORNERS = 1024  # combinations of a search's ends that a method is asked about
TARGETS = {f"search.{name}": Target("search", (name,)) for name in Search.model_fields}


def read(
    table: object, path: Path, methods: Sequence[str], known: Mapping[str, Target]
) -> tuple[dict[str, Setting], dict[tuple[str, str], Dimension]]:
    """The settings of a card's [search] by full key, and the ranges of its tables as in `Plan`. Raises Refused."""
    settings: dict[str, Setting] = {}
    ranges: dict[tuple[str, str], Dimension] = {}
    owners = {registry.label(method): method for method in methods}
    if not isinstance(table, dict):
        raise Refused(f"{path.name}: [search] must be a table, got {table!r:.80}")
    for name, value in table.items():
        place = cards.place(path, f"search.{name}")
        if not isinstance(value, dict):
            if name not in Search.model_fields:
                raise Refused(f"{place}: {unknown('key', f'search.{name}', TARGETS)}")
            settings[f"search.{name}"] = Setting(f"search.{name}", (value,), place)
            continue
        if name != "space" and name not in owners:
            if name in registry.names():
                raise Refused(f"{place}: method {name} is not in this sweep, so its ranges set nothing")
            raise Refused(f"{place}: {unknown('table of ranges', f'search.{name}', _tables(owners))}")
        owner = "" if name == "space" else owners[name]
        for key, written in _written(value):
            where = cards.place(path, f"search.{name}.{key}")
            at = _key_of(key, owner, known, where)
            if at in ranges:
                raise Refused(f"{where}: {at[1]} has a range already at {ranges[at].source}")
            ranges[at] = dimension(written, where)
    return settings, ranges


def _tables(owners: Mapping[str, str]) -> list[str]:
    return [f"search.{name}" for name in ("space", *owners)]


def _written(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and what they were given. A table of tables is only another way to write dots."""
    for name, value in table.items():
        if isinstance(value, dict) and value and all(isinstance(inner, dict) for inner in value.values()):
            yield from _written(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _key_of(key: str, method: str, known: Mapping[str, Target], where: str) -> tuple[str, str]:
    """Whose range this is, and its full key. method: whose table it stands in; "" for all."""
    if method and (own := f"{overrides.hyper_prefix(method)}.{key}") in known:
        key = own
    fit = {k: t for k, t in known.items() if _searchable(k, t) and (not method or t.method in ("", method))}
    if key in fit:
        owner = fit[key].method or method
        return registry.label(owner) if owner else "", key
    table = key.partition(".")[0]
    foreign = table in (*registry.names(), "hyper") and table != "local"  # which is a table of settings, too
    if method and foreign:
        raise Refused(f"{where}: {key} is not a setting of method {registry.label(method)}")
    if key in known and known[key].scope == "trial":
        raise Refused(
            f"{where}: {key} is part of the problem, which no search may choose: list its values in [grid]. What can "
            "be searched for: hyper-parameters, local.* and net"
        )
    raise Refused(f"{where}: {overrides.why_unknown(key, fit)}")


def _searchable(key: str, target: Target) -> bool:
    return target.scope == "hyper" or key == "net" or key.startswith("local.")


def planned(plan: Plan, own: Mapping[str, Setting]) -> SearchPlan:
    """The searches of a plan. own: its settings that were overrides. Raises Refused."""
    chosen = plan.scope("search")
    try:
        how = check(Search, {plan.known[key].path[0]: s.one for key, s in chosen.items()}, "search.")
    except Unfit as error:
        raise located(error, chosen) from error
    # A card's options may be for another scheduler than an override's; then only the overrides must count.
    switched = own.keys() & {"search.sampler", "search.scheduler"}
    for name in how.unread():
        if not switched or f"search.{name}" in own:
            now = f"search.scheduler = {how.scheduler}" + ("" if name == "sampler" else f", sampler = {how.sampler}")
            readers = ", ".join(Search.READ_BY[name])
            raise Refused(
                f"{chosen[f'search.{name}'].source}: search.{name} changes nothing with {now}; read by {readers}"
            )
    how = how.canonical()
    groups: dict[tuple[str, str], Group] = {}
    for group in _groups(plan, how):
        groups.setdefault((group.key, config.digest(group.prototype)), group)
    return SearchPlan(how, tuple(groups.values()))


def _groups(plan: Plan, how: Search) -> Iterator[Group]:
    """The searches of a plan, in the order of its cells. Raises Refused for what could not be drawn or compared."""
    check_size(plan, how.trials)
    try:
        for seed in plan.seeds.values:
            check(Trial, {"method": plan.methods.values[0], "seed": seed})
    except Unfit as error:
        raise located(error, {"seed": plan.seeds}) from error
    if how.seed in plan.seeds.values:
        where = plan.settings.get("search.seed", plan.seeds)
        raise Refused(f"{where.source}: search.seed = {how.seed} is one of the seeds: the final runs need fresh ones")
    for chosen in choices(plan.scope("trial")):
        for method in plan.methods.values:
            dimensions = plan.dimensions(method)
            for hypers in choices(plan.own(method)):
                point = {**chosen, **hypers}
                first = resolved(plan, method, point, how.seed, {k: d.values[0] for k, d in dimensions.items()})
                key = _key(plan, method, first)
                group = Group(key, first, dimensions, tuple(dict.fromkeys(plan.seeds.values)))
                _check_group(plan, plan.places(method), group, how)
                yield group


def _key(plan: Plan, method: str, trial: Trial) -> str:
    """A group's name: its method, and the settings of the grid as they were resolved."""
    words, whole = [registry.label(method)], trial.model_dump(mode="json")
    for key, setting in {**plan.scope("trial"), **plan.own(method)}.items():
        target = plan.known[key]
        if key in plan.named or len(setting.values) > 1:
            value = whole["hyper"] if target.scope == "hyper" else whole
            for part in target.path:
                value = value[part]
            name = target.path[-1] if target.scope == "hyper" else key
            words.append(f"{name}={value if isinstance(value, str) else json.dumps(value)}")
    return " ".join(words)


def _check_group(plan: Plan, places: Mapping[str, Placed], group: Group, how: Search) -> None:
    """Whether the search of a group can be run, judged and repeated. Raises Refused."""
    trial, own = group.prototype, group.dimensions
    if not own:
        return
    where = next(iter(own.values())).source
    if not trial.holdout.validation:
        raise Refused(f"{where}: a search chooses by validation rows: set holdout.validation = 0.1 in [base]")
    if how.scheduler == "pbt":
        _check_population(group, how, where)
    step = {"asha": "grace", "median": "grace", "pbt": "interval"}.get(how.scheduler, "")
    if step and not trial.evaluation.every <= getattr(how, step) < trial.rounds:
        place = plan.settings[f"search.{step}"].source if f"search.{step}" in plan.settings else where
        raise Refused(
            f"{place}: search.{step} = {getattr(how, step)} rounds must be less than the trial's {trial.rounds} and "
            f"no less than evaluation.every = {trial.evaluation.every}, or {how.scheduler} has nothing to decide"
        )
    if len(_check_ends(group, places)) > 1 and how.scheduler == "pbt":
        label = registry.label(trial.method)
        raise Refused(f"{where}: pbt can't change what method {label} needs, which differs over these ranges")


def _check_population(group: Group, how: Search, where: str) -> None:
    if how.trials < 2:
        raise Refused(f"{where}: search.scheduler = pbt needs a population: set search.trials to 2 or more")
    if group.prototype.schedule:
        raise Refused(f"{where}: search.scheduler = pbt writes the schedule of its trials: leave schedule empty")
    for key, one in group.dimensions.items():
        if not one.numeric or not (key.startswith("hyper.") or key.removeprefix("local.") in LOCAL):
            able = f"numbers among hyper-parameters and local.{', local.'.join(LOCAL)}"
            raise Refused(f"{one.source}: search.scheduler = pbt changes settings on the way, which only {able} can")


def _check_ends(group: Group, places: Mapping[str, Placed]) -> set[frozenset[str]]:
    """Every end of a range and every choice must be a setting of the method; together, too, as far as it says.

    Returns what the method needs, with any of them.
    """
    own, trial, needs = group.dimensions, group.prototype, set()
    try:
        for at in range(max(len(one.values) for one in own.values())):
            apply(trial, {key: one.values[min(at, len(one.values) - 1)] for key, one in own.items()}, trial.seed)
        inner = {key.removeprefix("hyper."): one.values for key, one in own.items() if key.startswith("hyper.")}
        for corner in islice(product(*inner.values()), MOST_CORNERS):
            values = trial.hyper | dict(zip(inner, corner, strict=True))
            made = registry.make(trial.method, {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
            needs.add(made.needs)
    except Unfit as error:
        raise located(error, places) from error
    except Refused as error:
        raise located(Unfit("hyper", f"method {registry.label(trial.method)}: {error}"), places) from error
    return needs
