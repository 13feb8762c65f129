"""Sweeps: a card and overrides -> the trials to run. What is set last wins: default, base, grid, override."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness import cards, config, overrides, published, registry, searches
from harness.config import Execution, Trial
from harness.overrides import Setting, Target
from harness.plan import MOST_CELLS, Plan, Ranges, axes_of, located, refuse_unread
from harness.plan import cells as plan_cells
from harness.refusal import Refused, unknown
from harness.settings import Unfit, check
from harness.space import SearchPlan

_NAME = re.compile(r"(?=.{1,64}$)[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?")
_RULE = "1 to 64 ASCII letters, digits, '.', '_' or '-', the first a letter or digit, the last no dot"
# What a system keeps for its devices, whatever follows a dot; and what lies in results/ beside the sweeps.
_RESERVED = re.compile(r"(?i)(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?|published|leaderboards")
_TABLES = ("name", "title", "methods", "seeds", "base", "hyper", "grid", "search", "execution", "published")
# Each of these follows from the other, so setting one takes back what an earlier layer said of the other.
_EXCLUSIVE = {"cohort": "participation", "participation": "cohort"}


@dataclass(frozen=True)
class Sweep:
    """Trials that belong together. axes: the keys that vary between them, beside method and seed.

    search: what is searched for, if anything is; `cells` are then those of methods that nothing is searched for with.
    published: whose numbers it is meant to reproduce, a name of `published.names()`; or empty.
    """

    name: str
    title: str
    cells: tuple[Trial, ...]
    axes: tuple[str, ...]
    execution: Execution
    search: SearchPlan | None = None
    published: str = ""


@dataclass(frozen=True)
class _Card:
    """What a card's tables say. grid: the keys of its grid."""

    settings: Mapping[str, Setting] = field(default_factory=dict)
    ranges: Ranges = field(default_factory=dict)
    grid: frozenset[str] = frozenset()


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
    if not isinstance(title, str) or not title.isprintable():
        raise Refused(f"{cards.place(path, 'title')}: title must be plain text on one line, got {title!r:.80}")
    if not listed.values and methods is None:
        raise Refused(f"{path.name}: no methods; write methods = [...] with some of {', '.join(registry.names())}")
    _check_methods(listed)
    written = _read(raw, path, listed.values)
    meant = published.checked(raw["published"], cards.place(path, "published")) if "published" in raw else ""
    return replace(_build(name, title, methods or listed, seeds or counted, written, given), published=meant)


def run_sweep(method: str, texts: Sequence[str] = ()) -> Sweep:
    """The sweep "run-<method>" of one method: one cell, or more where overrides have commas. Raises Refused."""
    given, methods, seeds = _lists(overrides.parse(texts))
    if methods is not None:
        raise Refused(f"{methods.source}: the method is {method!r} already; a sweep card compares several")
    chosen = Setting("methods", (method,), f"method {method!r}"[:80])
    _check_methods(chosen)
    name = checked_name(f"run-{registry.label(method)}", chosen.source)
    return _build(name, "", chosen, seeds or Setting("seeds", (0,), "default"), _Card(), given)


def resolve_setting(texts: Sequence[str] = ()) -> Trial:
    """The one trial of some overrides, with fedavg as the method: what a partition preview needs. Raises Refused."""
    sweep = run_sweep("fedavg", texts)
    if len(sweep.cells) > 1:
        raise Refused(f"one setting is wanted, but these overrides make {len(sweep.cells)}: give each key one value")
    return sweep.cells[0]


def checked_name(name: object, source: str) -> str:
    """A sweep's name, which becomes a folder's. Raises Refused for anything that could lead out of the results."""
    if isinstance(name, str) and _NAME.fullmatch(name) and not _RESERVED.fullmatch(name):
        return name
    if isinstance(name, str) and _RESERVED.fullmatch(name):
        raise Refused(f"{source}: name {name!r} is reserved: choose another one")
    raise Refused(f"{source}: name must be {_RULE}, got {name!r:.80}")


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
        if method.endswith(".py") and not _NAME.fullmatch(registry.label(method)):
            raise Refused(
                f"{methods.source}: a method file's name, less its .py, must be {_RULE}, got {method!r:.80}"
            )
        if labels.setdefault(registry.label(method), method) != method:
            raise Refused(f"{methods.source}: two methods are called {registry.label(method)!r}")


