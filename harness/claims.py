"""What a row of `trials` claims, computed anew from what it rests on: its config, its rounds and clients, the data.

Each check yields what disagrees, in a line each, and raises Unknown for what can't be told here.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness import RULES_VERSION
from harness.axes import run_sweep
from harness.config import Trial, digest, trial_id
from harness.data import Arrays, card, load
from harness.parquet import SCHEMAS, Row, TableName
from harness.partitions import divide
from harness.refusal import Refused
from harness.registry import label
from harness.summary import headline, rows_hash

Tables = Mapping[TableName, list[Row]]  # the rows of one trial
TOTALS = ("up_bytes", "down_bytes", "steps", "server_steps", "samples")
VISITS = ("up_bytes", "down_bytes", "steps")  # columns of `clients` that add up to those of `rounds`
SKEW = {name for name in SCHEMAS["trials"].names if name.startswith("partition_")}
LONGEST = 200  # characters of somebody else's message


class Unknown(Exception):
    """What can't be told here, and why."""


def settings_of(row: Row) -> Trial:
    """The settings that a row was made with. Raises Unknown, if the rules were others."""
    if row["rules_version"] != RULES_VERSION:
        raise Unknown(f"made under rules {row['rules_version']}, here are {RULES_VERSION}")
    try:
        return Trial.model_validate_json(row["config"] or "")
    except ValidationError as error:
        first = error.errors()[0]
        raise Unknown(f"config can't be read: {'.'.join(map(str, first['loc']))}: {first['msg']}"[:LONGEST]) from None


def config_agrees(row: Row) -> Iterator[str]:
    """Its hash, the trial id and the columns that repeat a setting."""
    try:
        trial = settings_of(row)
    except Unknown as why:
        if row["rules_version"] != RULES_VERSION:
            raise
        yield str(why)
        return
    found = digest(trial)
    if row["config_hash"] != found:
        yield f"config_hash is {row['config_hash']}, but config comes to {found}"
    if row["trial_id"] != found[:16]:
        yield f"its config is that of trial {found[:16]}"
    how = trial.partition
    columns = {key: getattr(trial, key) for key in ("dataset", "net", "seed", "clients", "participation")}
    columns |= {"method": label(trial.method), "alpha": how.alpha if "alpha" not in how.unread() else None}
    for key, value in columns.items():
        if row[key] != value:
            yield f"{key} is {row[key]!r}, but {value!r} in its config"


def rows_agree(row: Row, tables: Tables) -> Iterator[str]:
    """The hash of its rounds and clients."""
    if row["rows_hash"] is None:
        raise Unknown("made before rows had a hash")
    found = rows_hash(tables["rounds"], tables["clients"])
    if row["rows_hash"] != found:
        yield f"rows_hash is {row['rows_hash']}, but its rounds and clients come to {found}"


def rounds_agree(row: Row, tables: Tables) -> Iterator[str]:
    """Whether the rounds are those that the row counts, each once."""
    done, whole = row["rounds_done"] or 0, row["status"] == "done"
    seen = sorted({r["round"] for r in tables["rounds"]})
    # Where the evaluation of a round fails, that round was counted and has no row.
    counts = {done} if whole or row["status"] == "stopped" else {done, done - 1}
    if seen != list(range(len(seen))) or len(seen) not in counts:
        yield f"rounds_done is {done}, but the table of rounds has {_span(seen)}"
    if whole and (planned := _planned(row)) not in (None, done):
        yield f"it is done after {done} rounds, but its config has {planned}"
    for table, keys in (("rounds", ("round", "role")), ("clients", ("round", "client", "role"))):
        times = Counter(tuple(r.get(key) for key in keys) for r in tables[table])  # type: ignore[index]
        for key, count in times.items():
            if count > 1:
                yield f"{table} has {', '.join(f'{k} {v}' for k, v in zip(keys, key, strict=True))} {count} times"
    late = sorted({r["round"] for r in tables["clients"] if r["round"] >= done + (not whole)})
    if late:
        yield f"rounds_done is {done}, but the table of clients has round {late[0]}"


def _span(seen: list[int]) -> str:
    return f"{len(seen)}, from {seen[0]} to {seen[-1]}" if seen else "none of it"


def _planned(row: Row) -> int | None:
    try:
        return settings_of(row).rounds
    except Unknown:
        return None


