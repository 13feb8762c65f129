"""Published numbers: what papers and repositories report, a CSV file for each source in results/published."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from harness import cards
from harness.refusal import Refused, nearest, unknown

READ = ("paper", "transcription", "code", "repository", "secondary")  # how sure it is that the source says so
KINDS = (
    *("iid", "dirichlet", "dirichlet-capped", "dirichlet-grouped", "dirichlet-client", "shards", "pathological"),
    *("quantity", "quantity-dirichlet"),
    *("dirichlet-any", "groups"),  # a rule that is not stated; one that no partition here has
)
TESTED = ("global", "own-labels", "private")  # one test set for all; users' rows of labels they own; users' own rows
REPORTED = ("best", "last", "last10")  # round, or the mean of the last ten


@dataclass(frozen=True)
class Published:
    """One published value with all that its source says of how it came about; None or empty: not stated.

    read: one of READ. method, dataset, net: as they are called here, where they are. hyper: of the method, as
    "name=value", joined by ";". fraction: of the training rows used. steps: of a visit, where the source counts them
    instead of epochs. lr_decay: per round. schedule: changes as a trial's schedule has them, joined by "; ".
    augment: "true" or "false". value, sd: percent for the metric "accuracy". seeds: runs behind the value.
    """

    source: str
    year: int | None
    table: str
    read: str
    method: str
    role: str
    hyper: str
    dataset: str
    net: str
    clients: int | None
    participation: float | None
    partition: str
    alpha: float | None
    shards: int | None
    classes: int | None
    fraction: float | None
    rounds: int | None
    epochs: int | None
    steps: int | None
    batch: int | None
    lr: float | None
    momentum: float | None
    weight_decay: float | None
    lr_decay: float | None
    schedule: str
    augment: str
    tested: str
    reported: str
    metric: str
    value: float
    sd: float | None
    seeds: int | None
    note: str

    @property
    def setting(self) -> str:
        """What makes it hard: data set, partition, clients, in short."""
        level = {"alpha": self.alpha, "shards": self.shards, "classes": self.classes}
        words = [self.dataset, self.partition.removesuffix("-any")]
        words += [f"{name}={value:g}" for name, value in level.items() if value is not None]
        words += [] if self.clients is None else [f"clients={self.clients}"]
        words += [] if self.participation is None else [f"participation={self.participation:g}"]
        return ", ".join(filter(None, [*words, self.net, self.hyper]))


COLUMNS = tuple(field.name for field in fields(Published))
_NEEDED = ("source", "table", "method", "dataset", "metric", "value")
_CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "read": READ,
        "augment": ("", "true", "false"),
        "partition": ("", *KINDS),
        "tested": ("", *TESTED),
        "reported": ("", *REPORTED),
    }
)
# Lowest and highest; a whole number where the type says so.
_RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        **dict.fromkeys(("clients", "shards", "classes", "rounds", "epochs", "steps", "batch", "seeds"), (1, 1e7)),
        **dict.fromkeys(("participation", "fraction", "lr_decay"), (0, 1)),
        **dict.fromkeys(("lr", "weight_decay", "sd", "alpha"), (0, 1e6)),
        **{"year": (1990, 2100), "momentum": (0, 0.9999), "value": (-1e12, 1e12)},
    }
)


def names() -> list[str]:
    """The sources there are, by file name."""
    return sorted(path.stem for path in cards.root("published").glob("*.csv"))


def checked(name: object, place: str) -> str:
    """The name of a source. Raises Refused, saying where it stands, for one that there is not."""
    if isinstance(name, str) and name in names():
        return name
    raise Refused(f"{place}: {unknown('published source', str(name)[:80], names())}")


@lru_cache
def read(name: str) -> tuple[Published, ...]:
    """The values of a source. Raises Refused, naming file and line, for a file that is not well-formed."""
    return load(cards.root("published") / f"{checked(name, 'results/published')}.csv")


def load(path: Path) -> tuple[Published, ...]:
    """As `read`, from a path."""
    with path.open(newline="", encoding="utf-8") as file:
        sheet = csv.DictReader(file)
        if tuple(sheet.fieldnames or ()) != COLUMNS:
            raise Refused(f"{path.name}: the columns must be {', '.join(COLUMNS)}")
        rows: dict[Published, int] = {}
        for line in sheet:
            row = _row(line, f"{path.name}, line {sheet.line_num}")
            if row in rows:
                raise Refused(f"{path.name}, line {sheet.line_num}: the same as line {rows[row]}")
            rows[row] = sheet.line_num
    return tuple(rows)


def _row(line: Mapping[str | None, str], place: str) -> Published:
    if None in line or None in line.values():
        raise Refused(f"{place}: not as many cells as columns")
    found: dict[str, object] = {}
    for field in fields(Published):
        text = line[field.name]
        if text != text.strip():
            raise Refused(f"{place}: {field.name} has spaces around it")
        if not text and field.name in _NEEDED:
            raise Refused(f"{place}: {field.name} is missing")
        if text not in _CHOICES.get(field.name, (text,)):
            guess = nearest(text, _CHOICES[field.name])
            raise Refused(f"{place}: {field.name} is {text!r}" + (f"; did you mean {guess!r}?" if guess else ""))
        found[field.name] = text if field.name not in _RANGES else _number(text, field.name, str(field.type), place)
    row = Published(**found)  # type: ignore[arg-type]
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", row.method):
        raise Refused(f"{place}: method is written in lower case with dashes, got {row.method!r}")
    if row.metric == "accuracy" and not 0 <= row.value <= 100:
        raise Refused(f"{place}: value is in percent, got {row.value}")
    if any("=" not in part for part in filter(None, row.hyper.split(";"))):
        raise Refused(f"{place}: hyper is name=value, joined by ';', got {row.hyper!r}")
    return row


def _number(text: str, name: str, kind: str, place: str) -> float | int | None:
    if not text:
        return None
    low, high = _RANGES[name]
    try:
        value = float(text)
    except ValueError:
        raise Refused(f"{place}: {name} must be a number, got {text!r:.40}") from None
    if not (math.isfinite(value) and low <= value <= high):
        raise Refused(f"{place}: {name} must lie in [{low:g}, {high:g}], got {text}")
    if "int" not in kind:
        return value
    if not value.is_integer():
        raise Refused(f"{place}: {name} must be a whole number, got {text}")
    return int(value)
