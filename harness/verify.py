"""`fedstill verify`: a results folder held against itself, its data and MLflow, and against itself run once more."""

from __future__ import annotations

import secrets
from pathlib import Path

from rich.table import Table
from rich.text import Text

from harness import lock
from harness.audit import Check, audit
from harness.parquet import Damaged
from harness.progress import Display, console
from harness.projection import Projection
from harness.record import Store
from harness.refusal import Refused, masked
from harness.repeat import repeat
from harness.tracking import fault_of, file_behind, first_line, tracking_uri


def verify(results: Path, rerun: int = 0, seed: int | None = None) -> bool:
    """Prints what was checked and every disagreement; whether there is none. Changes nothing. Raises Refused.

    rerun: finished trials to run again, chosen by the seed; None: drawn.
    """
    if seed is not None and not rerun:
        raise Refused("--seed chooses what --rerun runs again: give both, or neither")
    if rerun < 0 or (seed is not None and seed < 0):
        raise Refused("--rerun and --seed are whole numbers from 0")
    store = Store(results, writable=False)
    store.require_tables()
    checks, notes = [*audit(results), mlflow_agrees(store)], list[str]()
    if rerun:
        seed = secrets.randbelow(2**31) if seed is None else seed
        with Display(console(), ()) as display:
            again, notes = repeat(store, rerun, seed, display)
        checks.append(again)
    return _show(checks, notes)


def mlflow_agrees(store: Store) -> Check:
    """Whether MLflow has one finished run for each row, of just this row, and no others."""
    check, uri = Check("mlflow"), tracking_uri(store.path)
    file = file_behind(uri)
    if file is not None and (not file.is_file() or not file.stat().st_size):
        check.left[f"there is no MLflow database {file}"] += 1
        return check
    if lock.in_use(store.path):
        check.left["MLflow, while another process works on the folder"] += 1
        return check
    if file is not None and (what := fault_of(file)):
        check.faults.append(f"{file} {what}: fedstill sync {store.path} makes it anew")
        return check
    try:
        there = Projection(uri, None, store, look=True)
        if there.empty:
            check.left[
                f"MLflow at {masked(uri)} has no run of this folder: fedstill sync {store.path} brings it"
            ] += 1
            return check
        check.faults += [f"trial {name}: {what}" for name, what in there.differences()]
        check.looked = len(store.finished())
    except Damaged:
        check.left["a table is damaged, so MLflow was not asked"] += 1
    except Exception as problem:
        check.left[f"MLflow at {masked(uri)} can't be asked: {first_line(problem)}"] += 1
    return check


def _show(checks: list[Check], notes: list[str]) -> bool:
    out, wrong = console(), sum(len(check.faults) for check in checks)
    grid = Table(show_edge=False, pad_edge=False)
    grid.add_column("check")
    for column in ("looked at", "disagree", "not checked"):
        grid.add_column(column, justify="right")
    for check in checks:
        grid.add_row(*map(Text, (check.name, *map(str, (check.looked, len(check.faults), check.left.total())))))
    out.print(grid, "")
    lines = [f"- {check.name}: {count} not checked: {why}" for check in checks for why, count in check.left.items()]
    lines += [f"- {note}" for note in notes]
    lines += [f"{check.name}: {fault}" for check in checks for fault in check.faults]
    lines.append(f"Disagreements: {wrong}." if wrong else "Nothing disagrees.")
    for line in lines:
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    return not wrong
