"""Many small files into one per table: the rows of ended trials that will never run again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from harness import lock, parquet
from harness.durable import writing
from harness.parquet import SCHEMAS, TABLES, WRITTEN, TableName, file_of
from harness.refusal import Refused
from harness.summary import final

GROUP: dict[TableName, int] = {"trials": 512, "rounds": 8192, "clients": 8192, "events": 8192}  # rows of a row group
BATCH = 64  # trials in memory


def compact(results: Path) -> str:
    """Brings the trials of a folder together, those that may run again aside; says what it did.

    It may be stopped at any moment: the tables are the same before, meanwhile and after. Raises Refused.
    """
    if not results.is_dir():
        raise Refused(f"there is no results folder {results}: `fedstill sweep CARD` makes one")
    if not (results / "trials").is_dir():
        raise Refused(f"{results} is no results folder: it has no tables; `fedstill sweep CARD` makes one")
    with lock.held(results):
        rows = parquet.read(results, "trials").select(["trial_id", "status", "reason", "stage"]).to_pylist()
        again = {r["trial_id"] for r in rows if not final(r["status"], r["reason"] or "", r["stage"] or "")}
        there = parquet.listing(results, "trials")
        places: dict[str, str | int] = {name: name for name in there.own if name not in again}
        new = len(places)
        places |= {name: number for number, ids in parquet.standing(results, there).items() for name in ids}
        stay = f"; {len(again)} that may run again stay as they are" if again else ""
        if not new and len(there.parts) < 2:
            _sweep_up(results, places, max(there.parts, default=0))
            return f"Nothing to compact in {results}: {len(places)} trials lie together already{stay}."
        before = _count(results)
        number = next_number(results)
        _rewrite(results, number, places)
        return f"Compacted {results}: {len(places)} trials, {before} files before, {_count(results)} now{stay}."


def discard(results: Path, names: Collection[str]) -> None:
    """Takes trials out of all tables, their rows first, so that no reader sees a part of one. For the writer only."""
    for table in TABLES:
        for name in names:
            file_of(results, table, name).unlink(missing_ok=True)
    standing = parquet.standing(results, parquet.listing(results, "trials"))
    if any(ids & set(names) for ids in standing.values()):
        places = {name: number for number, ids in standing.items() for name in ids - set(names)}
        _rewrite(results, next_number(results), places)


def next_number(folder: Path) -> int:
    """Of a new part."""
    return 1 + max((n for table in TABLES for n in parquet.listing(folder, table).parts), default=0)


def _rewrite(folder: Path, number: int, places: Mapping[str, str | int]) -> None:
    try:
        write_part(folder, number, places)
    except Exception:  # such as a full disk, or a damaged file: what was written stands for nothing
        for table in TABLES:
            file_of(folder, table, number).unlink(missing_ok=True)
        raise
    _sweep_up(folder, places, number)


def write_part(folder: Path, number: int, places: Mapping[str, str | int]) -> None:
    """Writes the rows of trials into a new part. places: trial id -> where its rows lie, see `file_of`.

    The table that makes trials done comes last: until then nothing of it is seen.
    """
    for table in WRITTEN:
        files = {place: file_of(folder, table, place) for place in set(places.values())}
        files = {place: file for place, file in files.items() if file.exists()}
        if not files:
            continue
        schema = parquet.united(folder / table, _heads(table, files)).schema
        kept = schema.empty_table()
        target = file_of(folder, table, number)
        with writing(target) as draft, pq.ParquetWriter(draft, schema, **parquet.OPTIONS) as writer:
            for rows in _batches(table, files, places):
                kept = parquet.united(target, [kept, rows])
                full = len(kept) // GROUP[table] * GROUP[table]
                if full:
                    writer.write_table(kept.slice(0, full), row_group_size=GROUP[table])
                    kept = kept.slice(full)
            if len(kept):
                writer.write_table(kept)


def _heads(table: TableName, files: Mapping[str | int, Path]) -> list[pa.Table]:
    """An empty table of each schema that the files have."""
    schemas = {SCHEMAS[table]: None}
    for file in files.values():
        schemas[parquet.load(file, only=[]).schema] = None
    return [schema.empty_table() for schema in schemas]


def _batches(
    table: TableName, files: Mapping[str | int, Path], places: Mapping[str, str | int]
) -> Iterator[pa.Table]:
    """The rows of the trials, by trial id, some trials at a time."""
    ids = sorted(places)
    for at in range(0, len(ids), BATCH):
        by_place: dict[str | int, list[str]] = {}
        for name in ids[at : at + BATCH]:
            by_place.setdefault(places[name], []).append(name)
        found = [_load(files[place], place, names) for place, names in by_place.items() if place in files]
        if found:
            yield parquet.ordered(table, parquet.united(Path(table), found))


def _load(file: Path, place: str | int, names: list[str]) -> pa.Table:
    return parquet.load_own(file, place) if isinstance(place, str) else parquet.load(file, names)


def _sweep_up(folder: Path, places: Mapping[str, str | int], number: int) -> None:
    """Takes away what part `number` stands for, the rows first: own files, older parts, and what was cut short."""
    for table in TABLES:
        there = parquet.listing(folder, table)
        over: list[str | int] = [name for name in there.own if name in places]
        over += [part for part in there.parts if part != number]
        for place in over:
            file_of(folder, table, place).unlink(missing_ok=True)


def _count(folder: Path) -> int:
    found = (parquet.listing(folder, table) for table in TABLES)
    return sum(len(there.own) + len(there.parts) for there in found)
