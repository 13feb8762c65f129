"""Sweeps: a card and overrides -> the trials to run. What is set last wins: default, base, grid, override."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from harness import cards, config, overrides, registry
from harness.config import Execution, Partition, Trial
from harness.overrides import Setting, Target
from harness.refusal import Refused, unknown
from harness.settings import Unfit, check

MOST_CELLS = 100_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TABLES = ("name", "title", "methods", "seeds", "base", "hyper", "grid", "execution")
# Each of these follows from the other, so setting one takes back what an earlier layer said of the other.
_EXCLUSIVE = {"cohort": "participation", "participation": "cohort"}


@dataclass(frozen=True)
class Sweep:
    """Trials that belong together. axes: the keys that vary between them, beside method and seed."""

    name: str
    title: str
    cells: tuple[Trial, ...]
    axes: tuple[str, ...]
    execution: Execution


@dataclass(frozen=True)
class _Plan:
    """A sweep before its cells are built. settings: full key -> values, in the order they were written."""

    methods: Setting
    seeds: Setting
    settings: Mapping[str, Setting]
    known: Mapping[str, Target]


def load_sweep(card: str | Path, texts: Sequence[str] = ()) -> Sweep:
    """The sweep of a shipped card or a .toml file, changed by `key=value` overrides.

    Keys are full ("local.lr", "kdia.lambda_kd") or the last part of exactly one. `methods=` and `seeds=` replace the
    card's lists; `seeds=3` means 0, 1, 2 as in a card, `seed=3` the one seed 3. Raises Refused, saying where.
    """
    path = cards.find("sweeps", card)
    raw = cards.read("sweeps", card)
    for key in raw:
        if key not in _TABLES:
            raise Refused(f"{cards.place(path, key)}: {unknown('key', key, _TABLES)}")
    given, methods, seeds = _lists(overrides.parse(texts))
    listed = Setting("methods", tuple(_as_list(raw.get("methods", []))), cards.place(path, "methods"))
    counted = Setting("seeds", _seeds(raw.get("seeds", [0])), cards.place(path, "seeds"))
    name = checked_name(raw.get("name", path.stem), cards.place(path, "name"))
    title = raw.get("title", "")
    if not isinstance(title, str):
        raise Refused(f"{cards.place(path, 'title')}: title must be plain text, got {title!r:.80}")
    if not listed.values and methods is None:
        raise Refused(f"{path.name}: no methods; write methods = [...] with some of {', '.join(registry.names())}")
    _check_methods(listed)
    settings = _card_settings(raw, path, overrides.targets(listed.values))
    return _build(name, title, methods or listed, seeds or counted, settings, given)


def run_sweep(method: str, texts: Sequence[str] = ()) -> Sweep:
    """The sweep "run-<method>" of one method: one cell, or more where overrides have commas. Raises Refused."""
    given, methods, seeds = _lists(overrides.parse(texts))
    if methods is not None:
        raise Refused(f"{methods.source}: the method is {method!r} already; a sweep card compares several")
    chosen = Setting("methods", (method,), f"method {method!r}"[:80])
    _check_methods(chosen)
    name = checked_name(f"run-{registry.label(method)}", chosen.source)
    return _build(name, "", chosen, seeds or Setting("seeds", (0,), "default"), {}, given)


def resolve_setting(texts: Sequence[str] = ()) -> Trial:
    """The one trial of some overrides, with fedavg as the method: what a partition preview needs. Raises Refused."""
    sweep = run_sweep("fedavg", texts)
    if len(sweep.cells) > 1:
        raise Refused(f"one setting is wanted, but these overrides make {len(sweep.cells)}: give each key one value")
    return sweep.cells[0]


def checked_name(name: object, source: str) -> str:
    """A sweep's name, which becomes a folder's. Raises Refused for anything that could lead out of the results."""
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    rule = "1 to 64 ASCII letters, digits, '.', '_' or '-', the first a letter or digit"
    raise Refused(f"{source}: name must be {rule}, got {name!r:.80}")


def _lists(given: Sequence[Setting]) -> tuple[list[Setting], Setting | None, Setting | None]:
    """Overrides without the two lists; the methods; the seeds. Raises Refused where a list is given twice."""
    found: dict[str, Setting] = {}
    rest: list[Setting] = []
    for setting in given:
        kind = {"method": "methods", "seed": "seeds"}.get(setting.key, setting.key)
        if kind not in ("methods", "seeds"):
            rest.append(setting)
            continue
        if kind in found:
            raise Refused(f"{setting.source}: {kind} are set twice, first by {found[kind].source}")
        one = setting.values[0] if len(setting.values) == 1 else list(setting.values)
        values = tuple(_as_list(one)) if setting.key != "seeds" else _seeds(one)
        found[kind] = Setting(kind, values, setting.source)
    if "methods" in found:
        _check_methods(found["methods"])
    return rest, found.get("methods"), found.get("seeds")


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _seeds(value: object) -> tuple[Any, ...]:
    """A list of seeds, or 0..n-1 for a number n. Anything else is left for the trial's own check."""
    if isinstance(value, int) and not isinstance(value, bool):
        return tuple(range(min(value, MOST_CELLS + 1))) if value > 0 else ()
    return tuple(_as_list(value))


