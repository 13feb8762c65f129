"""What is damaged is put aside, with the rows that rest on it, so that those trials run again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from harness import parquet
from harness.compaction import next_number, write_part
from harness.parquet import TABLES, Damaged, file_of

Spans = list[tuple[str, str]]  # first and last trial id of row groups that can't be read
EVERYTHING: Spans = [("", "\U0010ffff")]


def quarantine(folder: Path) -> list[str]:
    """Renames damaged files of results to `.damaged-<name>`; takes away drafts, and files that no row stands for.

    Of a compacted part what can still be read is kept: its trials go into a new part. Returns a line for each file.
    """
    lines = []
    for number in parquet.listing(folder, "trials").parts:
        lines += _mend(folder, number)
    for name, faults in _own_faults(folder):
        for table in TABLES:  # the row first: at no moment does it stand there without what it rests on
            _aside(file_of(folder, table, name))
        lines += [f"{fault.file} is damaged ({fault.what}): put aside with all of trial {name}" for fault in faults]
    for file in leftovers(folder):
        file.unlink(missing_ok=True)
    return lines


def found_damaged(folder: Path) -> list[Damaged]:
    """The same faults, with everything left as it is."""
    there = parquet.listing(folder, "trials")
    parts = [fault for number in there.parts for fault in _read_part(folder, number)[0]]
    return parts + [fault for _, faults in _own_faults(folder) for fault in faults]


def leftovers(folder: Path) -> list[Path]:
    """Drafts of writers that were killed, and files of trials and parts without a row."""
    there = parquet.listing(folder, "trials")
    found = [file for table in TABLES for file in sorted((folder / table).glob(".*.draft"))]
    found += [file for table in TABLES for file in (folder / table).glob(".probe")]
    for table in TABLES:
        other = parquet.listing(folder, table)
        lost: list[str | int] = [*sorted(set(other.own) - set(there.own))]
        lost += sorted(set(other.parts) - set(there.parts))
        found += [file_of(folder, table, place) for place in lost]
    return found


def _aside(file: Path) -> None:
    if file.exists():
        file.replace(file.with_name(f".damaged-{file.name}"))


def _own_faults(folder: Path) -> list[tuple[str, list[Damaged]]]:
    """The trials with own files of which something is wrong. Reading is most of it, so threads help."""
    names = sorted(parquet.listing(folder, "trials").own)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda name: _faults(folder, name), names))
    return [(name, faults) for name, faults in zip(names, found, strict=True) if faults]


def _faults(folder: Path, name: str) -> list[Damaged]:
    """What is wrong with a trial's own files."""
    faults = []
    for table in TABLES:
        file = file_of(folder, table, name)
        try:
            if file.exists():
                rows = parquet.load_own(file, name)
                rows.validate(full=True)
                if table == "trials" and (len(rows) != 1 or not _has_status(rows)):
                    raise Damaged(file, f"it holds {len(rows)} rows, and should hold one with a status")
        except Damaged as fault:
            faults.append(fault)
        except pa.ArrowException as problem:
            faults.append(Damaged(file, str(problem).splitlines()[0]))
    return faults


def _has_status(rows: pa.Table) -> bool:
    return "status" in rows.column_names and rows["status"].null_count == 0


def _mend(folder: Path, number: int) -> list[str]:
    """Keeps what is whole of a compacted part, if some of it is damaged."""
    faults, sound = _read_part(folder, number)
    if not faults:
        return []
    if sound:
        write_part(folder, next_number(folder), dict.fromkeys(sound, number))
    for table in TABLES:
        _aside(file_of(folder, table, number))
    kept = f"put aside; {len(sound)} of its trials could be kept"
    return [f"{fault.file} is damaged ({fault.what}): {kept}" for fault in faults]


def _read_part(folder: Path, number: int) -> tuple[list[Damaged], set[str]]:
    """The faults of a compacted part, and the trials that none of them touches."""
    faults: list[Damaged] = []
    names: set[str] = set()
    bad: Spans = []
    for table in TABLES:
        file = file_of(folder, table, number)
        if file.exists():
            broken = _read_groups(file, names if table == "trials" else None)
            faults += [fault for fault, _ in broken[:1]]  # one line a file
            bad += [span for _, span in broken]
    return faults, {name for name in names if not any(low <= name <= high for low, high in bad)}


def _read_groups(file: Path, names: set[str] | None) -> list[tuple[Damaged, tuple[str, str]]]:
    """The row groups of a file that can't be read. names: gets the trial ids of the others."""
    broken, at = [], EVERYTHING[0]
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            for group in range(opened.num_row_groups):
                at = parquet.span(opened, group)
                try:
                    rows = opened.read_row_group(group, use_threads=False)
                    rows.validate(full=True)
                    inside = set(rows["trial_id"].to_pylist())
                    if names is not None:
                        names |= inside
                except (pa.ArrowException, OSError, ValueError, KeyError) as problem:
                    broken.append((Damaged(file, str(problem).splitlines()[0]), at))
    except (pa.ArrowException, OSError, ValueError) as problem:
        broken.append((Damaged(file, str(problem).splitlines()[0]), EVERYTHING[0]))
    return broken
