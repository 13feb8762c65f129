"""A results folder checked: its files, its tables against each other, and every row against what it rests on.

Nothing in the folder is changed, and what can't be told here is said, never passed over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from harness import claims, lock, parquet, repair
from harness.claims import Data, Tables, Unknown
from harness.parquet import SCHEMAS, TABLES, Damaged, Row, TableName, file_of
from harness.refusal import Refused

BATCH = 64  # trials of a compacted part in memory


@dataclass
class Check:
    """One kind of check. left: why something could not be checked -> how often."""

    name: str
    looked: int = 0
    faults: list[str] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)

    def take(self, name: str, told: Callable[[], Iterator[str]]) -> None:
        """Checks one trial. told: yields what disagrees, raises Unknown."""
        try:
            self.faults += [f"trial {name}: {fault}" for fault in told()]
            self.looked += 1
        except Unknown as why:
            self.left[str(why)] += 1


def audit(folder: Path) -> list[Check]:
    """All checks of the tables, in the order in which they are shown. Raises Refused."""
    busy = lock.in_use(folder)
    files, strays = _files(folder), _strays(folder, busy)
    data = Data()
    told: dict[str, Callable[[Row, Tables], Iterator[str]]] = {
        "config": lambda row, _: claims.config_agrees(row),
        "rows_hash": claims.rows_agree,
        "rounds": claims.rounds_agree,
        "totals": claims.totals_agree,
        "headline": claims.headline_agrees,
        "command": lambda row, _: claims.command_agrees(row),
        "data": lambda row, _: data.hash(row),
        "partition": lambda row, _: data.partition(row),
    }
    checks = {name: Check(name) for name in told}
    for tables in trials(folder):
        row = tables["trials"][0]
        if len(tables["trials"]) > 1:
            strays.faults.append(f"trial {row['trial_id']} has {len(tables['trials'])} rows in trials")
        strays.looked += sum(len(tables[table]) for table in TABLES[1:])
        for name, check in checks.items():
            check.take(row["trial_id"], partial(told[name], row, tables))
    return [files, strays, *checks.values()]


def trials(folder: Path) -> Iterator[Tables]:
    """Every trial that can be read, its row in `trials` first. Raises Refused if files come and go meanwhile."""
    there = parquet.listing(folder, "trials")
    taken = set(there.own)
    try:
        for name in sorted(there.own):
            yield from _read(folder, name, [name])
        for number in there.parts:
            try:
                found = parquet.load(file_of(folder, "trials", number), None, ["trial_id"])
            except Damaged:
                continue
            ids = sorted(set(found["trial_id"].to_pylist()) - taken)
            taken |= set(ids)
            for at in range(0, len(ids), BATCH):
                yield from _read(folder, number, ids[at : at + BATCH])
    except FileNotFoundError as gone:
        raise Refused(
            f"{gone.filename or folder} was changed meanwhile: try again when no other process works on it"
        ) from None


def _read(folder: Path, place: str | int, names: list[str]) -> Iterator[Tables]:
    """Trials of one file; none if a file of theirs is damaged, which is told elsewhere."""
    found: dict[str, dict[TableName, list[Row]]] = {name: {table: [] for table in TABLES} for name in names}
    try:
        for table in TABLES:
            file = file_of(folder, table, place)
            if table == "trials" or file.exists():
                rows = parquet.load_own(file, place) if isinstance(place, str) else parquet.load(file, names)
                absent = dict.fromkeys(SCHEMAS[table].names)  # in files of an older version
                for row in rows.to_pylist():
                    found[row["trial_id"]][table].append({**absent, **row})
    except Damaged:
        return
    yield from (tables for tables in found.values() if tables["trials"])


def _files(folder: Path) -> Check:
    listings = [parquet.listing(folder, table) for table in TABLES]
    check = Check("files", sum(len(there.own) + len(there.parts) for there in listings))
    check.faults = [f"{fault.file} is damaged ({fault.what})" for fault in repair.found_damaged(folder)]
    return check


def _strays(folder: Path, busy: bool) -> Check:
    """Rows without one in `trials`."""
    check = Check("belongs")
    if busy:  # rounds are written before the row that they belong to
        check.left["rows without a trial, while another process works on the folder"] += 1
        return check
    for file in repair.leftovers(folder):
        if not file.name.startswith("."):
            check.faults.append(f"{file} belongs to no row of trials")
    for table in TABLES[1:]:
        for number in parquet.listing(folder, table).parts:
            try:
                own, other = (
                    set(parquet.load(file_of(folder, t, number), None, ["trial_id"])["trial_id"].to_pylist())
                    for t in ("trials", table)
                )
            except (Damaged, FileNotFoundError):
                continue
            for name in sorted(other - own):
                check.faults.append(f"{file_of(folder, table, number)}: trial {name} has no row in trials")
    return check