def _check_methods(methods: Setting) -> None:
    labels: dict[str, str] = {}
    for method in methods.values:
        if not isinstance(method, str):
            raise Refused(f"{methods.source}: a method is a name or a path, got {method!r:.80}")
        try:
            registry.load(method)
        except (Refused, OSError) as error:
            raise Refused(f"{methods.source}: {error}") from error
        if labels.setdefault(registry.label(method), method) != method:
            raise Refused(f"{methods.source}: two methods are called {registry.label(method)!r}")


def _card_settings(raw: Mapping[str, Any], path: Path, known: Mapping[str, Target]) -> dict[str, Setting]:
    """The settings of a card's tables under their full keys."""
    settings: dict[str, Setting] = {}

    def add(table: str, name: str, key: str, values: tuple[Any, ...], scopes: tuple[str, ...]) -> None:
        source = cards.place(path, f"{table}.{name}")
        if name.partition(".")[0] in ("method", "methods", "seed", "seeds"):
            raise Refused(f"{source}: write methods = [...] and seeds = [...] at the top of the card")
        if key not in known or known[key].scope not in scopes:
            fit = [k for k, target in known.items() if target.scope in scopes]
            raise Refused(f"{source}: {overrides.why_unknown(key, {k: known[k] for k in fit})}")
        if key in settings:
            raise Refused(f"{source}: {key} is set already at {settings[key].source}")
        settings[key] = Setting(key, values, source)

    for name, value in overrides.flatten(raw.get("base", {}), f"{path.name}: [base]").items():
        add("base", name, name, (value,), ("trial",))
    for name, value in overrides.flatten(raw.get("hyper", {}), f"{path.name}: [hyper]").items():
        key = f"hyper.{name}" if f"hyper.{name}" in known else name
        add("hyper", name, key, (value,), ("hyper",))
    for name, value in overrides.flatten(raw.get("grid", {}), f"{path.name}: [grid]").items():
        if not isinstance(value, list) or not value:
            raise Refused(f"{cards.place(path, f'grid.{name}')}: an axis is a list of values, got {value!r:.80}")
        add("grid", name, name, tuple(value), ("trial", "hyper"))
    for name, value in overrides.flatten(raw.get("execution", {}), f"{path.name}: [execution]").items():
        add("execution", name, f"execution.{name}", (value,), ("execution",))
    return settings


