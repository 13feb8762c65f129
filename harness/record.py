"""Parquet: the tables `trials`, `rounds`, `clients` and `events` of a results folder, and where a row comes from.

Every trial is one file per table, with none in `events/` where nothing happened. The file in `trials/` is written
last, so its existence is what makes a cell done; readers leave out the other tables' rows of trials without one.
`results/README.md` describes every column.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from harness import __version__
from harness.durable import write
from harness.refusal import Refused

if TYPE_CHECKING:
    import pandas as pd

Row = Mapping[str, Any]
TableName = Literal["trials", "rounds", "clients", "events"]
TABLES: tuple[TableName, ...] = get_args(TableName)
PACKAGES = ("ray", "torch", "torchvision", "numpy", "pandas", "pyarrow", "mlflow")


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
        "versions device command started stage drift search",
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


class Store:
    """The tables of one results folder: `<path>/{trials,rounds,clients,events}/*.parquet`. One writer, any readers.

    writable: make the folders and prove that they can be written. Without it they stay as they are.
    Raises Refused if the path is no folder, can't be written, or leads out of its parent through a link.
    """

    def __init__(self, path: Path | str, writable: bool = True) -> None:
        self.path = Path(path)
        for folder in (self.path, *(self.path / table for table in TABLES)):
            if folder.is_symlink() and not folder.resolve().is_relative_to(folder.parent.resolve()):
                raise Refused(f"results folder {folder} is a link to {folder.resolve()}: give that folder itself")
            if folder.exists() and not folder.is_dir():
                raise Refused(f"results folder {folder} is a file: give a folder, or a path that does not exist yet")
            if writable and (folder != self.path / "events" or folder.exists()):
                _probe(folder)
        if not writable and not self.path.is_dir():
            raise Refused(f"there is no results folder {self.path}: `fedstill sweep CARD` makes one")

    def commit(self, trial: Row, rounds: Sequence[Row], clients: Sequence[Row], events: Sequence[Row] = ()) -> None:
        """Write one ended trial. Columns beyond the fixed ones are kept. A second call replaces the first.

        Raises OSError if a file can't be written; the trial then has no row, and no reader sees a part of it.
        """
        trial_id = str(trial["trial_id"])
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", trial_id):
            raise ValueError(f"a trial id names files: {trial_id!r} can't")
        if strangers := {row["trial_id"] for row in (*rounds, *clients, *events)} - {trial_id}:
            raise ValueError(f"rows of {sorted(strangers)} came with trial {trial_id}")
        # A retry takes the old row away first: at no moment does it stand beside rounds that are not its own.
        (self.path / "trials" / f"{trial_id}.parquet").unlink(missing_ok=True)
        (self.path / "events" / f"{trial_id}.parquet").unlink(missing_ok=True)
        tables: dict[TableName, Sequence[Row]] = {"rounds": rounds, "clients": clients, "events": events}
        for table, rows in {**tables, "trials": [trial]}.items():
            if rows or table != "events":
                (self.path / table).mkdir(exist_ok=True)
                write(self.path / table / f"{trial_id}.parquet", _encode(SCHEMAS[table], rows))

    def discard(self, names: Sequence[str]) -> None:
        """Takes trials out of all tables; the rows of `trials` first, so that no reader sees a part of one."""
        for table in reversed(TABLES):
            for name in names:
                (self.path / table / f"{name}.parquet").unlink(missing_ok=True)

    def finished(self) -> dict[str, str]:
        """Status (done, failed, stopped) of every trial that has a row, by trial id."""
        return {row["trial_id"]: row["status"] for row in self._table("trials").to_pylist()}

    def rows(self, table: TableName, trial_id: str | None = None) -> list[dict[str, Any]]:
        """The rows of a table, or of one trial in it, with None for what is missing; ordered as `read`."""
        return list(self._table(table, trial_id).to_pylist())

    def read(self, table: TableName) -> pd.DataFrame:
        """A table over all trials: the union of their columns, by trial_id, then as ORDER says.

        Raises Refused naming the file that is damaged.
        """
        frame: pd.DataFrame = self._table(table).to_pandas()
        return frame

    def _table(self, table: TableName, trial_id: str | None = None) -> pa.Table:
        own = self.path / table / f"{trial_id}.parquet"
        files = [own] if trial_id and own.is_file() else sorted((self.path / table).glob("*.parquet"))
        parts = [_load(file) for file in files if not file.name.startswith(".")]
        try:
            empty = pa.Table.from_batches([], SCHEMAS[table])  # empty_table() would import pandas
            whole = pa.concat_tables([empty, *parts], promote_options="permissive")
        except pa.ArrowException as problem:
            raise Refused(f"the files of {self.path / table} do not fit together: {problem}") from None
        if trial_id is not None:
            whole = whole.filter(pc.equal(whole["trial_id"], pa.scalar(trial_id)))
        if table != "trials":
            committed = self._table("trials", trial_id)["trial_id"].combine_chunks()
            whole = whole.filter(pc.is_in(whole["trial_id"], committed))
        return whole.sort_by([(name, "ascending") for name in ORDER[table]])


def _probe(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as problem:
        raise Refused(f"results folder {folder} can't be written: {problem.strerror or problem}") from None


def _encode(schema: pa.Schema, rows: Sequence[Row]) -> pa.Buffer:
    for name in dict.fromkeys(name for row in rows for name in row):
        if name not in schema.names:
            values = [row.get(name) for row in rows]
            schema = schema.append(pa.field(name, _extra_type(name) or pa.array(values).type))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), sink, compression="zstd")
    return sink.getvalue()


def _extra_type(name: str) -> pa.DataType | None:
    """The type of a headline column; it can't be seen in the values when the only one is missing."""
    if "_rounds_to_" in name or "_bytes_to_" in name:
        return pa.int64()
    return pa.float64() if "_accuracy_" in name else None


def _load(file: Path) -> pa.Table:
    try:
        with pq.ParquetFile(file) as parquet:
            return parquet.read(use_threads=False)
    except (pa.ArrowException, OSError) as problem:
        what = str(problem).splitlines()[0]
        raise Refused(
            f"{file} is damaged ({what}): delete it and its namesakes in {'/, '.join(TABLES)}/, "
            "then run the sweep again, which repeats that trial"
        ) from None


def provenance() -> dict[str, str | bool | None]:
    """The columns `commit`, `clean` (both None away from a checkout) and `versions` (JSON: package -> version)."""
    versions: dict[str, str | None] = {"fedstill": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    # An installed copy can lie inside somebody's repository: that commit would say nothing about this code.
    tracked = _git("ls-files", "--error-unmatch", "--", Path(__file__).name) is not None
    status = _git("status", "--porcelain") if tracked else None
    return {
        "commit": _git("rev-parse", "HEAD") if tracked else None,
        "clean": None if status is None else not status,
        "versions": json.dumps(versions),
    }


def _git(*words: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def flatten(config: Row, prefix: str = "") -> dict[str, Any]:
    """Nested config -> dotted keys: {"local": {"lr": 0.1}} -> {"local.lr": 0.1}. Lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        flat |= nested
    return flat