def _read(raw: Mapping[str, Any], path: Path, methods: Sequence[str]) -> _Card:
    """The settings and ranges of a card's tables. Raises Refused."""
    known = overrides.targets(methods)
    settings = _card_settings(raw, path, known)
    grid = frozenset(overrides.flatten(raw.get("grid", {}), f"{path.name}: [grid]"))
    found, ranges = searches.read(raw.get("search", {}), path, methods, known)
    for (_, key), one in ranges.items():
        if key in grid:
            raise Refused(f"{one.source}: {key} is an axis already at {settings[key].source}: search it or list it")
    if "search" in raw and not ranges:
        raise Refused(f"{cards.place(path, 'search')}: a search needs ranges: write them in [search.space]")
    return _Card({**settings, **found}, ranges, grid)


def _card_settings(raw: Mapping[str, Any], path: Path, known: Mapping[str, Target]) -> dict[str, Setting]:
    """The settings of a card's tables under their full keys."""
    settings: dict[str, Setting] = {}

    def add(table: str, name: str, key: str, values: tuple[Any, ...], scopes: tuple[str, ...]) -> None:
        source = cards.place(path, f"{table}.{name}")
        if name.partition(".")[0] in ("method", "methods", "seed", "seeds"):
            raise Refused(f"{source}: write methods = [...] and seeds = [...] at the top of the card")
        if values == ({},) and any(k.startswith(f"{key}.") and t.scope in scopes for k, t in known.items()):
            return  # a table with nothing in it
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
    name: str, title: str, methods: Setting, seeds: Setting, written: _Card, given: Sequence[Setting]
) -> Sweep:
    known = overrides.targets(methods.values) | (searches.TARGETS if written.ranges else {})
    own = _own(given, known)
    # What belongs to methods that are not run falls away; so do ranges of what is set on the command line.
    settings = {key: s for key, s in written.settings.items() if key in known}
    owners = {"", *map(registry.label, methods.values)}
    ranges = {
        at: one for at, one in written.ranges.items() if at[0] in owners and at[1] in known and at[1] not in own
    }
    if not ranges and (vain := [s for key, s in own.items() if key in searches.TARGETS]):
        raise Refused(f"{vain[0].source}: nothing is left to search for with these methods and settings")
    for key in own:
        settings.pop(_EXCLUSIVE.get(key, ""), None)
    plan = Plan(methods, seeds, {**settings, **own}, known, ranges, written.grid)
    search = searches.planned(plan, own) if ranges else None
    execution = _execution(plan)
    cells = tuple({config.digest(cell): cell for cell in plan_cells(plan)}.values())
    every = (*cells, *(group.prototype for group in (search.groups if search else ())))
    # A card may set what only some kinds read and be run with another kind; then only the overrides must count.
    refuse_unread(own if own.keys() & {"partition.kind", "partition.shift"} else plan.settings, every)
    return Sweep(name, title, cells, axes_of(plan, every), execution, search)


def _own(given: Sequence[Setting], known: Mapping[str, Target]) -> dict[str, Setting]:
    """The overrides under their full keys."""
    own: dict[str, Setting] = {}
    for setting in given:
        if setting.key.startswith("search.") and not known.keys() & searches.TARGETS.keys():
            raise Refused(f"{setting.source}: there is no search here: only a card has one, with [search.space]")
        found = overrides.match(setting, known)
        if found.key in own:
            raise Refused(f"{found.source}: {found.key} is set twice, first by {own[found.key].source}")
        own[found.key] = found
    return own


def _execution(plan: Plan) -> Execution:
    chosen = plan.scope("execution")
    try:
        return check(Execution, {plan.known[key].path[0]: s.one for key, s in chosen.items()}, "execution.")
    except Unfit as error:
        raise located(error, chosen) from error