def _build(
    name: str, title: str, methods: Setting, seeds: Setting, settings: dict[str, Setting], given: list[Setting]
) -> Sweep:
    known = overrides.targets(methods.values)
    settings = {key: s for key, s in settings.items() if key in known}  # those of methods that are not run fall away
    own: dict[str, Setting] = {}
    for setting in (overrides.match(g, known) for g in given):
        if setting.key in own:
            raise Refused(f"{setting.source}: {setting.key} is set twice, first by {own[setting.key].source}")
        own[setting.key] = setting
    for key in own:
        settings.pop(_EXCLUSIVE.get(key, ""), None)
    plan = _Plan(methods, seeds, {**settings, **own}, known)
    execution = _execution(plan)
    cells = tuple({config.digest(cell): cell for cell in _cells(plan)}.values())
    # A card may set what only some kinds read and be run with another kind; then only the overrides must count.
    _refuse_unread(own if own.keys() & {"partition.kind", "partition.shift"} else plan.settings, cells)
    return Sweep(name, title, cells, _axes(plan, cells), execution)


def _execution(plan: _Plan) -> Execution:
    chosen = {key: s for key, s in plan.settings.items() if plan.known[key].scope == "execution"}
    try:
        return check(Execution, {plan.known[key].path[0]: s.one for key, s in chosen.items()}, "execution.")
    except Unfit as error:
        raise _located(error, chosen) from error


def _cells(plan: _Plan) -> Iterator[Trial]:
    """Every trial, settings first, then seeds, then methods: a sweep that is stopped has whole comparisons."""
    common = {key: s for key, s in plan.settings.items() if plan.known[key].scope == "trial"}
    own = {
        method: {key: s for key, s in plan.settings.items() if plan.known[key].method == method}
        for method in plan.methods.values
    }
    if not plan.methods.values or not plan.seeds.values:
        raise Refused(f"{(plan.seeds if plan.methods.values else plan.methods).source}: at least one is needed")
    variants = sum(prod(len(s.values) for s in settings.values()) for settings in own.values())
    count = prod(len(s.values) for s in common.values()) * len(plan.seeds.values) * variants
    if count > MOST_CELLS:
        raise Refused(f"seeds, methods and axes make more than {MOST_CELLS} trials, the most of a sweep: split it")
    for chosen in product(*(s.values for s in common.values())):
        trial = _nested(plan, dict(zip(common, chosen, strict=True)))
        for seed, method in product(plan.seeds.values, plan.methods.values):
            for hypers in product(*(s.values for s in own[method].values())):
                hyper = {plan.known[key].path[0]: v for key, v in zip(own[method], hypers, strict=True)}
                try:
                    yield config.resolve({**trial, "method": method, "seed": seed, "hyper": hyper})
                except Unfit as error:
                    raise _located(error, {**common, **own[method], "seed": plan.seeds}) from error


def _nested(plan: _Plan, flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"local.lr": 0.1} -> {"local": {"lr": 0.1}}; no setting lies deeper than that."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *table, name = plan.known[key].path
        (nested.setdefault(table[0], {}) if table else nested)[name] = value
    return nested


def _located(error: Unfit, settings: Mapping[str, Setting]) -> Refused:
    """The refusal with the place where the key was set. Without a key of its own (a method's check): by its words."""
    if error.key == "hyper" or error.key.startswith("hyper."):
        words = [error.key.removeprefix("hyper.")] if "." in error.key else re.findall(r"\w+", str(error))
        sources = [s.source for key, s in settings.items() if key.rpartition(".")[2] in words]
    else:
        sources = [settings[error.key].source] if error.key in settings else []
    return Refused(": ".join((*sources[:1], str(error))))


def _refuse_unread(settings: Mapping[str, Setting], cells: Sequence[Trial]) -> None:
    """A partition field that is set although no cell's kind reads it is a mistake, not a setting."""
    for key, setting in settings.items():
        table, _, name = key.partition(".")
        if table == "partition" and all(name in cell.partition.unread() for cell in cells):
            kinds = ", ".join(sorted({cell.partition.kind for cell in cells}))
            readers = Partition.READ_BY.get(name, ("any kind, with partition.shift=rotation or noise",))
            raise Refused(
                f"{setting.source}: {key} changes nothing with {kinds}; read by {', '.join(sorted(readers))}"
            )


def _axes(plan: _Plan, cells: Sequence[Trial]) -> tuple[str, ...]:
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
