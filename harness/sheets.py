"""A leaderboard as CSV, for machines: all that is known of every cell and of every published value."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from io import StringIO

from harness.cells import Cell, Grid
from harness.published import COLUMNS as THEIRS
from harness.statistics import Summary
from harness.verdicts import Verdict

CELLS = (
    *("metric", "unit", "method", "role", "row", "setting", "n", "mean", "sd", "iqm", "low", "high", "interval"),
    *("letters", "baseline", "pairs", "unpaired", "difference", "difference_low", "difference_high", "p", "p_holm"),
    *("test", "failed", "diverged", "stopped", "absent", "steps", "server_steps", "values", "trials"),
)


def cells_text(first: Summary, others: Sequence[Grid] = ()) -> str:
    """Every cell of every metric as a line of CSV, with all that is known of it; empty where there is nothing.

    values: "seed=value" for each; p: uncorrected. Texts that a spreadsheet would take for formulas are quoted.
    """
    out = StringIO()
    sheet = csv.DictWriter(out, CELLS, restval="", lineterminator="\n")
    sheet.writeheader()
    grids: list[Summary | Grid] = [first, *others]
    for one in grids:
        for line, cells in zip(one.lines, one.cells, strict=True):
            for cell in cells:
                known = {"metric": one.metric, "unit": one.how.unit, "row": line.name, **_sheet(cell)}
                sheet.writerow({key: guarded(v) if isinstance(v, str) else v for key, v in known.items()})
    return out.getvalue()


def _sheet(cell: Cell) -> dict[str, object]:
    known: dict[str, object] = {
        **{key: getattr(cell, key) for key in ("method", "role", "setting", "n", "mean", "sd", "iqm", "low", "high")},
        **{key: getattr(cell, key) for key in ("letters", "failed", "diverged", "stopped", "absent")},
        **{key: getattr(cell, key) for key in ("steps", "server_steps")},
        "interval": cell.interval.kind if cell.interval else "",
        "values": " ".join(f"{seed}={value!r}" for seed, value in cell.values.items()),
        "trials": " ".join(cell.trial_ids),
    }
    if (made := cell.difference) is not None:
        known |= {"baseline": made.baseline, "pairs": made.paired.n, "unpaired": made.unpaired, "p_holm": made.p}
        known |= {
            "difference": made.paired.mean if made.paired.n else "",
            "p": made.paired.p,
            "test": made.paired.test,
        }
        if made.paired.interval:
            known |= {"difference_low": made.paired.interval.low, "difference_high": made.paired.interval.high}
    return {key: "" if value is None else value for key, value in known.items()}


def guarded(text: str) -> str:
    """A text that no spreadsheet takes for a formula: one that begins like one gets an apostrophe in front."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


OURS = ("verdict", "why", "row", "our_setting", "n", "mean", "low", "high", "difference", "trials")


def beside_text(found: Sequence[Verdict]) -> str:
    """Every published value as a line of CSV, with ours and the verdict."""
    out = StringIO()
    sheet = csv.DictWriter(out, (*THEIRS, *OURS), restval="", lineterminator="\n")
    sheet.writeheader()
    for one in found:
        known: dict[str, object] = {name: getattr(one.theirs, name) for name in THEIRS}
        known |= {"verdict": one.finding, "why": "; ".join(one.why), "row": one.name, "our_setting": one.setting}
        if one.cell is not None:
            known |= {key: getattr(one.cell, key) for key in ("n", "mean", "low", "high")}
            known |= {"difference": one.difference, "trials": " ".join(one.cell.trial_ids)}
        texts = {key: "" if value is None else value for key, value in known.items()}
        sheet.writerow({key: guarded(v) if isinstance(v, str) else v for key, v in texts.items()})
    return out.getvalue()
