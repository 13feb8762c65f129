"""The Parquet files behind the tables: their columns, how they are written, and which file holds which trial.

A trial's rows lie in files of its own, `<table>/<trial_id>.parquet`, or with others' in a compacted part,
`<table>/compacted+<number>.parquet`. The table `trials` decides which: an own file wins over the parts, a newer part
over an older one, and the trial's other rows are read from where its row in `trials` was found. So files can be
written and taken away one by one without a moment at which a trial is there twice, or in pieces.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from harness.refusal import Refused

Row = Mapping[str, Any]
TableName = Literal["trials", "rounds", "clients", "events"]
TABLES: tuple[TableName, ...] = get_args(TableName)
WRITTEN: tuple[TableName, ...] = ("rounds", "clients", "events", "trials")  # what makes a trial done comes last
OPTIONS = {"compression": "zstd", "write_page_checksum": True}
TRIES = 50  # readings of a folder that is being changed
PART = re.compile(r"compacted\+(\d{6,})")  # no trial's id has a "+"


def _schema(text: str, whole: str, real: str, flags: str = "", lists: str = "") -> pa.Schema:
    kinds = (
        (text, pa.string()),
        (whole, pa.int64()),
        (real, pa.float64()),
        (flags, pa.bool_()),
        (lists, pa.list_(pa.float64())),
    )
    return pa.schema([(name, kind) for names, kind in kinds for name in names.split()])


# The columns that every file has, whatever the method: their types hold even where all values are null.
SCHEMAS: dict[TableName, pa.Schema] = {
    "trials": _schema(
        text="trial_id sweep status reason method dataset net config config_hash partition_hash data_hash commit "
        "versions device command started stage drift search rows_hash published",
        whole="seed clients rules_version hosts threads rounds_done peak_memory_bytes up_bytes down_bytes steps "
        "server_steps samples",
        real="participation alpha partition_js partition_classes partition_size_cv seconds",
        flags="clean",
    ),
    "rounds": _schema(
        text="trial_id role up_kinds down_kinds",
        whole="round up_bytes down_bytes steps server_steps samples",
        real="accuracy balanced_accuracy macro_f1 worst_recall tail_recall loss ece own_label_accuracy "
        "own_label_worst_decile own_label_std seconds server_seconds train_loss "
        "validation_accuracy validation_balanced_accuracy validation_loss",
        lists="recall",
    ),
    "clients": _schema(
        text="trial_id role arch",
        whole="round client samples steps up_bytes down_bytes",
        real="train_loss seconds",
    ),
    "events": _schema(text="trial_id time kind detail", whole="round client", real=""),
}
ORDER: dict[TableName, tuple[str, ...]] = {
    "trials": ("trial_id",),
    "rounds": ("trial_id", "round", "role"),
    "clients": ("trial_id", "round", "client", "role"),
    "events": ("trial_id", "time"),
}


class Damaged(Refused):
    """A file that is not what was written to it. what: in a few words."""

    def __init__(self, file: Path, what: str) -> None:
        self.file, self.what = file, what
        super().__init__(
            f"{file} is damaged ({what}): run its sweep again, which puts it aside and repeats what was in it"
        )


@dataclass(frozen=True)
class Listing:
    """Who has rows in a table. own: id of a trial with a file of its own -> inode; parts: numbers, newest first."""

    own: Mapping[str, int]
    parts: tuple[int, ...]

    def stands(self, later: Listing) -> bool:
        """Whether all that was listed is still there; what came new does not matter."""
        return self.own.items() <= later.own.items() and set(self.parts) <= set(later.parts)


def listing(folder: Path, table: TableName) -> Listing:
    """By the names of a table's files; dot-files are none of it. folder: of the results."""
    own, parts = {}, []
    with suppress(FileNotFoundError), os.scandir(folder / table) as entries:
        for entry in entries:
            name = entry.name.removesuffix(".parquet")
            if name == entry.name or name.startswith("."):
                continue
            if numbered := PART.fullmatch(name):
                parts.append(int(numbered[1]))
            else:
                own[name] = entry.inode()
    return Listing(own, tuple(sorted(parts, reverse=True)))


def file_of(folder: Path, table: TableName, place: str | int) -> Path:
    """Where the rows of a trial lie (place: its id), or those of a compacted part (its number)."""
    return folder / table / (f"{place}.parquet" if isinstance(place, str) else f"compacted+{place:06d}.parquet")


def read(folder: Path, table: TableName, trial_id: str | None = None) -> pa.Table:
    """A table over all trials, or of one: the union of their columns, ordered as ORDER says.

    The folder may be written to at the same time. Raises Refused, Damaged where a file is.
    """
    for _ in range(TRIES):
        before = listing(folder, "trials")
        try:
            found = _gather(folder, table, trial_id, before)
        except FileNotFoundError:
            continue
        if before.stands(listing(folder, "trials")):
            empty = pa.Table.from_batches([], SCHEMAS[table])  # empty_table() would import pandas
            return ordered(table, united(folder / table, [empty, *found]))
    raise Refused(f"the files of {folder} are changed all the time: try again when no other process works on them")


