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
from typing import TYPE_CHECKING, Any

from harness import __version__, compaction, parquet, repair
from harness.durable import write
from harness.parquet import SCHEMAS, TABLES, Row, TableName, file_of
from harness.refusal import Refused

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = ["SCHEMAS", "TABLES", "Row", "Store", "TableName", "flatten", "provenance"]
PACKAGES = ("ray", "torch", "torchvision", "numpy", "pandas", "pyarrow", "mlflow")


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

    def require_tables(self) -> None:
        """Raises Refused for a folder that no sweep has written to."""
        if not (self.path / "trials").is_dir():
            raise Refused(
                f"{self.path} holds no tables of a sweep: give a results folder, such as results/quickstart"
            )

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
        for table in ("trials", "events"):
            file_of(self.path, table, trial_id).unlink(missing_ok=True)
        content = {"rounds": rounds, "clients": clients, "events": events, "trials": [trial]}
        for table in parquet.WRITTEN:
            if content[table] or table != "events":
                (self.path / table).mkdir(exist_ok=True)
                write(file_of(self.path, table, trial_id), parquet.encode(table, content[table]))

    def quarantine(self) -> list[str]:
        """Put damaged files aside with the rows of their trials, so that these run again; take leftovers away.

        Only for who has the folder's lock. Returns a line for each file that was put aside.
        """
        return repair.quarantine(self.path)

    def discard(self, names: Sequence[str]) -> None:
        """Take trials out of all tables; the rows of `trials` first, so that no reader sees a part of one."""
        compaction.discard(self.path, names)

    def finished(self) -> dict[str, str]:
        """Status (done, failed, stopped) of every trial that has a row, by trial id."""
        return {row["trial_id"]: row["status"] for row in self.rows("trials")}

    def rows(self, table: TableName, trial_id: str | None = None) -> list[dict[str, Any]]:
        """The rows of a table, or of one trial in it, with None for what is missing; ordered as `read`."""
        return list(parquet.read(self.path, table, trial_id).to_pylist())

    def arrays(self, table: TableName, names: Sequence[str], trial_id: str | None = None) -> dict[str, np.ndarray]:
        """Columns as numpy arrays, ordered as `read`, at a fraction of its cost: see `parquet.arrays`."""
        return parquet.arrays(parquet.read(self.path, table, trial_id), names)

    def read(self, table: TableName) -> pd.DataFrame:
        """A table over all trials: the union of their columns, by trial_id, then as ORDER says.

        Raises Refused naming the file that is damaged.
        """
        frame: pd.DataFrame = parquet.read(self.path, table).to_pandas()
        return frame


def _probe(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as problem:
        raise Refused(f"results folder {folder} can't be written: {problem.strerror or problem}") from None


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
