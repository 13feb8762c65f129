"""Finished trials run once more, by the engine that every sweep has, and compared bit for bit."""

from __future__ import annotations

import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from harness import config, sweep
from harness.audit import Check
from harness.axes import Sweep
from harness.claims import LONGEST, Data, Unknown, here, settings_of
from harness.config import Execution, Trial, trial_id
from harness.record import Row, Store, TableName
from harness.refusal import Refused
from harness.scribe import Watcher
from harness.summary import CLOCKS

# Where, when, how and for what a trial was run: these columns may differ.
RUN = {
    *("sweep", "commit", "clean", "versions", "device", "hosts", "threads", "command", "drift"),
    *("stage", "search", "published", "rules_version"),
}
KEYS: dict[TableName, tuple[str, ...]] = {
    "rounds": ("round", "role"),
    "clients": ("round", "client", "role"),
    "trials": (),
}  # what tells rows apart
BITS = ("fedstill", "python", "torch", "numpy")  # packages whose versions numbers depend on


def repeat(store: Store, number: int, seed: int, watcher: Watcher) -> tuple[Check, list[str]]:
    """Runs so many finished trials again, chosen by the seed. Also what else should be said, in a line each."""
    check = Check("rerun")
    rows = sorted((row for row in store.rows("trials") if row["status"] == "done"), key=lambda row: row["trial_id"])
    chosen = random.Random(seed).sample(rows, min(number, len(rows)))
    names = ", ".join(row["trial_id"] for row in chosen) or "none"
    notes = [f"run again: {names} (of {len(rows)} finished trials, chosen by --seed {seed})"]
    cells: defaultdict[str, list[Trial]] = defaultdict(list)  # by device
    data, made = Data(), {}
    for row in chosen:
        try:
            cells[row["device"] or ""].append(_cell(row, data))
            made[row["trial_id"]] = row
        except Unknown as why:
            check.left[str(why)] += 1
    for device, own in cells.items():
        with tempfile.TemporaryDirectory(prefix="fedstill-") as folder:
            again = Store(Path(folder) / "again")
            sweep.run(Sweep("verify", "", tuple(own), (), _how(device)), again.path, watcher)
            for name in map(trial_id, own):
                check.looked += 1
                new = again.rows("trials", name)[0]
                other = conditions(made[name], new)
                check.faults += [f"trial {name}: {fault}{other}" for fault in differences(store, again, name)]
                notes += [f"trial {name}{other}: bits are promised only for the same ones"] if other else []
    return check, notes


def _cell(row: Row, data: Data) -> Trial:
    """A trial as it was. Raises Unknown if it can't be run here."""
    try:
        cell = config.resolve(here(settings_of(row)).model_dump())
    except Refused as refusal:
        raise Unknown(f"its config is refused here: {str(refusal)[:LONGEST]}") from None
    for name in (cell.dataset, cell.proxy.source):
        if name not in ("none", "train"):
            data.arrays(name)
    if trial_id(cell) != row["trial_id"]:
        raise Unknown("its config is not that of its trial id")
    return cell


def _how(device: str) -> Execution:
    """On a GPU what was made on one like that here; anything else inline on the CPU."""
    like = torch.cuda.is_available() and torch.cuda.get_device_name() == device
    return Execution(mlflow=False, checkpoint_every=0, gpus_per_server=float(like))


def conditions(before: Row, now: Row) -> str:
    """What was not the same when two rows were made, though numbers depend on it; empty if all was."""
    old, new = (
        {**{key: row[key] for key in ("device", "threads")}, **json.loads(row["versions"] or "{}")}
        for row in (before, now)
    )
    changed = [
        f"{k} {old.get(k)}, here {new.get(k)}" for k in ("device", "threads", *BITS) if old.get(k) != new.get(k)
    ]
    changed += [f"a change on the way, {before['drift']}"] if before["drift"] else []
    return f" (made with {'; '.join(changed)})" if changed else ""


def differences(before: Store, now: Store, name: str) -> Iterator[str]:
    """For each table of a trial the first value that differs, bit for bit."""
    for table, keys in KEYS.items():
        old, new = _rows(before, table, name), _rows(now, table, name)
        if old.keys() != new.keys():
            odd = ", ".join(map(str, min(old.keys() ^ new.keys(), key=str)))
            yield f"{table}: there were {len(old)} rows, and are {len(new)}; one side has no {odd}"
            continue
        found = [change for at in sorted(old) for change in _changes(old[at], new[at])]
        if found:
            row, column, was, value = found[0]
            place = ", ".join(f"{key} {row[key]}" for key in keys)
            more = f"; {len(found)} values differ" if len(found) > 1 else ""
            yield f"{table}: {column}{f' of {place}' if place else ''} was {was}, is {value}{more}"


def _rows(store: Store, table: TableName, name: str) -> dict[tuple[Any, ...], Row]:
    """The rows of a trial by what tells them apart."""
    return {tuple(row[key] for key in KEYS[table]): _plain(row) for row in store.rows(table, name)}


def _changes(old: Row, new: Row) -> Iterator[tuple[Row, str, Any, Any]]:
    for column in dict.fromkeys([*old, *new]):
        if repr(old.get(column)) != repr(new.get(column)):  # tells -0.0 from 0.0, and takes NaN for NaN
            yield old, column, old.get(column), new.get(column)


def _plain(row: Row) -> Row:
    """What has to be the same. A column of whole numbers is one of fractions beside some methods' rows."""
    kept = {k: v for k, v in row.items() if k not in CLOCKS and k not in RUN and v is not None}
    return {k: float(v) if isinstance(v, Real) and k not in KEYS["clients"] else v for k, v in kept.items()}
