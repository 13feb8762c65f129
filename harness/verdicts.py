"""Published numbers beside ours: which setting is the same, what differs, whether the value lies in our interval."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from harness import cards, published
from harness.cells import Cell, Grid, Line, fill
from harness.metrics import roles
from harness.places import Place, config_of
from harness.published import Published
from harness.record import Row

Config = Mapping[str, Any]
# What makes a trial the one that is meant: column of a source -> config key. Not stated: any.
MEANT = {
    "dataset": "dataset",
    **{"clients": "clients", "participation": "participation"},
    **{"alpha": "partition.alpha", "shards": "partition.shards_per_client"},
    "classes": "partition.classes_per_client",
}
# What has to be the same as well, or the two can not be compared.
COMPARED = {
    **{"rounds": "rounds", "epochs": "local.epochs", "batch": "local.batch", "lr": "local.lr"},
    **{"momentum": "local.momentum", "weight_decay": "local.weight_decay", "lr_decay": "local.lr_decay"},
    "fraction": "partition.fraction",
}
# Settings of ours that no source has: at these values they change nothing.
NEUTRAL = {
    **{"partition.long_tail": 1.0, "partition.shift": "none", "partition.domains": "none", "local.clip": 0.0},
    **{"availability.pattern": "uniform", "availability.dropout": 0.0, "availability.stragglers": 0.0},
    **{"holdout.validation": 0.0, "faults.client": "fail", "faults.nonfinite": "fail"},
}
USUAL = {"lr_decay": 1.0, "fraction": 1.0}  # what a source that says nothing of it has done
Finding = Literal["inside", "outside", "not comparable", "not run"]


@dataclass(frozen=True)
class Verdict:
    """One published value and ours. name, setting: of our row and column; empty without one. cell: ours there.

    inside, outside: whether the published value lies in our 95 % interval. why: what differs, or is not stated there.
    """

    theirs: Published
    finding: Finding
    why: tuple[str, ...]
    name: str = ""
    setting: str = ""
    cell: Cell | None = None

    @property
    def difference(self) -> float | None:
        """Ours less theirs."""
        return None if self.cell is None or self.cell.mean is None else self.cell.mean - self.theirs.value

    def __str__(self) -> str:
        because = "; ".join(self.why)
        said = f" ({because})" if self.finding in ("inside", "outside") else f": {because}"
        return self.finding + said * bool(because)


def verdicts(
    kept: Sequence[Row], places: Mapping[str, Place], sources: Mapping[str, Sequence[Published]] | None = None
) -> tuple[Verdict, ...]:
    """What the sources (by default all) say of these trials. kept: rows of no search; places: `grouped(kept)`.

    All values of the sources that a trial's sweep is meant to reproduce (its card's `published`), and those values of
    any other source whose stated settings are exactly those of a trial.
    """
    sources = {name: published.read(name) for name in published.names()} if sources is None else sources
    bound = {str(row["published"]) for row in kept if row.get("published")}
    ours = _Ours(kept, places)
    found = []
    for name, rows in sources.items():
        for theirs in rows:
            if theirs.metric == "accuracy" and (name in bound or ours.has(theirs)):
                verdict = _verdict(theirs, ours)
                if name in bound or verdict.finding in ("inside", "outside"):
                    found.append(verdict)
    return tuple(found)


class _Ours:
    """The cells by metric, with the config of each."""

    def __init__(self, kept: Sequence[Row], places: Mapping[str, Place]) -> None:
        self.kept, self.places = kept, places
        self.configs = {str(row["trial_id"]): config_of(row) for row in kept}
        self.personal = {
            str(row["method"]) for row in kept if any(role.startswith("personal") for role in roles(row))
        }
        self.datasets = {(str(row["method"]), str(row["dataset"])) for row in kept}
        self.grids: dict[str, Grid] = {}

    def has(self, theirs: Published) -> bool:
        return (theirs.method, theirs.dataset) in self.datasets

    def cells(self, theirs: Published) -> Iterator[tuple[Line, Cell, Config]]:
        """Those of the method and model role that are meant, at the settings that are meant."""
        metric = measure(theirs, theirs.method in self.personal)[0]
        if metric not in self.grids:
            self.grids[metric] = fill(self.kept, (), metric, self.places)
        grid = self.grids[metric]
        for line, cells in zip(grid.lines, grid.cells, strict=True):
            for cell in cells if line.method == theirs.method else ():
                config = self.configs[cell.trial_ids[0]] if cell.trial_ids else {}
                known = [other.role for other in grid.lines if other.entry == line.entry]
                if config and line.role == _role(theirs, config, known) and _meant(theirs, config):
                    yield line, cell, config


def measure(theirs: Published, personal: bool) -> tuple[str, list[str]]:
    """The metric of ours that is nearest to what was measured, and how the two differ.

    personal: whether clients have models of their own here, which are tested on their own rows.
    """
    if theirs.tested == "own-labels" or (theirs.tested == "private" and not personal):
        return "own_label_accuracy_last10", ["tested on users' own rows there, by the global confusion matrix here"]
    ways = {"best": "accuracy_best", "last10": "accuracy_last10"}
    return ways.get(theirs.reported, "accuracy_last"), []


def _role(theirs: Published, config: Config, known: Sequence[str]) -> str:
    """The model role that is meant. Pools are called after their nets, in sources by their size."""
    nets = config.get("fleet.nets") or []
    wanted = {"small": nets[0], "large": nets[-1]}.get(theirs.role, theirs.role) if nets else theirs.role
    usual = [role for role in ("global", "student", "personal") if role in known]
    return wanted or (usual or list(known))[0]


def _meant(theirs: Published, config: Config) -> bool:
    kind = str(config.get("partition.kind"))
    if theirs.partition and not _same_kind(theirs.partition, kind):
        return False
    stated = ((getattr(theirs, column), config.get(key)) for column, key in MEANT.items())
    return all(their in (None, "") or _same(their, our) for their, our in stated)


def _same_kind(theirs: str, ours: str) -> bool:
    return theirs == ours or (theirs == "dirichlet-any" and ours.startswith("dirichlet"))


def _same(theirs: Any, ours: Any) -> bool:
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        return abs(theirs - ours) <= 1e-9 * max(1.0, abs(theirs))
    return str(theirs) == str(ours)


def _verdict(theirs: Published, ours: _Ours) -> Verdict:
    found = [(*_compared(theirs, config, line), line, cell) for line, cell, config in ours.cells(theirs)]
    if not found:
        return Verdict(theirs, "not run", (_missing(theirs, ours),))
    differing, unstated, line, cell = min(found, key=lambda one: (len(one[0]), one[2].name))
    finding: Finding = "not comparable"
    if not cell.n:
        counts = {"failed": cell.failed, "diverged": cell.diverged, "stopped": cell.stopped, "absent": cell.absent}
        finding, why = "not run", [f"{count} {word}" for word, count in counts.items() if count]
    elif differing:
        why = differing
    elif cell.interval is None:
        why = ["one seed here, which has no interval"]
    else:
        finding = "inside" if cell.interval.low <= theirs.value <= cell.interval.high else "outside"
        why = [f"not stated there: {', '.join(unstated)}"] if unstated else []
    return Verdict(theirs, finding, tuple(why), line.name, cell.setting, cell)


def _compared(theirs: Published, config: Config, line: Line) -> tuple[list[str], list[str]]:
    """What differs; what is not stated."""
    differing, unstated = list(measure(theirs, line.role.startswith("personal"))[1]), list[str]()
    if theirs.net and theirs.net != config.get("net"):
        differing.append(f"net {theirs.net} there, {config.get('net')} here")
    for column, key in COMPARED.items():
        their, our = getattr(theirs, column), config.get(key)
        if their is None and column not in USUAL:
            if not (column == "epochs" and theirs.steps):
                unstated.append(column.replace("_", " "))
        elif not _same(USUAL[column] if their is None else their, our):
            said = USUAL[column] if their is None else their
            differing.append(f"{column.replace('_', ' ')} {said:g} there, {our} here")
    unstated += [
        column
        for column in ("net", "clients", "participation", "partition", "augment")
        if not getattr(theirs, column)
    ]
    unstated += ["rule of the partition"] * (theirs.partition == "dirichlet-any")
    unstated += ["best or last round"] * (not theirs.reported and theirs.tested == "global")
    if theirs.steps:
        differing.append(f"{theirs.steps} steps a visit there, {config.get('local.epochs')} epochs here")
    differing += _extras(theirs, config)
    return differing, unstated


def _extras(theirs: Published, config: Config) -> Iterator[str]:
    """Hyper-parameters and the schedule; what no source has."""
    for part in filter(None, theirs.hyper.split(";")):
        name, _, value = part.partition("=")
        our = config.get(f"hyper.{name}")
        if not _same(_plain(value), str(our).lower() if isinstance(our, bool) else our):
            yield f"{name} {value} there, {our} here"
    if theirs.augment and theirs.augment != str(config.get("local.augment", True)).lower():
        yield f"augment {theirs.augment} there, {str(config.get('local.augment')).lower()} here"
    schedule = "; ".join(config.get("schedule") or [])
    if schedule != theirs.schedule:
        yield f"schedule {theirs.schedule or 'none'} there, {schedule or 'none'} here"
    for key, neutral in NEUTRAL.items():
        if key in config and config[key] != neutral:
            yield f"{key} {config[key]} here"


def _plain(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _missing(theirs: Published, ours: _Ours) -> str:
    if theirs.method not in {method for method, _ in ours.datasets}:
        absent = "" if theirs.method in cards.methods() else ", which fedstill does not have"
        return f"no trial of {theirs.method}{absent}"
    if not ours.has(theirs):
        return f"no trial of {theirs.method} on {theirs.dataset}"
    return f"no trial of {theirs.method} with these settings"