def _gather(folder: Path, table: TableName, trial_id: str | None, there: Listing) -> list[pa.Table]:
    own = [name for name in ([trial_id] if trial_id is not None else sorted(there.own)) if name in there.own]
    files = {name: file_of(folder, table, name) for name in own}
    found = [load_own(file, name) for name, file in files.items() if table == "trials" or file.exists()]
    if trial_id is not None and own:
        return found
    only = None if trial_id is None else [trial_id]
    for number, ids in standing(folder, there, only).items():
        file = file_of(folder, table, number)
        found += [load(file, sorted(ids))] if ids and (table == "trials" or file.exists()) else []
    return found


def standing(folder: Path, there: Listing, only: Sequence[str] | None = None) -> dict[int, set[str]]:
    """The trials whose row is that of a compacted part, by its number. only: of these trials."""
    taken, found = set(there.own), {}
    for number in there.parts:
        ids = load(file_of(folder, "trials", number), only, ["trial_id"])["trial_id"].to_pylist()
        found[number] = set(ids) - taken
        taken |= found[number]
    return found


def load_own(file: Path, trial_id: str) -> pa.Table:
    """A trial's own file. Raises Damaged, also where it holds another trial's rows: a copy of something."""
    rows = load(file)
    if strangers := set(rows["trial_id"].unique().to_pylist()) - {trial_id}:
        raise Damaged(file, f"it holds rows of {', '.join(map(str, sorted(strangers, key=str)[:3]))}")
    return rows


def load(file: Path, only: Sequence[str] | None = None, columns: list[str] | None = None) -> pa.Table:
    """The rows of a file. only: of these trials, sorted; row groups without them are not read. Raises Damaged."""
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            groups = list(range(opened.num_row_groups))
            if only is not None:
                groups = [at for at in groups if _between(only, *span(opened, at))]
            rows = opened.read_row_groups(groups, columns, use_threads=False).replace_schema_metadata()
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as problem:
        raise Damaged(file, str(problem).splitlines()[0]) from None
    fixed = {field.name: field.type for field in SCHEMAS[file.parent.name]}  # type: ignore[index]
    if odd := [field.name for field in rows.schema if fixed.get(field.name, field.type) != field.type]:
        raise Damaged(file, f"{', '.join(odd)} of another type than this table's")
    if "trial_id" not in rows.column_names:
        raise Damaged(file, "it has no column trial_id")
    return rows if only is None else rows.filter(pc.is_in(rows["trial_id"], pa.array(only, pa.string())))


def span(opened: pq.ParquetFile, group: int) -> tuple[str, str]:
    """The first and the last trial id of a row group, as far as the file says."""
    about = opened.metadata.row_group(group)
    for at in range(about.num_columns):
        seen = about.column(at).statistics if about.column(at).path_in_schema == "trial_id" else None
        if seen is not None and seen.has_min_max:
            return seen.min, seen.max
    return "", "\U0010ffff"


def _between(names: Sequence[str], low: str, high: str) -> bool:
    at = bisect_left(names, low)
    return at < len(names) and names[at] <= high


def united(place: Path, parts: Sequence[pa.Table]) -> pa.Table:
    """Tables as one, with the columns of all. Raises Refused where their types can't meet."""
    try:
        return pa.concat_tables(parts, promote_options="permissive")
    except pa.ArrowException as problem:
        raise Refused(f"the files of {place} do not fit together: {problem}") from None


def ordered(table: TableName, rows: pa.Table) -> pa.Table:
    """Rows in the order of their table."""
    return rows.sort_by([(name, "ascending") for name in ORDER[table]])


def arrays(rows: pa.Table, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of a table as numpy arrays, those that it has.

    Numbers are float64 with NaN for null; texts and lists are objects with None for null, a list is an array itself.
    """
    found = {}
    for name in names:
        if name not in rows.column_names:
            continue
        column = rows[name].combine_chunks()
        if pa.types.is_list(column.type):
            flat = column.values.to_numpy(zero_copy_only=False)
            ends = [*column.offsets.to_numpy()]
            lists = [
                flat[a:b] if there else None for a, b, there in zip(ends, ends[1:], column.is_valid(), strict=False)
            ]
            found[name] = np.fromiter(lists, object, len(lists))
        elif pa.types.is_string(column.type):
            found[name] = column.to_numpy(zero_copy_only=False)
        else:
            found[name] = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return found


def encode(table: TableName, rows: Sequence[Row]) -> pa.Buffer:
    """Rows as the bytes of a Parquet file. Columns beyond the fixed ones are kept."""
    schema = SCHEMAS[table]
    for name in dict.fromkeys(name for row in rows for name in row):
        if name not in schema.names:
            values = [row.get(name) for row in rows]
            schema = schema.append(pa.field(name, _extra_type(name) or pa.array(values).type))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), sink, **OPTIONS)
    return sink.getvalue()


def _extra_type(name: str) -> pa.DataType | None:
    """The type of a headline column; it can't be seen in the values when the only one is missing."""
    if "_rounds_to_" in name or "_bytes_to_" in name:
        return pa.int64()
    return pa.float64() if "_accuracy_" in name else None