def totals_agree(row: Row, tables: Tables) -> Iterator[str]:
    """Its sums over the rounds, and those of the rounds over the clients."""
    for key in TOTALS:
        total = sum(r[key] or 0 for r in tables["rounds"])
        if (row[key] or 0) != total:
            yield f"{key} is {row[key]}, but its rounds add up to {total}"
    for key in VISITS:
        by_round: Counter[int] = Counter()
        for r in tables["rounds"]:
            by_round[r["round"]] += r[key] or 0
        visits: Counter[int] = Counter()
        for r in tables["clients"]:
            visits[r["round"]] += r[key] or 0
        odd = [at for at in sorted(by_round) if by_round[at] != visits[at]]
        if odd:
            at = odd[0]
            yield f"{key} of round {at} is {by_round[at]}, but its clients add up to {visits[at]}"


def headline_agrees(row: Row, tables: Tables) -> Iterator[str]:
    """The headline columns, which its rounds come to."""
    found = headline(tables["rounds"], settings_of(row).evaluation.targets)
    there = {k: v for k, v in row.items() if k not in SCHEMAS["trials"].names and v is not None}
    for key in sorted({*found, *there}):
        if not close(row.get(key), found.get(key)):
            yield f"{key} is {row.get(key)}, but its rounds come to {found.get(key)}"


def close(a: Any, b: Any) -> bool:
    """Equal up to how a Python adds floats up: since 3.12 its sum rounds once only."""
    if isinstance(a, Real) and isinstance(b, Real):
        return math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-15) or (a != a and b != b)
    return bool(a == b)


def command_agrees(row: Row) -> Iterator[str]:
    """Whether its command runs just this trial."""
    trial = here(settings_of(row))
    try:
        words = shlex.split(row["command"] or "")
    except ValueError:
        words = []
    if words[:3] != ["fedstill", "run", trial.method]:
        yield f"command is {row['command']!r}, which does not run {trial.method}"
        return
    try:
        names = [trial_id(cell) for cell in run_sweep(trial.method, words[3:]).cells]
    except Refused as refusal:
        if trial.availability.trace:
            raise Unknown(f"the trace {trial.availability.trace} is not here as it was") from None
        yield f"command is refused: {str(refusal)[:LONGEST]}"
        return
    if names != [row["trial_id"]]:
        yield f"command runs {', '.join(names[:3])} instead"


def here(trial: Trial) -> Trial:
    """The trial, if the files are here that it names. Raises Unknown; then none of them is imported."""
    if trial.method.endswith(".py"):
        try:
            found = hashlib.sha256(Path(trial.method).read_bytes()).hexdigest()
        except OSError:
            found = ""
        if found != trial.source or not found:
            raise Unknown(f"the method file {trial.method} is not here as it was")
    return trial


class Data:
    """The data sets that are on this machine, and what was dealt of them. Nothing is downloaded."""

    def __init__(self) -> None:
        self._arrays: dict[str, Arrays | str] = {}
        self._hashes: dict[str, str] = {}
        self._dealt: dict[str, dict[str, Any]] = {}

    def arrays(self, name: str) -> Arrays:
        """A data set. Raises Unknown."""
        if name not in self._arrays:
            try:
                self._arrays[name] = load(card(name), download=False)
            except Refused as refusal:
                self._arrays[name] = f"data set {name} can't be read here: {str(refusal)[:LONGEST]}"
        found = self._arrays[name]
        if isinstance(found, str):
            raise Unknown(found)
        return found

    def hash(self, row: Row) -> Iterator[str]:
        """Whether a row was made with these data."""
        name = row["dataset"]
        self._hashes[name] = self._hashes.get(name) or self.arrays(name).checksum()
        if row["data_hash"] != self._hashes[name]:
            yield f"data_hash is {row['data_hash']}, but {name} here has {self._hashes[name]}"

    def partition(self, row: Row) -> Iterator[str]:
        """Whether the rows are dealt here as they were for a row."""
        if row["partition_hash"] is None and row["status"] != "done":
            raise Unknown("its process could not tell how its data were dealt")
        for key, value in self._deal(settings_of(row)).items():
            if not close(row[key], value):
                yield f"{key} is {row[key]}, but dealt again it is {value}"

    def _deal(self, trial: Trial) -> dict[str, Any]:
        keys = {"dataset", "seed", "clients", "partition", "holdout", "proxy", "fleet"}
        key = json.dumps(trial.model_dump(mode="json", include=keys), sort_keys=True)
        if key not in self._dealt:
            arrays = self.arrays(trial.dataset)
            cut = divide(arrays.y_train, card(trial.dataset).classes, trial, arrays.domains_train)
            found = {f"partition_{name}": value for name, value in cut.statistics.items()}
            self._dealt[key] = {"partition_hash": cut.digest} | {k: found[k] for k in found.keys() & SKEW}
        return self._dealt[key]
